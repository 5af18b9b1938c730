"""The schedule: the runs of the last 24 hours, and the slots of the next 24."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import slots
from audience_sync.audiences.definition import Definition
from audience_sync.db import tables
from audience_sync.history.audiences import definition_keys
from audience_sync.history.paging import united
from audience_sync.history.runs import gone_runs
from audience_sync.settings import Settings

DAY = dt.timedelta(days=1)
SHOWN_ONE_BY_ONE = 6  # runs or slots of a definition in a day; more are shown as one line


def past_day(connection: sa.Connection, now: dt.datetime) -> list[dict[str, Any]]:
    """The runs of the last 24 hours, newest first: one line each, or one line for a definition with many runs.

    A line for many runs shows the newest one and, by status, the counts of the newest SHOWN_ONE_BY_ONE.
    """
    keys = definition_keys(connection)
    slot_of_run = _slot_of_run(connection, list(keys), now)
    by_definition: dict[int, list[dict[str, Any]]] = {}
    rows = _newest_runs(connection, list(keys))
    gone = gone_runs(
        connection, {row.run_id: keys[row.definition_id] for row in rows if row.status == "running"}
    )
    for row in rows:
        if row.started_at > now - DAY:
            slot_at = slot_of_run.get(row.run_id)
            is_late = slot_at is not None and row.started_at - slot_at > slots.LATE_AFTER
            line = row._asdict() | {"key": keys[row.definition_id], "slot_at": slot_at, "is_late": is_late}
            by_definition.setdefault(row.definition_id, []).append(line | gone.get(row.run_id, {}))
    lines = []
    for runs in by_definition.values():
        if len(runs) <= SHOWN_ONE_BY_ONE:
            lines += runs
        else:
            statuses = [run["status"] for run in runs[:-1]]
            counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
            lines.append(runs[0] | {"counts": counts})
    return sorted(lines, key=lambda line: line["started_at"], reverse=True)


def _newest_runs(connection: sa.Connection, definition_ids: Sequence[int]) -> list[Any]:
    """The newest runs of each definition, newest first, including one more than is shown."""
    names = ("run_id", "definition_id", "status", "trigger", "mode", "started_at", "finished_at", "error")
    query = sa.select(*(tables.runs.c[name] for name in names)).order_by(tables.runs.c.run_id.desc())
    queries = [
        query.where(tables.runs.c.definition_id == number).limit(SHOWN_ONE_BY_ONE + 1)
        for number in definition_ids
    ]
    return sorted(united(connection, queries), key=lambda row: row.run_id, reverse=True)


def _slot_of_run(
    connection: sa.Connection, definition_ids: Sequence[int], now: dt.datetime
) -> dict[int, dt.datetime]:
    column = tables.schedule_slots.c
    queries = [
        sa.select(column.run_id, column.slot_at)
        .where(column.definition_id == number, column.slot_at > now - 2 * DAY)
        .order_by(column.slot_at.desc())
        .limit(SHOWN_ONE_BY_ONE + 1)
        for number in definition_ids
    ]
    return {row.run_id: row.slot_at for row in united(connection, queries) if row.run_id is not None}


def next_day(connection: sa.Connection, settings: Settings, now: dt.datetime) -> list[dict[str, Any]]:
    """The slots of the next 24 hours in order: one line each, or one line for a definition with many slots.

    `text`: the schedule as configured. A definition whose slots wait for a decision has one line, which says so.
    """
    outlooks = slots.outlooks(connection, settings.definitions, now)
    lines: list[dict[str, Any]] = []
    for definition in settings.definitions:
        outlook = outlooks[definition.key]
        if outlook.next_at is None:
            continue
        line = {"key": definition.key, "late_since": outlook.late_since, "waits": outlook.waits}
        line |= {"is_frequent": False, "is_full": False, "text": _text(definition)}
        if outlook.retry_at is not None:
            lines.append(line | {"slot_at": outlook.retry_at, "is_retry": True})
        line["is_retry"] = False
        upcoming = _upcoming(definition, now)
        if outlook.waits or len(upcoming) > SHOWN_ONE_BY_ONE:
            lines.append(line | {"slot_at": outlook.next_at, "is_frequent": True})
        else:
            lines += [line | {"slot_at": slot_at, "is_full": is_full} for slot_at, is_full in upcoming]
    return sorted(lines, key=lambda line: line["slot_at"])


def _text(definition: Definition) -> str:
    """The schedules of a definition, as configured."""
    return " and ".join(
        schedule.text for schedule in (definition.schedule, definition.full_schedule) if schedule
    )


def _upcoming(definition: Definition, now: dt.datetime) -> list[tuple[dt.datetime, bool]]:
    """The slots of the next 24 hours, at most one more than is shown, each with whether its run is full."""
    upcoming: dict[dt.datetime, bool] = {}
    for schedule, is_full in ((definition.schedule, False), (definition.full_schedule, True)):
        moment = now
        while schedule is not None and len(upcoming) <= 2 * SHOWN_ONE_BY_ONE:
            moment = schedule.next(moment)
            if moment > now + DAY:
                break
            upcoming[moment] = is_full
    return sorted(upcoming.items())[: SHOWN_ONE_BY_ONE + 1]
