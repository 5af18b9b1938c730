"""Held runs, decisions about them, and the users who are left out of a run."""

import datetime as dt
from types import SimpleNamespace

import pytest

from audience_sync import history
from audience_sync.audiences import decisions, foreign, plan, records, runs, snapshot
from audience_sync.audiences.definition import Guard
from audience_sync.db import engines
from audience_sync.errors import ConfigError, NotApproved, SourceError
from audience_sync.queue.destination import Destination
from audience_sync.retention import erasure

WARY = Guard(above=4, max_exit_ratio=0.5, max_enter_ratio=1.0)
FIVE = ["ann", "bob", "cid", "dan", "eve"]


@pytest.fixture
def known(world):
    """Five members whose deliveries were accepted."""
    world.people(*FIVE)
    world.sync(world.audience())
    world.settle("accepted")
    return world


def held(world):
    return world.query("SELECT run_id, held_by, error FROM {our}runs WHERE status = 'held'")


def counts(run):
    return (run.member_count, run.entered_count, run.exited_count, run.changed_count)


@pytest.mark.parametrize(
    ("people", "why"),
    [
        (["ann", "bob"], "3 of 5 members would leave, and max_exit_ratio is 0.5"),
        ([], "the snapshot is empty, and max_exit_ratio is 0.5"),
        (
            [*FIVE, *(f"new{n}" for n in range(6))],
            "6 users would enter beside 5 members, and max_enter_ratio is 1",
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
    with pytest.raises(ConfigError, match=f"Run {run.run_id} is succeeded, not held"):
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


def test_a_run_is_not_approved_when_the_members_have_moved(known, monkeypatch):
    known.people()
    run = known.sync(known.audience(), hold=True)
    monkeypatch.setattr(
        runs, "replace_held_run", lambda *_: None
    )  # as if it had been held while the other ran
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


def test_a_pending_exit_is_sent_though_the_accepted_entry_before_it_was_pruned(world):
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


def test_a_dead_delivery_is_retried_though_a_later_run_was_rejected(known):
    known.execute("UPDATE {our}deliveries SET status = 'dead', error = 'no' WHERE subject_id = 'ann'")
    known.people()
    run = known.sync(known.audience(guard=WARY))
    decisions.reject(known.engine, run.run_id, known.clock)
    known.people(*FIVE)
    known.sync(known.audience(guard=WARY))
    assert ("ann", '{"vips": true}', "pending") in known.deliveries(1)


def test_a_canary_changes_its_users_alone(world):
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
    assert planned.affected == snapshot.Affected(user_count=5, push_count=3)
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


def test_another_destination_holds_until_a_full_run(world):
    world.people(*FIVE[:2])
    world.sync(world.audience(), fingerprint="one")
    world.people(*FIVE[:3])
    run = world.sync(world.audience(), fingerprint="two")
    assert run.status == "held"
    assert "`audience-sync sync vips --full`" in run.error
    assert "`audience-sync check --accept-destination`" in run.error
    with pytest.raises(NotApproved, match="another destination"):
        decisions.approve(world.engine, run.run_id, world.clock, Destination("two"))
    with pytest.raises(
        ConfigError, match="A canary is not possible now: the last sync of vips was made for another"
    ):
        world.sync(world.audience(), fingerprint="two", users=("ann",))
    full = world.sync(world.audience(), fingerprint="two", full=True)
    assert (full.status, counts(full)) == ("succeeded", (3, 1, 0, 0))
    waiting = world.query("SELECT run_id, fingerprint, status FROM {our}deliveries ORDER BY delivery_id")
    assert waiting == [
        (1, "one", "cancelled"), (1, "one", "cancelled"),
        (3, "two", "pending"), (3, "two", "pending"), (3, "two", "pending"),
    ]  # fmt: skip
    assert world.sync(world.audience(), fingerprint="two").status == "succeeded"


def test_deliveries_for_another_destination_are_held_until_it_is_configured_again(world):
    world.people("ann")
    world.sync(world.audience(), fingerprint="one")
    world.sync(world.audience(key="others"), fingerprint="two")
    for fingerprint, expected in (
        ("two", {"vips": "held", "others": "pending"}),
        ("one", {"vips": "pending", "others": "held"}),
    ):
        with engines.write(world.engine) as connection:
            assert foreign.hold_foreign(connection, Destination(fingerprint), world.clock.now()) == 1
        assert statuses(world) == expected
    with engines.write(world.engine) as connection:
        assert foreign.foreign_keys(connection, Destination("one")) == ["others"]
        foreign.accept_destination(connection, Destination("one"))
        assert foreign.foreign_keys(connection, Destination("one")) == []
        assert foreign.hold_foreign(connection, Destination("one"), world.clock.now()) == 0
    assert statuses(world) == {"vips": "pending", "others": "pending"}


def statuses(world):
    return dict(
        world.query(
            "SELECT k.key, d.status FROM {our}deliveries d JOIN {our}definitions k "
            "ON k.definition_id = d.definition_id"
        )
    )


def test_a_destination_that_was_not_known_is_the_first_that_is(world):
    world.people("ann")
    world.sync(world.audience())
    with engines.write(world.engine) as connection:
        assert foreign.hold_foreign(connection, Destination("one"), world.clock.now()) == 0
        assert foreign.foreign_keys(connection, Destination("one")) == []
        assert foreign.foreign_keys(connection, Destination("two")) == ["vips"]
    assert world.query("SELECT fingerprint FROM {our}deliveries") == [("one",)]


def test_a_held_run_stays_held_whatever_the_destination(known):
    known.people()
    run = known.sync(known.audience(guard=WARY), fingerprint="one")
    with engines.write(known.engine) as connection:
        foreign.hold_foreign(connection, Destination("one"), known.clock.now())
    assert {status for _, _, status in known.deliveries(run.run_id)} == {"held"}


def test_retire_sends_false_to_everyone_who_holds_the_key_and_reserves_it(known):
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
    assert (counts(run), run.set_aside) == ((6, 1, 0, 0), {"not_eligible": 1})  # ann is not known any more
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
    assert planned.affected == snapshot.Affected(user_count=0, push_count=0)


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


def test_the_deliveries_of_a_run_add_up_to_its_changes_beside_erased_users(known):
    forget(known, "ann")
    known.people("cid", "dan", "eve", "zoe")
    run = known.sync(known.audience())
    assert counts(run) == (4, 1, 2, 0)
    assert delivery_counts(known, run) == ((0, 2, 0, 1), 3)
    forget(known, "cid", "zoe")
    run = known.run(decisions.retire(known.engine, "vips", known.clock, Destination()))
    assert counts(run) == (0, 0, 4, 0)
    assert delivery_counts(known, run) == ((0, 2, 0, 2), 4)


def test_an_approved_run_adds_up_beside_users_who_were_erased_while_it_was_held(known):
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


def test_an_approved_full_run_is_sent_to_the_destination_of_its_approval(world):
    world.people("ann", "bob")
    world.sync(world.audience(), fingerprint="one")
    world.settle("accepted")
    run = world.sync(world.audience(), fingerprint="one", full=True, hold=True)
    decisions.approve(world.engine, run.run_id, world.clock, Destination("two"))
    sent = world.query(
        "SELECT subject_id, fingerprint, status FROM {our}deliveries WHERE run_id = 2 ORDER BY 1"
    )
    assert sent == [("ann", "two", "pending"), ("bob", "two", "pending")]


def test_a_scheduled_full_run_is_held_for_another_destination_like_any_other(known):
    known.sync(known.audience(), fingerprint="one")
    run = known.sync(known.audience(), fingerprint="two", full=True, trigger="schedule")
    assert (run.status, run.held_by) == ("held", "fingerprint")
    with pytest.raises(NotApproved, match="the API key is not set"):
        decisions.approve(known.engine, run.run_id, known.clock, Destination())


def test_an_exit_is_sent_though_the_accepted_entry_was_pruned(known):
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


def test_what_is_being_sent_goes_with_its_definition_to_another_destination(world):
    world.people("ann")
    world.sync(world.audience(), fingerprint="one")
    world.execute("UPDATE {our}deliveries SET status = 'sending', request_id = 1")
    with engines.write(world.engine) as connection:
        foreign.accept_destination(connection, Destination("two"))
    assert world.query("SELECT fingerprint FROM {our}deliveries") == [("two",)]


def test_an_accepted_destination_is_not_undone_by_a_run_under_way(known, monkeypatch):
    known.sync(known.audience(), fingerprint="one")
    compute = runs.compute

    def meanwhile(*given):
        with engines.write(known.engine) as connection:
            foreign.accept_destination(connection, Destination("two"))
        return compute(*given)

    monkeypatch.setattr(runs, "compute", meanwhile)
    assert known.sync(known.audience(), fingerprint="one").status == "held"
    assert known.query("SELECT fingerprint FROM {our}definitions") == [("two",)]


def test_a_source_that_cannot_be_opened_fails_the_run(world):
    def closed():
        raise SourceError("no such driver")

    options = runs.RunOptions()
    run_id = runs.sync(world.engine, world.audience(), world.clock.now(), world.clock, options, source=closed)
    assert (world.run(run_id).status, world.run(run_id).error) == ("failed", "no such driver")
