"""Queries about definitions: their states and sizes."""

import datetime as dt
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import slots
from audience_sync.db import dialects, tables
from audience_sync.history.paging import count_of, united
from audience_sync.history.runs import RUNS, held_runs, run_rows
from audience_sync.settings import Settings


def definitions(
    connection: sa.Connection,
    settings: Settings,
    now: dt.datetime,
    only: str | None = None,
    *,
    counted: bool = True,
) -> list[dict[str, Any]]:
    """The configured definitions, then the keys that were sent but are no longer in the configuration.

    `only`: return only the one with this key. `counted`: with the counts of each last run's deliveries.
    """
    is_asked = sa.true() if only is None else tables.definitions.c.key == only
    configured = {
        definition.key: definition for definition in settings.definitions if only in {None, definition.key}
    }
    rows = connection.execute(
        sa.select(tables.definitions).where(is_asked).order_by(tables.definitions.c.definition_id)
    ).all()
    stored = {row.key: row for row in rows}
    sizes, last_runs = _member_counts(connection, is_asked), _last_runs(connection, is_asked, counted=counted)
    held = {run["key"] for run in held_runs(connection)}
    outlooks = slots.outlooks(connection, list(configured.values()), now)
    used = {row.key for row in rows if row.retired_at is not None} | held | _sent_keys(connection)
    documents = []
    for key in dict.fromkeys([*configured, *filter(used.__contains__, stored)]):
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


def _last_runs(
    connection: sa.Connection, is_asked: sa.ColumnElement[bool], *, counted: bool
) -> dict[str, dict[str, Any]]:
    run_ids = list(filter(None, connection.execute(_newest().where(is_asked)).scalars()))
    return {run["key"]: run for run in run_rows(connection, ids=run_ids, counted=counted)}


def _sent_keys(connection: sa.Connection) -> set[str]:
    """The keys that any user ever entered, so that Userpilot may have a value."""
    has_entered = sa.exists().where(
        tables.runs.c.definition_id == tables.definitions.c.definition_id,
        tables.runs.c.status == "succeeded",
        tables.runs.c.entered_count > 0,
    )
    return set(connection.execute(sa.select(tables.definitions.c.key).where(has_entered)).scalars())


def _newest(*where: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The id of each definition's newest run that meets a condition, by the index of runs; null if there is none."""
    is_of = tables.runs.c.definition_id == tables.definitions.c.definition_id
    newest = (
        sa.select(tables.runs.c.run_id).where(is_of, *where).order_by(tables.runs.c.run_id.desc()).limit(1)
    )
    return sa.select(newest.correlate(tables.definitions).scalar_subquery()).select_from(tables.definitions)


def _member_counts(connection: sa.Connection, is_asked: sa.ColumnElement[bool]) -> dict[str, int]:
    """The sizes of the last committed snapshots, without the members who were erased since."""
    newest = _newest(tables.runs.c.status == "succeeded").where(is_asked)
    run_ids = connection.execute(newest).scalars().all()
    query = RUNS.where(dialects.is_among(connection, tables.runs.c.run_id, filter(None, run_ids)))
    query = query.add_columns(tables.definitions.c.forgotten_count)
    return {row.key: row.member_count - row.forgotten_count for row in connection.execute(query)}


def definition_id(connection: sa.Connection, key: str) -> int | None:
    """The id of a key that was synced before."""
    query = sa.select(tables.definitions.c.definition_id).where(tables.definitions.c.key == key)
    return connection.execute(query).scalar()


def definition_keys(connection: sa.Connection) -> dict[int, str]:
    """The keys that were synced before, by id."""
    query = sa.select(tables.definitions.c.definition_id, tables.definitions.c.key)
    return {
        row.definition_id: row.key for row in connection.execute(query.order_by(tables.definitions.c.key))
    }


def recent_runs(connection: sa.Connection, limit: int = 30) -> dict[str, dict[str, Any]]:
    """The sizes after the last committed runs, oldest first, and the waiting deliveries of these and held runs, by key.

    `pending_count` and `held_count`: deliveries of the committed runs. `undecided_count`: deliveries of the held run. At
    most MAX_COUNTED are counted for each run.
    """
    keys = definition_keys(connection)
    recent: dict[str, dict[str, Any]] = {
        key: {"sizes": [], "pending_count": 0, "held_count": 0, "undecided_count": 0} for key in keys.values()
    }
    runs, deliveries = tables.runs.c, tables.deliveries.c
    newest = (
        sa.select(runs.run_id).where(runs.status == "succeeded").order_by(runs.run_id.desc()).limit(limit)
    )
    of_each = [newest.where(runs.definition_id == definition_id) for definition_id in keys]
    shown = [row.run_id for row in united(connection, of_each)]
    shown += [run["run_id"] for run in held_runs(connection)]
    origin = sa.case(
        (runs.status == "held", sa.func.coalesce(runs.deliveries_run_id, runs.run_id)), else_=runs.run_id
    )
    of_run = sa.select(deliveries.delivery_id).where(deliveries.run_id == origin).correlate(tables.runs)
    waiting = {
        "pending": count_of(of_run.where(deliveries.status.in_(("pending", "sending")))),
        "held": count_of(of_run.where(deliveries.status == "held")),
    }
    counted = sa.select(
        *(runs[name] for name in ("definition_id", "status", "member_count")),
        *(query.scalar_subquery().label(name) for name, query in waiting.items()),
    )
    is_shown = dialects.is_among(connection, runs.run_id, shown)
    for row in connection.execute(counted.where(is_shown).order_by(runs.run_id)):
        facts = recent[keys[row.definition_id]]
        facts["held_count"] += row.held
        if row.status == "held":
            facts["undecided_count"] = row.held
        else:
            facts["sizes"].append(row.member_count)
            facts["pending_count"] += row.pending
    return recent


def size_rows(connection: sa.Connection, definition_id: int, limit: int) -> list[dict[str, Any]]:
    """A definition's size, and how many entered and exited, after each of its last committed runs, oldest first."""
    runs = tables.runs.c
    names = ("run_id", "as_of", "member_count", "entered_count", "exited_count", "mode")
    newest = (
        sa.select(*(runs[name] for name in names))
        .where(runs.definition_id == definition_id, runs.status == "succeeded")
        .order_by(runs.run_id.desc())
        .limit(limit)
    )
    return [dict(row._mapping) for row in connection.execute(newest)][::-1]  # noqa: SLF001  (SQLAlchemy's public name)
