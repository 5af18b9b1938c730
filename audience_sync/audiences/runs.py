"""One run of one definition: take its lease, compute, compare, and commit baseline and deliveries as one.

What is too unlike the last run, or for another destination, or asked to wait, is held for a person instead
(levers.py). The snapshot and the changes live in temporary tables of one connection, which is closed when the
run ends.
"""

import datetime as dt
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from audience_sync import crash, logs
from audience_sync.audiences import foreign, records, slots, snapshot
from audience_sync.audiences.commit import Commit, commit, hold_changes
from audience_sync.audiences.compute import compute
from audience_sync.audiences.definition import Definition
from audience_sync.clock import Clock, isoformat
from audience_sync.db import engines, leases
from audience_sync.errors import AudienceSyncError, Busy, ConfigError, DatabaseError
from audience_sync.queue import deliveries
from audience_sync.queue.destination import Destination, other_destination
from audience_sync.stopping import Stop

log = logging.getLogger(__name__)

LEASE_SLACK_SECONDS = 120.0  # beyond the definition's own time: for the commit
REPLACED = "Replaced by run"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is asked of a run.

    `full`: tell everyone, not the changes alone; `hold`: wait for `approve`; `users`: a canary, about these
    only; `slot_at`: the slot that it was taken for; `destination`: where its deliveries will be sent.
    """

    full: bool = False
    hold: bool = False
    users: tuple[str, ...] | None = None
    trigger: str = "manual"
    slot_at: dt.datetime | None = None
    destination: Destination = field(default_factory=Destination)


@dataclass(frozen=True, slots=True)
class Held:
    """Who holds a run, and why, in words."""

    by: str
    reason: str


def resolve_as_of(
    engine: sa.Engine, definitions: Sequence[Definition], as_of: dt.datetime | None, now: dt.datetime
) -> dict[str, dt.datetime]:
    """The moment of each definition's run: never in the future, never before its last committed run.

    Raises:
        ConfigError: the moment asked for is one of those.

    """
    if as_of is not None and as_of > now:
        raise ConfigError(f"--as-of {isoformat(as_of)} is in the future: give a moment up to now.")
    moments = {}
    with engines.read(engine) as connection:
        for definition in definitions:
            last = records.load_baseline(connection, definition.key).as_of
            if as_of is not None and last is not None and as_of < last:
                raise ConfigError(
                    f"--as-of {isoformat(as_of)} is before the last committed run of {definition.key} "
                    f"({isoformat(last)}): its members cannot go back in time. Give that moment or a later one."
                )
            moments[definition.key] = as_of or max(now, last or now)
    return moments


def sync(
    engine: sa.Engine,
    definition: Definition,
    as_of: dt.datetime,
    clock: Clock,
    order: RunOptions = RunOptions(),
    *,
    source: Callable[[], sa.Engine | None] = lambda: None,
    stop: Stop | None = None,
) -> int:
    """Run a definition; the run's id. One that cannot be computed, or whose source cannot be opened, is its run's failure.

    Raises:
        Busy: another process is syncing it.
        ConfigError: its key was retired, or a canary is for another destination than its members.
        DatabaseError: our own database cannot be used.
        Interrupted: a signal, or `stop`, ended it.

    """
    with connection_with_temp_tables(engine) as connection:
        run = _start(connection, definition, as_of, clock, order)
        started = clock.monotonic()
        try:
            crash.at("run_started")
            unloaded = compute(connection, definition, run.as_of, source(), stop)
            crash.at("snapshot_computed")
            with engines.write(engine) as other:  # the commit has the lease's whole time
                leases.renew(other, run.lease)
            what, computed = _commit(connection, definition, run, unloaded, clock)
        except BaseException as error:
            connection.invalidate()  # after a commit that failed its transaction may be open yet, and hold the run's row
            is_recorded = _fail(engine, run, error, clock)
            ends_only_this_run = isinstance(error, AudienceSyncError | sa.exc.DBAPIError)
            if not is_recorded or not ends_only_this_run:
                raise
            _log(clock.monotonic() - started, "run failed", run, definition.key, error=type(error).__name__)
        else:
            crash.at("run_committed")
            counts = {name: computed.counts.get(name, 0) for name in ("entered", "exited", "changed")}
            _log(
                clock.monotonic() - started,
                what,
                run,
                definition.key,
                members=computed.member_count,
                **counts,
            )
    return run.run_id


def _log(seconds: float, what: str, run: "Run", key: str, **facts: str | int) -> None:
    level = logging.WARNING if "error" in facts else logging.INFO
    logs.event(log, level, what, run_id=run.run_id, key=key, **facts, seconds=round(seconds, 3))


@contextmanager
def connection_with_temp_tables(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that is closed in the end, and its temporary tables with it."""
    with engines.plain_errors(engine), engine.connect() as connection:
        try:
            yield connection
        finally:
            connection.invalidate()


@dataclass(frozen=True, slots=True)
class Run:
    """A run under way: its order, and where it starts from."""

    lease: leases.Lease
    run_id: int
    definition_id: int
    as_of: dt.datetime
    last: records.Baseline
    order: RunOptions


def take_lease(connection: sa.Connection, key: str, seconds: float) -> leases.Lease:
    """The sole right to change a definition's members.

    Raises:
        Busy: another process has it.

    """
    lease = leases.acquire(connection, leases.of_definition(key), seconds)
    if isinstance(lease, leases.Holder):
        raise Busy(f"{key} is being synced by process {lease.pid} on {lease.host}: wait for it to end.")
    return lease


def _start(
    connection: sa.Connection, definition: Definition, as_of: dt.datetime, clock: Clock, order: RunOptions
) -> Run:
    with engines.begin_write(connection):
        lease = take_lease(connection, definition.key, definition.timeout_seconds + LEASE_SLACK_SECONDS)
        last = records.load_baseline(connection, definition.key)
        as_of = max(as_of, last.as_of or as_of)  # while we waited, another process may have committed
        definition_id = records.register_definition(connection, definition, clock.now())
        row = records.lock_definition(connection, definition_id)
        if row.retired_at is not None:
            raise ConfigError(retired(definition.key))
        if order.users is not None and order.destination.is_foreign(connection, row.fingerprint):
            where = other_destination(definition.key)
            raise ConfigError(f"A canary is not possible now: the last sync of {definition.key} was {where}.")
        run_id = records.start_run(
            connection,
            definition_id,
            mode=_mode(order, last),
            trigger=order.trigger,
            as_of=as_of,
            now=clock.now(),
            baseline_run_id=last.run_id,
        )
        if order.slot_at is not None:
            slots.record_run(connection, definition_id, order.slot_at, run_id)
    return Run(lease, run_id, definition_id, as_of, last, order)


def retired(key: str) -> str:
    return f"The key {key} was retired and rests: give the definition another one with `key = `."


def _mode(order: RunOptions, last: records.Baseline) -> str:
    if order.users is not None:
        return "canary"
    if order.full:
        return "full"
    return "first" if last.is_first else "changes"


def _commit(
    connection: sa.Connection, definition: Definition, run: Run, unloaded: Counter[str], clock: Clock
) -> tuple[str, records.Computed]:
    """The new baseline, its deliveries and the end of the run, as one; or the changes, held.

    Returns what became of it, in words, and what was found.
    """
    with engines.begin_write(connection):
        row = records.lock_definition(connection, run.definition_id)
        now = clock.now()
        counts, unfit = compare(connection, run.definition_id, definition, now, run.order.users)
        forgotten = row.forgotten_count if run.order.users is None else 0
        set_aside = unloaded + Counter(unfit)
        computed = records.Computed(
            *with_erasures(run.last, counts, forgotten),
            {reason: set_aside[reason] for reason in sorted(set_aside)},
        )
        origin = deliveries.RunOrigin(
            run_id=run.run_id,
            definition_id=run.definition_id,
            delivery_class="push" if _mode(run.order, run.last) in {"first", "full"} else "change",
            value_at=run.as_of,
            fingerprint=run.order.destination.fingerprint or row.fingerprint,
        )
        writes = Commit(
            origin=origin,
            key=definition.key,
            kind=definition.kind,
            now=now,
            everyone=run.order.full,
            users=run.order.users,
        )
        replace_held(connection, run.definition_id, f"{REPLACED} {run.run_id}.", now)
        is_foreign = run.order.destination.is_foreign(connection, row.fingerprint)
        held = why_held(connection, definition, run.last, counts, run.order, is_foreign=is_foreign)
        if held:
            hold_changes(connection, writes, counts)
            records.mark_held(connection, run.run_id, computed, now, held_by=held.by, reason=held.reason)
        else:
            if is_foreign:
                deliveries.cancel_foreign(connection, origin, now)
            commit(connection, writes, counts)
            records.mark_succeeded(connection, run.run_id, computed, now)
            settle_definition(connection, row, run.order.destination, forgotten)
        crash.at("changes_written")
        leases.renew(connection, run.lease)
        leases.release(connection, run.lease)
    return f"run held by {held.by}" if held else "run succeeded", computed


def compare(
    connection: sa.Connection,
    definition_id: int | None,
    definition: Definition,
    now: dt.datetime,
    users: Sequence[str] | None = None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Compare the snapshot with the members: who entered, exited and changed, and who was set aside, counted."""
    counts, aside = snapshot.compare(connection, definition_id, definition.kind)
    if definition.eligible_sql:
        aside |= {"not_eligible": snapshot.leave_out_ineligible(connection)}
    aside |= {"forgotten": snapshot.leave_out_forgotten(connection, now)}
    if users is not None:
        snapshot.leave_out_others(connection, users)
    if definition.eligible_sql or aside["forgotten"] or users is not None:
        counts = snapshot.count_changes(connection)
    return counts, {reason: count for reason, count in aside.items() if count}


def with_erasures(
    last: records.Baseline, counts: dict[str, int], forgotten: int
) -> tuple[int, dict[str, int]]:
    """The size of the snapshot and its changes; members who were erased since the last run count as exits."""
    told = counts | ({"exited": counts.get("exited", 0) + forgotten} if forgotten else {})
    return last.member_count + told.get("entered", 0) - told.get("exited", 0), told


def why_held(
    connection: sa.Connection,
    definition: Definition,
    last: records.Baseline,
    counts: dict[str, int],
    order: RunOptions,
    *,
    is_foreign: bool,
) -> Held | None:
    """Whether a person has to look before anything is sent; the snapshot is there."""
    if is_foreign and not (order.full and order.trigger == "manual"):
        return Held(
            "fingerprint", f"The last sync of {definition.key} was {other_destination(definition.key)}."
        )
    unlike = None
    if not last.is_first and order.users is None:
        is_empty = snapshot.is_empty(connection)
        unlike = definition.guard.reason_to_hold(
            last.member_count,
            entered_count=counts.get("entered", 0),
            exited_count=counts.get("exited", 0),
            is_empty=is_empty,
        )
    if order.hold:
        return Held("hold", f"It waits, as it was asked to{f'; {unlike}' if unlike else ''}.")
    return Held("guard", f"The guard holds it: {unlike}.") if unlike else None


def replace_held(connection: sa.Connection, definition_id: int, reason: str, now: dt.datetime) -> None:
    """A definition has one held run at most, and a newer run knows better."""
    before = records.find_held_run(connection, definition_id)
    if before is not None:
        deliveries.cancel_run(connection, before.run_id, now, reason)
        records.mark_rejected(connection, before.run_id, reason)


def settle_definition(
    connection: sa.Connection, row: sa.Row[Any], destination: Destination, forgotten: int
) -> None:
    """After a commit: whose the baseline is, and that the erased were counted."""
    if row.fingerprint != destination.fingerprint:
        foreign.adopt(connection, [row.definition_id], destination)
    if forgotten:
        records.set_forgotten_count(connection, row.definition_id, 0)


def _fail(engine: sa.Engine, run: Run, error: BaseException, clock: Clock) -> bool:
    """Close the run with its error; False where the database does not even take that."""
    if isinstance(error, AudienceSyncError):
        told = str(error)
    elif isinstance(error, sa.exc.DBAPIError):
        told = f"The database failed: {engines.reason(error)}. {engines.advice(error)}"
    else:
        told = "It was interrupted."
    try:
        with engines.write(engine) as connection:
            records.mark_failed(connection, run.run_id, now=clock.now(), error=told)
            leases.release(connection, run.lease)
    except DatabaseError as second:
        log.warning("run %d could not be closed as failed: %s", run.run_id, second)
        return False
    return True
