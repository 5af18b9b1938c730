"""Definitions as they were first used, and their runs."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.definition import Definition
from audience_sync.db.tables import definitions, runs


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where a definition's next run starts from; run_id is None before its first committed run.

    `is_first`: no run has committed more than a canary's users.
    """

    run_id: int | None
    as_of: dt.datetime | None
    member_count: int
    is_first: bool = True


@dataclass(frozen=True, slots=True)
class Computed:
    """What a run found: the size of its snapshot, who changed, and the rows that were set aside, by reason."""

    member_count: int
    counts: dict[str, int]
    set_aside: dict[str, int]


def register_definition(connection: sa.Connection, definition: Definition, now: dt.datetime) -> int:
    """The id of the definition's row, made at its first use."""
    found = find_definition(connection, definition.key)
    if found is not None:
        if found.name != definition.name:
            _change(connection, found.definition_id, name=definition.name)
        return int(found.definition_id)
    inserted = connection.execute(
        definitions.insert().values(
            key=definition.key, name=definition.name, kind=definition.kind.value, created_at=now
        )
    )
    return int(inserted.inserted_primary_key[0])  # type: ignore[index]  # a table with a key gives one


def find_definition(connection: sa.Connection, key: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(definitions).where(definitions.c.key == key)).one_or_none()


def lock_definition(connection: sa.Connection, definition_id: int) -> sa.Row[Any]:
    """The definition's row, which nobody else changes before this transaction ends."""
    return connection.execute(
        sa.select(definitions).where(definitions.c.definition_id == definition_id).with_for_update()
    ).one()


def all_definitions(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
    """Every key that was ever used, in the order of their first use."""
    return connection.execute(sa.select(definitions).order_by(definitions.c.definition_id)).all()


def of_other_destinations(connection: sa.Connection, fingerprint: str) -> Sequence[sa.Row[Any]]:
    """Return the definitions whose baseline does not belong to this destination, or to none yet."""
    return connection.execute(sa.select(definitions).where(_is_of_other(fingerprint))).all()


def set_fingerprint(
    connection: sa.Connection, fingerprint: str, definition_ids: Sequence[int] | None = None
) -> None:
    """Make this the destination of every definition's baseline, or of these definitions'."""
    some = sa.true() if definition_ids is None else definitions.c.definition_id.in_(definition_ids)
    update = definitions.update().where(some, _is_of_other(fingerprint))
    connection.execute(update.values(fingerprint=fingerprint))


def _is_of_other(fingerprint: str) -> sa.ColumnElement[bool]:
    return sa.or_(definitions.c.fingerprint.is_(None), definitions.c.fingerprint != fingerprint)


def mark_retired(connection: sa.Connection, definition_id: int, now: dt.datetime) -> None:
    """From now on the key rests."""
    _change(connection, definition_id, retired_at=now)


def set_forgotten_count(connection: sa.Connection, definition_id: int, count: int) -> None:
    """Keep how many members were erased: exits of the next run."""
    _change(connection, definition_id, forgotten_count=count)


def _change(connection: sa.Connection, definition_id: int, **values: Any) -> None:
    connection.execute(
        definitions.update().where(definitions.c.definition_id == definition_id).values(**values)
    )


def load_baseline(connection: sa.Connection, key: str) -> Baseline:
    committed = (
        sa.select(runs.c.run_id, runs.c.as_of, runs.c.member_count)
        .join(definitions, definitions.c.definition_id == runs.c.definition_id)
        .where(definitions.c.key == key, runs.c.status == "succeeded")
        .order_by(runs.c.run_id.desc())
        .limit(1)
    )
    row = connection.execute(committed).one_or_none()
    if row is None:
        return Baseline(None, None, 0)
    is_first = connection.execute(committed.where(runs.c.mode != "canary")).first() is None
    return Baseline(row.run_id, row.as_of, row.member_count, is_first)


def find_held_run(connection: sa.Connection, definition_id: int) -> sa.Row[Any] | None:
    """The definition's run that waits for a person."""
    return connection.execute(
        sa.select(runs).where(runs.c.definition_id == definition_id, runs.c.status == "held")
    ).one_or_none()


def get_run(connection: sa.Connection, run_id: int) -> sa.Row[Any] | None:
    """A run with its definition's key, name, kind and fingerprint."""
    return connection.execute(
        sa.select(runs, definitions.c.key, definitions.c.name, definitions.c.kind, definitions.c.fingerprint)
        .join(definitions, definitions.c.definition_id == runs.c.definition_id)
        .where(runs.c.run_id == run_id)
    ).one_or_none()


def start_run(
    connection: sa.Connection,
    definition_id: int,
    *,
    mode: str,
    trigger: str,
    as_of: dt.datetime,
    now: dt.datetime,
    baseline_run_id: int | None,
) -> int:
    """Begin a run; one that its process left behind is closed as abandoned. The caller holds the lease."""
    connection.execute(
        runs.update()
        .where(runs.c.definition_id == definition_id, runs.c.status == "running")
        .values(status="abandoned", finished_at=now, error="Its process ended before it was done.")
    )
    inserted = connection.execute(
        runs.insert().values(
            definition_id=definition_id,
            mode=mode,
            trigger=trigger,
            status="running",
            as_of=as_of,
            started_at=now,
            baseline_run_id=baseline_run_id,
        )
    )
    return int(inserted.inserted_primary_key[0])  # type: ignore[index]  # a table with a key gives one


def mark_succeeded(connection: sa.Connection, run_id: int, computed: Computed, now: dt.datetime) -> None:
    """Close a run; that it is still ours, its lease says."""
    _finish(connection, run_id, computed, now, status="succeeded", error=None)


def mark_held(
    connection: sa.Connection, run_id: int, computed: Computed, now: dt.datetime, *, held_by: str, reason: str
) -> None:
    """Let a run wait for a person."""
    _finish(connection, run_id, computed, now, status="held", held_by=held_by, error=reason)


def _finish(
    connection: sa.Connection, run_id: int, computed: Computed, now: dt.datetime, **values: Any
) -> None:
    connection.execute(
        runs.update()
        .where(runs.c.run_id == run_id)
        .values(
            finished_at=now,
            member_count=computed.member_count,
            entered_count=computed.counts.get("entered", 0),
            exited_count=computed.counts.get("exited", 0),
            changed_count=computed.counts.get("changed", 0),
            set_aside=computed.set_aside,
            **values,
        )
    )


def mark_rejected(connection: sa.Connection, run_id: int, reason: str) -> None:
    connection.execute(
        runs.update()
        .where(runs.c.run_id == run_id, runs.c.status == "held")
        .values(status="rejected", error=reason)
    )


def mark_failed(connection: sa.Connection, run_id: int, *, now: dt.datetime, error: str) -> None:
    connection.execute(
        runs.update()
        .where(runs.c.run_id == run_id, runs.c.status == "running")
        .values(status="failed", finished_at=now, error=error)
    )
