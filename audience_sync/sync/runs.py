"""One run of one definition: take its lease, compute, compare, and commit baseline and deliveries as one.

The snapshot and the changes live in temporary tables of one connection, which is closed when the run ends.
"""

import datetime as dt
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import sqlalchemy as sa

from audience_sync import crash
from audience_sync.clock import Clock, isoformat
from audience_sync.definitions.model import Definition
from audience_sync.errors import AudienceSyncError, Busy, ConfigError, DatabaseError, Interrupted
from audience_sync.store import changes, engines, leases, snapshots
from audience_sync.store import runs as store
from audience_sync.sync.compute import compute

log = logging.getLogger(__name__)

LEASE_SLACK_SECONDS = 120.0  # beyond the definition's own time: for the commit


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sync of the definition would change; samples are of user ids, in their order."""

    key: str
    member_count: int
    counts: dict[str, int]
    samples: dict[str, list[str]] = field(default_factory=dict)


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
            last = store.baseline(connection, definition.key).as_of
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
    *,
    source: sa.Engine | None = None,
    full: bool = False,
    fingerprint: str | None = None,
) -> int:
    """Run a definition; the run's id. A definition that cannot be computed is its run's failure.

    Raises:
        Busy: another process is syncing it.
        DatabaseError: our own database cannot be used.

    """
    with _temporary(engine) as connection:
        run = _start(connection, definition, as_of, clock, full=full, fingerprint=fingerprint)
        try:
            crash.at("run_started")
            unloaded = compute(connection, definition, run.as_of, source)
            crash.at("snapshot_computed")
            with engines.write(engine) as other:  # the commit has the lease's whole time
                leases.renew(other, run.lease)
            counts = _commit(connection, definition, run, unloaded, clock)
        except BaseException as error:
            is_recorded = _fail(engine, run, error, clock)
            ends_only_this_run = isinstance(error, AudienceSyncError | sa.exc.DBAPIError)
            if not is_recorded or not ends_only_this_run or isinstance(error, Interrupted):
                raise
            log.warning("run %d of %s failed (%s)", run.run_id, definition.key, type(error).__name__)
        else:
            crash.at("run_committed")
            log.info("run %d of %s: %s", run.run_id, definition.key, counts or "no change")
    return run.run_id


@contextmanager
def _temporary(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that is closed in the end, and its temporary tables with it."""
    with engines.plain_errors(engine), engine.connect() as connection:
        try:
            yield connection
        finally:
            connection.invalidate()


@dataclass(frozen=True, slots=True)
class _Run:
    """A run under way, and where it starts from."""

    lease: leases.Lease
    run_id: int
    definition_id: int
    as_of: dt.datetime
    last: store.Baseline
    full: bool
    fingerprint: str | None


def _start(
    connection: sa.Connection,
    definition: Definition,
    as_of: dt.datetime,
    clock: Clock,
    *,
    full: bool,
    fingerprint: str | None,
) -> _Run:
    seconds = definition.timeout_seconds + LEASE_SLACK_SECONDS
    with engines.begin_write(connection):
        lease = leases.acquire(connection, leases.of_definition(definition.key), seconds)
        if isinstance(lease, leases.Holder):
            raise Busy(
                f"{definition.key} is being synced by process {lease.pid} on {lease.host}: wait for it to end."
            )
        last = store.baseline(connection, definition.key)
        as_of = max(as_of, last.as_of or as_of)  # while we waited, another process may have committed
        definition_id = store.register(connection, definition, clock.now())
        mode = "full" if full else "first" if last.run_id is None else "changes"
        run_id = store.start(
            connection, definition_id, mode=mode, trigger="manual", as_of=as_of, now=clock.now()
        )
    return _Run(lease, run_id, definition_id, as_of, last, full, fingerprint)


def _commit(
    connection: sa.Connection, definition: Definition, run: _Run, unloaded: Counter[str], clock: Clock
) -> dict[str, int]:
    """The new baseline, its deliveries and the end of the run, as one; what changed, counted."""
    with engines.begin_write(connection):
        counts, unfit = snapshots.compare(connection, run.definition_id, definition.kind)
        set_aside = unloaded + Counter(unfit)
        now = clock.now()
        commit = changes.Commit(
            run_id=run.run_id,
            definition_id=run.definition_id,
            key=definition.key,
            kind=definition.kind,
            as_of=run.as_of,
            now=now,
            full=run.full,
            first=run.last.run_id is None,
            fingerprint=run.fingerprint,
        )
        changes.commit(connection, commit, counts)
        crash.at("changes_written")
        store.succeed(
            connection,
            run.run_id,
            now=now,
            member_count=_member_count(run.last, counts),
            counts=counts,
            set_aside={reason: set_aside[reason] for reason in sorted(set_aside)},
        )
        leases.renew(connection, run.lease)
        leases.release(connection, run.lease)
    return counts


def _member_count(last: store.Baseline, counts: dict[str, int]) -> int:
    return last.member_count + counts.get("entered", 0) - counts.get("exited", 0)


def _fail(engine: sa.Engine, run: _Run, error: BaseException, clock: Clock) -> bool:
    """Close the run with its error; False where the database does not even take that."""
    if isinstance(error, AudienceSyncError) and not isinstance(error, Interrupted):
        told = str(error)
    elif isinstance(error, sa.exc.DBAPIError):
        told = f"The database failed: {engines.reason(error)}. {engines.advice(error)}"
    else:
        told = "It was interrupted."
    try:
        with engines.write(engine) as connection:
            store.fail(connection, run.run_id, now=clock.now(), error=told)
            leases.release(connection, run.lease)
    except DatabaseError as second:
        log.warning("run %d could not be closed as failed: %s", run.run_id, second)
        return False
    return True


def plan(
    engine: sa.Engine,
    definitions: Sequence[tuple[Definition, sa.Engine | None]],
    as_of_by_key: dict[str, dt.datetime],
) -> tuple[list[Plan], int]:
    """Compute and compare definitions with their sources, and keep nothing.

    With the plans comes how many users they change, or have something pending, together: each is one Identify.
    """
    plans = []
    with _temporary(engine) as connection:
        for definition, source in definitions:
            compute(connection, definition, as_of_by_key[definition.key], source)
            with connection.begin():
                row = store.find(connection, definition.key)
                counts, _ = snapshots.compare(connection, row.definition_id if row else None, definition.kind)
                snapshots.touch(connection)
                samples = {change: snapshots.sample(connection, change) for change in ("entered", "exited")}
                last = store.baseline(connection, definition.key)
            plans.append(Plan(definition.key, _member_count(last, counts), counts, samples))
        with connection.begin():
            touched_count = snapshots.touched_count(connection)
    return plans, touched_count
