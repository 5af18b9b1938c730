"""The backlog: how many deliveries are waiting, and when the next is due. Each function runs in its caller's transaction."""

import datetime as dt
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.db.dialects import chunks
from audience_sync.db.tables import PENDING, SENDING, UNSETTLED, deliveries
from audience_sync.queue.due import CLASSES, FIRST_IDENTIFY_WAIT, LANES, START
from audience_sync.queue.outcomes import LONGEST_BACKOFF_SECONDS
from audience_sync.queue.pace import CLOCKS_DIFFER

AHEAD_COUNT = 1_000
# The longest wait between two attempts: no Retry-After is longer than the longest backoff.
LONGEST_WAIT = dt.timedelta(seconds=LONGEST_BACKOFF_SECONDS) + CLOCKS_DIFFER
_ID = deliveries.c.delivery_id


def _by_claim_index(action: str, delivery_class: str) -> sa.ColumnElement[bool]:
    return sa.and_(deliveries.c.action == action, deliveries.c["class"] == delivery_class, PENDING)


def _by_full_index() -> sa.ColumnElement[bool]:
    """Return the condition for pending deliveries, written so that it matches a full index but no partial one."""
    return deliveries.c.status.in_(("pending", ""))


@dataclass(frozen=True, slots=True)
class DueMoment:
    """A future moment at which a delivery of this action and class may be due."""

    action: str
    delivery_class: str
    due_at: dt.datetime


def next_due(connection: sa.Connection, now: dt.datetime) -> list[DueMoment]:
    """Return the next moments at which pending deliveries may be due."""
    moments = [
        DueMoment(row.action, row.delivery_class, row.due_at)
        for row in connection.execute(_NEXT_DUE, {"now": now})
        if row.due_at is not None
    ]
    since = now - FIRST_IDENTIFY_WAIT
    return moments + [
        DueMoment(row.action, "call", row.due_at + FIRST_IDENTIFY_WAIT)
        for row in connection.execute(_FIRST_WAITING, {"now": now, "since": since})
        if row.due_at is not None
    ]


_DUE_AT = deliveries.c.next_attempt_at
_NOW = sa.bindparam("now", type_=_DUE_AT.type)
_SINCE = sa.bindparam("since", type_=_DUE_AT.type)
_LATEST = sa.bindparam("latest", type_=_DUE_AT.type)


def _first_due(
    action: str, delivery_class: str, *where: sa.ColumnElement[bool]
) -> sa.Select[*tuple[Any, ...]]:
    return sa.select(
        sa.literal(action).label("action"),
        sa.literal(delivery_class).label("delivery_class"),
        sa.func.min(_DUE_AT, type_=_DUE_AT.type).label("due_at"),
    ).where(_by_claim_index(action, delivery_class), *where)


_NEXT_DUE = sa.union_all(*(_first_due(action, name, _DUE_AT > _NOW) for action in LANES for name in CLASSES))
# Calls that may wait for another subject: users for their company, tracks for their user.
_FIRST_WAITING = sa.union_all(
    *(_first_due(action, "call", _DUE_AT > _SINCE, _DUE_AT <= _NOW) for action in ("track", "identify"))
)


def is_due(connection: sa.Connection, now: dt.datetime, since: dt.datetime | None = None) -> bool:
    """Return whether anything may be claimed, or was left `sending` by a process that has ended.

    `since`: count only deliveries that have become due after this moment.
    """
    due: list[Any] = [
        sa.and_(_by_claim_index(action, delivery_class), _DUE_AT <= _NOW, _DUE_AT > _SINCE)
        for action in LANES
        for delivery_class in CLASSES
    ]
    conditions = due if since else [*due, SENDING]
    exist = [sa.exists(sa.select(_ID).where(condition)) for condition in conditions]
    moments = {"now": now, "since": since or START[0]}
    return bool(connection.execute(sa.select(sa.or_(*exist)), moments).scalar_one())


def scheduled_ahead(connection: sa.Connection, now: dt.datetime) -> list[int]:
    """Return some deliveries that were queued or retried while a clock was ahead.

    Their first attempt is in the future, or another attempt later than any wait between attempts. In each queue it checks
    the AHEAD_COUNT deliveries that are due last.
    """
    return list(connection.execute(_SCHEDULED_AHEAD, {"now": now, "latest": now + LONGEST_WAIT}).scalars())


def _ahead_among_last(action: str, delivery_class: str) -> sa.Select[int]:
    last = (
        sa.select(_ID, deliveries.c.attempt_count, _DUE_AT)
        .where(_by_claim_index(action, delivery_class), _DUE_AT > _NOW)
        .order_by(_DUE_AT.desc(), _ID.desc())
        .limit(AHEAD_COUNT)
        .subquery()
    )
    is_ahead = sa.or_(last.c.attempt_count == 0, last.c.next_attempt_at > _LATEST)
    return sa.select(last.c.delivery_id).where(is_ahead)


_SCHEDULED_AHEAD = sa.union_all(*(_ahead_among_last(action, name) for action in LANES for name in CLASSES))


def are_waiting(
    connection: sa.Connection, run_ids: Collection[int], call_ids: Collection[int], now: dt.datetime
) -> bool:
    """Return whether any deliveries of these runs and calls have never been claimed."""
    for origin, ids in ((deliveries.c.run_id, run_ids), (deliveries.c.call_id, call_ids)):
        for chunk in chunks(ids):
            statement = sa.select(deliveries.c.delivery_id).where(
                origin.in_(chunk),
                _by_full_index(),
                deliveries.c.attempt_count == 0,
                deliveries.c.next_attempt_at <= now,
            )
            if connection.execute(statement.limit(1)).first() is not None:
                return True
    return False


def counts(connection: sa.Connection, *where: sa.ColumnElement[bool] | sa.TextClause) -> dict[str, int]:
    """Count the deliveries by status."""
    status = deliveries.c.status
    rows = connection.execute(sa.select(status, sa.func.count()).where(*where).group_by(status))
    return {value: count for value, count in rows}  # noqa: C416  (a row is not a pair to mypy)


def pending_counts(connection: sa.Connection) -> dict[str, int]:
    """Count the deliveries that are pending or being sent, by action.

    No index has them in the order of their actions: a GROUP BY would sort them all in memory.
    """
    columns = [sa.func.count().filter(deliveries.c.action == action) for action in LANES]
    row = connection.execute(sa.select(*columns).where(UNSETTLED)).one()
    return {action: count for action, count in zip(LANES, row, strict=True) if count}


def pending_count(connection: sa.Connection) -> int:
    return sum(pending_counts(connection).values())


def is_anything_pending(connection: sa.Connection) -> bool:
    """Return whether `pending_count` is more than 0, in the same time for a queue of any length."""
    one = sa.select(deliveries.c.delivery_id).where(UNSETTLED).limit(1)
    return connection.execute(one).first() is not None
