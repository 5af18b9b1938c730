"""What a sync would do: computed and compared like a run, and nothing is kept or sent."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from audience_sync.audiences import records, runs, snapshot
from audience_sync.audiences.compute import compute
from audience_sync.audiences.definition import Definition
from audience_sync.queue.destination import Destination

SAMPLED = ("entered", "exited")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sync of the definition would change; samples are of user ids, in their order."""

    key: str
    member_count: int
    counts: dict[str, int]
    held: runs.Held | None
    samples: dict[str, list[str]] = field(default_factory=dict)


def plan(
    engine: sa.Engine,
    definitions: Sequence[tuple[Definition, sa.Engine | None]],
    as_of_by_key: Mapping[str, dt.datetime],
    now: dt.datetime,
    destination: Destination,
) -> tuple[list[Plan], tuple[int, int]]:
    """Compute and compare definitions with their sources.

    With the plans comes how many users they would send, or have something pending, together, and how many of
    these are of pushes alone: each is one Identify, or a row of a bulk job.
    """
    plans = []
    with runs.connection_with_temp_tables(engine) as connection:
        for definition, source in definitions:
            compute(connection, definition, as_of_by_key[definition.key], source)
            with connection.begin():
                made = _plan(connection, definition, now, destination)
                if not made.held:
                    last = records.load_baseline(connection, definition.key)
                    snapshot.add_affected(connection, is_push=last.is_first)
                plans.append(made)
        with connection.begin():
            touched = snapshot.count_affected(connection)
    return plans, touched


def _plan(
    connection: sa.Connection, definition: Definition, now: dt.datetime, destination: Destination
) -> Plan:
    row, last = (
        records.find_definition(connection, definition.key),
        records.load_baseline(connection, definition.key),
    )
    counts, _ = runs.compare(connection, row.definition_id if row else None, definition, now)
    member_count, told = runs.with_erasures(last, counts, row.forgotten_count if row else 0)
    held = runs.why_held(
        connection,
        definition,
        last,
        counts,
        runs.RunOptions(destination=destination),
        is_foreign=row is not None and destination.is_foreign(connection, row.fingerprint),
    )
    samples = {change: snapshot.sample(connection, change) for change in SAMPLED}
    return Plan(definition.key, member_count, told, held, samples)
