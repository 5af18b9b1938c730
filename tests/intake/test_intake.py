"""The Python entry point: a call in the queue and in the tables that definitions read."""

import datetime as dt
import time
from dataclasses import dataclass

import msgspec
import pytest
import sqlalchemy as sa

from audience_sync import history, intake, settings
from audience_sync.app import App
from audience_sync.db import dialects, engines, tables
from audience_sync.errors import CallError
from audience_sync.queue import backlog, deliveries
from audience_sync.retention import erasure
from tests.queue.conftest import START, HandClock

NOON = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)


@pytest.fixture
def app(url, tmp_path):
    path = tmp_path / "audience_sync.toml"
    path.write_text(
        f'[database]\nurl = "{url}"\n[destination]\napi_key = "k"\n'
        '[[audiences]]\nname = "VIPs"\nsql = "SELECT user_id FROM people"\n'
    )
    loaded = settings.load(path, {})
    opened = App(loaded, engines.open_own(url, "audience_sync"))
    yield opened
    opened.close()


def queued(app):
    with engines.read(app.engine) as connection:
        return [
            (each["action"], each["subject_id"], each["body"]) for each in history.delivery_rows(connection)
        ]


def profile(app, user_id):
    with engines.read(app.engine) as connection:
        return history.user(connection, user_id)["profile"]


def test_calls_are_queued_and_update_profiles(app):
    intake.identify(app, "ann", {"plan": "pro", "createdAt": "2024-01-01"}, timestamp=NOON)
    intake.track(app, "ann", "Order Completed", {"total": 12.5}, timestamp=NOON + dt.timedelta(hours=1))
    intake.group(app, "ann", "acme", {"size": 40}, timestamp=NOON)
    assert queued(app) == [
        ("identify", "ann", {"@company": "acme"}),
        ("company", "acme", {"size": 40}),
        ("track", "ann", {"event_name": "Order Completed", "metadata": {"total": 12.5}}),
        ("identify", "ann", {"plan": "pro", "created_at": "2024-01-01"}),
    ]
    found = profile(app, "ann")
    assert found["traits"] == {"plan": "pro", "createdAt": "2024-01-01"}
    assert (found["company_id"], found["first_seen_at"]) == ("acme", NOON)
    assert found["last_seen_at"] == NOON + dt.timedelta(hours=1)
    assert [event["name"] for event in found["events"]] == ["Order Completed"]


def test_of_each_trait_the_newest_timestamp_wins_and_null_removes(app):
    intake.identify(app, "ann", {"plan": "pro", "seats": 3}, timestamp=NOON)
    intake.identify(app, "ann", {"plan": "old", "city": "Kiel"}, timestamp=NOON - dt.timedelta(days=1))
    intake.identify(app, "ann", {"seats": None}, timestamp=NOON + dt.timedelta(days=1))
    intake.identify(app, "ann", {"seats": 2}, timestamp=NOON)
    assert profile(app, "ann")["traits"] == {"plan": "pro", "city": "Kiel"}


def test_a_known_message_id_changes_nothing(app):
    first = intake.identify(app, "ann", {"plan": "pro"}, message_id="m1")
    again = intake.identify(app, "ann", {"plan": "basic"}, message_id="m1")
    assert (again.call_id, again.is_repeat, first.is_repeat) == (first.call_id, True, False)
    assert profile(app, "ann")["traits"] == {"plan": "pro"}
    assert len(queued(app)) == 1


def test_a_trait_with_a_definitions_key_is_left_out_and_recorded(app):
    intake.identify(app, "ann", {"vips": True, "plan": "pro"})
    assert queued(app) == [("identify", "ann", {"plan": "pro"})]
    with engines.read(app.engine) as connection:
        assert history.call_rows(connection, None)[0]["left_out"] == {"vips": True}


def test_an_invalid_call_stores_nothing(app):
    with pytest.raises(CallError, match="event must be a non-empty string"):
        intake.track(app, "ann", " ")
    with pytest.raises(
        CallError, match="a call has no field colour: known are message_id, timestamp, context"
    ):
        intake.identify(app, "ann", colour="red")
    assert queued(app) == []


def test_a_call_of_an_erased_user_is_stored_without_the_user(app):
    intake.identify(app, "ann", {"plan": "pro"})
    intake.track(app, "ann", "Order Completed")
    intake.group(app, "ann", "acme", {"size": 40})
    with engines.write(app.engine) as connection:
        erasure.forget(connection, "ann", app.clock.now())
    assert queued(app) == [("company", "acme", {"size": 40})]
    assert profile(app, "ann") is None
    receipt = intake.identify(app, "ann", {"email": "ann@example.com"}, message_id="m2")
    assert receipt.ignored == "the user was forgotten"
    with engines.read(app.engine) as connection:
        (kept,) = history.call_rows(connection, None)
        assert (kept["user_id"], kept["body"], kept["status"]) == (None, {}, "ignored")
        for table in ("calls", "events", "profiles", "deliveries", "forgotten"):
            rows = dialects.sql(connection, f"SELECT * FROM {{our}}{table}").all()
            assert "ann" not in str(rows)
    with engines.write(app.engine) as connection:
        erasure.allow_return(connection, "ann")
    assert intake.identify(app, "ann").ignored == "the user was forgotten"  # until the next 02:00


@pytest.mark.parametrize(
    ("asked", "done"),
    [
        (dt.datetime(2026, 5, 1, 1, 59, 59, tzinfo=dt.UTC), dt.datetime(2026, 5, 1, 2, tzinfo=dt.UTC)),
        (dt.datetime(2026, 5, 1, 2, tzinfo=dt.UTC), dt.datetime(2026, 5, 2, 2, tzinfo=dt.UTC)),
        (dt.datetime(2026, 12, 31, 23, tzinfo=dt.UTC), dt.datetime(2027, 1, 1, 2, tzinfo=dt.UTC)),
    ],
)
def test_deletions_are_carried_out_at_two_o_clock(asked, done):
    assert erasure.next_deletions(asked) == done


@dataclass
class ClockAhead:
    """The clock of a machine that is ahead of the database's, or behind it."""

    ahead: dt.timedelta = dt.timedelta(minutes=30)
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def now(self):
        return dt.datetime.now(dt.UTC) + self.ahead


def test_calls_that_came_while_the_clock_was_ahead_do_not_wait(app):
    app.clock = ClockAhead()
    receipt = intake.identify(app, "ann", {"plan": "early"}, message_id="m1")
    assert receipt.corrected == ("timestamp lies in the future: the time of arrival is used",)
    with engines.read(app.engine) as connection:
        (call,) = history.call_rows(connection, None)
        (delivery,) = connection.execute(tables.deliveries.select()).all()
    now = dt.datetime.now(dt.UTC)
    assert call["corrected"] == list(receipt.corrected)
    assert max(call["timestamp"], call["received_at"], delivery.next_attempt_at, delivery.value_at) <= now


def test_deliveries_of_a_clock_that_was_set_back_are_due_now(app):
    app.clock = HandClock(seconds=1800)
    for plan in ("early", "second"):
        intake.identify(app, "ann", {"plan": plan})
    app.clock = HandClock()
    with engines.write(app.engine) as connection:
        assert not backlog.is_due(connection, app.clock.now())
        assert len(backlog.scheduled_ahead(connection, app.clock.now())) == 2
        assert deliveries.bring_forward(connection, app.clock.now()) == 2
        assert backlog.is_due(connection, app.clock.now())
        assert deliveries.bring_forward(connection, app.clock.now()) == 0
        moments = connection.execute(
            sa.select(tables.deliveries.c.next_attempt_at, tables.deliveries.c.value_at)
        ).all()
    assert set(moments) == {(START, START)}


def test_deliveries_are_due_for_a_process_whose_clock_is_behind_and_keep_their_order(app):
    for seconds, plan in ((1800, "second"), (1790, "early")):
        app.clock = HandClock(seconds=seconds)
        intake.identify(app, "ann", {"plan": plan})
    database_time = START + dt.timedelta(seconds=1800)
    with engines.write(app.engine) as connection:
        assert deliveries.bring_forward(connection, START, database_time) == 2
        assert deliveries.bring_forward(connection, START, database_time) == 0
        rows = connection.execute(sa.select(tables.deliveries).order_by(tables.deliveries.c.value_at)).all()
    assert [row.body["plan"] for row in rows] == ["early", "second"]
    assert {row.next_attempt_at for row in rows} == {START}


def test_a_process_whose_clock_is_behind_sends_the_newest_value(app, sandbox):
    sandbox.state.api_key = "k"
    to_sandbox = msgspec.structs.replace(app.settings.destination, endpoint=sandbox.url)
    app.settings = msgspec.structs.replace(app.settings, destination=to_sandbox)
    intake.identify(app, "ann", {"plan": "early"})
    app.deliver()
    intake.identify(app, "ann", {"plan": "newest"})
    app.clock = ClockAhead(dt.timedelta(minutes=-5))
    app.deliver()
    assert sandbox.state.users["ann"]["properties"] == {"plan": "newest"}


def test_a_trait_of_a_clock_that_was_ahead_does_not_block_newer_values(app):
    intake.identify(app, "ann", {"plan": "early"})
    ahead = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)).isoformat()
    with engines.write(app.engine) as connection:
        connection.execute(tables.profiles.update().values(trait_times={"plan": ahead}))
    intake.identify(app, "ann", {"plan": "newer"})
    assert profile(app, "ann")["traits"] == {"plan": "newer"}


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u00a0", "\u200b"])
def test_a_blank_id_is_refused(app, blank):
    for call in (
        lambda: intake.identify(app, blank),
        lambda: intake.track(app, blank, "Ordered"),
        lambda: intake.track(app, "ann", blank),
        lambda: intake.group(app, "ann", blank),
        lambda: intake.group(app, blank, "acme"),
        lambda: intake.submit(app, {"type": "alias", "userId": "ann", "previousId": blank}),
        lambda: intake.submit(app, {"type": "identify", "anonymousId": blank}),
    ):
        with pytest.raises(CallError):
            call()
    assert queued(app) == []
