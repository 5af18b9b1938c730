"""The queue: who is next, what was sent, and what became of it. Every function runs in its caller's transaction."""

import datetime as dt
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db import tables
from audience_sync.db.dialects import chunks, is_sqlite, sql
from audience_sync.db.tables import PENDING, SENDING, UNSETTLED

LANES = ("track", "company", "identify")
CLASSES = ("call", "change", "push")  # in the order of their right of way
LONGEST_REQUEST = dt.timedelta(minutes=15)
FIRST_IDENTIFY_WAIT = dt.timedelta(minutes=10)
SUPERSEDED = "overtaken by a newer value"

# A subject waits while something of it is under way, and after an unknown outcome; older values wait for a newer
# one that must go alone. The first of those that are due stands for the subject, however many it has.
_WAITS = """EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id AND b.action = d.action
  AND b.status IN ('pending', 'sending') AND (b.status = 'sending' OR b.quiet_until > :now
    OR (b.alone AND b.next_attempt_at > :now AND (b.value_at > d.value_at
        OR (b.value_at = d.value_at AND b.delivery_id > d.delivery_id)))
    OR (b.delivery_id < d.delivery_id AND b.class = d.class AND b.alone = d.alone
        AND b.next_attempt_at <= :now)))"""
# A user's tracks go in order, and after that user's first identify.
_TRACK_WAITS = """(EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
    AND b.action = 'track' AND b.status IN ('pending', 'sending')
    AND (b.status = 'sending' OR b.delivery_id < d.delivery_id))
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
    is_call: bool
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
class ClaimedRequest:
    """One request to be: its row in requests, and its deliveries, oldest value first."""

    request_id: int
    action: str
    subject_id: str
    is_push: bool
    deliveries: list[Delivery]


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that was answered, or never will be, and what becomes of its deliveries."""

    request_id: int
    ended_at: dt.datetime
    status_code: int | None
    x_request_id: str | None
    error: str | None
    settlements: list[Settlement]


def _is_next(action: str, delivery_class: str) -> sa.ColumnElement[bool]:
    """Pending, by the index that the queue is worked by."""
    return sa.and_(
        tables.deliveries.c.action == action, tables.deliveries.c["class"] == delivery_class, PENDING
    )


def recover(
    connection: sa.Connection,
    now: dt.datetime,
    grace: dt.timedelta,
    *,
    tracks_at_most_once: bool,
    but: Collection[int] = (),
) -> Counter[str]:
    """Take back what a process that is gone was sending: nobody knows whether it was applied.

    `but` are requests that are known to be under way; what is in bulk jobs stays there. How many deliveries are
    pending and dead by it.
    """
    lost = "The process ended before the answer came"
    in_jobs = sa.select(tables.bulk_jobs.c.request_id).where(tables.bulk_jobs.c.settled_at.is_(None))
    mine = sa.and_(
        SENDING,
        tables.deliveries.c.request_id.not_in(list(but)),
        tables.deliveries.c.request_id.not_in(in_jobs),
    )
    connection.execute(
        tables.requests.update()
        .where(
            tables.requests.c.ended_at.is_(None),
            tables.requests.c.request_id.in_(sa.select(tables.deliveries.c.request_id).where(mine)),
        )
        .values(ended_at=now, error=lost)
    )
    became: Counter[str] = Counter()
    if tracks_at_most_once:
        became["dead"] = connection.execute(
            tables.deliveries.update()
            .where(mine, tables.deliveries.c.action == "track")
            .values(status="dead", settled_at=now, error=f"Not repeated (track_policy at_most_once): {lost}")
        ).rowcount
    became["pending"] = connection.execute(
        tables.deliveries.update()
        .where(mine)
        .values(status="pending", next_attempt_at=now + grace, quiet_until=now + grace, error=lost)
    ).rowcount
    return became


def recent_request_ends(connection: sa.Connection, since: dt.datetime) -> list[tuple[str, dt.datetime]]:
    """The lanes and ends of the requests that Userpilot may have seen since, in the order of their ends."""
    rows = connection.execute(
        sa.select(tables.requests.c.lane, tables.requests.c.ended_at)
        .where(
            tables.requests.c.lane.in_(LANES),
            tables.requests.c.started_at > since - LONGEST_REQUEST,  # by the index
            tables.requests.c.ended_at > since,
        )
        .order_by(tables.requests.c.ended_at)
    )
    return [(row.lane, row.ended_at) for row in rows]


def prefer_index_scans(connection: sa.Connection) -> None:
    """In this transaction let PostgreSQL walk the queue in order, though its statistics are of an empty one."""
    if not is_sqlite(connection):
        off = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "enable_hashjoin", "enable_mergejoin")
        connection.execute(sa.select(*(sa.func.set_config(name, "off", True) for name in off)))


def refresh_statistics(connection: sa.Connection) -> None:
    """Let PostgreSQL learn that the queue has grown, so that it goes by the right index: roughly, as lanes wait."""
    if not is_sqlite(connection):
        connection.execute(sa.select(sa.func.set_config("default_statistics_target", "10", True)))
        sql(connection, "ANALYZE {our}deliveries")


def subjects_due(
    connection: sa.Connection,
    action: str,
    delivery_class: str,
    now: dt.datetime,
    limit: int,
    fingerprint: str | None = None,
) -> list[str]:
    """The subjects whose turn it is, each once, oldest first; none of which something is under way.

    `fingerprint`: only what is for this destination, or for none in particular.
    """
    rows = due(connection, "d.subject_id", action, delivery_class, now, limit, fingerprint)
    return list(dict.fromkeys(rows.scalars()))


def due(
    connection: sa.Connection,
    columns: str,
    action: str,
    delivery_class: str,
    now: dt.datetime,
    limit: int,
    fingerprint: str | None,
) -> sa.CursorResult[*tuple[Any, ...]]:
    """These columns of the deliveries `d` that stand for the subjects whose turn it is, oldest first."""
    waits = _TRACK_WAITS if action == "track" else _WAITS
    parameters: dict[str, Any] = {"patience": now - FIRST_IDENTIFY_WAIT} if action == "track" else {}
    ours = ""
    if fingerprint is not None:
        ours = "AND (d.fingerprint = :fingerprint OR d.fingerprint IS NULL) "
        parameters["fingerprint"] = fingerprint
    return sql(
        connection,
        f"SELECT {columns} FROM {{our}}deliveries d WHERE d.action = :action AND d.class = :class "
        f"AND d.status = 'pending' AND d.next_attempt_at <= :now AND NOT {waits} {ours}"
        "ORDER BY d.next_attempt_at, d.delivery_id LIMIT :limit",
        **{"class": delivery_class},
        action=action,
        now=now,
        limit=limit,
        **parameters,
    )


def pending_of(
    connection: sa.Connection,
    action: str,
    subjects: Sequence[str],
    now: dt.datetime,
    fingerprint: str | None = None,
) -> list[list[Delivery]]:
    """What is pending for each of these subjects, as it will be once claimed; of tracks only the first.

    A subject of which another process is changing something is left out.
    """
    statement = _PENDING_TRACKS if action == "track" else _PENDING
    if fingerprint is not None:
        statement = statement.where(
            sa.or_(tables.deliveries.c.fingerprint == fingerprint, tables.deliveries.c.fingerprint.is_(None))
        )
    found: dict[str, list[Delivery]] = {subject: [] for subject in subjects}
    for row in connection.execute(statement, {"action": action, "subjects": subjects}):
        found[row.subject_id].append(
            Delivery(
                delivery_id=row.delivery_id,
                action=action,
                subject_id=row.subject_id,
                body=row.body,
                value_at=row.value_at,
                is_call=row.call_id is not None,
                alone=row.alone,
                attempt_count=row.attempt_count + 1,
                first_attempt_at=row.first_attempt_at or now,
                next_attempt_at=row.next_attempt_at,
            )
        )
    if not is_sqlite(connection):
        ids = [delivery.delivery_id for pending in found.values() for delivery in pending]
        ours = set(connection.execute(_LOCK, {"ids": ids}).scalars())
        return [each for each in found.values() if each and ours.issuperset(d.delivery_id for d in each)]
    return [pending for pending in found.values() if pending]


_ID = tables.deliveries.c.delivery_id
_IS_PENDING = tables.deliveries.c.status == "pending"
_OF_SUBJECTS = sa.and_(
    tables.deliveries.c.subject_id.in_(sa.bindparam("subjects", expanding=True)),
    tables.deliveries.c.action.concat("") == sa.bindparam("action"),  # not by the index that begins with it
    UNSETTLED,  # but by this one
    PENDING,
)
_COLUMNS = sa.select(
    _ID,
    tables.deliveries.c.subject_id,
    tables.deliveries.c.body,
    tables.deliveries.c.value_at,
    tables.deliveries.c.call_id,
    tables.deliveries.c.alone,
    tables.deliveries.c.attempt_count,
    tables.deliveries.c.first_attempt_at,
    tables.deliveries.c.next_attempt_at,
)
_PENDING = _COLUMNS.where(_OF_SUBJECTS)
_PENDING_TRACKS = _COLUMNS.where(
    _ID.in_(sa.select(sa.func.min(_ID)).where(_OF_SUBJECTS).group_by(tables.deliveries.c.subject_id)),
    _IS_PENDING,
)
_LOCK = (
    sa.select(_ID)
    .where(sa.any_(sa.bindparam("ids", type_=postgresql.ARRAY(sa.BigInteger))) == _ID, _IS_PENDING)
    .with_for_update(skip_locked=True)
)


def superseded_traits(
    connection: sa.Connection,
    values: Sequence[Delivery | sa.Row[Any]],
    statuses: Collection[str] = tuple(Status),
) -> dict[int, frozenset[str]]:
    """The traits of these deliveries of which their subjects have newer values in one of the statuses."""
    found: dict[int, frozenset[str]] = {}
    states = [each for each in values if each.action != "track"]
    if not states:
        return found
    by_subject: dict[tuple[str, str], list[Any]] = {}
    for each in states:
        by_subject.setdefault((each.action, each.subject_id), []).append(each)
    rejected = sa.select(tables.runs.c.run_id).where(
        tables.runs.c.status == "rejected"
    )  # whose values never held
    newer = sa.select(
        _ID,
        tables.deliveries.c.action,
        tables.deliveries.c.subject_id,
        tables.deliveries.c.value_at,
        tables.deliveries.c.body,
    )
    rows = connection.execute(
        newer.where(
            tables.deliveries.c.subject_id.in_({each.subject_id for each in states}),
            tables.deliveries.c.value_at >= min(each.value_at for each in states),
            tables.deliveries.c.status.in_(list(statuses)),
            sa.or_(
                tables.deliveries.c.status != "cancelled",
                tables.deliveries.c.run_id.is_(None),
                tables.deliveries.c.run_id.not_in(rejected),
            ),
        )
    )
    newer_of: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        newer_of.setdefault((row.action, row.subject_id), []).append(row)
    for subject, told in newer_of.items():
        told.sort(key=_age)
        names: frozenset[str] = frozenset()
        for each in sorted(by_subject.get(subject, ()), key=_age, reverse=True):
            while told and _age(told[-1]) > _age(each):
                names = names.union(told.pop().body)
            if names:
                found[each.delivery_id] = names
    return found


def _age(value: Any) -> tuple[dt.datetime, int]:
    return value.value_at, value.delivery_id


def claim(
    connection: sa.Connection,
    lane: str,
    epoch: int,
    chosen: Sequence[list[Delivery]],
    now: dt.datetime,
    *,
    is_push: bool,
) -> list[ClaimedRequest]:
    """Write a request for each list before it is sent, and mark its deliveries."""
    inserted = connection.execute(
        _START,
        [{"lane": lane, "epoch": epoch, "started_at": now, "delivery_count": len(each)} for each in chosen],
    )
    claims = [
        ClaimedRequest(request_id, lane, each[0].subject_id, is_push, each)
        for request_id, each in zip(inserted.scalars(), chosen, strict=True)
    ]
    connection.execute(
        _CLAIM,
        [
            {"id": delivery.delivery_id, "request": claimed.request_id, "first": delivery.first_attempt_at}
            for claimed in claims
            for delivery in claimed.deliveries
        ],
    )
    return claims


_START = tables.requests.insert().returning(tables.requests.c.request_id, sort_by_parameter_order=True)
_CLAIM = (
    tables.deliveries.update()
    .where(tables.deliveries.c.delivery_id == sa.bindparam("id"), tables.deliveries.c.status == "pending")
    .values(
        status="sending",
        request_id=sa.bindparam("request"),
        attempt_count=tables.deliveries.c.attempt_count + 1,
        first_attempt_at=sa.bindparam("first"),
        quiet_until=None,
    )
)


def cancel_superseded(connection: sa.Connection, ids: Sequence[int], now: dt.datetime) -> None:
    for some in chunks(ids):
        connection.execute(
            tables.deliveries.update()
            .where(tables.deliveries.c.delivery_id.in_(some), tables.deliveries.c.status == "pending")
            .values(status="cancelled", settled_at=now, error=SUPERSEDED)
        )


def settle(connection: sa.Connection, ended: Sequence[EndedRequest]) -> None:
    connection.execute(
        _END,
        [
            {
                "id": each.request_id,
                "ended": each.ended_at,
                "code": each.status_code,
                "x_id": each.x_request_id,
                "told": each.error,
            }
            for each in ended
        ],
    )
    connection.execute(
        _SETTLE,
        [
            {
                "id": settlement.delivery_id,
                "request": each.request_id,
                "to": settlement.status.value,
                "told": settlement.error,
                "settled": each.ended_at if settlement.status is not Status.PENDING else None,
                "next": settlement.next_attempt_at,
                "quiet": settlement.quiet_until,
                "is_alone": settlement.alone,
                "no_attempt": 0 if settlement.was_attempt else 1,
            }
            for each in ended
            for settlement in each.settlements
        ],
    )


_END = (
    tables.requests.update()
    .where(tables.requests.c.request_id == sa.bindparam("id"))
    .values(
        ended_at=sa.bindparam("ended"),
        status_code=sa.bindparam("code"),
        x_request_id=sa.bindparam("x_id"),
        error=sa.bindparam("told"),
    )
)
_SETTLE = (
    tables.deliveries.update()
    .where(
        tables.deliveries.c.delivery_id == sa.bindparam("id"),
        tables.deliveries.c.status == "sending",
        tables.deliveries.c.request_id == sa.bindparam("request"),
    )
    .values(
        status=sa.bindparam("to"),
        error=sa.bindparam("told"),
        settled_at=sa.bindparam("settled"),
        next_attempt_at=sa.func.coalesce(
            sa.bindparam("next", type_=tables.deliveries.c.next_attempt_at.type),
            tables.deliveries.c.next_attempt_at,
        ),
        quiet_until=sa.bindparam("quiet"),
        alone=sa.bindparam("is_alone"),
        attempt_count=tables.deliveries.c.attempt_count - sa.bindparam("no_attempt", type_=sa.Integer),
    )
)


def next_due(connection: sa.Connection, now: dt.datetime) -> list[tuple[str, str, dt.datetime]]:
    """The moments to come at which something pending may get its turn, with its action and class."""
    found = [
        (action, delivery_class, moment)
        for action, delivery_class, *moments in connection.execute(_NEXT_DUE, {"now": now})
        for moment in moments
        if moment is not None
    ]
    first_track = connection.execute(_FIRST_TRACK, {"now": now, "since": now - FIRST_IDENTIFY_WAIT}).scalar()
    if first_track is not None:
        found.append(("track", "call", first_track + FIRST_IDENTIFY_WAIT))
    return found


_DUE_AT = tables.deliveries.c.next_attempt_at
_NOW = sa.bindparam("now", type_=_DUE_AT.type)
_SINCE = sa.bindparam("since", type_=_DUE_AT.type)
_QUIET_UNTIL = sa.case(
    (tables.deliveries.c.quiet_until > _NOW, tables.deliveries.c.quiet_until)
)  # never after its _DUE_AT
_NEXT_DUE = sa.union_all(
    *(
        sa.select(
            sa.literal(action),
            sa.literal(delivery_class),
            sa.func.min(_DUE_AT, type_=_DUE_AT.type),
            sa.func.min(_QUIET_UNTIL, type_=_DUE_AT.type),
        ).where(_is_next(action, delivery_class), _DUE_AT > _NOW)
        for action in LANES
        for delivery_class in CLASSES
    )
)
_FIRST_TRACK = sa.select(sa.func.min(_DUE_AT, type_=_DUE_AT.type)).where(
    _is_next("track", "call"), _DUE_AT > _SINCE, _DUE_AT <= _NOW
)


def counts(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> dict[str, int]:
    rows = connection.execute(
        sa.select(tables.deliveries.c.status, sa.func.count())
        .where(*where)
        .group_by(tables.deliveries.c.status)
    )
    return {status: count for status, count in rows}  # noqa: C416  (a row is not a pair to mypy)


def pending_counts(connection: sa.Connection) -> dict[str, int]:
    """Of each action: what is pending or being sent."""
    rows = connection.execute(
        sa.select(tables.deliveries.c.action, sa.func.count())
        .where(UNSETTLED)
        .group_by(tables.deliveries.c.action)
    )
    return {action: count for action, count in rows}  # noqa: C416  (a row is not a pair to mypy)


def pending_count(connection: sa.Connection) -> int:
    return sum(pending_counts(connection).values())


def is_anything_pending(connection: sa.Connection) -> bool:
    """Whether `pending_count` is more than 0: soon told, however long the queue is."""
    one = sa.select(tables.deliveries.c.delivery_id).where(UNSETTLED).limit(1)
    return connection.execute(one).first() is not None


def is_due(connection: sa.Connection, now: dt.datetime) -> bool:
    """Whether anything may be claimed, or was being sent by a process that is gone."""
    due: list[Any] = [
        sa.and_(_is_next(action, delivery_class), _DUE_AT <= _NOW)
        for action in LANES
        for delivery_class in CLASSES
    ]
    exist = [sa.exists(sa.select(_ID).where(each)) for each in (*due, SENDING)]
    return bool(connection.execute(sa.select(sa.or_(*exist)), {"now": now}).scalar_one())


def are_waiting(
    connection: sa.Connection, run_ids: Collection[int], call_ids: Collection[int], now: dt.datetime
) -> bool:
    """Whether deliveries of these origins wait to be claimed for the first time."""
    for origin, ids in ((tables.deliveries.c.run_id, run_ids), (tables.deliveries.c.call_id, call_ids)):
        for chunk in chunks(ids):
            statement = sa.select(tables.deliveries.c.delivery_id).where(
                origin.in_(chunk),
                tables.deliveries.c.status.in_(("pending", "")),  # not by the index of all that is pending
                tables.deliveries.c.attempt_count == 0,
                tables.deliveries.c.next_attempt_at <= now,
            )
            if connection.execute(statement.limit(1)).first() is not None:
                return True
    return False
