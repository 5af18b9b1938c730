"""What is kept, and for how long: old rows go in small pieces, and history adds up all the same.

Never what is still to be told: deliveries that are held, pending or being sent, and dead ones, which wait for
a later run or a person; and nothing that these refer to. Runs, members, profiles, companies and events stay.
"""

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import (
    SENDING,
    UtcDateTime,
    bulk_jobs,
    calls,
    deliveries,
    past_members,
    requests,
    runs,
    schedule_slots,
)
from audience_sync.queue.due import prefer_index_scans

CHUNK = 1_000  # rows that a transaction removes at most
STRETCH = 20_000  # rows that it looks at: what stays is passed over faster than what goes is removed
LONGEST_SECONDS = 100 * 365 * 86_400  # longer is forever: SQLite compares years of four digits


@dataclass(frozen=True, slots=True)
class Retention:
    """How long rows are kept, in seconds; `math.inf` is forever.

    Calls count from when they were received, deliveries from when they were settled, requests (with bulk
    jobs and the slots of schedules) from when they were started, past members from the end of the run in which they left.
    Requests are needed for an hour at least: the pace is remembered by them.
    """

    calls: float
    deliveries: float
    requests: float
    past_members: float


@dataclass(frozen=True, slots=True)
class _Part:
    """A table, which of its rows may go (by :before), and the time, if any, that rises with its key."""

    table: sa.Table
    may_go: sa.ColumnElement[bool]
    rising: sa.Column[dt.datetime] | None = None


_BEFORE = sa.bindparam("before", type_=UtcDateTime())
_SETTLED = deliveries.c.status.in_(("accepted", "cancelled"))  # for good: a dead one may live again
_dead = deliveries.alias()
_OVERTAKES = sa.exists().where(  # the reason why an older dead one must not be tried again
    _dead.c.subject_id == deliveries.c.subject_id,
    _dead.c.status == "dead",
    _dead.c.delivery_id < deliveries.c.delivery_id,
)
_OF_CALL = sa.exists().where(deliveries.c.call_id == calls.c.call_id, ~_SETTLED)
_UNDER_WAY = sa.exists().where(deliveries.c.request_id == requests.c.request_id, SENDING)
_LEFT = sa.exists().where(runs.c.run_id == past_members.c.exited_run_id, runs.c.finished_at < _BEFORE)
_slots = schedule_slots.alias()
_NEWEST_SLOT = (
    sa.select(sa.func.max(_slots.c.slot_at, type_=UtcDateTime()))
    .where(_slots.c.definition_id == schedule_slots.c.definition_id)
    .scalar_subquery()
)
_PARTS = (
    _Part(deliveries, _SETTLED & (deliveries.c.settled_at < _BEFORE) & ~_OVERTAKES, deliveries.c.created_at),
    _Part(calls, (calls.c.received_at < _BEFORE) & ~_OF_CALL, calls.c.received_at),
    _Part(requests, (requests.c.started_at < _BEFORE) & ~_UNDER_WAY, requests.c.started_at),
    _Part(bulk_jobs, bulk_jobs.c.settled_at < _BEFORE),
    _Part(past_members, _LEFT),
    _Part(schedule_slots, (schedule_slots.c.taken_at < _BEFORE) & (schedule_slots.c.slot_at < _NEWEST_SLOT)),
)


def prune(
    engine: sa.Engine,
    keep: Retention,
    now: dt.datetime,
    *,
    seconds: float = 5.0,
    monotonic: Callable[[], float] = time.monotonic,
) -> dict[str, int]:
    """Remove what is older than it is kept; how many rows of each table went.

    The tables take turns, a piece each, until nothing is left or `seconds` are over, which is looked at after
    each round: with 0 there is one. What is left then goes the next time. A piece is a write transaction of
    its own, so that others wait for less than a tenth of a second.
    """
    spans = {
        deliveries: keep.deliveries,
        calls: keep.calls,
        requests: keep.requests,
        bulk_jobs: keep.requests,
        past_members: keep.past_members,
        schedule_slots: keep.requests,
    }
    walks = {
        part.table.name: _walk(engine, part, now - dt.timedelta(seconds=spans[part.table]))
        for part in _PARTS
        if spans[part.table] <= LONGEST_SECONDS
    }
    removed = {table.name: 0 for table in spans}
    end = monotonic() + seconds
    while walks:
        for name, walk in list(walks.items()):
            count = next(walk, None)
            if count is None:
                del walks[name]
            else:
                removed[name] += count
        if monotonic() >= end:
            break
    return removed


def _walk(engine: sa.Engine, part: _Part, before: dt.datetime) -> Iterator[int]:
    """Go through a table by its key and remove what may go; how many rows of each piece.

    A piece is of one stretch of the table, however little of it may go. Where a time rises with the key, the
    walk ends after the stretch in which it reaches `before`.
    """
    columns = list(part.table.primary_key)
    key = sa.tuple_(*columns)
    ends = sa.select(*columns, sa.null() if part.rising is None else part.rising).order_by(*columns)
    rest: sa.ColumnElement[bool] = sa.true()
    while True:
        with engines.write(engine) as connection:
            prefer_index_scans(connection)
            last = connection.execute(ends.where(rest).offset(STRETCH - 1).limit(1)).one_or_none()
            stretch = rest if last is None else rest & (key <= last[:-1])
            piece = sa.select(*columns).where(stretch, part.may_go).order_by(*columns).limit(CHUNK)
            count = _remove(connection, part.table, key.in_(piece.correlate(None)), before)
        yield count
        if count < CHUNK:  # no more of this stretch
            if last is None or (part.rising is not None and last[-1] >= before):
                return
            rest = key > last[:-1]


def _remove(
    connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool], before: dt.datetime
) -> int:
    """Remove rows; runs keep count of those of their deliveries that go.

    Of exactly those: a count before the removal would see twice what two processes want to remove at once.
    """
    removal = table.delete().where(where)
    if table is not deliveries:
        return connection.execute(removal, {"before": before}).rowcount
    gone = connection.execute(
        removal.returning(deliveries.c.run_id, deliveries.c.status), {"before": before}
    ).all()
    counts = Counter((run_id, status) for run_id, status in gone)
    run_ids = sorted({run_id for run_id, _ in counts if run_id is not None})  # those of calls have none
    if run_ids:
        connection.execute(
            _REMEMBER,
            [
                {"id": each, "accepted": counts[each, "accepted"], "cancelled": counts[each, "cancelled"]}
                for each in run_ids
            ],
        )
    return len(gone)


_REMEMBER = (
    runs.update()
    .where(runs.c.run_id == sa.bindparam("id"))
    .values(
        accepted_count=runs.c.accepted_count + sa.bindparam("accepted", type_=sa.BigInteger),
        cancelled_count=runs.c.cancelled_count + sa.bindparam("cancelled", type_=sa.BigInteger),
    )
)
