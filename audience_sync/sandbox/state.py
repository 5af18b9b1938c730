"""What Userpilot would hold, and how fast it takes it in. No HTTP here; time comes in as two callables."""

import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any

DELETIONS_HOUR = 2  # UTC; Userpilot carries deletions out once a day
DELETION_WINDOW_SECONDS = 2.0


class RefusalError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Limits:
    """The `*_per_minute` of requests hold for any `window_seconds`; tests shorten the window.

    `bulk_rows_per_minute` is the speed of a job, in rows a true minute.
    """

    identify_per_minute: int = 600
    track_per_minute: int = 600
    company_per_minute: int = 600
    bulk_rows_per_minute: int = 1800
    bulk_rows_per_request: int = 10_000
    bulk_bytes_per_request: int = 50_000_000
    window_seconds: float = 60.0


@dataclass(slots=True)
class Job:
    job_id: str
    kind: str  # users or companies
    rows: list[dict[str, Any]]
    number: int  # of the request that brought it
    filename: str | None
    file_size: int
    submitted_at: float
    worked: float = 0.0  # rows, with the fraction that is under way
    completed_rows: int = 0
    start_time: float | None = None
    end_time: float | None = None

    @property
    def status(self) -> str:
        if self.end_time is not None:
            return "completed"
        return "queued" if self.start_time is None else "processing"


@dataclass(slots=True)
class Deletion:
    kind: str
    ids: list[str]
    requested_at: float
    due_at: float
    done_at: float | None = None


@dataclass(slots=True)
class Entry:
    """A line of the request log. `status` is None while it is under way, and when nothing was answered."""

    number: int
    method: str
    path: str
    body: Any
    user_id: str | None
    company_id: str | None
    received_at: float
    monotonic: float
    status: int | None = None
    applied: bool = False
    fault: str | None = None
    x_request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class State:
    """Everything under one lock; jobs and deletions move on whenever somebody asks."""

    def __init__(
        self, api_key: str, limits: Limits, monotonic: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self.api_key = api_key
        self.limits = limits
        self.lock = threading.RLock()
        self._monotonic, self._wall = monotonic, wall
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self.users: dict[str, dict[str, Any]] = {}
            self.companies: dict[str, dict[str, Any]] = {}
            self.events: list[dict[str, Any]] = []
            self.jobs: dict[str, Job] = {}
            self.deletions: list[Deletion] = []
            self.requests: list[Entry] = []
            self.history: dict[str, list[tuple[str, Any, int]]] = {}
            self._windows: dict[str, deque[float]] = {}
            self._advanced_at = self._monotonic()

    def receive(
        self, method: str, path: str, body: Any, user_id: str | None, company_id: str | None
    ) -> Entry:
        """Puts the request on the log at once, so that one that is never answered is there too."""
        with self.lock:
            number = len(self.requests) + 1
            now, at = self._monotonic(), self._wall()
            self.requests.append(Entry(number, method, path, body, user_id, company_id, at, now))
            return self.requests[-1]

    def admit(self, lane: str, entry: Entry) -> None:
        """Sliding window. A request that it refuses does not count; one refused later (a 400) does."""
        with self.lock:
            limit, seconds = 1, DELETION_WINDOW_SECONDS
            if lane != "delete":
                limit, seconds = getattr(self.limits, f"{lane}_per_minute"), self.limits.window_seconds
            window = self._windows.setdefault(lane, deque())
            while window and window[0] <= entry.monotonic - seconds:
                window.popleft()
            if len(window) >= limit:
                raise RefusalError(429, f"more than {limit} {lane} requests in {seconds:g} seconds")
            window.append(entry.monotonic)

    def identify(
        self, number: int, user_id: str, metadata: dict[str, Any], company: dict[str, Any] | None
    ) -> None:
        with self.lock:
            self.advance()
            self._merge_user(number, user_id, metadata, company)

    def identify_company(self, company_id: str, metadata: dict[str, Any]) -> None:
        with self.lock:
            self.advance()
            self._merge_company(company_id, metadata)

    def track(self, number: int, user_id: str, event_name: str, metadata: dict[str, Any]) -> None:
        with self.lock:
            self.advance()
            event = {"user_id": user_id, "event_name": event_name, "metadata": metadata}
            known = user_id in self.users
            self.events.append(event | {"received_at": self._wall(), "user_known": known, "request": number})

    def start_job(
        self, number: int, kind: str, rows: list[dict[str, Any]], filename: str | None, size: int
    ) -> Job:
        with self.lock:
            self.advance()
            running = next((job for job in self.jobs.values() if job.end_time is None), None)
            if running is not None:
                raise RefusalError(409, f"the job {running.job_id} is still running")
            job_id = f"bulk:jobs:sandbox:{uuid.uuid4()}"
            self.jobs[job_id] = Job(job_id, kind, rows, number, filename, size, self._wall())
            return self.jobs[job_id]

    def delete(self, kind: str, ids: list[str]) -> None:
        with self.lock:
            self.advance()
            now = datetime.fromtimestamp(self._wall(), UTC)
            due = now.replace(hour=DELETIONS_HOUR, minute=0, second=0, microsecond=0)
            due += timedelta(days=due <= now)
            self.deletions.append(Deletion(kind, ids, now.timestamp(), due.timestamp()))

    def set_limits(self, limits: Limits) -> None:
        with self.lock:
            self.advance()  # what is worked off so far was at the old speed
            self.limits = limits

    def advance(self, *, delete_now: bool = False) -> None:
        """Works the running job off up to now, and carries deletions out that are due."""
        with self.lock:
            now = self._monotonic()
            worked = (now - self._advanced_at) * self.limits.bulk_rows_per_minute / 60
            self._advanced_at = now
            for job in self.jobs.values():
                if job.end_time is None:
                    self._work(job, worked)
            for deletion in self.deletions:
                if deletion.done_at is None and (delete_now or deletion.due_at <= self._wall()):
                    self._carry_out(deletion)

    def snapshot(self) -> dict[str, Any]:
        """Made for JSON; shares the inner objects with the state, so serialize it under the lock."""
        with self.lock:
            self.advance()
            return {
                "users": self.users,
                "companies": self.companies,
                "events": self.events,
                "jobs": [
                    job_fields(job) | {"completed_rows": job.completed_rows} for job in self.jobs.values()
                ],
                "deletions": [as_fields(deletion) for deletion in self.deletions],
            }

    def _work(self, job: Job, worked: float) -> None:
        job.worked += worked
        done = min(int(job.worked + 1e-6), len(job.rows))  # 1e-6: 60 s at 1,800 a minute are 1,800 rows
        for row in job.rows[job.completed_rows : done]:
            if job.kind == "companies":
                self._merge_company(row["company_id"], row.get("metadata", {}))
            else:
                company = {"id": row["company_id"]} if "company_id" in row else None
                self._merge_user(job.number, row["user_id"], row.get("metadata", {}), company)
        job.completed_rows = done
        if done and job.start_time is None:
            job.start_time = self._wall()
        if done == len(job.rows):
            job.end_time = self._wall()

    def _merge_user(
        self, number: int, user_id: str, metadata: dict[str, Any], company: dict[str, Any] | None
    ) -> None:
        user = self.users.setdefault(user_id, {"properties": {}, "company_id": None})
        _merge(user["properties"], metadata)
        self.history.setdefault(user_id, []).extend((name, value, number) for name, value in metadata.items())
        if company is not None:
            user["company_id"] = company["id"]
            self._merge_company(company["id"], {name: company[name] for name in company if name != "id"})

    def _merge_company(self, company_id: str, metadata: dict[str, Any]) -> None:
        _merge(self.companies.setdefault(company_id, {"properties": {}})["properties"], metadata)

    def _carry_out(self, deletion: Deletion) -> None:
        """A user's events go with the user; history and log stay, they are for checking."""
        deletion.done_at = self._wall()
        ids = set(deletion.ids)
        if deletion.kind == "users":
            self.users = {name: user for name, user in self.users.items() if name not in ids}
            self.events = [event for event in self.events if event["user_id"] not in ids]
            return
        self.companies = {name: company for name, company in self.companies.items() if name not in ids}
        for user in self.users.values():
            if user["company_id"] in ids:
                user["company_id"] = None


def as_fields(record: Entry | Deletion) -> dict[str, Any]:
    return {item.name: getattr(record, item.name) for item in fields(record)}  # asdict copies every body


def job_fields(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "status": job.status,
        "type": f"{job.kind}_bulk_identify",
        "filename": job.filename,
        "file_size": job.file_size,
        "total_rows": len(job.rows),
        "submitted_at": _isoformat(job.submitted_at),
        "start_time": _isoformat(job.start_time),
        "end_time": _isoformat(job.end_time),
    }


def _merge(properties: dict[str, Any], metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        if value is None:
            properties.pop(name, None)
        else:
            properties[name] = value


def _isoformat(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
