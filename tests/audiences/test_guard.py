"""The guard holds a run whose changes look like an accident."""

import pytest

from audience_sync.audiences import plan, runs
from audience_sync.audiences.definition import Guard
from audience_sync.queue.destination import Destination
from tests.audiences.conftest import FIVE, WARY, counts, held


@pytest.mark.parametrize(
    ("people", "why"),
    [
        (["ann", "bob"], "3 of 5 members would leave, and max_exit_ratio is 0.5"),
        ([], "the snapshot is empty, and max_exit_ratio is 0.5"),
        (
            [*FIVE, *(f"new{n}" for n in range(6))],
            "6 users would enter an audience of 5 members, and max_enter_ratio is 1",
        ),
        ([*FIVE, *(f"new{n}" for n in range(5))], None),
        (["ann", "bob", "cid"], None),
    ],
)
def test_the_guard_holds_a_run_that_exceeds_a_limit(known, people, why):
    known.people(*people)
    run = known.sync(known.audience(guard=WARY))
    if why is None:
        assert run.status == "succeeded"
        assert set(known.members()) == set(people)
        return
    assert (run.status, run.error) == ("held", f"The guard holds it: {why}.")
    assert held(known) == [(run.run_id, "guard", run.error)]
    assert set(known.members()) == set(FIVE)
    assert {status for _, _, status in known.deliveries(run.run_id)} == {"held"}


def test_the_guard_skips_small_definitions_and_first_runs(world):
    guard = Guard(above=3, max_exit_ratio=0.0, max_enter_ratio=0.0)
    world.people(*FIVE[:2])
    assert world.sync(world.audience(guard=Guard(above=0, max_enter_ratio=0.0))).status == "succeeded"
    world.people("cid")
    assert world.sync(world.audience(guard=guard)).status == "succeeded"


def test_the_guard_covers_traits(world):
    world.people(*((user, 1.0) for user in FIVE))
    world.sync(world.trait())
    world.people(("ann", 2.0))
    run = world.sync(world.trait(guard=WARY))
    assert (run.status, counts(run)) == ("held", (1, 0, 4, 1))
    assert world.members("spend") == dict.fromkeys(FIVE, "1")


TEN = [f"user{n}" for n in range(10)]


@pytest.mark.parametrize("lost", [[], [None, "  ", "x" * 256]])
@pytest.mark.parametrize("above", [11, 100, 1_000_000])
def test_a_result_without_a_usable_row_is_held_whatever_guard_above_is(world, above, lost):
    world.people(*TEN)
    world.sync(world.audience())
    world.people(*lost)
    run = world.sync(world.audience(guard=Guard(above=above)))
    why = "The guard holds it: the snapshot is empty, and max_exit_ratio is 0.5."
    assert (run.status, run.held_by, run.error) == ("held", "guard", why)
    assert set(world.members()) == set(TEN)
    assert world.sync(world.audience(guard=Guard(above=above, max_exit_ratio=1.0))).status == "succeeded"
    assert world.members() == {}


def test_a_small_definition_may_lose_everyone(world):
    world.people(*TEN[:9])
    world.sync(world.audience())
    world.people()
    assert world.sync(world.audience()).status == "succeeded"
    world.people(*TEN)
    world.sync(world.audience())
    world.people("another")
    assert world.sync(world.audience()).status == "succeeded"  # not empty, and fewer than guard_above


@pytest.mark.parametrize("changed", [9, 10])
def test_the_guard_covers_changed_values(world, changed):
    world.people(*((user, 1.0) for user in TEN))
    world.sync(world.trait(guard=Guard(above=10)))
    world.people(*((user, 2.0 if n < changed else 1.0) for n, user in enumerate(TEN)))
    definition = world.trait(guard=Guard(above=10))
    now = world.clock.now()
    planned = plan.plan(world.engine, [(definition, None)], {"spend": now}, now, Destination())
    run = world.sync(definition)
    if changed == 9:
        assert (planned.plans[0].held, run.status) == (None, "succeeded")
        return
    reason = "The guard holds it: 10 of 10 members would get another value, and max_change_ratio is 0.9."
    assert planned.plans[0].held == runs.Held("guard", reason)
    assert (run.status, run.held_by, run.error, counts(run)) == ("held", "guard", reason, (10, 0, 0, 10))
    assert set(world.members("spend").values()) == {"1"}
    assert world.sync(world.trait(guard=Guard(above=11))).status == "succeeded"


def test_changed_values_pass_where_the_definition_allows_them(world):
    guard = Guard(above=10, max_change_ratio=1.0)
    for value in (1.0, 2.0):
        world.people(*((user, value) for user in TEN))
        assert world.sync(world.trait(guard=guard)).status == "succeeded"
    assert set(world.members("spend").values()) == {"2"}
