"""The queue: who is next, what was sent, and what became of it. Every function runs in its caller's transaction."""

import datetime as dt
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from audience_sync.store.engines import sql
from audience_sync.store.tables import deliveries, destination, requests

FIRST_IDENTIFY_WAIT = dt.timedelta(minutes=10)
UNSETTLED = ("held", "pending", "sending")

# A subject is out of reach while a request of its is under way, while it waits after an unknown outcome,
# and while one of its deliveries that must go alone is not due.
_BLOCKED = """EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id AND b.action = d.action
  AND (b.status = 'sending' OR (b.status = 'pending' AND
       (b.quiet_until > :now OR (b.alone AND b.next_attempt_at > :now)))))"""
# A user's tracks go in order, and after that user's first identify.
_TRACK_WAITS = """(EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
    AND b.action = 'track' AND b.delivery_id < d.delivery_id AND b.status IN ('pending', 'sending'))
  OR (d.created_at > :patience
    AND EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
      AND b.action = 'identify' AND b.status IN ('pending', 'sending'))
    AND NOT EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
      AND b.action = 'identify' AND b.status = 'accepted')))"""


class Status(StrEnum):
    PENDING = "pending"
    SENDING = "sending"
    ACCEPTED = "accepted"
    DEAD = "dead"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A claimed delivery; `attempt_count` includes the attempt that it was claimed for."""

    delivery_id: int
    action: str
    subject_id: str
    body: dict[str, Any]
    value_at: dt.datetime
    alone: bool
    attempt_count: int
    first_attempt_at: dt.datetime
    next_attempt_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a delivery becomes after a request."""

    delivery_id: int
    status: Status
    error: str | None = None
    next_attempt_at: dt.datetime | None = None
    quiet_until: dt.datetime | None = None
    alone: bool = False
    was_attempt: bool = True  # a 429 or a refused key is none


@dataclass(frozen=True, slots=True)
class Claimed:
    """One request to be: its row in requests, and its deliveries, oldest value first."""

    request_id: int
    action: str
    subject_id: str
    is_push: bool
    deliveries: list[Delivery]


def recover(connection: sa.Connection, now: dt.datetime, grace: dt.timedelta, *, at_most_once: bool) -> int:
    """Take back what a process that is gone was sending: nobody knows whether it was applied."""
    lost = "The process ended before the answer came"
    sql(
        connection,
        "UPDATE {our}requests SET ended_at = :now, error = :lost WHERE ended_at IS NULL",
        now=now,
        lost=lost,
    )
    if at_most_once:
        sql(
            connection,
            "UPDATE {our}deliveries SET status = 'dead', settled_at = :now, error = :error "
            "WHERE status = 'sending' AND action = 'track'",
            now=now,
            error=f"Not repeated (track_policy at_most_once): {lost}",
        )
    return sql(
        connection,
        "UPDATE {our}deliveries SET status = 'pending', next_attempt_at = :until, quiet_until = :until, error = :lost "
        "WHERE status = 'sending'",
        until=now + grace,
        lost=lost,
    ).rowcount


def recent_request_ends(connection: sa.Connection, since: dt.datetime) -> list[tuple[str, dt.datetime]]:
    rows = connection.execute(
        sa.select(requests.c.lane, requests.c.ended_at)
        .where(requests.c.ended_at > since)
        .order_by(requests.c.ended_at)
    )
    return [(row.lane, row.ended_at) for row in rows]


def subjects_due(
    connection: sa.Connection, action: str, delivery_class: str, now: dt.datetime, limit: int
) -> list[str]:
    """The subjects whose turn it is, oldest first."""
    waits = f" AND NOT {_TRACK_WAITS}" if action == "track" else ""
    parameters: dict[str, Any] = {"patience": now - FIRST_IDENTIFY_WAIT} if waits else {}
    rows = sql(
        connection,
        "SELECT d.subject_id FROM {our}deliveries d WHERE d.action = :action AND d.class = :class "
        f"AND d.status = 'pending' AND d.next_attempt_at <= :now AND NOT {_BLOCKED}{waits} "
        "ORDER BY d.next_attempt_at, d.delivery_id LIMIT :limit",
        **{"class": delivery_class},
        action=action,
        now=now,
        limit=limit * 4,  # a user may have several
        **parameters,
    )
    return list(dict.fromkeys(rows.scalars()))[:limit]


def pending_of(
    connection: sa.Connection, action: str, subjects: Collection[str], now: dt.datetime
) -> dict[str, list[Delivery]]:
    """All that is pending for these subjects, as it will be once claimed."""
    found: dict[str, list[Delivery]] = {subject: [] for subject in subjects}
    rows = connection.execute(
        sa.select(deliveries)
        .where(
            deliveries.c.subject_id.in_(list(subjects)),
            deliveries.c.action == action,
            deliveries.c.status == "pending",
        )
        .order_by(deliveries.c.delivery_id)
    )
    for row in rows:
        found[row.subject_id].append(
            Delivery(
                delivery_id=row.delivery_id,
                action=row.action,
                subject_id=row.subject_id,
                body=row.body,
                value_at=row.value_at,
                alone=row.alone,
                attempt_count=row.attempt_count + 1,
                first_attempt_at=row.first_attempt_at or now,
                next_attempt_at=row.next_attempt_at,
            )
        )
    return found


def claim(
    connection: sa.Connection,
    lane: str,
    epoch: int,
    chosen: Sequence[Delivery],
    now: dt.datetime,
    *,
    is_push: bool,
) -> Claimed:
    """Write the request before it is sent, and mark its deliveries."""
    inserted = connection.execute(
        requests.insert().values(lane=lane, epoch=epoch, started_at=now, delivery_count=len(chosen))
    )
    request_id = int(inserted.inserted_primary_key[0])  # type: ignore[index]  # a table with a key gives one
    connection.execute(
        deliveries.update()
        .where(deliveries.c.delivery_id.in_([delivery.delivery_id for delivery in chosen]))
        .values(
            status="sending",
            request_id=request_id,
            attempt_count=deliveries.c.attempt_count + 1,
            first_attempt_at=sa.func.coalesce(
                deliveries.c.first_attempt_at, sa.bindparam("now", now, type_=deliveries.c.created_at.type)
            ),
        )
    )
    return Claimed(request_id, chosen[0].action, chosen[0].subject_id, is_push, list(chosen))


def settle(
    connection: sa.Connection,
    request_id: int,
    settlements: Iterable[Settlement],
    ended_at: dt.datetime,
    *,
    status_code: int | None,
    x_request_id: str | None,
    error: str | None,
) -> None:
    connection.execute(
        requests.update()
        .where(requests.c.request_id == request_id)
        .values(
            ended_at=ended_at,
            status_code=status_code,
            x_request_id=x_request_id,
            error=error,
        )
    )
    for settlement in settlements:
        final = settlement.status is not Status.PENDING
        values: dict[str, Any] = {
            "status": settlement.status.value,
            "error": settlement.error,
            "settled_at": ended_at if final else None,
            "quiet_until": settlement.quiet_until,
            "alone": settlement.alone,
        }
        if settlement.next_attempt_at is not None:
            values["next_attempt_at"] = settlement.next_attempt_at
        if not settlement.was_attempt:
            values["attempt_count"] = deliveries.c.attempt_count - 1
        connection.execute(
            deliveries.update()
            .where(
                deliveries.c.delivery_id == settlement.delivery_id,
                deliveries.c.status == "sending",
                deliveries.c.request_id == request_id,
            )
            .values(**values)
        )


def next_due_at(connection: sa.Connection, now: dt.datetime) -> dt.datetime | None:
    """When something that is not due, or waits for its turn, may be sent; None where nothing is pending."""
    pending = deliveries.c.status == "pending"
    moments = [
        connection.execute(
            sa.select(sa.func.min(column, type_=column.type)).where(pending, column > now)
        ).scalar()
        for column in (deliveries.c.next_attempt_at, deliveries.c.quiet_until)
    ]
    first_track = connection.execute(
        sa.select(sa.func.min(deliveries.c.created_at, type_=deliveries.c.created_at.type)).where(
            pending, deliveries.c.action == "track", deliveries.c.created_at > now - FIRST_IDENTIFY_WAIT
        )
    ).scalar()
    if first_track is not None:
        moments.append(first_track + FIRST_IDENTIFY_WAIT)
    return min((moment for moment in moments if moment is not None), default=None)


def counts(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> dict[str, int]:
    rows = connection.execute(
        sa.select(deliveries.c.status, sa.func.count()).where(*where).group_by(deliveries.c.status)
    )
    return {status: count for status, count in rows}  # noqa: C416  (a row is not a pair to mypy)


def pending_count(connection: sa.Connection) -> int:
    statement = sa.select(sa.func.count()).where(deliveries.c.status.in_(("pending", "sending")))
    return int(connection.execute(statement).scalar_one())


def are_waiting(
    connection: sa.Connection, run_ids: Collection[int], call_ids: Collection[int], now: dt.datetime
) -> bool:
    """Whether deliveries of these origins wait to be claimed for the first time."""
    origin = sa.or_(deliveries.c.run_id.in_(list(run_ids)), deliveries.c.call_id.in_(list(call_ids)))
    statement = sa.select(
        sa.exists().where(
            origin,
            deliveries.c.status == "pending",
            deliveries.c.attempt_count == 0,
            deliveries.c.next_attempt_at <= now,
        )
    )
    return bool(connection.execute(statement).scalar_one())


def stopped(connection: sa.Connection) -> tuple[dt.datetime, str] | None:
    row = connection.execute(sa.select(destination)).one_or_none()
    return None if row is None or row.stopped_at is None else (row.stopped_at, row.stopped_reason)


def stop(connection: sa.Connection, now: dt.datetime, reason: str) -> None:
    _set_destination(connection, stopped_at=now, stopped_reason=reason)


def go(connection: sa.Connection) -> None:
    _set_destination(connection, stopped_at=None, stopped_reason=None)


def slow_downs(connection: sa.Connection) -> dict[str, Any]:
    return connection.execute(sa.select(destination.c.slow_downs)).scalar_one_or_none() or {}


def set_slow_downs(connection: sa.Connection, lanes: dict[str, Any]) -> None:
    _set_destination(connection, slow_downs=json.loads(json.dumps(lanes)))


def _set_destination(connection: sa.Connection, **values: Any) -> None:
    if connection.execute(destination.update().values(**values)).rowcount == 0:
        connection.execute(destination.insert().values(**({"destination_id": 1, "slow_downs": {}} | values)))
