"""Definitions as they were first used, and their runs."""

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa

from audience_sync.definitions.model import Definition
from audience_sync.store.tables import definitions, runs


@dataclass(frozen=True, slots=True)
class Baseline:
    """Where a definition's next run starts from; run_id is None before its first committed run."""

    run_id: int | None
    as_of: dt.datetime | None
    member_count: int


def register(connection: sa.Connection, definition: Definition, now: dt.datetime) -> int:
    """The id of the definition's row, made at its first use."""
    found = find(connection, definition.key)
    if found is not None:
        if found.name != definition.name:
            connection.execute(
                definitions.update()
                .where(definitions.c.definition_id == found.definition_id)
                .values(name=definition.name)
            )
        return int(found.definition_id)
    inserted = connection.execute(
        definitions.insert().values(
            key=definition.key, name=definition.name, kind=definition.kind.value, created_at=now
        )
    )
    return int(inserted.inserted_primary_key[0])  # type: ignore[index]  # a table with a key gives one


def find(connection: sa.Connection, key: str) -> sa.Row[tuple[object, ...]] | None:
    return connection.execute(sa.select(definitions).where(definitions.c.key == key)).one_or_none()


def keys_by_name(connection: sa.Connection) -> dict[tuple[str, str], list[str]]:
    """Every key that was ever used, by kind and name, in the order of their first use."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in connection.execute(sa.select(definitions).order_by(definitions.c.definition_id)):
        found.setdefault((row.kind, row.name), []).append(row.key)
    return found


def baseline(connection: sa.Connection, key: str) -> Baseline:
    row = connection.execute(
        sa.select(runs.c.run_id, runs.c.as_of, runs.c.member_count)
        .join(definitions, definitions.c.definition_id == runs.c.definition_id)
        .where(definitions.c.key == key, runs.c.status == "succeeded")
        .order_by(runs.c.run_id.desc())
        .limit(1)
    ).one_or_none()
    return Baseline(None, None, 0) if row is None else Baseline(row.run_id, row.as_of, row.member_count)


def start(
    connection: sa.Connection,
    definition_id: int,
    *,
    mode: str,
    trigger: str,
    as_of: dt.datetime,
    now: dt.datetime,
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
        )
    )
    return int(inserted.inserted_primary_key[0])  # type: ignore[index]  # a table with a key gives one


def succeed(
    connection: sa.Connection,
    run_id: int,
    *,
    now: dt.datetime,
    member_count: int,
    counts: dict[str, int],
    set_aside: dict[str, int],
) -> None:
    """Close a run; that it is still ours, its lease says."""
    connection.execute(
        runs.update()
        .where(runs.c.run_id == run_id)
        .values(
            status="succeeded",
            finished_at=now,
            member_count=member_count,
            entered_count=counts.get("entered", 0),
            exited_count=counts.get("exited", 0),
            changed_count=counts.get("changed", 0),
            set_aside=set_aside,
        )
    )


def fail(connection: sa.Connection, run_id: int, *, now: dt.datetime, error: str) -> None:
    connection.execute(
        runs.update()
        .where(runs.c.run_id == run_id, runs.c.status == "running")
        .values(status="failed", finished_at=now, error=error)
    )
