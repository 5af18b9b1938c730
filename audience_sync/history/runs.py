"""Questions about runs: their counts, who changed in them, and which are held or failed."""

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import slots
from audience_sync.db import dialects, leases, tables
from audience_sync.history.paging import older
from audience_sync.settings import Settings

ON_PURPOSE = {"forgotten", "not_eligible"}  # reasons for which rows are set aside although they can be used
SAMPLE = 5
UNSETTLED = ("held", "pending", "sending")


# Written as in the partial indexes, so that they are used.
_IS_RUNNING = tables.runs.c.status == sa.literal_column("'running'")
_IS_HELD = tables.runs.c.status == sa.literal_column("'held'")
RUNS = sa.select(tables.runs, tables.definitions.c.key).join(
    tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id
)


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
    query = older(RUNS, tables.runs.c.run_id, before)
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


def unusable_counts(connection: sa.Connection, ids: Collection[int]) -> dict[int, int]:
    """Counts of the rows of each run that could not be used, without those that were left out on purpose."""
    query = sa.select(tables.runs).where(dialects.is_among(connection, tables.runs.c.run_id, ids))
    return {
        row.run_id: sum(count for reason, count in _set_aside(row).items() if reason not in ON_PURPOSE)
        for row in connection.execute(query)
    }


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


def held_runs(connection: sa.Connection) -> list[dict[str, Any]]:
    # Sorted here, because SQLite would read all runs in this order instead of the index of held ones.
    held = sorted(connection.execute(RUNS.where(_IS_HELD)), key=lambda row: row.run_id)
    return [
        {"run_id": row.run_id, "key": row.key, "held_by": row.held_by, "reason": row.error} for row in held
    ]


def failed_runs(
    connection: sa.Connection, settings: Settings, outlooks: Mapping[str, slots.Outlook]
) -> list[dict[str, Any]]:
    """The failures of enabled definitions that no later run has made good, and when they are tried again.

    A run whose process is gone counts as abandoned, before another process has found it.
    """
    has_failed = tables.runs.c.status.in_(("failed", "abandoned"))
    last = connection.execute(sa.select(_last_decided()).select_from(tables.definitions)).scalars()
    is_last = dialects.is_among(connection, tables.runs.c.run_id, filter(None, last))
    decided = connection.execute(RUNS.where(is_last, has_failed)).all()
    running = connection.execute(RUNS.where(_IS_RUNNING)).all()
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
