"""Queries about one user."""

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, tables
from audience_sync.history.audiences import definition_keys
from audience_sync.history.paging import united
from audience_sync.history.queue import delivery_details, delivery_rows
from audience_sync.history.runs import SAMPLE
from audience_sync.retention import erasure

LOOKED_AT = 1_000  # the newest deliveries of a user, among which those of the memberships are searched
SUGGESTED = 8
_LAST = "\U0010ffff"  # sorts after every other character

# Like the view membership_history, but with a lookup for each definition. In SQLite, CROSS JOIN fixes the order.
_MEMBERSHIPS = """
SELECT d.key, coalesce(m.value, 'true') AS value, r.as_of AS "from", NULL AS "to"
FROM {our}definitions d CROSS JOIN {our}members m JOIN {our}runs r ON r.run_id = m.entered_run_id
WHERE m.definition_id = d.definition_id AND m.user_id = :user_id
UNION ALL
SELECT d.key, coalesce(p.value, 'true'), r.as_of, x.as_of
FROM {our}definitions d CROSS JOIN {our}past_members p JOIN {our}runs r ON r.run_id = p.entered_run_id
JOIN {our}runs x ON x.run_id = p.exited_run_id
WHERE p.definition_id = d.definition_id AND p.user_id = :user_id
ORDER BY "from", key
"""


def user(connection: sa.Connection, user_id: str) -> dict[str, Any]:
    """A user's memberships with their times, deliveries, and the profile from calls."""
    memberships = dialects.sql(connection, _MEMBERSHIPS, user_id=user_id)
    return {
        "user_id": user_id,
        "memberships": [
            {"key": row.key, "value": json.loads(row.value), "from": _moment(row[2]), "to": _moment(row[3])}
            for row in memberships
        ],
        "deliveries": delivery_rows(connection, user_id=user_id),
        "profile": user_profile(connection, user_id),
    }


def _moment(value: Any) -> dt.datetime | None:
    """A time from a view, which on SQLite is text."""
    if isinstance(value, str):
        return dt.datetime.fromisoformat(value).replace(tzinfo=dt.UTC)
    return None if value is None else value.astimezone(dt.UTC)


def user_profile(connection: sa.Connection, user_id: str) -> dict[str, Any] | None:
    """The profile of a user from calls, with the newest events; None if there were no calls."""
    profile = connection.execute(
        sa.select(tables.profiles).where(tables.profiles.c.user_id == user_id)
    ).one_or_none()
    newest_events = connection.execute(
        sa.select(tables.events.c.name, tables.events.c.properties, tables.events.c.timestamp)
        .where(tables.events.c.user_id == user_id)
        .order_by(tables.events.c.timestamp.desc())
        .limit(SAMPLE)
    )
    return (
        None
        if profile is None
        else {
            "traits": profile.traits,
            "company_id": profile.company_id,
            "first_seen_at": profile.first_seen_at,
            "last_seen_at": profile.last_seen_at,
            "events": [row._asdict() for row in newest_events],
        }
    )


def memberships_now(connection: sa.Connection, user_id: str) -> list[dict[str, Any]]:
    """Each current membership and trait: its first run, and its newest delivery, or None if that is no longer stored."""
    statement = (
        "SELECT d.key, d.kind, d.definition_id, m.value, m.entered_run_id FROM {our}definitions d "
        "CROSS JOIN {our}members m WHERE m.definition_id = d.definition_id AND m.user_id = :user_id ORDER BY d.key"
    )
    rows = dialects.sql(connection, statement, user_id=user_id).all()
    as_of = _as_of(connection, [row.entered_run_id for row in rows])
    delivery_ids = _delivery_ids(connection, user_id, rows, as_of) if rows else {}
    deliveries = {row["delivery_id"]: row for row in delivery_details(connection, delivery_ids.values())}
    return [
        {
            "key": row.key,
            "kind": row.kind,
            "value": json.loads(row.value or "true"),
            "run_id": row.entered_run_id,
            "since": as_of.get(row.entered_run_id),
            "delivery": deliveries.get(delivery_ids.get(row.definition_id, 0)),
        }
        for row in rows
    ]


def _as_of(connection: sa.Connection, run_ids: Iterable[int]) -> dict[int, dt.datetime]:
    is_run = dialects.is_among(connection, tables.runs.c.run_id, run_ids)
    rows = connection.execute(sa.select(tables.runs.c.run_id, tables.runs.c.as_of).where(is_run))
    return {row.run_id: row.as_of for row in rows}


def _delivery_ids(
    connection: sa.Connection, user_id: str, members: Sequence[Any], as_of: dict[int, dt.datetime]
) -> dict[int, int]:
    """The newest delivery of each membership, by definition.

    It searches the user's newest deliveries, then the accepted ones by the time of their value.
    """
    column = tables.deliveries.c
    is_of_user = (column.subject_id == user_id, column.action != "company")
    newest = (
        sa.select(column.definition_id, column.run_id, column.delivery_id, column.status)
        .where(*is_of_user)
        .order_by(column.delivery_id.desc())
        .limit(LOOKED_AT)
    )
    entered = {row.definition_id: row.entered_run_id for row in members}
    ids: dict[int, int] = {}
    cancelled: dict[int, int] = {}
    for row in connection.execute(newest):
        if row.definition_id in entered and row.run_id >= entered[row.definition_id]:
            chosen = cancelled if row.status == "cancelled" else ids
            chosen.setdefault(row.definition_id, row.delivery_id)
    missing = [row for row in members if row.definition_id not in ids]
    moments = {as_of[row.entered_run_id] for row in missing if row.entered_run_id in as_of}
    for moment in moments:
        accepted = sa.select(column.definition_id, column.run_id, column.delivery_id).where(
            tables.ACCEPTED,
            column.subject_id == user_id,
            column.action == "identify",
            column.value_at == moment,
        )
        for sent in connection.execute(accepted.limit(LOOKED_AT)):
            if sent.run_id == entered.get(sent.definition_id):
                ids.setdefault(sent.definition_id, sent.delivery_id)
    return cancelled | ids


def time_line(
    connection: sa.Connection, user_id: str, *, before: int | None, limit: int
) -> tuple[list[dict[str, Any]], int | None]:
    """The runs in which a user entered, changed or exited, newest first, and where the next page begins.

    `before`: only runs with smaller ids. A run has one definition, so it changes a user once.
    """
    keys = definition_keys(connection)
    events: dict[int, dict[str, Any]] = {}
    for row in _intervals(connection, list(keys), user_id, before, limit + 1):
        # Sorted by their beginning: an interval that begins in the run in which another one ends is a change.
        change = "changed" if row.entered_run_id in events else "entered"
        value = None if row.value is None else json.loads(row.value)
        events[row.entered_run_id] = {"key": keys[row.definition_id], "change": change, "value": value}
        if row.exited_run_id is not None:
            events[row.exited_run_id] = {"key": keys[row.definition_id], "change": "exited", "value": None}
    run_ids = sorted((run_id for run_id in events if before is None or run_id < before), reverse=True)
    shown = run_ids[:limit]
    is_shown = dialects.is_among(connection, tables.runs.c.run_id, shown)
    runs = sa.select(tables.runs.c.run_id, tables.runs.c.as_of.label("at"), tables.runs.c.started_at)
    times = {row.run_id: row._asdict() for row in connection.execute(runs.where(is_shown))}
    none = {"at": None, "started_at": None}
    rows = [none | {"run_id": run_id} | times.get(run_id, {}) | events[run_id] for run_id in shown]
    return rows, shown[-1] if len(run_ids) > limit else None


def _intervals(
    connection: sa.Connection, definition_ids: Sequence[int], user_id: str, before: int | None, limit: int
) -> list[Any]:
    """The newest memberships of a user in each definition that began before a run, oldest first."""
    queries = []
    for definition_id in definition_ids:
        for table in (tables.members, tables.past_members):
            column = table.c
            exited = (
                sa.cast(sa.null(), sa.BigInteger).label("exited_run_id")
                if table is tables.members
                else column.exited_run_id
            )
            query = sa.select(column.definition_id, column.entered_run_id, exited, column.value).where(
                column.definition_id == definition_id, column.user_id == user_id
            )
            if before is not None:
                query = query.where(column.entered_run_id < before)
            queries.append(query.order_by(column.entered_run_id.desc()).limit(limit))
    return sorted(united(connection, queries), key=lambda row: row.entered_run_id)


def waiting_of_user(connection: sa.Connection, user_id: str, limit: int) -> list[dict[str, Any]]:
    """Deliveries of a user that are not settled yet, held or dead, newest first."""
    column = tables.deliveries.c
    ids: list[int] = []
    for where in (tables.UNSETTLED, tables.WAITING):
        query = sa.select(column.delivery_id).where(
            where, column.subject_id == user_id, column.action.in_(("identify", "track"))
        )
        ids += connection.execute(query.limit(limit)).scalars()
    return delivery_details(connection, sorted(ids, reverse=True)[:limit])


def erased_at(connection: sa.Connection, user_id: str) -> dict[str, Any] | None:
    """The times of a user's erasure and return; None if the user was never erased."""
    row = erasure.find_erasure(connection, user_id)
    return None if row is None else row._asdict()


def similar_ids(connection: sa.Connection, user_id: str) -> list[str]:
    """Ids of users that begin like this one, or differ only in spaces or upper and lower case."""
    trimmed = user_id.strip()
    forms = dict.fromkeys(
        (user_id, trimmed, trimmed.lower(), trimmed.upper(), trimmed[: len(trimmed) // 2 + 1])
    )
    ids: dict[str, None] = {}
    for form in filter(None, forms):
        ids |= dict.fromkeys(_beginning_with(connection, form))
        if len(ids) >= SUGGESTED:
            break
    return [other for other in ids if other != user_id][:SUGGESTED]


def _beginning_with(connection: sa.Connection, text: str) -> list[str]:
    """Ids of members and profiles in a range of their indexes, in order."""
    column = tables.profiles.c.user_id
    ids = set(connection.execute(_range(column, text)).scalars())
    definition_ids = connection.execute(sa.select(tables.definitions.c.definition_id)).scalars()
    is_of = tables.members.c.definition_id
    queries = [_range(tables.members.c.user_id, text).where(is_of == number) for number in definition_ids]
    return sorted(ids | {row.user_id for row in united(connection, queries)})[:SUGGESTED]


def _range(column: sa.Column[str], text: str) -> sa.Select[Any]:
    return sa.select(column).where(column >= text, column < text + _LAST).order_by(column).limit(SUGGESTED)
