"""The bulk lane: a job of thousands of users, one job at a time, followed until each of its users is settled.

While a job runs, the next one is gathered just before its end, and the one before is settled, a piece in each
transaction, so that the live lane never waits. A user is in one place at a time: what is in a job is `sending`.

| what happens | what becomes of its users |
| --- | --- |
| completed | accepted |
| failed, or completed with rows missing | the live lane sends each, and has an answer for each |
| refused (400, 422), or too large (413) | back to the queue; the next job has half as many rows; one row alone goes live |
| 409: another job is running | back to the queue; no upload until the list of jobs shows none |
| 429, 5xx, no connection, no such endpoint | back to the queue; the lane pauses, twice as long each time |
| the answer to an upload never came | the job is looked for by its file's name; where none runs, the live lane sends them |
| an unknown state, or no end | it counts as running until nothing has moved for long; then the live lane sends them |
| Userpilot does not know the job any more | the live lane sends them |
"""

import datetime as dt
import logging
import math
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sqlalchemy as sa

from audience_sync import crash, logs
from audience_sync.clock import Clock
from audience_sync.queue import deliveries, jobs, outcomes, split
from audience_sync.queue.destination import MADE_FOR_ANOTHER
from audience_sync.queue.gather import Gatherer
from audience_sync.queue.job_state import Job, JobRequest, JobStatus, parse_job, parse_jobs
from audience_sync.queue.pace import LONGEST_PAUSE_SECONDS, Lane
from audience_sync.userpilot.answers import Answer, Outcome

log = logging.getLogger(__name__)

FIRST_ROWS = 2_000  # the most that is looked for while no job runs: a job of so many goes before it is full
START_SECONDS = 0.1  # of gathering, while no job runs: then what is gathered goes
AHEAD_SECONDS = 2.0  # before the end of a job the next one is gathered, at the least
READY_SECONDS = 10.0  # a job that cannot start within it gives its users back
BACKLOG_SECONDS = 1.0  # between two looks at how long the queue is
FOREIGN_JOB_POLL_SECONDS = 15.0  # between two looks at jobs that are not ours
SHORTEST_WAIT_SECONDS = 0.01  # a wait of less than a clock's tick would never end
SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 30.0
STALLED_JOB_SECONDS = 1800.0  # with a job of which nothing moves; longer where it is large
MOST_MISSES = 3  # times that Userpilot does not know a job
MEASURED_ROWS = 1_000  # of a job that tells how fast jobs are: what surrounds a shorter one is too much of it
MIN_SPEED_FACTOR = 4  # times slower than the settings say
REFUSALS_BEFORE_PAUSE = 5
_NO_ENDPOINT = {404, 405, 501}


@dataclass(frozen=True, slots=True)
class Settings:
    """`row` writes a user's merged traits as a line of the upload; None if only the live lane should tell them.

    `rows_per_job` 0: no new jobs; those that run are followed to their end.
    """

    row: Callable[[str, dict[str, Any]], bytes | None] = lambda *_: None
    rows_per_minute: int = 1800
    rows_per_job: int = 0
    fingerprint: str | None = None
    grace: dt.timedelta = outcomes.GRACE


@dataclass(slots=True)
class Step:
    """What a transaction did: `errand` is to be sent, and `became` counts once it is committed."""

    errand: JobRequest | None = None
    became: Counter[str] = field(default_factory=Counter)
    written: list[Job] = field(default_factory=list)
    after_commit: list[Callable[[], None]] = field(default_factory=list)


@dataclass(slots=True)
class Bulk:
    """`live` is the lane that takes the other users of a backlog."""

    settings: Settings
    clock: Clock
    live: Lane
    jobs: list[Job] = field(default_factory=list)
    paused_until: float = -math.inf
    reason: str = ""
    rows_per_second: float = 0.0
    _errand: JobRequest | None = None
    _pauses: int = 0
    _refusals: int = 0  # since the last job that was taken
    _takings: int = 0  # since the last that was refused
    _most_rows: int = 0  # of the next job: fewer while a refused row is looked for
    _rows_cap: int = 0  # fewer than the settings' where those were too large
    _others_run: bool = False
    _look_at: float = -math.inf  # for jobs of others
    _row_seconds: float = 0.0  # what the last job took to gather, a row
    _backlog_at: float = -math.inf  # when the backlog is looked at again
    _gatherer: Gatherer = field(init=False)

    def __post_init__(self) -> None:
        self.rows_per_second = self.settings.rows_per_minute / 60
        self._most_rows = self._rows_cap = self.settings.rows_per_job
        self._gatherer = Gatherer(self.settings.row, self.settings.fingerprint)

    # What the worker asks.

    @property
    def pace(self) -> split.Pace:
        rows = 0 if self._is_paused() else self.settings.rows_per_job
        return split.Pace(self.live.limit, self.live.per_second, self.rows_per_second, rows)

    def is_busy(self, *, is_ending: bool) -> bool:
        """Whether a job is to be followed; at the end only until what was asked is answered and written down."""
        if is_ending:
            return self._errand is not None or any(job.is_changed or job.is_over for job in self.jobs)
        return self._errand is not None or bool(self.jobs)

    @property
    def is_asking(self) -> bool:
        return self._errand is not None

    @property
    def under_way(self) -> Job | None:
        return next((job for job in self.jobs if job.is_under_way), None)

    def seconds_left(self) -> float:
        job = self.under_way
        return max(0.0, self._remaining(job)) if job else 0.0

    def progress(self) -> tuple[int, int]:
        """Of the jobs that are not over: the rows that are done by now, as far as can be told, and the others."""
        rows = sum(job.row_count for job in self.jobs if not job.is_over)
        job = self.under_way
        if job is None:
            return 0, rows
        expected = job.row_count - int(self.seconds_left() * self.rows_per_second)
        done = min(job.row_count, max(expected, job.completed_count or 0))
        return done, rows - done

    def wait_seconds(self) -> float:
        """How long until a step has something to do; infinite where that is for an answer to decide."""
        if any(job.is_over or job.candidates or job.is_changed for job in self.jobs):
            return 0.0
        if self._errand is not None:
            return math.inf
        monotonic = self.clock.monotonic()
        job = self.under_way
        if job is not None:
            ahead = (
                self._remaining(job) - self._ahead_seconds()
                if len(self.jobs) == 1 and self._may_start()
                else math.inf
            )
            wait = min(job.poll_at - monotonic, ahead if ahead > 0 else math.inf)
            return max(wait, SHORTEST_WAIT_SECONDS) if wait > 0 else 0.0
        if self._others_run:
            return max(0.0, self._look_at - monotonic)
        return 0.0 if self.jobs else math.inf

    def slow_down(self, now: dt.datetime) -> dict[str, Any] | None:
        """What `status` says of the lane while it pauses."""
        until = max(self.paused_until, self._look_at if self._others_run else -math.inf)
        seconds = until - self.clock.monotonic()
        if seconds <= 0:
            return None
        return {
            "factor": 1.0,
            "paused_until": (now + dt.timedelta(seconds=seconds)).isoformat(),
            "reason": self.reason,
        }

    def restore_pause(self, told: dict[str, Any] | None, now: dt.datetime) -> None:
        """Take over the pause that a process before this one wrote down."""
        if told is not None:
            until = dt.datetime.fromisoformat(told["paused_until"])
            self.paused_until = self.clock.monotonic() + (until - now).total_seconds()
            self.reason = told["reason"]

    # The database's side.

    def resume(self, connection: sa.Connection, now: dt.datetime) -> None:
        """Take over what a process that is gone left, or what is unsure after a transaction broke.

        A job that was being gathered is given up: nobody knows which of its rows are in the database.
        """
        monotonic = self.clock.monotonic()
        measured = jobs.rows_per_second(connection, MEASURED_ROWS)
        if measured is not None:
            self._measured(measured)
        known = {job.request_id: job for job in self.jobs}
        grace = self.settings.grace.total_seconds()
        self.jobs = []
        for row in jobs.unsettled(connection):
            since = (
                monotonic - max(0.0, (now - row.submitted_at).total_seconds())
                if row.submitted_at
                else monotonic
            )
            job = known.get(row.request_id) or Job(
                row.request_id,
                row.filename,
                row.status,
                row_count=row.row_count,
                job_id=row.job_id,
                state=row.state,
                completed_count=row.completed_count,
                submitted_at=since,
                moved_at=monotonic,
                poll_at=monotonic + (grace if row.status == "uploading" else 0.0),  # it may come yet
                error=row.error,
            )
            self.jobs.append(job)
            if job.status == "gathering":
                job.end("dropped")
            elif job.is_under_way and row.fingerprint not in (None, self.settings.fingerprint):
                job.end("lost", f"A bulk job was {MADE_FOR_ANOTHER}")

    def step(
        self,
        connection: sa.Connection,
        now: dt.datetime,
        epoch: int,
        *,
        live_count: int,
        may_start: bool,
        is_ending: bool,
    ) -> Step:
        """A transaction's share of the work; `committed` must be told when it is.

        `live_count`: how many users the same transaction gave to the live lane.
        """
        step = Step()
        self._lose_patience()
        for job in self.jobs:
            if is_ending and job.status == "gathering":
                job.end("dropped")
            if job.is_changed:
                self._write(connection, job, now)
                step.written.append(job)
        over = self._to_settle(is_ending=is_ending)
        if over is not None:
            limit = jobs.SETTLED_PER_TRANSACTION
            step.became = deliveries.settle_job(
                connection, over.request_id, over.status, over.error, now, self.settings.grace, limit
            )
            if not step.became:
                jobs.settled(connection, over.request_id, now)
                step.after_commit.append(lambda: self.jobs.remove(over))
        if is_ending:
            return step
        gathering = next((job for job in self.jobs if job.status == "gathering"), None)
        if gathering is not None:
            self._gather(connection, gathering, now, step)
        elif may_start and self._is_time_to_gather():
            self._begin(connection, now, epoch, live_count, step)
        if self._errand is None:
            step.errand = self._next_errand(connection, gathering, now, step)
        return step

    def _to_settle(self, *, is_ending: bool) -> Job | None:
        """First what gives its users back; what a completed job carried can wait until the next one is sent."""
        over = min((job for job in self.jobs if job.is_over), key=lambda job: job.is_completed, default=None)
        if over is None or not over.is_completed or is_ending:
            return over
        is_asked = self._errand is not None or self.under_way is not None or self._is_paused()
        is_ready = any(job.status == "gathering" and job.ready_at < math.inf for job in self.jobs)
        return None if is_ready and not is_asked else over

    def _gather(self, connection: sa.Connection, job: Job, now: dt.datetime, step: Step) -> None:
        if self._is_enough(job):
            job.candidates = []
            self._look_whether_ready(job)
        elif job.candidates:
            step.after_commit += [
                self._gatherer.gather(connection, job, now),
                partial(self._look_whether_ready, job),
            ]

    def committed(self, step: Step) -> None:
        if step.became:
            crash.at("job_settled")
        for job in step.written:
            job.is_changed, job.upload = False, None
        for each in step.after_commit:
            each()
        self._errand = step.errand or self._errand

    def _write(self, connection: sa.Connection, job: Job, now: dt.datetime) -> None:
        jobs.update(
            connection,
            job.request_id,
            status=job.status,
            job_id=job.job_id,
            state=job.state,
            completed_count=job.completed_count,
            error=job.error,
            ended_at=now if job.is_over else None,
        )
        if job.upload is not None:
            jobs.answer(
                connection,
                job.request_id,
                now,
                status_code=job.upload.status_code,
                x_request_id=job.upload.x_request_id,
                error=job.upload.error,
            )
        elif job.is_over:  # the process that sent it had no time to see the answer
            jobs.answer(connection, job.request_id, now, error=job.error)

    def _may_start(self) -> bool:
        return bool(self.settings.rows_per_job) and not self._is_paused()

    def _is_paused(self) -> bool:
        return self._others_run or self.paused_until > self.clock.monotonic()

    def _is_time_to_gather(self) -> bool:
        job = self.under_way
        if not self._may_start() or self._backlog_at > self.clock.monotonic():
            return False
        return job is None or (job.status == "running" and self._remaining(job) <= self._ahead_seconds())

    def _ahead_seconds(self) -> float:
        """How long before the end of a job the next is begun: half as long again as a full one takes to gather."""
        rows = self.settings.rows_per_job
        wanted = max(AHEAD_SECONDS, 1.5 * self._row_seconds * rows)
        return min(wanted, max(AHEAD_SECONDS, rows / self.rows_per_second / 2))

    def _begin(
        self, connection: sa.Connection, now: dt.datetime, epoch: int, live_count: int, step: Step
    ) -> None:
        began_at = self.clock.monotonic()
        room = max(0, self.live.room(began_at) - live_count)
        pace = self.pace
        if self.under_way is None:  # the first goes soon, the next is filled meanwhile
            pace = replace(pace, rows_per_job=min(pace.rows_per_job, FIRST_ROWS))
        candidates = self._gatherer.candidates(
            connection, now, pace, room, self._most_rows, self.seconds_left()
        )
        if not candidates:
            monotonic = self.clock.monotonic()
            self._backlog_at = monotonic + max(BACKLOG_SECONDS, 10 * (monotonic - began_at))
            return
        filename = f"audience-sync-{uuid.uuid4().hex}.ndjson"
        request_id = jobs.begin(connection, filename, self.settings.fingerprint, epoch, now)
        job = Job(request_id, filename, "gathering", candidates=candidates, begun_at=self.clock.monotonic())
        step.after_commit.append(lambda: self.jobs.append(job))

    def _is_enough(self, job: Job) -> bool:
        """While no job runs a part of a long one starts soon, and the next is filled meanwhile."""
        if self.under_way is not None or not job.candidates or job.row_count < split.SMALLEST_JOB:
            return False
        is_long = job.row_count + len(job.candidates) >= FIRST_ROWS
        return is_long and self.clock.monotonic() - job.begun_at >= START_SECONDS

    def _look_whether_ready(self, job: Job) -> None:
        if not job.candidates:
            job.ready_at = self.clock.monotonic()
            self._row_seconds = (job.ready_at - job.begun_at) / max(1, job.row_count)

    def _next_errand(
        self, connection: sa.Connection, gathering: Job | None, now: dt.datetime, step: Step
    ) -> JobRequest | None:
        monotonic, running = self.clock.monotonic(), self.under_way
        is_ready = gathering is not None and gathering.ready_at < math.inf
        if running is not None:
            if gathering is not None and monotonic - gathering.ready_at > READY_SECONDS:
                gathering.end("dropped")
                self._backlog_at = monotonic + FOREIGN_JOB_POLL_SECONDS
            if monotonic >= running.poll_at:
                return JobRequest("poll" if running.job_id else "list", running)
        elif gathering is not None and is_ready and (gathering.row_count == 0 or self._is_paused()):
            gathering.end("dropped")
            self._backlog_at = monotonic + BACKLOG_SECONDS  # of those that wait nobody is free
        elif gathering is not None and is_ready:
            jobs.submit(connection, gathering.request_id, now)
            content = b"".join(gathering.lines)
            step.after_commit.append(lambda: self._submitted(gathering))
            return JobRequest("upload", gathering, content)
        elif self._others_run and monotonic >= self._look_at:
            return JobRequest("list", None)
        return None

    def _submitted(self, job: Job) -> None:
        job.status, job.lines, job.ready_at = "uploading", [], math.inf
        job.submitted_at = job.moved_at = self.clock.monotonic()
        logs.event(log, logging.INFO, "bulk job sent", rows=job.row_count, request_id=job.request_id)

    # Userpilot's side.

    def take_in(self, errand: JobRequest, answer: Answer) -> None:
        """Learn from an answer; the next step writes it down."""
        self._errand = None
        job = errand.job
        if job is None:
            self._look_at_others(answer)
        elif errand.what == "upload":
            job.is_changed, job.upload = True, answer
            self._uploaded(job, answer)
        elif errand.what == "list":
            self._seek(job, answer)
        else:
            self._polled(job, answer)

    def _uploaded(self, job: Job, answer: Answer) -> None:
        monotonic = self.clock.monotonic()
        error = answer.error or "no answer"
        told = parse_job(answer.document)
        match answer.outcome:
            case Outcome.ACCEPTED if told.job_id:
                self._taken()
                self._runs(job, told.job_id, told)
            case Outcome.ACCEPTED | Outcome.UNKNOWN:
                job.error = answer.error or "Userpilot took the upload and named no job"
                job.poll_at = monotonic + self.settings.grace.total_seconds()  # it may come yet
            case Outcome.REFUSED if answer.status_code == 409:
                job.end("dropped", error)
                self._wait_for_others(f"Another bulk job is running: {error}")
            case Outcome.REFUSED if answer.status_code not in _NO_ENDPOINT:
                self._refused(job, error, is_too_large=answer.status_code == 413)
            case outcome:
                job.end("dropped", error)
                if outcome is not Outcome.UNAUTHORISED:
                    self._pause(error, answer.retry_after_seconds)

    def _taken(self) -> None:
        self._refusals, self._takings, self.reason = 0, self._takings + 1, ""
        if self._takings >= 2:  # the refused row was in neither half: it is gone
            self._most_rows = min(self._rows_cap, 2 * self._most_rows)

    def _refused(self, job: Job, error: str, *, is_too_large: bool) -> None:
        """Halve, until the row that it is about is alone: then the live lane has an answer for it."""
        self._refusals, self._takings = self._refusals + 1, 0
        if job.row_count == 1:
            job.end("failed", error)
            self._most_rows = self._rows_cap
        else:
            job.end("dropped", error)
            self._most_rows = job.row_count // 2
            if is_too_large:
                self._rows_cap = self._most_rows
        self._backlog_at = -math.inf
        logs.event(log, logging.WARNING, "bulk job refused", rows=job.row_count)
        if self._refusals >= REFUSALS_BEFORE_PAUSE:
            self._pause(error, None)

    def _polled(self, job: Job, answer: Answer) -> None:
        monotonic = self.clock.monotonic()
        if answer.outcome is Outcome.ACCEPTED and isinstance(answer.document, dict):
            self._runs(job, job.job_id or "", parse_job(answer.document))
        elif answer.status_code == 404:
            job.miss_count += 1
            job.poll_at = monotonic + FOREIGN_JOB_POLL_SECONDS
            if job.miss_count >= MOST_MISSES:
                job.end("lost", "Userpilot does not know the bulk job any more")
                self._wait_for_others("a bulk job of which nothing is known may still run")
        else:
            wait = answer.retry_after_seconds or 2 * max(self._interval(job), 1.0)
            job.poll_at = monotonic + min(wait, LONGEST_PAUSE_SECONDS)

    def _runs(self, job: Job, job_id: str, told: JobStatus) -> None:
        """Take in what Userpilot says of the job; what it leaves out is not needed."""
        completed = job.completed_count if told.completed_rows is None else told.completed_rows
        if (told.state, completed, job_id) != (job.state, job.completed_count, job.job_id):
            job.moved_at = self.clock.monotonic()
            job.is_changed = True
        job.status, job.job_id, job.state, job.completed_count = "running", job_id, told.state, completed
        job.error, job.miss_count = None, 0
        job.poll_at = self.clock.monotonic() + self._interval(job)
        if told.state == "completed":
            self._completed(job, told)
        elif told.state == "failed":
            job.end("failed", "Userpilot's bulk job failed")
            self._pause("a bulk job failed", None)
        if job.is_over:
            logs.event(
                log,
                logging.INFO if job.status == "completed" else logging.WARNING,
                f"bulk job {job.status}",
                rows=job.row_count,
                request_id=job.request_id,
                seconds=round(self.clock.monotonic() - job.submitted_at, 1),
            )

    def _completed(self, job: Job, told: JobStatus) -> None:
        counts = [count for count in (told.total_rows, told.completed_rows) if count is not None]
        least = min(counts, default=job.row_count)
        if least < job.row_count:
            job.end("failed", f"Userpilot's bulk job completed {least} of {job.row_count} rows")
            self._pause("a bulk job completed with rows missing", None)
            return
        job.end("completed")
        self._pauses = 0
        if job.row_count >= MEASURED_ROWS:
            self._measured(job.row_count / max(0.001, self.clock.monotonic() - job.submitted_at))

    def _measured(self, rows_per_second: float) -> None:
        """Jobs may be slower than the settings say; one that nobody looked at for a day was not."""
        self.rows_per_second = max(rows_per_second, self.settings.rows_per_minute / 60 / MIN_SPEED_FACTOR)

    def _seek(self, job: Job, answer: Answer) -> None:
        """Find the job of an upload whose answer never came."""
        job.poll_at = self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS
        listed = parse_jobs(answer)
        if listed is None:
            return
        mine = next((told for told in listed if told.filename == job.filename), None)
        if mine is not None and mine.job_id:
            self._runs(job, mine.job_id, JobStatus())  # the list does not tell how many rows are done
            job.poll_at = self.clock.monotonic()
        elif not any(told.is_running for told in listed):
            job.end("lost", job.error or "The process ended before the answer came")

    def _look_at_others(self, answer: Answer) -> None:
        self._look_at = self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS
        listed = parse_jobs(answer)
        if listed is None:
            self._others_run = False  # the next upload will tell
            self._pause(answer.error or "the list of jobs cannot be read", answer.retry_after_seconds)
        elif not any(told.is_running for told in listed):
            self._others_run, self.reason = False, ""

    def _wait_for_others(self, reason: str) -> None:
        self._others_run, self.reason = True, reason
        self._look_at = self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS
        logs.event(log, logging.WARNING, "bulk lane waits for another job")

    def _pause(self, reason: str, seconds: float | None) -> None:
        self._pauses += 1
        wait = min(2.0 ** min(self._pauses, 10), LONGEST_PAUSE_SECONDS) if seconds is None else seconds
        self.paused_until, self.reason = self.clock.monotonic() + wait, reason
        logs.event(log, logging.WARNING, "bulk lane pauses", seconds=wait)

    def _lose_patience(self) -> None:
        job = self.under_way
        if job is None or self._errand is not None:
            return
        patience = max(STALLED_JOB_SECONDS, 4 * job.row_count / self.rows_per_second)
        if self.clock.monotonic() - job.moved_at > patience:
            job.end("lost", f"The bulk job did not end: nothing was new for {round(patience / 60)} minutes")
            self._wait_for_others("a bulk job that was given up may still run")

    def _remaining(self, job: Job) -> float:
        """Seconds until the job is expected to end; negative where it should have."""
        rows = job.row_count - (job.completed_count or 0)
        since = job.moved_at if job.completed_count else job.submitted_at
        return since + rows / self.rows_per_second - self.clock.monotonic()

    def _interval(self, job: Job) -> float:
        """Seconds between two polls: fewer when the end is near."""
        left = self._remaining(job)
        return min(LONGEST_POLL_SECONDS, max(SHORTEST_POLL_SECONDS, left / 2 if left > 0 else -left / 20))
