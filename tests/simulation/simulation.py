"""One seed, one run: people, definitions, calls, syncs and workers, and all that may go wrong meanwhile.

Each seed takes some kinds of failure and leaves out the others; about one seed in eight has none. When the
storm is over, everything is synced and delivered; what must be true then, checker.py says.
"""

import datetime as dt
import itertools
import random
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from audience_sync import crash, intake
from audience_sync.audiences import runs
from audience_sync.audiences.definition import Definition, Guard, Kind
from audience_sync.calls import mappings, records, validation
from audience_sync.db import dialects, engines, leases, tables
from audience_sync.errors import Busy, DatabaseError, LeaseLost
from audience_sync.queue import backlog, bulk, deliveries, destination, due, job_answers, jobs, split, walk
from audience_sync.queue.worker import DeliverySettings, Worker
from audience_sync.sandbox.state import RefusedError
from audience_sync.userpilot import payloads
from tests.conftest import SCHEMA
from tests.faulty_sandbox import JobFault
from tests.simulation.machinery import (
    ODD,
    ROUGH,
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

KINDS = [
    "network",
    "outages",
    "keys",
    "poison",
    "clock",
    "jobs",
    "database",
    "deaths",
    "naps",
    "stops",
    "odd",
]
# Drawn by a separate generator, so that the seeds without them keep their meaning.
MODES = ["hot", "skew"]
SKEWS = [-300, -40, -3, 0, 3, 40, 300]  # seconds by which the clock of a machine is ahead of the database's
NO_GUARD = Guard(above=1_000_000_000, max_exit_ratio=1.0)
DEFINITIONS = {
    "moved": (Kind.TRAIT, "SELECT user_id, moved AS value FROM people"),
    "in": (Kind.AUDIENCE, "SELECT user_id FROM people WHERE is_in = 1"),
    "often_in": (Kind.AUDIENCE, "SELECT user_id FROM people WHERE is_in = 1 AND moved > 3"),
    "even": (Kind.AUDIENCE, "SELECT user_id FROM people WHERE moved % 2 = 0"),
}
DEATHS_OF_SYNCS = ["run_started", "snapshot_computed", "changes_written", "run_committed"]
DEATHS_OF_WORKERS = ["claimed", "settled", "lease_released", "request", "requested"]
DEATHS_OF_ALL = ["statement", "commit", "committed"]


class Simulation:
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
                patch.setattr(due, "MOST_MERGED", 10)
                patch.setattr(due, "STEP_ROWS", 30)
                patch.setattr(due, "MOST_READ", 60)
                patch.setattr(due, "FIRST_STEP_ROWS", 8)
                patch.setattr(walk, "PASS_ROWS", 20)
                patch.setattr(walk, "DENSE", 3)
                patch.setattr(walk, "MOST_PASSED", 3)
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

    def _acts(self):
        often = [
            self.move,
            self.move,
            self.move_and_sync,
            self.move_and_sync,
            self.move_and_sync,
            self.call,
            self.call,
        ]
        of_kind = {
            "network": [self.turn_rough] * 3,
            "outages": [self.break_down],
            "keys": [self.refuse_the_key],
            "poison": [self.poison, self.call_poison],
            "clock": [self.jump],
            "jobs": [
                self.break_job,
                self.break_job,
                self.start_other_job,
                self.forget_jobs,
                self.delay_uploads,
            ],
            "database": [self.fail_database] * 2,
            "deaths": [self.kill] * 3,
            "naps": [self.nap, self.nap, self.deliver_beside],
            "stops": [self.stop],
            "odd": [self.turn_odd, self.turn_odd, self.forbid, self.call_sick, self.leave_odd_job],
            "hot": [self.flood],
            "skew": [],  # each process has the clock of one of the machines
        }
        return often + [act for kind in [*KINDS, *MODES] if kind in self.kinds for act in of_kind[kind]]

    def _calm(self):
        """Faults are over, time passes, and everything is synced and delivered."""
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
                chance=chance,
                open_senders=lambda: Wire(process, self.timeline, self.chance, self.network),
            )
            report = process.worker.deliver()
            counts = (
                f"{report.accepted_count} accepted, {report.dead_count} dead, {report.pending_count} pending"
            )
            self.note(
                f"{process.name}: {counts}{', left' * report.is_left}{', stopped' * bool(report.stopped)}"
            )

    def _armed(self, deaths, statements):
        kinds = [kind for kind in ("database", "deaths") if kind in self.kinds]
        if not kinds or self.chance.random() < 0.7:
            return None
        kills = self.chance.choice(kinds) == "deaths"
        point = self.chance.choice(DEATHS_OF_ALL + (deaths if kills else []))
        return Failure(point, self.chance.randint(1, statements if point == "statement" else 10), kills)

    # What happens meanwhile.

    def move(self, users=()):
        count = self.chance.choice([1, 3, 10, len(self.users) // 2])
        users = users or sorted(self.chance.sample(self.users, min(count, len(self.users))))
        for user in users:
            row = self._rows[user]
            self._rows[user] = [1 - row[0], row[1] + 1]
            (self._gone.add if self.chance.random() < 0.15 else self._gone.discard)(user)
        self.note(f"move {users}")
        self._write_people(users)

    def _write_people(self, users):
        rows = [
            {"user_id": user, "is_in": self._rows[user][0], "moved": self._rows[user][1]}
            for user in users
            if user not in self._gone
        ]
        with engines.write(self.company) as connection:
            connection.execute(self.people.delete().where(self.people.c.user_id.in_(users)))
            if rows:
                connection.execute(self.people.insert(), rows)
        for user in users:
            for key, value in self.now(user).items():
                self.truths[user, key].append(value)

    def now(self, user):
        """What is true of the user."""
        is_in, moved = self._rows[user]
        is_there = user not in self._gone
        return {
            "moved": moved if is_there else None,
            "in": is_there and is_in == 1,
            "often_in": is_there and is_in == 1 and moved > 3,
            "even": is_there and moved % 2 == 0,
        }

    def move_and_sync(self, users=()):
        self.move(users)
        users = tuple(self.chance.sample(self.users, 3)) if self.chance.random() < 0.15 else None
        self.sync(full=users is None and self.chance.random() < 0.15, users=users)

    def follow_up(self, path, users):
        """Move these users, or make more calls of theirs, soon after the outcome of a request became unknown."""
        if self.kinds:
            is_track = path.endswith("track")
            act = partial(self.call, users=users) if is_track else partial(self.move_and_sync, users)
            self.timeline.after(self.chance.uniform(0, 1), act)

    def call(self, poison="", users=(), count=0):
        """Some calls of an application, the times of some in the past."""
        raws = []
        for _ in range(count or self.chance.choice([1, 3, 20])):
            number, user = next(self._numbers), self.chance.choice(users or self.users)
            at = (self.timeline.now() - dt.timedelta(seconds=self.chance.choice([0, 0, 20]))).isoformat()
            raw = {"userId": user, "messageId": f"m{number}", "timestamp": at}
            if self.chance.random() < 0.4:
                raw |= {"type": "track", "event": f"e{number}"}
            else:
                names = self.chance.sample(["plan", "city"], self.chance.randint(1, 2))
                raw |= {"type": "identify", "traits": dict.fromkeys(names, f"{number}{poison}")}
            raws.append(raw)
        self.note(f"calls {[raw['messageId'] for raw in raws]}")
        while not self._submit(raws):
            pass

    def _submit(self, raws):
        """Until all are taken: a repeat has the same message id."""
        with self.process("application") as process:
            process.failure = self._armed([], 40)
            own = SimpleNamespace(fingerprint=self.settings.fingerprint)
            app = SimpleNamespace(clock=process.clock, destination=own)
            together = 1 + len(raws) // 30
            for first in range(0, len(raws), together):
                some, prepared = raws[first : first + together], []
                for raw in some:
                    call = validation.parse_call(raw, received_at=process.clock.now(), new_id=str)
                    decision = mappings.decide(call, mappings.PRESETS, reserved_keys=set(DEFINITIONS))
                    prepared.append(records.prepare_call(call, decision))
                with engines.write(self.engine) as connection:
                    intake.save_within(connection, app, prepared)
                self.messages.update(raw["messageId"] for raw in some)
            return True
        return False

    def flood(self):
        """Calls of one user, more than a search of the queue reads, then some of all users."""
        self.call(users=self.users[:1], count=self.mode_chance.choice([100, 200]))
        self.call()

    def call_poison(self):
        self.call(" poison")

    def poison(self):
        self.network.poisoned = set(self.chance.sample(self.users, self.chance.choice([0, 1, 3])))
        self.note(f"poisoned: {sorted(self.network.poisoned)}")

    def call_sick(self):
        """Calls whose values Userpilot answers with 500, merged with changes of the same users."""
        users = self.chance.sample(self.users, self.chance.choice([1, 3]))
        self.call(" sick", users)
        self.move_and_sync(users)

    def forbid(self):
        self.network.forbidden = set(self.chance.sample(self.users, self.chance.choice([0, 1, 3])))
        self.note(f"forbidden: {sorted(self.network.forbidden)}")

    def turn_odd(self):
        """Gateways that answer in place of Userpilot, or odd forms of its own answers."""
        self._weather(self.chance.sample(ODD, 5), self.chance.choice([0.1, 0.5, 1.0]), [20, 60, 300])

    def leave_odd_job(self):
        """Another client's job in an unknown state, which stays in the list when it is over."""
        try:
            other = self.network.userpilot.state.start_other_job(self.chance.choice([10, 200]))
        except RefusedError:
            return
        state = self.network.userpilot.state
        other.fault = JobFault(outcome="hangs", state=self.chance.choice(["cancelled", "paused"]))
        self.timeline.after(self.chance.choice([5, 100]), partial(setattr, state, "_running", None))
        self.note("somebody else's job, cancelled")

    def turn_rough(self):
        weather = self.chance.sample(ROUGH, 4) + self.chance.choice([[], ["late"] * 4])
        self._weather(weather, self.chance.choice([0.1, 0.5]), [20, 60, 300])

    def break_down(self):
        self._weather([self.chance.choice(["drop before", "503", "closed"])], 1.0, [5, 60, 600])

    def refuse_the_key(self):
        self._weather([self.chance.choice(["401", "403"])], 1.0, [1, 60])

    def _weather(self, weather, roughness, seconds):
        self.network.weather, self.network.roughness = weather, roughness
        self.note(f"weather: {weather} {roughness}")
        self.timeline.after(self.chance.uniform(0, 5), self.chance.choice([self.call, self.move_and_sync]))
        self.timeline.after(self.chance.choice(seconds), self._clear_up)

    def _clear_up(self):
        self.network.weather = []

    def jump(self):
        """Set the wall clock, but not during a grace, which a jump ahead would end."""
        if self.timeline.seconds < self.network.settled_at:
            self.timeline.after(3, self.jump)
            return
        seconds = self.chance.choice([-7200, -300, -5, 5, 50, 3600, 20000])
        self.note(f"the clock jumps by {seconds}")
        self.timeline.ahead += seconds
        if seconds > 0:
            self.forward_jumps.append(self.timeline.seconds)

    def break_job(self):
        """Make the next job fail. Without counts of rows, a job that fell short cannot be noticed."""
        state = self.network.userpilot.state
        outcomes = ["failed", "hangs"] if state.limits.bare_jobs else ["failed", "hangs", "short"]
        outcome = self.chance.choice(outcomes)
        rows = self.chance.randint(0, 20)
        shown = self.chance.choice([None, "validating"])
        state.job_faults.append(JobFault(outcome, after_rows=rows, state=shown))

    def delay_uploads(self):
        self.network.late_uploads = self.chance.choice([1, 3])

    def start_other_job(self):
        try:
            self.network.userpilot.state.start_other_job(self.chance.choice([10, 200]))
        except RefusedError:
            return
        self.note("somebody else's job")

    def forget_jobs(self):
        """Make Userpilot forget its jobs; one that runs on still writes its values.

        If its upload was not answered, nobody can know of it, which is excused.
        """
        state = self.network.userpilot.state
        running = state._running
        with engines.read(self.company) as connection:
            known = set(connection.execute(sa.select(tables.bulk_jobs.c.job_id)).scalars())
        if running is not None and running.job_id not in known:
            self.excused |= {row["user_id"] for row in running.rows}
        self.note("jobs are forgotten")
        state.forget_jobs()

    def fail_database(self):
        self._arm(Failure(self.chance.choice(DEATHS_OF_ALL), self.chance.randint(1, 30), kills=False))

    def kill(self):
        point = self.chance.choice(DEATHS_OF_ALL + DEATHS_OF_WORKERS)
        self._arm(Failure(point, self.chance.randint(1, 30 if point == "statement" else 8), kills=True))

    def _arm(self, failure):
        if self.processes:
            self.processes[-1].failure = failure

    def nap(self):
        """Whatever runs stands still, now or at a point, long enough for another to take its place or not."""
        self._nap_at = self.chance.choice([None, "claimed", "claimed", "settled", "snapshot_computed"])
        if self._nap_at is None:
            self._sleep_through(self.chance.choice([2, 30, 100]))

    def deliver_beside(self):
        self._sleep_through(0)

    def _sleep_through(self, seconds):
        if len(self.processes) != 1:
            return
        self.note(f"{self.processes[-1].name} sleeps for {seconds} s")
        self.interruption_count += 1
        end = self.timeline.seconds + seconds
        with self.process("nobody"):
            self.timeline.sleep(min(seconds, 65))
        while True:
            self.chance.choice([self.deliver, self.deliver, self.move_and_sync])()
            if self.timeline.seconds >= end:
                break
            with self.process("nobody"):
                self.timeline.sleep(10)

    def stop(self):
        worker = self.processes[-1].worker if self.processes else None
        if worker is not None:
            self.note(f"{self.processes[-1].name} is asked to stop")
            worker.stop.set()
