"""Bulk jobs: which there are, what goes into one, and what becomes of its deliveries.

From when it is gathered until it is settled a job's deliveries are `sending`, so that no other lane takes their
users. Of those that a newer value in the same row overtakes, `error` says so from the start. Every function
runs in its caller's transaction.
"""

import datetime as dt
import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.db import tables
from audience_sync.db.dialects import is_sqlite, sql
from audience_sync.db.tables import SENDING
from audience_sync.queue import deliveries

SETTLED_PER_TRANSACTION = 2_000  # deliveries that a transaction settles at most
_TRIED = "(d.attempt_count > 0 OR d.alone)"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A user whose turn it is. What was tried before goes by the live lane, where each answer is of one user."""

    user_id: str
    was_tried: bool


def backlog(
    connection: sa.Connection,
    delivery_class: str,
    now: dt.datetime,
    limit: int,
    fingerprint: str | None,
) -> list[Waiting]:
    """The users of a class whose turn it is, oldest first."""
    rows = deliveries.due(
        connection, f"d.subject_id, {_TRIED}", "identify", delivery_class, now, limit, fingerprint
    )
    return [Waiting(user_id, bool(was_tried)) for user_id, was_tried in rows]


def begin(
    connection: sa.Connection, filename: str, fingerprint: str | None, epoch: int, now: dt.datetime
) -> int:
    """A new job, to be filled; the id of its upload."""
    inserted = connection.execute(
        tables.requests.insert().values(lane="bulk", epoch=epoch, started_at=now, delivery_count=0)
    )
    (request_id,) = inserted.inserted_primary_key or (0,)
    connection.execute(
        tables.bulk_jobs.insert().values(
            request_id=request_id,
            filename=filename,
            fingerprint=fingerprint,
            status="gathering",
            created_at=now,
        )
    )
    return int(request_id)


def gather(
    connection: sa.Connection,
    request_id: int,
    ids: Iterable[int],
    overtaken: Collection[int],
    row_count: int,
    now: dt.datetime,
) -> None:
    """Put pending deliveries into a job, which then has so many rows."""
    told = {"taken": json.dumps(list(ids)), "late": json.dumps(list(overtaken))}
    taken, late = (_ids(connection, name) for name in told)
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'sending', request_id = :request_id, attempt_count = attempt_count + 1, "
        f"first_attempt_at = :now, quiet_until = NULL, error = CASE WHEN delivery_id IN {late} THEN :error END "
        f"WHERE status = 'pending' AND delivery_id IN {taken}",
        request_id=request_id,
        error=deliveries.SUPERSEDED,
        now=now,
        **told,
    )
    update(connection, request_id, row_count=row_count)


def _ids(connection: sa.Connection, name: str) -> str:
    if is_sqlite(connection):
        return f"(SELECT value FROM json_each(:{name}))"
    return f"(SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:{name} AS json)))"


def update(connection: sa.Connection, request_id: int, **values: Any) -> None:
    connection.execute(
        tables.bulk_jobs.update().where(tables.bulk_jobs.c.request_id == request_id).values(**values)
    )


def submit(connection: sa.Connection, request_id: int, now: dt.datetime) -> None:
    """Put on record that the upload begins."""
    update(connection, request_id, status="uploading", submitted_at=now)
    count = sa.select(sa.func.count()).where(_is_carried_by(request_id)).scalar_subquery()
    connection.execute(
        tables.requests.update()
        .where(tables.requests.c.request_id == request_id)
        .values(started_at=now, delivery_count=count)
    )


def answer(connection: sa.Connection, request_id: int, now: dt.datetime, **values: Any) -> None:
    """Put on record how the upload ended."""
    connection.execute(
        tables.requests.update()
        .where(tables.requests.c.request_id == request_id, tables.requests.c.ended_at.is_(None))
        .values(ended_at=now, **values)
    )


def settle(
    connection: sa.Connection,
    request_id: int,
    status: str,
    error: str | None,
    now: dt.datetime,
    grace: dt.timedelta,
) -> Counter[str]:
    """Settle a piece of a job that ended; how many deliveries became what, none where all are settled."""
    piece = (
        sa.select(tables.deliveries.c.delivery_id)
        .where(_is_carried_by(request_id))
        .limit(SETTLED_PER_TRANSACTION)
    )
    statement = (
        tables.deliveries.update()
        .where(tables.deliveries.c.delivery_id.in_(piece))
        .values(_became(status, error, now, grace))
        .returning(tables.deliveries.c.status)
    )
    return Counter(connection.execute(statement).scalars())


def _became(status: str, error: str | None, now: dt.datetime, grace: dt.timedelta) -> dict[str, Any]:
    overtaken = tables.deliveries.c.error == deliveries.SUPERSEDED
    match status:
        case "completed":
            return {
                "status": sa.case((overtaken, "cancelled"), else_="accepted"),
                "error": sa.case((overtaken, deliveries.SUPERSEDED)),
                "settled_at": now,
            }
        case "dropped":  # no attempt: it may go by bulk again
            return {
                "status": "pending",
                "error": error,
                "attempt_count": tables.deliveries.c.attempt_count - 1,
                "first_attempt_at": None,
            }
        case "failed":
            return {"status": "pending", "error": error, "next_attempt_at": now}
        case _:  # lost: perhaps it is applied yet
            return {
                "status": "pending",
                "error": error,
                "next_attempt_at": now + grace,
                "quiet_until": now + grace,
            }


def settled(connection: sa.Connection, request_id: int, now: dt.datetime) -> None:
    """A job that was never uploaded leaves no trace."""
    never = sa.and_(tables.bulk_jobs.c.request_id == request_id, tables.bulk_jobs.c.submitted_at.is_(None))
    if connection.execute(tables.bulk_jobs.delete().where(never)).rowcount:
        connection.execute(tables.requests.delete().where(tables.requests.c.request_id == request_id))
    else:
        update(connection, request_id, settled_at=now)


def _is_carried_by(request_id: int) -> sa.ColumnElement[bool]:
    """By the index of what is being sent."""
    return sa.and_(tables.deliveries.c.request_id == request_id, SENDING)


def unsettled(connection: sa.Connection) -> list[sa.Row[Any]]:
    return list(
        connection.execute(
            sa.select(tables.bulk_jobs)
            .where(tables.bulk_jobs.c.settled_at.is_(None))
            .order_by(tables.bulk_jobs.c.request_id)
        )
    )


def rows_per_second(connection: sa.Connection, least_rows: int) -> float | None:
    """How fast the newest completed job of so many rows was worked off."""
    row = connection.execute(
        sa.select(tables.bulk_jobs)
        .where(tables.bulk_jobs.c.status == "completed", tables.bulk_jobs.c.row_count >= least_rows)
        .order_by(tables.bulk_jobs.c.request_id.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    return float(row.row_count / max(0.001, (row.ended_at - row.submitted_at).total_seconds()))


def free(connection: sa.Connection, users: list[str], now: dt.datetime) -> list[str]:
    """Those of the users that are still in no other place, and that no answer made wait."""
    busy = sql(
        connection,
        "SELECT DISTINCT d.subject_id FROM {our}deliveries d WHERE d.subject_id IN :users AND d.action = 'identify' "
        f"AND d.status IN ('pending', 'sending') AND (d.status = 'sending' OR d.quiet_until > :now OR {_TRIED})",
        users=users,
        now=now,
    ).scalars()
    taken = set(busy)
    return [each for each in users if each not in taken]
