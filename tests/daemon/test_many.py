"""A daemon with many definitions, late runs, and deliveries that wait."""

import datetime as dt
import threading

import pytest
import sqlalchemy as sa

from audience_sync.app import App
from audience_sync.audiences import records, schedule, slots
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.daemon import Daemon
from audience_sync.db import engines
from audience_sync.queue import destination
from tests.daemon.conftest import take_due, utc
from tests.queue.conftest import Queue
from tests.waiting import until

EVERY_MINUTE = schedule.parse_schedule("every 1 minute", "UTC")
START = utc("2026-03-15 00:00")
LONGEST_BACKOFF = dt.timedelta(minutes=15)


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


def test_deliveries_do_not_wait_for_runs_that_never_end(life, monkeypatch):
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
    queue.add("ann", {"plan": "pro"}, next_attempt_at=life.clock.now() + LONGEST_BACKOFF, attempt_count=1)
    queue.track("ann", "Signed Up")
    life.daemon.deliver()
    assert life.sandbox.state.events == []

    life.clock.moment += dt.timedelta(seconds=3)
    queue.track("bob", "Signed Up")
    life.daemon.deliver()

    assert [event["user_id"] for event in life.sandbox.state.events] == ["bob"]


def test_a_daemon_whose_deliveries_all_wait_does_not_begin_to_deliver_each_second(life, monkeypatch):
    queue = Queue(life.daemon.app.engine, life.clock)
    queue.add("ann", {"plan": "pro"}, next_attempt_at=life.clock.now() + LONGEST_BACKOFF, attempt_count=1)
    queue.track("ann", "Signed Up")
    for _ in range(2):
        life.daemon.deliver()
        life.clock.moment += dt.timedelta(seconds=3)
    started = []
    monkeypatch.setattr(App, "deliver", lambda *_, **__: started.append(1))

    life.daemon.deliver()

    assert started == []
