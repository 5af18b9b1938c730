"""The writer: calls of many requests in one transaction, and a batch that makes it fail."""

import pytest
import sqlalchemy as sa

from audience_sync import intake
from audience_sync.calls import mappings, records
from audience_sync.calls.model import Call, CallType
from audience_sync.db import dialects, engines
from audience_sync.errors import DatabaseError
from audience_sync.intake.writer import Writer


@pytest.fixture
def app(make_app):
    return make_app()


def call(app, message_id):
    raw = {"type": "identify", "userId": f"user of {message_id}", "messageId": message_id}
    return intake.Preparer(app.settings).prepare(raw, received_at=app.clock.now())


def broken(app):
    """A call that no database takes: an event without its name."""
    parsed = Call(CallType.TRACK, "broken", "bob", None, None, None, app.clock.now(), {"type": "track"})
    return records.prepare_call(parsed, mappings.decide(parsed, mappings.PRESETS, reserved_keys=()))


def queued(app):
    """The message ids of the deliveries, in their order."""
    with engines.read(app.engine) as connection:
        statement = (
            "SELECT message_id FROM {our}deliveries JOIN {our}calls USING (call_id) ORDER BY delivery_id"
        )
        return list(dialects.sql(connection, statement).scalars())


def test_all_batches_are_committed_in_order_at_the_end(app):
    batches = [["m9", "m3"], ["m1"], ["m7", "m2", "m8"]]
    with Writer(app) as writer:
        futures = [writer.submit([call(app, each) for each in batch]) for batch in batches]
    assert not writer.is_alive
    assert [[each.message_id for each in future.result(0)] for future in futures] == batches
    assert queued(app) == ["m9", "m3", "m1", "m7", "m2", "m8"]


def test_waiting_batches_share_a_transaction_and_a_repeat_in_it_is_reported(app):
    writer = Writer(app)
    first, second = [writer.submit([call(app, "m1"), call(app, each)]) for each in ("m2", "m3")]
    assert writer.waiting_count == 4
    with writer:
        pass
    assert [each.is_repeat for each in first.result(0)] == [False, False]
    assert [each.is_repeat for each in second.result(0)] == [True, False]
    with engines.read(app.engine) as connection:
        assert len(dialects.sql(connection, "SELECT DISTINCT received_at FROM {our}calls").all()) == 1


def test_a_batch_that_breaks_the_transaction_fails_alone(app):
    writer = Writer(app)  # all of it waits before the first is committed
    before = writer.submit([call(app, "m1")])
    bad = writer.submit([call(app, "m2"), broken(app)])
    after = writer.submit([call(app, "m3")])
    with writer:
        with pytest.raises(DatabaseError, match="The transaction was rolled back"):
            bad.result(20)
        assert [each.message_id for each in before.result(20) + after.result(20)] == ["m1", "m3"]
        assert writer.submit([call(app, "m4")]).result(20)[0].message_id == "m4"
    assert queued(app) == ["m1", "m3", "m4"]


def test_a_submitted_batch_cannot_be_cancelled(app):
    with Writer(app) as writer:
        assert not writer.submit([call(app, "m1")]).cancel()
        writer.submit([call(app, "m2")])
    assert queued(app) == ["m1", "m2"]


def test_an_unusable_database_is_not_tried_for_each_batch(app, monkeypatch):
    asked = []

    def keep(_app, calls):
        asked.append(len(calls))
        raise DatabaseError("locked") from sa.exc.OperationalError("BEGIN", {}, Exception("locked"))

    writer = Writer(app)
    waiting = [writer.submit([call(app, f"m{number}")]) for number in range(5)]
    monkeypatch.setattr(intake, "save", keep)
    with writer:
        for each in waiting:
            with pytest.raises(DatabaseError, match="locked"):
                each.result(20)
    assert asked == [5]
