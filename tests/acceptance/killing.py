"""Kills `audience-sync` while its audiences change, starts it again, and measures the consequences.

A `Scene` is a company with its own database and sandbox. Each kill is checked once a new process has delivered
everything: the sandbox has the current values, and no value ever went back.
"""

import itertools
import os
import queue
import random
import signal
import sqlite3
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from audience_sync.db import dialects, engines
from audience_sync.queue.pace import requests_in_flight
from audience_sync.queue.worker import MAX_IN_FLIGHT
from audience_sync.sandbox import Limits, Sandbox

SEED = os.environ.get("KILLS_SEED") or str(time.time_ns())
KILLS_OF_A_SCENE = 100
SYNCS_TO_REACH_A_POINT = 5
RECOVERED_WITHIN_SECONDS = 150
HEARTBEAT = "SELECT heartbeat_at FROM {our}destination"
OPEN = "SELECT count(*) FROM {our}deliveries WHERE status NOT IN ('accepted', 'cancelled', 'dead')"


@dataclass(frozen=True)
class Company:
    """A company: its users, how many of them change between two syncs, and the limits of its destination."""

    users: int
    moves: int
    identify_per_minute: int
    bulk_rows_per_job: int
    window_seconds: float = 60.0  # length of the limits' minute; a test cannot wait for a real one

    def limits(self):
        return Limits(
            identify_per_minute=self.identify_per_minute,
            bulk_rows_per_minute=BULK_ROWS_PER_MINUTE,
            window_seconds=self.window_seconds,
        )

    @property
    def in_flight(self):
        """The most requests that a crash may repeat: those in flight in a lane of this limit."""
        return min(MAX_IN_FLIGHT, requests_in_flight(self.identify_per_minute / self.window_seconds))


BULK_ROWS_PER_MINUTE = 2_400
# The sandbox may receive the last request of a killed process after the next process has taken over, and counts it from
# then. A busy machine can delay it by this much.
LATE_SECONDS = 1.0
SMALL = Company(60, 30, 1_000_000, 10_000)
MANY = Company(100, 90, 1_000_000, 10_000)  # more changes than requests that may be in flight
WITH_JOBS = Company(100, 90, 20, 15, window_seconds=3.0)  # each sync has jobs, three at least


@dataclass(frozen=True)
class Kind:
    """A kind of kill: of `command`, at each of `points` of audience_sync.crash in turn, or at random moments."""

    label: str  # in the table of kills
    share: int  # kills of a hundred
    points: tuple[str, ...] = ()
    command: str = "sync"
    company: Company = WITH_JOBS
    longest_seconds: float = 2.0  # the latest random moment


def passings(**counts):
    return tuple(f"{point}:{number}" for point, numbers in counts.items() for number in numbers)


KINDS = {  # a run passes each point once for each of the three definitions
    "run": Kind(
        "computing and committing a run", 15, company=SMALL,
        points=passings(run_started=(1, 2, 3), snapshot_computed=(1, 2, 3), changes_written=(1, 2, 3),
                        run_committed=(1, 2, 3)),
    ),
    "requests": Kind(
        "claiming, sending and settling requests", 25, company=MANY,
        points=passings(claimed=(1, 2, 3), before_send=(1, 5, 12, 17), after_send=(1, 6, 13, 19),
                        settled=(1, 2, 3), lease_released=(1,)),
    ),
    "bulk": Kind(
        "gathering, sending, following and settling a bulk job", 25,
        points=passings(gathered=(1, 2, 3), before_upload=(1, 2, 3), after_upload=(1, 2, 3),
                        after_poll=(1, 2, 3, 4), job_settled=(1, 2, 3), claimed=(4,), settled=(4,)),
    ),
    "random": Kind("`sync`, at a random instant", 25),
    "daemon": Kind("`daemon`, at a random instant", 10, command="daemon", longest_seconds=3.5),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The consequences of one kill.

    `lost` counts values that Userpilot does not have, `turned_back` those that went back to an older one. The
    repeated requests, and rows of bulk jobs, contained nothing new for a user.
    """

    at: str
    seconds: float  # from the kill until a new process had everything accepted
    lost: int
    turned_back: int
    repeated_requests: int
    repeated_rows: int
    wrong: tuple[str, ...]  # all other mistakes

    @property
    def is_good(self):
        return not (self.lost or self.turned_back or self.wrong)


CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "sandbox"
identify_per_minute = {identify_per_minute}
bulk_rows_per_minute = {bulk_rows_per_minute}
bulk_rows_per_job = {bulk_rows_per_job}
[defaults]
schedule = "0 0 * * *"
guard_above = 1_000_000
max_exit_ratio = 1.0
[[audiences]]
name = "In"
sql = "SELECT user_id FROM people WHERE is_in = 1"
[[audiences]]
name = "Often in"
sql = "SELECT user_id FROM people WHERE is_in = 1 AND moved > 3"
[[traits]]
name = "Moved"
sql = "SELECT user_id, moved AS value FROM people"
"""


class People:
    """The company's table, and every value that each user has had in it."""

    def __init__(self, url, company, chance):
        self._engine = sa.create_engine(url)
        self._moves, self._chance = company.moves, chance
        self.users = [f"u{number:03}" for number in range(company.users)]
        self._rows = {user: {"is_in": 0, "moved": 0} for user in self.users}
        self._truths = defaultdict(list)
        with self._engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE people (user_id text, is_in integer, moved integer)")
            connection.execute(
                sa.text("INSERT INTO people VALUES (:user_id, :is_in, :moved)"),
                [{"user_id": user, **row} for user, row in self._rows.items()],
            )
        self._note()

    def move(self):
        """Make some users enter and some leave; `moved` only grows."""
        users = self._chance.sample(self.users, self._moves)
        for user in users:
            row = self._rows[user]
            self._rows[user] = {"is_in": 1 - row["is_in"], "moved": row["moved"] + 1}
        with self._engine.begin() as connection:
            connection.execute(
                sa.text("UPDATE people SET is_in = 1 - is_in, moved = moved + 1 WHERE user_id = :user_id"),
                [{"user_id": user} for user in users],
            )
        self._note()

    def _note(self):
        for user in self.users:
            for key, value in self._now(user).items():
                self._truths[user, key].append(value)

    def _now(self, user):
        row = self._rows[user]
        return {
            "in": row["is_in"] == 1,
            "often_in": row["is_in"] == 1 and row["moved"] > 3,
            "moved": row["moved"],
        }

    def count_lost(self, users):
        """Count the current values that differ from those at Userpilot; a user who never entered may be missing."""
        count = 0
        for user in self.users:
            properties = {"in": False, "often_in": False} | users.get(user, {"properties": {}})["properties"]
            count += sum(properties.get(key) != value for key, value in self._now(user).items())
        return count

    def count_turned_back(self, history):
        """Count the properties whose values at Userpilot, without repeats, are in another order than in the table."""
        count = 0
        for (user, key), values in self._truths.items():
            lines = history.get(user, [])
            sent = [value for value, _ in itertools.groupby(value for name, value, _ in lines if name == key)]
            true = iter(values if key == "moved" else [False, *values])
            count += not all(any(value == each for each in true) for value in sent)
        return count

    def close(self):
        self._engine.dispose()


def nothing_new(history):
    """The numbers of requests without anything new, once for each such user."""
    for lines in history.values():
        last = {}
        for number, group in itertools.groupby(lines, key=lambda line: line[2]):
            values = {name: value for name, value, _ in group}
            if values.items() <= last.items():
                yield number
            last |= values


class Scene:
    """A company with its database and sandbox, whose processes are killed."""

    def __init__(self, url, folder, company, forker, sandbox, seed):
        self._chance = random.Random(seed)
        self._forker, self._sandbox = forker, sandbox
        self._environ = dict(os.environ) | {"TEST_WINDOW_SECONDS": str(company.window_seconds + LATE_SECONDS)}
        self._people = People(url, company, self._chance)
        self._engine = engines.open_own(url, "audience_sync")
        self._repeated = Counter()
        self._path = folder / f"{sandbox.url.split(':')[-1].strip('/')}.toml"
        self._path.write_text(
            CONFIGURATION.format(
                url=url,
                endpoint=sandbox.url,
                identify_per_minute=company.identify_per_minute,
                bulk_rows_per_minute=BULK_ROWS_PER_MINUTE,
                bulk_rows_per_job=company.bulk_rows_per_job,
            ),
            encoding="utf-8",
        )
        code, output = self._run()
        assert code == 0, output

    def kill(self, kind, number):
        """Carry out the `number`th kill of a kind."""
        if kind.points:
            at = kind.points[number % len(kind.points)]
            self._kill_at(at)
        else:
            at = self._kill_somewhere(kind)
        killed_at = time.monotonic()
        turned_back = self._turned_back()
        if kind.command == "daemon":
            wrong, seconds = self._recover_daemon(killed_at)
        else:
            if number % 2:  # the work of the killed process is outdated when the next one starts
                self._people.move()
                killed_at = time.monotonic()
            code, output = self._run()
            seconds = time.monotonic() - killed_at
            wrong = [] if code == 0 else [output]
        repeated = self._count_repeated()
        return Outcome(
            at,
            seconds,
            lost=self._people.count_lost(self._state()["users"]),
            turned_back=max(turned_back, self._turned_back()),
            repeated_requests=repeated["requests"],
            repeated_rows=repeated["rows"],
            wrong=(*wrong, *self._wrongs()),
        )

    def _start(self, *arguments, crash_at=None):
        environ = self._environ | ({"AUDIENCE_SYNC_CRASH_AT": crash_at} if crash_at else {})
        called = ["--config", str(self._path), *arguments]
        return self._forker.start(called, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def _run(self, crash_at=None):
        with self._start("sync", crash_at=crash_at) as process:
            output = process.communicate(timeout=RECOVERED_WITHIN_SECONDS)
        return process.returncode, "".join(output)

    def _kill_at(self, point):
        """Kill a sync when it reaches the point for this time, or a later sync if the first one does not reach it."""
        for _ in range(SYNCS_TO_REACH_A_POINT):
            self._people.move()
            code, output = self._run(crash_at=point)
            if code == -signal.SIGKILL:
                return
            assert code == 0, (point, code, output)
        raise AssertionError((point, "was not reached", output))

    def _kill_somewhere(self, kind):
        """Kill at a random moment; if the process had ended by then, try again at an earlier one."""
        longest = kind.longest_seconds
        while True:
            self._people.move()
            if kind.command == "daemon":
                self._make_due()
            seconds = self._chance.uniform(0.0, longest)
            with self._start(kind.command) as process:
                time.sleep(seconds)
                process.send_signal(signal.SIGKILL)
                output = "".join(process.communicate(timeout=RECOVERED_WITHIN_SECONDS))
            if process.returncode == -signal.SIGKILL:
                return f"{seconds:.3f} s"
            assert process.returncode == 0, output
            longest = seconds

    def _make_due(self):
        """Make the newest slot of every definition due."""
        with engines.write(self._engine) as connection:
            dialects.sql(connection, "DELETE FROM {our}schedule_slots")
            dialects.sql(connection, "UPDATE {our}definitions SET created_at = '2020-01-01 00:00:00.000000'")

    def _recover_daemon(self, killed_at):
        """Run another daemon until it has a heartbeat and everything is accepted, then stop it."""
        last_heartbeat = self._ask(HEARTBEAT)
        with self._start("daemon") as process:
            while not (is_done := self._ask(HEARTBEAT) != last_heartbeat and self._is_done()):
                if time.monotonic() > killed_at + RECOVERED_WITHIN_SECONDS:
                    break
                time.sleep(0.05)
            seconds = time.monotonic() - killed_at
            process.send_signal(signal.SIGTERM)
            try:
                output = process.communicate(timeout=RECOVERED_WITHIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                output = process.communicate(timeout=RECOVERED_WITHIN_SECONDS)
        return ["".join(output)] if process.returncode or not is_done else [], seconds

    def _is_done(self):
        if self._people.count_lost(self._state()["users"]):
            return False
        return self._ask(OPEN) == 0

    def _ask(self, statement):
        with engines.read(self._engine) as connection:
            return dialects.sql(connection, statement).scalar()

    def _state(self):
        with self._sandbox.state.lock:
            self._sandbox.state.advance()
            return self._sandbox.state.snapshot()

    def _turned_back(self):
        with self._sandbox.state.lock:
            return self._people.count_turned_back(self._sandbox.state.history)

    def _count_repeated(self):
        """Count the requests and rows since the last count that contained nothing new for a user."""
        state = self._sandbox.state
        with state.lock:
            uploads = {job.number for job in state.jobs.values()}
            repeated = Counter(
                "rows" if number in uploads else "requests" for number in nothing_new(state.history)
            )
        new, self._repeated = repeated - self._repeated, repeated
        return new

    def _wrongs(self):
        """Describe each mistake, once everything is accepted."""
        with engines.read(self._engine) as connection:

            def statuses(table):
                rows = dialects.sql(connection, f"SELECT DISTINCT status FROM {{our}}{table}")
                return set(rows.scalars())

            if unexpected := statuses("deliveries") - {"accepted", "cancelled"}:
                yield f"deliveries are {unexpected}"
            if unexpected := statuses("runs") - {"succeeded", "abandoned"}:
                yield f"runs are {unexpected}"
            if dialects.sql(connection, "SELECT 1 FROM {our}bulk_jobs WHERE settled_at IS NULL").first():
                yield "a bulk job is not settled"
        if refused := sum(entry.status == 429 for entry in self._sandbox.state.requests):
            yield f"{refused} requests were beyond the limit"
        if dialects.is_sqlite(self._engine):
            with closing(sqlite3.connect(self._engine.url.database)) as file:
                rows = file.execute("PRAGMA integrity_check").fetchall()
            if rows != [("ok",)]:
                yield f"integrity_check: {rows}"

    def close(self):
        self._people.close()
        self._engine.dispose()


@contextmanager
def opened(url, folder, company, forker, seed):
    with Sandbox(limits=company.limits()) as sandbox:
        scene = Scene(url, folder, company, forker, sandbox, seed)
        try:
            yield scene
        finally:
            scene.close()


def kill_all(kind, count, new_url, folder, forkers):
    """Carry out `count` kills, on as many scenes at a time as there are forkers; return their outcomes."""
    free = queue.SimpleQueue()
    for forker in forkers:
        free.put(forker)
    size = min(KILLS_OF_A_SCENE, -(-count // len(forkers)))

    def play(numbers, url):
        forker = free.get()
        try:
            with opened(url, folder, kind.company, forker, f"{SEED} {numbers[0]}") as scene:
                return [scene.kill(kind, number) for number in numbers]
        finally:
            free.put(forker)

    parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
    with ThreadPoolExecutor(len(forkers)) as pool:
        outcomes = list(pool.map(play, parts, [new_url() for _ in parts]))
    return list(itertools.chain(*outcomes))


BACKENDS = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
HEAD = (
    "| killed while | on | kills | lost | turned back | duplicated | seconds to recover | again with |",
    "| --- | --- | ---: | ---: | ---: | --- | --- | --- |",
)


def row(name, backend, outcomes):
    """A row of the table of kills in docs/explanation/promises.md."""

    def total(count):
        return f"{sum(getattr(each, count) for each in outcomes):,}"

    seconds = [each.seconds for each in outcomes]
    cells = [
        KINDS[name].label,
        BACKENDS[backend],
        f"{len(outcomes):,}",
        total("lost"),
        total("turned_back"),
        f"{total('repeated_requests')} requests, {total('repeated_rows')} rows",
        f"{statistics.median(seconds):.1f}, at most {max(seconds):.1f}",
        f"`pytest soak -k {backend}-{name}`",
    ]
    return f"| {' | '.join(cells)} |"
