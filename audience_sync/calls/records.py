"""Storing calls: the rows of `calls`, `profiles`, `companies` and `events`, and the deliveries that they queue.

Many calls are stored by a few set-based statements. Next: queue/deliveries.py, which owns the queue.
"""

import datetime as dt
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from audience_sync.calls.mappings import Decision
from audience_sync.calls.model import Call, CallType
from audience_sync.db import rows, tables
from audience_sync.db.dialects import is_among, is_sqlite, sql
from audience_sync.db.engines import from_json, to_json
from audience_sync.retention import erasure
from audience_sync.userpilot.payloads import Action

FORGOTTEN = "the user was forgotten"
_COLUMNS = {"type", "messageId", "userId", "anonymousId", "groupId", "event", "timestamp"}  # not in the body


class PreparedDelivery(NamedTuple):
    """A delivery of a call; `body` is JSON text."""

    action: str
    subject_id: str
    body: str


class PreparedCall(NamedTuple):
    """A call and its deliveries as text, ready to be written."""

    message_id: str
    type: str
    user_id: str | None
    anonymous_id: str | None
    group_id: str | None
    event: str | None
    body: str
    timestamp: str
    reason: str | None
    left_out: str | None
    deliveries: tuple[PreparedDelivery, ...]
    properties: str
    context: str
    traits: str  # of an identify or group call that has any
    left_out_names: tuple[str, ...]

    @property
    def subject_id(self) -> str | None:
        return self.user_id if self.user_id is not None else self.anonymous_id

    @property
    def ignored(self) -> str | None:
        return None if self.deliveries else self.reason


@dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome of a call: accepted for delivery, ignored for a reason, or a repeat, which changed nothing.

    `reason` says why the call, or a part of it, is not delivered; `left_out` names traits that are not sent.
    """

    call_id: int
    message_id: str
    ignored: str | None = None
    left_out: tuple[str, ...] = ()
    is_repeat: bool = False
    reason: str | None = None


class _CallRow(NamedTuple):
    call_id: int
    message_id: str
    type: str
    user_id: str | None
    anonymous_id: str | None
    group_id: str | None
    event: str | None
    body: str
    timestamp: str
    reason: str | None
    left_out: str | None
    status: str
    received_at: str


class _EventRow(NamedTuple):
    call_id: int
    user_id: str
    name: str | None
    properties: str
    context: str
    timestamp: str
    received_at: str


class _MembershipRow(NamedTuple):
    """The company that a user is in."""

    user_id: str
    company_id: str | None
    company_at: str


def prepare_call(call: Call, decision: Decision) -> PreparedCall:
    body = {name: value for name, value in call.document.items() if value and name not in _COLUMNS}
    is_track = call.type is CallType.TRACK
    has_traits = call.type in {CallType.IDENTIFY, CallType.GROUP} and call.traits
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
        left_out=to_json(decision.left_out) if decision.left_out else None,
        deliveries=tuple(
            PreparedDelivery(outgoing.action.value, outgoing.subject_id, to_json(outgoing.body))
            for outgoing in decision.outgoing
        ),
        properties=to_json(call.properties) if is_track else "",
        context=to_json(call.context) if is_track else "",
        traits=to_json(call.traits) if has_traits else "",
        left_out_names=tuple(decision.left_out),
    )


def save_calls(
    connection: sa.Connection,
    prepared: Sequence[PreparedCall],
    *,
    received_at: dt.datetime,
    fingerprint: str | None,
    user_by_user: bool = False,
) -> list[Receipt]:
    """Store calls and what they say of users and companies, and queue their deliveries; a known message id is skipped.

    Of an erased user's call only the message id, type and times are stored.
    `user_by_user`: queue the deliveries sorted by user, and only each user's own in the order of the calls. A database
    stores many at once sooner that way, as it touches each page of an index by user once.
    """
    erasure.keep_out_erasures(connection)
    unique: dict[str, PreparedCall] = {}
    for call in prepared:
        unique.setdefault(call.message_id, call)
    users = (user for call in unique.values() for user in _users(call))
    if erased := erasure.forgotten_among(connection, users, received_at):
        unique = {message_id: _without_users(call, erased) for message_id, call in unique.items()}
    new_ids = _insert_calls(connection, unique, received_at)
    new = {new_ids[message_id]: call for message_id, call in unique.items() if message_id in new_ids}
    _update_subjects(connection, new, received_at)
    _enqueue(connection, new, received_at, fingerprint, user_by_user=user_by_user)
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
                Receipt(call_id, message_id, stored.ignored, call.left_out_names, reason=stored.reason)
            )
    return receipts


def _users(call: PreparedCall) -> Iterator[str]:
    """User ids in a call and in its deliveries."""
    if call.user_id is not None:
        yield call.user_id
    if call.anonymous_id is not None:
        yield call.anonymous_id
    yield from (each.subject_id for each in call.deliveries if each.action != Action.COMPANY)


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
            deliveries=(),
        )
    if call.anonymous_id in erased:
        call = call._replace(anonymous_id=None)
    deliveries = tuple(
        each for each in call.deliveries if each.action == Action.COMPANY or each.subject_id not in erased
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
        _CallRow(
            call_id=call_ids[message_id],
            message_id=message_id,
            type=call.type,
            user_id=call.user_id,
            anonymous_id=call.anonymous_id,
            group_id=call.group_id,
            event=call.event,
            body=call.body,
            timestamp=call.timestamp,
            reason=call.reason,
            left_out=call.left_out,
            status="accepted" if call.deliveries else "ignored",
            received_at=received,
        )
        for message_id, call in sorted(
            prepared.items()
        )  # one order: processes wait for each other's message ids
    ]
    inserted_count = rows.insert(
        connection, tables.calls, _CallRow._fields, call_rows, "ON CONFLICT (message_id) DO NOTHING"
    )
    if inserted_count == len(call_rows):
        return call_ids
    stored_ids = _call_ids(connection, list(prepared))
    return {
        message_id: call_id for message_id, call_id in call_ids.items() if stored_ids[message_id] == call_id
    }


def _free_ids(connection: sa.Connection, count: int) -> Iterable[int]:
    """Return ids for new calls, ascending."""
    if is_sqlite(connection):  # in a write transaction: no other connection writes now
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


class _CallDelivery(NamedTuple):
    action: str
    subject_id: str
    body: str
    call_id: int
    value_at: str


def _enqueue(
    connection: sa.Connection,
    calls: Mapping[int, PreparedCall],
    now: dt.datetime,
    fingerprint: str | None,
    *,
    user_by_user: bool,
) -> None:
    deliveries = [
        _CallDelivery(each.action, each.subject_id, each.body, call_id, call.timestamp)
        for call_id, call in calls.items()
        for each in call.deliveries
    ]
    if user_by_user:
        deliveries = _by_user(deliveries)
    at = rows.moment(now)
    rows.insert(
        connection,
        tables.deliveries,
        (*_CallDelivery._fields, "class", "fingerprint", "status", "created_at", "next_attempt_at"),
        [(*delivery, "call", fingerprint, "pending", at, at) for delivery in deliveries],
    )


def _by_user(deliveries: Sequence[_CallDelivery]) -> list[_CallDelivery]:
    """Sort by user; companies and their users come first, in the order of the calls: a company precedes its users."""
    group_calls = {delivery.call_id for delivery in deliveries if delivery.action == Action.COMPANY}
    linked = {delivery.subject_id for delivery in deliveries if delivery.call_id in group_calls}
    return sorted(deliveries, key=lambda each: "" if each.subject_id in linked else each.subject_id)


# Profiles, companies and events


def _update_subjects(
    connection: sa.Connection, new: Mapping[int, PreparedCall], received_at: dt.datetime
) -> None:
    users, companies = _Observations(), _Observations()
    memberships: dict[str, _MembershipRow] = {}
    event_rows: list[_EventRow] = []
    received = rows.moment(received_at)
    for call_id, call in new.items():
        user = call.subject_id
        if user is None:  # erased
            continue
        users.add(user, call.timestamp, call.traits if call.type == CallType.IDENTIFY else "")
        if call.type == CallType.GROUP and call.group_id is not None:
            companies.add(call.group_id, call.timestamp, call.traits)
            if user not in memberships or memberships[user].company_at <= call.timestamp:
                memberships[user] = _MembershipRow(user, call.group_id, call.timestamp)
        elif call.type == CallType.TRACK:
            event_rows.append(
                _EventRow(
                    call_id=call_id,
                    user_id=user,
                    name=call.event,
                    properties=call.properties,
                    context=call.context,
                    timestamp=call.timestamp,
                    received_at=received,
                )
            )
    _merge(connection, tables.profiles, tables.profiles.c.user_id, users)
    _merge(connection, tables.companies, tables.companies.c.company_id, companies)
    rows.update(
        connection,
        tables.profiles,
        _MembershipRow._fields,
        [row for _, row in sorted(memberships.items())],
        "(t.company_at IS NULL OR t.company_at <= {company_at})",
    )
    rows.insert(connection, tables.events, _EventRow._fields, event_rows)


class _Observation(NamedTuple):
    at: str
    traits: str


class _Observations:
    """Times and traits that calls gave of users, or of companies, by id."""

    def __init__(self) -> None:
        self.times: dict[str, list[str]] = {}
        self.traits: dict[str, list[_Observation]] = {}

    def add(self, subject: str, at: str, traits: str) -> None:
        self.times.setdefault(subject, []).append(at)
        if traits:
            self.traits.setdefault(subject, []).append(_Observation(at, traits))


def _merge(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], observations: _Observations
) -> None:
    """Merge traits into rows: the newest timestamp of each wins; a null removes the trait and leaves its time."""
    rows.insert(  # which also locks existing rows
        connection,
        table,
        (key.name, "traits", "trait_times", "first_seen_at", "last_seen_at"),
        [
            (subject, "{}", "{}", min(times), max(times))
            for subject, times in sorted(observations.times.items())
        ],
        f"ON CONFLICT ({key.name}) DO UPDATE SET {_SEEN}",
    )
    if not observations.traits:
        return
    stored = connection.execute(
        sa.select(key.label("subject"), table.c.traits, table.c.trait_times).where(
            is_among(connection, key, observations.traits)
        )
    )
    merged = [_merged(row, observations.traits[row.subject]) for row in stored]
    rows.update(connection, table, (key.name, "traits", "trait_times"), merged)


_SEEN = """first_seen_at = CASE WHEN excluded.first_seen_at < t.first_seen_at THEN excluded.first_seen_at
ELSE t.first_seen_at END, last_seen_at = CASE WHEN excluded.last_seen_at > t.last_seen_at
THEN excluded.last_seen_at ELSE t.last_seen_at END"""


def _merged(row: sa.Row[Any], observations: Sequence[_Observation]) -> rows.Row:
    traits, times = row.traits, row.trait_times
    for observation in sorted(observations, key=lambda each: each.at):
        stamp = f"{observation.at.replace(' ', 'T')}+00:00"
        for name, value in from_json(observation.traits).items():
            if times.get(name, "") <= stamp:
                times[name] = stamp
                traits[name] = value
                if value is None:
                    del traits[name]
    return row.subject, to_json(traits), to_json(times)
