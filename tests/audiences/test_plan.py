"""A plan shows what the sync would do, and stores nothing."""

from audience_sync.audiences import plan
from audience_sync.audiences.records import ChangeCounts
from audience_sync.queue.destination import Destination


def planned(world, *definitions):
    now = world.clock.now()
    moments = {definition.key: now for definition in definitions}
    pairs = [(definition, None) for definition in definitions]
    return plan.plan(world.engine, pairs, moments, now, Destination())


def test_a_plan_says_what_would_change_and_stores_nothing(world):
    vips, spend = world.audience(), world.trait()
    world.people(("ann", 1.0), ("bob", 2.0))
    world.sync(vips)
    world.settle("accepted", "subject_id = 'ann'")
    world.people(("ann", 1.0), ("cid", 3.0), ("dan", None))
    before = world.query("SELECT count(*) FROM {our}runs")
    result = planned(world, vips, spend)
    assert [(each.key, each.member_count, each.counts) for each in result.plans] == [
        ("vips", 3, ChangeCounts(entered=2, exited=1)),
        ("spend", 2, ChangeCounts(entered=2)),
    ]
    assert result.plans[0].samples == {"entered": ["cid", "dan"], "exited": ["bob"]}
    # bob, cid and dan change; ann is only in the first run of spend
    assert result.affected == plan.Affected(user_count=4, push_count=1)
    assert world.query("SELECT count(*) FROM {our}runs") == before
    assert set(world.members()) == {"ann", "bob"}


def test_a_plan_counts_users_whose_changes_are_pending(world):
    world.people("ann", "bob")
    world.sync(world.audience())
    world.people("bob", "cid")
    result = planned(world, world.audience())
    assert result.plans[0].counts == ChangeCounts(entered=1, exited=1)
    assert result.affected == plan.Affected(user_count=3, push_count=1)
    assert planned(world) == plan.Plans([], plan.Affected(user_count=2, push_count=2))
