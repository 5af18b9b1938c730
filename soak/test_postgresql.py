"""PostgreSQL connections that are cut, and locks that are held, for longer than `make test` waits."""

import re
import signal
import time

import pytest

from tests.acceptance.faults import (
    EVERYONE,
    POSTGRESQL,
    SLOWLY,
    USERS,
    assert_never_partial,
    impatient,
    locked,
    users_in,
    wanted,
)
from tests.waiting import until


@POSTGRESQL
@pytest.mark.usefixtures("people")
def test_connections_that_are_cut_again_and_again_lose_nothing(start, cutting, sandbox):
    command = start({"In": EVERYONE, "Low": f"{EVERYONE} AND number < 60"})
    sandbox.faults.add({"path": "/v1/identify", "delay_seconds": 0.05})
    with cutting() as spared:
        for number in (0, 20, 40) * 5:
            spared.execute("UPDATE people SET is_in = CASE WHEN number < %s THEN 0 ELSE 1 END", [number])
            code, output = command("sync")
            assert code == 0 or (code in {1, 2} and re.search("terminat|connection|failed", output)), output
    assert command("sync")[0] == 0
    assert users_in(sandbox) == wanted(range(40, USERS))
    runs = command.document("history")
    assert {run["status"] for run in runs} <= {"succeeded", "failed", "abandoned"}
    assert_never_partial(command, {USERS, USERS - 20, USERS - 40})


@POSTGRESQL
def test_a_lasting_silence_ends_the_command_with_a_clear_error(through, here, sandbox):
    command = through({"In": SLOWLY})
    process = command.popen("sync")
    until(lambda: [run["status"] for run in command.document("history")] == ["running"])
    through.proxy.fall_silent()
    began = time.monotonic()
    code, output = command.ended(process)
    assert time.monotonic() - began < 20
    assert (code, "Is the server running" in output) == (2, True), output
    assert users_in(sandbox) == set()
    assert here({"In": EVERYONE})("sync")[0] == 0
    assert users_in(sandbox) == wanted(range(USERS))


@pytest.mark.usefixtures("people")
def test_a_daemon_outlives_a_lock(start, engine, sandbox, url, backend, tmp_path):
    command = impatient(start({"In": EVERYONE}), url, backend)
    with (tmp_path / "daemon.log").open("w") as log:
        daemon = command.popen("daemon", stderr=log)

    def heartbeat():
        return command.document("status")["daemon"]["heartbeat_at"]

    until(heartbeat)
    with locked(engine):
        until(lambda: "holds its lock" in (tmp_path / "daemon.log").read_text())
    before = heartbeat()
    until(lambda: heartbeat() > before)
    assert command("sync", "--no-deliver")[0] == 0
    until(lambda: users_in(sandbox) == wanted(range(USERS)))
    daemon.send_signal(signal.SIGTERM)
    assert command.ended(daemon)[0] == 0
