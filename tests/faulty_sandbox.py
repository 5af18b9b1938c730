"""The sandbox with faults on demand, failing jobs, and other interpretations of what Userpilot does not document.

In addition to the sandbox's, it has these endpoints under /_sandbox/:

| endpoint | does |
| --- | --- |
| GET counts | counts the requests of the log: {"<method> <path>": {"<status>": n}} |
| GET, POST, DELETE faults | lists them, adds one (the members are FaultOptions'), clears them |
| POST, DELETE job_faults | adds one (the members are JobFault's) for a job to come; clears them |
| POST other_job | {"rows": n}: starts a job of another client of the key |
| POST forget_jobs | makes every job unknown |
| POST deletions | carries out all deletions now |
| POST limits | changes some of them |
| POST key | {"api_key": ...}: replaces the key, so that the old one is revoked |
| POST reset | forgets state, log and windows; faults, limits and key stay |
"""

import math
import threading
from collections import Counter, defaultdict
from typing import Annotated, Any, Literal

import msgspec

from audience_sync import sandbox
from audience_sync.sandbox.server import Handler
from audience_sync.sandbox.state import JOB_PATH, Entry, Job, State

GARBAGE = b"\x16\x03\x01\x00\x00 this is not HTTP\r\n\r\n"
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Rows = Annotated[dict[Literal["rows"], _Count], msgspec.Meta(min_length=1)]
_Key = Annotated[dict[Literal["api_key"], str], msgspec.Meta(min_length=1)]


class Limits(sandbox.Limits, frozen=True, forbid_unknown_fields=True):
    """Userpilot's limits, and what is uncertain about them.

    With `bare_jobs` an answer has no more of a job than its `job_id` and `status`: Userpilot promises nothing else.
    Uploads, their rows, polls of jobs and company calls (`*_count`) may take places among the identifies.
    `others_per_minute` of the identifies' places are taken by other clients of the key, evenly over the window.
    """

    bare_jobs: bool = False
    uploads_count: bool = False
    rows_count: bool = False
    polls_count: bool = False
    companies_count: bool = False
    others_per_minute: _Count = 0


class FaultOptions(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: Annotated[str, msgspec.Meta(pattern="^/")] = "*"  # exact, or a prefix if it ends in *
    user_id: str | None = None
    after: _Count = 0  # matching requests that pass first
    every: Annotated[int, msgspec.Meta(ge=1)] = 1  # of those that follow, each one, or each nth
    times: Annotated[int, msgspec.Meta(ge=1)] | None = None  # None: until it is cleared
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] | None = None
    body: Any = None
    headers: dict[str, str] = {}
    delay_seconds: _Seconds = 0.0
    delay_after_seconds: _Seconds = 0.0
    drop: Literal["before", "after"] | None = None
    garbage: bool = False
    apply: bool = False


class Fault(FaultOptions):
    matched: int = 0
    struck: int = 0

    @property
    def applies(self):
        return self.drop != "before" and (self.status is None or self.apply)

    def strikes(self, path, user_id):
        matches = path.startswith(self.path[:-1]) if self.path.endswith("*") else path == self.path
        if self.struck == self.times or self.user_id not in (None, user_id) or not matches:
            return False
        self.matched += 1
        number = self.matched - self.after
        strikes = number > 0 and number % self.every == 0
        self.struck += strikes
        return strikes


class Faults:
    def __init__(self):
        self._lock = threading.Lock()
        self._faults = []
        self._added_count = 0

    def add(self, body):
        """Add a fault; ValueError names the member that is wrong."""
        with self._lock:
            options = msgspec.convert({"name": f"fault-{self._added_count + 1}"} | body, FaultOptions)
            answers = [bool(options.status), bool(options.drop), options.garbage]
            if not (any(answers) or options.delay_seconds or options.delay_after_seconds):
                raise ValueError(
                    "an effect is needed: status, drop, garbage, delay_seconds, delay_after_seconds"
                )
            if sum(answers) > 1:
                raise ValueError("only one of status, drop, garbage can be")
            if not options.status and (options.body is not None or options.headers or options.apply):
                raise ValueError("body, headers and apply need a status")
            self._added_count += 1
            self._faults.append(Fault(**msgspec.structs.asdict(options)))
            return msgspec.structs.asdict(self._faults[-1])

    def clear(self):
        with self._lock:
            self._faults.clear()

    def list(self):
        with self._lock:
            return [msgspec.structs.asdict(fault) for fault in self._faults]

    def take(self, path, user_id):
        """The first fault, in the order added, that strikes this request; later ones do not count it."""
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(path, user_id)), None)


class JobFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of one job: after its first `after_rows` rows it has `failed`, is completed (`short`), or `hangs`.

    `completed` is a job that goes well. `state` is the job's status for as long as it runs.
    """

    outcome: Literal["failed", "short", "hangs", "completed"] = "completed"
    after_rows: _Count = 0
    state: str | None = None


class FaultyJob(Job):
    fault: JobFault = JobFault()

    @property
    def last_row(self):
        goes_well = self.fault.outcome == "completed"
        return self.total_rows if goes_well else min(self.fault.after_rows, self.total_rows)

    @property
    def is_finished(self):
        return self.fault.outcome != "hangs" and super().is_finished

    @property
    def status(self):
        if self.end_time is not None:
            return "failed" if self.fault.outcome == "failed" else "completed"
        return self.fault.state or super().status


class FaultyEntry(Entry):
    fault: str | None = None  # its name


class FaultyState(State):
    """`job_faults`: each job that starts takes the first."""

    entry_type = FaultyEntry
    job_type = FaultyJob

    def __init__(self, api_key, limits, monotonic, wall):
        super().__init__(api_key, with_doubts(limits), monotonic, wall)
        self.faults = Faults()
        self.job_faults = []

    def set_limits(self, limits):
        with self.lock:
            self.advance()  # the rows so far were applied at the old speed
            self.limits = with_doubts(limits)

    def windows_of(self, lane):
        names = super().windows_of(lane)
        counted = {
            "upload": self.limits.uploads_count,
            "poll": self.limits.polls_count,
            "company": self.limits.companies_count,
        }
        return names + ["identify"] * counted.get(lane, False)

    def places(self, name):
        places, seconds = super().places(name)
        return places - (self.limits.others_per_minute if name == "identify" else 0), seconds

    def start_job(self, number, rows, filename, size):
        job = super().start_job(number, rows, filename, size)
        job.fault = self.job_faults.pop(0) if self.job_faults else JobFault()
        return job

    def start_other_job(self, rows):
        """Start a job of another client of the key; its rows write nothing."""
        with self.lock:
            self.advance()
            job = self.start_job(0, [], None, 0)
            job.total_rows = rows
            return job

    def forget_jobs(self):
        """Make every job unknown; a running one continues, and blocks others."""
        with self.lock:
            self.jobs = {}

    def describe(self, job, **more):
        fields = super().describe(job, **more)
        return {name: fields[name] for name in ("job_id", "status")} if self.limits.bare_jobs else fields

    def delete_now(self):
        self._deletions_due_at = -math.inf
        self.advance()

    def counts(self):
        """Number of requests of each endpoint with each status, None if they were not answered."""
        counts = defaultdict(Counter)
        for entry in self.requests:
            path = JOB_PATH + "*" if entry.path.startswith(JOB_PATH) else entry.path
            counts[f"{entry.method} {path}"][entry.status] += 1
        return dict(counts)

    def _work(self, job, since, now):
        progress, first = job.progress, job.completed_rows
        super()._work(job, since, now)
        if self.limits.rows_count:
            speed = self.limits.bulk_rows_per_minute / 60
            moments = (since + (row + 1 - progress) / speed for row in range(first, job.completed_rows))
            self.window("identify", now).extend(moments)


class FaultyHandler(Handler):
    def serve(self, path, body):
        entry = self.receive(path, body)
        fault = self.server.state.faults.take(path, entry.user_id) or Fault("")
        entry.fault = fault.name or None
        if self._stopped_within(fault.delay_seconds):
            return
        status, answer = self.apply(entry, body) if fault.applies else (0, None)
        if fault.status is not None:
            status, answer = fault.status, self._body(fault)
        has_answer = fault.drop is None and not fault.garbage
        if has_answer:
            entry.status = status
        if self._stopped_within(fault.delay_after_seconds):
            return
        if has_answer:
            self.send(status, answer, {"x-request-id": entry.x_request_id} | fault.headers)
        else:
            self.close_connection = True
            self.wfile.write(GARBAGE if fault.garbage else b"")

    @staticmethod
    def _body(fault):
        if fault.body is None and fault.status >= 400:
            return sandbox.api.errors(fault.status, "a fault was asked for")
        return fault.body.encode() if isinstance(fault.body, str) else fault.body

    def _stopped_within(self, seconds):
        if seconds and self.server.stopping.wait(seconds):
            self.close_connection = True
            return True
        return False

    def inspect(self, call, query, body):
        state = self.server.state
        match call:
            case "GET counts":
                return state.counts()
            case "GET faults":
                return state.faults.list()
            case "POST faults":
                return state.faults.add(msgspec.convert(body, dict[str, Any]))
            case "DELETE faults":
                return state.faults.clear()
            case "POST job_faults":
                state.job_faults.append(msgspec.convert(body, JobFault))
                return state.job_faults[-1]
            case "DELETE job_faults":
                return state.job_faults.clear()
            case "POST other_job":
                return state.start_other_job(msgspec.convert(body, _Rows)["rows"]).fields()
            case "POST forget_jobs":
                return state.forget_jobs()
            case "POST reset":
                return state.reset()
            case "POST deletions":
                return state.delete_now()
            case "POST limits":
                changes = msgspec.convert(body, dict[str, Any])
                state.limits = msgspec.convert(msgspec.structs.asdict(state.limits) | changes, Limits)
                return state.limits
            case "POST key":
                state.api_key = msgspec.convert(body, _Key)["api_key"]
                return None
        return super().inspect(call, query, body)


class FaultySandbox(sandbox.Sandbox):
    """The sandbox of the tests; a fault's delay is always real time."""

    state_type = FaultyState
    handler_type = FaultyHandler

    @property
    def faults(self):
        return self.state.faults


def with_doubts(limits):
    """The same limits, where they are the sandbox's own without the members for doubts."""
    return limits if isinstance(limits, Limits) else Limits(**msgspec.structs.asdict(limits))
