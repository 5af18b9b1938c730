"""The bulk lane: jobs of thousands of users. Userpilot runs one job at a time; each is followed until it is settled.

`BulkLane._life` is the life of a job from top to bottom. It is a generator that runs inside the worker's transactions
and yields what it waits for:

- a moment (monotonic seconds): continue in a transaction, at that moment at the latest;
- COMMIT: continue as soon as this transaction is committed, outside any transaction;
- a request: send it when this transaction is committed, and continue with its answer in a transaction.

After a restart or a failed transaction, `resume` restarts the generators of unsettled jobs, each at the job's status.
So state that a failed transaction would undo is a local variable of the generator, or is set after COMMIT. While a job
runs, the previous one is settled in pieces, so that the live lane never waits. Shortly before it ends, the next one is
gathered. The deliveries in a job are `sending`, so no other lane sends to its users.

jobs.py has the rows and the requests, job_answers.py interprets the answers, split.py decides how many users go into a job.
"""

import datetime as dt
import enum
import logging
import math
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from audience_sync import crash, logs
from audience_sync.clock import Clock
from audience_sync.queue import deliveries, due, job_answers, jobs, outcomes, split
from audience_sync.queue.destination import MADE_FOR_ANOTHER
from audience_sync.queue.job_answers import JobAnswers
from audience_sync.queue.jobs import BulkJob, JobRequest
from audience_sync.queue.pace import BulkPace, Lane
from audience_sync.userpilot.answers import Answer

log = logging.getLogger(__name__)

FIRST_ROWS = 2_000  # limit of a job that starts while none runs, so that it starts soon
START_SECONDS = 0.1  # limit of gathering while no job runs; then the job starts with the users it has
AHEAD_SECONDS = 2.0  # the next job is gathered at least this long before the current one ends
READY_SECONDS = 10.0  # a job that cannot start within this time returns its users to the queue
OCCUPIED_SECONDS = 15.0  # the pause after a job could not start, before the next is gathered
BACKLOG_SECONDS = 1.0  # the time between two checks of the queue's length
MAX_USERS_READ = 50_000
MAX_UPLOAD_BYTES = 20_000_000  # Userpilot accepts 50 MB
USERS_PER_TRANSACTION = 200  # few, because the live lane waits for each transaction
SHORTEST_WAIT_SECONDS = 0.01  # a wait shorter than a clock's tick would never end
NOW, NEVER = -math.inf, math.inf


class After(enum.Enum):
    COMMIT = enum.auto()


COMMIT = After.COMMIT
Wait = float | JobRequest | After


@dataclass(frozen=True, slots=True)
class BulkSettings:
    """Settings of the lane. If `rows_per_job` is 0, no job is started; running jobs are still followed to their end.

    `row` returns a user's merged traits as a line of the upload, or None if only the live lane can send them.
    """

    row: Callable[[str, dict[str, Any]], bytes | None] = lambda *_: None
    rows_per_minute: int = 1800
    rows_per_job: int = 0
    fingerprint: str | None = None
    grace: dt.timedelta = outcomes.GRACE


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction of the worker, in which `live_count` users were claimed for the live lane.

    `fronts`: the position of the live lane's search, by class. Bulk jobs take only deliveries after it.
    """

    connection: sa.Connection
    now: dt.datetime
    epoch: int = 0
    live_count: int = 0
    fronts: dict[str, due.Position] = field(default_factory=dict)
    may_start: bool = False
    is_ending: bool = False


@dataclass(slots=True, eq=False)
class _Task:
    """A generator and what it waits for; `job` is None for the one that watches other clients' jobs."""

    job: BulkJob | None
    steps: Generator[Wait, Answer, None]
    wait: Wait = NOW


@dataclass(slots=True)
class BulkLane:
    """Sends users by bulk jobs. The worker calls `step` in each transaction and `committed` after it."""

    settings: BulkSettings
    clock: Clock
    live: Lane
    pace: BulkPace = field(init=False)
    _answers: JobAnswers = field(init=False)
    _tasks: list[_Task] = field(default_factory=list)
    _transaction: Transaction = field(init=False)
    _settled: Counter[str] = field(default_factory=Counter)  # deliveries by status, in this transaction
    _request: JobRequest | None = None  # the request in flight
    _answer: Answer | None = None  # its answer, until a transaction reads it
    _gather_seconds: float = 0.0  # the time for each row of the last job that was gathered
    _live_only: set[str] = field(default_factory=set)  # users whose row cannot be written

    def __post_init__(self) -> None:
        self.pace = BulkPace(self.settings.rows_per_minute, self.settings.rows_per_job)
        self._answers = JobAnswers(self.pace, self.clock, self.settings.grace)

    def resume(self, connection: sa.Connection, now: dt.datetime) -> None:
        """Continue with every unsettled job, after a restart or a failed transaction.

        Jobs that were being gathered are given up: it is unknown which of their rows are in the database.
        """
        monotonic = self.clock.monotonic()
        measured = jobs.measured_rows_per_second(connection, job_answers.MEASURED_ROWS)
        if measured is not None:
            self.pace.measured(measured)
        known = {job.request_id: job for job in self._jobs}
        self._tasks = []
        for row in jobs.unsettled_jobs(connection):
            job = known.get(row.request_id) or self._job(row, monotonic, now)
            if job.status == "gathering":
                job.end("dropped")
            elif job.is_under_way and row.fingerprint not in (None, self.settings.fingerprint):
                job.end("lost", f"A bulk job was {MADE_FOR_ANOTHER}")
            self._tasks.append(_Task(job, self._life(job)))
        self._tasks.append(_Task(None, self._watch_foreign_jobs()))

    def _job(self, row: sa.Row[Any], monotonic: float, now: dt.datetime) -> BulkJob:
        seconds = max(0.0, (now - row.submitted_at).total_seconds()) if row.submitted_at else 0.0
        is_unsure = row.status == "uploading"  # it may still arrive
        return BulkJob(
            row.request_id,
            row.filename,
            row.status,
            row_count=row.row_count,
            submitted_at=monotonic - seconds,
            job_id=row.job_id,
            state=row.state,
            completed_count=row.completed_count,
            moved_at=monotonic,
            poll_at=monotonic + (self.settings.grace.total_seconds() if is_unsure else 0.0),
            error=row.error,
        )

    def step(self, transaction: Transaction) -> Counter[str]:
        """Do the bulk lane's work in this transaction; return how many deliveries it settles, by status."""
        self._transaction, self._settled = transaction, Counter()
        for task in list(self._tasks):
            if not isinstance(task.wait, JobRequest):
                self._advance(task)
            if self._answer is not None and task.wait is self._request:
                answer, self._request, self._answer = self._answer, None, None
                self._advance(task, answer)
        if self._answer is not None:  # its job was given up meanwhile
            self._request = self._answer = None
        is_time = self.clock.monotonic() >= max(self.pace.gather_at, self._ahead_at())
        if is_time and transaction.may_start and self._may_gather():
            self._begin()
        return self._settled

    def committed(self) -> JobRequest | None:
        """Continue after the commit; return a request to send now."""
        for task in list(self._tasks):
            if task.wait is COMMIT:
                self._advance(task)
        if self._request is not None:
            return None
        waits = (task.wait for task in self._tasks)
        self._request = next((wait for wait in waits if isinstance(wait, JobRequest)), None)
        return self._request

    def receive(self, answer: Answer) -> None:
        """Store the answer to the request in flight for the next transaction."""
        self._answer = answer

    def _advance(self, task: _Task, answer: Answer | None = None) -> None:
        try:
            task.wait = next(task.steps) if answer is None else task.steps.send(answer)
        except StopIteration:
            self._tasks.remove(task)

    @property
    def is_awaiting_answer(self) -> bool:
        return self._request is not None

    @property
    def is_busy(self) -> bool:
        """Return whether a job needs this process; a process that ends leaves running jobs to the next one."""
        waits = (
            task.wait for task in self._tasks if task.job is not None or isinstance(task.wait, JobRequest)
        )
        return self.is_awaiting_answer or any(wait != NEVER for wait in waits)

    def wait_seconds(self) -> float:
        """Return the seconds until the next transaction is needed; infinite if that depends on an answer."""
        monotonic = self.clock.monotonic()
        moments = [task.wait for task in self._tasks if isinstance(task.wait, float)]
        if self._may_gather() and self._ahead_at() > monotonic:
            moments.append(self._ahead_at())
        wait = min(moments, default=math.inf) - monotonic
        return max(wait, SHORTEST_WAIT_SECONDS) if wait > 0 else 0.0

    @property
    def under_way(self) -> BulkJob | None:
        return next((job for job in self._jobs if job.is_under_way), None)

    @property
    def _jobs(self) -> list[BulkJob]:
        return [task.job for task in self._tasks if task.job is not None]

    def rates(self) -> split.Pace:
        """Return the pace of both lanes, for dividing a backlog."""
        rows = 0 if self.pace.is_paused(self.clock.monotonic()) else self.settings.rows_per_job
        return split.Pace(self.live.limit, self.live.per_second, self.pace.rows_per_second, rows)

    def seconds_left(self) -> float:
        job = self.under_way
        return max(0.0, job.ends_at(self.pace.rows_per_second) - self.clock.monotonic()) if job else 0.0

    def row_counts(self) -> tuple[int, int]:
        """Return estimates of how many rows of the current jobs are done, and how many are left."""
        rows = sum(job.row_count for job in self._jobs if not job.is_over)
        job = self.under_way
        if job is None:
            return 0, rows
        expected = job.row_count - int(self.seconds_left() * self.pace.rows_per_second)
        done = min(job.row_count, max(expected, job.completed_count or 0))
        return done, rows - done

    # The life of a job.

    def _life(self, job: BulkJob, users: list[str] | None = None) -> Generator[Wait, Answer, None]:
        """Take users into a job, upload it, follow it to its end and settle its deliveries."""
        request = self._request_about(job)
        if users is not None:
            content = yield from self._gather(job, users)
            yield from self._wait_for_start(job)
            if not job.is_over:
                jobs.begin_upload(self._transaction.connection, job.request_id, self._transaction.now)
                yield COMMIT
                self._started(job)
                request = JobRequest("upload", job, bytes(content))
        elif job.is_under_way:
            self._record(job)  # a failed transaction may have undone it
        while job.is_under_way:
            request = request or (yield from self._next_request(job))
            if request is not None:
                columns = job.columns
                self._answers.read(request, job, (yield request))
                if job.is_under_way and job.columns != columns:
                    self._record(job)
                request = None
        self._record(job)
        yield from self._settle(job)

    def _request_about(self, job: BulkJob | None) -> JobRequest | None:
        """Return the request in flight if it is about this job."""
        return self._request if self._request is not None and self._request.job is job else None

    def _begin(self) -> None:
        """Create a job if the queue is long enough for one."""
        began_at = self.clock.monotonic()
        users = self._next_users(began_at)
        if not users:
            monotonic = self.clock.monotonic()
            self.pace.gather_at = monotonic + max(BACKLOG_SECONDS, 10 * (monotonic - began_at))
            return
        transaction = self._transaction
        job = jobs.create_job(
            transaction.connection, self.settings.fingerprint, transaction.epoch, transaction.now
        )
        task = _Task(job, self._life(job, users))
        self._tasks.insert(-1, task)
        self._advance(task)

    def _next_users(self, monotonic: float) -> list[str]:
        """Return users for the next job, without the oldest ones, which the live lane sends meanwhile."""
        transaction = self._transaction
        room = max(0, self.live.room(monotonic) - transaction.live_count)
        pace, start_seconds = self.rates(), self.seconds_left()
        if self.under_way is None:  # the first job starts soon; the next is gathered while it runs
            pace = replace(pace, rows_per_job=min(pace.rows_per_job, FIRST_ROWS))
        live_share = split.live_share(pace.rows_per_job, room, pace, start_seconds)
        waiting, burst = self._waiting(min(MAX_USERS_READ, pace.rows_per_job + live_share + 1), room)
        rows = split.job_rows(len(waiting), burst, pace, start_seconds)
        if not rows:
            return []
        fit = [user for user, attempted in waiting.items() if not attempted and user not in self._live_only]
        live_count = split.live_share(rows, burst, pace, start_seconds) - (len(waiting) - len(fit))
        return fit[max(0, live_count) :][: min(rows, self.pace.max_rows)]

    def _waiting(self, limit: int, room: int) -> tuple[dict[str, bool], int]:
        """Return the users who are due, with whether they were attempted, and how many the live lane can send at once."""
        transaction, fingerprint = self._transaction, self.settings.fingerprint
        users, burst = dict[str, bool](), 0
        for delivery_class in due.CLASSES:
            left = limit - len(users)
            if left > 0:
                some = due.subjects_due(
                    transaction.connection,
                    "identify",
                    delivery_class,
                    transaction.now,
                    left,
                    fingerprint,
                    transaction.fronts.get(delivery_class, due.START),
                )
                for user_id, was_attempted in some.items():
                    users[user_id] = users.get(user_id, False) or was_attempted
            if delivery_class != "push":
                burst = len(users)
        return users, min(burst, room)

    def _gather(self, job: BulkJob, users: list[str]) -> Generator[Wait, Answer, bytearray]:
        """Take the users' deliveries into a job, some in each transaction; return the content of its upload."""
        began_at, content = self.clock.monotonic(), bytearray()
        yield NOW
        while users and not self._transaction.is_ending and not self._is_enough(job, len(users), began_at):
            some, users = users[:USERS_PER_TRANSACTION], users[USERS_PER_TRANSACTION:]
            if not self._take(job, some, content):
                users = []
            yield COMMIT
            crash.at("gathered")
            job.is_ready = not users
            yield NOW
        job.is_ready = True
        self._gather_seconds = (self.clock.monotonic() - began_at) / max(1, job.row_count)
        return content

    def _is_enough(self, job: BulkJob, left: int, began_at: float) -> bool:
        """Return whether to start a long job with only some of its users, because no other job is running."""
        if self.under_way is not None or job.row_count < split.SMALLEST_JOB:
            return False
        is_long = job.row_count + left >= FIRST_ROWS
        return is_long and self.clock.monotonic() - began_at >= START_SECONDS

    def _take(self, job: BulkJob, users: list[str], content: bytearray) -> bool:
        """Take the idle users into a job; return False when its upload is full."""
        connection, now, is_full = self._transaction.connection, self._transaction.now, False
        ids: list[int] = []
        superseded: list[int] = []
        idle = due.idle_users(connection, users)
        fingerprint = self.settings.fingerprint
        next_of_all = deliveries.choose_next(connection, "identify", idle, now, fingerprint)
        for chosen in next_of_all.groups:
            line = self._line(chosen)
            if line is None:
                self._live_only.add(chosen[0].subject_id)
                continue
            if len(content) + len(line) > MAX_UPLOAD_BYTES:
                is_full = True
                break
            content += line
            job.row_count += 1
            carried = outcomes.carried(chosen)
            ids += [delivery.delivery_id for delivery in chosen]
            superseded += [delivery.delivery_id for delivery in chosen if delivery.delivery_id not in carried]
        if ids:
            deliveries.start_in_job(connection, job.request_id, ids, superseded, now)
            jobs.update_job(connection, job.request_id, row_count=job.row_count)
        return not is_full

    def _line(self, chosen: list[outcomes.Delivery]) -> bytes | None:
        try:
            return self.settings.row(chosen[0].subject_id, outcomes.body_of(chosen))
        except Exception:  # noqa: BLE001  (concerns this user alone; the live lane records the error)
            return None

    def _wait_for_start(self, job: BulkJob) -> Generator[Wait, Answer, None]:
        """Wait until the previous job ends; drop this one if that takes too long or the lane is paused."""
        give_up_at = self.clock.monotonic() + READY_SECONDS
        while self._is_occupied() and not self._transaction.is_ending and self.clock.monotonic() < give_up_at:
            yield give_up_at
        is_paused = self.pace.is_paused(self.clock.monotonic())
        if self._is_occupied() or self._transaction.is_ending or is_paused or not job.row_count:
            job.end("dropped")
            pause = OCCUPIED_SECONDS if self._is_occupied() else BACKLOG_SECONDS
            self.pace.gather_at = self.clock.monotonic() + pause

    def _started(self, job: BulkJob) -> None:
        job.status, job.is_ready = "uploading", False
        job.submitted_at = job.moved_at = self.clock.monotonic()
        logs.event(log, logging.INFO, "bulk job sent", rows=job.row_count, request_id=job.request_id)

    def _next_request(self, job: BulkJob) -> Generator[Wait, Answer, JobRequest | None]:
        """Wait until it is time to ask about the job; return None if it is given up for lack of progress."""
        while True:
            self._answers.give_up_stalled(job)
            if job.is_over:
                return None
            if self._transaction.is_ending or self.is_awaiting_answer:
                yield NEVER
            elif self.clock.monotonic() < job.poll_at:
                yield job.poll_at
            else:
                return JobRequest("list" if job.job_id is None or job.is_missing else "poll", job)

    def _record(self, job: BulkJob) -> None:
        jobs.record(self._transaction.connection, job, self._transaction.now)

    def _settle(self, job: BulkJob) -> Generator[Wait, Answer, None]:
        """Settle the deliveries of a job that has ended, some in each transaction."""
        while True:
            while self._next_to_settle() is not job:
                yield NOW
            transaction = self._transaction
            counts = deliveries.settle_job(
                transaction.connection,
                job.request_id,
                job.status,
                job.error,
                transaction.now,
                self.settings.grace,
                jobs.SETTLED_PER_TRANSACTION,
            )
            if not counts:
                break
            self._settled += counts
            yield COMMIT
            crash.at("job_settled")
            yield NOW
        jobs.finish_job(transaction.connection, job.request_id, transaction.now)

    def _next_to_settle(self) -> BulkJob | None:
        """Choose jobs whose users return to the queue first; completed jobs can wait until the next job is sent."""
        over = min((job for job in self._jobs if job.is_over), key=lambda job: job.is_completed, default=None)
        if over is None or not over.is_completed or self._transaction.is_ending:
            return over
        may_send = not self._is_occupied() and not self.pace.is_paused(self.clock.monotonic())
        return None if may_send and any(job.is_ready for job in self._jobs) else over

    # When something may start.

    def _is_occupied(self) -> bool:
        return self.under_way is not None or self.is_awaiting_answer

    def _may_gather(self) -> bool:
        is_gathering = any(job.status == "gathering" for job in self._jobs)
        may_start = self.pace.may_start(self.clock.monotonic())
        return may_start and not is_gathering and not self._transaction.is_ending

    def _ahead_at(self) -> float:
        """Return when to gather the next job, so that 1.5 times the expected time is left before the current job ends."""
        job = self.under_way
        if job is None:
            return NOW
        if job.status != "running":
            return NEVER
        rows = self.settings.rows_per_job
        wanted = max(AHEAD_SECONDS, 1.5 * self._gather_seconds * rows)
        most = max(AHEAD_SECONDS, rows / self.pace.rows_per_second / 2)
        return job.ends_at(self.pace.rows_per_second) - min(wanted, most)

    def _watch_foreign_jobs(self) -> Generator[Wait, Answer, None]:
        """Poll the list of jobs while a job of another client runs."""
        request = self._request_about(None)
        while True:
            if request is not None:
                self._answers.read_list_of_others((yield request))
                request = None
            is_needed = self.pace.is_foreign_job_running and not self._transaction.is_ending
            if not is_needed or self._is_occupied():
                yield NEVER
            elif self.clock.monotonic() < self.pace.paused_until:
                yield self.pace.paused_until
            else:
                request = JobRequest("list", None)
