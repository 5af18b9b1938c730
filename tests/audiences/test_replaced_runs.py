"""Runs that are held one after another: each replaces the one before."""

import pytest

from audience_sync import history
from audience_sync.audiences import decisions, foreign
from audience_sync.audiences.definition import Guard
from audience_sync.db import engines
from audience_sync.errors import NotApproved
from audience_sync.queue.destination import Destination
from tests.audiences.conftest import FIVE, WARY, counts, held


def test_a_later_run_replaces_the_held_one(known):
    known.people()
    first = known.sync(known.audience(guard=WARY))
    second = known.sync(known.audience(guard=WARY))
    assert known.run(first.run_id).error == f"Replaced by run {second.run_id}."
    assert [run_id for run_id, _, _ in held(known)] == [second.run_id]
    known.people(*FIVE)
    assert known.sync(known.audience(guard=WARY)).status == "succeeded"
    assert held(known) == []
    assert [known.run(run_id).status for run_id in (first.run_id, second.run_id)] == ["rejected"] * 2


def held_rows(world):
    return world.query(
        "SELECT delivery_id, subject_id, CAST(body AS text) FROM {our}deliveries WHERE status = 'held' "
        "ORDER BY subject_id, delivery_id"
    )


def test_a_run_that_is_held_at_every_slot_writes_only_what_is_different(known):
    known.people("ann")
    first = known.sync(known.audience(guard=WARY))
    rows = held_rows(known)
    for _ in range(5):
        run = known.sync(known.audience(guard=WARY), trigger="schedule")
        assert (run.status, counts(run)) == ("held", (1, 0, 4, 0))
        assert held_rows(known) == rows
    known.people("bob", "zoe", "yan")
    run = known.sync(known.audience(guard=WARY))
    assert counts(run) == (3, 2, 4, 0)
    later = held_rows(known)
    assert set(rows) - set(later) == {row for row in rows if row[1] == "bob"}
    assert [row[1:] for row in later] == [
        ("ann", '{"vips": false}'), ("cid", '{"vips": false}'), ("dan", '{"vips": false}'),
        ("eve", '{"vips": false}'), ("yan", '{"vips": true}'), ("zoe", '{"vips": true}'),
    ]  # fmt: skip
    assert known.query("SELECT count(*) FROM {our}deliveries WHERE status <> 'accepted'") == [(6,)]
    with engines.read(known.engine) as connection:
        shown = history.run_in_full(connection, run.run_id)
        earlier = history.run_in_full(connection, first.run_id)
    assert (shown["pending_count"], shown["exited_sample"]) == (6, ["ann", "cid", "dan", "eve"])
    assert (shown["entered_sample"], shown["changed_sample"]) == (["yan", "zoe"], [])
    assert (earlier["status"], earlier["exited_count"], earlier["pending_count"]) == ("rejected", 4, 0)
    assert earlier["error"] == f"Replaced by run {first.run_id + 1}."


def test_approve_commits_the_changes_of_the_last_of_several_held_runs(known):
    for people in (["ann"], ["ann", "zoe"], ["bob", "zoe"]):
        known.people(*people)
        run = known.sync(known.audience(guard=WARY), fingerprint="one")
    with pytest.raises(NotApproved, match=f"Replaced by run {run.run_id}"):
        decisions.approve(known.engine, run.run_id - 1, known.clock, Destination("one"))
    decisions.approve(known.engine, run.run_id, known.clock, Destination("one"))
    assert set(known.members()) == {"bob", "zoe"}
    assert known.deliveries(run.run_id) == [
        *((user, '{"vips": false}', "pending") for user in ("ann", "cid", "dan", "eve")),
        ("zoe", '{"vips": true}', "pending"),
    ]
    run = known.run(run.run_id)
    assert counts(run) == (2, 1, 4, 0)
    written = known.query("SELECT DISTINCT value_at, class FROM {our}deliveries WHERE status = 'pending'")
    assert len(written) == 1
    assert written == known.query(
        "SELECT as_of, 'change' FROM {our}runs WHERE run_id = :run_id", run_id=run.run_id
    )
    assert known.query("SELECT DISTINCT entered_run_id FROM {our}members WHERE user_id = 'zoe'") == [
        (run.run_id,)
    ]
    assert held_rows(known) == []


def test_what_several_held_runs_shared_is_cancelled_when_the_last_is_rejected(known):
    for people in ([], ["zoe"]):
        known.people(*people)
        run = known.sync(known.audience(guard=WARY))
    decisions.reject(known.engine, run.run_id, known.clock)
    assert {status for _, _, status in known.deliveries(run.run_id)} == {"cancelled"}
    assert len(known.deliveries(run.run_id)) == 6
    with engines.read(known.engine) as connection:
        rows = history.run_rows(connection)
    assert [(row["status"], row["cancelled_count"], row["pending_count"]) for row in rows[:2]] == [
        ("rejected", 6, 0), ("rejected", 0, 0),
    ]  # fmt: skip
    assert counts(known.sync(known.audience(guard=Guard(above=100)))) == (1, 1, 5, 0)


@pytest.mark.parametrize("end", ["normal", "canary", "retire", "nothing"])
def test_no_delivery_of_a_replaced_held_run_remains(known, end):
    for _ in range(3):
        known.people()
        known.sync(known.audience(guard=WARY))
        known.people(*FIVE)
        match end:
            case "normal":
                known.sync(known.audience(guard=WARY))
            case "canary":
                known.sync(known.audience(guard=WARY), users=("ann",))
            case "nothing":
                known.sync(known.audience(), hold=True)
    if end == "retire":
        decisions.retire(known.engine, "vips", known.clock, Destination())
    left = {"retire": [("accepted", 5), ("pending", 5)]}.get(end, [("accepted", 5)])
    assert known.query("SELECT status, count(*) FROM {our}deliveries GROUP BY status ORDER BY status") == left


def test_a_held_trait_keeps_the_rows_whose_value_is_the_same(world):
    world.people(("ann", 1.0), ("bob", 2.0), ("cid", 3.0))
    world.sync(world.trait())
    world.people(("ann", 5.0), ("bob", 6.0))
    world.sync(world.trait(), hold=True)
    before = held_rows(world)
    world.people(("ann", 5.0), ("bob", 7.0), ("dan", 1.0))
    run = world.sync(world.trait(), hold=True)
    after = held_rows(world)
    assert set(before) & set(after) == {row for row in before if row[1] in {"ann", "cid"}}
    decisions.approve(world.engine, run.run_id, world.clock, Destination())
    assert world.members("spend") == {"ann": "5", "bob": "7", "dan": "1"}
    assert [body for _, body, _ in world.deliveries(run.run_id)] == [
        '{"spend": 5}', '{"spend": 7}', '{"spend": null}', '{"spend": 1}',
    ]  # fmt: skip


def test_a_full_run_takes_over_what_a_held_one_would_send_too(known):
    known.people("ann", "zoe")
    known.sync(known.audience(), hold=True)
    before = held_rows(known)
    run = known.sync(known.audience(), hold=True, full=True)
    after = held_rows(known)
    assert (len(before), len(after), set(before) <= set(after)) == (5, 6, True)
    decisions.approve(known.engine, run.run_id, known.clock, Destination())
    classes = known.query("SELECT DISTINCT class FROM {our}deliveries WHERE run_id = :id", id=run.run_id)
    assert classes == [("push",)]
    assert set(known.members()) == {"ann", "zoe"}


def test_a_taken_over_delivery_stays_held_whatever_the_destination(known):
    known.people()
    for _ in range(2):
        run = known.sync(known.audience(guard=WARY), fingerprint="one")
    for _ in range(2):
        with engines.write(known.engine) as connection:
            foreign.hold_foreign(connection, Destination("one"), known.clock.now())
    assert len(held_rows(known)) == 5
    decisions.approve(known.engine, run.run_id, known.clock, Destination("one"))
    assert len(known.deliveries(run.run_id)) == 5
