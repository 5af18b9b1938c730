"""Leases: one holder at a time, and how they change hands."""

import datetime as dt
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from audience_sync.db import dialects, engines, leases
from audience_sync.errors import LeaseLost
from tests.waiting import until

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


@pytest.fixture
def sleeper():
    """The pid of another process that runs."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def test_a_process_that_runs_keeps_its_lease_and_an_earlier_one_with_its_id_is_gone(take, change, sleeper):
    take()
    change("pid = :pid, owner = 'p-1'", pid=sleeper)
    assert take() == leases.Holder(leases.HOST, sleeper)
    # A start time that is not the process's; it is ignored where start times cannot be read.
    change("owner = :owner", owner=f"p-1 {sleeper}@5")
    assert isinstance(take(), leases.Lease if sys.platform == "linux" else leases.Holder)


@pytest.mark.skipif(sys.platform != "linux", reason="a zombie is seen in /proc")
def test_a_process_that_ended_and_was_not_waited_for_is_gone(take, change):
    process = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: "Z" in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
    take()
    change("pid = :pid, owner = :owner", pid=process.pid, owner=f"p-1 {process.pid}@5")
    assert isinstance(take(), leases.Lease)
    process.wait()


def test_a_process_of_an_earlier_release_on_a_host_of_our_name_keeps_its_lease(take, change):
    take()
    change("host = :host, owner = 'another process'", host=leases.HOST)
    assert isinstance(take(), leases.Holder)


IN_A_CONTAINER = """
import os, sys
from audience_sync.db import engines, leases
engine = engines.open_own(sys.argv[1], "audience_sync")
with engines.write(engine) as connection:
    print(os.getpid(), type(leases.acquire(connection, "queue", 600.0)).__name__, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def container(url):
    """container() takes the lease as process 1 of a new process namespace, and stays alive."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.geteuid():
        command += ["--user", "--map-current-user"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("needs Linux with process namespaces")
    running = []

    def start(*more):
        arguments = [*command, *more, sys.executable, "-c", IN_A_CONTAINER, url]
        running.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1].stdout.readline().split()

    yield start
    for process in running:
        process.communicate("\n")


@pytest.mark.parametrize("options", [(), ("--mount-proc",)], ids=["proc of the host", "own proc"])
def test_two_containers_with_one_hostname_do_not_steal_each_others_lease(take, change, container, options):
    assert container(*options) == ["1", "Lease"]
    assert container(*options) == ["1", "Holder"]
    assert take() == leases.Holder(leases.HOST, 1)  # nor does a process outside
    change("expires_at = :past", past=LONG_AGO)
    assert container(*options) == ["1", "Lease"]


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
