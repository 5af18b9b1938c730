"""Rows of HTTP requests, recorded before the request is sent and completed afterwards. New processes get the pace from them.

The start and end of a live lane's request are recorded by the database's clock, so that processes on machines whose
clocks differ keep one pace. The uploads of bulk jobs are requests too (jobs.py). Every function runs in its caller's
transaction.
"""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from audience_sync.db import tables
from audience_sync.queue.due import LANES
from audience_sync.queue.outcomes import Delivery, Settlement

LONGEST_REQUEST = dt.timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """A request that is about to be sent, with its deliveries, oldest value first."""

    request_id: int
    action: str
    subject_id: str
    delivery_class: str
    deliveries: list[Delivery]


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that was answered or not sent, and the next states of its deliveries."""

    request_id: int
    ended_at: dt.datetime
    status_code: int | None
    x_request_id: str | None
    error: str | None
    settlements: list[Settlement]
    settled_at: dt.datetime


@dataclass(frozen=True, slots=True)
class RequestEnd:
    request_id: int
    lane: str
    ended_at: dt.datetime


def record_requests(
    connection: sa.Connection, lane: str, epoch: int, delivery_counts: Sequence[int], now: dt.datetime
) -> Sequence[int]:
    """Record requests with these numbers of deliveries before they start; return their ids in the same order."""
    rows = [
        {"lane": lane, "epoch": epoch, "started_at": now, "delivery_count": count}
        for count in delivery_counts
    ]
    return connection.execute(_INSERT, rows).scalars().all()


_INSERT = tables.requests.insert().returning(tables.requests.c.request_id, sort_by_parameter_order=True)


def end_requests(connection: sa.Connection, ended: Sequence[EndedRequest]) -> None:
    rows = [
        {
            "id": request.request_id,
            "ended_at": request.ended_at,
            "status_code": request.status_code,
            "x_request_id": request.x_request_id,
            "error": request.error,
        }
        for request in ended
    ]
    connection.execute(_END, rows)


_END = tables.requests.update().where(tables.requests.c.request_id == sa.bindparam("id"))


def end_lost_requests(connection: sa.Connection, ids: sa.Select[int], now: dt.datetime, error: str) -> None:
    """Record the end of requests whose process ended before the answer."""
    connection.execute(
        tables.requests.update()
        .where(tables.requests.c.ended_at.is_(None), tables.requests.c.request_id.in_(ids))
        .values(ended_at=now, error=error)
    )


def recent_request_ends(connection: sa.Connection, since: dt.datetime) -> list[RequestEnd]:
    """Return the ends of the live lanes' requests since a moment, oldest first: Userpilot may still count them."""
    rows = connection.execute(
        sa.select(tables.requests.c.request_id, tables.requests.c.lane, tables.requests.c.ended_at)
        .where(
            tables.requests.c.lane.in_(LANES),
            tables.requests.c.started_at > since - LONGEST_REQUEST,  # for the index
            tables.requests.c.ended_at > since,
        )
        .order_by(tables.requests.c.ended_at)
    )
    return [RequestEnd(row.request_id, row.lane, row.ended_at) for row in rows]
