"""Questions about one user."""

import datetime as dt
import json
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, tables
from audience_sync.history.queue import delivery_rows
from audience_sync.history.runs import SAMPLE

# As the view membership_history, but looked up for each definition. CROSS JOIN is SQLite's way to fix the order.
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
    profile = connection.execute(
        sa.select(tables.profiles).where(tables.profiles.c.user_id == user_id)
    ).one_or_none()
    newest_events = connection.execute(
        sa.select(tables.events.c.name, tables.events.c.properties, tables.events.c.timestamp)
        .where(tables.events.c.user_id == user_id)
        .order_by(tables.events.c.timestamp.desc())
        .limit(SAMPLE)
    )
    return {
        "user_id": user_id,
        "memberships": [
            {"key": row.key, "value": json.loads(row.value), "from": _moment(row[2]), "to": _moment(row[3])}
            for row in memberships
        ],
        "deliveries": delivery_rows(connection, user_id=user_id),
        "profile": profile
        and {
            "traits": profile.traits,
            "company_id": profile.company_id,
            "first_seen_at": profile.first_seen_at,
            "last_seen_at": profile.last_seen_at,
            "events": [dict(row._mapping) for row in newest_events],  # noqa: SLF001  (SQLAlchemy's public name)
        },
    }


def _moment(value: Any) -> dt.datetime | None:
    """A time from a view, which on SQLite is text."""
    if isinstance(value, str):
        return dt.datetime.fromisoformat(value).replace(tzinfo=dt.UTC)
    return None if value is None else value.astimezone(dt.UTC)
