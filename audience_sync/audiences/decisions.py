"""What a person does to a definition beside syncing it: approve or reject a held run, retire a key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import records, runs, snapshot
from audience_sync.audiences.commit import Commit, commit, commit_held
from audience_sync.audiences.definition import Kind
from audience_sync.clock import Clock
from audience_sync.db import engines, leases
from audience_sync.errors import ConfigError, NotApproved
from audience_sync.queue import deliveries
from audience_sync.queue.destination import Destination, other_destination

LEASE_SECONDS = 600.0


def approve(engine: sa.Engine, run_id: int, clock: Clock, destination: Destination) -> None:
    """Commit exactly the changes that a run holds; they are queued.

    Raises:
        ConfigError: there is no such run, or it is not held.
        NotApproved: the members, or the destination, are others by now.
        Busy: another process is syncing the definition.

    """
    with runs.connection_with_temp_tables(engine) as connection, engines.begin_write(connection):
        found = _held(connection, run_id)
        with _lease(connection, found.key):
            row, last = (
                records.lock_definition(connection, found.definition_id),
                records.load_baseline(connection, found.key),
            )
            run = _held(connection, run_id)  # as it is now that nobody else can change it
            if last.run_id != run.baseline_run_id:
                raise NotApproved(
                    f"The members of {run.key} have changed since run {run_id} was computed: run "
                    f"`audience-sync sync {run.key} --hold` again, and approve that."
                )
            if run.held_by == "fingerprint" and destination.fingerprint is None:
                raise NotApproved(
                    "It was held for its destination, and the API key is not set: set it first."
                )
            is_foreign = destination.is_foreign(connection, row.fingerprint)
            if run.mode != "full" and is_foreign:
                where = other_destination(run.key)
                raise NotApproved(
                    f"Run {run_id} cannot be approved now: the last sync of {run.key} was {where}."
                )
            kind = Kind(run.kind)
            counts = snapshot.load_held_changes(connection, run_id, run.definition_id, run.key, kind)
            forgotten = row.forgotten_count if run.mode != "canary" else 0
            computed = records.Computed(*runs.with_erasures(last, counts, forgotten), run.set_aside or {})
            now = clock.now()
            origin = deliveries.RunOrigin(
                run_id=run_id,
                definition_id=run.definition_id,
                delivery_class="change",
                value_at=run.as_of,
                fingerprint=destination.fingerprint,
            )
            if is_foreign:
                deliveries.cancel_foreign(connection, origin, now)
            records.mark_succeeded(connection, run_id, computed, now)
            commit_held(connection, Commit(origin, run.key, kind, now), counts)
            runs.settle_definition(connection, row, destination, forgotten)


def reject(engine: sa.Engine, run_id: int, clock: Clock) -> None:
    """Drop the changes that a run holds; the next run computes anew.

    Raises:
        ConfigError: there is no such run, or it is not held.

    """
    with engines.write(engine) as connection:
        records.lock_definition(connection, _held(connection, run_id).definition_id)
        _held(connection, run_id)  # as it is now that nobody else can change it
        deliveries.cancel_run(connection, run_id, clock.now(), "rejected by hand")
        records.mark_rejected(connection, run_id, "It was rejected by hand.")


def retire(engine: sa.Engine, key: str, clock: Clock, destination: Destination) -> int:
    """Queue false, of a trait null, for all who hold it, and let the key rest; the id of that run.

    Raises:
        ConfigError: the key was never used, or is retired.
        Busy: another process is syncing it.

    """
    with runs.connection_with_temp_tables(engine) as connection, engines.begin_write(connection):
        found = records.find_definition(connection, key)
        if found is None:
            raise ConfigError(f"The key {key} was never used: `audience-sync list` shows those that were.")
        with _lease(connection, key):
            row, last = (
                records.lock_definition(connection, found.definition_id),
                records.load_baseline(connection, key),
            )
            if row.retired_at is not None:
                raise ConfigError(f"The key {key} was retired on {row.retired_at:%Y-%m-%d} already.")
            now = clock.now()
            as_of = max(now, last.as_of or now)
            run_id = records.start_run(
                connection,
                row.definition_id,
                mode="retire",
                trigger="manual",
                as_of=as_of,
                now=now,
                baseline_run_id=last.run_id,
            )
            runs.replace_held(
                connection, row.definition_id, f"{runs.REPLACED} {run_id}, which retired the key.", now
            )
            counts = snapshot.all_exit(connection, row.definition_id)
            computed = records.Computed(*runs.with_erasures(last, counts, row.forgotten_count), {})
            origin = deliveries.RunOrigin(
                run_id=run_id,
                definition_id=row.definition_id,
                delivery_class="push",
                value_at=as_of,
                fingerprint=row.fingerprint or destination.fingerprint,
            )
            commit(connection, Commit(origin, key, Kind(row.kind), now), counts)
            records.mark_succeeded(connection, run_id, computed, now)
            records.set_forgotten_count(connection, row.definition_id, 0)
            records.mark_retired(connection, row.definition_id, now)
    return run_id


def _held(connection: sa.Connection, run_id: int) -> sa.Row[Any]:
    run = records.get_run(connection, run_id)
    if run is None:
        raise ConfigError(f"There is no run {run_id}: `audience-sync history` lists them.")
    if run.status == "rejected" and run.error.startswith(runs.REPLACED):
        raise NotApproved(
            f"{run.error} The members may have changed since: run `audience-sync sync {run.key} --hold` again, "
            "and approve that."
        )
    if run.status != "held":
        raise ConfigError(f"Run {run_id} is {run.status}, not held.")
    return run


@contextmanager
def _lease(connection: sa.Connection, key: str) -> Iterator[None]:
    lease = runs.take_lease(connection, key, LEASE_SECONDS)
    yield
    leases.release(connection, lease)
