"""Decisions about a definition: approve or reject its held run, or retire its key.

Approving and retiring queue deliveries, as a run does; queue/worker.py sends them.
"""

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
    """Commit exactly the changes of a held run.

    Raises:
        ConfigError: there is no such run, or it is not held.
        NotApproved: the members or the destination have changed since it was computed.
        Busy: another process is syncing the definition.

    """
    with snapshot.connection_with_temp_tables(engine) as connection, engines.begin_write(connection):
        held = _held_run(connection, run_id)
        with _lease(connection, held.key):
            row = records.lock_definition(connection, held.definition_id)
            last = records.load_baseline(connection, held.key)
            run = _held_run(connection, run_id)  # read again: no other process can change it now
            is_foreign = destination.is_foreign(connection, row.fingerprint)
            _check_approvable(run, last, destination, is_foreign=is_foreign)
            kind = Kind(run.kind)
            _take_over_deliveries(connection, run)
            counts = snapshot.load_held_changes(connection, run_id, run.definition_id, run.key, kind)
            erased_count = row.forgotten_count if run.mode != "canary" else 0
            result = records.RunResult.after(last, counts, erased_count, run.set_aside or {})
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
            # Before its own deliveries are released, while the run is still held.
            deliveries.release_older(connection, origin, now)
            records.mark_succeeded(connection, run_id, result, now)
            commit_held(connection, Commit(origin, run.key, kind, now), counts)
            runs.settle_definition(connection, row, destination, erased_count)


def reject(engine: sa.Engine, run_id: int, clock: Clock, wait_seconds: float | None = None) -> None:
    """Drop the changes of a held run; the next run computes them again.

    Raises:
        ConfigError: there is no such run, or it is not held.

    """
    with engines.write(engine, wait_seconds) as connection:
        records.lock_definition(connection, _held_run(connection, run_id).definition_id)
        run = _held_run(connection, run_id)  # read again: no other process can change it now
        _take_over_deliveries(connection, run)
        deliveries.cancel_run(connection, run_id, clock.now(), "rejected by hand")
        records.mark_rejected(connection, run_id, "It was rejected by hand.")


def retire(engine: sa.Engine, key: str, clock: Clock, destination: Destination) -> int:
    """Queue false (for a trait: null) for everyone who has the key, then reserve it; return the id of that run.

    Raises:
        ConfigError: the key was never used, or is retired already.
        Busy: another process is syncing the definition.

    """
    with snapshot.connection_with_temp_tables(engine) as connection, engines.begin_write(connection):
        definition = records.find_definition(connection, key)
        if definition is None:
            raise ConfigError(f"The key {key} was never used: `audience-sync list` shows the keys that were.")
        with _lease(connection, key):
            row = records.lock_definition(connection, definition.definition_id)
            if row.retired_at is not None:
                raise ConfigError(f"The key {key} was retired on {row.retired_at:%Y-%m-%d} already.")
            last, now = records.load_baseline(connection, key), clock.now()
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
            replaced = f"{runs.REPLACED} {run_id}, which retired the key."
            replaced_id = runs.replace_held_run(connection, row.definition_id, replaced)
            if replaced_id is not None:
                deliveries.delete_held(connection, replaced_id)
            counts = snapshot.exit_everyone(connection, row.definition_id)
            origin = deliveries.RunOrigin(
                run_id=run_id,
                definition_id=row.definition_id,
                delivery_class="push",
                value_at=as_of,
                fingerprint=row.fingerprint or destination.fingerprint,
            )
            commit(connection, Commit(origin, key, Kind(row.kind), now), counts)
            result = records.RunResult.after(last, counts, row.forgotten_count, {})
            records.mark_succeeded(connection, run_id, result, now)
            records.reset_forgotten_count(connection, row.definition_id)
            records.mark_retired(connection, row.definition_id, now)
    return run_id


def _held_run(connection: sa.Connection, run_id: int) -> sa.Row[Any]:
    run = records.get_run(connection, run_id)
    if run is None:
        raise ConfigError(f"There is no run {run_id}: `audience-sync history` lists them.")
    if run.status == "rejected" and run.error.startswith(runs.REPLACED):
        raise NotApproved(
            f"{run.error} The members may have changed since: run `audience-sync sync {run.key} --hold` again, "
            "and approve that run."
        )
    if run.status != "held":
        raise ConfigError(f"Run {run_id} is not held: its status is {run.status}.")
    return run


def _take_over_deliveries(connection: sa.Connection, run: sa.Row[Any]) -> None:
    """Assign the deliveries of the run that it replaced to a held run."""
    if run.deliveries_run_id is not None:
        delivery_class = "push" if run.mode in {"first", "full"} else "change"
        deliveries.take_over(connection, run.run_id, delivery_class, run.as_of, run.deliveries_run_id)


def _check_approvable(
    run: sa.Row[Any], last: records.Baseline, destination: Destination, *, is_foreign: bool
) -> None:
    if last.run_id != run.baseline_run_id:
        raise NotApproved(
            f"The members of {run.key} have changed since run {run.run_id} was computed: run "
            f"`audience-sync sync {run.key} --hold` again, and approve that run."
        )
    if run.held_by == "fingerprint" and destination.fingerprint is None:
        raise NotApproved(
            f"Run {run.run_id} is held for its destination, and the API key is not set: set it first."
        )
    if run.mode != "full" and is_foreign:
        raise NotApproved(
            f"Run {run.run_id} cannot be approved now: the last sync of {run.key} was {other_destination(run.key)}."
        )


@contextmanager
def _lease(connection: sa.Connection, key: str) -> Iterator[None]:
    lease = runs.take_lease(connection, key, LEASE_SECONDS)
    yield
    leases.release(connection, lease)
