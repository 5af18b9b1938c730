"""What applications handed in, and what it told about users, companies and events."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.calls.mappings import Decision
from audience_sync.calls.model import Call, CallType
from audience_sync.store import forgetting, rows
from audience_sync.store.engines import is_sqlite, sql
from audience_sync.store.tables import calls, companies, deliveries, events, profiles

FORGOTTEN = "the user was forgotten"
_COLUMNS = {"type", "messageId", "userId", "anonymousId", "groupId", "event", "timestamp"}  # of the body none


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a call: `ignored` is why it is not delivered, `reason` why a part of it is not."""

    call_id: int
    ignored: str | None = None
    reason: str | None = None
    is_repeat: bool = False


def add(
    connection: sa.Connection,
    decided: Sequence[tuple[Call, Decision]],
    *,
    received_at: dt.datetime,
    fingerprint: str | None,
) -> list[Kept]:
    """Keep calls, what they tell, and their deliveries; a message id that is known already changes nothing.

    Of a user who was erased nothing is kept but that there was a call.
    """
    users = {call.subject_id for call, _ in decided if call.subject_id is not None}
    erased = forgetting.forgotten_among(connection, users, received_at)
    first: dict[str, tuple[Call, Decision]] = {}
    for call, decision in decided:
        if call.subject_id in erased:
            first.setdefault(call.message_id, (call.anonymous(), Decision(problems=[FORGOTTEN])))
        else:
            first.setdefault(call.message_id, (call, decision))
    ids = _insert(connection, first, received_at)
    new = [(ids[message_id], *each) for message_id, each in first.items() if message_id in ids]
    learned = [(call_id, call) for call_id, call, _ in new if call.subject_id is not None]
    if learned:
        _learn(connection, learned, received_at)
    now = rows.moment(received_at)
    rows.insert(
        connection,
        deliveries,
        _DELIVERY,
        [
            (each.action.value, each.subject_id, rows.document(each.body), "call", call_id,
             rows.moment(call.timestamp), fingerprint, "pending", now, now)
            for call_id, call, decision in new
            for each in decision.outgoing
        ],
    )  # fmt: skip
    known = _known(connection, [call.message_id for call, _ in decided if call.message_id not in ids])
    kept = []
    for call, _ in decided:
        if call.message_id in ids:
            decision = first[call.message_id][1]
            reason = decision.reason
            kept.append(Kept(ids.pop(call.message_id), None if decision.outgoing else reason, reason))
            known[call.message_id] = kept[-1].call_id
        else:
            kept.append(Kept(known[call.message_id], is_repeat=True))
    return kept


def _insert(
    connection: sa.Connection, decided: Mapping[str, tuple[Call, Decision]], received_at: dt.datetime
) -> dict[str, int]:
    """The ids of those that are new, by message id."""
    free = _free_ids(connection, len(decided))
    ordered = sorted(decided.items())  # in one order: other processes may wait for the same message ids
    ids = {message_id: call_id for call_id, (message_id, _) in zip(free, ordered, strict=True)}
    now = rows.moment(received_at)
    written = [
        (
            ids[message_id],
            message_id,
            call.type.value,
            call.user_id,
            call.anonymous_id,
            call.group_id,
            call.event,
            rows.document(
                {name: value for name, value in call.document.items() if value and name not in _COLUMNS}
            ),
            rows.moment(call.timestamp),
            now,
            "accepted" if decision.outgoing else "ignored",
            decision.reason,
            rows.document(decision.left_out) if decision.left_out else None,
        )
        for message_id, (call, decision) in ordered
    ]
    if rows.insert(connection, calls, _CALL, written, "ON CONFLICT (message_id) DO NOTHING") == len(written):
        return ids
    taken = connection.execute(
        sa.select(calls.c.message_id, calls.c.call_id).where(calls.c.call_id.between(free[0], free[-1]))
    )  # others' among them, whose ids lie between ours
    return {message_id: call_id for message_id, call_id in taken if ids.get(message_id) == call_id}


_CALL = (
    "call_id", "message_id", "type", "user_id", "anonymous_id", "group_id", "event", "body", "timestamp",
    "received_at", "status", "reason", "left_out",
)  # fmt: skip
_DELIVERY = (
    "action", "subject_id", "body", "class", "call_id", "value_at", "fingerprint", "status", "created_at",
    "next_attempt_at",
)  # fmt: skip
_EVENT = ("call_id", "user_id", "name", "properties", "context", "timestamp", "received_at")


def _free_ids(connection: sa.Connection, count: int) -> Sequence[int]:
    """So many ids for new calls, ascending."""
    if is_sqlite(connection):  # nobody else writes now
        last = sql(connection, "SELECT max(seq) FROM sqlite_sequence WHERE name = 'calls'").scalar() or 0
        return range(last + 1, last + 1 + count)
    sequence = "pg_get_serial_sequence(:calls, 'call_id')"
    ids = sql(
        connection,
        f"SELECT nextval({sequence}) FROM generate_series(1, :count)",
        calls=f"{connection.get_execution_options()['our']}calls",
        count=count,
    )
    return sorted(ids.scalars())


def _known(connection: sa.Connection, message_ids: Sequence[str]) -> dict[str, int]:
    if not message_ids:
        return {}
    found = connection.execute(
        sa.select(calls.c.message_id, calls.c.call_id).where(calls.c.message_id.in_(message_ids))
    )
    return {message_id: int(call_id) for message_id, call_id in found}


def _learn(connection: sa.Connection, new: Sequence[tuple[int, Call]], received_at: dt.datetime) -> None:
    users: dict[str, list[_Told]] = {}
    groups: dict[str, list[_Told]] = {}
    member_of: dict[str, Call] = {}
    for _, call in new:
        subject = call.subject_id or ""
        traits = call.traits if call.type is CallType.IDENTIFY else {}
        users.setdefault(subject, []).append((call.timestamp, traits))
        if call.type is CallType.GROUP and call.group_id is not None:
            groups.setdefault(call.group_id, []).append((call.timestamp, call.traits))
            if subject not in member_of or member_of[subject].timestamp <= call.timestamp:
                member_of[subject] = call
    _merge(connection, profiles, profiles.c.user_id, users)
    if groups:
        _merge(connection, companies, companies.c.company_id, groups)
        rows.update(
            connection,
            profiles,
            ("user_id", "company_id", "company_at"),
            [(user, call.group_id, rows.moment(call.timestamp)) for user, call in sorted(member_of.items())],
            "(t.company_at IS NULL OR t.company_at <= {company_at})",
        )
    now = rows.moment(received_at)
    rows.insert(
        connection,
        events,
        _EVENT,
        [
            (call_id, call.subject_id, call.event, rows.document(call.properties), rows.document(call.context),
             rows.moment(call.timestamp), now)
            for call_id, call in new
            if call.type is CallType.TRACK
        ],
    )  # fmt: skip


_Told = tuple[dt.datetime, dict[str, Any]]


def _merge(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], told: Mapping[str, Sequence[_Told]]
) -> None:
    """Merge traits, the newest timestamp winning each; a null removes (its time is kept)."""
    rows.insert(  # which also locks what was there
        connection,
        table,
        (key.name, "traits", "trait_times", "first_seen_at", "last_seen_at"),
        [
            (subject, "{}", "{}", rows.moment(min(each, key=_at)[0]), rows.moment(max(each, key=_at)[0]))
            if len(each) > 1
            else (subject, "{}", "{}", at := rows.moment(each[0][0]), at)
            for subject, each in sorted(told.items())
        ],
        f"ON CONFLICT ({key.name}) DO UPDATE SET {_SEEN}",
    )
    with_traits = {subject: each for subject, each in told.items() if any(traits for _, traits in each)}
    if not with_traits:
        return
    known = connection.execute(
        sa.select(key, table.c.traits, table.c.trait_times).where(key.in_(list(with_traits)))
    ).all()
    rows.update(
        connection,
        table,
        (key.name, "traits", "trait_times"),
        [
            _merged(subject, traits, times, with_traits[subject])
            for subject, traits, times in sorted(known, key=lambda row: str(row[0]))
        ],
    )


_SEEN = """first_seen_at = CASE WHEN excluded.first_seen_at < t.first_seen_at THEN excluded.first_seen_at
ELSE t.first_seen_at END, last_seen_at = CASE WHEN excluded.last_seen_at > t.last_seen_at
THEN excluded.last_seen_at ELSE t.last_seen_at END"""


def _at(told: _Told) -> dt.datetime:
    return told[0]


def _merged(subject: str, traits: dict[str, Any], times: dict[str, str], told: Sequence[_Told]) -> rows.Row:
    for at, given in sorted(told, key=_at) if len(told) > 1 else told:
        stamp = at.astimezone(dt.UTC).isoformat(timespec="microseconds")
        for name, value in given.items():
            if times.get(name, "") <= stamp:
                times[name] = stamp
                traits[name] = value
                if value is None:
                    del traits[name]
    return subject, rows.document(traits), rows.document(times)
