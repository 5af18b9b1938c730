"""Leases: only one process at a time may work the queue, or sync a definition.

A lease is a row whose epoch grows each time the lease changes hands. A worker renews it inside each of its
transactions. If the worker was suspended and another process has taken the lease, the epoch differs and the transaction
is rolled back.

A lease is taken before it expires only if its holder has provably ended. Process ids prove that only within one process
namespace: two containers may have the same hostname, and each has a process 1. So `host` also identifies the namespace,
and `owner` ends with the start time of the process, because ids are reused.
"""

import datetime as dt
import hashlib
import os
import socket
import sys
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sqlalchemy as sa

from audience_sync.db.dialects import now, sql
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
    """Take a lease that is free, has expired, or whose holder has provably ended; else return its holder."""
    row = _locked(connection, name)
    if row is None:
        # If two processes see no row, the second waits here for the first, and then sees its row.
        sql(
            connection,
            "INSERT INTO {our}leases (name, epoch) VALUES (:name, 0) ON CONFLICT (name) DO NOTHING",
            name=name,
        )
        row = _locked(connection, name)
    assert row is not None  # noqa: S101  (no lease is ever deleted)
    moment = now(connection)
    if (live := _live_holder(row, moment)) is not None:
        return live
    pid = os.getpid()
    lease = Lease(name, f"{_PROCESS}-{uuid.uuid4().hex} {pid}@{_started(pid)}", row.epoch + 1, seconds)
    connection.execute(
        leases.update()
        .where(leases.c.name == name)
        .values(
            owner=lease.owner,
            host=_place(),
            pid=pid,
            epoch=lease.epoch,
            expires_at=moment + dt.timedelta(seconds=seconds),
        )
    )
    return lease


def _locked(connection: sa.Connection, name: str) -> sa.Row[tuple[object, ...]] | None:
    return connection.execute(sa.select(leases).where(leases.c.name == name).with_for_update()).one_or_none()


def holder(connection: sa.Connection, name: str) -> Holder | None:
    """Return the live holder of a lease, if any."""
    row = connection.execute(sa.select(leases).where(leases.c.name == name)).one_or_none()
    return None if row is None else _live_holder(row, now(connection))


def holders(connection: sa.Connection) -> list[Holder]:
    """Return the live holders of all leases, in the order of the leases' names."""
    moment = now(connection)
    rows = connection.execute(sa.select(leases).order_by(leases.c.name))
    return [live for row in rows if (live := _live_holder(row, moment)) is not None]


def held_names(connection: sa.Connection) -> set[str]:
    """Return the names of the leases that have a live holder."""
    moment = now(connection)
    rows = connection.execute(sa.select(leases).where(leases.c.owner.is_not(None)))
    return {row.name for row in rows if _live_holder(row, moment) is not None}


def renew(connection: sa.Connection, lease: Lease) -> None:
    """Extend the lease from now, and lock it until this transaction ends.

    Raises:
        LeaseLost: it has another epoch; this transaction must not be committed.

    """
    until = now(connection) + dt.timedelta(seconds=lease.seconds)
    own = {"own_name": lease.name, "own_epoch": lease.epoch, "own_owner": lease.owner}
    if connection.execute(_RENEW, own | {"until": until}).rowcount != 1:
        raise LeaseLost(f"Another process took over ({lease.name}); this one stops and has written nothing.")


_RENEW = (
    leases.update()
    .where(
        leases.c.name == sa.bindparam("own_name"),
        leases.c.epoch == sa.bindparam("own_epoch"),
        leases.c.owner == sa.bindparam("own_owner"),
    )
    .values(expires_at=sa.bindparam("until"))
)


def release(connection: sa.Connection, lease: Lease) -> None:
    connection.execute(
        leases.update()
        .where(leases.c.name == lease.name, leases.c.epoch == lease.epoch)
        .values(owner=None, host=None, pid=None, expires_at=None)
    )


def _live_holder(row: sa.Row[tuple[object, ...]], moment: dt.datetime) -> Holder | None:
    if row.owner is None or row.expires_at <= moment or _is_gone(row):
        return None
    return Holder(row.host.partition(" ")[0], row.pid)


def _is_gone(row: sa.Row[tuple[object, ...]]) -> bool:
    if row.host != _place():
        return False
    if row.pid == os.getpid():  # this process, or an earlier one with its id
        return not row.owner.startswith(f"{_PROCESS}-")
    pid, _, started = row.owner.partition(" ")[2].partition("@")
    is_reused = (
        pid == str(row.pid) and "" not in {started, _started(row.pid)} and started != _started(row.pid)
    )
    return is_reused or not _is_alive(row.pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


@cache
def _place() -> str:
    """Return the hostname and a hash of boot and process namespace, within which a process id is unambiguous."""
    if sys.platform != "linux":  # has no process namespaces
        return HOST
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116  (not a file)
    except OSError:
        namespace = _PROCESS  # unknown: no other process can be proved gone
    return f"{HOST} {hashlib.sha256(namespace.encode()).hexdigest()[:16]}"


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot; "ended" for a zombie, empty if it is unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115  (/proc shows another namespace)
            return ""
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = status.rpartition(")")[2].split()
    return "ended" if state in {"Z", "X"} else fields[18]
