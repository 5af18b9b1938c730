"""Which users go into the next bulk job, and their rows."""

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from audience_sync import crash
from audience_sync.queue import deliveries, due, jobs, outcomes, split
from audience_sync.queue.job_state import Job

MOST_BYTES = 20_000_000  # of an upload; Userpilot takes 50 MB
MOST_SEEN = 50_000  # of the users that wait
USERS_PER_TRANSACTION = 200  # users that a transaction takes into a job, so that the live lane hardly waits


@dataclass(slots=True)
class Gatherer:
    """`row` writes a user's merged traits as a line of the upload; None if only the live lane should tell them."""

    row: Callable[[str, dict[str, Any]], bytes | None]
    fingerprint: str | None
    _unfit: set[str] = field(default_factory=set)

    def candidates(
        self,
        connection: sa.Connection,
        now: dt.datetime,
        pace: split.Pace,
        room: int,
        most: int,
        start_seconds: float,
    ) -> list[str]:
        """At most so many users for the next job. The oldest are left to the live lane, which takes them meanwhile.

        `room` is what the live lane may burst now, `start_seconds` how long the job before still runs.
        """
        beside = split.live_share(pace.rows_per_job, room, pace, start_seconds)
        limit = min(MOST_SEEN, pace.rows_per_job + beside + 1)
        waiting: dict[str, bool] = {}
        bursting = 0
        for delivery_class in due.CLASSES:
            left = limit - len(waiting)
            if left > 0:
                for each in due.users_due(connection, delivery_class, now, left, self.fingerprint):
                    waiting[each.user_id] = waiting.get(each.user_id, False) or each.was_attempted
            if delivery_class != "push":
                bursting = len(waiting)
        at_once = min(bursting, room)
        rows = split.job_rows(len(waiting), at_once, pace, start_seconds)
        if not rows:
            return []
        fit = [user for user, was_tried in waiting.items() if not was_tried and user not in self._unfit]
        left_to_live = split.live_share(rows, at_once, pace, start_seconds) - (len(waiting) - len(fit))
        return fit[max(0, left_to_live) :][: min(rows, most)]

    def gather(self, connection: sa.Connection, job: Job, now: dt.datetime) -> Callable[[], None]:
        """Take a piece of its candidates into a job; what is to be called once that is committed."""
        piece = due.idle_users(connection, job.candidates[:USERS_PER_TRANSACTION], now)
        found = deliveries.choose_next(connection, "identify", piece, now, self.fingerprint) if piece else []
        lines: list[bytes] = []
        ids: list[int] = []
        overtaken: list[int] = []
        size, is_full = job.size, False
        for chosen in found:
            line = self._line(chosen)
            if line is None:
                self._unfit.add(chosen[0].subject_id)
                continue
            if size + len(line) > MOST_BYTES:
                is_full = True
                break
            size += len(line)
            lines.append(line)
            carried = outcomes.carried(chosen)
            ids += [each.delivery_id for each in chosen]
            overtaken += [each.delivery_id for each in chosen if each.delivery_id not in carried]
        if ids:
            deliveries.start_in_job(connection, job.request_id, ids, overtaken, now)
            jobs.update(connection, job.request_id, row_count=job.row_count + len(lines))

        def commit() -> None:
            job.lines += lines
            job.row_count, job.size = job.row_count + len(lines), size
            del job.candidates[: len(job.candidates) if is_full else USERS_PER_TRANSACTION]
            crash.at("gathered")

        return commit

    def _line(self, chosen: list[outcomes.Delivery]) -> bytes | None:
        try:
            return self.row(chosen[0].subject_id, outcomes.body_of(chosen))
        except Exception:  # noqa: BLE001  (whatever it holds, only this user may suffer: the live lane says why)
            return None
