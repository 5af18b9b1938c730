"""Who may do what only one process may do: work the queue, or sync a definition.

A lease is a row with an epoch that grows at each change of hands. A worker renews it inside each of its
transactions, so one that slept through its lease finds another epoch there and can write nothing.
"""

import datetime as dt
import os
import socket
import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import leases
from audience_sync.errors import LeaseLost

HOST = socket.gethostname()
_PROCESS = uuid.uuid4().hex
QUEUE = "queue"


def of_definition(key: str) -> str:
    return f"definition {key}"


@dataclass(frozen=True, slots=True)
class Lease:
    name: str
    owner: str
    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Holder:
    host: str
    pid: int


def acquire(connection: sa.Connection, name: str, seconds: float) -> Lease | Holder:
    """Take a lease that is free, has expired, or whose process on this host is gone; else say who has it."""
    row = _locked(connection, name)
    if row is None:
        # Two processes may both see none: the second waits here for the first, and then sees its row.
        engines.sql(
            connection,
            "INSERT INTO {our}leases (name, epoch) VALUES (:name, 0) ON CONFLICT (name) DO NOTHING",
            name=name,
        )
        row = _locked(connection, name)
    assert row is not None  # noqa: S101  (nobody deletes leases)
    now = engines.now(connection)
    if row.owner is not None and row.expires_at > now and not _is_gone(row):
        return Holder(row.host, row.pid)
    lease = Lease(name, f"{_PROCESS}-{uuid.uuid4().hex}", row.epoch + 1, seconds)
    connection.execute(
        leases.update()
        .where(leases.c.name == name)
        .values(
            owner=lease.owner,
            host=HOST,
            pid=os.getpid(),
            epoch=lease.epoch,
            expires_at=now + dt.timedelta(seconds=seconds),
        )
    )
    return lease


def _locked(connection: sa.Connection, name: str) -> sa.Row[tuple[object, ...]] | None:
    return connection.execute(sa.select(leases).where(leases.c.name == name).with_for_update()).one_or_none()


def holder(connection: sa.Connection, name: str) -> Holder | None:
    """The live holder of a lease, if there is one."""
    row = connection.execute(sa.select(leases).where(leases.c.name == name)).one_or_none()
    if row is None or row.owner is None or row.expires_at <= engines.now(connection) or _is_gone(row):
        return None
    return Holder(row.host, row.pid)


def holders(connection: sa.Connection) -> list[Holder]:
    """Who is at work."""
    names = connection.execute(sa.select(leases.c.name).order_by(leases.c.name)).scalars().all()
    return [found for name in names if (found := holder(connection, name))]


def renew(connection: sa.Connection, lease: Lease) -> None:
    """Hold the lease from now on, and until this transaction ends let nobody take it.

    Raises:
        LeaseLost: it has another epoch; nothing of this transaction may be committed.

    """
    result = connection.execute(
        leases.update()
        .where(leases.c.name == lease.name, leases.c.epoch == lease.epoch, leases.c.owner == lease.owner)
        .values(expires_at=engines.now(connection) + dt.timedelta(seconds=lease.seconds))
    )
    if result.rowcount != 1:
        raise LeaseLost(f"Another process took over ({lease.name}); this one stops and has written nothing.")


def release(connection: sa.Connection, lease: Lease) -> None:
    connection.execute(
        leases.update()
        .where(leases.c.name == lease.name, leases.c.epoch == lease.epoch)
        .values(owner=None, host=None, pid=None, expires_at=None)
    )


def _is_gone(row: sa.Row[tuple[object, ...]]) -> bool:
    if row.host != HOST:
        return False
    if (
        row.pid == os.getpid()
    ):  # a thread of ours, or a process that had this pid before us (a container's pid 1)
        return not str(row.owner).startswith(_PROCESS)
    return not engines.process_is_alive(row.pid)
