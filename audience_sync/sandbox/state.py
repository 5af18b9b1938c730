"""The data that Userpilot would have, its rate limits and its bulk jobs, without HTTP; the clocks are two callables."""

import math
import threading
import uuid
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar

import msgspec

DELETIONS_HOUR = 2  # UTC; Userpilot carries deletions out once a day
DELETION_WINDOW_SECONDS = 2.0
JOB_PATH = "/v1/background_jobs/"
_Count = Annotated[int, msgspec.Meta(ge=0)]


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Userpilot's limits: requests in a window of `window_seconds`, and the size and speed of bulk jobs.

    `bulk_rows_per_minute` is a job's speed in real minutes, for any window. `refused_percent`, which is not a limit of
    Userpilot, is the share of identifies, tracks and companies that are refused with 400, evenly distributed.
    """

    identify_per_minute: _Count = 600
    track_per_minute: _Count = 600
    company_per_minute: _Count = 600
    bulk_rows_per_minute: _Count = 1800
    bulk_rows_per_request: _Count = 10_000
    bulk_bytes_per_request: _Count = 50_000_000
    window_seconds: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    refused_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0


class Job(msgspec.Struct):
    job_id: str
    rows: list[dict[str, Any]]
    total_rows: int
    number: int  # of the request that uploaded it
    filename: str | None
    file_size: int
    submitted_at: float
    progress: float = 0.0  # in rows, including a fraction of the current one
    completed_rows: int = 0
    start_time: float | None = None
    end_time: float | None = None

    @property
    def last_row(self) -> int:
        """The number of rows that the job applies before it ends."""
        return self.total_rows

    @property
    def is_finished(self) -> bool:
        return self.completed_rows == self.last_row

    @property
    def status(self) -> str:
        if self.end_time is not None:
            return "completed"
        return "queued" if self.start_time is None else "processing"

    def fields(self) -> dict[str, Any]:
        """Members of the job in Userpilot's list of jobs."""
        return {
            "job_id": self.job_id,
            "status": self.status,
            "type": "users_bulk_identify",
            "filename": self.filename,
            "file_size": self.file_size,
            "total_rows": self.total_rows,
            "submitted_at": _isoformat(self.submitted_at),
            "start_time": _isoformat(self.start_time),
            "end_time": _isoformat(self.end_time),
        }


class Entry(msgspec.Struct):
    """A line of the request log; `status` is None until the request is answered."""

    number: int
    method: str
    path: str
    body: Any
    received_at: float
    monotonic: float
    user_id: str | None = None
    company_id: str | None = None
    status: int | None = None
    applied: bool = False
    x_request_id: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)


class State:
    """Callers must hold `lock`, and first call `advance` to bring jobs and deletions up to date."""

    entry_type: ClassVar[type[Entry]] = Entry
    job_type: ClassVar[type[Job]] = Job

    def __init__(
        self, api_key: str, limits: Limits, monotonic: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self.api_key, self.limits = api_key, limits
        self.lock = threading.RLock()
        self._monotonic, self._wall = monotonic, wall
        self.reset()

    def reset(self) -> None:
        """Delete users, jobs, the log and the contents of the windows; the key and the limits stay."""
        self.users: dict[str, dict[str, Any]] = {}
        self.companies: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.jobs: dict[str, Job] = {}
        self._running: Job | None = None
        self.deletions: list[dict[str, Any]] = []
        self._deletions_due_at = math.inf
        self.requests: list[Entry] = []
        self.history: dict[str, list[tuple[str, Any, int]]] = {}
        self._windows: dict[str, deque[float]] = {}
        self._advanced_at = self._monotonic()

    def receive(self, method: str, path: str, body: Any) -> Entry:
        """Log a request before it is applied, so that the log includes requests that are never answered."""
        entry = self.entry_type(len(self.requests) + 1, method, path, body, self._wall(), self._monotonic())
        if isinstance(body, dict):
            entry.user_id, entry.company_id = _text(body, "user_id"), _text(body, "company_id")
        self.requests.append(entry)
        return entry

    def admit(self, lane: str, entry: Entry) -> None:
        """Count the request in each of its windows. Raises RefusedError 429 if one is full.

        A request that is refused with 400 later still counts.
        """
        names = self.windows_of(lane)
        for name in names:
            places, seconds = self.places(name)
            if len(self.window(name, entry.monotonic)) >= places:
                raise RefusedError(429, f"more than {places} {name} requests in {seconds:g} seconds")
        for name in names:
            self._windows[name].append(entry.monotonic)

    def windows_of(self, lane: str) -> list[str]:
        """The windows in which a request counts; the documentation has no limits for uploads and polls."""
        return [] if lane in {"upload", "poll"} else [lane]

    def places(self, name: str) -> tuple[int, float]:
        """The number of requests that a window admits, and its length in seconds."""
        if name == "delete":
            return 1, DELETION_WINDOW_SECONDS
        return getattr(self.limits, f"{name}_per_minute"), self.limits.window_seconds

    def window(self, name: str, now: float) -> deque[float]:
        """Times of the requests that still count in this sliding window."""
        window, (_, seconds) = self._windows.setdefault(name, deque()), self.places(name)
        while window and window[0] <= now - seconds:
            window.popleft()
        return window

    def identify(
        self, number: int, user_id: str, metadata: dict[str, Any], company: dict[str, Any] | None
    ) -> None:
        user = self.users.setdefault(user_id, {"properties": {}, "company_id": None})
        _merge(user["properties"], metadata)
        self.history.setdefault(user_id, []).extend((name, value, number) for name, value in metadata.items())
        if company is not None:
            user["company_id"] = company["id"]
            self.identify_company(company["id"], {name: company[name] for name in company if name != "id"})

    def identify_company(self, company_id: str, metadata: dict[str, Any]) -> None:
        _merge(self.companies.setdefault(company_id, {"properties": {}})["properties"], metadata)

    def track(self, number: int, user_id: str, event_name: str, metadata: dict[str, Any]) -> None:
        event = {"user_id": user_id, "event_name": event_name, "metadata": metadata, "request": number}
        self.events.append(event | {"received_at": self._wall(), "user_known": user_id in self.users})

    def start_job(self, number: int, rows: list[dict[str, Any]], filename: str | None, size: int) -> Job:
        if self._running is not None:
            raise RefusedError(409, f"the job {self._running.job_id} is still running")
        job_id = f"bulk:jobs:sandbox:{uuid.uuid4()}"
        job = self.job_type(job_id, rows, len(rows), number, filename, size, self._wall())
        self.jobs[job_id] = self._running = job
        return job

    def describe(self, job: Job, **more: int) -> dict[str, Any]:
        """The members of a job in an answer; `more` are only in the answer about a single job."""
        return job.fields() | more

    def delete_users(self, ids: list[str]) -> None:
        now = datetime.fromtimestamp(self._wall(), UTC)
        due = now.replace(hour=DELETIONS_HOUR, minute=0, second=0, microsecond=0)
        due += timedelta(days=due <= now)
        times = {"requested_at": now.timestamp(), "due_at": due.timestamp(), "done_at": None}
        self.deletions.append({"ids": ids} | times)
        self._deletions_due_at = min(self._deletions_due_at, due.timestamp())

    def advance(self) -> None:
        """Apply the rows of the running job that are due by now, and the deletions that are due."""
        since, self._advanced_at = self._advanced_at, self._monotonic()
        if self._running is not None:
            self._work(self._running, since, self._advanced_at)
        if self._deletions_due_at <= self._wall():  # all open deletions are due at the same hour
            for deletion in self.deletions:
                if deletion["done_at"] is None:
                    self._carry_out(deletion)
            self._deletions_due_at = math.inf

    def snapshot(self) -> dict[str, Any]:
        """Return all data. The inner objects are not copies, so serialize it under the lock."""
        return {
            "users": self.users,
            "companies": self.companies,
            "events": self.events,
            "jobs": [job.fields() | {"completed_rows": job.completed_rows} for job in self.jobs.values()],
            "deletions": self.deletions,
        }

    def _work(self, job: Job, since: float, now: float) -> None:
        job.progress += (now - since) * self.limits.bulk_rows_per_minute / 60
        done = min(int(job.progress + 1e-6), job.last_row)  # 1e-6: 60 s at 1,800 a minute are 1,800 rows
        for row in job.rows[job.completed_rows : done]:
            company = {"id": row["company_id"]} if "company_id" in row else None
            self.identify(job.number, row["user_id"], row.get("metadata", {}), company)
        job.completed_rows = done
        if done and job.start_time is None:
            job.start_time = self._wall()
        if job.is_finished:
            job.end_time, self._running = self._wall(), None

    def _carry_out(self, deletion: dict[str, Any]) -> None:
        """Delete users with their events; history and log stay."""
        deletion["done_at"] = self._wall()
        ids = set(deletion["ids"])
        self.users = {name: user for name, user in self.users.items() if name not in ids}
        self.events = [event for event in self.events if event["user_id"] not in ids]


def _merge(properties: dict[str, Any], metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        properties[name] = value
        if value is None:
            del properties[name]


def _text(body: dict[str, Any], name: str) -> str | None:
    return body[name] if isinstance(body.get(name), str) else None


def _isoformat(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
