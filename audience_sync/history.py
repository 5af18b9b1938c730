"""What people look up: runs, members, users and deliveries, as dicts whose names are those of the JSON output."""

import datetime as dt
import json
from collections.abc import Collection, Iterator
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, leases, tables
from audience_sync.queue import destination, due

SAMPLE = 5
UNDECIDED = ("held", "pending", "sending")
FETCH_ROWS = 10_000
MINUTE = dt.timedelta(minutes=1)


def run_rows(
    connection: sa.Connection,
    *,
    key: str | None = None,
    ids: Collection[int] | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Runs, newest first, with how far their deliveries are, those that are no longer kept among them."""
    query = sa.select(tables.runs, tables.definitions.c.key).join(
        tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id
    )
    if key is not None:
        query = query.where(tables.definitions.c.key == key)
    if ids is not None:
        query = query.where(tables.runs.c.run_id.in_(list(ids)))
    found = connection.execute(query.order_by(tables.runs.c.run_id.desc()).limit(limit)).all()
    counts: dict[int, dict[str, int]] = {row.run_id: {} for row in found}
    grouped = (
        sa.select(tables.deliveries.c.run_id, tables.deliveries.c.status, sa.func.count())
        .where(tables.deliveries.c.run_id.in_(list(counts)))
        .group_by(tables.deliveries.c.run_id, tables.deliveries.c.status)
    )
    for run_id, status, count in connection.execute(grouped):
        counts[run_id][status] = count
    return [_run(row, counts[row.run_id]) for row in found]


def _run(row: Any, count: dict[str, int]) -> dict[str, Any]:
    return {
        "run_id": row.run_id,
        "key": row.key,
        "mode": row.mode,
        "trigger": row.trigger,
        "status": row.status,
        "as_of": row.as_of,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "member_count": row.member_count,
        "entered_count": row.entered_count,
        "exited_count": row.exited_count,
        "changed_count": row.changed_count,
        "set_aside_count": sum((row.set_aside or {}).values()),
        "accepted_count": row.accepted_count + count.get("accepted", 0),
        "pending_count": sum(count.get(status, 0) for status in UNDECIDED),
        "dead_count": row.dead_count + count.get("dead", 0),
        "cancelled_count": row.cancelled_count + count.get("cancelled", 0),
        "error": row.error,
    }


def run_in_full(connection: sa.Connection, run_id: int) -> dict[str, Any] | None:
    """A run with what was set aside and some of those who changed; None where there is no such run."""
    found = run_rows(connection, ids=[run_id])
    if not found:
        return None
    row = connection.execute(sa.select(tables.runs).where(tables.runs.c.run_id == run_id)).one()
    waits = row.status in {"held", "rejected"}
    return (
        found[0]
        | {"held_by": row.held_by, "set_aside": row.set_aside or {}}
        | (_held_samples(connection, row) if waits else _samples(connection, row))
    )


def _samples(connection: sa.Connection, row: Any) -> dict[str, list[str]]:
    """Of a run that was committed, by the intervals that it began and ended."""
    came = sa.union(
        _users(tables.members, tables.members.c.entered_run_id, row),
        _users(tables.past_members, tables.past_members.c.entered_run_id, row),
    ).subquery()
    left = _users(tables.past_members, tables.past_members.c.exited_run_id, row).subquery()
    arrived, gone = sa.select(came.c.user_id), sa.select(left.c.user_id)
    return {
        "entered_sample": _sample(connection, arrived.except_(gone)),
        "exited_sample": _sample(connection, gone.except_(arrived)),
        "changed_sample": _sample(connection, arrived.intersect(gone)),
    }


def _held_samples(connection: sa.Connection, row: Any) -> dict[str, list[str]]:
    """Of a run that waits, or waited in vain: what its deliveries would do to the members."""
    definition = connection.execute(
        sa.select(tables.definitions).where(tables.definitions.c.definition_id == row.definition_id)
    ).one()
    gone = f'{{"{definition.key}": {"false" if definition.kind == "audience" else "null"}}}'
    told = sa.cast(tables.deliveries.c.body, sa.Text)
    is_member = sa.exists().where(
        tables.members.c.definition_id == row.definition_id,
        tables.members.c.user_id == tables.deliveries.c.subject_id,
    )
    value = tables.members.c.value
    is_same = sa.exists().where(
        tables.members.c.definition_id == row.definition_id,
        tables.members.c.user_id == tables.deliveries.c.subject_id,
        sa.or_(value.is_(None), told == sa.literal(f'{{"{definition.key}": ').concat(value).concat("}")),
    )
    users = sa.select(tables.deliveries.c.subject_id.label("user_id")).where(
        tables.deliveries.c.run_id == row.run_id
    )
    return {
        "entered_sample": _sample(connection, users.where(told != gone, ~is_member)),
        "exited_sample": _sample(connection, users.where(told == gone, is_member)),
        "changed_sample": _sample(connection, users.where(told != gone, is_member, ~is_same)),
    }


def _users(table: sa.Table, column: sa.Column[int], row: Any) -> sa.Select[Any]:
    return sa.select(table.c.user_id).where(table.c.definition_id == row.definition_id, column == row.run_id)


def _sample(connection: sa.Connection, users: sa.SelectBase) -> list[str]:
    named = users.subquery()
    statement = sa.select(named.c.user_id).order_by(named.c.user_id).limit(SAMPLE)
    return list(connection.execute(statement).scalars())


def definition_rows(connection: sa.Connection) -> dict[str, dict[str, Any]]:
    """Each key that was ever used: its size and its last run."""
    newest = sa.select(sa.func.max(tables.runs.c.run_id)).group_by(tables.runs.c.definition_id)
    last = {row["key"]: row for row in run_rows(connection, ids=connection.execute(newest).scalars().all())}
    held = set(
        connection.execute(
            sa.select(tables.runs.c.definition_id).where(tables.runs.c.status == "held")
        ).scalars()
    )
    sizes = {
        row.key: row.member_count
        for row in connection.execute(
            sa.select(tables.definitions.c.key, tables.runs.c.member_count)
            .join(tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id)
            .where(
                tables.runs.c.run_id.in_(
                    sa.select(sa.func.max(tables.runs.c.run_id))
                    .where(tables.runs.c.status == "succeeded")
                    .group_by(tables.runs.c.definition_id)
                )
            )
        )
    }
    return {
        row.key: {
            "key": row.key,
            "name": row.name,
            "kind": row.kind,
            "member_count": sizes.get(row.key, 0),
            "last_run": last.get(row.key),
            "is_retired": row.retired_at is not None,
            "is_held": row.definition_id in held,
        }
        for row in connection.execute(
            sa.select(tables.definitions).order_by(tables.definitions.c.definition_id)
        )
    }


def member_rows(
    connection: sa.Connection, definition_id: int, at: dt.datetime | None
) -> Iterator[tuple[str, str | None]]:
    """(user id, JSON text of a trait's value) of each member now or at a past moment, by user id."""
    query = sa.select(tables.members.c.user_id, tables.members.c.value).where(
        tables.members.c.definition_id == definition_id
    )
    if at is not None:
        entered, exited = tables.runs.alias("entered"), tables.runs.alias("exited")
        query = query.join(entered, entered.c.run_id == tables.members.c.entered_run_id).where(
            entered.c.as_of <= at
        )
        past = (
            sa.select(tables.past_members.c.user_id, tables.past_members.c.value)
            .join(entered, entered.c.run_id == tables.past_members.c.entered_run_id)
            .join(exited, exited.c.run_id == tables.past_members.c.exited_run_id)
            .where(
                tables.past_members.c.definition_id == definition_id,
                entered.c.as_of <= at,
                exited.c.as_of > at,
            )
        )
        both = query.union_all(past).subquery()
        query = sa.select(both.c.user_id, both.c.value)
    rows = connection.execution_options(stream_results=True, max_row_buffer=FETCH_ROWS).execute(
        query.order_by("user_id")
    )
    yield from ((row.user_id, row.value) for row in rows)


def user(connection: sa.Connection, user_id: str) -> dict[str, Any]:
    """All that is known of a user: memberships with their times, deliveries, and the profile that calls told."""
    history = dialects.sql(
        connection,
        'SELECT key, value, "from", "to" FROM {our}membership_history WHERE user_id = :user_id ORDER BY "from", key',
        user_id=user_id,
    )
    profile = connection.execute(
        sa.select(tables.profiles).where(tables.profiles.c.user_id == user_id)
    ).one_or_none()
    newest_events = connection.execute(
        sa.select(tables.events.c.name, tables.events.c.properties, tables.events.c.timestamp)
        .where(tables.events.c.user_id == user_id)
        .order_by(tables.events.c.timestamp.desc())
        .limit(SAMPLE)
    )
    return {
        "user_id": user_id,
        "memberships": [
            {"key": row.key, "value": json.loads(row.value), "from": _moment(row[2]), "to": _moment(row[3])}
            for row in history
        ],
        "deliveries": delivery_rows(
            connection, tables.deliveries.c.subject_id == user_id, tables.deliveries.c.action != "company"
        ),
        "profile": profile
        and {
            "traits": profile.traits,
            "company_id": profile.company_id,
            "first_seen_at": profile.first_seen_at,
            "last_seen_at": profile.last_seen_at,
            "events": [dict(row._mapping) for row in newest_events],  # noqa: SLF001  (SQLAlchemy's public name)
        },
    }


def _moment(value: Any) -> dt.datetime | None:
    """A time out of a view: text on SQLite."""
    if isinstance(value, str):
        return dt.datetime.fromisoformat(value).replace(tzinfo=dt.UTC)
    return None if value is None else value.astimezone(dt.UTC)


def delivery_rows(
    connection: sa.Connection, *where: sa.ColumnElement[bool], limit: int | None = None
) -> list[dict[str, Any]]:
    """Deliveries, newest first, with the answer of the last request that carried each."""
    query = (
        sa.select(tables.deliveries, tables.requests.c.status_code, tables.requests.c.x_request_id)
        .join(tables.requests, tables.requests.c.request_id == tables.deliveries.c.request_id, isouter=True)
        .where(*where)
        .order_by(tables.deliveries.c.delivery_id.desc())
        .limit(limit)
    )
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


def queue_state(connection: sa.Connection, now: dt.datetime) -> dict[str, Any]:
    """What `status` tells of the queue and of who works it."""
    counts = due.counts(connection, tables.deliveries.c.status.in_((*UNDECIDED, "dead")))
    unsettled = tables.deliveries.c.status.in_(("pending", "sending"))
    oldest = sa.select(
        sa.func.min(tables.deliveries.c.created_at, type_=tables.deliveries.c.created_at.type)
    ).where(unsettled)
    stopped = destination.stopped(connection)
    holder = leases.holder(connection, leases.QUEUE)
    sent = connection.execute(
        sa.select(tables.requests.c.lane, sa.func.count())
        .where(tables.requests.c.started_at > now - MINUTE)
        .group_by(tables.requests.c.lane)
    )
    return {
        "stopped": stopped and {"since": stopped[0], "reason": stopped[1]},
        "deliverer": holder and {"host": holder.host, "pid": holder.pid},
        "pending_count": counts.get("pending", 0) + counts.get("sending", 0),
        "held_count": counts.get("held", 0),
        "held_runs": [_held_run(row) for row in connection.execute(_HELD_RUNS)],
        "dead_count": counts.get("dead", 0),
        "oldest_at": connection.execute(oldest).scalar(),
        "late_count": _late_count(connection, now),
        "sent_last_minute": dict(map(tuple, sent)) | {"bulk": _rows_since(connection, now - MINUTE)},
        "slow_downs": destination.slow_downs(connection),
        "bulk_job": _bulk_job(connection),
        "call_count": connection.execute(sa.select(sa.func.count()).select_from(tables.calls)).scalar_one(),
    }


def _rows_since(connection: sa.Connection, moment: dt.datetime) -> int:
    """How many rows were sent in bulk jobs."""
    rows = sa.select(sa.func.coalesce(sa.func.sum(tables.bulk_jobs.c.row_count), 0))
    return int(connection.execute(rows.where(tables.bulk_jobs.c.submitted_at > moment)).scalar_one())


def _bulk_job(connection: sa.Connection) -> dict[str, Any] | None:
    """The bulk job that is under way."""
    columns = [
        tables.bulk_jobs.c[name]
        for name in ("job_id", "state", "row_count", "completed_count", "submitted_at")
    ]
    query = sa.select(*columns).where(tables.bulk_jobs.c.status.in_(("uploading", "running")))
    row = connection.execute(query.order_by(tables.bulk_jobs.c.request_id.desc()).limit(1)).one_or_none()
    return None if row is None else dict(row._mapping)  # noqa: SLF001  (SQLAlchemy's public name)


_HELD_RUNS = (
    sa.select(tables.runs, tables.definitions.c.key)
    .join(tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id)
    .where(tables.runs.c.status == "held")
    .order_by(tables.runs.c.run_id)
)


def _held_run(row: Any) -> dict[str, Any]:
    return {"run_id": row.run_id, "key": row.key, "held_by": row.held_by, "reason": row.error}


def _late_count(connection: sa.Connection, now: dt.datetime) -> int:
    """Deliveries that were tried, failed, and wait for another attempt."""
    statement = sa.select(sa.func.count()).where(
        tables.deliveries.c.status == "pending",
        tables.deliveries.c.attempt_count > 0,
        tables.deliveries.c.next_attempt_at > now,
    )
    return int(connection.execute(statement).scalar_one())


def call_rows(
    connection: sa.Connection, status: str | None, *, limit: int | None = None
) -> list[dict[str, Any]]:
    """What applications handed in, newest first."""
    query = sa.select(tables.calls).order_by(tables.calls.c.call_id.desc()).limit(limit)
    if status is not None:
        query = query.where(tables.calls.c.status == status)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001  (SQLAlchemy's public name)
