"""The database's clock, which every process follows, whatever the clock of its machine shows."""

import datetime as dt

import pytest
import sqlalchemy as sa

from audience_sync import intake
from audience_sync.app import open_app
from audience_sync.audiences import runs
from audience_sync.clock import DatabaseClock
from audience_sync.db import dialects, engines, tables
from audience_sync.queue import backlog, deliveries

HOUR = dt.timedelta(hours=1)
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class MachineClock:
    """A machine's two clocks, which tests set apart from each other."""

    def __init__(self):
        self.wall, self.seconds = START, 0.0

    def now(self):
        return self.wall

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.wall, self.seconds = self.wall + dt.timedelta(seconds=seconds), self.seconds + seconds


def test_the_database_s_clock_runs_on_between_two_readings():
    machine, readings = MachineClock(), [START + HOUR]
    clock = DatabaseClock(machine, readings.pop)
    clock.sleep(7)
    assert clock.now() == START + HOUR + dt.timedelta(seconds=7)
    assert clock.monotonic() == 7


@pytest.mark.parametrize(("set_by", "passed"), [(-HOUR, 5), (HOUR, 5), (3 * HOUR, 0)])
def test_the_database_s_clock_is_read_again_when_the_machine_s_was_set(set_by, passed):
    machine, readings = MachineClock(), [START + HOUR, START]
    clock = DatabaseClock(machine, readings.pop)
    machine.sleep(passed)
    machine.wall += set_by
    readings.append(START + 2 * HOUR)
    assert clock.now() == START + 2 * HOUR
    machine.sleep(1)
    assert clock.now() == START + 2 * HOUR + dt.timedelta(seconds=1)


def test_the_database_s_clock_runs_on_while_the_database_is_away():
    machine, readings = MachineClock(), [None, START]
    clock = DatabaseClock(machine, readings.pop)
    machine.sleep(5)
    machine.wall += HOUR
    assert clock.now() == START + dt.timedelta(seconds=5)


@pytest.fixture
def project(tmp_path, url):
    path = tmp_path / "audience_sync.toml"
    path.write_text(f"""
[database]
url = "{url}"
[destination]
api_key = "k"
[[audiences]]
name = "In"
sql = "SELECT 'ann' AS user_id"
""")
    return path


@pytest.mark.parametrize("ahead", [-HOUR, HOUR])
def test_calls_and_runs_are_recorded_by_the_database_s_clock(project, backend, monkeypatch, ahead):
    now = dt.datetime.now(dt.UTC)
    if backend == "postgresql":  # whose clock is not this machine's
        now += ahead
        monkeypatch.setattr(dialects, "now", lambda _: now)
    with open_app(project) as app:
        [definition] = app.definitions()
        intake.identify(app, "ann", {"plan": "pro"})
        app.sync(definition, runs.resolve_as_of(app.engine, [definition], None, app.clock.now())["in"])
        with engines.read(app.engine) as connection:
            queued = connection.execute(tables.deliveries.select()).all()
            [run] = connection.execute(tables.runs.select()).all()
    assert [row.body for row in queued] == [{"plan": "pro"}, {"in": True}]
    moments = [getattr(row, name) for row in queued for name in ("value_at", "created_at", "next_attempt_at")]
    assert all(abs(moment - now) < HOUR / 2 for moment in [*moments, run.as_of, run.finished_at])


def test_changes_that_were_queued_or_retried_while_a_clock_was_ahead_are_due(engine):
    row = {"action": "identify", "subject_id": "ann", "body": {"in": True}, "status": "pending", "run_id": 1}
    ahead = {"definition_id": 1, "value_at": START, "created_at": START, "next_attempt_at": START + HOUR}
    queued = [row | ahead | {"class": name, "attempt_count": 0} for name in ("change", "push")]
    with engines.write(engine) as connection:
        retried = queued[0] | {"attempt_count": 1}
        waits = retried | {"next_attempt_at": START + HOUR / 4}  # the longest time between two attempts
        connection.execute(tables.deliveries.insert(), [*queued, retried, waits])
        assert sorted(backlog.scheduled_ahead(connection, START)) == [1, 2, 3]
        assert deliveries.bring_forward(connection, START) == 3
        assert backlog.scheduled_ahead(connection, START) == []


SENT = {
    "accepted": {"status": "accepted", "settled_at": START, "request_id": 1, "attempt_count": 1},
    "pending": {"status": "pending", "next_attempt_at": START + HOUR / 4, "attempt_count": 1},
    "sending": {"status": "sending", "request_id": 1, "attempt_count": 1},
}


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("origin", [{"run_id": 1, "definition_id": 1}, {"call_id": 1}])
def test_a_value_that_was_queued_while_a_clock_was_ahead_does_not_fall_behind_one_that_was_sent(
    engine, origin, sent
):
    row = {"action": "identify", "subject_id": "ann", "body": {"in": True}, "class": "change"} | origin
    row |= {"value_at": START + HOUR, "created_at": START, "next_attempt_at": START + HOUR}
    waiting = {"status": "pending", "body": {"in": False}, "attempt_count": 0}
    with engines.write(engine) as connection:
        for values in (SENT[sent], waiting, waiting | {"subject_id": "ben"}):
            connection.execute(tables.deliveries.insert(), row | values)
        assert deliveries.bring_forward(connection, START) == 2
        queued = connection.execute(sa.select(tables.deliveries).order_by(tables.deliveries.c.delivery_id))
        [_, later, of_ben] = queued.all()
    assert (later.value_at, later.next_attempt_at) == (START + HOUR, START)
    assert of_ben.value_at == (START if "call_id" in origin else START + HOUR)
