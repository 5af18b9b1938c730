"""What applications handed in, and what it told about users, companies and events."""

import datetime as dt
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from audience_sync.calls.mappings import Decision
from audience_sync.calls.model import Call, CallType
from audience_sync.db import rows
from audience_sync.db.dialects import is_among, is_sqlite, sql
from audience_sync.db.engines import from_json, to_json
from audience_sync.db.tables import calls, companies, events, profiles
from audience_sync.queue.deliveries import CallDelivery, enqueue_calls
from audience_sync.retention import erasure
from audience_sync.userpilot.payloads import Action

FORGOTTEN = "the user was forgotten"
_COLUMNS = {"type", "messageId", "userId", "anonymousId", "groupId", "event", "timestamp"}  # of the body none


class PreparedCall(NamedTuple):
    """A call and what was decided of it, as text that only needs to be written; cheap to hand to another process."""

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
    outgoing: tuple[tuple[str, str, str], ...]  # action, subject, body
    properties: str
    context: str
    traits: str  # of an identify or group call that has some
    names_left_out: tuple[str, ...]

    @property
    def subject_id(self) -> str | None:
        return self.user_id if self.user_id is not None else self.anonymous_id

    @property
    def ignored(self) -> str | None:
        return None if self.outgoing else self.reason


class SavedCall(NamedTuple):
    """What became of a call: `ignored` is why it is not delivered, `reason` why a part of it is not."""

    call_id: int
    ignored: str | None = None
    reason: str | None = None
    is_repeat: bool = False


def prepare(call: Call, decision: Decision) -> PreparedCall:
    body = {name: value for name, value in call.document.items() if value and name not in _COLUMNS}
    is_track = call.type is CallType.TRACK
    is_telling = call.type is CallType.IDENTIFY or call.type is CallType.GROUP
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
        outgoing=tuple(
            (each.action.value, each.subject_id, to_json(each.body)) for each in decision.outgoing
        ),
        properties=to_json(call.properties) if is_track else "",
        context=to_json(call.context) if is_track else "",
        traits=to_json(call.traits) if is_telling and call.traits else "",
        names_left_out=tuple(decision.left_out),
    )


def add(
    connection: sa.Connection,
    prepared: Sequence[PreparedCall],
    *,
    received_at: dt.datetime,
    fingerprint: str | None,
    user_by_user: bool = False,
) -> list[SavedCall]:
    """Keep calls, what they tell, and their deliveries; a message id that is known already changes nothing.

    `user_by_user`: the deliveries, which are all of one age, need their order within each user alone, but where a
    company comes before its user; a database takes ten thousand sooner that way, as each page of an index by user
    is touched once.
    Of a user who was erased nothing is kept but that there was a call.
    """
    erasure.keep_out_erasures(connection)
    users = (user for each in prepared for user in _users(each))
    erased = erasure.forgotten_among(connection, users, received_at)
    first: dict[str, PreparedCall] = {}
    for each in prepared:
        first.setdefault(each.message_id, each)
    if erased:
        first = {message_id: _without(each, erased) for message_id, each in first.items()}
    ids = _insert(connection, first, received_at)
    new = [(ids[message_id], each) for message_id, each in first.items() if message_id in ids]
    _learn(connection, [each for each in new if each[1].subject_id is not None], received_at)
    queued = [
        CallDelivery(*outgoing, call_id, each.timestamp)
        for call_id, each in new
        for outgoing in each.outgoing
    ]
    if user_by_user:
        group_calls = {delivery.call_id for delivery in queued if delivery.action == Action.COMPANY}
        linked = {delivery.subject_id for delivery in queued if delivery.call_id in group_calls}
        queued.sort(key=lambda delivery: "" if delivery.subject_id in linked else delivery.subject_id)
    enqueue_calls(connection, queued, fingerprint, received_at)
    known = _known(connection, [each.message_id for each in prepared if each.message_id not in ids])
    kept = []
    for each in prepared:
        if each.message_id in ids:
            known[each.message_id] = call_id = ids.pop(each.message_id)
            mine = first[each.message_id]
            kept.append(SavedCall(call_id, mine.ignored, mine.reason))
        else:
            kept.append(SavedCall(known[each.message_id], is_repeat=True))
    return kept


def _users(prepared: PreparedCall) -> Iterator[str]:
    """Whom a call is about; its mappings may tell another user something."""
    if prepared.user_id is not None:
        yield prepared.user_id
    if prepared.anonymous_id is not None:
        yield prepared.anonymous_id
    yield from (subject for action, subject, _ in prepared.outgoing if action != Action.COMPANY)


def _without(prepared: PreparedCall, erased: Collection[str]) -> PreparedCall:
    """The call without the users who were erased."""
    if prepared.subject_id in erased:
        return _erased(prepared)
    if prepared.anonymous_id in erased:
        prepared = prepared._replace(anonymous_id=None)
    outgoing = tuple(each for each in prepared.outgoing if each[0] == Action.COMPANY or each[1] not in erased)
    if len(outgoing) == len(prepared.outgoing):
        return prepared
    return prepared._replace(outgoing=outgoing, reason=prepared.reason or FORGOTTEN)


def _erased(prepared: PreparedCall) -> PreparedCall:
    """That there was such a call, and nothing about whom or what."""
    return prepared._replace(
        user_id=None, anonymous_id=None, group_id=None, event=None, body="{}", reason=FORGOTTEN, left_out=None,
        outgoing=(), properties="", context="", traits="", names_left_out=(),
    )  # fmt: skip


_CALL = (
    "call_id", "message_id", "type", "user_id", "anonymous_id", "group_id", "event", "body", "timestamp",
    "reason", "left_out", "status", "received_at",
)  # fmt: skip
_EVENT = ("call_id", "user_id", "name", "properties", "context", "timestamp", "received_at")


def _insert(
    connection: sa.Connection, prepared: Mapping[str, PreparedCall], received_at: dt.datetime
) -> dict[str, int]:
    """The ids of those that are new, by message id."""
    ids = dict(zip(prepared, _free_ids(connection, len(prepared)), strict=True))
    ordered = sorted(prepared)  # in one order: other processes may wait for the same message ids
    now = rows.moment(received_at)
    of_call = _CALL.index("left_out")  # so many of its members are columns
    written = []
    for message_id in ordered:
        each = prepared[message_id]
        status = "accepted" if each.outgoing else "ignored"
        written.append((ids[message_id], *each[:of_call], status, now))
    if rows.insert(connection, calls, _CALL, written, "ON CONFLICT (message_id) DO NOTHING") == len(written):
        return ids
    found = _known(connection, ordered)
    return {message_id: call_id for message_id, call_id in ids.items() if found[message_id] == call_id}


def _free_ids(connection: sa.Connection, count: int) -> Iterable[int]:
    """So many ids for new calls, ascending."""
    if is_sqlite(connection):  # nobody else writes now
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


def _known(connection: sa.Connection, message_ids: Sequence[str]) -> dict[str, int]:
    if not message_ids:
        return {}
    found = connection.execute(
        sa.select(calls.c.message_id, calls.c.call_id).where(
            is_among(connection, calls.c.message_id, message_ids)
        )
    )
    return {message_id: int(call_id) for message_id, call_id in found}


_Told = tuple[str, str]  # when, and which traits


def _learn(
    connection: sa.Connection, new: Sequence[tuple[int, PreparedCall]], received_at: dt.datetime
) -> None:
    users, groups = _News(), _News()
    member_of: dict[str, PreparedCall] = {}
    tracked: list[rows.Row] = []
    now = rows.moment(received_at)
    for call_id, call in new:
        subject = call.subject_id or ""
        users.add(subject, call.timestamp, call.traits if call.type == CallType.IDENTIFY else "")
        if call.type == CallType.GROUP and call.group_id is not None:
            groups.add(call.group_id, call.timestamp, call.traits)
            if subject not in member_of or member_of[subject].timestamp <= call.timestamp:
                member_of[subject] = call
        elif call.type == CallType.TRACK:
            tracked.append((call_id, subject, call.event, call.properties, call.context, call.timestamp, now))
    _merge(connection, profiles, profiles.c.user_id, users)
    _merge(connection, companies, companies.c.company_id, groups)
    rows.update(
        connection,
        profiles,
        ("user_id", "company_id", "company_at"),
        [(user, call.group_id, call.timestamp) for user, call in sorted(member_of.items())],
        "(t.company_at IS NULL OR t.company_at <= {company_at})",
    )
    rows.insert(connection, events, _EVENT, tracked)


class _News:
    """What calls told of users, or of companies: when each was seen, and traits."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self.traits: dict[str, list[_Told]] = {}

    def add(self, subject: str, at: str, traits: str) -> None:
        self.seen.setdefault(subject, []).append(at)
        if traits:
            self.traits.setdefault(subject, []).append((at, traits))


def _merge(connection: sa.Connection, table: sa.Table, key: sa.Column[str], news: _News) -> None:
    """Merge traits, the newest timestamp winning each; a null removes (its time is kept)."""
    rows.insert(  # which also locks what was there
        connection,
        table,
        (key.name, "traits", "trait_times", "first_seen_at", "last_seen_at"),
        [(subject, "{}", "{}", min(each), max(each)) for subject, each in sorted(news.seen.items())],
        f"ON CONFLICT ({key.name}) DO UPDATE SET {_SEEN}",
    )
    if not news.traits:
        return
    known = connection.execute(
        sa.select(key, table.c.traits, table.c.trait_times).where(is_among(connection, key, news.traits))
    )
    merged = [_merged(subject, traits, times, news.traits[subject]) for subject, traits, times in known]
    rows.update(connection, table, (key.name, "traits", "trait_times"), merged)


_SEEN = """first_seen_at = CASE WHEN excluded.first_seen_at < t.first_seen_at THEN excluded.first_seen_at
ELSE t.first_seen_at END, last_seen_at = CASE WHEN excluded.last_seen_at > t.last_seen_at
THEN excluded.last_seen_at ELSE t.last_seen_at END"""


def _at(told: _Told) -> str:
    return told[0]


def _merged(subject: str, traits: dict[str, Any], times: dict[str, str], told: Sequence[_Told]) -> rows.Row:
    for at, given in sorted(told, key=_at):
        stamp = f"{at.replace(' ', 'T')}+00:00"
        for name, value in from_json(given).items():
            if times.get(name, "") <= stamp:
                times[name] = stamp
                traits[name] = value
                if value is None:
                    del traits[name]
    return subject, to_json(traits), to_json(times)
