"""Failing runs and locks in the daemon: what is repeated, and when."""

import pytest

from audience_sync.audiences import records, runs, slots
from audience_sync.db import engines, leases
from tests.daemon.conftest import take_due, utc


def started(life):
    return [(f"{run['started_at']:%d %H:%M}", run["mode"], run["status"]) for run in life.history()]


def break_source(life):
    life.run("ALTER TABLE people RENAME TO persons")


def mend_source(life):
    life.run("ALTER TABLE persons RENAME TO people")


@pytest.fixture
def failing(life):
    """A life in which the run of 16 March, 01:30 UTC, and all later runs fail."""
    life.live_until("2026-03-15 12:00")
    break_source(life)
    life.tick_at("2026-03-16 01:30")
    return life


def tick_each_minute(life, first, last):
    life.clock.moment = utc(first)
    while life.clock.moment <= utc(last):
        life.daemon.tick()
        life.clock.sleep(60)


def test_a_failed_run_is_tried_again_after_1_5_and_15_minutes_and_then_at_its_next_slot(failing):
    tick_each_minute(failing, "2026-03-16 01:31", "2026-03-16 02:09")
    tick_each_minute(failing, "2026-03-17 01:29", "2026-03-17 01:32")
    times = ["16 01:30", "16 01:31", "16 01:36", "16 01:51", "17 01:30", "17 01:31"]
    assert started(failing)[1:] == [(time, "changes", "failed") for time in times]
    assert failing.slots() == ["2026-03-15 01:30", "2026-03-16 01:30", "2026-03-17 01:30"]


def test_a_failed_run_is_reported_until_one_succeeds_and_then_not_repeated(failing):
    failing.clock.moment = utc("2026-03-16 01:30:20")
    (failed,) = failing.status()["failed_runs"]
    assert (failed["key"], failed["status"], failed["trigger"]) == ("in", "failed", "schedule")
    assert "people" in failed["reason"]
    assert failed["retry_at"] == utc("2026-03-16 01:31")
    mend_source(failing)
    tick_each_minute(failing, "2026-03-16 01:31", "2026-03-16 01:38")
    assert started(failing)[1:] == [("16 01:30", "changes", "failed"), ("16 01:31", "changes", "succeeded")]
    assert failing.status()["failed_runs"] == []


def test_a_failed_run_is_reported_while_it_is_repeated(failing):
    with engines.write(failing.daemon.app.engine) as connection:
        leases.acquire(connection, leases.of_definition("in"), 600)
        records.start_run(
            connection, 1, mode="changes", trigger="schedule", as_of=failing.clock.now(),
            now=failing.clock.now(), baseline_run_id=1,
        )  # fmt: skip
    (failed,) = failing.status()["failed_runs"]
    assert (failed["run_id"], failed["status"]) == (2, "failed")


def test_a_failed_run_is_repeated_by_a_daemon_that_was_restarted(failing):
    mend_source(failing)
    failing.daemon.app.close()
    failing.daemon = failing.begin()
    failing.tick_at("2026-03-16 01:30:59")
    assert len(started(failing)) == 2
    failing.tick_at("2026-03-16 01:31")
    assert started(failing)[2:] == [("16 01:31", "changes", "succeeded")]


def test_a_manual_sync_replaces_the_retry_and_a_canary_does_not(failing):
    mend_source(failing)
    app = failing.daemon.app
    (definition,) = app.definitions()
    app.sync(definition, failing.clock.now(), runs.RunOptions(users=("u1",)))
    assert [failed["run_id"] for failed in failing.status()["failed_runs"]] == [2]
    app.sync(definition, failing.clock.now())
    assert failing.status()["failed_runs"] == []
    tick_each_minute(failing, "2026-03-16 01:31", "2026-03-16 01:38")
    assert [run["trigger"] for run in failing.history()[1:]] == ["schedule", "manual", "manual"]


def test_a_full_run_that_failed_stays_due_until_it_succeeds(life):
    life.clock.moment = utc("2026-03-30 12:00")
    life.live_until("2026-03-31 12:00")
    break_source(life)
    for time in ("00:30", "00:31", "00:36", "00:51", "01:00", "01:01", "01:06", "01:21", "01:59"):
        life.tick_at(f"2026-04-01 {time}")  # the full slot is at 01:00 UTC
    failed = [mode for _, mode, status in started(life) if status == "failed"]
    assert failed == ["changes"] * 4 + ["full"] * 4
    life.tick_at("2026-04-02 00:30")
    mend_source(life)
    app = life.daemon.app
    app.sync(app.definitions()[0], life.clock.now())  # sends the changes only
    life.tick_at("2026-04-02 00:31")
    life.tick_at("2026-04-03 00:30")
    modes = [mode for _, mode, status in started(life) if status == "succeeded"]
    assert modes[-3:] == ["changes", "full", "changes"]


def test_a_manual_full_sync_replaces_a_full_slot(life):
    life.clock.moment = utc("2026-03-30 12:00")
    life.live_until("2026-03-31 12:00")
    break_source(life)
    life.tick_at("2026-04-01 01:00")
    mend_source(life)
    app = life.daemon.app
    app.sync(app.definitions()[0], life.clock.now(), runs.RunOptions(full=True))
    life.tick_at("2026-04-01 02:00")
    life.tick_at("2026-04-02 00:30")
    assert [mode for _, mode, _ in started(life)[-3:]] == ["full", "full", "changes"]


def test_a_run_that_ends_its_process_again_and_again_is_not_repeated_at_once(life):
    life.live_until("2026-03-15 01:00")
    (definition,) = life.daemon.app.definitions()
    engine, times = life.daemon.app.engine, []
    life.clock.moment = utc("2026-03-15 01:30")
    while life.clock.moment < utc("2026-03-15 02:00"):
        for slot in take_due(engine, [definition], life.clock.now(), limit=1):
            times.append(f"{life.clock.moment:%H:%M}")
            with engines.write(
                engine
            ) as connection:  # its process is killed here, without a lease that lives
                run_id = records.start_run(
                    connection, slot.definition_id, mode="first", trigger="schedule", as_of=slot.slot_at,
                    now=life.clock.now(), baseline_run_id=None,
                )  # fmt: skip
                slots.record_run(connection, slot.definition_id, slot.slot_at, run_id)
        life.clock.sleep(60)
    assert times == ["01:30", "01:31", "01:32", "01:37", "01:52"]
    (failed,) = life.status()["failed_runs"]
    assert (failed["run_id"], failed["status"]) == (5, "abandoned")


def test_a_tick_does_not_wait_for_the_commit_of_another_process(life, backend, caplog):
    life.live_until("2026-03-15 12:00")
    started = []
    life.daemon.start = lambda name, work: (started.append(name), work())
    with engines.write(life.daemon.app.engine) as starting:
        lease = leases.acquire(starting, leases.of_definition("in"), 600)
    with engines.write(life.daemon.app.engine) as committing:
        records.lock_definition(committing, 1)
        leases.renew(committing, lease)
        life.tick_at("2026-03-16 02:00")  # its slot is due; the test would take 300 s
    delayed = [record.getMessage() for record in caplog.records if record.getMessage() == "tick delayed"]
    assert delayed == (["tick delayed"] if backend == "sqlite" else [])
    assert started == ([] if backend == "sqlite" else ["prune"])  # pruning would wait for the lock, too
    assert life.slots() == ["2026-03-15 01:30"]
    with engines.write(life.daemon.app.engine) as ending:
        leases.release(ending, lease)
    life.tick_at("2026-03-16 02:01")
    assert life.slots() == ["2026-03-15 01:30", "2026-03-16 01:30"]
    assert sorted(started) == ["in", "prune"]
