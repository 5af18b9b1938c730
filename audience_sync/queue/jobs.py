"""Bulk jobs: their rows in the database, the requests about them, and Userpilot's descriptions of them.

Until the job is settled, its deliveries are `sending`, so that no other request carries their users.
Functions that take a connection run in their caller's transaction.
"""

import datetime as dt
import re
import uuid
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import quote

import sqlalchemy as sa

from audience_sync import crash
from audience_sync.db import tables
from audience_sync.queue import deliveries
from audience_sync.queue.requests import record_requests
from audience_sync.userpilot.answers import Answer, Outcome

UPLOAD_PATH = "v1/users/bulk_identify"
JOBS_PATH = "v1/background_jobs"
MAX_ROWS = 1_000_000_000
SETTLED_PER_TRANSACTION = 2_000  # deliveries that a transaction settles at most


@dataclass(slots=True)
class BulkJob:
    """A job that is not settled. tables.py lists the statuses; times are monotonic seconds."""

    request_id: int
    filename: str
    status: str = "gathering"
    row_count: int = 0
    is_ready: bool = False  # gathered, but not sent
    upload: Answer | None = None  # the answer to its upload
    submitted_at: float = 0.0
    job_id: str | None = None
    state: str | None = None  # as Userpilot reports it
    completed_count: int | None = None
    moved_at: float = 0.0  # when an answer last showed progress
    poll_at: float = 0.0
    is_missing: bool = False  # the last poll was answered by 404
    error: str | None = None

    @property
    def is_under_way(self) -> bool:
        return self.status in {"uploading", "running"}

    @property
    def is_over(self) -> bool:
        return self.status in {"completed", "failed", "dropped", "lost"}

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    def end(self, status: str, error: str | None = None) -> None:
        self.status, self.error = status, error

    def ends_at(self, rows_per_second: float) -> float:
        """Return when the job is expected to end; this moment may have passed."""
        rows = self.row_count - (self.completed_count or 0)
        since = self.moved_at if self.completed_count else self.submitted_at
        return since + rows / rows_per_second

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that answers change."""
        return {
            "status": self.status,
            "job_id": self.job_id,
            "state": self.state,
            "completed_count": self.completed_count,
            "error": self.error,
        }


class JobSender(Protocol):
    def upload(self, path: str, filename: str, content: bytes, /) -> Answer: ...

    def get(self, path: str, /) -> Answer: ...


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request about a job; `job` is None when it is about other clients' jobs."""

    kind: Literal["upload", "poll", "list"]
    job: BulkJob | None
    content: bytes = b""

    def send(self, sender: JobSender) -> Answer:
        if self.job is None or self.kind == "list":
            return sender.get(JOBS_PATH)
        if self.kind == "upload":
            crash.at("before_upload")
            answer = sender.upload(UPLOAD_PATH, self.job.filename, self.content)
            crash.at("after_upload")
            return answer
        answer = sender.get(f"{JOBS_PATH}/{quote(self.job.job_id or '', safe=':')}")
        crash.at("after_poll")
        return answer


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Userpilot's description of a job, without values that the database cannot store."""

    job_id: str | None = None
    filename: str | None = None
    state: str = "unknown"
    total_rows: int | None = None
    completed_rows: int | None = None

    @property
    def is_running(self) -> bool:
        return self.state not in {"completed", "failed"}

    def is_of(self, job_id: str | None, filename: str) -> bool:
        return self.filename == filename or (job_id is not None and self.job_id == job_id)


def parse_job(document: Any) -> JobStatus:
    """Read a job from an answer; any member may be missing."""
    if not isinstance(document, dict):
        return JobStatus()
    texts = {
        name: value
        for name in ("job_id", "filename", "status")
        if isinstance(value := document.get(name), str) and re.fullmatch(r"[!-~]{1,200}", value)
    }
    counts = {
        name: value
        for name in ("total_rows", "completed_rows")
        if type(value := document.get(name)) is int and 0 <= value < MAX_ROWS
    }
    return JobStatus(texts.get("job_id"), texts.get("filename"), texts.get("status", "unknown"), **counts)


def parse_jobs(answer: Answer) -> list[JobStatus] | None:
    """Read a list of jobs; None if the answer is not a list."""
    if answer.outcome is not Outcome.ACCEPTED or not isinstance(answer.document, list):
        return None
    return [parse_job(document) for document in answer.document]


def create_job(connection: sa.Connection, fingerprint: str | None, epoch: int, now: dt.datetime) -> BulkJob:
    """Insert a job without rows, and the request of its upload."""
    filename = f"audience-sync-{uuid.uuid4().hex}.ndjson"
    (request_id,) = record_requests(connection, "bulk", epoch, [0], now)
    job = BulkJob(request_id, filename)
    connection.execute(
        tables.bulk_jobs.insert().values(
            request_id=request_id,
            filename=filename,
            fingerprint=fingerprint,
            status=job.status,
            created_at=now,
        )
    )
    return job


def update_job(connection: sa.Connection, request_id: int, **columns: Any) -> None:
    connection.execute(
        tables.bulk_jobs.update().where(tables.bulk_jobs.c.request_id == request_id).values(**columns)
    )


def begin_upload(connection: sa.Connection, request_id: int, now: dt.datetime) -> None:
    """Record that the upload begins, and the number of its deliveries."""
    update_job(connection, request_id, status="uploading", submitted_at=now)
    count = sa.select(sa.func.count()).where(deliveries.is_in_job(request_id)).scalar_subquery()
    connection.execute(
        tables.requests.update()
        .where(tables.requests.c.request_id == request_id)
        .values(started_at=now, delivery_count=count)
    )


def record(connection: sa.Connection, job: BulkJob, now: dt.datetime) -> None:
    """Write the state of a job, and how its upload ended."""
    update_job(connection, job.request_id, **job.columns, ended_at=now if job.is_over else None)
    if job.upload is not None:
        ended = {
            "status_code": job.upload.status_code,
            "x_request_id": job.upload.x_request_id,
            "error": job.upload.error,
        }
    elif job.is_over:  # the process that sent it ended before the answer came
        ended = {"error": job.error}
    else:
        return
    connection.execute(
        tables.requests.update()
        .where(tables.requests.c.request_id == job.request_id, tables.requests.c.ended_at.is_(None))
        .values(ended_at=now, **ended)
    )


def assign_jobs(connection: sa.Connection, fingerprint: str) -> None:
    """Make this the destination of the jobs that are not settled."""
    is_other = sa.or_(tables.bulk_jobs.c.fingerprint.is_(None), tables.bulk_jobs.c.fingerprint != fingerprint)
    connection.execute(
        tables.bulk_jobs.update()
        .where(tables.bulk_jobs.c.settled_at.is_(None), is_other)
        .values(fingerprint=fingerprint)
    )


def finish_job(connection: sa.Connection, request_id: int, now: dt.datetime) -> None:
    """Mark a job as settled; delete it if it was never uploaded."""
    never_uploaded = (tables.bulk_jobs.c.request_id == request_id, tables.bulk_jobs.c.submitted_at.is_(None))
    if connection.execute(tables.bulk_jobs.delete().where(*never_uploaded)).rowcount:
        connection.execute(tables.requests.delete().where(tables.requests.c.request_id == request_id))
    else:
        update_job(connection, request_id, settled_at=now)


def unsettled_jobs(connection: sa.Connection) -> list[sa.Row[Any]]:
    """Return the rows of the jobs that are not settled, oldest first."""
    query = sa.select(tables.bulk_jobs).where(tables.bulk_jobs.c.settled_at.is_(None))
    return list(connection.execute(query.order_by(tables.bulk_jobs.c.request_id)))


def measured_rows_per_second(connection: sa.Connection, min_rows: int) -> float | None:
    """Return the speed of the newest completed job with at least this many rows."""
    row = connection.execute(
        sa.select(tables.bulk_jobs)
        .where(tables.bulk_jobs.c.status == "completed", tables.bulk_jobs.c.row_count >= min_rows)
        .order_by(tables.bulk_jobs.c.request_id.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    return float(row.row_count / max(0.001, (row.ended_at - row.submitted_at).total_seconds()))
