"""The state of the queue, the lanes, the daemon and the schedules."""

import datetime as dt
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import foreign, slots
from audience_sync.db import leases, tables
from audience_sync.history.paging import count_of
from audience_sync.history.runs import UNSETTLED, failed_runs, held_runs, unusable_runs
from audience_sync.queue import backlog, destination, due, pace
from audience_sync.settings import Settings

LANES = ("identify", "track", "company", "bulk")
MINUTE = dt.timedelta(minutes=1)
MAX_COUNTED_OF_LANE = 500_000  # pending deliveries that are counted; the time remaining is computed from them
_IDS = sa.select(tables.deliveries.c.delivery_id)


def status(connection: sa.Connection, settings: Settings, now: dt.datetime) -> dict[str, Any]:
    """The state of the queue, the lanes, the daemon and the schedules."""
    counts = backlog.counts(connection, tables.deliveries.c.status.in_((*UNSETTLED, "dead")))
    created_at, is_queued = (
        tables.deliveries.c.created_at,
        tables.deliveries.c.status.in_(("pending", "sending")),
    )
    oldest = sa.select(sa.func.min(created_at, type_=created_at.type)).where(is_queued)
    return attention(connection, settings, now) | {
        "pending_count": counts.get("pending", 0) + counts.get("sending", 0),
        "held_count": counts.get("held", 0),
        "dead_count": counts.get("dead", 0),
        "oldest_at": connection.execute(oldest).scalar(),
        "late_count": _retried_count(connection, now),
        "call_count": connection.execute(sa.select(sa.func.count()).select_from(tables.calls)).scalar_one(),
    }


def attention(connection: sa.Connection, settings: Settings, now: dt.datetime) -> dict[str, Any]:
    """Problems that need a person, the lanes, the daemon and the schedules. Counts at most MAX_COUNTED dead deliveries."""
    stopped = destination.stopped(connection)
    holder = leases.holder(connection, leases.QUEUE)
    job = _bulk_job(connection)
    return {
        "stopped": stopped and {"since": stopped[0], "reason": stopped[1]},
        "deliverer": holder and {"host": holder.host, "pid": holder.pid},
        "held_runs": held_runs(connection),
        "dead_count": connection.execute(count_of(_IDS.where(tables.DEAD))).scalar_one(),
        "bulk_job": job,
        "daemon": daemon_state(connection, now),
        "lanes": _lanes(connection, settings, job, now),
        **schedule_state(connection, settings, now),
    }


def problems(
    connection: sa.Connection, settings: Settings, status: dict[str, Any], now: dt.datetime
) -> list[tuple[str, Any]]:
    """Problems that need a person, most urgent first, as pairs of a kind and its facts.

    `status` is the result of `attention` or `status` on the same connection.
    """
    daemon = status["daemon"]
    is_missing = daemon["heartbeat_at"] and not daemon["is_alive"] and status["next_slots"]
    scheduled = {definition.key for definition in settings.definitions if definition.schedule}
    ours = destination.Destination(settings.destination.fingerprint or None)
    every = [
        ("stopped", status["stopped"]),
        ("foreign", foreign.foreign_keys(connection, ours)),
        *(("lane", lane) for lane in _lanes_in_trouble(connection, status, now)),
        *(("held", run) for run in status["held_runs"]),
        *(("failed", run) for run in status["failed_runs"]),
        *(("unusable", run) for run in unusable_runs(connection, settings)),
        ("dead", status["dead_count"]),
        ("waiting", [key for key in status["waiting"] if key in scheduled]),
        ("late", status["late_since"]),
        ("daemon", daemon if is_missing else None),
    ]
    return [(kind, facts) for kind, facts in every if facts]


def _lanes_in_trouble(
    connection: sa.Connection, status: dict[str, Any], now: dt.datetime
) -> Iterator[dict[str, Any]]:
    """The lanes that are paused (`until`), and lanes with something to send whose last requests failed."""
    for name, slow in {} if status["stopped"] else _slow_downs(connection, now).items():
        until = dt.datetime.fromisoformat(slow["paused_until"])
        has_failed = "pause_level" in slow
        is_of_lane = tables.deliveries.c.action == name
        waiting = sa.select(tables.deliveries.c.delivery_id).where(tables.PENDING, is_of_lane).limit(1)
        is_refusing = "refusal_streak" in slow
        if until > now or ((has_failed or is_refusing) and connection.execute(waiting).first()):
            by_itself = status["deliverer"] or status["daemon"]["is_alive"]
            again = "It is retried automatically." if by_itself else "`audience-sync deliver` tries again."
            check = " Check [destination] endpoint and the network." if has_failed else ""
            facts = {"lane": name, "reason": slow["reason"].rstrip("."), "advice": again + check}
            yield facts | {"until": until if until > now else None}


def _slow_downs(connection: sa.Connection, now: dt.datetime) -> dict[str, Any]:
    """The current slow-downs, without those that the next process ignores."""
    stored = destination.slow_downs(connection).items()
    return {name: slow for name, slow in stored if pace.is_current(slow, now)}


def backlogs(connection: sa.Connection) -> dict[str, int]:
    """The number of pending deliveries of each lane that sends single requests, and of held ones.

    Counts at most MAX_COUNTED_OF_LANE of each lane, and at most MAX_COUNTED held ones.
    """
    column = tables.deliveries.c
    # The order of the index for claims. Without it, SQLite uses the index of statuses and reads each row.
    pending = _IDS.where(tables.PENDING).order_by(column["class"], column.next_attempt_at, column.delivery_id)
    queries = {
        lane: count_of(pending.where(column.action == lane), MAX_COUNTED_OF_LANE) for lane in due.LANES
    }
    queries["held"] = count_of(_IDS.where(tables.HELD))
    return {name: connection.execute(query).scalar_one() for name, query in queries.items()}


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
    return {
        "heartbeat_at": destination.last_heartbeat(connection),
        "is_alive": destination.is_daemon_alive(connection, now),
    }


def _lanes(
    connection: sa.Connection, settings: Settings, job: dict[str, Any] | None, now: dt.datetime
) -> dict[str, dict[str, Any]]:
    """The limit and use of each lane, in requests; in rows for the bulk lane."""
    since = now - MINUTE
    requests = sa.select(tables.requests.c.lane, sa.func.count().label("number"))
    is_recent = sa.and_(tables.requests.c.lane.in_(LANES), tables.requests.c.started_at > since)
    requests = requests.where(is_recent).group_by(tables.requests.c.lane)
    rows = sa.select(sa.func.coalesce(sa.func.sum(tables.bulk_jobs.c.row_count), 0))
    sent = {row.lane: row.number for row in connection.execute(requests)}
    sent["bulk"] = int(connection.execute(rows.where(tables.bulk_jobs.c.submitted_at > since)).scalar_one())
    slow, limits = _slow_downs(connection, now), settings.destination
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
            "since": slow.get(name, {}).get("since"),
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


def schedule_state(connection: sa.Connection, settings: Settings, now: dt.datetime) -> dict[str, Any]:
    """The failed runs, the next slots in order, and the keys whose slots wait for a held run or are late."""
    outlooks = slots.outlooks(connection, settings.definitions, now)
    upcoming = sorted(
        (outlook.next_at, key) for key, outlook in outlooks.items() if outlook.next_at and not outlook.waits
    )
    late_since = {key: outlook.late_since for key, outlook in outlooks.items() if outlook.late_since}
    return {
        "failed_runs": failed_runs(connection, settings, outlooks),
        "next_slots": [{"key": key, "slot_at": slot_at} for slot_at, key in upcoming],
        "waiting": [key for key, outlook in outlooks.items() if outlook.waits],
        "late": list(late_since),
        "late_since": late_since,
    }
