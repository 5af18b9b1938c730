"""The bulk lane: jobs of thousands of users. Userpilot works on one job at a time; each is followed until it is settled.

`BulkLane._life` is the life of a job from top to bottom. It is a generator that runs inside the worker's transactions
and yields what it waits for:

- a moment (monotonic seconds): go on in a transaction, at that moment at the latest;
- COMMIT: go on as soon as this transaction is committed, outside of any transaction;
- a request: send it when this transaction is committed, and go on with its answer in a transaction.

`resume` starts the lives of unsettled jobs again, after a restart and after a transaction that failed: they go on where
the status of the job says. What a transaction may take back is therefore either a local variable of a life or set after
COMMIT. While a job runs, the next one is gathered shortly before its end, and the one before is settled piece by piece,
so that the live lane never waits. A user is in one place at a time: deliveries in a job are `sending`.

| event | the job's users |
| --- | --- |
| completed | are accepted |
| failed, or completed with rows missing | are sent by the live lane, which gets an answer for each |
| refused (400, 422), or too large (413) | are queued again; the next job has half as many rows; a single row goes live |
| 409: another job is running | are queued again; no upload until the list of jobs shows none running |
| 429, 5xx, no connection, no such endpoint | are queued again; the lane pauses, each time twice as long |
| no answer to the upload | wait: the job is looked for by its file name; if no job runs, they are sent by the live lane |
| an unknown state, or no end | wait until nothing has changed for long, then are sent by the live lane |
| Userpilot no longer knows the job | are sent by the live lane |
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
from audience_sync.queue import deliveries, due, jobs, outcomes, split
from audience_sync.queue.destination import MADE_FOR_ANOTHER
from audience_sync.queue.jobs import Job, JobRequest, JobStatus, parse_job, parse_jobs
from audience_sync.queue.pace import LONGEST_PAUSE_SECONDS, BulkPace, Lane
from audience_sync.userpilot.answers import Answer, Outcome

log = logging.getLogger(__name__)

FIRST_ROWS = 2_000  # of a job that starts while none runs: it starts before all of a long queue is gathered
START_SECONDS = 0.1  # of gathering while no job runs; then the job starts with what it has
AHEAD_SECONDS = 2.0  # before the end of a job at the latest, the next one is gathered
READY_SECONDS = 10.0  # a job that cannot start within this time gives its users back
BACKLOG_SECONDS = 1.0  # between two looks at the length of the queue
MOST_USERS = 50_000  # of the queue that are looked at
MOST_BYTES = 20_000_000  # of an upload; Userpilot accepts 50 MB
USERS_PER_TRANSACTION = 200  # that a transaction takes into a job, so that the live lane hardly waits
FOREIGN_JOB_POLL_SECONDS = 15.0
SHORTEST_WAIT_SECONDS = 0.01  # a wait shorter than a clock's tick would never end
SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 30.0
STALLED_JOB_SECONDS = 1800.0  # without any progress; more for large jobs
MOST_MISSES = 3  # answers in a row that do not know a job
MEASURED_ROWS = 1_000  # of a job whose speed is measured: in shorter ones the overhead counts too much
NOW, NEVER = -math.inf, math.inf
_NO_ENDPOINT = {404, 405, 501}


class After(enum.Enum):
    COMMIT = enum.auto()


COMMIT = After.COMMIT
Wait = float | JobRequest | After


@dataclass(frozen=True, slots=True)
class BulkSettings:
    """`row` writes a user's merged traits as a line of the upload; None if only the live lane can send them.

    `rows_per_job` 0: no new jobs; those that run are followed to their end.
    """

    row: Callable[[str, dict[str, Any]], bytes | None] = lambda *_: None
    rows_per_minute: int = 1800
    rows_per_job: int = 0
    fingerprint: str | None = None
    grace: dt.timedelta = outcomes.GRACE


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction of the worker, in which `live_count` users were claimed for the live lane."""

    connection: sa.Connection
    now: dt.datetime
    epoch: int = 0
    live_count: int = 0
    may_start: bool = False
    is_ending: bool = False


@dataclass(slots=True, eq=False)
class _Course:
    """A generator and what it waits for; `job` is None for the one that watches the jobs of others."""

    job: Job | None
    steps: Generator[Wait, Answer, None]
    wait: Wait = NOW


@dataclass(slots=True)
class BulkLane:
    """In each transaction the worker calls `step`, after its commit `committed`; `live` is the lane of other users."""

    settings: BulkSettings
    clock: Clock
    live: Lane
    pace: BulkPace = field(init=False)
    _courses: list[_Course] = field(default_factory=list)
    _transaction: Transaction = field(init=False)
    _settled: Counter[str] = field(
        default_factory=Counter
    )  # deliveries that this transaction settles, by status
    _request: JobRequest | None = None  # that is in flight
    _answer: Answer | None = None  # to it, until it is read
    _gather_seconds: float = 0.0  # that the last job took for each row
    _gather_at: float = NOW  # not before
    _live_only: set[str] = field(default_factory=set)  # users whose row cannot be written

    def __post_init__(self) -> None:
        self.pace = BulkPace(self.settings.rows_per_minute, self.settings.rows_per_job)

    def resume(self, connection: sa.Connection, now: dt.datetime) -> None:
        """Follow every unsettled job from where it is, after a restart or a transaction that failed.

        Jobs that were being gathered are given up: it is unknown which of their rows are in the database.
        """
        monotonic = self.clock.monotonic()
        measured = jobs.measured_rows_per_second(connection, MEASURED_ROWS)
        if measured is not None:
            self.pace.measured(measured)
        known = {job.request_id: job for job in self._jobs}
        self._courses = []
        for row in jobs.unsettled_jobs(connection):
            job = known.get(row.request_id) or self._job(row, monotonic, now)
            if job.status == "gathering":
                job.end("dropped")
            elif job.is_under_way and row.fingerprint not in (None, self.settings.fingerprint):
                job.end("lost", f"A bulk job was {MADE_FOR_ANOTHER}")
            self._courses.append(_Course(job, self._life(job)))
        self._courses.append(_Course(None, self._watch_foreign_jobs()))

    def _job(self, row: sa.Row[Any], monotonic: float, now: dt.datetime) -> Job:
        seconds = max(0.0, (now - row.submitted_at).total_seconds()) if row.submitted_at else 0.0
        is_unsure = row.status == "uploading"  # it may still arrive
        return Job(
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
        """Do this transaction's share of the work; return how many deliveries it settles, by status."""
        self._transaction, self._settled = transaction, Counter()
        for course in list(self._courses):
            if not isinstance(course.wait, JobRequest):
                self._go_on(course)
            if self._answer is not None and course.wait is self._request:
                answer, self._request, self._answer = self._answer, None, None
                self._go_on(course, answer)
        is_time = self.clock.monotonic() >= max(self._gather_at, self._ahead_at())
        if is_time and transaction.may_start and self._may_gather():
            self._begin()
        return self._settled

    def committed(self) -> JobRequest | None:
        """Go on after the commit; return a request that is to be sent now."""
        for course in list(self._courses):
            if course.wait is COMMIT:
                self._go_on(course)
        if self._request is not None:
            return None
        waits = (course.wait for course in self._courses)
        self._request = next((wait for wait in waits if isinstance(wait, JobRequest)), None)
        return self._request

    def take_in(self, answer: Answer) -> None:
        """Keep the answer to the request in flight for the next transaction."""
        self._answer = answer

    def _go_on(self, course: _Course, answer: Answer | None = None) -> None:
        try:
            course.wait = next(course.steps) if answer is None else course.steps.send(answer)
        except StopIteration:
            self._courses.remove(course)

    @property
    def is_asking(self) -> bool:
        return self._request is not None

    @property
    def is_busy(self) -> bool:
        """Whether a job needs more transactions of this process; one that ends leaves running jobs to the next."""
        return any(
            course.wait != NEVER
            for course in self._courses
            if course.job is not None or isinstance(course.wait, JobRequest)
        )

    def wait_seconds(self) -> float:
        """Return the seconds until a transaction has something to do here; infinite if that depends on an answer."""
        monotonic = self.clock.monotonic()
        moments = [course.wait for course in self._courses if isinstance(course.wait, float)]
        if self._may_gather() and self._ahead_at() > monotonic:
            moments.append(self._ahead_at())
        wait = min(moments, default=math.inf) - monotonic
        return max(wait, SHORTEST_WAIT_SECONDS) if wait > 0 else 0.0

    @property
    def under_way(self) -> Job | None:
        return next((job for job in self._jobs if job.is_under_way), None)

    @property
    def _jobs(self) -> list[Job]:
        return [course.job for course in self._courses if course.job is not None]

    def rates(self) -> split.Pace:
        """Return what each lane takes, for dividing a backlog."""
        rows = 0 if self.pace.is_paused(self.clock.monotonic()) else self.settings.rows_per_job
        return split.Pace(self.live.limit, self.live.per_second, self.pace.rows_per_second, rows)

    def seconds_left(self) -> float:
        job = self.under_way
        return max(0.0, job.ends_at(self.pace.rows_per_second) - self.clock.monotonic()) if job else 0.0

    def row_counts(self) -> tuple[int, int]:
        """Return how many rows of the jobs that are not over are done, by estimate, and how many are left."""
        rows = sum(job.row_count for job in self._jobs if not job.is_over)
        job = self.under_way
        if job is None:
            return 0, rows
        expected = job.row_count - int(self.seconds_left() * self.pace.rows_per_second)
        done = min(job.row_count, max(expected, job.completed_count or 0))
        return done, rows - done

    # The life of a job.

    def _life(self, job: Job, users: list[str] | None = None) -> Generator[Wait, Answer, None]:
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
            self._record(job)  # a transaction that failed may have taken it back
        while job.is_under_way:
            request = request or (yield from self._next_request(job))
            if request is not None:
                columns = job.columns
                self._read(request, job, (yield request))
                if job.is_under_way and job.columns != columns:
                    self._record(job)
                request = None
        self._record(job)
        yield from self._settle(job)

    def _request_about(self, job: Job | None) -> JobRequest | None:
        """Return the request in flight if it is about this job."""
        return self._request if self._request is not None and self._request.job is job else None

    def _begin(self) -> None:
        """Create a job if the queue is long enough for one."""
        began_at = self.clock.monotonic()
        users = self._next_users(began_at)
        if not users:
            monotonic = self.clock.monotonic()
            self._gather_at = monotonic + max(BACKLOG_SECONDS, 10 * (monotonic - began_at))
            return
        transaction = self._transaction
        job = jobs.create_job(
            transaction.connection, self.settings.fingerprint, transaction.epoch, transaction.now
        )
        course = _Course(job, self._life(job, users))
        self._courses.insert(-1, course)
        self._go_on(course)

    def _next_users(self, monotonic: float) -> list[str]:
        """Return users for the next job. The oldest are left to the live lane, which sends them meanwhile."""
        transaction = self._transaction
        room = max(0, self.live.room(monotonic) - transaction.live_count)
        pace, start_seconds = self.rates(), self.seconds_left()
        if self.under_way is None:  # the first job starts soon; the next is gathered meanwhile
            pace = replace(pace, rows_per_job=min(pace.rows_per_job, FIRST_ROWS))
        limit = min(
            MOST_USERS, pace.rows_per_job + split.live_share(pace.rows_per_job, room, pace, start_seconds) + 1
        )
        waiting: dict[str, bool] = {}  # whether a user's delivery was tried before
        burst = 0
        for delivery_class in due.CLASSES:
            left = limit - len(waiting)
            if left > 0:
                for user in due.users_due(
                    transaction.connection, delivery_class, transaction.now, left, self.settings.fingerprint
                ):
                    waiting[user.user_id] = waiting.get(user.user_id, False) or user.was_attempted
            if delivery_class != "push":
                burst = len(waiting)
        burst = min(burst, room)
        rows = split.job_rows(len(waiting), burst, pace, start_seconds)
        if not rows:
            return []
        fit = [
            user
            for user, was_attempted in waiting.items()
            if not was_attempted and user not in self._live_only
        ]
        live_count = split.live_share(rows, burst, pace, start_seconds) - (len(waiting) - len(fit))
        return fit[max(0, live_count) :][: min(rows, self.pace.most_rows)]

    def _gather(self, job: Job, users: list[str]) -> Generator[Wait, Answer, bytearray]:
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

    def _is_enough(self, job: Job, left: int, began_at: float) -> bool:
        """While no job runs, a part of a long one starts soon, and the next one is gathered meanwhile."""
        if self.under_way is not None or job.row_count < split.SMALLEST_JOB:
            return False
        is_long = job.row_count + left >= FIRST_ROWS
        return is_long and self.clock.monotonic() - began_at >= START_SECONDS

    def _take(self, job: Job, users: list[str], content: bytearray) -> bool:
        """Take those of the users who are free into a job; return False when its upload is full."""
        connection, now, is_full = self._transaction.connection, self._transaction.now, False
        ids: list[int] = []
        superseded: list[int] = []
        idle = due.idle_users(connection, users, now)
        fingerprint = self.settings.fingerprint
        for chosen in deliveries.choose_next(connection, "identify", idle, now, fingerprint) if idle else []:
            line = self._line(chosen)
            if line is None:
                self._live_only.add(chosen[0].subject_id)
                continue
            if len(content) + len(line) > MOST_BYTES:
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

    def _wait_for_start(self, job: Job) -> Generator[Wait, Answer, None]:
        """Wait for the end of the job before; give the users back if that takes too long, or the lane pauses."""
        give_up_at = self.clock.monotonic() + READY_SECONDS
        while self._is_occupied() and not self._transaction.is_ending and self.clock.monotonic() < give_up_at:
            yield give_up_at
        is_paused = self.pace.is_paused(self.clock.monotonic())
        if self._is_occupied() or self._transaction.is_ending or is_paused or not job.row_count:
            job.end("dropped")
            pause = FOREIGN_JOB_POLL_SECONDS if self._is_occupied() else BACKLOG_SECONDS
            self._gather_at = self.clock.monotonic() + pause

    def _started(self, job: Job) -> None:
        job.status, job.is_ready = "uploading", False
        job.submitted_at = job.moved_at = self.clock.monotonic()
        logs.event(log, logging.INFO, "bulk job sent", rows=job.row_count, request_id=job.request_id)

    def _next_request(self, job: Job) -> Generator[Wait, Answer, JobRequest | None]:
        """Wait until it is time to ask about the job; return None if it is given up because nothing changes."""
        while True:
            patience = max(STALLED_JOB_SECONDS, 4 * job.row_count / self.pace.rows_per_second)
            if self.clock.monotonic() - job.moved_at > patience:
                job.end(
                    "lost", f"Given up: the bulk job showed no progress for {round(patience / 60)} minutes"
                )
                self._wait_for_foreign_job("a bulk job that was given up may still run")
                return None
            if self._transaction.is_ending or self.is_asking:
                yield NEVER
            elif self.clock.monotonic() < job.poll_at:
                yield job.poll_at
            else:
                return JobRequest("poll" if job.job_id else "list", job)

    def _record(self, job: Job) -> None:
        jobs.record(self._transaction.connection, job, self._transaction.now)

    def _settle(self, job: Job) -> Generator[Wait, Answer, None]:
        """Settle the deliveries of a job that is over, some in each transaction."""
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

    def _next_to_settle(self) -> Job | None:
        """First a job that gives its users back; a completed one can wait until the next job is sent."""
        over = min((job for job in self._jobs if job.is_over), key=lambda job: job.is_completed, default=None)
        if over is None or not over.is_completed or self._transaction.is_ending:
            return over
        may_send = not self._is_occupied() and not self.pace.is_paused(self.clock.monotonic())
        return None if may_send and any(job.is_ready for job in self._jobs) else over

    # When something may start.

    def _is_occupied(self) -> bool:
        return self.under_way is not None or self.is_asking

    def _may_gather(self) -> bool:
        is_gathering = any(job.status == "gathering" for job in self._jobs)
        may_start = self.pace.may_start(self.clock.monotonic())
        return may_start and not is_gathering and not self._transaction.is_ending

    def _ahead_at(self) -> float:
        """Return when the next job is to be gathered: half as long again as that takes before the end of this one."""
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
        """While a job of somebody else runs, look at the list of jobs until none does."""
        request = self._request_about(None)
        while True:
            if request is not None:
                self._read_list_of_others((yield request))
                request = None
            is_needed = self.pace.is_foreign_job_running and not self._transaction.is_ending
            if not is_needed or self._is_occupied():
                yield NEVER
            elif self.clock.monotonic() < self.pace.paused_until:
                yield self.pace.paused_until
            else:
                request = JobRequest("list", None)

    # What the answers mean.

    def _read(self, request: JobRequest, job: Job, answer: Answer) -> None:
        match request.kind:
            case "upload":
                job.upload = answer
                self._read_upload(job, answer)
            case "poll":
                self._read_poll(job, answer)
            case "list":
                self._read_list(job, answer)

    def _read_upload(self, job: Job, answer: Answer) -> None:
        error, status = answer.error or "no answer", parse_job(answer.document)
        match answer.outcome:
            case Outcome.ACCEPTED if status.job_id:
                self.pace.accepted()
                self._update_status(job, status.job_id, status)
            case Outcome.ACCEPTED | Outcome.UNKNOWN:
                job.error = answer.error or "Userpilot accepted the upload and named no job"
                job.poll_at = (
                    self.clock.monotonic() + self.settings.grace.total_seconds()
                )  # it may still arrive
            case Outcome.REFUSED if answer.status_code == 409:
                job.end("dropped", error)
                self._wait_for_foreign_job(f"Another bulk job is running: {error}")
            case Outcome.REFUSED if answer.status_code not in _NO_ENDPOINT:
                self._refused(job, answer, error)
            case outcome:
                job.end("dropped", error)
                if outcome is not Outcome.UNAUTHORISED:
                    self._pause(error, answer.retry_after_seconds)

    def _refused(self, job: Job, answer: Answer, error: str) -> None:
        """Halve the next job, until the row that was refused is alone: the live lane then gets an answer for it."""
        job.end("failed" if job.row_count == 1 else "dropped", error)
        self._gather_at = NOW
        logs.event(log, logging.WARNING, "bulk job refused", rows=job.row_count)
        if self.pace.refused(job.row_count, is_too_large=answer.status_code == 413):
            self._pause(error)

    def _read_poll(self, job: Job, answer: Answer) -> None:
        monotonic = self.clock.monotonic()
        if answer.outcome is Outcome.ACCEPTED and isinstance(answer.document, dict):
            self._update_status(job, job.job_id or "", parse_job(answer.document))
        elif answer.status_code == 404:
            job.miss_count += 1
            job.poll_at = monotonic + FOREIGN_JOB_POLL_SECONDS
            if job.miss_count >= MOST_MISSES:
                job.end("lost", "Userpilot no longer knows the bulk job")
                self._wait_for_foreign_job("a bulk job that Userpilot no longer knows may still run")
        else:
            wait = answer.retry_after_seconds or 2 * max(self._poll_seconds(job), 1.0)
            job.poll_at = monotonic + min(wait, LONGEST_PAUSE_SECONDS)

    def _read_list(self, job: Job, answer: Answer) -> None:
        """Find the job of an upload that was not answered."""
        job.poll_at = self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS
        listed = parse_jobs(answer)
        if listed is None:
            return
        mine = next((status for status in listed if status.filename == job.filename), None)
        if mine is not None and mine.job_id:
            self._update_status(job, mine.job_id, JobStatus())  # the list has no counts of rows
            job.poll_at = self.clock.monotonic()
        elif not any(status.is_running for status in listed):
            job.end("lost", job.error or "The process ended before the answer came")

    def _read_list_of_others(self, answer: Answer) -> None:
        listed = parse_jobs(answer)
        if listed is None:
            self.pace.is_foreign_job_running = False  # the answer to the next upload says whether one runs
            self._pause(answer.error or "the list of jobs cannot be read", answer.retry_after_seconds)
        elif any(status.is_running for status in listed):
            self.pace.wait_for_foreign_job(
                self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS, self.pace.reason
            )
        else:
            self.pace.is_foreign_job_running, self.pace.reason = False, ""

    def _update_status(self, job: Job, job_id: str, status: JobStatus) -> None:
        """Take over what Userpilot says of a job; what it leaves out stays as it was."""
        completed = job.completed_count if status.completed_rows is None else status.completed_rows
        if (status.state, completed, job_id) != (job.state, job.completed_count, job.job_id):
            job.moved_at = self.clock.monotonic()
        job.status, job.job_id, job.state, job.completed_count = "running", job_id, status.state, completed
        job.error, job.miss_count = None, 0
        job.poll_at = self.clock.monotonic() + self._poll_seconds(job)
        if status.state == "completed":
            self._completed(job, status)
        elif status.state == "failed":
            job.end("failed", "Userpilot's bulk job failed")
            self._pause("a bulk job failed")
        if job.is_over:
            logs.event(
                log,
                logging.INFO if job.is_completed else logging.WARNING,
                f"bulk job {job.status}",
                rows=job.row_count,
                request_id=job.request_id,
                seconds=round(self.clock.monotonic() - job.submitted_at, 1),
            )

    def _completed(self, job: Job, status: JobStatus) -> None:
        counts = [count for count in (status.total_rows, status.completed_rows) if count is not None]
        least = min(counts, default=job.row_count)
        if least < job.row_count:
            job.end("failed", f"Userpilot's bulk job completed {least} of {job.row_count} rows")
            self._pause("a bulk job completed with rows missing")
            return
        job.end("completed")
        self.pace.completed()
        if job.row_count >= MEASURED_ROWS:
            self.pace.measured(job.row_count / max(0.001, self.clock.monotonic() - job.submitted_at))

    def _poll_seconds(self, job: Job) -> float:
        """Return the seconds until the next poll: fewer when the end is near."""
        left = job.ends_at(self.pace.rows_per_second) - self.clock.monotonic()
        return min(LONGEST_POLL_SECONDS, max(SHORTEST_POLL_SECONDS, left / 2 if left > 0 else -left / 20))

    def _wait_for_foreign_job(self, reason: str) -> None:
        self.pace.wait_for_foreign_job(self.clock.monotonic() + FOREIGN_JOB_POLL_SECONDS, reason)
        logs.event(log, logging.WARNING, "bulk lane waits for another job")

    def _pause(self, reason: str, seconds: float | None = None) -> None:
        seconds = self.pace.pause(self.clock.monotonic(), reason, seconds)
        logs.event(log, logging.WARNING, "bulk lane pauses", seconds=seconds)
