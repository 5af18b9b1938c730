"""The rows of definitions and of their runs."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.definition import Definition
from audience_sync.db import rows
from audience_sync.db.tables import definitions, runs
from audience_sync.errors import ConfigError
from audience_sync.suggest import shown


@dataclass(frozen=True, slots=True)
class Baseline:
    """The last committed run of a definition, from which the next one starts; run_id is None before the first.

    `is_first`: only canaries, or nothing, was committed so far.
    """

    run_id: int | None
    as_of: dt.datetime | None
    member_count: int
    is_first: bool = True


@dataclass(frozen=True, slots=True)
class ChangeCounts:
    """Numbers of users who enter, who exit, and whose trait gets another value."""

    entered: int = 0
    exited: int = 0
    changed: int = 0


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome of a computation: the size of the snapshot, the changes, and the rows that were set aside, by reason.

    `erased_count`: exits without a delivery, because the user was erased.
    """

    member_count: int
    counts: ChangeCounts
    set_aside: dict[str, int]
    erased_count: int = 0

    @classmethod
    def after(
        cls, last: Baseline, counts: ChangeCounts, erased_count: int, set_aside: Mapping[str, int]
    ) -> "RunResult":
        """Build a result. Members who were erased since the last run count as exits, in addition to the changes."""
        counts = replace(counts, exited=counts.exited + erased_count)
        member_count = last.member_count + counts.entered - counts.exited
        return cls(member_count, counts, dict(sorted(set_aside.items())), erased_count)


def register_definition(connection: sa.Connection, definition: Definition, now: dt.datetime) -> int:
    """Return the id of the definition's row, which is inserted at its first use."""
    row = find_definition(connection, definition.key)
    check_kind(definition, row)
    if row is not None:
        if row.name != definition.name:
            _update_definition(connection, row.definition_id, name=definition.name)
        return int(row.definition_id)
    columns = {
        "key": definition.key,
        "name": definition.name,
        "kind": definition.kind.value,
        "created_at": now,
    }
    insert = definitions.insert().values(columns).returning(definitions.c.definition_id)
    return int(connection.execute(insert).scalar_one())


def register_definitions(connection: sa.Connection, new: Sequence[Definition], now: dt.datetime) -> None:
    """Insert rows for definitions that have none; another process may have inserted some of them."""
    columns = ("key", "name", "kind", "created_at")
    inserted = [
        (definition.key, definition.name, definition.kind.value, rows.moment(now)) for definition in new
    ]
    rows.insert(connection, definitions, columns, inserted, "ON CONFLICT DO NOTHING")


def correct_registrations(connection: sa.Connection, now: dt.datetime) -> None:
    """Set the registration of definitions to now if a clock that was ahead recorded a later time."""
    connection.execute(definitions.update().where(definitions.c.created_at > now).values(created_at=now))


def find_definition(connection: sa.Connection, key: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(definitions).where(definitions.c.key == key)).one_or_none()


def check_kind(definition: Definition, row: sa.Row[Any] | None) -> None:
    """Raise ConfigError if the key was first used for the other kind. `row`: the key's row, None before its first use.

    Userpilot has one property for a key, so old values would mix with values of another kind.
    """
    if row is None or row.kind == definition.kind:
        return
    kind, other = definition.kind.value, row.kind
    message = (
        f"[[{kind}s]] {shown(definition.name)}: the key {definition.key} has belonged to the {other} {shown(row.name)} "
        f"since {row.created_at:%Y-%m-%d}, and a key cannot change its kind. Give the {kind} another key with `key = `"
    )
    if row.retired_at is not None:
        raise ConfigError(f"{message}.")
    raise ConfigError(
        f"{message}; then `audience-sync retire {definition.key}` clears the values of the {other} at Userpilot, "
        f"unless it stays in [[{other}s]]."
    )


def lock_definition(connection: sa.Connection, definition_id: int) -> sa.Row[Any]:
    """Return the definition's row, locked until this transaction ends.

    `key_share`: other transactions may meanwhile insert rows that refer to it, such as a slot.
    """
    row = sa.select(definitions).where(definitions.c.definition_id == definition_id)
    return connection.execute(row.with_for_update(key_share=True)).one()


def all_definitions(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
    """Return the row of every key that was ever used, in order of first use."""
    return connection.execute(sa.select(definitions).order_by(definitions.c.definition_id)).all()


def of_other_destinations(
    connection: sa.Connection, fingerprint: str, *, free_only: bool = False
) -> Sequence[sa.Row[Any]]:
    """Return the definitions whose baseline belongs to another destination, or to none yet.

    `free_only`: lock them, and skip those that a run is committing.
    """
    query = sa.select(definitions).where(_is_of_other(fingerprint))
    if free_only:
        query = query.with_for_update(key_share=True, skip_locked=True)
    return connection.execute(query).all()


def set_fingerprint(
    connection: sa.Connection, fingerprint: str, definition_ids: Sequence[int] | None = None
) -> None:
    """Set the destination of the baselines of all definitions, or of these."""
    some = sa.true() if definition_ids is None else definitions.c.definition_id.in_(definition_ids)
    update = definitions.update().where(some, _is_of_other(fingerprint))
    connection.execute(update.values(fingerprint=fingerprint))


def _is_of_other(fingerprint: str) -> sa.ColumnElement[bool]:
    return sa.or_(definitions.c.fingerprint.is_(None), definitions.c.fingerprint != fingerprint)


def mark_retired(connection: sa.Connection, definition_id: int, now: dt.datetime) -> None:
    """Reserve the key: no run uses it again."""
    _update_definition(connection, definition_id, retired_at=now)


def reset_forgotten_count(connection: sa.Connection, definition_id: int) -> None:
    """Record that the members who were erased since the last run have been counted as exits."""
    _update_definition(connection, definition_id, forgotten_count=0)


def _update_definition(connection: sa.Connection, definition_id: int, **values: Any) -> None:
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
    """Return the definition's run that waits for approval; there is at most one."""
    return connection.execute(
        sa.select(runs).where(runs.c.definition_id == definition_id, runs.c.status == "held")
    ).one_or_none()


def get_run(connection: sa.Connection, run_id: int) -> sa.Row[Any] | None:
    """Return a run with its definition's key, name, kind and fingerprint."""
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
    """Insert a run; return its id. The run of a process that died becomes abandoned. The caller holds the lease."""
    connection.execute(
        runs.update()
        .where(runs.c.definition_id == definition_id, runs.c.status == "running")
        .values(
            status="abandoned",
            finished_at=now,
            error="Its process ended before it was done, or another one took over.",
        )
    )
    insert = runs.insert().values(
        definition_id=definition_id,
        mode=mode,
        trigger=trigger,
        status="running",
        as_of=as_of,
        started_at=now,
        baseline_run_id=baseline_run_id,
    )
    return int(connection.execute(insert.returning(runs.c.run_id)).scalar_one())


def mark_succeeded(connection: sa.Connection, run_id: int, result: RunResult, now: dt.datetime) -> None:
    """Mark a run as succeeded; its lease keeps other processes away.

    Exits without a delivery count as cancelled, so that the deliveries add up to the changes.
    """
    cancelled = result.erased_count
    _finish(connection, run_id, result, now, status="succeeded", error=None, cancelled_count=cancelled)


def mark_held(
    connection: sa.Connection, run_id: int, result: RunResult, now: dt.datetime, **values: Any
) -> None:
    """Hold a run; `values`: held_by, error (the reason) and deliveries_run_id."""
    _finish(connection, run_id, result, now, status="held", **values)


def _finish(
    connection: sa.Connection, run_id: int, result: RunResult, now: dt.datetime, **values: Any
) -> None:
    counts = {f"{change}_count": count for change, count in asdict(result.counts).items()}
    connection.execute(
        runs.update()
        .where(runs.c.run_id == run_id)
        .values(
            finished_at=now,
            member_count=result.member_count,
            set_aside=result.set_aside,
            **counts,
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
