"""The events of a simulation: people move, applications send calls, and anything may fail."""

import datetime as dt
from functools import partial
from types import SimpleNamespace

import sqlalchemy as sa

from audience_sync import intake
from audience_sync.audiences.definition import Kind
from audience_sync.calls import mappings, records, validation
from audience_sync.db import engines, tables
from audience_sync.sandbox.state import RefusedError
from tests.faulty_sandbox import JobFault
from tests.simulation.machinery import ODD, ROUGH, Failure

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
DEFINITIONS = {
    "moved": (Kind.TRAIT, "SELECT user_id, moved AS value FROM people"),
    "in": (Kind.AUDIENCE, "SELECT user_id FROM people WHERE is_in = 1"),
    "often_in": (Kind.AUDIENCE, "SELECT user_id FROM people WHERE is_in = 1 AND moved > 3"),
    "even": (Kind.AUDIENCE, "SELECT user_id FROM people WHERE moved % 2 = 0"),
}
DEATHS_OF_WORKERS = ["claimed", "settled", "lease_released", "request", "requested"]
DEATHS_OF_ALL = ["statement", "commit", "committed"]


class Acts:
    """The acts of a Simulation: each is a method, and the timeline calls it at some moment of the storm."""

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
        """Another client's job in an unknown state, which stays in the list after its end."""
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
        """Suspend the running process, now or at a point, perhaps long enough for another process to take over."""
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
