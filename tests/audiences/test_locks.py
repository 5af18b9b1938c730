"""Nobody waits for another definition's commit or for a slow reader."""

import datetime as dt
import threading

import pytest

from audience_sync import crash, history
from audience_sync.audiences import foreign, records
from audience_sync.clock import SystemClock
from audience_sync.db import engines
from audience_sync.history import paging
from audience_sync.queue.destination import Destination
from audience_sync.retention import erasure
from audience_sync.userpilot.answers import Answer, Outcome
from tests.waiting import PATIENCE_SECONDS, until

SHORT_SECONDS = 5.0
# SQLite has one lock for writes.
only_postgresql = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)


class Deleter:
    """Userpilot, which accepts every deletion."""

    def delete_user(self, _user_id):
        return Answer(Outcome.ACCEPTED, 202, None, None, None)


@pytest.fixture
def erasing(world):
    """A thread that erases ann."""
    return threading.Thread(
        target=erasure.forget_everywhere, args=(world.engine, Deleter(), "ann", SystemClock())
    )


@pytest.fixture
def two(world):
    """Ids of two definitions with ann as a member."""
    world.people("ann")
    for key in ("first", "second"):
        world.sync(world.audience(key=key), fingerprint="f")
    return [number for (number,) in world.query("SELECT definition_id FROM {our}definitions ORDER BY 1")]


@only_postgresql
def test_an_erasure_that_waits_for_a_commit_stops_no_call_and_no_other_definition(world, two, erasing):
    with engines.write(world.engine) as committing:
        records.lock_definition(committing, two[1])
        erasing.start()
        until(lambda: world.query("SELECT definition_id FROM {our}members") == [(two[1],)])
        with engines.write(world.engine, SHORT_SECONDS) as storing_calls:
            erasure.block_erasures(storing_calls)
        with engines.write(world.engine, SHORT_SECONDS) as other_run:
            records.lock_definition(other_run, two[0])
        assert erasing.is_alive()
    erasing.join()
    assert world.query("SELECT count(*) FROM {our}members") == [(0,)]
    assert world.query("SELECT count(*) FROM {our}deliveries") == [(0,)]
    assert world.query("SELECT forgotten_count FROM {our}definitions") == [(1,), (1,)]


def test_a_run_that_commits_while_a_user_is_erased_leaves_nothing_of_the_user(world, monkeypatch, erasing):
    committing, go = threading.Event(), threading.Event()

    def reach(point):
        if point == "changes_written":
            committing.set()
            go.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(crash, "at", reach)
    world.people("ann", "bob")
    running = threading.Thread(target=world.sync, args=(world.audience(),))
    running.start()
    assert committing.wait(PATIENCE_SECONDS)
    erasing.start()
    go.set()
    running.join()
    erasing.join()
    assert set(world.members()) == {"bob"}
    assert world.query("SELECT subject_id FROM {our}deliveries") == [("bob",)]


@only_postgresql
def test_a_delivery_to_another_destination_does_not_wait_for_a_commit(world, two):
    with engines.write(world.engine) as committing:
        records.lock_definition(committing, two[1])
        with engines.write(world.engine, SHORT_SECONDS) as delivering:
            assert foreign.hold_foreign(delivering, Destination("g"), world.clock.now()) == 1
    with engines.write(world.engine) as delivering:
        assert foreign.hold_foreign(delivering, Destination("g"), world.clock.now()) == 2


@only_postgresql
def test_a_slot_is_recorded_while_its_definition_is_committed(world, two):
    with engines.write(world.engine) as committing:
        records.lock_definition(committing, two[1])
        with engines.write(world.engine, SHORT_SECONDS) as taking:
            taking.exec_driver_sql(
                "INSERT INTO audience_sync.schedule_slots (definition_id, slot_at, taken_at) "
                f"VALUES ({two[1]}, now(), now())"
            )


# Readers.


@pytest.mark.parametrize("size", [1, 2, 3, 1_000])
def test_pages_show_the_same_as_one_answer(world, monkeypatch, size):
    for users in ("abcde", "acx", "abcdefg"):
        world.people(*users)
        world.sync(world.audience())
    monkeypatch.setattr(paging, "PAGE", size)
    for rows, id_name in ((history.run_rows, "run_id"), (history.delivery_rows, "delivery_id")):
        with engines.read(world.engine) as connection:
            whole = rows(connection)
        assert list(history.pages(world.engine, rows, id_name)) == whole


@pytest.mark.parametrize("size", [1, 2, 3, 1_000])
def test_members_are_read_in_pages_now_and_at_each_past_time(world, monkeypatch, size):
    moments, snapshots = [], [{"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 4, "d": 5}, {}, {"a": 7, "c": 4}]
    for values in snapshots:
        world.people(*values.items())
        moments.append(world.sync(world.trait()).as_of)
    monkeypatch.setattr(paging, "PAGE", size)

    def members(at=None):
        return [(user, float(value)) for user, value in history.member_rows(world.engine, 1, at)]

    assert [members(at) for at in moments] == [sorted(values.items()) for values in snapshots]
    assert members() == [("a", 7), ("c", 4)]
    assert members(moments[0] - dt.timedelta(seconds=1)) == []


def test_the_pages_of_members_belong_to_one_run_even_if_another_is_committed_meanwhile(world, monkeypatch):
    monkeypatch.setattr(paging, "PAGE", 2)
    world.people(("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5))
    world.sync(world.trait())
    members = history.member_rows(world.engine, 1, None)
    read = [next(members)]
    world.people(("a", 1), ("b", 9), ("bb", 9), ("c", 9), ("f", 9))
    world.sync(world.trait())
    read += members
    assert [(user, float(value)) for user, value in read] == [
        ("a", 1),
        ("b", 2),
        ("c", 3),
        ("d", 4),
        ("e", 5),
    ]
