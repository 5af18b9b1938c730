"""A simulation of one seed: people, definitions, calls, syncs and workers, and the failures in the meantime.

Each seed takes some kinds of failure and leaves out the others; about one seed in eight has none. acts.py has what
happens meanwhile. When the storm is over, everything is synced and delivered; what must be true then, checker.py says.
"""

import itertools
import random
from collections import defaultdict
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from audience_sync import crash
from audience_sync.audiences import runs
from audience_sync.audiences.definition import Definition, Guard
from audience_sync.calls import records
from audience_sync.db import dialects, engines, leases
from audience_sync.errors import Busy, DatabaseError, LeaseLost
from audience_sync.queue import backlog, bulk, deliveries, destination, due, job_answers, jobs, split, walk
from audience_sync.queue.worker import DeliverySettings, Worker
from audience_sync.userpilot import payloads
from tests.conftest import SCHEMA
from tests.simulation.acts import DEATHS_OF_ALL, DEATHS_OF_WORKERS, DEFINITIONS, KINDS, MODES, Acts
from tests.simulation.machinery import (
    Failure,
    Killed,
    Line,
    MachineClock,
    Network,
    Process,
    Timeline,
    Wire,
    open_database,
)

SKEWS = [-300, -40, -3, 0, 3, 40, 300]  # seconds by which the clock of a machine is ahead of the database's
NO_GUARD = Guard(above=1_000_000_000, max_exit_ratio=1.0)
DEATHS_OF_SYNCS = ["run_started", "snapshot_computed", "changes_written", "run_committed"]


class Simulation(Acts):
    def __init__(self, seed, url):
        self.chance = random.Random(seed)
        self.mode_chance = random.Random(f"modes of {seed}")
        self.timeline = Timeline()
        self.log = []
        self.company = engines.open_own(url, SCHEMA)  # the company's own access, and the checker's
        self.engine = open_database(url, self._reach)
        self.processes = []  # those that live, the innermost is awake
        self.interruption_count = 0  # deaths, naps, and failures of the database
        self.forward_jumps = []
        self.excused = set()  # users of jobs that were forgotten before we knew of them
        self._nap_at = None
        self.messages = set()  # ids of the calls that were taken
        self._numbers = itertools.count(1)
        self._draw()

    def _draw(self):
        chance = self.chance
        calm = chance.random() < 0.12
        self.kinds = set() if calm else {kind for kind in KINDS if chance.random() < 0.4}
        keys = ["moved", *sorted(chance.sample(sorted(DEFINITIONS.keys() - {"moved"}), chance.randint(1, 3)))]
        self.definitions = [Definition(key, key, *DEFINITIONS[key], guard=NO_GUARD) for key in keys]
        modes = {mode for mode in MODES if self.mode_chance.random() < 0.3}
        self.kinds |= set() if calm else modes
        self.skews = self.mode_chance.sample(SKEWS, 3) if "skew" in self.kinds else [0]  # of the machines
        self.users = [f"u{number:03}" for number in range(chance.choice([5, 15, 40, 80]))]
        live, per_job = chance.choice([20, 60, 120]), chance.choice([0, 20, 50, 150])
        self.limits = {"identify": live, "track": live, "company": live}
        rows = chance.choice([1, 3, 10]) * live
        self.network = Network(
            self.timeline,
            chance,
            self.note,
            identify_per_minute=live,
            track_per_minute=live,
            bulk_rows_per_minute=rows,
            bulk_rows_per_request=chance.choice([10_000, 10_000, 15]),
            bare_jobs="jobs" in self.kinds and chance.random() < 0.3,
        )

        def build(action, subject_id, body):
            return payloads.build(action, subject_id, body, booleans="native", nested="flatten")

        self.settings = DeliverySettings(
            self.limits,
            build,
            tracks_at_most_once=chance.random() < 0.4,
            poll_seconds=chance.choice([5.0, 20.0, 60.0]),
            jobs=bulk.BulkSettings(
                row=lambda user_id, body: payloads.bulk_row(build("identify", user_id, body)[1]),
                rows_per_minute=3 * live,
                rows_per_job=per_job,
            ),
        )
        self.network.when_late = self.follow_up
        self.seconds = chance.choice([100, 300, 900])
        self._rows = {user: [chance.randint(0, 1), 0] for user in self.users}
        self._gone = set()
        self.truths = defaultdict(list)  # (user, key): each value that was ever true, in order

    def close(self):
        for engine in (self.engine, self.company):
            engine.dispose()

    def note(self, what):
        self.log.append(f"{self.timeline.seconds:9.2f} {what}")

    # The run.

    def run(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "now", lambda _: self.timeline.now())
            patch.setattr(dialects, "now", lambda _: self.timeline.now())
            patch.setattr(records, "now", lambda _: self.timeline.now())
            patch.setattr(leases, "_is_gone", self._is_gone)
            patch.setattr(engines, "BUSY_SECONDS", 0)  # a lease lasts as long on both databases
            patch.setattr(crash, "at", self._at)
            patch.setattr(split, "SMALLEST_JOB", 10)
            patch.setattr(bulk, "USERS_PER_TRANSACTION", 20)
            patch.setattr(job_answers, "MEASURED_ROWS", 15)
            patch.setattr(jobs, "SETTLED_PER_TRANSACTION", 15)
            if "hot" in self.kinds:  # one user's deliveries are more than these
                patch.setattr(due, "MAX_MERGED", 10)
                patch.setattr(due, "STEP_ROWS", 30)
                patch.setattr(due, "MAX_ROWS_READ", 60)
                patch.setattr(due, "FIRST_STEP_ROWS", 8)
                patch.setattr(walk, "PASS_ROWS", 20)
                patch.setattr(walk, "DENSE_ROWS", 3)
                patch.setattr(walk, "MAX_PASSED", 3)
            self._patch = patch
            self._settle_in()
            self._storm()
            self._calm()

    def _settle_in(self):
        self.note(f"kinds: {sorted(self.kinds)}, {len(self.users)} users, {self.limits['identify']} a minute")
        self.people = sa.table(
            "people",
            *map(sa.column, ("user_id", "is_in", "moved")),
            schema=None if dialects.is_sqlite(self.engine) else "public",
        )
        with engines.write(self.company) as connection:
            schema = "" if dialects.is_sqlite(self.engine) else "public."
            dialects.sql(
                connection, f"CREATE TABLE {schema}people (user_id text, is_in integer, moved integer)"
            )
        self._write_people(self.users)

    def _storm(self):
        acts = self._acts()
        for _ in range(self.chance.randint(8, 25)):
            self.timeline.after(self.chance.uniform(0, self.seconds), self.chance.choice(acts))
        if "hot" in self.kinds:
            self.timeline.after(self.mode_chance.uniform(0, self.seconds / 2), self.flood)
        self.sync()
        while self.timeline.seconds < self.seconds:
            if self._pending():
                self.deliver()
            self.timeline.sleep(self.chance.choice([0.1, 3.0, 60.0]))

    def _calm(self):
        """End all faults, let time pass, and sync and deliver everything."""
        self.note("calm")
        self.kinds, self._nap_at = set(), None
        self.network.calm_down()
        self.network.userpilot.state.job_faults.clear()
        self.timeline.sleep(5)
        for _ in range(2):
            self.sync()
            self._deliver_all()

    def _deliver_all(self):
        for _ in range(400):
            self.deliver()
            if not self._pending():
                return
            self.timeline.sleep(900)
        raise AssertionError("deliveries are still pending after four days without a fault")

    def _pending(self):
        with engines.read(self.company) as connection:
            return backlog.pending_count(connection)

    # Processes.

    @contextmanager
    def process(self, what):
        error = self.engine.dialect.loaded_dbapi.OperationalError
        clock = MachineClock(self.timeline, self.mode_chance.choice(self.skews))
        process = Process(f"{what}{next(self._numbers)}", clock, error, self.note)
        if clock.ahead:
            self.note(f"{process.name}: its clock is {clock.ahead:+} s off")
        outer = self.processes[-1] if self.processes else None
        if outer is not None:
            outer.is_asleep = True
            self.network.stray_until_settled()
        self.processes.append(process)
        self._patch.setattr(leases, "_PROCESS", process.name)
        try:
            yield process
        except Killed:
            self.network.stray_until_settled()
            if process.worker is not None:
                self.follow_up("", self.users[:: self.chance.choice([1, 3])])
        except DatabaseError:
            if not process.had_failure:
                raise
            self.note(f"{process.name} gives up")
        finally:
            self.interruption_count += process.had_failure
            process.is_dead = True
            self.processes.pop()
            if outer is not None:
                self._patch.setattr(leases, "_PROCESS", outer.name)
                outer.is_asleep = False
                for act in outer.frozen:
                    act()
                outer.frozen.clear()

    def _reach(self, point):
        self.processes[-1].reach(point)

    def _is_gone(self, row):
        return str(row.owner).partition("-")[0] not in {process.name for process in self.processes}

    def _at(self, point):
        """A named point; those about a request are Line's."""
        if point in DEATHS_OF_SYNCS or point in DEATHS_OF_WORKERS:
            self._reach(point)
        if point == self._nap_at:
            self._nap_at = None
            self._sleep_through(self.chance.choice([10, 100, 1000]))

    def sync(self, *, full=False, users=None):
        self.note(f"sync{' full' if full else ''}{f' {users}' if users else ''}")
        with self.process("sync") as process:
            process.failure = self._armed(DEATHS_OF_SYNCS, 60)
            for definition in self.definitions:
                moments = runs.resolve_as_of(self.engine, [definition], None, process.clock.now())
                order = self.run_options(definition, full=full, users=users)
                try:
                    runs.sync(self.engine, definition, moments[definition.key], process.clock, order)
                except (Busy, LeaseLost) as error:
                    self.note(str(error))

    def run_options(self, _definition, *, full, users):
        return runs.RunOptions(full=full, users=users)

    def prepare_delivery(self, connection, now):
        if any(self.skews):
            deliveries.bring_forward(connection, now, dialects.now(connection))
        if destination.stopped(connection):
            destination.resume(connection)

    def deliver(self):
        with self.process("worker") as process:
            process.failure = self._armed(DEATHS_OF_WORKERS, 300)
            with engines.write(self.engine) as connection:
                self.prepare_delivery(connection, process.clock.now())
            chance = random.Random(self.chance.random())
            process.worker = Worker(
                self.engine,
                Line(process, self.network),
                self.settings,
                process.clock,
                rng=chance,
                open_senders=lambda: Wire(process, self.timeline, self.chance, self.network),
            )
            report = process.worker.deliver()
            counts = (
                f"{report.accepted_count} accepted, {report.dead_count} dead, {report.pending_count} pending"
            )
            self.note(
                f"{process.name}: {counts}{', left' * report.is_handed_over}{', stopped' * bool(report.stopped)}"
            )

    def _armed(self, deaths, statements):
        kinds = [kind for kind in ("database", "deaths") if kind in self.kinds]
        if not kinds or self.chance.random() < 0.7:
            return None
        kills = self.chance.choice(kinds) == "deaths"
        point = self.chance.choice(DEATHS_OF_ALL + (deaths if kills else []))
        return Failure(point, self.chance.randint(1, statements if point == "statement" else 10), kills)
