"""Held runs, decisions about them, and the users who are left out of a run."""

import datetime as dt
from types import SimpleNamespace

import pytest

from audience_sync import history
from audience_sync.audiences import decisions, plan, records, runs
from audience_sync.audiences.definition import Guard
from audience_sync.db import engines
from audience_sync.errors import ConfigError, NotApproved, SourceError
from audience_sync.queue.destination import Destination
from audience_sync.retention import erasure
from tests.audiences.conftest import FIVE, WARY, counts, held


def test_approve_commits_exactly_what_was_held(known):
    known.people("ann", "zoe")
    run = known.sync(known.audience(guard=WARY))
    known.people(*FIVE, "later")
    decisions.approve(known.engine, run.run_id, known.clock, Destination())
    assert set(known.members()) == {"ann", "zoe"}
    assert [(user, body, status) for user, body, status in known.deliveries(run.run_id)] == [
        *((user, '{"vips": false}', "pending") for user in FIVE[1:]),
        ("zoe", '{"vips": true}', "pending"),
    ]
    assert counts(known.run(run.run_id)) == (2, 1, 4, 0)
    past = known.query("SELECT user_id, exited_run_id FROM {our}past_members ORDER BY user_id")
    assert past == [(user, run.run_id) for user in FIVE[1:]]
    with pytest.raises(ConfigError, match=f"Run {run.run_id} is not held: its status is succeeded"):
        decisions.approve(known.engine, run.run_id, known.clock, Destination())


def test_a_held_trait_is_committed_with_its_values(world):
    sql = (
        "SELECT user_id, CASE value WHEN 1 THEN 'it''s \"so\"' WHEN 2 THEN 'null' WHEN 3 THEN '2.50' END AS value "
        "FROM people"
    )
    world.people(("ann", 3), ("bob", 3), ("cid", 3))
    world.sync(world.trait(sql))
    world.people(("ann", 1), ("bob", 2), ("dan", 1))
    run = world.sync(world.trait(sql), hold=True)
    assert (run.status, counts(run)) == ("held", (3, 1, 1, 2))
    assert set(world.members("spend").values()) == {'"2.50"'}
    decisions.approve(world.engine, run.run_id, world.clock, Destination())
    assert world.members("spend") == {"ann": '"it\'s \\"so\\""', "bob": '"null"', "dan": '"it\'s \\"so\\""'}
    assert counts(world.run(run.run_id)) == (3, 1, 1, 2)
    assert world.sync(world.trait(sql)).changed_count == 0


def test_an_approved_full_run_sends_to_everyone(known):
    known.people(*FIVE[:4])
    known.sync(known.audience())
    known.settle("accepted")
    known.people("ann", "zoe")
    run = known.sync(known.audience(), full=True, hold=True)
    held_deliveries = known.deliveries(run.run_id)
    assert {status for _, _, status in held_deliveries} == {"held"}
    decisions.approve(known.engine, run.run_id, known.clock, Destination())
    assert [(user, body) for user, body, _ in held_deliveries] == [
        ("ann", '{"vips": true}'),
        *((user, '{"vips": false}') for user in FIVE[1:]),
        ("zoe", '{"vips": true}'),
    ]
    assert set(known.members()) == {"ann", "zoe"}
    assert counts(known.run(run.run_id)) == (2, 1, 3, 0)


def test_reject_drops_the_changes(known):
    known.people()
    run = known.sync(known.audience(guard=WARY))
    decisions.reject(known.engine, run.run_id, known.clock)
    assert known.run(run.run_id).status == "rejected"
    assert {status for _, _, status in known.deliveries(run.run_id)} == {"cancelled"}
    assert set(known.members()) == set(FIVE)
    known.people(*FIVE, "zoe")
    assert counts(known.sync(known.audience(guard=WARY))) == (6, 1, 0, 0)
    with pytest.raises(ConfigError, match="There is no run 99"):
        decisions.reject(known.engine, 99, known.clock)


def test_a_run_is_not_approved_after_the_members_have_changed(known, monkeypatch):
    known.people()
    run = known.sync(known.audience(), hold=True)
    # As if it had been held while the other ran.
    monkeypatch.setattr(runs, "replace_held_run", lambda *_: None)
    known.people(*FIVE, "zoe")
    known.sync(known.audience())
    with pytest.raises(
        NotApproved, match="have changed since run 2 was computed: run `audience-sync sync vips --hold`"
    ):
        decisions.approve(known.engine, run.run_id, known.clock, Destination())
    assert set(known.members()) == {*FIVE, "zoe"}


def test_an_entry_that_was_never_sent_is_cancelled_with_its_approved_exit(world):
    world.people("ann", "bob")
    world.sync(world.audience())
    world.settle("accepted", "subject_id = 'bob'")
    world.people()
    run = world.sync(world.audience(), hold=True)
    decisions.approve(world.engine, run.run_id, world.clock, Destination())
    assert world.query("SELECT subject_id, run_id, status FROM {our}deliveries ORDER BY delivery_id") == [
        ("ann", 1, "cancelled"), ("bob", 1, "accepted"), ("ann", 2, "cancelled"), ("bob", 2, "pending"),
    ]  # fmt: skip


def test_a_pending_exit_is_sent_although_the_accepted_entry_before_it_was_pruned(world):
    world.people("ann")
    world.sync(world.audience())
    world.execute("DELETE FROM {our}deliveries")  # sent, accepted, and pruned
    world.people()
    world.sync(world.audience())
    world.people("ann")
    world.sync(world.audience())
    world.people()
    world.sync(world.audience())
    assert [status for _, _, status in world.deliveries(2) + world.deliveries(3) + world.deliveries(4)] == [
        "pending"
    ] * 3


def test_a_dead_delivery_is_retried_although_a_later_run_was_rejected(known):
    known.execute("UPDATE {our}deliveries SET status = 'dead', error = 'no' WHERE subject_id = 'ann'")
    known.people()
    run = known.sync(known.audience(guard=WARY))
    decisions.reject(known.engine, run.run_id, known.clock)
    known.people(*FIVE)
    known.sync(known.audience(guard=WARY))
    assert ("ann", '{"vips": true}', "pending") in known.deliveries(1)


def test_a_canary_changes_only_its_users(world):
    world.people(*FIVE)
    run = world.sync(world.audience(), users=("bob", "eve", "nobody"))
    assert (run.mode, run.status, counts(run)) == ("canary", "succeeded", (2, 2, 0, 0))
    assert world.members().keys() == {"bob", "eve"}
    planned = plan.plan(
        world.engine,
        [(world.audience(), None)],
        {"vips": world.clock.now()},
        world.clock.now(),
        Destination(),
    )
    assert (planned.plans[0].member_count, planned.plans[0].counts) == (5, records.ChangeCounts(entered=3))
    assert planned.affected == plan.Affected(user_count=5, push_count=3)
    first = world.sync(world.audience(guard=Guard(above=1, max_enter_ratio=0.1)))
    assert (first.mode, first.status, counts(first)) == ("first", "succeeded", (5, 3, 0, 0))
    assert [user for user, _, _ in world.deliveries(first.run_id)] == ["ann", "cid", "dan"]
    classes = world.query("SELECT DISTINCT run_id, class FROM {our}deliveries ORDER BY run_id")
    assert classes == [(run.run_id, "change"), (first.run_id, "push")]


def test_a_full_canary_sends_its_users_values_again(known):
    known.people(*FIVE[1:])
    known.sync(known.audience())
    known.people("cid")
    run = known.sync(known.audience(), users=("ann", "bob", "cid", "zoe"), full=True)
    assert (run.mode, counts(run)) == ("canary", (3, 0, 1, 0))
    assert [(user, body) for user, body, _ in known.deliveries(run.run_id)] == [
        ("ann", '{"vips": false}'), ("bob", '{"vips": false}'), ("cid", '{"vips": true}'),
    ]  # fmt: skip
    assert set(known.members()) == {"cid", "dan", "eve"}


def test_retire_sends_false_to_everyone_who_has_the_key_and_reserves_it(known):
    known.people(*FIVE[1:])
    known.sync(known.audience())
    known.people(*FIVE[2:])
    known.sync(known.audience(), hold=True)
    run = known.run(decisions.retire(known.engine, "vips", known.clock, Destination()))
    assert (run.mode, run.status, counts(run)) == ("retire", "succeeded", (0, 0, 4, 0))
    assert [(user, body, status) for user, body, status in known.deliveries(run.run_id)] == [
        (user, '{"vips": false}', "pending") for user in FIVE[1:]
    ]
    assert known.members() == {}
    assert held(known) == []
    with pytest.raises(ConfigError, match="The key vips was retired and stays reserved"):
        known.sync(known.audience())
    with pytest.raises(ConfigError, match="was retired on 2026-01-01 already"):
        decisions.retire(known.engine, "vips", known.clock, Destination())
    with pytest.raises(ConfigError, match="The key others was never used"):
        decisions.retire(known.engine, "others", known.clock, Destination())


def test_a_retired_trait_becomes_null(world):
    world.people(("ann", 1.0))
    world.sync(world.trait())
    world.settle("accepted")
    run_id = decisions.retire(world.engine, "spend", world.clock, Destination())
    assert world.deliveries(run_id) == [("ann", '{"spend": null}', "pending")]


def test_only_eligible_users_enter_and_members_stay_when_they_are_no_longer_eligible(known):
    known.people(*FIVE[1:], "new", "zoe")
    eligible = "SELECT user_id FROM people WHERE user_id NOT IN ('new', 'eve') UNION SELECT 'dan'"
    run = known.sync(known.audience(eligible_sql=eligible))
    assert (counts(run), run.set_aside) == ((6, 1, 0, 0), {"not_eligible": 1})  # ann is no longer eligible
    assert set(known.members()) == {*FIVE, "zoe"}
    known.people("bob")
    run = known.sync(known.audience(eligible_sql="SELECT user_id FROM people"))
    assert (counts(run), run.set_aside) == ((6, 0, 0, 0), {})


@pytest.mark.parametrize(
    ("ready", "status"),
    [("SELECT 1", "succeeded"), ("SELECT count(*) FROM people", "succeeded"), ("SELECT 0", "failed"),
     ("SELECT NULL", "failed"), ("SELECT 1 WHERE 1 = 0", "failed"), ("SELECT 'yes'", "failed")],
)  # fmt: skip
def test_a_run_computes_only_when_its_source_is_ready(world, ready, status):
    world.people("ann")
    run = world.sync(world.audience(ready_sql=ready))
    assert run.status == status
    if status == "failed":
        assert run.error.startswith("vips: not ready: ")
        assert world.members() == {}


def test_a_plan_says_what_would_be_held(known):
    known.people()
    now = known.clock.now()
    definition = known.audience(guard=WARY)
    planned = plan.plan(known.engine, [(definition, None)], {"vips": now}, now, Destination())
    assert planned.plans[0].held == runs.Held(
        "guard", "The guard holds it: the snapshot is empty, and max_exit_ratio is 0.5."
    )
    assert planned.affected == plan.Affected(user_count=0, push_count=0)


def test_a_baseline_after_a_canary_is_still_first(world):
    world.people("ann")
    world.sync(world.audience(), users=("ann",))
    with engines.read(world.engine) as connection:
        baseline = records.load_baseline(connection, "vips")
    assert (baseline.run_id, baseline.member_count, baseline.is_first) == (1, 1, True)


def test_an_erased_user_is_an_exit_of_the_next_run_and_returns_only_when_allowed(known):
    known.people(*FIVE[1:])
    known.sync(known.audience())  # ann has left
    with engines.write(known.engine) as connection:
        assert erasure.forget(connection, "bob", known.clock.now()) == 1
        assert erasure.forget(connection, "ann", known.clock.now()) == 0
    known.people(*FIVE)
    run = known.sync(known.audience())
    assert (counts(run), run.set_aside) == ((3, 0, 1, 0), {"forgotten": 2})
    assert set(known.members()) == {"cid", "dan", "eve"}
    assert known.deliveries(run.run_id) == []
    assert counts(known.sync(known.audience())) == (3, 0, 0, 0)
    rows = known.query(
        "SELECT run_id, accepted_count, cancelled_count FROM {our}runs WHERE run_id < 3 ORDER BY run_id"
    )
    assert rows == [(1, 2, 0), (2, 0, 1)]  # ann and bob were sent; ann's exit was still pending
    with engines.write(known.engine) as connection:
        assert erasure.allow_return(connection, "bob") == dt.datetime(2026, 1, 1, 2, tzinfo=dt.UTC)
        assert erasure.allow_return(connection, "zoe") is None
    assert known.sync(known.audience()).set_aside == {"forgotten": 2}
    known.clock.sleep(2 * 3600)
    run = known.sync(known.audience())
    assert (counts(run), run.set_aside) == ((4, 1, 0, 0), {"forgotten": 1})


def delivery_counts(world, run):
    """Return the accepted, pending, dead and cancelled deliveries of a run, and the sum of its changes."""
    with engines.read(world.engine) as connection:
        [row] = history.run_rows(connection, ids=[run.run_id])
    names = ("accepted", "pending", "dead", "cancelled")
    changes = row["entered_count"] + row["exited_count"] + row["changed_count"]
    return tuple(row[f"{name}_count"] for name in names), changes


def forget(world, *users):
    for user in users:
        with engines.write(world.engine) as connection:
            erasure.forget(connection, user, world.clock.now())


def test_the_deliveries_of_a_run_add_up_to_its_changes_with_erased_users(known):
    forget(known, "ann")
    known.people("cid", "dan", "eve", "zoe")
    run = known.sync(known.audience())
    assert counts(run) == (4, 1, 2, 0)
    assert delivery_counts(known, run) == ((0, 2, 0, 1), 3)
    forget(known, "cid", "zoe")
    run = known.run(decisions.retire(known.engine, "vips", known.clock, Destination()))
    assert counts(run) == (0, 0, 4, 0)
    assert delivery_counts(known, run) == ((0, 2, 0, 2), 4)


def test_an_approved_run_adds_up_with_users_who_were_erased_while_it_was_held(known):
    known.people("cid", "dan", "eve", "zoe", "yan")
    run = known.sync(known.audience(), hold=True)
    forget(known, "ann", "cid", "zoe")  # who would leave, stay and enter
    decisions.approve(known.engine, run.run_id, known.clock, Destination())
    run = known.run(run.run_id)
    assert counts(run) == (3, 1, 3, 0)
    assert delivery_counts(known, run) == ((0, 2, 0, 2), 4)
    assert set(known.members()) == {"dan", "eve", "yan"}


def test_the_list_of_definitions_counts_no_erased_members(known):
    forget(known, "ann", "bob")
    with engines.read(known.engine) as connection:
        settings = SimpleNamespace(definitions=())
        [row] = history.definitions(connection, settings, known.clock.now())
    assert row["member_count"] == len(known.members()) == 3


def test_a_held_run_shows_what_it_would_do(world):
    world.people(("ann", 1.0), ("bob", 2.0), ("cid", 3.0))
    world.sync(world.trait())
    world.people(("ann", 1.0), ("bob", 4.0), ("dan", 3.0))
    run = world.sync(world.trait(), hold=True, full=True)
    with engines.read(world.engine) as connection:
        shown = history.run_in_full(connection, run.run_id)
    assert (shown["held_by"], shown["error"]) == ("hold", "Held because --hold was given.")
    samples = [shown[f"{name}_sample"] for name in ("entered", "exited", "changed")]
    assert samples == [["dan"], ["cid"], ["bob"]]


def test_an_exit_is_sent_although_the_accepted_entry_was_pruned(known):
    known.execute("DELETE FROM {our}deliveries")  # pruned
    known.sync(known.audience(), full=True)  # not sent yet
    known.people(*FIVE[1:])
    run = known.sync(known.audience())
    assert known.deliveries(run.run_id) == [("ann", '{"vips": false}', "pending")]
    assert known.deliveries(2)[0] == ("ann", '{"vips": true}', "pending")


def test_a_value_that_changed_before_anything_was_sent_is_cancelled_with_its_exit(world):
    for value in (1.0, 2.0):
        world.people(("ann", value))
        world.sync(world.trait())
    world.people()
    world.sync(world.trait())
    assert world.query("SELECT DISTINCT status FROM {our}deliveries") == [("cancelled",)]


def test_a_source_that_cannot_be_opened_fails_the_run(world):
    def closed():
        raise SourceError("no such driver")

    options = runs.RunOptions()
    run_id = runs.sync(world.engine, world.audience(), world.clock.now(), world.clock, options, source=closed)
    assert (world.run(run_id).status, world.run(run_id).error) == ("failed", "no such driver")
