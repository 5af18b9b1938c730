"""Random definitions, changes, syncs, failures and crashes, compared with a model of the promises.

The model records each user's values after each commit, and what was sent to Userpilot, without tables or a queue.
"""

import itertools
import os
import random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from audience_sync import crash
from audience_sync.audiences import decisions, runs
from audience_sync.db import engines
from audience_sync.queue import destination
from audience_sync.queue.destination import Destination
from audience_sync.queue.worker import DeliverySettings, Worker

USERS = ["ann", "bob", "cy"]
FAULTS = st.sampled_from(["500", "400", "401", "429", "drop before", "drop after"])
POINTS = ["run_started", "snapshot_computed", "changes_written", "run_committed"]
NOBODY = 2**22 + 1  # no process has this number
PACE = {"identify": 60, "track": 60, "company": 60}


class Killed(BaseException):
    pass


class Machine(RuleBasedStateMachine):
    def __init__(self, world, userpilot, crash_at):
        super().__init__()
        self.world, self.userpilot, self.crash_at = world, userpilot, crash_at
        self.people, self.limits = {}, {"some": 1, "few": 3}
        self.committed = {}  # (user, key): each value that a commit gave it
        self.waiting = {}  # key: the held run, and what it would commit
        self.was_faulty = False
        for table in (
            "deliveries",
            "requests",
            "members",
            "past_members",
            "runs",
            "definitions",
            "leases",
            "destination",
        ):
            world.execute(f"DELETE FROM {{our}}{table}")

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed):
        self.seed = seed

    def definition(self, key):
        if key == "points":
            return self.world.trait(key=key)
        limit = self.limits[key]
        return self.world.audience(f"SELECT user_id FROM people WHERE value >= {limit}", key=key)

    def snapshot(self, key):
        """Each user's value, without users that have none."""
        if key == "points":
            return dict(self.people)
        return {user: True for user, value in self.people.items() if value >= self.limits[key]}

    def held(self, key):
        pairs = ((user, self.committed.get((user, key), [None])[-1]) for user in USERS)
        return {user: value for user, value in pairs if value not in (None, False)}

    @rule(people=st.dictionaries(st.sampled_from(USERS), st.integers(1, 4)))
    def change_people(self, people):
        self.people = people

    @rule(key=st.sampled_from(["some", "few"]), limit=st.integers(1, 4))
    def change_definition(self, key, limit):
        self.limits[key] = limit

    @rule(
        key=st.sampled_from(["some", "few", "points"]),
        full=st.sampled_from([False, False, False, True]),
        point=st.sampled_from([None, None, None, *POINTS]),
    )
    def sync(self, key, full, point):
        self.world.people(*self.people.items())
        definition, before, after = self.definition(key), self.held(key), self.snapshot(key)
        self.crash_at(point)
        try:
            run = self.world.sync(definition, full=full)
        except Killed:
            self.world.execute(f"UPDATE {{our}}leases SET pid = {NOBODY} WHERE owner IS NOT NULL")
            self.was_faulty = True
            if point != "run_committed":
                return
        else:
            entered, exited = after.keys() - before.keys(), before.keys() - after.keys()
            changed = {user for user in after.keys() & before.keys() if after[user] != before[user]}
            assert run.status == "succeeded"
            assert (run.member_count, run.entered_count, run.exited_count, run.changed_count) == tuple(
                map(len, (after, entered, exited, changed))
            )
        finally:
            self.crash_at(None)
        self.was_faulty |= full
        self.waiting.pop(key, None)  # a newer run replaces it
        self._commit(key, before | after, after)

    def _commit(self, key, users, after):
        gone = None if key == "points" else False
        for user in users:
            values = self.committed.setdefault((user, key), [])
            if values[-1:] != [after.get(user, gone)]:
                values.append(after.get(user, gone))

    @rule(key=st.sampled_from(["some", "few", "points"]), full=st.sampled_from([False, False, True]))
    def hold(self, key, full):
        self.world.people(*self.people.items())
        run = self.world.sync(self.definition(key), hold=True, full=full)
        assert (run.status, run.held_by) == ("held", "hold")
        self.waiting[key] = (run.run_id, self.snapshot(key), full)

    @rule(key=st.sampled_from(["some", "few", "points"]))
    def approve(self, key):
        if key in self.waiting:
            run_id, after, full = self.waiting.pop(key)
            decisions.approve(self.world.engine, run_id, self.world.clock, Destination())
            self.was_faulty |= full
            self._commit(key, self.held(key) | after, after)

    @rule(key=st.sampled_from(["some", "few", "points"]))
    def reject(self, key):
        if key in self.waiting:
            decisions.reject(self.world.engine, self.waiting.pop(key)[0], self.world.clock)

    @rule(key=st.sampled_from(["some", "few", "points"]), user=st.sampled_from(USERS))
    def try_on_one(self, key, user):
        self.world.people(*self.people.items())
        before, after = self.held(key), self.snapshot(key)
        run = self.world.sync(self.definition(key), users=(user,))
        assert (run.status, run.mode) == ("succeeded", "canary")
        size = len(before) + (user in after) - (user in before)
        assert (run.member_count, run.changed_count) == (
            size, int(user in before and user in after and before[user] != after[user]),
        )  # fmt: skip
        self.waiting.pop(key, None)
        if user in before or user in after:
            self._commit(key, [user], after)

    @rule(faults=st.lists(FAULTS, min_size=1, max_size=6))
    def break_down(self, faults):
        self.was_faulty = True
        self.userpilot.faults += faults

    @rule(seconds=st.integers(1, 1000))
    def wait(self, seconds):
        self.world.clock.sleep(seconds)

    def _worker(self, on_progress=lambda _: None):
        return Worker(
            self.world.engine,
            self.userpilot,
            DeliverySettings(PACE, self.userpilot.build, poll_seconds=60),
            self.world.clock,
            rng=random.Random(self.seed),
            on_progress=on_progress,
        )

    @rule(dies_after=st.sampled_from([None, None, 1, 2]))
    def deliver(self, dies_after):
        def die(report):
            if dies_after and report.request_count >= dies_after:
                raise Killed

        try:
            self._worker(die).deliver()
        except Killed:
            self.was_faulty = True
            self.world.execute(f"UPDATE {{our}}leases SET pid = {NOBODY} WHERE owner IS NOT NULL")

    @rule()
    def mend_the_key(self):
        with engines.write(self.world.engine) as connection:
            destination.resume(connection)

    def teardown(self):
        self.userpilot.faults.clear()
        self.mend_the_key()
        for key in ("some", "few", "points"):
            self.sync(key, full=False, point=None)
        for _ in range(100):
            if self._worker().deliver().pending_count == 0:
                break
            self.world.clock.sleep(900)
        statuses = {status for (status,) in self.world.query("SELECT status FROM {our}deliveries")}
        assert statuses <= {"accepted", "cancelled", "dead"}
        sent = {}
        for user, key, value in self.userpilot.history:
            sent.setdefault((user, key), []).append(value)
        for user, key in itertools.product(USERS, ("some", "few", "points")):
            self._check_values(sent.get((user, key), []), self.committed.get((user, key), []))

    def _check_values(self, sent, committed):
        """In the order of the commits, repeated only after failures, and in the end true."""
        if sent or committed[-1:] not in ([], [None], [False]):  # else: left before anything was sent
            assert sent[-1:] == committed[-1:]
        if not self.was_faulty:
            assert all(left != right for left, right in itertools.pairwise(sent))
        values = iter(committed)
        for value, _ in itertools.groupby(sent):
            assert any(value == each for each in values), "a value went back in time"


@pytest.fixture
def crash_at(monkeypatch):
    """Dies at a point as kill -9 does: what would be written afterwards is not."""
    chosen = [None]

    def at(name):
        if name == chosen[0]:
            raise Killed

    fail = runs._fail
    monkeypatch.setattr(crash, "at", at)
    monkeypatch.setattr(runs, "_fail", lambda *given: not isinstance(given[2], Killed) and fail(*given))
    return lambda name: chosen.__setitem__(0, name)


def test_every_value_arrives_and_none_goes_back(world, make_userpilot, crash_at):
    run_state_machine_as_test(
        lambda: Machine(world, make_userpilot(), crash_at),
        settings=settings(
            max_examples=int(os.environ.get("MACHINE_EXAMPLES", "10")),
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
