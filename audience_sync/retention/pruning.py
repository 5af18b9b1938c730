"""Delete old rows, in small transactions. Runs keep the counts of their deliveries, so the history still adds up.

Deliveries that are held, pending, sending or dead (a later run or a person may retry them) are undecided. They are never
deleted, nor are the rows that decide about them:

- the calls and requests that they refer to;
- newer deliveries of the same user or company, with any status, because they supersede an undecided value;
- deliveries of the same user that were cancelled before anything of the definition was sent: if the user leaves,
  nothing is sent either. Once something was sent, they may be deleted, and are deleted first: without the deliveries
  that were sent, they would show that nothing was;
- the user's past memberships: they show that something was sent before, even if its delivery has been deleted;
- while the destination is stopped, accepted deliveries of calls: they show that it was in use (destination.has_accepted).

Runs, members, profiles, companies and events stay.
"""

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import (
    MAY_HAVE_BEEN_SENT,
    SENDING,
    UNSETTLED,
    WAITING,
    UtcDateTime,
    bulk_jobs,
    calls,
    deliveries,
    destination,
    past_members,
    requests,
    runs,
    schedule_slots,
)
from audience_sync.queue.conditions import prefer_index_scans

CHUNK = 1_000  # the most rows that a transaction deletes
# Pending deliveries of a subject that are compared; if it has more, its settled ones are kept.
MAX_QUEUED = 10
STRETCH = 20_000  # the most rows that a transaction reads; reading a row is faster than deleting it
LONGEST_SECONDS = 100 * 365 * 86_400  # longer spans mean forever, because SQLite compares four-digit years


@dataclass(frozen=True, slots=True)
class Retention:
    """Time spans, in seconds, for which rows are kept; `math.inf` is forever.

    A span begins when the call was received, the delivery was settled, the request started, or the run in which the past
    member left ended. The span for requests also applies to bulk jobs and schedule slots; it must be at least an hour,
    because pacing reads recent requests.
    """

    calls: float
    deliveries: float
    requests: float
    past_members: float


@dataclass(frozen=True, slots=True)
class _Part:
    """A table, and the condition for its old rows.

    `rising`: a time that rises with the key, if there is one. `key`: indexed columns to use instead of the primary key.
    """

    table: sa.Table
    is_old: sa.ColumnElement[bool]
    rising: sa.ColumnElement[dt.datetime] | None = None
    key: tuple[sa.Column[Any], ...] = ()


_BEFORE = sa.bindparam("before", type_=UtcDateTime())
_SETTLED = deliveries.c.status.in_(("accepted", "cancelled"))  # not dead ones, which may be retried
_other = deliveries.alias()
_OF_SUBJECT = (_other.c.subject_id == deliveries.c.subject_id) & (_other.c.action == deliveries.c.action)
_AGE = sa.tuple_(deliveries.c.value_at, deliveries.c.delivery_id)
_HAS_OLDER_WAITING = sa.exists().where(
    _OF_SUBJECT, WAITING, sa.tuple_(_other.c.value_at, _other.c.delivery_id) < _AGE
)
_queued = (
    sa.select(_other.c.value_at, _other.c.delivery_id)
    .where(_OF_SUBJECT, UNSETTLED)
    .order_by(_other.c.delivery_id)
    .correlate(deliveries)
)
_some = _queued.limit(MAX_QUEUED).subquery()
_HAS_OLDER_QUEUED = sa.exists(
    sa.select(_some.c.delivery_id).where(sa.tuple_(_some.c.value_at, _some.c.delivery_id) < _AGE)
)
_HAS_MANY_QUEUED = sa.exists(_queued.offset(MAX_QUEUED).limit(1))
_something_sent = (  # a scalar, because PostgreSQL may hash the whole table for an EXISTS
    sa.select(_other.c.delivery_id)
    .where(_OF_SUBJECT, _other.c.definition_id == deliveries.c.definition_id, MAY_HAVE_BEEN_SENT)
    .order_by(_other.c.delivery_id)
    .limit(1)
    .correlate(deliveries)
    .scalar_subquery()
)
_WAS_NEVER_SENT = (
    (deliveries.c.status == "cancelled")
    & deliveries.c.run_id.is_not(None)
    & (deliveries.c.attempt_count == 0)
    & (sa.exists(_queued.limit(1)) | sa.exists().where(_OF_SUBJECT, WAITING))
    & _something_sent.is_(None)
)
_DECIDES = (deliveries.c.action != "track") & (
    _HAS_MANY_QUEUED | _HAS_OLDER_QUEUED | _HAS_OLDER_WAITING | _WAS_NEVER_SENT
)
_SHOWS_USE = (
    deliveries.c.call_id.is_not(None)
    & (deliveries.c.status == "accepted")
    & sa.exists().where(destination.c.stopped_at.is_not(None))
)
_OF_USER = (_other.c.subject_id == past_members.c.user_id) & (_other.c.action == "identify")
_IS_UNDECIDED = sa.exists().where(_OF_USER, UNSETTLED) | sa.exists().where(_OF_USER, WAITING)
_HAS_UNSETTLED_DELIVERY = sa.exists().where(deliveries.c.call_id == calls.c.call_id, ~_SETTLED)
_IS_UNDER_WAY = sa.exists().where(deliveries.c.request_id == requests.c.request_id, SENDING)
# Past members are pruned in the order in which they left: by user, the first definitions could take all the time.
_BY_EXIT = (past_members.c.exited_run_id, past_members.c.definition_id, past_members.c.user_id)
_LEFT_AT = (
    sa.select(runs.c.finished_at).where(runs.c.run_id == past_members.c.exited_run_id).scalar_subquery()
)
_LEFT_BEFORE = sa.exists().where(runs.c.run_id == past_members.c.exited_run_id, runs.c.finished_at < _BEFORE)
_slots = schedule_slots.alias()
# The last slot stays. A slot of a clock that was ahead may be newer, so the newest of the old slots stays, too.
_NEWEST_OLD_SLOT = (
    sa.select(sa.func.max(_slots.c.slot_at, type_=UtcDateTime()))
    .where(_slots.c.definition_id == schedule_slots.c.definition_id, _slots.c.slot_at < _BEFORE)
    .scalar_subquery()
)
_PARTS = (
    _Part(
        deliveries,
        # An expression, because with the plain column SQLite would use the index of statuses instead of the key.
        deliveries.c.status.concat("").in_(("accepted", "cancelled"))
        & (deliveries.c.settled_at < _BEFORE)
        & ~_DECIDES
        & ~_SHOWS_USE,
        deliveries.c.created_at,
    ),
    _Part(calls, (calls.c.received_at < _BEFORE) & ~_HAS_UNSETTLED_DELIVERY, calls.c.received_at),
    _Part(requests, (requests.c.started_at < _BEFORE) & ~_IS_UNDER_WAY, requests.c.started_at),
    _Part(bulk_jobs, bulk_jobs.c.settled_at < _BEFORE),
    _Part(past_members, _LEFT_BEFORE & ~_IS_UNDECIDED, _LEFT_AT, _BY_EXIT),
    _Part(
        schedule_slots, (schedule_slots.c.taken_at < _BEFORE) & (schedule_slots.c.slot_at < _NEWEST_OLD_SLOT)
    ),
)


def prune(
    engine: sa.Engine,
    retention: Retention,
    now: dt.datetime,
    *,
    seconds: float = 5.0,
    monotonic: Callable[[], float] = time.monotonic,
) -> dict[str, int]:
    """Delete old rows; return their number by table.

    The tables take turns until nothing is left, or until a round ends after `seconds`; with 0 there is one round. The
    next call deletes the rest. Each turn is a write transaction that blocks others for less than 0.1 s.
    """
    spans = {
        deliveries: retention.deliveries,
        calls: retention.calls,
        requests: retention.requests,
        bulk_jobs: retention.requests,
        past_members: retention.past_members,
        schedule_slots: retention.requests,
    }
    walks = {
        part.table.name: _walk(engine, part, now - dt.timedelta(seconds=spans[part.table]))
        for part in _PARTS
        if spans[part.table] <= LONGEST_SECONDS
    }
    deleted = {table.name: 0 for table in spans}
    end = monotonic() + seconds
    while walks:
        for name, walk in list(walks.items()):
            count = next(walk, None)
            if count is None:
                del walks[name]
            else:
                deleted[name] += count
        if monotonic() >= end:
            break
    return deleted


def _walk(engine: sa.Engine, part: _Part, before: dt.datetime) -> Iterator[int]:
    """Go through a table by its key and delete old rows; yield how many each transaction deleted.

    A transaction covers at most one stretch of the table. If the table has a `rising` time, the walk ends after the
    stretch in which it reaches `before`.
    """
    columns = list(part.key or part.table.primary_key)
    key = sa.tuple_(*columns)
    ends = sa.select(*columns, sa.null() if part.rising is None else part.rising).order_by(*columns)
    rest: sa.ColumnElement[bool] = sa.true()
    while True:
        with engines.write(engine) as connection:
            prefer_index_scans(connection)
            last = connection.execute(ends.where(rest).offset(STRETCH - 1).limit(1)).one_or_none()
            stretch = rest if last is None else rest & (key <= last[:-1])
            chunk = sa.select(*columns).where(stretch, part.is_old).order_by(*columns).limit(CHUNK)
            count = _delete(connection, part.table, key.in_(chunk.correlate(None)), before)
        yield count
        if count < CHUNK:  # nothing is left of this stretch
            if last is None or (part.rising is not None and last[-1] >= before):
                return
            rest = key > last[:-1]


def _delete(
    connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool], before: dt.datetime
) -> int:
    """Delete rows; return how many this statement deleted, because another process may delete some of them first."""
    deletion = table.delete().where(where)
    if table is deliveries:
        return delete_deliveries(connection, deletion, before=before)
    return connection.execute(deletion, {"before": before}).rowcount


def delete_deliveries(connection: sa.Connection, deletion: sa.Delete, **parameters: Any) -> int:
    """Delete deliveries and add them to the counts of their runs; unsettled ones count as cancelled."""
    returning = deletion.returning(deliveries.c.run_id, deliveries.c.status)
    deleted = connection.execute(returning, parameters).all()
    counts = Counter(
        (row.run_id, row.status if row.status in {"accepted", "dead"} else "cancelled") for row in deleted
    )
    # Sorted, so that every process locks runs in the same order.
    run_ids = sorted({row.run_id for row in deleted if row.run_id is not None})
    if run_ids:
        updates = [{"id": run_id} | {name: counts[run_id, name] for name in _COUNTED} for run_id in run_ids]
        connection.execute(_ADD_TO_RUN, updates)
    return len(deleted)


_COUNTED = ("accepted", "dead", "cancelled")
_ADD_TO_RUN = (
    runs.update()
    .where(runs.c.run_id == sa.bindparam("id"))
    .values(
        {
            f"{name}_count": runs.c[f"{name}_count"] + sa.bindparam(name, type_=sa.BigInteger)
            for name in _COUNTED
        }
    )
)
