"""Erased users stay erased, whichever calls arrive meanwhile, by any entry point."""

import datetime as dt
import threading

import pytest
import sqlalchemy as sa

from audience_sync.calls import mappings, records, validation
from audience_sync.db import dialects, engines
from audience_sync.retention import erasure

NOON = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
NOTIFY_OWNER = mappings.compile_mapping(
    "Owners", "identifyUser", 'event = "Shared"',
    {"userId": {"@path": "$.properties.owner"}, "traits": {"seen": True}},
)  # fmt: skip
SHARED = {
    "type": "track",
    "event": "Shared",
    "userId": "ann",
    "messageId": "m1",
    "properties": {"owner": "bob"},
}


def prepared(*raws):
    every = (*mappings.PRESETS, NOTIFY_OWNER)
    parsed = [validation.parse_call(raw, received_at=NOON, new_id=lambda: "none") for raw in raws]
    return [records.prepare_call(call, mappings.decide(call, every, reserved_keys=())) for call in parsed]


def save(engine, *raws):
    with engines.write(engine) as connection:
        return records.save_calls(connection, prepared(*raws), received_at=NOON, fingerprint=None)


def forget(engine, user_id):
    with engines.write(engine) as connection:
        erasure.forget(connection, user_id, NOON)


@pytest.fixture
def rows(engine):
    def read(columns, table):
        with engines.read(engine) as connection:
            return dialects.sql(connection, f"SELECT {columns} FROM {{our}}{table} ORDER BY 1").all()

    return read


def test_a_mapping_sends_nothing_about_an_erased_user(engine, rows):
    forget(engine, "bob")
    (saved,) = save(engine, SHARED)
    assert saved.reason == "the user was forgotten"
    assert rows("subject_id, action", "deliveries") == [("ann", "track")]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_no_byte_of_an_erased_user_is_left_in_sqlites_file(engine, tmp_path):
    engine.dispose()

    @sa.event.listens_for(engine, "connect", insert=True)
    def as_a_library_that_leaves_deleted_bytes(connection, _record):
        connection.execute("PRAGMA secure_delete = OFF")

    save(engine, *(SHARED | {"userId": "zoe-of-x", "messageId": f"m{number}"} for number in range(50)))
    forget(engine, "zoe-of-x")
    with engines.read(engine) as connection:
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar_one() == 1
    engine.dispose()
    assert not [file for file in tmp_path.iterdir() if b"zoe-of-x" in file.read_bytes()]


def test_an_erased_anonymous_id_is_not_stored_with_another_users_call(engine, rows):
    forget(engine, "a1")
    save(engine, SHARED | {"anonymousId": "a1"})
    assert rows("user_id, anonymous_id", "calls") == [("ann", None)]


def test_erasing_an_anonymous_id_keeps_the_calls_of_the_user(engine, rows):
    call = SHARED | {"anonymousId": "a1"}
    save(engine, call, {"type": "identify", "anonymousId": "a1", "messageId": "m2"})
    forget(engine, "a1")
    assert rows("message_id, anonymous_id", "calls") == [("m1", None)]
    assert save(engine, call)[0].is_repeat
    assert len(rows("call_id", "events")) == 1


def test_a_user_who_is_erased_while_calls_arrive_is_erased_with_them(engine, rows):
    erasing = threading.Thread(target=forget, args=(engine, "ann"))
    with engines.write(engine) as connection:
        records.save_calls(connection, prepared(SHARED), received_at=NOON, fingerprint=None)
        erasing.start()
        erasing.join(0.5)
        assert erasing.is_alive(), "it waits for the calls that are being stored"
    erasing.join(30)
    assert rows("user_id", "profiles") == rows("message_id", "calls") == []
    assert rows("subject_id", "deliveries") == [("bob",)]


def test_ids_follow_the_order_of_arrival(engine, rows):
    save(engine, *(SHARED | {"messageId": each} for each in "zma"))
    assert [message_id for _, message_id in rows("call_id, message_id", "calls")] == ["z", "m", "a"]
