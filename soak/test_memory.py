"""Memory does not grow with the number of members: a million, compared with a hundred thousand."""

import os
import signal
import subprocess
import sys

import pytest

from tests.acceptance.conftest import clean
from tests.waiting import until

HUNDRED_THOUSAND, MILLION = 100_000, 1_000_000
CACHES = 64  # megabytes: SQLite's page caches of two connections
NUMBERS = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
    "SELECT 'user' || i AS user_id FROM n",
    "postgresql": "SELECT 'user' || i AS user_id FROM generate_series(1, {}) i",
}


def megabytes(command, *arguments, until_met=None):
    """Peak memory of a command, at least that of this process; the command is stopped when a condition is met."""
    program = [sys.executable, "-m", "audience_sync", "--config", str(command.path), *arguments]
    process = subprocess.Popen(program, env=clean(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if until_met:
        until(until_met)
        process.send_signal(signal.SIGTERM)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (1 if until_met else 0)
    return used.ru_maxrss / 1024


@pytest.mark.parametrize("place", ["own", "source"])
def test_memory_is_flat_in_the_number_of_members(start, backend, url, sandbox, place):
    extra = f'[sources.shop]\nurl = "{url}"\n[defaults]\nguard_above = {10 * MILLION}'
    source = "shop" if place == "source" else None
    used = {}
    for count in (HUNDRED_THOUSAND, MILLION):
        command = start({"Far": NUMBERS[backend].format(count)}, extra=extra, source=source)
        computing = megabytes(command, "sync", "--no-deliver")
        sent = len(sandbox.state.requests)
        delivering = megabytes(
            command, "deliver", until_met=lambda sent=sent: len(sandbox.state.requests) > sent + 4_000
        )
        repeating = megabytes(command, "sync", "--no-deliver")
        full = megabytes(command, "sync", "--full", "--no-deliver")
        used[count] = (computing, delivering, repeating, full)
    print(backend, place, used)
    for few, many in zip(*used.values(), strict=True):
        assert many < few + 20 + (CACHES if backend == "sqlite" else 0), used
        assert many < 200, used
