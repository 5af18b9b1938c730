"""Runs and deliveries for another destination than the configured one."""

import pytest

from audience_sync.audiences import decisions, foreign, runs
from audience_sync.db import engines
from audience_sync.errors import ConfigError, NotApproved
from audience_sync.queue import destination
from audience_sync.queue.destination import Destination
from tests.audiences.conftest import FIVE, WARY, counts


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


def test_deliveries_in_flight_move_with_their_definition_to_another_destination(world):
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


def test_a_new_key_that_is_refused_at_once_leaves_its_environment_in_use(world):
    world.people("ann")
    world.sync(world.audience(), fingerprint="one")
    world.execute("UPDATE {our}deliveries SET status = 'accepted', request_id = 1, settled_at = created_at")
    with engines.write(world.engine) as connection:
        foreign.accept_destination(connection, Destination("two"))
        destination.stop(connection, world.clock.now(), "refused")
        foreign.hold_foreign(connection, Destination("other"), world.clock.now())
        assert foreign.foreign_keys(connection, Destination("other")) == ["vips"]
