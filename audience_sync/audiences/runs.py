"""START HERE: one run of a definition, from its lease to the commit.

`sync` reads from top to bottom:

1. `_start` takes the definition's lease and begins the run (records.py).
2. `compute` checks the SQL (statement.py) and runs it into the snapshot table, here or from a source (compute.py).
3. `_finish` does the rest in one transaction: it compares the snapshot with the members (snapshot.py), then commits the
   new baseline and its deliveries (commit.py). If the guard trips, the destination has changed, or --hold was given, it
   holds the deliveries instead, until somebody approves or rejects the run (decisions.py).

records.py has the rows of definitions and runs. The committed deliveries are then pending in the queue: see
queue/deliveries.py. queue/worker.py sends them.
"""

import datetime as dt
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from audience_sync import crash, logs
from audience_sync.audiences import foreign, records, slots, snapshot
from audience_sync.audiences.commit import Commit, commit, hold_changes
from audience_sync.audiences.compute import compute
from audience_sync.audiences.definition import Definition
from audience_sync.clock import Clock, isoformat
from audience_sync.db import engines, leases
from audience_sync.errors import AudienceSyncError, Busy, ConfigError, DatabaseError, unexpected
from audience_sync.queue import deliveries
from audience_sync.queue.destination import Destination, other_destination
from audience_sync.stopping import Stop

log = logging.getLogger(__name__)

COMMIT_SECONDS = 120.0  # the lease lasts this much longer than the definition's timeout
REPLACED = "Replaced by run"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run.

    `full`: send everyone's value, not only the changes. `hold`: wait for approval. `users`: a canary, restricted to
    these users. `slot_at`: the schedule's slot of the run. `destination`: where its deliveries will be sent.
    """

    full: bool = False
    hold: bool = False
    users: tuple[str, ...] | None = None
    trigger: str = "manual"
    slot_at: dt.datetime | None = None
    destination: Destination = field(default_factory=Destination)


@dataclass(frozen=True, slots=True)
class Run:
    """A run in progress; `last` is the baseline that it starts from."""

    lease: leases.Lease
    run_id: int
    definition_id: int
    definition: Definition
    mode: str
    as_of: dt.datetime
    last: records.Baseline
    options: RunOptions


@dataclass(frozen=True, slots=True)
class Held:
    """The reason for holding a run: `by` is hold, guard or fingerprint, `reason` a sentence."""

    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Finished:
    result: records.RunResult
    held: Held | None


def resolve_as_of(
    engine: sa.Engine, definitions: Sequence[Definition], as_of: dt.datetime | None, now: dt.datetime
) -> dict[str, dt.datetime]:
    """Return the moment of each definition's run, by key.

    Raises:
        ConfigError: `as_of` is in the future, or before the last committed run of a definition.

    """
    if as_of is not None and as_of > now:
        raise ConfigError(f"--as-of {isoformat(as_of)} is in the future: give a time that has passed.")
    moments = {}
    with engines.read(engine) as connection:
        for definition in definitions:
            last = records.load_baseline(connection, definition.key).as_of
            if as_of is not None and last is not None and as_of < last:
                raise ConfigError(
                    f"--as-of {isoformat(as_of)} is before the last committed run of {definition.key} "
                    f"({isoformat(last)}): its members cannot go back in time. Give that time or a later one."
                )
            moments[definition.key] = as_of or max(now, last or now)
    return moments


def sync(
    engine: sa.Engine,
    definition: Definition,
    as_of: dt.datetime,
    clock: Clock,
    options: RunOptions = RunOptions(),
    *,
    source: Callable[[], sa.Engine | None] = lambda: None,
    stop: Stop | None = None,
) -> int:
    """Run a definition; return the run's id. Any error in the definition ends the run as failed.

    Raises:
        Busy: another process is syncing the definition.
        ConfigError: its key is retired, or a canary is for another destination than the members.
        DatabaseError: our own database cannot be used.
        Interrupted: a signal, or `stop`, ended it.

    """
    with snapshot.connection_with_temp_tables(engine) as connection:
        run = _start(connection, definition, as_of, clock, options)
        started = clock.monotonic()
        try:
            crash.at("run_started")
            with engines.one_transaction(connection):
                compute(connection, definition, run.as_of, source(), stop)
                crash.at("snapshot_computed")
                if clock.monotonic() - started > definition.timeout_seconds / 2:
                    with engines.write(engine) as renewal:  # so that the commit has the lease's full time
                        leases.renew(renewal, run.lease)
                finished = _finish(connection, run, clock)
        except BaseException as error:
            connection.invalidate()  # a commit that failed may leave its transaction open, which locks the run's row
            is_recorded = _fail(engine, run, error, clock)
            if not is_recorded or not isinstance(error, Exception):
                raise
            _log_failed(run, error, clock.monotonic() - started)
        else:
            crash.at("run_committed")
            _log_finished(run, finished, clock.monotonic() - started)
    return run.run_id


def _start(
    connection: sa.Connection, definition: Definition, as_of: dt.datetime, clock: Clock, options: RunOptions
) -> Run:
    with engines.begin_write(connection):
        lease = take_lease(connection, definition.key, definition.timeout_seconds + COMMIT_SECONDS)
        last = records.load_baseline(connection, definition.key)
        as_of = max(as_of, last.as_of or as_of)  # another process may have committed while we waited
        definition_id = records.register_definition(connection, definition, clock.now())
        row = records.lock_definition(connection, definition_id)
        if row.retired_at is not None:
            raise retired_error(definition.key)
        if options.users is not None and options.destination.is_foreign(connection, row.fingerprint):
            raise ConfigError(
                f"A canary is not possible now: the last sync of {definition.key} was "
                f"{other_destination(definition.key)}."
            )
        mode = _mode(options, last)
        run_id = records.start_run(
            connection,
            definition_id,
            mode=mode,
            trigger=options.trigger,
            as_of=as_of,
            now=clock.now(),
            baseline_run_id=last.run_id,
        )
        if options.slot_at is not None:
            slots.record_run(connection, definition_id, options.slot_at, run_id)
    return Run(lease, run_id, definition_id, definition, mode, as_of, last, options)


def take_lease(connection: sa.Connection, key: str, seconds: float) -> leases.Lease:
    """Take the definition's lease: the exclusive right to change its members.

    Raises:
        Busy: another process has it.

    """
    lease = leases.acquire(connection, leases.of_definition(key), seconds)
    if isinstance(lease, leases.Holder):
        raise Busy(f"{key} is being synced by process {lease.pid} on {lease.host}: wait for it to end.")
    return lease


def retired_error(key: str) -> ConfigError:
    return ConfigError(
        f"The key {key} was retired and stays reserved: give the definition another one with `key = `."
    )


def _mode(options: RunOptions, last: records.Baseline) -> str:
    if options.users is not None:
        return "canary"
    if options.full:
        return "full"
    return "first" if last.is_first else "changes"


def _finish(connection: sa.Connection, run: Run, clock: Clock) -> _Finished:
    """Diff, commit the new baseline with its deliveries or hold the changes, and end the run, in one transaction."""
    options, definition = run.options, run.definition
    with engines.begin_write(connection):
        row = records.lock_definition(connection, run.definition_id)
        now = clock.now()
        diff = snapshot.diff(connection, run.definition_id, definition, now, options.users)
        erased_count = row.forgotten_count if options.users is None else 0
        result = records.RunResult.after(run.last, diff.counts, erased_count, diff.set_aside)
        replaced_id = replace_held_run(connection, run.definition_id, f"{REPLACED} {run.run_id}.")
        is_foreign = options.destination.is_foreign(connection, row.fingerprint)
        held = reason_to_hold(definition, run.last, diff, options, is_foreign=is_foreign)
        origin = deliveries.RunOrigin(
            run_id=run.run_id,
            definition_id=run.definition_id,
            delivery_class="push" if run.mode in {"first", "full"} else "change",
            value_at=run.as_of,
            fingerprint=options.destination.fingerprint or row.fingerprint,
        )
        changes = Commit(
            origin,
            definition.key,
            definition.kind,
            now,
            everyone=options.full,
            users=options.users,
            replaced_id=replaced_id,
        )
        if held:
            hold_changes(connection, changes, diff.counts)
            records.mark_held(
                connection,
                run.run_id,
                result,
                now,
                deliveries_run_id=replaced_id,
                held_by=held.by,
                error=held.reason,
            )
        else:
            if replaced_id is not None:
                deliveries.delete_held(connection, replaced_id)
            if is_foreign:
                deliveries.cancel_foreign(connection, origin, now)
            commit(connection, changes, diff.counts)
            records.mark_succeeded(connection, run.run_id, result, now)
            settle_definition(connection, row, options.destination, erased_count)
        crash.at("changes_written")
        leases.renew(connection, run.lease)
        leases.release(connection, run.lease)
    return _Finished(result, held)


def replace_held_run(connection: sa.Connection, definition_id: int, reason: str) -> int | None:
    """Reject the definition's held run, if any, because a newer run computed the changes again.

    Returns the run id of its held deliveries, which the caller must take over or delete.
    """
    held = records.find_held_run(connection, definition_id)
    if held is None:
        return None
    records.mark_rejected(connection, held.run_id, reason)
    return int(held.deliveries_run_id or held.run_id)


def reason_to_hold(
    definition: Definition,
    last: records.Baseline,
    diff: snapshot.Diff,
    options: RunOptions,
    *,
    is_foreign: bool,
) -> Held | None:
    """Decide whether a person must approve the changes; `is_foreign`: the baseline belongs to another destination."""
    if is_foreign and not (options.full and options.trigger == "manual"):
        made_for = other_destination(definition.key)
        return Held("fingerprint", f"The last sync of {definition.key} was {made_for}.")
    limit = None
    if not last.is_first and options.users is None:
        limit = definition.guard.reason_to_hold(
            last.member_count,
            entered_count=diff.counts.entered,
            exited_count=diff.counts.exited,
            changed_count=diff.counts.changed,
            is_empty=diff.is_empty,
        )
    if options.hold:
        return Held("hold", f"Held because --hold was given{f'; {limit}' if limit else ''}.")
    return Held("guard", f"The guard holds it: {limit}.") if limit else None


def settle_definition(
    connection: sa.Connection, row: sa.Row[Any], destination: Destination, erased_count: int
) -> None:
    """Record, after a commit, the destination of the baseline, and that erased members were counted."""
    if row.fingerprint != destination.fingerprint:
        foreign.adopt(connection, [row.definition_id], destination)
    if erased_count:
        records.reset_forgotten_count(connection, row.definition_id)


def _fail(engine: sa.Engine, run: Run, error: BaseException, clock: Clock) -> bool:
    """Record the run as failed; return False if even that fails."""
    if isinstance(error, AudienceSyncError):
        message = str(error)
    elif isinstance(error, sa.exc.DBAPIError):
        message = engines.failure(error)
    elif isinstance(error, Exception):
        message = (
            f"{run.definition.key}: an unexpected error ended the run: {unexpected(error)}. It changed nothing. "
            "Run it again; if that fails as well, please report it."
        )
    else:
        message = "It was interrupted."
    try:
        with engines.write(engine) as connection:
            records.mark_failed(connection, run.run_id, now=clock.now(), error=message)
            leases.release(connection, run.lease)
    except DatabaseError as second:
        log.warning("run %d could not be recorded as failed: %s", run.run_id, second)
        return False
    return True


def _log_failed(run: Run, error: BaseException, seconds: float) -> None:
    logs.event(
        log,
        logging.WARNING,
        "run failed",
        run_id=run.run_id,
        key=run.definition.key,
        error=type(error).__name__,
        seconds=round(seconds, 3),
    )


def _log_finished(run: Run, finished: _Finished, seconds: float) -> None:
    logs.event(
        log,
        logging.INFO,
        f"run held by {finished.held.by}" if finished.held else "run succeeded",
        run_id=run.run_id,
        key=run.definition.key,
        members=finished.result.member_count,
        **asdict(finished.result.counts),
        seconds=round(seconds, 3),
    )
    if unusable := sum(snapshot.unusable_rows(finished.result.set_aside).values()):
        logs.event(
            log, logging.INFO, "rows left out", run_id=run.run_id, key=run.definition.key, rows=unusable
        )
