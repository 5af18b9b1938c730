"""Plan a sync: compute and diff as a run does, without storing or sending anything.

The temporary table {temp}audience_sync_affected (user_id, is_push) has the users with changes in any definition.
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from audience_sync.audiences import records, runs, snapshot
from audience_sync.audiences.compute import compute
from audience_sync.audiences.definition import Definition
from audience_sync.audiences.reading import lock_seconds
from audience_sync.db import engines
from audience_sync.db.dialects import create_temp_table, sql
from audience_sync.errors import DefinitionError, SourceError
from audience_sync.queue.destination import Destination
from audience_sync.stopping import Stop

SAMPLED = ("entered", "exited")


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes that a sync of a definition would make; `samples` has some user ids for each kind of change, sorted.

    `unusable`: counts of the rows that cannot be used, by reason.
    """

    key: str
    member_count: int
    counts: records.ChangeCounts
    held: runs.Held | None
    samples: dict[str, list[str]]
    unusable: dict[str, int]


@dataclass(frozen=True, slots=True)
class Affected:
    """The number of users with changes or pending identifies; `push_count`: only with pushes."""

    user_count: int
    push_count: int


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans of several definitions, and the users who would get identifies from them or from the queue.

    `errors`: messages about definitions that cannot be computed, by key.
    """

    plans: list[Plan]
    affected: Affected
    errors: dict[str, str] = field(default_factory=dict)


def plan(
    engine: sa.Engine,
    definitions: Sequence[tuple[Definition, sa.Engine | None]],
    as_of_by_key: Mapping[str, dt.datetime],
    now: dt.datetime,
    destination: Destination,
) -> Plans:
    """Plan a sync of definitions, each with its source."""
    plans, errors = [], {}
    with snapshot.connection_with_temp_tables(engine) as connection, engines.one_transaction(connection):
        with engines.begin(connection):
            _create_affected(connection)
        for definition, source in definitions:
            try:
                compute(connection, definition, as_of_by_key[definition.key], source)
                with engines.begin(connection):
                    plans.append(_plan(connection, definition, now, destination))
            except (DefinitionError, SourceError) as error:
                errors[definition.key] = str(error)
            except sa.exc.DBAPIError as error:
                if connection.invalidated:
                    raise
                errors[definition.key] = f"{definition.key}: {engines.failure(error)}"
        with engines.begin(connection):
            affected = _count_affected(connection)
    return Plans(plans, affected, errors)


def _plan(
    connection: sa.Connection,
    definition: Definition,
    now: dt.datetime,
    destination: Destination,
) -> Plan:
    last = records.load_baseline(connection, definition.key)
    row = records.find_definition(connection, definition.key)
    records.check_kind(definition, row)
    diff = snapshot.diff(connection, row.definition_id if row else None, definition, now)
    result = records.RunResult.after(last, diff.counts, row.forgotten_count if row else 0, diff.set_aside)
    is_foreign = row is not None and destination.is_foreign(connection, row.fingerprint)
    options = runs.RunOptions(destination=destination)
    held = runs.reason_to_hold(definition, last, diff, options, is_foreign=is_foreign)
    if not held:
        _add_affected(connection, is_push=last.is_first)
    samples = {change: _sample(connection, change) for change in SAMPLED}
    return Plan(
        definition.key,
        result.member_count,
        result.counts,
        held,
        samples,
        snapshot.unusable_rows(diff.set_aside),
    )


def _sample(connection: sa.Connection, change: str) -> list[str]:
    query = "SELECT user_id FROM {temp}audience_sync_changes WHERE change = :change ORDER BY user_id LIMIT 5"
    return list(sql(connection, query, change=change).scalars())


def _create_affected(connection: sa.Connection) -> None:
    create_temp_table(connection, "affected", "user_id {id} NOT NULL, is_push integer NOT NULL")


def _add_affected(connection: sa.Connection, *, is_push: bool) -> None:
    """Add the users with changes to the affected users."""
    sql(
        connection,
        "INSERT INTO {temp}audience_sync_affected SELECT user_id, :is_push FROM {temp}audience_sync_changes",
        is_push=int(is_push),
    )


def _count_affected(connection: sa.Connection) -> Affected:
    """Count the affected users together with those who have pending identifies."""
    query = (
        "SELECT count(*), coalesce(sum(is_push), 0) FROM (SELECT user_id, min(is_push) AS is_push FROM ("
        "SELECT user_id, is_push FROM {temp}audience_sync_affected UNION ALL "
        "SELECT subject_id, CASE WHEN class = 'push' THEN 1 ELSE 0 END FROM {our}deliveries "
        "WHERE status = 'pending' AND action = 'identify') AS identifies GROUP BY user_id) AS users"
    )
    user_count, push_count = sql(connection, query).one()
    return Affected(int(user_count), int(push_count))


@dataclass(frozen=True, slots=True)
class Preview:
    """The result of a definition: `sample` has user ids, with the JSON text of a trait's value."""

    member_count: int
    sample: list[tuple[str, str | None]]
    set_aside: dict[str, int]


def preview(
    engine: sa.Engine,
    definition: Definition,
    as_of: dt.datetime,
    source: sa.Engine | None,
    now: dt.datetime,
    stop: Stop,
) -> Preview:
    """Compute a definition, which need not be configured, without storing anything."""
    with snapshot.connection_with_temp_tables(engine, lock_seconds(definition)) as connection:
        compute(connection, definition, as_of, source, stop)
        with connection.begin():
            diff = snapshot.diff(connection, None, definition, now)
            sample = _sample_values(connection)
    return Preview(diff.counts.entered, sample, diff.set_aside)


def _sample_values(connection: sa.Connection, limit: int = 20) -> list[tuple[str, str | None]]:
    """Return the first users who enter, each with the JSON text of a trait's value."""
    query = "SELECT user_id, value FROM {temp}audience_sync_changes ORDER BY user_id LIMIT :limit"
    return [(row.user_id, row.value) for row in sql(connection, query, limit=limit)]
