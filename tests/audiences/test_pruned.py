"""Undecided values while others are pruned, for example when a key is refused for longer than rows are kept."""

import datetime as dt
import random

import pytest

from audience_sync.audiences import decisions
from audience_sync.db import engines
from audience_sync.db.rows import moment
from audience_sync.queue import deliveries
from audience_sync.queue.destination import Destination
from audience_sync.queue.worker import DeliverySettings, Worker
from audience_sync.retention import pruning
from tests.conftest import FaultyUserpilot

DAY = 86_400.0
PACE = {"identify": 600_000, "track": 600_000, "company": 600_000}


@pytest.fixture
def userpilot():
    return FaultyUserpilot()


def deliver(world, userpilot):
    settings = DeliverySettings(PACE, FaultyUserpilot.build, poll_seconds=0.01)
    return Worker(world.engine, userpilot, settings, world.clock, rng=random.Random(1)).deliver()


def prune(world, *, past_members=DAY):
    """Prune everything that is older than a day, two days later."""
    world.clock.sleep(2 * DAY)
    keep = pruning.Retention(DAY, DAY, DAY, past_members)
    return pruning.prune(world.engine, keep, world.clock.now())


def discard(world, run):
    """Discard the deliveries of a run."""
    query = "SELECT delivery_id FROM {our}deliveries WHERE run_id = :run_id"
    ids = [delivery_id for (delivery_id,) in world.query(query, run_id=run.run_id)]
    with engines.write(world.engine) as connection:
        assert deliveries.discard(connection, ids, world.clock.now())


def values(userpilot):
    return [value for _, _, value in userpilot.history]


@pytest.mark.parametrize("past_members", [DAY, float("inf")])
@pytest.mark.parametrize("ending", ["exit", "full", "retire", "approve"])
def test_an_exit_is_sent_although_the_accepted_values_before_it_were_pruned(
    world, userpilot, past_members, ending
):
    world.people(("ann", 1.0))
    world.sync(world.trait())
    deliver(world, userpilot)
    world.people(("ann", 2.0))
    world.sync(world.trait())  # not delivered: the key is refused
    prune(world, past_members=past_members)
    world.people()
    if ending == "retire":
        decisions.retire(world.engine, "spend", world.clock, Destination())
    else:
        run = world.sync(world.trait(), full=ending == "full", hold=ending == "approve")
        if ending == "approve":
            decisions.approve(world.engine, run.run_id, world.clock, Destination())
    deliver(world, userpilot)
    assert values(userpilot) == [1, None]


def test_memberships_are_kept_while_a_value_is_undecided_and_pruned_afterwards(world, userpilot):
    for value in (1.0, 2.0):
        world.people(("ann", value))
        world.sync(world.trait())
    assert prune(world)["past_members"] == 0
    deliver(world, userpilot)
    assert prune(world)["past_members"] == 1


def test_a_user_who_left_before_anything_was_sent_is_never_seen_although_rows_were_pruned(world, userpilot):
    for people in (["ann", "bob"], ["bob"], ["ann", "bob"]):
        world.people(*people)
        world.sync(world.audience())
    prune(world)
    world.people("bob")
    world.sync(world.audience())
    deliver(world, userpilot)
    assert userpilot.history == [("bob", "vips", True)]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_exit_is_sent_after_the_value_that_only_a_full_run_sent_was_pruned(world, userpilot, elsewhere):
    world.people("ann")
    entry = world.sync(world.audience(), fingerprint="A")
    if not elsewhere:  # else the full run cancels the entry
        discard(world, entry)
    home = "B" if elsewhere else "A"
    world.sync(world.audience(), full=True, fingerprint=home)
    deliver(world, userpilot)
    assert values(userpilot) == [True]
    if elsewhere:
        world.people()
    world.sync(world.audience(), full=True, fingerprint="A")  # not delivered: something is undecided
    prune(world, past_members=float("inf"))
    world.people()
    world.sync(world.audience(), full=elsewhere, fingerprint=home)
    deliver(world, userpilot)
    assert values(userpilot) == [True, False]


@pytest.mark.parametrize("status", ["pending", "held", "dead"])
def test_an_old_value_does_not_follow_a_newer_one_that_was_pruned(world, userpilot, status):
    for people in (["ann"], [], ["ann"]):
        world.people(*people)
        world.sync(world.audience())
        deliver(world, userpilot)
    assert values(userpilot) == [True, False, True]
    # As after a merged request that was refused: the newest was sent alone and accepted.
    waits = "settled_at = NULL, " if status != "dead" else "error = 'refused', "
    world.execute(
        f"UPDATE {{our}}deliveries SET {waits}status = '{status}', alone = true, attempt_count = 1 WHERE run_id = 2"
    )
    prune(world)
    with engines.write(world.engine) as connection:
        deliveries.release_all(connection)
        deliveries.retry(connection, None, world.clock.now())
    deliver(world, userpilot)
    assert values(userpilot) == [True, False, True]


def test_a_full_run_sends_false_to_users_who_left_although_rows_were_pruned(world, userpilot):
    for people in (["ann", "bob"], ["bob"]):
        world.people(*people)
        world.sync(world.audience())
        deliver(world, userpilot)
    prune(world, past_members=float("inf"))
    world.sync(world.audience(), full=True)
    deliver(world, userpilot)
    assert userpilot.history[-2:] == [("ann", "vips", False), ("bob", "vips", True)]


def test_a_late_call_does_not_follow_a_newer_one_that_was_pruned(world, userpilot):
    def call(number, value, at):
        row = deliveries.CallDelivery("identify", "ann", f'{{"plan": "{value}"}}', number, at)
        with engines.write(world.engine) as connection:
            deliveries.enqueue_calls(connection, [row], None, world.clock.now())

    now = world.clock.now()
    call(1, "new", moment(now))
    deliver(world, userpilot)
    call(2, "old", moment(now - dt.timedelta(seconds=60)))
    assert prune(world)["deliveries"] == 0
    deliver(world, userpilot)
    assert values(userpilot) == ["new"]
