"""Two destinations: deliveries held for one of them, and decisions meanwhile. In the end each has its newest values."""

import datetime as dt
import random
from dataclasses import dataclass, field

import pytest

from audience_sync.audiences import decisions, foreign
from audience_sync.calls import mappings, records, validation
from audience_sync.db import engines
from audience_sync.queue import deliveries
from audience_sync.queue.destination import Destination
from audience_sync.queue.worker import DeliverySettings, Worker
from tests.conftest import FaultyUserpilot

PACE = {"identify": 600_000, "track": 600_000, "company": 600_000}


@dataclass
class Two:
    """A world with a Userpilot for each fingerprint."""

    world: object
    userpilots: dict = field(default_factory=dict)
    _numbers: object = field(default_factory=lambda: iter(range(1, 100)))

    def at(self, fingerprint):
        return self.userpilots.setdefault(fingerprint, FaultyUserpilot())

    def deliver(self, fingerprint):
        with engines.write(self.world.engine) as connection:
            foreign.hold_foreign(connection, Destination(fingerprint), self.world.clock.now())
        settings = DeliverySettings(PACE, FaultyUserpilot.build, fingerprint=fingerprint, poll_seconds=0.01)
        worker = Worker(
            self.world.engine, self.at(fingerprint), settings, self.world.clock, rng=random.Random(1)
        )
        assert worker.deliver().stopped is None

    def accept(self, fingerprint):
        with engines.write(self.world.engine) as connection:
            foreign.accept_destination(connection, Destination(fingerprint))

    def approve(self, run, fingerprint):
        decisions.approve(self.world.engine, run.run_id, self.world.clock, Destination(fingerprint))

    def retire(self, key, fingerprint):
        return decisions.retire(self.world.engine, key, self.world.clock, Destination(fingerprint))

    def identify(self, fingerprint, plan, *, seconds_ago=0):
        moment = self.world.clock.now()
        raw = {
            "type": "identify",
            "userId": "ann",
            "messageId": f"m{next(self._numbers)}",
            "timestamp": (moment - dt.timedelta(seconds=seconds_ago)).isoformat(),
            "traits": {"plan": plan},
        }
        call = validation.parse_call(raw, received_at=moment, new_id=str)
        prepared = records.prepare_call(call, mappings.decide(call, mappings.PRESETS, reserved_keys=set()))
        with engines.write(self.world.engine) as connection:
            records.save_calls(connection, [prepared], received_at=moment, fingerprint=fingerprint)

    def values(self, fingerprint, name="vips"):
        """The values that Ann had at a destination, in their order."""
        history = self.at(fingerprint).history
        return [value for user, trait, value in history if (user, trait) == ("ann", name)]

    def statuses(self):
        return self.world.query(
            "SELECT run_id, status FROM {our}deliveries WHERE subject_id = 'ann' ORDER BY delivery_id"
        )


@pytest.fixture
def two(world):
    return Two(world)


def sync(two, fingerprint, *people, **options):
    two.world.people(*people)
    return two.world.sync(two.world.audience(), fingerprint=fingerprint, **options)


def hold(two):
    """Ann's entry is pending for A, and held while B is configured."""
    sync(two, "A", "ann", "bob")
    two.deliver("B")
    assert two.statuses() == [(1, "held")]


@pytest.mark.parametrize("full", [False, True])
def test_an_entry_that_is_held_is_cancelled_with_the_exit(two, full):
    hold(two)
    sync(two, "A", "bob", full=full)
    two.deliver("A")
    assert (two.values("A"), two.values("B")) == ([], [])
    assert {status for _, status in two.statuses()} == {"cancelled"}


@pytest.mark.parametrize("full", [False, True])
def test_a_held_entry_after_one_that_was_cancelled_does_not_outlive_the_exit(two, full):
    sync(two, "A", "ann", "bob")
    sync(two, "A", "bob")  # nothing was sent: both are cancelled
    sync(two, "A", "ann", "bob")
    two.deliver("B")
    sync(two, "A", "bob", full=full)
    two.deliver("A")
    two.deliver("A")
    assert two.values("A") == []


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("delivered", [False, True])
def test_a_held_exit_and_a_newer_entry_end_as_the_entry(two, full, delivered):
    sync(two, "A", "ann", "bob")
    two.deliver("A")
    sync(two, "A", "bob")
    two.deliver("B")
    sync(two, "A", "ann", "bob", full=full)
    if delivered:  # by a worker that was started before the other destination was configured
        settings = DeliverySettings(PACE, FaultyUserpilot.build, fingerprint="A", poll_seconds=0.01)
        Worker(two.world.engine, two.at("A"), settings, two.world.clock, rng=random.Random(1)).deliver()
    two.deliver("A")
    assert two.values("A")[-1] is True
    assert two.values("A") == [True, True]


def test_a_run_held_for_another_destination_is_sent_where_it_is_approved(two):
    sync(two, "A", "ann", "bob")
    two.deliver("A")
    run = sync(two, "B", "bob")
    assert (run.status, run.held_by) == ("held", "fingerprint")
    two.approve(run, "A")
    two.deliver("A")
    assert (two.values("A"), two.values("B")) == ([True, False], [])


def test_a_full_run_held_for_another_destination_is_sent_where_it_is_approved(two):
    sync(two, "A", "ann", "bob")
    two.deliver("A")
    run = sync(two, "B", "bob", full=True, hold=True)
    two.approve(run, "A")
    two.deliver("B")
    two.deliver("A")
    assert (two.values("A"), two.values("B")) == ([True, False], [])


def test_an_approved_run_comes_after_what_is_held_of_its_definition(two):
    sync(two, "A", "ann", "bob")
    two.deliver("A")
    sync(two, "A", "bob")
    run = sync(two, "A", "ann", "bob", hold=True)
    two.deliver("B")  # the exit is held for A, the entry by its run
    two.approve(run, "A")
    two.deliver("A")
    assert two.values("A") == [True, True]


def test_an_accepted_destination_gets_what_was_held_in_its_order(two):
    hold(two)
    two.accept("B")
    assert two.statuses() == [(1, "pending")]
    sync(two, "B", "bob")
    assert two.statuses() == [(1, "cancelled"), (2, "cancelled")]
    sync(two, "B", "ann", "bob")
    two.deliver("B")
    assert (two.values("A"), two.values("B")) == ([], [True])


def test_retiring_a_key_reaches_what_is_held_for_its_destination(two):
    hold(two)
    two.retire("vips", "B")
    two.deliver("B")
    two.deliver("A")
    assert (two.values("A"), two.values("B")) == ([], [])


def test_retiring_a_key_follows_what_is_held(two):
    sync(two, "A", "ann", "bob")
    two.deliver("A")
    sync(two, "A", "bob")
    sync(two, "A", "ann", "bob")
    two.deliver("B")
    two.retire("vips", "B")
    two.accept("B")  # a new key of the same environment
    two.userpilots["B"] = two.at("A")
    two.deliver("B")
    assert two.values("B") == [True, False]


def test_a_user_who_left_while_another_destination_was_used_gets_false_on_the_return(two):
    sync(two, "A", "ann", "bob")
    two.deliver("A")
    two.world.execute("DELETE FROM {our}deliveries")  # pruned
    sync(two, "B", "ann", "bob", full=True)
    sync(two, "B", "bob")  # before anything was sent to B
    two.deliver("B")
    sync(two, "A", "bob", full=True)
    two.deliver("A")
    assert two.values("A") == [True, False]


def test_a_run_that_is_rejected_changes_nothing_about_what_is_held(two):
    hold(two)
    run = sync(two, "B", "bob")
    decisions.reject(two.world.engine, run.run_id, two.world.clock)
    two.deliver("A")
    assert two.values("A") == [True]
    sync(two, "A", "bob")
    two.deliver("A")
    assert two.values("A") == [True, False]


def test_a_call_that_was_held_reaches_its_destination_although_another_one_got_a_newer_value(two):
    sync(two, "A", "bob")
    two.deliver("A")
    two.identify("A", "old")
    two.deliver("B")
    two.identify("B", "new")
    two.deliver("B")
    two.deliver("A")
    assert (two.values("A", "plan"), two.values("B", "plan")) == (["old"], ["new"])


def test_a_late_call_does_not_follow_a_newer_one_that_an_earlier_key_of_the_environment_sent(two):
    two.identify("A", "new")
    two.deliver("A")
    two.identify("A", "older", seconds_ago=60)
    two.accept("B")
    two.userpilots["B"] = two.at("A")
    two.deliver("B")
    two.identify("B", "oldest", seconds_ago=90)
    two.deliver("B")
    assert two.values("B", "plan") == ["new"]


def test_a_refused_call_is_retried_although_another_destination_got_a_newer_value(two):
    two.identify("A", "old poison")
    two.deliver("A")
    two.identify("B", "new")
    two.deliver("B")
    two.world.execute("UPDATE {our}deliveries SET body = '{\"plan\": \"old\"}' WHERE status = 'dead'")
    with engines.write(two.world.engine) as connection:
        assert deliveries.retry(connection, None, two.world.clock.now()).count == 1
    two.deliver("A")
    assert (two.values("A", "plan"), two.values("B", "plan")) == (["old"], ["new"])
