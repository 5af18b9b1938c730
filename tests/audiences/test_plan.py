"""What a plan says: it is what the sync would do then."""

from audience_sync.audiences import plan as plans
from audience_sync.queue.destination import Destination


def plan(world, *definitions):
    now = world.clock.now()
    moments = {definition.key: now for definition in definitions}
    return plans.plan(world.engine, [(each, None) for each in definitions], moments, now, Destination())


def test_a_plan_tells_what_would_change_and_keeps_nothing(world):
    vips, spend = world.audience(), world.trait()
    world.people(("ann", 1.0), ("bob", 2.0))
    world.sync(vips)
    world.settle("accepted", "subject_id = 'ann'")
    world.people(("ann", 1.0), ("cid", 3.0), ("dan", None))
    before = world.query("SELECT count(*) FROM {our}runs")
    found, touched = plan(world, vips, spend)
    assert [(each.key, each.member_count, each.counts) for each in found] == [
        ("vips", 3, {"entered": 2, "exited": 1}),
        ("spend", 2, {"entered": 2}),
    ]
    assert found[0].samples == {"entered": ["cid", "dan"], "exited": ["bob"]}
    assert touched == (4, 1)  # bob, cid and dan change; ann is of the first run of spend alone
    assert world.query("SELECT count(*) FROM {our}runs") == before
    assert set(world.members()) == {"ann", "bob"}


def test_a_plan_counts_users_whose_changes_are_pending(world):
    world.people("ann", "bob")
    world.sync(world.audience())
    world.people("bob", "cid")
    found, touched = plan(world, world.audience())
    assert found[0].counts == {"entered": 1, "exited": 1}
    assert touched == (3, 1)
    assert plan(world) == ([], (2, 2))
