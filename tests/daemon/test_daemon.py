"""Days of a daemon, checked by its history. The test sets the clock; everything else is real."""

import datetime as dt
import threading

import pytest

from audience_sync.audiences import decisions, records, runs, schedule, slots
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.db import engines
from audience_sync.errors import ConfigError
from audience_sync.queue import destination
from tests.daemon.conftest import USERS, take_due, utc


def test_a_month_of_a_daemon(life):
    life.live_until("2026-03-16 12:00")  # from the first slot on: 16 March, 02:30 in Berlin is 01:30 UTC
    life.set_in(USERS[:4])
    life.live_until("2026-03-19 12:00")
    life.clock.moment = utc("2026-03-22 12:00")  # down for three nights: one is caught up
    life.set_in(USERS[:5])
    life.live_until("2026-03-24 12:00")
    life.set_in([])  # the source is emptied: held, then held again, which rejects the first
    life.live_until("2026-03-26 12:00")
    decisions.reject(life.daemon.app.engine, life.history()[-1]["run_id"], life.clock)
    life.set_in(USERS[:5])
    life.live_until("2026-03-31 12:00")  # across the night of 29 March, which has no 02:30
    assert life.members_at_userpilot() == set(USERS[:5])
    life.live_until("2026-04-01 12:00")  # the full resync
    life.sandbox.state.api_key = "another"
    life.set_in(USERS)
    life.live_until("2026-04-02 12:00")
    refused = len(life.sandbox.state.requests)
    life.live_until("2026-04-02 14:00")
    # The daemon checks whether the key works again, and sends nothing else.
    assert len(life.sandbox.state.requests) - refused <= 2
    assert life.members_at_userpilot() == set(USERS[:5])
    life.sandbox.state.api_key = "sandbox"
    life.live_until("2026-04-03 12:00")
    assert life.members_at_userpilot() == set(USERS)

    rows = [
        (
            each["as_of"].strftime("%m-%d %H"),
            each["mode"],
            each["status"],
            each["entered_count"],
            each["exited_count"],
        )
        for each in life.history()
    ]
    assert rows == [
        ("03-15 02", "first", "succeeded", 6, 0),
        ("03-16 02", "changes", "succeeded", 0, 0),
        ("03-17 02", "changes", "succeeded", 0, 2),
        ("03-18 02", "changes", "succeeded", 0, 0),
        ("03-19 02", "changes", "succeeded", 0, 0),
        ("03-22 13", "changes", "succeeded", 1, 0),
        ("03-23 02", "changes", "succeeded", 0, 0),
        ("03-24 02", "changes", "succeeded", 0, 0),
        ("03-25 02", "changes", "rejected", 0, 5),
        ("03-26 02", "changes", "rejected", 0, 5),
        ("03-27 02", "changes", "succeeded", 0, 0),
        ("03-28 02", "changes", "succeeded", 0, 0),
        ("03-29 01", "changes", "succeeded", 0, 0),  # 03:00 in Berlin, the first moment after the gap
        ("03-30 01", "changes", "succeeded", 0, 0),
        ("03-31 01", "changes", "succeeded", 0, 0),
        ("04-01 01", "full", "succeeded", 0, 0),  # 02:30 and 03:00 in Berlin, caught up at once as a full one
        ("04-02 01", "changes", "succeeded", 1, 0),
        ("04-03 01", "changes", "succeeded", 0, 0),
    ]
    assert {each["trigger"] for each in life.history()} == {"schedule"}
    assert all(each["pending_count"] == each["dead_count"] == 0 for each in life.history())
    assert life.slots()[5:8] == ["2026-03-22 01:30", "2026-03-23 01:30", "2026-03-24 01:30"]
    assert life.slots()[12] == "2026-03-29 01:00"


def test_a_run_held_on_request_makes_its_slots_wait(life):
    life.live_until("2026-03-15 12:00")
    (definition,) = life.daemon.app.definitions()
    held = life.daemon.app.sync(definition, life.clock.now(), runs.RunOptions(hold=True))
    life.live_until("2026-03-17 12:00")
    assert [each["status"] for each in life.history()] == ["succeeded", "held"]
    with engines.read(life.daemon.app.engine) as connection:
        seen = slots.outlooks(connection, [definition], life.clock.now())["in"]
    assert (seen.waits, seen.next_at) == (True, utc("2026-03-18 01:30"))
    decisions.approve(life.daemon.app.engine, held, life.clock, life.daemon.app.destination)
    life.live_until("2026-03-17 13:00")  # the newest slot that waited is caught up
    assert [each["status"] for each in life.history()] == ["succeeded"] * 3


def test_an_interrupted_run_is_caught_up(life):
    life.live_until("2026-03-15 01:00")
    (definition,) = life.daemon.app.definitions()
    life.clock.moment = utc("2026-03-15 02:00")
    (slot,) = take_due(life.daemon.app.engine, [definition], life.clock.now(), limit=1)
    with engines.write(life.daemon.app.engine) as connection:  # its process is killed here
        run_id = records.start_run(
            connection, slot.definition_id, mode="first", trigger="schedule", as_of=slot.slot_at,
            now=slot.slot_at, baseline_run_id=None,
        )  # fmt: skip
        slots.record_run(connection, slot.definition_id, slot.slot_at, run_id)
    life.live_until("2026-03-15 03:00")
    assert [each["status"] for each in life.history()] == ["abandoned", "succeeded"]
    assert life.slots() == ["2026-03-15 01:30"]


def test_an_interrupted_full_slot_is_caught_up_as_a_full_run(life):
    life.live_until("2026-03-30 12:00")
    (definition,) = life.daemon.app.definitions()
    life.clock.moment = utc("2026-04-02 12:00")  # down over the full slot of 1 April
    (slot,) = take_due(life.daemon.app.engine, [definition], life.clock.now(), limit=1)
    assert (slot.slot_at, slot.full) == (utc("2026-04-02 00:30"), True)
    life.live_until("2026-04-02 13:00")  # its process is gone
    assert life.history()[-1]["mode"] == "full"


def test_a_clock_that_jumps_repeats_no_slot_and_skips_none(life):
    life.live_until("2026-03-16 02:00")
    life.clock.moment = utc("2030-01-02 12:00")  # a wrong clock: it takes a slot of that time
    life.daemon.tick()
    life.clock.moment = utc("2026-03-15 12:00")
    life.live_until("2026-03-18 02:00")
    assert life.slots() == [
        "2026-03-15 01:30", "2026-03-16 01:30", "2026-03-17 01:30", "2026-03-18 01:30", "2030-01-02 01:30",
    ]  # fmt: skip


def test_a_definition_that_was_registered_while_the_clock_was_ahead_has_slots(life):
    life.tick_at("2030-01-02 12:00")
    life.clock.moment = utc("2026-03-15 00:00")
    life.live_until("2026-03-17 02:00")
    assert life.slots() == ["2026-03-15 01:30", "2026-03-16 01:30", "2026-03-17 01:30"]


def test_an_invalid_configuration_is_refused_and_the_previous_one_stays(life):
    before = life.daemon.app
    life.path.write_text("schedule = 1")
    life.daemon.reload()
    assert life.daemon.app is before
    life.write("sandbox")
    life.path.write_text(life.path.read_text().replace(life.url, "sqlite:///elsewhere.db"))
    with pytest.raises(ConfigError, match=r"to use another \[database\], restart the daemon"):
        before.reloaded()
    life.write("sandbox")
    life.path.write_text(life.path.read_text().replace('name = "In"', 'name = "Inside"'))
    life.daemon.reload()
    assert [each.key for each in life.daemon.app.definitions()] == ["inside"]


def test_a_definition_that_another_process_syncs_is_due_again(life, monkeypatch):
    def busy(*_, **__):
        raise runs.Busy("another process")

    life.clock.moment = utc("2026-03-15 02:00")
    life.daemon.tick()
    life.clock.moment = utc("2026-03-16 02:00")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "sync", busy)
        life.daemon.tick()
    assert life.slots() == []
    life.daemon.tick()
    assert life.slots() == ["2026-03-16 01:30"]
    assert [each["status"] for each in life.history()] == ["succeeded"]


def test_the_heartbeat_is_in_the_database(life):
    life.daemon.tick()
    with engines.read(life.daemon.app.engine) as connection:
        assert destination.last_heartbeat(connection) == life.clock.now()


def test_a_tick_survives_a_lock(life, backend, caplog):
    waits = "?timeout=0.1" if backend == "sqlite" else "&options=-c%20lock_timeout%3D100ms"
    life.daemon.app.close()
    life.daemon.app.engine = engines.open_own(life.url + waits, "audience_sync")
    life.live_until("2026-03-15 01:00")
    with engines.write(life.daemon.app.engine) as other:
        destination.record_heartbeat(other, utc("2026-03-15 00:30"))
        life.live_until("2026-03-15 03:00")
    assert "Another program holds its lock" in str([record.fields for record in caplog.records])
    assert life.slots() == []
    life.live_until("2026-03-15 04:00")
    assert life.slots() == ["2026-03-15 01:30"]
    assert life.members_at_userpilot() == set(USERS)


def test_the_end_of_32_bit_time_changes_nothing(life):
    life.clock.moment = utc("2038-01-17 12:00")
    life.live_until("2038-01-20 12:00")
    assert life.slots() == [f"2038-01-{day} 01:30" for day in (18, 19, 20)]
    assert {run["status"] for run in life.history()} == {"succeeded"}
    assert life.members_at_userpilot() == set(USERS)


@pytest.mark.parametrize("count", [40])
def test_two_daemons_never_take_one_slot_twice(engine, count):
    every = schedule.parse_schedule("every 1 minute", "UTC")
    definitions = [
        Definition(f"d{number}", f"d{number}", Kind.AUDIENCE, "SELECT 1", schedule=every)
        for number in range(3)
    ]
    start = utc("2026-03-15 00:00")
    take_due(engine, definitions, start, limit=9)  # first seen
    taken, barrier = [], threading.Barrier(2)

    def work():
        for minute in range(1, count + 1):
            barrier.wait(300)
            due = take_due(engine, definitions, start + dt.timedelta(minutes=minute), limit=9)
            taken.extend((slot.definition.key, slot.slot_at) for slot in due)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 3 * count


def test_due_slots_are_taken_up_to_the_limit_and_not_of_running_definitions(engine):
    every = schedule.parse_schedule("every 1 minute", "UTC")
    definitions = [Definition(key, key, Kind.AUDIENCE, "SELECT 1", schedule=every) for key in "abcd"]
    start = utc("2026-03-15 00:00")
    take_due(engine, definitions, start, limit=9)
    later = start + dt.timedelta(minutes=5)
    assert [
        each.definition.key for each in take_due(engine, definitions, later, limit=2, running=("a",))
    ] == [
        "b",
        "c",
    ]
    assert [each.definition.key for each in take_due(engine, definitions, later, limit=9)] == ["a", "d"]
    assert take_due(engine, definitions, later, limit=9) == []
