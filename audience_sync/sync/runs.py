"""One run of one definition: take its lease, compute, compare, and commit baseline and deliveries as one."""

import datetime as dt
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import sqlalchemy as sa

from audience_sync import crash
from audience_sync.clock import Clock, isoformat
from audience_sync.definitions.model import Definition
from audience_sync.errors import AudienceSyncError, Busy, ConfigError, LeaseLost
from audience_sync.store import engines, leases, snapshots
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
    engine: sa.Engine, definitions: list[Definition], as_of: dt.datetime | None, now: dt.datetime
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
    with engines.plain_errors(engine), engine.connect() as connection:
        lease, definition_id, run_id, last = _start(connection, definition, as_of, clock, full=full)
        try:
            crash.at("run_started")
            set_aside = compute(connection, definition, as_of, source, alive=lambda: _renew(engine, lease))
            crash.at("snapshot_computed")
            with engines.begin_write(connection):
                counts = snapshots.diff(connection, definition_id, definition.kind)
                now = clock.now()
                commit = snapshots.Commit(
                    run_id=run_id,
                    definition_id=definition_id,
                    key=definition.key,
                    kind=definition.kind,
                    as_of=as_of,
                    now=now,
                    full=full,
                    first=last.run_id is None,
                    fingerprint=fingerprint,
                )
                snapshots.commit(connection, commit, counts)
                crash.at("changes_written")
                member_count = last.member_count + counts.get("entered", 0) - counts.get("exited", 0)
                still_ours = store.succeed(
                    connection, run_id, now=now, member_count=member_count, counts=counts, set_aside=set_aside
                )
                leases.renew(connection, lease)
                if not still_ours:
                    raise LeaseLost(f"{definition.key}: its run was taken over; nothing was written.")
                leases.release(connection, lease)
        except BaseException as error:
            _fail(engine, run_id, lease, error, clock)
            if not isinstance(error, AudienceSyncError | sa.exc.DBAPIError):
                raise
            log.warning("run %d of %s failed (%s)", run_id, definition.key, type(error).__name__)
        else:
            crash.at("run_committed")
            log.info("run %d of %s: %s", run_id, definition.key, counts or "no change")
    return run_id


def _start(
    connection: sa.Connection, definition: Definition, as_of: dt.datetime, clock: Clock, *, full: bool
) -> tuple[leases.Lease, int, int, store.Baseline]:
    seconds = definition.timeout_seconds + LEASE_SLACK_SECONDS
    with engines.begin_write(connection):
        lease = leases.acquire(connection, leases.of_definition(definition.key), seconds)
        if isinstance(lease, leases.Holder):
            raise Busy(
                f"{definition.key} is being synced by process {lease.pid} on {lease.host}: wait for it to end."
            )
        last = store.baseline(connection, definition.key)
        definition_id = store.register(connection, definition, clock.now())
        mode = "full" if full else "first" if last.run_id is None else "changes"
        run_id = store.start(
            connection, definition_id, mode=mode, trigger="manual", as_of=as_of, now=clock.now()
        )
    return lease, definition_id, run_id, last


def _renew(engine: sa.Engine, lease: leases.Lease) -> None:
    if not engines.is_sqlite(engine):  # there the snapshot's own lock keeps others out
        with engines.write(engine) as connection:
            leases.renew(connection, lease)


def _fail(engine: sa.Engine, run_id: int, lease: leases.Lease, error: BaseException, clock: Clock) -> None:
    if isinstance(error, AudienceSyncError):
        told = str(error)
    elif isinstance(error, sa.exc.DBAPIError):
        told = f"The database failed: {engines.reason(error)}. {engines.advice(error)}"
    else:
        told = "It was interrupted."
    with engines.write(engine) as connection:
        store.fail(connection, run_id, now=clock.now(), error=told)
        leases.release(connection, lease)


@contextmanager
def _planning(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engines.plain_errors(engine), engine.connect() as connection:
        yield connection


def plan(
    engine: sa.Engine, definition: Definition, as_of: dt.datetime, *, source: sa.Engine | None = None
) -> Plan:
    """Compute and compare, and keep nothing."""
    with _planning(engine) as connection:
        compute(connection, definition, as_of, source)
        connection.execution_options(write=False)
        with connection.begin():
            row = store.find(connection, definition.key)
            last = store.baseline(connection, definition.key)
            counts = snapshots.diff(connection, row.definition_id if row else None, definition.kind)
            samples = {change: snapshots.sample(connection, change) for change in ("entered", "exited")}
        return Plan(
            definition.key,
            last.member_count + counts.get("entered", 0) - counts.get("exited", 0),
            counts,
            samples,
        )
