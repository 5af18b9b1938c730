"""What applications handed in, and what it told about users, companies and events."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from audience_sync.calls.mappings import Decision
from audience_sync.calls.model import Call, CallType
from audience_sync.store import forgetting
from audience_sync.store.engines import is_sqlite
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
    queued = [
        {
            "action": each.action.value,
            "subject_id": each.subject_id,
            "body": each.body,
            "class": "call",
            "call_id": call_id,
            "value_at": call.timestamp,
            "fingerprint": fingerprint,
            "status": "pending",
            "created_at": received_at,
            "next_attempt_at": received_at,
        }
        for call_id, call, decision in new
        for each in decision.outgoing
    ]
    if queued:
        connection.execute(deliveries.insert(), queued)
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
    rows = [
        {
            "message_id": message_id,
            "type": call.type.value,
            "user_id": call.user_id,
            "anonymous_id": call.anonymous_id,
            "group_id": call.group_id,
            "event": call.event,
            "body": {name: value for name, value in call.document.items() if value and name not in _COLUMNS},
            "timestamp": call.timestamp,
            "received_at": received_at,
            "status": "accepted" if decision.outgoing else "ignored",
            "reason": decision.reason,
            "left_out": decision.left_out or None,
        }
        for message_id, (call, decision) in sorted(
            decided.items()
        )  # in one order: others wait for the same ids
    ]
    insert = (
        sqlite.insert(calls) if is_sqlite(connection) else postgresql.insert(calls)
    ).on_conflict_do_nothing()
    inserted = connection.execute(insert.returning(calls.c.message_id, calls.c.call_id), rows)
    return {message_id: int(call_id) for message_id, call_id in inserted}


def _known(connection: sa.Connection, message_ids: Sequence[str]) -> dict[str, int]:
    if not message_ids:
        return {}
    rows = connection.execute(
        sa.select(calls.c.message_id, calls.c.call_id).where(calls.c.message_id.in_(message_ids))
    )
    return {message_id: int(call_id) for message_id, call_id in rows}


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
        connection.execute(
            _JOIN_COMPANY,
            [
                {"user": user, "company": call.group_id, "at": call.timestamp}
                for user, call in sorted(member_of.items())
            ],
        )
    tracked = [
        {
            "call_id": call_id,
            "user_id": call.subject_id,
            "name": call.event,
            "properties": call.properties,
            "context": call.context,
            "timestamp": call.timestamp,
            "received_at": received_at,
        }
        for call_id, call in new
        if call.type is CallType.TRACK
    ]
    if tracked:
        connection.execute(events.insert(), tracked)


_AT = sa.bindparam("at", type_=profiles.c.company_at.type)
_JOIN_COMPANY = (
    profiles.update()
    .where(
        profiles.c.user_id == sa.bindparam("user"),
        sa.or_(profiles.c.company_at.is_(None), profiles.c.company_at <= _AT),
    )
    .values(company_id=sa.bindparam("company"), company_at=_AT)
)
_Told = tuple[dt.datetime, dict[str, Any]]


def _merge(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], told: Mapping[str, Sequence[_Told]]
) -> None:
    """Merge traits, the newest timestamp winning each; a null removes (its time is kept)."""
    insert: Any = sqlite.insert(table) if is_sqlite(connection) else postgresql.insert(table)
    new = insert.excluded
    connection.execute(  # which also locks their rows
        insert.on_conflict_do_update(
            index_elements=[key],
            set_={
                "first_seen_at": _case(
                    new.first_seen_at < table.c.first_seen_at, new, table, "first_seen_at"
                ),
                "last_seen_at": _case(new.last_seen_at > table.c.last_seen_at, new, table, "last_seen_at"),
            },
        ),
        [
            {
                key.name: subject,
                "traits": {},
                "trait_times": {},
                "first_seen_at": min(at for at, _ in each),
                "last_seen_at": max(at for at, _ in each),
            }
            for subject, each in sorted(told.items())
        ],
    )
    with_traits = {
        subject: sorted(((at, traits) for at, traits in each if traits), key=lambda one: one[0])
        for subject, each in told.items()
        if any(traits for _, traits in each)
    }
    if not with_traits:
        return
    rows = connection.execute(
        sa.select(key, table.c.traits, table.c.trait_times).where(key.in_(list(with_traits)))
    ).all()
    connection.execute(
        table.update()
        .where(key == sa.bindparam("subject"))
        .values(traits=sa.bindparam("merged"), trait_times=sa.bindparam("times")),
        [
            _merged(subject, known, times, with_traits[subject])
            for subject, known, times in sorted(rows, key=lambda row: row[0])
        ],
    )


def _case(condition: Any, new: Any, table: sa.Table, name: str) -> Any:
    return sa.case((condition, new[name]), else_=table.c[name])


def _merged(
    subject: str, traits: dict[str, Any], times: dict[str, str], told: Sequence[_Told]
) -> dict[str, Any]:
    for at, given in told:
        stamp = at.astimezone(dt.UTC).isoformat(timespec="microseconds")
        for name, value in given.items():
            if times.get(name, "") <= stamp:
                times[name] = stamp
                traits[name] = value
                if value is None:
                    del traits[name]
    return {"subject": subject, "merged": traits, "times": times}
