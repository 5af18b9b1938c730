"""Questions about deliveries and calls."""

from typing import Any

import sqlalchemy as sa

from audience_sync.db import tables
from audience_sync.history.paging import older


def delivery_rows(
    connection: sa.Connection,
    *,
    status: str | None = None,
    key: str | None = None,
    action: str | None = None,
    error: str | None = None,
    user_id: str | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Deliveries, newest first, each with the answer to the last request that carried it.

    `key` is that of the definition that made them; `error` is a part of their error, in any case.
    """
    query = (
        sa.select(tables.deliveries, tables.requests.c.status_code, tables.requests.c.x_request_id)
        .join(tables.requests, tables.requests.c.request_id == tables.deliveries.c.request_id, isouter=True)
        .order_by(tables.deliveries.c.delivery_id.desc())
        .limit(limit)
    )
    query = older(query, tables.deliveries.c.delivery_id, before)
    if status is not None:
        query = query.where(tables.deliveries.c.status == status)
    if key is not None:
        of_key = sa.select(tables.definitions.c.definition_id).where(tables.definitions.c.key == key)
        query = query.where(tables.deliveries.c.definition_id == of_key.scalar_subquery())
    if action is not None:
        query = query.where(tables.deliveries.c.action == action)
    if error is not None:
        query = query.where(tables.deliveries.c.error.icontains(error, autoescape=True))
    if user_id is not None:
        query = query.where(
            tables.deliveries.c.subject_id == user_id, tables.deliveries.c.action != "company"
        )
    return [
        {
            "delivery_id": row.delivery_id,
            "action": row.action,
            "subject_id": row.subject_id,
            "body": row.body,
            "status": row.status,
            "run_id": row.run_id,
            "call_id": row.call_id,
            "attempt_count": row.attempt_count,
            "next_attempt_at": row.next_attempt_at if row.status == "pending" else None,
            "created_at": row.created_at,
            "settled_at": row.settled_at,
            "status_code": row.status_code,
            "x_request_id": row.x_request_id,
            "error": row.error,
        }
        for row in connection.execute(query)
    ]


def call_rows(
    connection: sa.Connection, status: str | None, *, before: int | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Calls from applications, newest first."""
    query = sa.select(tables.calls).order_by(tables.calls.c.call_id.desc()).limit(limit)
    query = older(query, tables.calls.c.call_id, before)
    if status is not None:
        query = query.where(tables.IGNORED if status == "ignored" else tables.calls.c.status == status)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001  (SQLAlchemy's public name)
