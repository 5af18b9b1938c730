"""What applications handed in, and what it told about users, companies and events."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from audience_sync.calls.model import Call, CallType
from audience_sync.calls.presets import Outgoing
from audience_sync.store import forgetting
from audience_sync.store.engines import is_sqlite
from audience_sync.store.tables import calls, companies, deliveries, events, profiles

FORGOTTEN = "the user was forgotten"


def add(
    connection: sa.Connection,
    call: Call,
    outgoing: Sequence[Outgoing],
    *,
    received_at: dt.datetime,
    ignored: str | None,
    left_out: dict[str, Any],
    fingerprint: str | None,
) -> int | None:
    """Keep a call, what it tells, and its deliveries; None where its message id is known already.

    Of a user who was erased nothing is kept but that there was a call.
    """
    if call.subject_id is not None and forgetting.is_forgotten(connection, call.subject_id, received_at):
        call, outgoing, left_out, ignored = call.anonymous(), (), {}, FORGOTTEN
    body = {
        name: value
        for name, value in (
            ("traits", call.traits),
            ("properties", call.properties),
            ("context", call.context),
        )
        if value
    }
    insert = sqlite.insert(calls) if is_sqlite(connection) else postgresql.insert(calls)
    call_id = connection.execute(
        insert.values(
            message_id=call.message_id,
            type=call.type.value,
            user_id=call.user_id,
            anonymous_id=call.anonymous_id,
            group_id=call.group_id,
            event=call.event,
            body=body,
            timestamp=call.timestamp,
            received_at=received_at,
            status="ignored" if ignored else "accepted",
            reason=ignored,
            left_out=left_out or None,
        )
        .on_conflict_do_nothing(index_elements=["message_id"])
        .returning(calls.c.call_id)
    ).scalar_one_or_none()
    if call_id is None:
        return None
    if call.subject_id is None:
        return int(call_id)
    _learn(connection, call, call_id, received_at)
    for each in outgoing:
        connection.execute(
            deliveries.insert().values(
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
            )
        )
    return int(call_id)


def id_of(connection: sa.Connection, message_id: str) -> int:
    return int(
        connection.execute(sa.select(calls.c.call_id).where(calls.c.message_id == message_id)).scalar_one()
    )


def ignored_because(connection: sa.Connection, call_id: int) -> str | None:
    reason: str | None = connection.execute(
        sa.select(calls.c.reason).where(calls.c.call_id == call_id)
    ).scalar_one()
    return reason


def _learn(connection: sa.Connection, call: Call, call_id: int, received_at: dt.datetime) -> None:
    subject = call.subject_id
    if subject is not None:
        traits = call.traits if call.type is CallType.IDENTIFY else {}
        _merge(connection, profiles, profiles.c.user_id, subject, traits, call.timestamp)
    match call.type:
        case CallType.TRACK:
            connection.execute(
                events.insert().values(
                    call_id=call_id,
                    user_id=subject,
                    name=call.event,
                    properties=call.properties,
                    context=call.context,
                    timestamp=call.timestamp,
                    received_at=received_at,
                )
            )
        case CallType.GROUP if call.group_id is not None:
            _merge(connection, companies, companies.c.company_id, call.group_id, call.traits, call.timestamp)
            connection.execute(
                profiles.update()
                .where(
                    profiles.c.user_id == subject,
                    sa.or_(profiles.c.company_at.is_(None), profiles.c.company_at <= call.timestamp),
                )
                .values(company_id=call.group_id, company_at=call.timestamp)
            )


def _merge(
    connection: sa.Connection,
    table: sa.Table,
    key: sa.Column[str],
    subject: str,
    traits: dict[str, Any],
    timestamp: dt.datetime,
) -> None:
    """Merge traits, the newest timestamp winning each; a null removes (its time is kept)."""
    insert = sqlite.insert(table) if is_sqlite(connection) else postgresql.insert(table)
    blank = {"traits": {}, "trait_times": {}, "first_seen_at": timestamp, "last_seen_at": timestamp}
    connection.execute(insert.values({key.name: subject, **blank}).on_conflict_do_nothing())
    row = connection.execute(sa.select(table).where(key == subject).with_for_update()).one()
    known, times = dict(row.traits), dict(row.trait_times)
    stamp = timestamp.astimezone(dt.UTC).isoformat(timespec="microseconds")
    for name, value in traits.items():
        if times.get(name, "") <= stamp:
            times[name] = stamp
            known[name] = value
            if value is None:
                del known[name]
    connection.execute(
        table.update()
        .where(key == subject)
        .values(
            traits=known,
            trait_times=times,
            first_seen_at=min(row.first_seen_at, timestamp),
            last_seen_at=max(row.last_seen_at, timestamp),
        )
    )
