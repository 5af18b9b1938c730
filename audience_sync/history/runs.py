"""Queries about runs: their counts, and which runs are held or failed."""

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import slots
from audience_sync.audiences.snapshot import unusable_rows
from audience_sync.db import dialects, leases, tables
from audience_sync.history.paging import older
from audience_sync.settings import Settings

SAMPLE = 5
UNSETTLED = ("held", "pending", "sending")


# Written as in the partial indexes, so that these are used.
_IS_RUNNING = tables.runs.c.status == sa.literal_column("'running'")
_IS_HELD = tables.runs.c.status == sa.literal_column("'held'")
RUNS = sa.select(tables.runs, tables.definitions.c.key).join(
    tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id
)


def run_rows(
    connection: sa.Connection,
    *,
    key: str | None = None,
    status: str | None = None,
    ids: Collection[int] | None = None,
    before: int | None = None,
    limit: int | None = None,
    counted: bool = True,
) -> list[dict[str, Any]]:
    """Runs, newest first, with the counts of their deliveries, including those that were pruned.

    `before`: only runs with smaller ids. `counted`: with the counts, which are slow for runs of a million deliveries.
    """
    query = older(RUNS, tables.runs.c.run_id, before)
    if key is not None:
        query = query.where(tables.definitions.c.key == key)
    if status is not None:
        query = query.where(tables.runs.c.status == status)
        if status != "succeeded":
            query = query.where(tables.UNSUCCESSFUL)  # for its partial index
    if ids is not None:
        query = query.where(dialects.is_among(connection, tables.runs.c.run_id, ids))
    rows = connection.execute(query.order_by(tables.runs.c.run_id.desc()).limit(limit)).all()
    if not counted:
        return [_run(row, {}) for row in rows]
    counts: dict[int, dict[str, int]] = {run_id: {} for row in rows for run_id in (row.run_id, held_id(row))}
    grouped = (
        sa.select(tables.deliveries.c.run_id, tables.deliveries.c.status, sa.func.count())
        .where(dialects.is_among(connection, tables.deliveries.c.run_id, counts))
        .group_by(tables.deliveries.c.run_id, tables.deliveries.c.status)
    )
    for run_id, its_status, count in connection.execute(grouped):
        counts[run_id][its_status] = count
    return [_run(row, _counts(row, counts[row.run_id], counts[held_id(row)])) for row in rows]


def mark_gone(connection: sa.Connection, runs: Sequence[dict[str, Any]]) -> None:
    """Give running runs whose process has ended the status that will be recorded for them."""
    gone = gone_runs(connection, {run["run_id"]: run["key"] for run in runs if run["status"] == "running"})
    for run in runs:
        run.update(gone.get(run["run_id"], {}))


def gone_runs(connection: sa.Connection, running: Mapping[int, str]) -> dict[int, dict[str, str]]:
    """The status and error of running runs whose process has ended, before another process records that.

    `running`: the key of each run by its id.
    """
    leased = leases.held_names(connection) if running else set()
    gone = {"status": "abandoned", "error": "Its process ended before it was done."}
    return {run_id: gone for run_id, key in running.items() if leases.of_definition(key) not in leased}


def held_id(row: Any) -> int:
    """The run id in a run's held deliveries, which it may have taken over from the run that it replaced."""
    held_id: int = (row.deliveries_run_id if row.status == "held" else None) or row.run_id
    return held_id


def _counts(row: Any, own: dict[str, int], of_held: dict[str, int]) -> dict[str, int]:
    count = own
    if row.status == "held":
        count = own | {"held": of_held.get("held", 0)}
    elif row.status == "rejected":  # a newer held run has taken them over
        count = own | {"held": 0}
    return {
        "accepted_count": row.accepted_count + count.get("accepted", 0),
        "pending_count": sum(count.get(status, 0) for status in UNSETTLED),
        "dead_count": row.dead_count + count.get("dead", 0),
        "cancelled_count": row.cancelled_count + count.get("cancelled", 0),
    }


def _run(row: Any, counts: dict[str, int]) -> dict[str, Any]:
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
        **counts,
        "error": row.error,
    }


def _set_aside(row: Any) -> dict[str, int]:
    """Rows that could not be used, by reason. Earlier releases also counted duplicates, which now collapse."""
    return {reason: count for reason, count in (row.set_aside or {}).items() if reason != "duplicate"}


def unusable_counts(connection: sa.Connection, ids: Collection[int]) -> dict[int, int]:
    """Counts of the rows of each run that could not be used, without those that were left out on purpose."""
    query = sa.select(tables.runs).where(dialects.is_among(connection, tables.runs.c.run_id, ids))
    return {row.run_id: sum(unusable_rows(_set_aside(row)).values()) for row in connection.execute(query)}


def run_facts(connection: sa.Connection, run_id: int) -> dict[str, Any] | None:
    """A run with the run it was compared with, why it is held, and the rows set aside; None if there is no such run."""
    rows = run_rows(connection, ids=[run_id])
    if not rows:
        return None
    query = RUNS.add_columns(tables.definitions.c.name, tables.definitions.c.kind)
    row = connection.execute(query.where(tables.runs.c.run_id == run_id)).one()
    return rows[0] | {
        "name": row.name,
        "kind": row.kind,
        "baseline_run_id": row.baseline_run_id,
        "held_by": row.held_by,
        "set_aside": _set_aside(row),
    }


def settled_at(connection: sa.Connection, run_id: int) -> dt.datetime | None:
    """The time at which the last delivery of a run was settled. Slow for large runs: all their deliveries are read."""
    column = tables.deliveries.c.settled_at
    newest = sa.select(sa.func.max(column, type_=column.type)).where(tables.deliveries.c.run_id == run_id)
    return connection.execute(newest).scalar()


def held_runs(connection: sa.Connection) -> list[dict[str, Any]]:
    # Sorted here, because otherwise SQLite would read all runs in this order instead of the index of held runs.
    held = sorted(connection.execute(RUNS.where(_IS_HELD)), key=lambda row: row.run_id)
    return [
        {"run_id": row.run_id, "key": row.key, "held_by": row.held_by, "reason": row.error} for row in held
    ]


def failed_runs(
    connection: sa.Connection, settings: Settings, outlooks: Mapping[str, slots.Outlook]
) -> list[dict[str, Any]]:
    """The last runs of enabled definitions that failed, and when they will be tried again.

    A run whose process has ended counts as abandoned, even before another process records that.
    """
    decided = _last_runs_with(connection, "failed", "abandoned")
    running = connection.execute(RUNS.where(_IS_RUNNING)).all()
    gone = gone_runs(connection, {row.run_id: row.key for row in running})
    failed = {}
    for row in sorted([*decided, *running], key=lambda row: row.run_id):
        if row.status == "running" and row.run_id not in gone:
            continue
        its_end = gone.get(row.run_id, {})
        failed[row.key] = {
            "run_id": row.run_id,
            "key": row.key,
            "trigger": row.trigger,
            "status": its_end.get("status", row.status),
            "reason": its_end.get("error", row.error),
            "retry_at": outlooks[row.key].retry_at if row.key in outlooks else None,
        }
    enabled = {definition.key for definition in settings.definitions if definition.enabled}
    return [run for key, run in failed.items() if key in enabled]


def unusable_runs(connection: sa.Connection, settings: Settings) -> list[dict[str, Any]]:
    """The last runs of enabled definitions that succeeded but could use less than half of their rows."""
    enabled = {definition.key for definition in settings.definitions if definition.enabled}
    runs = [
        {
            "run_id": row.run_id,
            "key": row.key,
            "member_count": row.member_count,
            "unusable": unusable_rows(_set_aside(row)),
        }
        for row in _last_runs_with(connection, "succeeded")
        if row.key in enabled
    ]
    return [run for run in runs if sum(run["unusable"].values()) > run["member_count"]]


def _last_runs_with(connection: sa.Connection, *statuses: str) -> list[Any]:
    """The last decided runs of all definitions, as far as they have one of these statuses."""
    last = connection.execute(sa.select(_last_decided()).select_from(tables.definitions)).scalars()
    is_last = dialects.is_among(connection, tables.runs.c.run_id, filter(None, last))
    return list(connection.execute(RUNS.where(is_last, tables.runs.c.status.in_(statuses))))


def _last_decided() -> sa.ScalarSelect[int]:
    """The newest run of a definition that has ended, without canaries that did not fail."""
    other = tables.runs.alias("other").c
    is_canary = sa.and_(other.mode == "canary", other.status.in_(("succeeded", "held", "rejected")))
    newest = sa.select(other.run_id).where(
        other.definition_id == tables.definitions.c.definition_id, other.status != "running", ~is_canary
    )
    return newest.order_by(other.run_id.desc()).limit(1).correlate(tables.definitions).scalar_subquery()
