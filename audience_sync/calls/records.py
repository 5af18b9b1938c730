"""Storage of calls and of their deliveries; a few statements store any number of calls.

profiles.py stores the traits of users and companies. Next: queue/deliveries.py.
"""

import datetime as dt
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

import sqlalchemy as sa

from audience_sync.calls import profiles
from audience_sync.calls.mappings import Decision, Outgoing
from audience_sync.calls.model import Call, CallType, PreparedCall, PreparedDelivery, Receipt
from audience_sync.calls.validation import CLOCK_TOLERANCE, FUTURE, OBJECTS
from audience_sync.db import rows, tables
from audience_sync.db.dialects import is_among, is_sqlite, now, sql
from audience_sync.db.engines import to_json
from audience_sync.queue.deliveries import CallDelivery, enqueue_calls
from audience_sync.retention import erasure
from audience_sync.userpilot.payloads import COMPANY, Action
from audience_sync.userpilot.properties import has_nested, property_names, with_gone

FORGOTTEN = "the user was forgotten"
# The fields with their own columns.
_FIELDS = {"type", "messageId", "userId", "anonymousId", "groupId", "event", "timestamp"}
_COLUMNS = (
    "message_id", "type", "user_id", "anonymous_id", "group_id", "event", "body", "timestamp", "reason", "left_out",
    "corrected",
)  # fmt: skip
_column_values = attrgetter(*_COLUMNS)


def prepare_call(call: Call, decision: Decision, *, flatten: bool = True) -> PreparedCall:
    """Convert a call to the form in which it is stored. `flatten`: whether nested traits are flattened for Userpilot."""
    body = {
        name: value
        for name, value in call.document.items()
        if name not in _FIELDS and value is not None and not (name in OBJECTS and not value)
    }
    left_out = call.left_out | decision.left_out
    corrections = (*call.corrections, *decision.corrections)
    is_track = call.type is CallType.TRACK
    has_traits = call.type in (CallType.IDENTIFY, CallType.GROUP) and call.traits
    return PreparedCall(
        message_id=call.message_id,
        type=call.type.value,
        user_id=call.user_id,
        anonymous_id=call.anonymous_id,
        group_id=call.group_id,
        event=call.event,
        body=to_json(body),
        timestamp=rows.moment(call.timestamp),
        reason=decision.reason,
        left_out=to_json(left_out) if left_out else None,
        corrected=to_json(list(corrections)) if corrections else None,
        deliveries=tuple(_prepared(outgoing, flatten=flatten) for outgoing in decision.outgoing),
        properties=to_json(call.properties) if is_track else "",
        context=to_json(call.context) if is_track else "",
        traits=to_json(call.traits) if has_traits else "",
        left_out_names=tuple(left_out),
        corrections=corrections,
    )


def _prepared(outgoing: Outgoing, *, flatten: bool) -> PreparedDelivery:
    if outgoing.action is Action.TRACK:
        return PreparedDelivery(outgoing.action.value, outgoing.subject_id, to_json(outgoing.body))
    body, names = outgoing.body, None
    if has_nested(body):
        if flatten:
            names = property_names({name: value for name, value in body.items() if name != COMPANY})
        body = {name: with_gone(value, ()) for name, value in body.items()}
    return PreparedDelivery(
        outgoing.action.value,
        outgoing.subject_id,
        to_json(body),
        has_traits=len(body) > (COMPANY in body),
        is_flattened=flatten,
        names=names,
    )


def not_after(call: PreparedCall, received_at: dt.datetime) -> PreparedCall:
    """Return the call, with a corrected timestamp if the clock of the machine that prepared it was ahead."""
    latest = rows.moment(received_at)
    if call.timestamp <= latest:
        return call
    if call.timestamp <= rows.moment(received_at + CLOCK_TOLERANCE):
        return call._replace(timestamp=latest)
    corrections = (*call.corrections, FUTURE)
    return call._replace(timestamp=latest, corrections=corrections, corrected=to_json(list(corrections)))


def save_calls(
    connection: sa.Connection,
    prepared: Sequence[PreparedCall],
    *,
    received_at: dt.datetime,
    fingerprint: str | None,
    user_by_user: bool = False,
) -> list[Receipt]:
    """Store calls, update profiles and companies, and queue the deliveries; skip calls whose message id is known.

    Only the message id, type and times of an erased user's call are stored. `user_by_user` queues the deliveries sorted
    by user, so that only the deliveries of each user are in the order of the calls. This stores large batches faster,
    because each page of an index by user is written once.
    """
    erasure.block_erasures(connection)
    unique: dict[str, PreparedCall] = {}
    for call in prepared:
        unique.setdefault(call.message_id, call)
    users = (user for call in unique.values() for user in _users(call))
    if erased := erasure.forgotten_among(connection, users, received_at):
        unique = {message_id: _without_users(call, erased) for message_id, call in unique.items()}
    new_ids = _insert_calls(connection, unique, received_at)
    new = {new_ids[message_id]: call for message_id, call in unique.items() if message_id in new_ids}
    changed = profiles.update_profiles(connection, new, received_at, latest=max(received_at, now(connection)))
    rows.update(
        connection,
        tables.calls,
        ("call_id", "left_out", "corrected"),
        [
            (call_id, call.left_out, call.corrected)
            for call_id, call in changed.items()
            if call.left_out != new[call_id].left_out
        ],
    )
    new |= changed
    queued = [
        CallDelivery(delivery.action, delivery.subject_id, delivery.body, call_id, call.timestamp)
        for call_id, call in new.items()
        for delivery in call.deliveries
    ]
    enqueue_calls(connection, _by_user(queued) if user_by_user else queued, fingerprint, received_at)
    known_ids = _call_ids(
        connection, [call.message_id for call in prepared if call.message_id not in new_ids]
    )
    receipts = []
    for call in prepared:
        message_id = call.message_id
        if (call_id := new_ids.pop(message_id, None)) is None:
            receipts.append(Receipt(known_ids[message_id], message_id, is_repeat=True))
        else:
            known_ids[message_id] = call_id
            stored = new[call_id]
            receipts.append(
                Receipt(
                    call_id,
                    message_id,
                    stored.ignored,
                    stored.left_out_names,
                    reason=stored.reason,
                    corrected=stored.corrections,
                )
            )
    return receipts


def _users(call: PreparedCall) -> Iterator[str]:
    """Return the user ids in a call and in its deliveries."""
    yield from (user_id for user_id in (call.user_id, call.anonymous_id) if user_id is not None)
    yield from (delivery.subject_id for delivery in call.deliveries if delivery.action != Action.COMPANY)


def _without_users(call: PreparedCall, erased: Collection[str]) -> PreparedCall:
    if call.subject_id in erased:
        return call._replace(
            user_id=None,
            anonymous_id=None,
            group_id=None,
            event=None,
            body="{}",
            reason=FORGOTTEN,
            left_out=None,
            corrected=None,
            deliveries=(),
        )
    if call.anonymous_id in erased:
        call = call._replace(anonymous_id=None)
    deliveries = tuple(
        delivery
        for delivery in call.deliveries
        if delivery.action == Action.COMPANY or delivery.subject_id not in erased
    )
    if len(deliveries) == len(call.deliveries):
        return call
    return call._replace(deliveries=deliveries, reason=call.reason or FORGOTTEN)


def _insert_calls(
    connection: sa.Connection, prepared: Mapping[str, PreparedCall], received_at: dt.datetime
) -> dict[str, int]:
    """Insert the calls whose message id is new; return the new call ids by message id."""
    call_ids = dict(zip(prepared, _free_ids(connection, len(prepared)), strict=True))
    received = rows.moment(received_at)
    call_rows = [
        (*_column_values(call), call_ids[message_id], "accepted" if call.deliveries else "ignored", received)
        for message_id, call in sorted(prepared.items())  # all processes lock message ids in this order
    ]
    inserted_count = rows.insert(
        connection,
        tables.calls,
        (*_COLUMNS, "call_id", "status", "received_at"),
        call_rows,
        "ON CONFLICT (message_id) DO NOTHING",
    )
    if inserted_count == len(call_rows):
        return call_ids
    stored_ids = _call_ids(connection, list(prepared))
    return {
        message_id: call_id for message_id, call_id in call_ids.items() if stored_ids[message_id] == call_id
    }


def _free_ids(connection: sa.Connection, count: int) -> Iterable[int]:
    """Return ids for new calls, ascending."""
    if is_sqlite(connection):  # no other connection writes during this write transaction
        last = sql(connection, "SELECT max(seq) FROM sqlite_sequence WHERE name = 'calls'").scalar() or 0
        return range(last + 1, last + 1 + count)
    ids: Sequence[int] | None = sql(
        connection,
        "SELECT array_agg(nextval((SELECT CAST(pg_get_serial_sequence(:calls, 'call_id') AS regclass)))) "
        "FROM generate_series(1, :count)",
        calls=f"{connection.get_execution_options()['our']}calls",
        count=count,
    ).scalar_one()
    return sorted(ids or ())


def _call_ids(connection: sa.Connection, message_ids: Sequence[str]) -> dict[str, int]:
    if not message_ids:
        return {}
    calls = tables.calls
    stored = connection.execute(
        sa.select(calls.c.message_id, calls.c.call_id).where(
            is_among(connection, calls.c.message_id, message_ids)
        )
    )
    return {row.message_id: int(row.call_id) for row in stored}


def _by_user(deliveries: Sequence[CallDelivery]) -> list[CallDelivery]:
    """Sort by user, after companies and their users in the order of the calls, because a company precedes its users."""
    group_calls = {delivery.call_id for delivery in deliveries if delivery.action == Action.COMPANY}
    linked = {delivery.subject_id for delivery in deliveries if delivery.call_id in group_calls}
    return sorted(
        deliveries, key=lambda delivery: "" if delivery.subject_id in linked else delivery.subject_id
    )
