"""Rows of bulk jobs and of their uploads. Every function runs in its caller's transaction."""

import datetime as dt
from typing import Any

import sqlalchemy as sa

from audience_sync.db import tables
from audience_sync.queue import deliveries

SETTLED_PER_TRANSACTION = 2_000  # deliveries that a transaction settles at most


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


def update(connection: sa.Connection, request_id: int, **values: Any) -> None:
    connection.execute(
        tables.bulk_jobs.update().where(tables.bulk_jobs.c.request_id == request_id).values(**values)
    )


def submit(connection: sa.Connection, request_id: int, now: dt.datetime) -> None:
    """Put on record that the upload begins."""
    update(connection, request_id, status="uploading", submitted_at=now)
    count = sa.select(sa.func.count()).where(deliveries.is_in_job(request_id)).scalar_subquery()
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


def settled(connection: sa.Connection, request_id: int, now: dt.datetime) -> None:
    """A job that was never uploaded leaves no trace."""
    never = sa.and_(tables.bulk_jobs.c.request_id == request_id, tables.bulk_jobs.c.submitted_at.is_(None))
    if connection.execute(tables.bulk_jobs.delete().where(never)).rowcount:
        connection.execute(tables.requests.delete().where(tables.requests.c.request_id == request_id))
    else:
        update(connection, request_id, settled_at=now)


def assign_jobs(connection: sa.Connection, fingerprint: str) -> None:
    """Make this the destination of the jobs that are not settled."""
    is_other = sa.or_(tables.bulk_jobs.c.fingerprint.is_(None), tables.bulk_jobs.c.fingerprint != fingerprint)
    connection.execute(
        tables.bulk_jobs.update()
        .where(tables.bulk_jobs.c.settled_at.is_(None), is_other)
        .values(fingerprint=fingerprint)
    )


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
