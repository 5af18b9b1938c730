"""A simulation's time, threads, network and processes: all of them in one thread, from one seed."""

import datetime as dt
import gzip
import heapq
import itertools
import json
from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from audience_sync.db import dialects, engines
from audience_sync.userpilot.answers import Answer, Outcome
from tests.conftest import SCHEMA
from tests.queue.userpilot import LocalUserpilot

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LATEST = 2.5  # seconds after which no late request arrives: less than the grace
ROUGH = [
    "drop before",
    "drop after",
    "late",
    "429",
    "500",
    "503",
    "502",
    "502 applied",
    "html",
    "html applied",
]
ODD = [
    *(f"{status} page" for status in (400, 401, 403, 404, 405, 413, 500, 502, 503)),
    "404 page applied",
    "302",
    "503 later",
    "500 later",
    "202 text",
    "202 gzip",
    "202 empty",
]
ACCEPTED = {"202 text", "202 gzip", "202 empty"}
UNSURE = {"late", "drop before", "drop after", "502", "502 applied", "html", "html applied"}
RETRY_AFTER = [None, "0", "2", "7", "-5", "soon", "100000", "Thu, 01 Jan 2026 00:05:00 GMT"]


class Killed(BaseException):
    pass


class Timeline:
    """A clock that moves only during waits. Actions that become due run at their time, inside the wait.

    The wall clock may be set; the monotonic one never goes back.
    """

    def __init__(self):
        self.seconds = self.ahead = 0.0
        self._due = []
        self._numbers = itertools.count()

    def now(self):
        return START + dt.timedelta(seconds=self.seconds + self.ahead)

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.wait(seconds)

    def after(self, seconds, act):
        heapq.heappush(self._due, (self.seconds + seconds, next(self._numbers), act))

    def wait(self, seconds, is_enough=lambda: False):
        end = self.seconds + seconds
        while self._due and self._due[0][0] <= end and not is_enough():
            moment, _, act = heapq.heappop(self._due)
            self.seconds = max(self.seconds, moment)
            act()
        if not is_enough():
            self.seconds = max(self.seconds, end)


@dataclass(frozen=True)
class MachineClock:
    """The clock of a machine, whose wall clock differs from the database's, which is the timeline's."""

    timeline: Timeline
    ahead: float  # seconds

    def now(self):
        return self.timeline.now() + dt.timedelta(seconds=self.ahead)

    def monotonic(self):
        return self.timeline.monotonic()

    def sleep(self, seconds):
        self.timeline.sleep(seconds)


@dataclass
class Failure:
    """The database fails, or the process dies, when a point is passed for the nth time."""

    point: str
    left: int
    kills: bool

    def __str__(self):
        return f"{'death' if self.kills else 'failure'} at {self.point}"


def open_database(url, reach):
    """The engine of all processes; `reach` is called at every statement and commit, and may raise."""
    engine = engines.open_own(url, SCHEMA)
    commit = engine.dialect.do_commit

    def do_commit(connection):
        reach("commit")
        commit(connection)
        reach("committed")

    engine.dialect.do_commit = do_commit

    @sa.event.listens_for(engine, "before_cursor_execute")
    def before(_connection, _cursor, _statement, _parameters, _context, _many):
        reach("statement")

    if dialects.is_sqlite(engine):

        @sa.event.listens_for(engine, "connect")
        def connect(connection, _record):
            connection.execute("PRAGMA synchronous = OFF")  # the machine never loses power
            # In one thread no lock is released while another waits.
            connection.execute("PRAGMA busy_timeout = 100")

    else:

        @sa.event.listens_for(engine, "connect")
        def plan_once(connection, _record):
            """Prepare statements at once, for any values: a run's connections are too short-lived to learn of them."""
            connection.prepare_threshold = 0
            with connection.transaction(), connection.cursor() as cursor:
                cursor.execute("SET plan_cache_mode = force_generic_plan")

    return engine


class Process:
    """A process. Once dead it does nothing more; while it is asleep, so are its threads."""

    def __init__(self, name, clock, database_error, note):
        self.name, self.clock, self._error, self._note = name, clock, database_error, note
        self.failure = None
        self.had_failure = self.is_dead = self.is_asleep = False
        self.worker = None
        self.frozen = []  # actions of its threads, for when it wakes

    @property
    def is_awake(self):
        return not self.is_dead and not self.is_asleep

    def reach(self, point):
        if self.is_dead:
            raise Killed
        failure = self.failure
        if failure is None or failure.point != point:
            return
        failure.left -= 1
        if failure.left > 0:
            return
        self.failure, self.had_failure = None, True
        self._note(f"{self.name}: {failure}")
        if failure.kills:
            self.is_dead = True
            raise Killed
        error = self._error("the server went away")
        error.sqlstate, error.sqlite_errorname = "57P01", "SQLITE_IOERR"
        raise error


class Wire:
    """Senders of a worker: a request arrives some time after its start, its answer some time later."""

    def __init__(self, process, timeline, chance, network):
        self._process, self._timeline, self._chance, self._network = process, timeline, chance, network
        self._under_way = 0
        self._unread = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self._under_way and not self._process.is_dead:
            self._timeline.wait(60, lambda: not self._under_way)

    def start(self, send):
        self._under_way += 1
        self._soon(send)

    def _soon(self, send):
        longest = LATEST if self._chance.random() < 0.1 else 0.2
        self._timeline.after(self._chance.uniform(0.01, longest), partial(self._arrive, send))

    def collect(self, seconds):
        if not self._unread and seconds > 0:
            self._timeline.wait(seconds, lambda: self._unread)
        reply, self._unread = self._unread, []
        return reply

    def _arrive(self, send):
        if not self._process.is_awake and self._chance.random() < 0.5:  # it had not been sent yet
            self._process.frozen.append(partial(self._soon, send))
            return
        with self._network.straying(not self._process.is_awake):
            reply = send()
        longest = 20.0 if self._chance.random() < 0.1 else 0.3
        self._timeline.after(self._chance.uniform(0.01, longest), partial(self._receive, reply))

    def _receive(self, reply):
        self._under_way -= 1
        self._unread.append(reply)


@dataclass(frozen=True)
class Line:
    """A process's sender."""

    process: Process
    network: "Network"

    def send(self, path, payload):
        return self._pass(partial(self.network.send, path, payload))

    def upload(self, path, filename, content):
        return self._pass(partial(self.network.upload, path, filename, content))

    def get(self, path):
        return self._pass(partial(self.network.get, path))

    def _pass(self, ask):
        is_awake = self.process.is_awake
        if is_awake:
            self.process.reach("request")
        answer = ask()
        if is_awake:
            self.process.reach("requested")
        return answer


class Network:
    """The network to Userpilot, with some faults; it records which answers were not Userpilot's own."""

    def __init__(self, timeline, chance, note, **limits):
        self.userpilot = LocalUserpilot(timeline, **limits)
        self.weather, self.roughness = [], 0.0
        self.poisoned = set()  # users
        self.forbidden = set()  # users whose requests are refused with 403, though the key is valid
        self.injected = set()  # numbers of requests that a fault answered
        self.strays = set()  # numbers of requests that arrived after their sender had given up
        self.late_uploads = 0  # how many of the next ones
        self.unsure_count = 0  # answers that left open whether the request was applied
        self.uploads = {}  # number: the upload's filename
        self.settled_at = 0.0  # when the last stray has come
        self.when_late = lambda _path, _users: None
        self._timeline, self._chance, self._note = timeline, chance, note
        self._is_straying = False

    def straying(self, is_stray):
        self._is_straying = is_stray
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._is_straying = False

    def calm_down(self):
        self.weather, self.late_uploads = [], 0
        self.poisoned, self.forbidden = set(), set()

    def stray_until_settled(self):
        self.settled_at = self._timeline.seconds + 3

    def send(self, path, payload):
        ask = partial(self.userpilot.send, path, payload)
        return self._ask(ask, path, is_poison=self._poison(payload), users=[payload["user_id"]])

    def upload(self, path, filename, content):
        rows = [json.loads(line) for line in content.splitlines()]
        is_poison = next(filter(None, map(self._poison, rows)), None)

        def ask():
            self.uploads[len(self.userpilot.state.requests) + 1] = filename
            return self.userpilot.upload(path, filename, content)

        return self._ask(ask, path, is_poison=is_poison, users=[row["user_id"] for row in rows])

    def get(self, path):
        return self._ask(partial(self.userpilot.get, path), path, is_poison=None, users=[])

    def _poison(self, payload):
        """The status with which Userpilot refuses a request or a row, whatever the weather; None for most."""
        if payload["user_id"] in self.poisoned or _ends(payload, "poison"):
            return "400"
        if payload["user_id"] in self.forbidden:
            return "403"
        return "500" if _ends(payload, "sick") else None

    def _ask(self, ask, path, *, is_poison, users):
        rough = self._chance.random() < self.roughness
        kind = self._chance.choice(self.weather) if rough and self.weather else None
        if self.late_uploads and len(users) > 1:
            self.late_uploads, kind = self.late_uploads - 1, "late"
        if kind in UNSURE or (kind or "").partition(" ")[2].startswith("page"):
            self.unsure_count += 1
        if kind == "late":
            self.stray_until_settled()
            self._timeline.after(
                self._chance.uniform(0.1, LATEST), partial(self._stray, ask, path, is_poison)
            )
            self._note(f"late: {path}")
            if users and self._chance.random() < 0.5:
                self.when_late(path, users)
            return Answer(Outcome.UNKNOWN, None, None, "no answer in time", None)
        if kind == "closed":
            return Answer(Outcome.FAILED, None, None, "cannot connect", None)
        if is_poison and kind in {
            None,
            "drop after",
            "502 applied",
            "html applied",
            "404 page applied",
            *ACCEPTED,
        }:
            kind = is_poison
        if kind in ACCEPTED and not users:  # a job is described in JSON
            kind = None
        return self._strike(ask, kind, path)

    def _stray(self, ask, path, is_poison):
        with self.straying(True):
            self._strike(ask, is_poison, path)

    def _strike(self, ask, kind, path):
        number = len(self.userpilot.state.requests) + 1
        if kind is not None:
            self.injected.add(number)
            self.userpilot.faults.add(self._fault(kind) | {"times": 1})
        if self._is_straying:
            self.strays.add(number)
        answer = ask()
        outcome = f"{answer.status_code} {answer.outcome}{' stray' if self._is_straying else ''}"
        self._note(f"{number} {path.removeprefix('v1/')}: {kind or ''} {outcome}")
        return answer

    def _fault(self, kind):
        status, _, applied = kind.partition(" ")
        match applied.partition(" "):
            case "page", _, more:
                headers = {"content-type": "text/html"}
                return {"status": int(status), "body": "<html>", "headers": headers, "apply": bool(more)}
            case "later", _, _:
                return {"status": int(status), "headers": {"retry-after": self._chance.choice(["2", "70"])}}
            case ("text" | "gzip" | "empty") as form, _, _:
                body = {"text": "OK", "gzip": gzip.compress(b'{"status":"ok"}', mtime=0), "empty": None}[form]
                return {"status": int(status), "body": body, "apply": True}
        match status:
            case "drop":
                return {"drop": applied}
            case "html":
                headers = {"content-type": "text/html"}
                return {"status": 200, "body": "<p>", "headers": headers, "apply": bool(applied)}
            case "429":
                wish = self._chance.choice(RETRY_AFTER)
                return {"status": 429, "headers": {"retry-after": wish} if wish else {}}
        return {"status": int(status), "apply": bool(applied)}


def _ends(payload, ending):
    return any(str(value).endswith(ending) for value in payload.get("metadata", {}).values())
