"""Queries about deliveries, requests and calls."""

from collections.abc import Collection, Iterable
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, tables
from audience_sync.history.paging import Found, Matches, older, search

ACTIONS = ("identify", "track", "company")
STATUSES = ("held", "pending", "sending", "accepted", "dead", "cancelled")
CALL_STATUSES = ("accepted", "ignored")
CALL_TYPES = ("identify", "track", "group")
COUNTED = 20_000  # dead deliveries that are read to count those that match
LONGEST_PART = 5_000  # the most characters to search for in an error; SQLite allows 50,000 bytes
OUTCOMES = ("accepted", "refused", "no answer", "under way")


def delivery_rows(
    connection: sa.Connection,
    *,
    status: str | None = None,
    user_id: str | None = None,
    ids: Collection[int] | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Deliveries, newest first, each with the answer to the last request that carried it."""
    query = (
        sa.select(tables.deliveries, tables.requests.c.status_code, tables.requests.c.x_request_id)
        .join(tables.requests, tables.requests.c.request_id == tables.deliveries.c.request_id, isouter=True)
        .order_by(tables.deliveries.c.delivery_id.desc())
        .limit(limit)
    )
    query = older(query, tables.deliveries.c.delivery_id, before)
    if status is not None:
        query = query.where(tables.deliveries.c.status == status)
    if user_id is not None:
        query = query.where(
            tables.deliveries.c.subject_id == user_id, tables.deliveries.c.action != "company"
        )
    if ids is not None:
        query = query.where(dialects.is_among(connection, tables.deliveries.c.delivery_id, ids))
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
    connection: sa.Connection,
    status: str | None = None,
    *,
    ids: Collection[int] | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Calls from applications, newest first."""
    query = sa.select(tables.calls).order_by(tables.calls.c.call_id.desc()).limit(limit)
    query = older(query, tables.calls.c.call_id, before)
    if status is not None:
        query = query.where(tables.IGNORED if status == "ignored" else tables.calls.c.status == status)
    if ids is not None:
        query = query.where(dialects.is_among(connection, tables.calls.c.call_id, ids))
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001  (SQLAlchemy's public name)


def find_deliveries(
    connection: sa.Connection,
    *,
    status: str | None = None,
    action: str | None = None,
    key: str | None = None,
    run_id: int | None = None,
    user_id: str | None = None,
    error: str | None = None,
    before: int | None = None,
    limit: int,
) -> Found:
    """Search deliveries. `key`: the key of their definition. `error`: a part of their error, in upper or lower case."""
    column = tables.deliveries.c
    definition_id = tables.definitions.c.definition_id
    of_key = sa.select(definition_id).where(tables.definitions.c.key == key).scalar_subquery()

    def matches(row: Any) -> Iterable[sa.ColumnElement[bool]]:
        if user_id is not None and run_id is not None:
            yield row.run_id == run_id
        if user_id is not None and status is not None:
            yield row.status == status
        if action is not None:
            yield row.action == action
        if key is not None:
            yield row.definition_id == of_key
        if error is not None:
            yield _has_error(row, error)

    indexed: dict[sa.Column[Any], Any] = {}
    where = None
    if user_id is not None:
        indexed[column.subject_id], where = user_id, column.action != "company"
    elif run_id is not None:
        return _of_run(connection, run_id, [status] if status else STATUSES, matches, before, limit)
    elif status is not None:
        indexed[column.status] = status
    return search(connection, tables.deliveries, indexed, matches, where=where, before=before, limit=limit)


def _has_error(row: Any, part: str) -> sa.ColumnElement[bool]:
    """Return the condition that a delivery's error contains this part. Parts that SQLite refuses as too long never match."""
    return row.error.icontains(part, autoescape=True) if len(part) <= LONGEST_PART else sa.false()


def count_dead(
    connection: sa.Connection, *, action: str | None, key: str | None, user_id: str | None, error: str | None
) -> tuple[int, bool]:
    """The number of dead deliveries that match, and whether there may be more, because only COUNTED are read."""
    column = tables.deliveries.c
    dead = sa.select(tables.deliveries).where(column.status == "dead").order_by(column.delivery_id.desc())
    searched = dead.limit(COUNTED).subquery("searched")
    query = sa.select(sa.func.count()).select_from(searched)
    if action is not None:
        query = query.where(searched.c.action == action)
    if key is not None:
        definition_id = sa.select(tables.definitions.c.definition_id).where(tables.definitions.c.key == key)
        query = query.where(searched.c.definition_id == definition_id.scalar_subquery())
    if user_id is not None:
        query = query.where(searched.c.subject_id == user_id, searched.c.action != "company")
    if error is not None:
        query = query.where(_has_error(searched.c, error))
    is_cut = connection.execute(sa.select(sa.func.count()).select_from(searched)).scalar_one() == COUNTED
    return connection.execute(query).scalar_one(), is_cut


def _of_run(
    connection: sa.Connection,
    run_id: int,
    statuses: Iterable[str],
    matches: Matches,
    before: int | None,
    limit: int,
) -> Found:
    """Search the deliveries of a run, status by status, because that is the order of its index."""
    column = tables.deliveries.c
    parts = [
        search(
            connection,
            tables.deliveries,
            {column.run_id: run_id, column.status: status},
            matches,
            before=before,
            limit=limit,
        )
        for status in statuses
    ]
    ends = [part.older for part in parts if part.older is not None]
    end = max(ends, default=None)  # below this id, a part may be incomplete
    ids = sorted(
        (number for part in parts for number in part.ids if end is None or number >= end), reverse=True
    )
    if len(ids) > limit:
        return Found(ids[:limit], ids[limit - 1])
    return Found(ids, end, is_cut=any(part.is_cut and part.older == end for part in parts))


def delivery_details(connection: sa.Connection, ids: Collection[int]) -> list[dict[str, Any]]:
    """Deliveries as from `delivery_rows`, each with the key of its definition and the id of its last request."""
    column = tables.deliveries.c
    query = (
        sa.select(column.delivery_id, column.request_id, tables.definitions.c.key)
        .join(tables.definitions, tables.definitions.c.definition_id == column.definition_id, isouter=True)
        .where(dialects.is_among(connection, column.delivery_id, ids))
    )
    more = {
        row.delivery_id: {"request_id": row.request_id, "key": row.key} for row in connection.execute(query)
    }
    return [row | more[row["delivery_id"]] for row in delivery_rows(connection, ids=ids)]


def find_calls(
    connection: sa.Connection,
    *,
    status: str | None = None,
    call_type: str | None = None,
    user_id: str | None = None,
    event: str | None = None,
    before: int | None = None,
    limit: int,
) -> Found:
    def matches(row: Any) -> Iterable[sa.ColumnElement[bool]]:
        is_indexed = status == "ignored" and user_id is None
        for column, value in (
            (row.status, None if is_indexed else status),
            (row.type, call_type),
            (row.event, event),
        ):
            if value is not None:
                yield column == value

    indexed = {} if user_id is None else {tables.calls.c.user_id: user_id}
    where = tables.IGNORED if status == "ignored" and not indexed else None
    return search(connection, tables.calls, indexed, matches, where=where, before=before, limit=limit)


def find_requests(
    connection: sa.Connection,
    *,
    lane: str | None = None,
    outcome: str | None = None,
    x_request_id: str | None = None,
    before: int | None = None,
    limit: int,
) -> Found:
    """Search requests. `outcome` is one of OUTCOMES."""

    def matches(row: Any) -> Iterable[sa.ColumnElement[bool]]:
        if lane is not None:
            yield row.lane == lane
        if x_request_id is not None:
            yield row.x_request_id == x_request_id
        match outcome:
            case "accepted":
                yield row.status_code.between(200, 299)
            case "refused":
                yield sa.not_(row.status_code.between(200, 299))
            case "no answer":
                yield sa.and_(row.ended_at.is_not(None), row.status_code.is_(None))
            case "under way":
                yield row.ended_at.is_(None)

    return search(connection, tables.requests, {}, matches, before=before, limit=limit)


def request_rows(connection: sa.Connection, ids: Collection[int]) -> list[dict[str, Any]]:
    """Requests, newest first, each with its outcome."""
    query = sa.select(tables.requests).where(dialects.is_among(connection, tables.requests.c.request_id, ids))
    rows = connection.execute(query.order_by(tables.requests.c.request_id.desc()))
    return [row._asdict() | {"outcome": _outcome(row)} for row in rows]


def _outcome(row: Any) -> str:
    if row.ended_at is None:
        return "under way"
    if row.status_code is None:
        return "no answer"
    return "accepted" if 200 <= row.status_code <= 299 else "refused"


def bulk_job(connection: sa.Connection, request_id: int) -> dict[str, Any] | None:
    """The bulk job that a request uploaded."""
    query = sa.select(tables.bulk_jobs).where(tables.bulk_jobs.c.request_id == request_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else row._asdict()


def deliveries_of_request(
    connection: sa.Connection, request_id: int, before: int | None, limit: int
) -> Found:
    """The deliveries whose last request is this one. Deliveries that were sent again belong to a later request."""
    carried = {tables.deliveries.c.request_id: request_id}
    return search(connection, tables.deliveries, carried, before=before, limit=limit)
