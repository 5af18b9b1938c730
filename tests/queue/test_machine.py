"""Random changes, calls, faults and crashes, checked against the promises. Time is the test's; Userpilot is in memory.

The newest value has the newest time, then the latest arrival. Values are unique, so a history shows their origin.
"""

import datetime as dt
import os
import random
from collections import Counter

import hypothesis.strategies as st
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from audience_sync.db import engines
from audience_sync.db.tables import deliveries, destination, leases, requests
from audience_sync.queue import deliveries as life
from audience_sync.queue import destination as destinations
from audience_sync.queue.outcomes import SUPERSEDED
from audience_sync.queue.worker import DeliverySettings, Worker

USERS = st.sampled_from(["u1", "u2", "u3"])
FAULTS = st.sampled_from(["500", "401", "429", "drop before", "drop after"])
KILLED = "killed"


class Killed(BaseException):
    pass


class Machine(RuleBasedStateMachine):
    def __init__(self, queue, clock, server):
        super().__init__()
        self.queue, self.clock = queue, clock
        self.server = server
        self.order = {}  # value: its place in time
        self.was_faulty = False
        with engines.write(queue.engine) as connection:
            for table in (deliveries, requests, leases, destination):
                connection.execute(table.delete())

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed):
        self.seed = seed

    def _add(self, user, traits, seconds=0, **columns):
        at = self.clock.now() + dt.timedelta(seconds=seconds)
        number = len(self.order)
        poison = "poison" if columns.pop("poison", False) else ""
        body = dict.fromkeys(traits, f"{number} {poison}")
        delivery_id = self.queue.add(user, body, at=at, **columns)
        self.order[f"{number} {poison}"] = (at, delivery_id)

    @rule(user=USERS, key=st.sampled_from(["vip", "active"]), kind=st.sampled_from(["change", "push"]))
    def change(self, user, key, kind):
        self._add(user, [key], kind=kind)

    @rule(
        user=USERS,
        traits=st.sets(st.sampled_from(["plan", "city", "name"]), min_size=1),
        seconds=st.integers(-20, 0),
        poison=st.sampled_from([False, False, True]),
    )
    def call(self, user, traits, seconds, poison):
        self._add(user, sorted(traits), seconds, poison=poison)

    @rule(user=USERS)
    def track(self, user):
        self._add(user, ["event"], action="track")

    @rule(faults=st.lists(FAULTS, min_size=1, max_size=6))
    def break_down(self, faults):
        self.was_faulty = True
        self.server.faults += faults

    @rule(seconds=st.integers(1, 1000))
    def wait(self, seconds):
        self.clock.sleep(seconds)

    def _worker(self, on_progress=lambda _: None):
        pace = {"identify": 6, "track": 6, "company": 6}
        return Worker(
            self.queue.engine,
            self.server,
            DeliverySettings(pace, self.server.build, poll_seconds=60),
            self.clock,
            rng=random.Random(self.seed),
            on_progress=on_progress,
        )

    @rule()
    def deliver(self):
        self._worker().deliver()

    @rule()
    def allow(self):
        with engines.write(self.queue.engine) as connection:
            destinations.resume(connection)

    @rule(after=st.integers(1, 3))
    def crash(self, after):
        """Die between two cycles: claimed requests are not sent, and requests in flight are not settled."""
        self.was_faulty = True

        def die(report):
            if report.request_count >= after:
                raise Killed

        try:
            self._worker(die).deliver()
        except Killed:
            self.queue.free_lease()

    @rule(hand=st.booleans())
    def act(self, hand):
        """Retry all dead deliveries, or discard one of them."""
        with engines.write(self.queue.engine) as connection:
            if hand:
                life.retry(connection, None, self.clock.now())
            else:
                refused = connection.execute(
                    sa.select(deliveries.c.delivery_id).where(deliveries.c.status == "dead").limit(1)
                )
                life.discard(connection, list(refused.scalars()), self.clock.now())

    def teardown(self):
        self.server.faults.clear()
        self.allow()
        for _ in range(100):
            if self._worker().deliver().pending_count == 0:
                break
            self.clock.sleep(900)
        self._check_accounts()
        self._check_histories()

    def _check_accounts(self):
        """Check that each delivery is accepted, or dead or cancelled with a reason."""
        rows = self.queue.rows()
        assert len(rows) == len(self.order)
        accepted = [row for row in rows if row.status == "accepted"]
        for row in rows:
            assert row.status in ("accepted", "dead", "cancelled")
            assert row.status == "accepted" or row.error
            if row.error == SUPERSEDED:
                for trait in row.body:
                    assert any(
                        trait in other.body
                        and other.subject_id == row.subject_id
                        and (other.value_at, other.delivery_id) > (row.value_at, row.delivery_id)
                        for other in accepted
                    )
            if row.status == "dead":
                assert any(value.endswith("poison") for value in row.body.values())
        assert all(row.ended_at for row in self.queue.requests())

    def _check_histories(self):
        sent = {}
        for user, name, value in self.server.history:
            sent.setdefault((user, name), []).append(value)
        for (_, name), values in sent.items():
            places = [self.order[value] for value in values]
            if name == "event":
                assert list(dict.fromkeys(values)) == sorted(set(values), key=lambda v: self.order[v][1])
            else:
                assert places == sorted(places), "a value went back in time"
        newest = {}
        for row in self.queue.rows():
            if row.status == "accepted":
                for name, value in row.body.items():
                    key, place = (row.subject_id, name), (row.value_at, row.delivery_id)
                    newest[key] = max(newest.get(key, (place, value)), (place, value))
        assert {key: values[-1] for key, values in sent.items()} == {
            key: value for key, (_, value) in newest.items()
        }
        if not self.was_faulty:
            assert set(Counter(self.server.history).values()) <= {1}


def test_nothing_is_lost_repeated_or_goes_back_in_time(hand_queue, clock, make_userpilot):
    run_state_machine_as_test(
        lambda: Machine(hand_queue, clock, make_userpilot()),
        settings=settings(
            max_examples=int(os.environ.get("MACHINE_EXAMPLES", "10")),
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
