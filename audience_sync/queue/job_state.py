"""A bulk job as we know it, and what is asked about it."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from audience_sync import crash
from audience_sync.userpilot.answers import Answer, Outcome

UPLOAD_PATH = "v1/users/bulk_identify"
JOBS_PATH = "v1/background_jobs"
MOST_ROWS = 1_000_000_000


class JobSender(Protocol):
    def upload(self, path: str, filename: str, content: bytes, /) -> Answer: ...

    def get(self, path: str, /) -> Answer: ...


@dataclass(slots=True)
class Job:
    """A job that is not settled; times are monotonic seconds."""

    request_id: int
    filename: str
    status: str
    row_count: int = 0
    job_id: str | None = None
    state: str | None = None
    completed_count: int | None = None
    submitted_at: float = 0.0
    moved_at: float = 0.0  # when anything was last heard of it that was new
    poll_at: float = 0.0
    miss_count: int = 0
    error: str | None = None
    is_changed: bool = False  # the database does not know yet
    upload: Answer | None = None  # which the database does not know yet
    candidates: list[str] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    size: int = 0  # bytes
    begun_at: float = 0.0
    ready_at: float = math.inf

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
        self.status, self.error, self.is_changed = status, error, True
        self.candidates, self.lines = [], []


@dataclass(frozen=True, slots=True)
class JobRequest:
    """Something to ask Userpilot. `job` is None where it is about jobs that are not ours."""

    what: str  # upload, poll or list
    job: Job | None
    content: bytes = b""

    def run(self, sender: JobSender) -> Answer:
        if self.what == "upload" and self.job is not None:
            crash.at("before_upload")
            answer = sender.upload(UPLOAD_PATH, self.job.filename, self.content)
            crash.at("after_upload")
            return answer
        if self.what == "poll" and self.job is not None:
            answer = sender.get(f"{JOBS_PATH}/{quote(self.job.job_id or '', safe=':')}")
            crash.at("after_poll")
            return answer
        return sender.get(JOBS_PATH)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What Userpilot says of a job, as far as it can be used and every database takes it."""

    job_id: str | None = None
    filename: str | None = None
    state: str = "unknown"
    total_rows: int | None = None
    completed_rows: int | None = None

    @property
    def is_running(self) -> bool:
        return self.state not in {"completed", "failed"}


def parse_job(document: Any) -> JobStatus:
    """The job in an answer; all but its id and state may be missing."""
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
        if type(value := document.get(name)) is int and 0 <= value < MOST_ROWS
    }
    return JobStatus(texts.get("job_id"), texts.get("filename"), texts.get("status", "unknown"), **counts)


def parse_jobs(answer: Answer) -> list[JobStatus] | None:
    """The jobs in a list; None where the answer is none."""
    if answer.outcome is not Outcome.ACCEPTED or not isinstance(answer.document, list):
        return None
    return [parse_job(each) for each in answer.document]
