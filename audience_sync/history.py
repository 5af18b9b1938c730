"""Read-only questions about runs, members, users, deliveries and the queue.

Answers are dicts with the names of the JSON output.
"""

import datetime as dt
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import slots
from audience_sync.db import dialects, engines, leases, tables
from audience_sync.queue import destination, due
from audience_sync.settings import Settings

SAMPLE = 5
LANES = ("identify", "track", "company", "bulk")
UNSETTLED = ("held", "pending", "sending")
PAGE = 1_000  # rows that are read in one transaction
MINUTE = dt.timedelta(minutes=1)
ALIVE_SECONDS = 60.0  # since the daemon's last heartbeat


def run_rows(
    connection: sa.Connection,
    *,
    key: str | None = None,
    ids: Collection[int] | None = None,
    before: int | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Runs, newest first, with the counts of their deliveries, including those that were pruned.

    `before`: only those with smaller ids, here and below.
    """
    query = _older(_RUNS, tables.runs.c.run_id, before)
    if key is not None:
        query = query.where(tables.definitions.c.key == key)
    if ids is not None:
        query = query.where(dialects.is_among(connection, tables.runs.c.run_id, ids))
    rows = connection.execute(query.order_by(tables.runs.c.run_id.desc()).limit(limit)).all()
    counts: dict[int, dict[str, int]] = {run_id: {} for row in rows for run_id in (row.run_id, _held_id(row))}
    grouped = (
        sa.select(tables.deliveries.c.run_id, tables.deliveries.c.status, sa.func.count())
        .where(dialects.is_among(connection, tables.deliveries.c.run_id, counts))
        .group_by(tables.deliveries.c.run_id, tables.deliveries.c.status)
    )
    for run_id, status, count in connection.execute(grouped):
        counts[run_id][status] = count
    return [_run(row, counts[row.run_id], counts[_held_id(row)]) for row in rows]


def _held_id(row: Any) -> int:
    """The run id of a run's held deliveries; a held run may have taken them over from the run that it replaced."""
    held_id: int = (row.deliveries_run_id if row.status == "held" else None) or row.run_id
    return held_id


def _older(query: sa.Select[Any], column: sa.Column[int], before: int | None) -> sa.Select[Any]:
    return query if before is None else query.where(column < before)


def pages(
    engine: sa.Engine, rows: Callable[..., list[dict[str, Any]]], id_name: str
) -> Iterator[dict[str, Any]]:
    """All rows, newest first. Each page has a transaction of its own, so that a slow reader locks nothing."""
    before = None
    while True:
        with engines.read(engine) as connection:
            page = rows(connection, before=before, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        before = page[-1][id_name]


# Written as in the partial indexes, so that they are used.
_IS_RUNNING = tables.runs.c.status == sa.literal_column("'running'")
_IS_HELD = tables.runs.c.status == sa.literal_column("'held'")
_RUNS = sa.select(tables.runs, tables.definitions.c.key).join(
    tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id
)


def _run(row: Any, own: dict[str, int], of_held: dict[str, int]) -> dict[str, Any]:
    count = own
    if row.status == "held":
        count = own | {"held": of_held.get("held", 0)}
    elif row.status == "rejected":  # a newer held run has taken them over
        count = own | {"held": 0}
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
        "set_aside_count": sum(_set_aside(row).values()),
        "accepted_count": row.accepted_count + count.get("accepted", 0),
        "pending_count": sum(count.get(status, 0) for status in UNSETTLED),
        "dead_count": row.dead_count + count.get("dead", 0),
        "cancelled_count": row.cancelled_count + count.get("cancelled", 0),
        "error": row.error,
    }


def _set_aside(row: Any) -> dict[str, int]:
    """Rows that could not be used, by reason. Earlier releases also stored duplicates, which collapse instead."""
    return {reason: count for reason, count in (row.set_aside or {}).items() if reason != "duplicate"}


def run_in_full(connection: sa.Connection, run_id: int) -> dict[str, Any] | None:
    """A run with what was set aside and samples of the users who changed; None if there is no such run."""
    rows = run_rows(connection, ids=[run_id])
    if not rows:
        return None
    row = connection.execute(sa.select(tables.runs).where(tables.runs.c.run_id == run_id)).one()
    is_committed = row.status not in {"held", "rejected"}
    return (
        rows[0]
        | {"held_by": row.held_by, "set_aside": _set_aside(row)}
        | (_samples(connection, row) if is_committed else _held_samples(connection, row))
    )


def _samples(connection: sa.Connection, row: Any) -> dict[str, list[str]]:
    """Users who changed in a committed run, from the intervals that it began and ended."""
    began = sa.union(
        _users(tables.members, tables.members.c.entered_run_id, row),
        _users(tables.past_members, tables.past_members.c.entered_run_id, row),
    ).subquery()
    ended = _users(tables.past_members, tables.past_members.c.exited_run_id, row).subquery()
    entered, exited = sa.select(began.c.user_id), sa.select(ended.c.user_id)
    return {
        "entered_sample": _sample(connection, entered.except_(exited)),
        "exited_sample": _sample(connection, exited.except_(entered)),
        "changed_sample": _sample(connection, entered.intersect(exited)),
    }


def _held_samples(connection: sa.Connection, row: Any) -> dict[str, list[str]]:
    """Users that a held or rejected run would change, from its deliveries and the members."""
    definition = connection.execute(
        sa.select(tables.definitions).where(tables.definitions.c.definition_id == row.definition_id)
    ).one()
    exit_body = f'{{"{definition.key}": {"false" if definition.kind == "audience" else "null"}}}'
    body = sa.cast(tables.deliveries.c.body, sa.Text)
    is_member = sa.exists().where(
        tables.members.c.definition_id == row.definition_id,
        tables.members.c.user_id == tables.deliveries.c.subject_id,
    )
    value = tables.members.c.value
    is_same = sa.exists().where(
        tables.members.c.definition_id == row.definition_id,
        tables.members.c.user_id == tables.deliveries.c.subject_id,
        sa.or_(value.is_(None), body == sa.literal(f'{{"{definition.key}": ').concat(value).concat("}")),
    )
    is_held = tables.deliveries.c.status == "held"
    users = sa.select(tables.deliveries.c.subject_id.label("user_id")).where(
        tables.deliveries.c.run_id == _held_id(row), is_held if row.status == "held" else ~is_held
    )
    return {
        "entered_sample": _sample(connection, users.where(body != exit_body, ~is_member)),
        "exited_sample": _sample(connection, users.where(body == exit_body, is_member)),
        "changed_sample": _sample(connection, users.where(body != exit_body, is_member, ~is_same)),
    }


def _users(table: sa.Table, column: sa.Column[int], row: Any) -> sa.Select[Any]:
    query = sa.select(table.c.user_id).where(column == row.run_id)
    return query.where(table.c.definition_id == row.definition_id) if table is tables.members else query


def _sample(connection: sa.Connection, users: sa.SelectBase) -> list[str]:
    subquery = users.subquery()
    statement = sa.select(subquery.c.user_id).order_by(subquery.c.user_id).limit(SAMPLE)
    return list(connection.execute(statement).scalars())


def definitions(connection: sa.Connection, settings: Settings, now: dt.datetime) -> list[dict[str, Any]]:
    """The configured definitions, then the keys that were synced but are not in the configuration any more."""
    configured = {definition.key: definition for definition in settings.definitions}
    rows = connection.execute(
        sa.select(tables.definitions).order_by(tables.definitions.c.definition_id)
    ).all()
    stored = {row.key: row for row in rows}
    sizes, last_runs = _member_counts(connection), _last_runs(connection)
    held = {run["key"] for run in _held_runs(connection)}
    outlooks = slots.outlooks(connection, settings.definitions, now)
    documents = []
    for key in dict.fromkeys([*configured, *stored]):
        row, definition = stored.get(key), configured.get(key)
        if row is not None and row.retired_at is not None:
            state = "retired"
        elif definition is None:
            state = "not configured"
        elif key in held:
            state = "held"
        else:
            state = "enabled" if definition.enabled else "disabled"
        outlook = outlooks.get(key)
        documents.append(
            {
                "key": key,
                "name": definition.name if definition else stored[key].name,
                "kind": definition.kind.value if definition else stored[key].kind,
                "member_count": sizes.get(key, 0),
                "last_run": last_runs.get(key),
                "next_slot_at": outlook.next_at if outlook and not outlook.waits else None,
                "state": state,
            }
        )
    return documents


def _last_runs(connection: sa.Connection) -> dict[str, dict[str, Any]]:
    run_ids = connection.execute(_newest()).scalars().all()
    return {run["key"]: run for run in run_rows(connection, ids=[run_id for run_id in run_ids if run_id])}


def _newest(*where: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The id of each definition's newest run that meets a condition, by the index of runs; null if there is none."""
    is_of = tables.runs.c.definition_id == tables.definitions.c.definition_id
    newest = (
        sa.select(tables.runs.c.run_id).where(is_of, *where).order_by(tables.runs.c.run_id.desc()).limit(1)
    )
    return sa.select(newest.correlate(tables.definitions).scalar_subquery()).select_from(tables.definitions)


def _member_counts(connection: sa.Connection) -> dict[str, int]:
    """The sizes of the last committed snapshots, without the members who were erased since."""
    run_ids = connection.execute(_newest(tables.runs.c.status == "succeeded")).scalars().all()
    query = _RUNS.where(dialects.is_among(connection, tables.runs.c.run_id, filter(None, run_ids)))
    query = query.add_columns(tables.definitions.c.forgotten_count)
    return {row.key: row.member_count - row.forgotten_count for row in connection.execute(query)}


def definition_id(connection: sa.Connection, key: str) -> int | None:
    """The id of a key that was synced before."""
    query = sa.select(tables.definitions.c.definition_id).where(tables.definitions.c.key == key)
    return connection.execute(query).scalar()


def member_rows(
    engine: sa.Engine, definition_id: int, at: dt.datetime | None
) -> Iterator[tuple[str, str | None]]:
    """(user id, JSON text of a trait's value) of each member, now or at a past time, ordered by user id.

    Each page has a transaction of its own, so that a slow reader locks nothing. All pages show the members after the
    same run, even if another one is committed meanwhile.
    """
    with engines.read(engine) as connection:
        run_id = _last_committed(connection, definition_id, at)
    after: str | None = ""  # no user id is empty
    while run_id is not None and after is not None:
        with engines.read(engine) as connection:
            last = _page_end(connection, definition_id, after)
            rows = connection.execute(_members_after(run_id, definition_id, after, last)).all()
        yield from ((row.user_id, row.value) for row in rows)
        after = last


def _last_committed(connection: sa.Connection, definition_id: int, at: dt.datetime | None) -> int | None:
    """The last run that was committed, for a moment that is not after `at`. Later runs have greater ids."""
    query = sa.select(sa.func.max(tables.runs.c.run_id)).where(
        tables.runs.c.definition_id == definition_id, tables.runs.c.status == "succeeded"
    )
    return connection.execute(query if at is None else query.where(tables.runs.c.as_of <= at)).scalar()


def _page_end(connection: sa.Connection, definition_id: int, after: str) -> str | None:
    """The last user id of a page of members and past members; None if all the remaining ones fit into the page."""
    heads = []
    for table in (tables.members, tables.past_members):
        is_left = (table.c.definition_id == definition_id, table.c.user_id > after)
        head = sa.select(table.c.user_id).where(*is_left).order_by(table.c.user_id).limit(PAGE)
        heads.append(sa.select(head.subquery()))
    users = sa.union_all(*heads).subquery()
    query = sa.select(users.c.user_id).order_by(users.c.user_id).offset(PAGE - 1).limit(1)
    return connection.execute(query).scalar()


def _members_after(run_id: int, definition_id: int, after: str, last: str | None) -> sa.CompoundSelect[Any]:
    parts = []
    for table in (tables.members, tables.past_members):
        part = sa.select(table.c.user_id, table.c.value).where(
            table.c.definition_id == definition_id, table.c.user_id > after, table.c.entered_run_id <= run_id
        )
        if last is not None:
            part = part.where(table.c.user_id <= last)
        if table is tables.past_members:
            part = part.where(table.c.exited_run_id > run_id)
        parts.append(part)
    return sa.union_all(*parts).order_by("user_id")


# As the view membership_history, but looked up for each definition. CROSS JOIN is SQLite's way to fix the order.
_MEMBERSHIPS = """
SELECT d.key, coalesce(m.value, 'true') AS value, r.as_of AS "from", NULL AS "to"
FROM {our}definitions d CROSS JOIN {our}members m JOIN {our}runs r ON r.run_id = m.entered_run_id
WHERE m.definition_id = d.definition_id AND m.user_id = :user_id
UNION ALL
SELECT d.key, coalesce(p.value, 'true'), r.as_of, x.as_of
FROM {our}definitions d CROSS JOIN {our}past_members p JOIN {our}runs r ON r.run_id = p.entered_run_id
JOIN {our}runs x ON x.run_id = p.exited_run_id
WHERE p.definition_id = d.definition_id AND p.user_id = :user_id
ORDER BY "from", key
"""


def user(connection: sa.Connection, user_id: str) -> dict[str, Any]:
    """A user's memberships with their times, deliveries, and the profile from calls."""
    memberships = dialects.sql(connection, _MEMBERSHIPS, user_id=user_id)
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
            for row in memberships
        ],
        "deliveries": delivery_rows(connection, user_id=user_id),
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
    """A time from a view, which on SQLite is text."""
    if isinstance(value, str):
        return dt.datetime.fromisoformat(value).replace(tzinfo=dt.UTC)
    return None if value is None else value.astimezone(dt.UTC)


def delivery_rows(
    connection: sa.Connection,
    *,
    status: str | None = None,
    user_id: str | None = None,
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
    query = _older(query, tables.deliveries.c.delivery_id, before)
    if status is not None:
        query = query.where(tables.deliveries.c.status == status)
    if user_id is not None:
        query = query.where(
            tables.deliveries.c.subject_id == user_id, tables.deliveries.c.action != "company"
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


def status(connection: sa.Connection, settings: Settings, now: dt.datetime) -> dict[str, Any]:
    """The state of the queue, the lanes, the daemon and the schedules."""
    counts = due.counts(connection, tables.deliveries.c.status.in_((*UNSETTLED, "dead")))
    created_at, is_queued = (
        tables.deliveries.c.created_at,
        tables.deliveries.c.status.in_(("pending", "sending")),
    )
    oldest = sa.select(sa.func.min(created_at, type_=created_at.type)).where(is_queued)
    stopped = destination.stopped(connection)
    holder = leases.holder(connection, leases.QUEUE)
    job = _bulk_job(connection)
    return {
        "stopped": stopped and {"since": stopped[0], "reason": stopped[1]},
        "deliverer": holder and {"host": holder.host, "pid": holder.pid},
        "pending_count": counts.get("pending", 0) + counts.get("sending", 0),
        "held_count": counts.get("held", 0),
        "held_runs": _held_runs(connection),
        "dead_count": counts.get("dead", 0),
        "oldest_at": connection.execute(oldest).scalar(),
        "late_count": _retried_count(connection, now),
        "bulk_job": job,
        "call_count": connection.execute(sa.select(sa.func.count()).select_from(tables.calls)).scalar_one(),
        "daemon": daemon_state(connection, now),
        "lanes": _lanes(connection, settings, job, now),
        **_schedules(connection, settings, now),
    }


def _held_runs(connection: sa.Connection) -> list[dict[str, Any]]:
    # Sorted here, because SQLite would read all runs in this order instead of the index of held ones.
    held = sorted(connection.execute(_RUNS.where(_IS_HELD)), key=lambda row: row.run_id)
    return [
        {"run_id": row.run_id, "key": row.key, "held_by": row.held_by, "reason": row.error} for row in held
    ]


def _failed_runs(
    connection: sa.Connection, settings: Settings, outlooks: Mapping[str, slots.Outlook]
) -> list[dict[str, Any]]:
    """The failures of enabled definitions that no later run has made good, and when they are tried again.

    A run whose process is gone counts as abandoned, before another process has found it.
    """
    has_failed = tables.runs.c.status.in_(("failed", "abandoned"))
    last = connection.execute(sa.select(_last_decided()).select_from(tables.definitions)).scalars()
    is_last = dialects.is_among(connection, tables.runs.c.run_id, filter(None, last))
    decided = connection.execute(_RUNS.where(is_last, has_failed)).all()
    running = connection.execute(_RUNS.where(_IS_RUNNING)).all()
    leased = leases.held_names(connection)
    failed = {}
    for row in sorted([*decided, *running], key=lambda row: row.run_id):
        is_running = row.status == "running"
        if is_running and leases.of_definition(row.key) in leased:
            continue
        failed[row.key] = {
            "run_id": row.run_id,
            "key": row.key,
            "trigger": row.trigger,
            "status": "abandoned" if is_running else row.status,
            "reason": "Its process ended before it was done." if is_running else row.error,
            "retry_at": outlooks[row.key].retry_at if row.key in outlooks else None,
        }
    enabled = {definition.key for definition in settings.definitions if definition.enabled}
    return [run for key, run in failed.items() if key in enabled]


def _last_decided() -> sa.ScalarSelect[int]:
    """The newest run of a definition that ended. A canary that did not fail does not count."""
    other = tables.runs.alias("other").c
    is_canary = sa.and_(other.mode == "canary", other.status.in_(("succeeded", "held", "rejected")))
    newest = sa.select(other.run_id).where(
        other.definition_id == tables.definitions.c.definition_id, other.status != "running", ~is_canary
    )
    return newest.order_by(other.run_id.desc()).limit(1).correlate(tables.definitions).scalar_subquery()


def _retried_count(connection: sa.Connection, now: dt.datetime) -> int:
    """The number of deliveries that failed and wait for another attempt."""
    statement = sa.select(sa.func.count()).where(
        tables.deliveries.c.status == "pending",
        tables.deliveries.c.attempt_count > 0,
        tables.deliveries.c.next_attempt_at > now,
    )
    return int(connection.execute(statement).scalar_one())


def _bulk_job(connection: sa.Connection) -> dict[str, Any] | None:
    """The bulk job that is under way."""
    columns = [
        tables.bulk_jobs.c[name]
        for name in ("job_id", "state", "row_count", "completed_count", "submitted_at")
    ]
    query = sa.select(*columns).where(tables.bulk_jobs.c.status.in_(("uploading", "running")))
    row = connection.execute(query.order_by(tables.bulk_jobs.c.request_id.desc()).limit(1)).one_or_none()
    return None if row is None else dict(row._mapping)  # noqa: SLF001  (SQLAlchemy's public name)


def daemon_state(connection: sa.Connection, now: dt.datetime) -> dict[str, Any]:
    heartbeat_at = destination.last_heartbeat(connection)
    is_alive = heartbeat_at is not None and now - heartbeat_at < dt.timedelta(seconds=ALIVE_SECONDS)
    return {"heartbeat_at": heartbeat_at, "is_alive": is_alive}


def _lanes(
    connection: sa.Connection, settings: Settings, job: dict[str, Any] | None, now: dt.datetime
) -> dict[str, dict[str, Any]]:
    """Each lane's limit and use, in requests; the bulk lane's in rows."""
    since = now - MINUTE
    requests = sa.select(tables.requests.c.lane, sa.func.count().label("number"))
    is_recent = sa.and_(tables.requests.c.lane.in_(LANES), tables.requests.c.started_at > since)
    requests = requests.where(is_recent).group_by(tables.requests.c.lane)
    rows = sa.select(sa.func.coalesce(sa.func.sum(tables.bulk_jobs.c.row_count), 0))
    sent = {row.lane: row.number for row in connection.execute(requests)}
    sent["bulk"] = int(connection.execute(rows.where(tables.bulk_jobs.c.submitted_at > since)).scalar_one())
    slow, limits = destination.slow_downs(connection), settings.destination
    per_minute = {
        "identify": limits.identify_per_minute,
        "track": limits.track_per_minute,
        "company": limits.company_per_minute,
        "bulk": limits.bulk_rows_per_minute if limits.bulk else 0,
    }
    lanes = {
        name: {
            "per_minute": int(limit * slow.get(name, {}).get("factor", 1.0)),
            "sent_last_minute": sent.get(name, 0),
            "paused_until": slow.get(name, {}).get("paused_until"),
            "reason": slow.get(name, {}).get("reason"),
        }
        for name, limit in per_minute.items()
    }
    if not lanes["bulk"]["reason"] and (job or not limits.bulk):
        lanes["bulk"]["reason"] = _describe(job) if job else "switched off"
    return lanes


def _describe(job: dict[str, Any]) -> str:
    done = "" if job["completed_count"] is None else f", {job['completed_count']:,} done"
    return f"a job of {job['row_count']:,} rows since {job['submitted_at']:%Y-%m-%d %H:%M}{done}"


def _schedules(connection: sa.Connection, settings: Settings, now: dt.datetime) -> dict[str, Any]:
    """The runs that failed, the next slots in order, and the keys whose slots wait for a held run or are late."""
    outlooks = slots.outlooks(connection, settings.definitions, now)
    upcoming = sorted(
        (outlook.next_at, key) for key, outlook in outlooks.items() if outlook.next_at and not outlook.waits
    )
    late_since = {key: outlook.late_since for key, outlook in outlooks.items() if outlook.late_since}
    return {
        "failed_runs": _failed_runs(connection, settings, outlooks),
        "next_slots": [{"key": key, "slot_at": slot_at} for slot_at, key in upcoming],
        "waiting": [key for key, outlook in outlooks.items() if outlook.waits],
        "late": list(late_since),
        "late_since": late_since,
    }


def call_rows(
    connection: sa.Connection, status: str | None, *, before: int | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Calls from applications, newest first."""
    query = sa.select(tables.calls).order_by(tables.calls.c.call_id.desc()).limit(limit)
    query = _older(query, tables.calls.c.call_id, before)
    if status is not None:
        query = query.where(tables.IGNORED if status == "ignored" else tables.calls.c.status == status)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001  (SQLAlchemy's public name)
