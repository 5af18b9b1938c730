"""Days of a daemon, checked by its history: the test sets the clock, the rest is real."""

import datetime as dt
import threading
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

from audience_sync import history, settings
from audience_sync.app import App
from audience_sync.audiences import decisions, records, runs, schedule, slots
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.daemon import Daemon
from audience_sync.db import dialects, engines, leases
from audience_sync.errors import ConfigError
from audience_sync.queue import destination
from tests.queue.conftest import Queue
from tests.waiting import until

BERLIN = "Europe/Berlin"
HOUR = dt.timedelta(hours=1)
USERS = [f"u{number}" for number in range(6)]
CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "{key}"
identify_per_minute = 100_000
[defaults]
schedule = "30 2 * * *"
full_schedule = "0 3 1 * *"
timezone = "Europe/Berlin"
guard_above = 5
[[audiences]]
name = "In"
sql = "SELECT user_id FROM people WHERE is_in = 1"
"""


@dataclass
class SetClock:
    moment: dt.datetime

    def now(self):
        return self.moment

    def monotonic(self):
        return self.moment.timestamp()

    def sleep(self, seconds):
        self.moment += dt.timedelta(seconds=seconds)


def utc(text):
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def take_due(engine, definitions, now, *, limit, running=()):
    """Take at most `limit` due slots of these definitions; `running` are keys to skip."""
    return slots.take(engine, slots.find_due(engine, definitions, now, running), now, limit=limit)


class Life:
    """A daemon that ticks and delivers once an hour, and the company's people."""

    def __init__(self, url, path, sandbox):
        self.url, self.path, self.sandbox = url, path, sandbox
        self.company = sa.create_engine(url)
        self.run("CREATE TABLE people (user_id text, is_in integer)")
        self.run(f"INSERT INTO people VALUES {', '.join(f'({user!r}, 1)' for user in USERS)}")
        self.write("sandbox")
        self.clock = SetClock(utc("2026-03-15 00:00"))
        self.daemon = self.begin()

    def run(self, statement):
        with self.company.begin() as connection:
            connection.exec_driver_sql(statement)

    def write(self, key):
        text = CONFIGURATION.format(url=self.url, endpoint=self.sandbox.url, key=key)
        self.path.write_text(text, encoding="utf-8")

    def tick_at(self, text):
        self.clock.moment = utc(text)
        self.daemon.tick()

    def status(self):
        app = self.daemon.app
        with engines.read(app.engine) as connection:
            return history.status(connection, app.settings, self.clock.now())

    def begin(self):
        loaded = settings.load(self.path, {})
        app = App(loaded, engines.open_own(self.url, "audience_sync"), self.clock)
        return Daemon(app, App.reloaded, start=lambda _, work: work())

    def live_until(self, text):
        """Tick and deliver every hour until that time, UTC."""
        while self.clock.moment < utc(text):
            self.clock.moment = self.clock.moment.replace(minute=0, second=0, microsecond=0) + HOUR
            self.daemon.tick()
            self.daemon.deliver()

    def set_in(self, users):
        self.run("UPDATE people SET is_in = 0")
        for user in users:
            self.run(f"UPDATE people SET is_in = 1 WHERE user_id = {user!r}")

    def members_at_userpilot(self):
        state = self.sandbox.state.snapshot()["users"]
        return {user for user, each in state.items() if each["properties"].get("in")}

    def history(self):
        with engines.read(self.daemon.app.engine) as connection:
            return history.run_rows(connection)[::-1]

    def slots(self):
        with engines.read(self.daemon.app.engine) as connection:
            rows = dialects.sql(connection, "SELECT slot_at FROM {our}schedule_slots ORDER BY slot_at")
            return [str(slot_at)[:16] for (slot_at,) in rows]

    def close(self):
        self.daemon.app.close()
        self.company.dispose()


@pytest.fixture
def life(url, tmp_path, sandbox):
    life = Life(url, tmp_path / "audience_sync.toml", sandbox)
    yield life
    life.close()


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
    assert (
        len(life.sandbox.state.requests) - refused <= 2
    )  # it checks whether the key works again, and sends nothing else
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


# Failures.


def started(life):
    return [(f"{run['started_at']:%d %H:%M}", run["mode"], run["status"]) for run in life.history()]


def break_source(life):
    life.run("ALTER TABLE people RENAME TO persons")


def mend_source(life):
    life.run("ALTER TABLE persons RENAME TO people")


@pytest.fixture
def failing(life):
    """A life in which the run of 16 March, 01:30 UTC, fails, and those that follow."""
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


# Many definitions.


EVERY_MINUTE = schedule.parse_schedule("every 1 minute", "UTC")
START = utc("2026-03-15 00:00")


def minute(number):
    return START + dt.timedelta(minutes=number)


def fleet(count, **options):
    names = [f"d{number:02}" for number in range(count)]
    options = {"schedule": EVERY_MINUTE} | options
    return [Definition(name, name, Kind.AUDIENCE, "SELECT 'u1' AS user_id", **options) for name in names]


def test_every_definition_runs_when_there_are_more_than_can_run_and_the_longest_due_comes_first(engine):
    definitions, ran = fleet(60), []
    take_due(engine, definitions, START, limit=9)
    for number in range(1, 11):
        for _ in range(6):  # 24 of 60 in a minute
            due = slots.find_due(engine, definitions, minute(number))
            assert [each.due_at for each in due] == sorted(each.due_at for each in due)
            ran += [slot.definition.key for slot in slots.take(engine, due, minute(number), limit=4)]
    assert ran[:60] == [each.key for each in definitions]
    assert {ran.count(each.key) for each in definitions} <= {3, 4, 5}


def test_the_statements_of_a_tick_do_not_depend_on_the_number_of_definitions(life, monkeypatch):
    engine, statements = life.daemon.app.engine, []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    def count(definitions):
        monkeypatch.setattr(App, "definitions", lambda _: definitions)
        statements.clear()
        life.daemon.tick()
        return len(statements)

    life.daemon.tick()  # prunes
    idle = {"schedule": schedule.parse_schedule("0 0 1 1 *", "UTC")}
    first, few = count(fleet(3, **idle)), count(fleet(3, **idle))
    more, many = count(fleet(99, **idle)), count(fleet(99, **idle))
    assert first == more
    assert few == many <= 10


def test_lateness_is_reported_for_definitions_that_never_ran_and_for_short_intervals(engine):
    (definition,) = fleet(1)
    take_due(engine, [definition], START, limit=1)

    def late_since(number):
        with engines.read(engine) as connection:
            return slots.outlooks(connection, [definition], minute(number))["d00"].late_since

    assert late_since(30) is None  # no daemon has run yet
    with engines.write(engine) as connection:
        destination.record_heartbeat(connection, START)
    assert late_since(3) is None
    assert late_since(4) == minute(1)
    assert take_due(engine, [definition], minute(4), limit=1)
    assert late_since(7) is None
    assert late_since(30) == minute(5)


def test_slots_that_were_missed_before_the_daemon_started_are_not_late(life, caplog):
    def late():
        return [record.fields for record in caplog.records if record.getMessage() == "runs are late"]

    app = life.daemon.app
    with engines.write(app.engine) as connection:
        records.register_definitions(connection, app.definitions(), life.clock.now())
    life.daemon._running.add("in")  # as if a manual run were in progress
    life.tick_at("2026-03-17 00:00")
    life.tick_at("2026-03-17 00:02")
    assert late() == []
    life.tick_at("2026-03-17 00:03")
    assert late() == [{"count": 1, "key": "in", "seconds": 167_580}]


def test_a_daemon_that_stopped_is_not_running(life):
    life.daemon.tick()
    assert life.status()["daemon"]["is_alive"] is True
    beat = life.clock.now()
    life.clock.sleep(1)
    life.daemon._end_heartbeat()
    assert life.status()["daemon"] == {"heartbeat_at": beat, "is_alive": False}
    life.daemon.tick()  # as another daemon would
    assert life.status()["daemon"] == {"heartbeat_at": life.clock.now(), "is_alive": True}


def test_a_daemon_that_stops_leaves_the_heartbeat_of_another(life):
    life.daemon.tick()
    life.clock.sleep(1)
    other = life.begin()
    other.tick()
    other.app.close()
    life.daemon._end_heartbeat()
    assert life.status()["daemon"] == {"heartbeat_at": life.clock.now(), "is_alive": True}


def test_a_late_run_is_logged_once_a_minute(life, caplog):
    life.tick_at("2026-03-15 01:00")
    life.daemon.app.stop.set()
    life.tick_at("2026-03-15 02:00")
    life.daemon.app.stop.clear()
    life.daemon._running.add("in")  # as if its earlier run had not ended
    for second in (0, 5, 10, 59):
        life.tick_at(f"2026-03-15 02:00:{second:02}")
    late = [record.fields for record in caplog.records if record.getMessage() == "runs are late"]
    assert late == [{"count": 1, "key": "in", "seconds": 1800}]


@pytest.fixture
def crowd(life, monkeypatch):
    """A daemon with threads and ten definitions that are due; each run waits until `go` is set."""
    go, running, most, done = threading.Event(), set(), [], []

    def sync(_app, definition, *_):
        running.add(definition.key)
        most.append(len(running))
        go.wait(180)
        running.discard(definition.key)
        done.append(definition.key)

    app = life.daemon.app
    definitions = fleet(10)
    monkeypatch.setattr(App, "sync", sync)
    monkeypatch.setattr(App, "definitions", lambda _: definitions)
    threads = []

    def start(_name, work):
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    daemon = Daemon(app, App.reloaded, start)
    life.clock.moment = START
    daemon.tick()
    life.clock.moment = minute(1)
    yield daemon, go, most, done
    go.set()
    for thread in threads:
        thread.join()


def test_a_bounded_number_of_definitions_runs_at_a_time(crowd, life):
    daemon, go, most, done = crowd
    for _ in range(3):
        daemon.tick()
    until(lambda: len(most) == 4)
    life.clock.moment += dt.timedelta(seconds=30)  # however long they take
    daemon.tick()
    assert len(daemon._running) == 4
    assert daemon.app.engine.pool.checkedout() == 0
    go.set()
    until(lambda: len(done) == 10)  # without another tick
    assert max(most) <= 4
    assert len(set(done)) == 10


def test_deliveries_do_not_wait_for_runs_that_never_cease(life, monkeypatch):
    definitions = fleet(99)
    monkeypatch.setattr(App, "definitions", lambda _: definitions)
    daemon = Daemon(life.daemon.app, App.reloaded, start=lambda *_: None)
    daemon.tick()
    gathering = []
    for second in range(0, 60, 5):
        life.clock.moment = minute(20) + dt.timedelta(seconds=second)
        daemon._running.discard(min(daemon._running, default=""))  # one ends, and the tick starts another
        daemon.tick()
        gathering.append(daemon._is_gathering())
    assert gathering == [True, True, False, False] * 3


def test_a_due_delivery_that_waits_for_its_user_does_not_delay_the_others(life):
    queue = Queue(life.daemon.app.engine, life.clock)
    queue.add("ann", {"plan": "pro"}, next_attempt_at=life.clock.now() + HOUR, attempt_count=1)
    queue.track("ann", "Signed Up")
    life.daemon.deliver()
    assert life.sandbox.state.events == []

    life.clock.moment += dt.timedelta(seconds=3)
    queue.track("bob", "Signed Up")
    life.daemon.deliver()

    assert [event["user_id"] for event in life.sandbox.state.events] == ["bob"]


def test_a_daemon_whose_deliveries_all_wait_does_not_begin_to_deliver_each_second(life, monkeypatch):
    queue = Queue(life.daemon.app.engine, life.clock)
    queue.add("ann", {"plan": "pro"}, next_attempt_at=life.clock.now() + HOUR, attempt_count=1)
    queue.track("ann", "Signed Up")
    for _ in range(2):
        life.daemon.deliver()
        life.clock.moment += dt.timedelta(seconds=3)
    started = []
    monkeypatch.setattr(App, "deliver", lambda *_, **__: started.append(1))

    life.daemon.deliver()

    assert started == []
