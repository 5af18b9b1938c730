"""The Python entry point: a call in the queue and in the tables that definitions read."""

import datetime as dt

import pytest

from audience_sync import history, intake, settings
from audience_sync.app import App
from audience_sync.db import dialects, engines
from audience_sync.errors import CallError
from audience_sync.retention import erasure

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
