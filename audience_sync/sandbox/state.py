"""What Userpilot would hold, and how fast it takes it in. No HTTP here; time comes in as two callables."""

import math
import threading
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec

DELETIONS_HOUR = 2  # UTC; Userpilot carries deletions out once a day
DELETION_WINDOW_SECONDS = 2.0
JOB_PATH = "/v1/background_jobs/"
_Count = Annotated[int, msgspec.Meta(ge=0)]


class RefusalError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `*_per_minute` of requests hold for any `window_seconds`; tests shorten the window.

    `bulk_rows_per_minute` is the speed of a job, in rows a true minute. With `bare_jobs` an answer tells of a job
    no more than its `job_id` and `status`: Userpilot promises nothing else. What Userpilot does not say: whether
    uploads, their rows, polls of jobs and company calls (`*_count`) take places among the identifies.
    `others_per_minute` of the identifies' places are taken by other clients of the key, evenly over the window.
    """

    identify_per_minute: _Count = 600
    track_per_minute: _Count = 600
    company_per_minute: _Count = 600
    bulk_rows_per_minute: _Count = 1800
    bulk_rows_per_request: _Count = 10_000
    bulk_bytes_per_request: _Count = 50_000_000
    window_seconds: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    bare_jobs: bool = False
    uploads_count: bool = False
    rows_count: bool = False
    polls_count: bool = False
    companies_count: bool = False
    others_per_minute: _Count = 0


class JobFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What becomes of one job, somebody else's too: no more than its first `after_rows` rows are worked off, and then
    it is `failed`, is completed (`short`), or `hangs` for ever. `completed` is a job that goes well.

    `state` is shown for as long as it runs.
    """

    outcome: Literal["failed", "short", "hangs", "completed"] = "completed"
    after_rows: _Count = 0
    state: str | None = None


class Job(msgspec.Struct):
    job_id: str
    kind: str  # users or companies
    rows: list[dict[str, Any]]  # none, where the job is somebody else's
    total_rows: int
    number: int  # of the request that brought it
    filename: str | None
    file_size: int
    submitted_at: float
    fault: JobFault
    worked: float = 0.0  # rows, with the fraction that is under way
    completed_rows: int = 0
    start_time: float | None = None
    end_time: float | None = None

    @property
    def last_row(self) -> int:
        """How many rows will ever be worked off."""
        whole = self.fault.outcome == "completed"
        return self.total_rows if whole else min(self.fault.after_rows, self.total_rows)

    @property
    def status(self) -> str:
        if self.end_time is not None:
            return "failed" if self.fault.outcome == "failed" else "completed"
        return self.fault.state or ("queued" if self.start_time is None else "processing")

    def fields(self) -> dict[str, Any]:
        """As Userpilot lists it; `completed_rows` comes only where one job is asked for."""
        return {
            "job_id": self.job_id,
            "status": self.status,
            "type": f"{self.kind}_bulk_identify",
            "filename": self.filename,
            "file_size": self.file_size,
            "total_rows": self.total_rows,
            "submitted_at": _isoformat(self.submitted_at),
            "start_time": _isoformat(self.start_time),
            "end_time": _isoformat(self.end_time),
        }


class Entry(msgspec.Struct):
    """A line of the request log. `status` is None while it is under way, and when nothing was answered."""

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
    fault: str | None = None
    x_request_id: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def endpoint(self) -> str:
        return f"{self.method} {JOB_PATH + '*' if self.path.startswith(JOB_PATH) else self.path}"


class State:
    """Whoever calls holds `lock`, and has jobs and deletions move on by `advance` before anything else."""

    def __init__(
        self, api_key: str, limits: Limits, monotonic: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self.api_key, self.limits = api_key, limits
        self.lock = threading.RLock()
        self.job_faults: list[JobFault] = []  # each job that is started takes the first
        self._monotonic, self._wall = monotonic, wall
        self.reset()

    def reset(self) -> None:
        self.users: dict[str, dict[str, Any]] = {}
        self.companies: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.jobs: dict[str, Job] = {}
        self._running: Job | None = None
        self.deletions: list[dict[str, Any]] = []
        self._deletions_due_at = math.inf
        self.requests: list[Entry] = []
        self._counts: dict[str, Counter[int | None]] = defaultdict(Counter)
        self.history: dict[str, list[tuple[str, Any, int]]] = {}
        self._windows: dict[str, deque[float]] = {}
        self._advanced_at = self._monotonic()

    def receive(self, method: str, path: str, body: Any) -> Entry:
        """Puts the request on the log at once, so that one that is never answered is there too."""
        entry = Entry(len(self.requests) + 1, method, path, body, self._wall(), self._monotonic())
        if isinstance(body, dict):
            entry.user_id, entry.company_id = _text(body, "user_id"), _text(body, "company_id")
        self.requests.append(entry)
        self._counts[entry.endpoint][None] += 1
        return entry

    def answered(self, entry: Entry, status: int) -> None:
        entry.status = status
        self._counts[entry.endpoint].update({None: -1, status: 1})

    def admit(self, lane: str, entry: Entry) -> None:
        """A place in each window that the request counts in, or in none. One refused later (a 400) keeps them."""
        names = self._counted_in(lane)
        for name in names:
            places, seconds = self._places(name)
            if len(self._window(name, entry.monotonic)) >= places:
                raise RefusalError(429, f"more than {places} {name} requests in {seconds:g} seconds")
        for name in names:
            self._windows[name].append(entry.monotonic)

    def _counted_in(self, lane: str) -> list[str]:
        match lane:
            case "upload":
                return ["identify"] * self.limits.uploads_count
            case "poll":
                return ["identify"] * self.limits.polls_count
            case "company":
                return ["company"] + ["identify"] * self.limits.companies_count
        return [lane]

    def _places(self, name: str) -> tuple[int, float]:
        """How many a window has, and for how many seconds each is taken."""
        if name == "delete":
            return 1, DELETION_WINDOW_SECONDS
        others = self.limits.others_per_minute if name == "identify" else 0
        return getattr(self.limits, f"{name}_per_minute") - others, self.limits.window_seconds

    def _window(self, name: str, now: float) -> deque[float]:
        """When those places were taken that are not free again; it slides."""
        window, (_, seconds) = self._windows.setdefault(name, deque()), self._places(name)
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

    def start_job(
        self, number: int, kind: str, rows: list[dict[str, Any]], filename: str | None, size: int
    ) -> Job:
        if self._running is not None:
            raise RefusalError(409, f"the job {self._running.job_id} is still running")
        fault = self.job_faults.pop(0) if self.job_faults else JobFault()
        job_id = f"bulk:jobs:sandbox:{uuid.uuid4()}"
        job = Job(job_id, kind, rows, len(rows), number, filename, size, self._wall(), fault)
        self.jobs[job_id] = self._running = job
        return job

    def start_other_job(self, rows: int) -> Job:
        """A job of somebody else who uses the key. What its rows would write is not kept."""
        with self.lock:
            self.advance()
            job = self.start_job(0, "users", [], None, 0)
            job.total_rows = rows
            return job

    def forget_jobs(self) -> None:
        """No job is known by its id any more; a running one is still worked off, and keeps others out."""
        with self.lock:
            self.jobs = {}

    def delete(self, kind: str, ids: list[str]) -> None:
        now = datetime.fromtimestamp(self._wall(), UTC)
        due = now.replace(hour=DELETIONS_HOUR, minute=0, second=0, microsecond=0)
        due += timedelta(days=due <= now)
        times = {"requested_at": now.timestamp(), "due_at": due.timestamp(), "done_at": None}
        self.deletions.append({"kind": kind, "ids": ids} | times)
        self._deletions_due_at = min(self._deletions_due_at, due.timestamp())

    def set_limits(self, limits: Limits) -> None:
        with self.lock:
            self.advance()  # what is worked off so far was at the old speed
            self.limits = limits

    def advance(self, *, delete_now: bool = False) -> None:
        """Works the running job off up to now, and carries deletions out that are due."""
        since, self._advanced_at = self._advanced_at, self._monotonic()
        if self._running is not None:
            self._work(self._running, since, self._advanced_at)
        if delete_now or self._deletions_due_at <= self._wall():  # all that are open: it is the same hour
            for deletion in self.deletions:
                if deletion["done_at"] is None:
                    self._carry_out(deletion)
            self._deletions_due_at = math.inf

    def snapshot(self) -> dict[str, Any]:
        """Shares the inner objects with the state, so serialize it under the lock."""
        return {
            "users": self.users,
            "companies": self.companies,
            "events": self.events,
            "jobs": [job.fields() | {"completed_rows": job.completed_rows} for job in self.jobs.values()],
            "deletions": self.deletions,
        }

    def counts(self) -> dict[str, Counter[int | None]]:
        """How many requests of the log got which status, by endpoint; None as in an entry."""
        return {endpoint: +statuses for endpoint, statuses in self._counts.items()}

    def _work(self, job: Job, since: float, now: float) -> None:
        speed, before = self.limits.bulk_rows_per_minute / 60, job.worked
        job.worked += (now - since) * speed
        done = min(int(job.worked + 1e-6), job.last_row)  # 1e-6: 60 s at 1,800 a minute are 1,800 rows
        for row in job.rows[job.completed_rows : done]:
            if job.kind == "companies":
                self.identify_company(row["company_id"], row.get("metadata", {}))
            else:
                company = {"id": row["company_id"]} if "company_id" in row else None
                self.identify(job.number, row["user_id"], row.get("metadata", {}), company)
        if self.limits.rows_count:
            moments = (since + (row + 1 - before) / speed for row in range(job.completed_rows, done))
            self._window("identify", now).extend(moments)
        job.completed_rows = done
        if done and job.start_time is None:
            job.start_time = self._wall()
        if done == job.last_row and job.fault.outcome != "hangs":
            job.end_time, self._running = self._wall(), None

    def _carry_out(self, deletion: dict[str, Any]) -> None:
        """A user's events go with the user; history and log stay, they are for checking."""
        deletion["done_at"] = self._wall()
        ids = set(deletion["ids"])
        if deletion["kind"] == "users":
            self.users = {name: user for name, user in self.users.items() if name not in ids}
            self.events = [event for event in self.events if event["user_id"] not in ids]
            return
        self.companies = {name: company for name, company in self.companies.items() if name not in ids}
        for user in self.users.values():
            if user["company_id"] in ids:
                user["company_id"] = None


def _merge(properties: dict[str, Any], metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        properties[name] = value
        if value is None:
            del properties[name]


def _text(body: dict[str, Any], name: str) -> str | None:
    return body[name] if isinstance(body.get(name), str) else None


def _isoformat(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
