"""The record of actions in the dashboard: who did what, when and from where, and how it ended."""

import datetime as dt
from typing import Any

import sqlalchemy as sa

from audience_sync.db.tables import actions


def start_action(
    connection: sa.Connection, user_name: str, address: str, action: str, target: str, now: dt.datetime
) -> int:
    """Record an action before it is done; return its id."""
    values = {"user_name": user_name, "address": address, "action": action, "target": target}
    row = actions.insert().values(**values, started_at=now, status="running")
    return int(connection.execute(row.returning(actions.c.action_id)).scalar_one())


def end_action(connection: sa.Connection, action_id: int, status: str, result: str, now: dt.datetime) -> None:
    """Record how an action ended: done, refused or failed."""
    row = actions.update().where(actions.c.action_id == action_id, actions.c.status == "running")
    connection.execute(row.values(status=status, result=result, ended_at=now))


def action_rows(connection: sa.Connection, *, before: int | None = None, limit: int) -> list[dict[str, Any]]:
    """Actions, newest first."""
    query = sa.select(actions).order_by(actions.c.action_id.desc()).limit(limit)
    if before is not None:
        query = query.where(actions.c.action_id < before)
    return [dict(row) for row in connection.execute(query).mappings()]


def find_decision(connection: sa.Connection, run_id: int) -> dict[str, Any] | None:
    """Return the action that approved or rejected a run; None if it was not done in the dashboard."""
    is_decision = actions.c.action.in_(("approve", "reject")) & (actions.c.target == f"run {run_id}")
    return _find(connection, is_decision & (actions.c.status == "done"))


def find_action(connection: sa.Connection, action_id: int, user_name: str) -> dict[str, Any] | None:
    """Return an action of this user; None if there is no such action or it belongs to another user."""
    return _find(connection, (actions.c.action_id == action_id) & (actions.c.user_name == user_name))


def _find(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> dict[str, Any] | None:
    row = connection.execute(sa.select(actions).where(condition)).mappings().one_or_none()
    return None if row is None else dict(row)
