"""Leases: one holder at a time, and how they change hands."""

import datetime as dt
import subprocess
import sys
import threading

import pytest

from audience_sync.db import dialects, engines, leases
from audience_sync.errors import LeaseLost

LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def take(engine):
    def take(name="queue", seconds=60.0):
        with engines.write(engine) as connection:
            return leases.acquire(connection, name, seconds)

    return take


@pytest.fixture
def change(engine):
    def change(assignment, **parameters):
        with engines.write(engine) as connection:
            dialects.sql(connection, f"UPDATE {{our}}leases SET {assignment}", **parameters)

    return change


@pytest.fixture
def gone():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_has_one_holder(engine, take):
    lease = take()
    assert isinstance(lease, leases.Lease)
    assert isinstance(take(), leases.Holder)
    assert isinstance(take("another"), leases.Lease)
    with engines.write(engine) as connection:
        assert leases.holder(connection, "queue") is not None
        leases.release(connection, lease)
        assert leases.holder(connection, "queue") is None
    assert isinstance(take(), leases.Lease)


def test_a_lease_that_expired_is_taken_and_its_holder_can_write_nothing(engine, take):
    late = take(seconds=-1)
    lease = take()
    assert isinstance(lease, leases.Lease)
    assert lease.epoch == late.epoch + 1
    with engines.write(engine) as connection, pytest.raises(LeaseLost, match="took over"):
        leases.renew(connection, late)
    with engines.write(engine) as connection:
        leases.release(connection, late)  # nothing of the new holder's
        assert leases.holder(connection, "queue") is not None


def test_a_renewed_lease_lasts_from_now_on(engine, take, change):
    lease = take(seconds=60)
    change("expires_at = :past", past=LONG_AGO)
    with engines.write(engine) as connection:
        assert leases.holder(connection, "queue") is None
        leases.renew(connection, lease)
        assert leases.holder(connection, "queue") is not None


def test_a_dead_process_on_this_host_holds_nothing(take, change, gone):
    take()
    change("pid = :pid", pid=gone)
    assert isinstance(take(), leases.Lease)


def test_a_process_on_another_host_holds_its_lease_until_it_expires(take, change, gone):
    take()
    change("pid = :pid, host = 'elsewhere'", pid=gone)
    assert take() == leases.Holder("elsewhere", gone)
    change("expires_at = :past", past=LONG_AGO)
    assert isinstance(take(), leases.Lease)


def test_a_process_that_had_our_pid_before_us_is_gone(take, change):
    take()
    change("owner = 'another process'")
    assert isinstance(take(), leases.Lease)


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
def test_of_many_at_once_one_gets_it(url, engine, known):
    if known:
        with engines.write(engine) as connection:
            leases.release(connection, leases.acquire(connection, "race", 60))
    barrier, results = threading.Barrier(8), []

    def race():
        mine = engines.open_own(url, "audience_sync")
        with mine.connect() as warm:
            warm.exec_driver_sql("SELECT 1")
        barrier.wait()
        try:
            with engines.write(mine) as connection:
                results.append(type(leases.acquire(connection, "race", 60)))
        finally:
            mine.dispose()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [leases.Holder] * 7 + [leases.Lease]
