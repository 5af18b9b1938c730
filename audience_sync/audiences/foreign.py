"""Hold the deliveries of definitions whose baseline belongs to another destination, or move them to this one.

A definition without a fingerprint gets the fingerprint of the first known destination.
"""

import datetime as dt
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import records
from audience_sync.queue import deliveries, jobs
from audience_sync.queue.destination import MADE_FOR_ANOTHER, Destination, join_environments


def hold_foreign(connection: sa.Connection, destination: Destination, now: dt.datetime) -> int:
    """Hold pending deliveries for other destinations, and release held ones for this destination.

    Returns how many deliveries are held for other destinations. A definition's deliveries are for the destination of
    its baseline, so the queue is read only for definitions with another one. If a run is committing a definition, the
    definition is skipped until a later call, so that the other deliveries do not wait. Meanwhile its deliveries for
    another destination are not claimed.
    """
    if destination.fingerprint is None:
        return 0
    rows = records.of_other_destinations(connection, destination.fingerprint, free_only=True)
    foreign = _foreign_fingerprints(connection, destination, rows)
    adopt(connection, [row.definition_id for row in rows if row.fingerprint not in foreign], destination)
    if foreign_ids := [row.definition_id for row in rows if row.fingerprint in foreign]:
        deliveries.hold_definitions(connection, destination.fingerprint, foreign_ids, MADE_FOR_ANOTHER)
    destination.hold_foreign_calls(connection)
    return deliveries.release_own(connection, destination.fingerprint, now)


def adopt(connection: sa.Connection, definition_ids: list[int], destination: Destination) -> None:
    """Set the destination of the definitions' baselines and of their unsettled deliveries."""
    if definition_ids and destination.fingerprint is not None:
        records.set_fingerprint(connection, destination.fingerprint, definition_ids)
        deliveries.assign_destination(connection, destination.fingerprint, definition_ids)


def accept_destination(connection: sa.Connection, destination: Destination) -> list[str]:
    """Move everything to this destination, which is the old one with a new key or address; return the keys that moved."""
    if destination.fingerprint is None:
        return []
    moved = foreign_keys(connection, destination)
    rows = records.of_other_destinations(connection, destination.fingerprint)
    others = {row.fingerprint for row in rows if row.fingerprint is not None}
    others |= deliveries.fingerprints(connection)
    if others - {destination.fingerprint}:
        join_environments(connection, others | {destination.fingerprint})
    records.set_fingerprint(connection, destination.fingerprint)
    jobs.assign_jobs(connection, destination.fingerprint)
    deliveries.assign_destination(connection, destination.fingerprint)
    deliveries.release_all(connection)
    return moved


def foreign_keys(connection: sa.Connection, destination: Destination) -> list[str]:
    """Return the keys whose members were sent to another destination, sorted."""
    if destination.fingerprint is None:
        return []
    rows = records.of_other_destinations(connection, destination.fingerprint)
    foreign = _foreign_fingerprints(connection, destination, rows)
    return sorted(row.key for row in rows if row.fingerprint in foreign and row.retired_at is None)


def _foreign_fingerprints(
    connection: sa.Connection, destination: Destination, rows: Sequence[sa.Row[Any]]
) -> set[str | None]:
    fingerprints = {row.fingerprint for row in rows}
    return {other for other in fingerprints if destination.is_foreign(connection, other)}
