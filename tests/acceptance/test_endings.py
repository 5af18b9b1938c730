"""The end of commands: by signals, without their streams, without their parent; and the state they leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import until

MANY = 30
PEOPLE = "SELECT user_id FROM people"
REAL = {
    "preexec_fn": lambda: None,
    "environ": {"PYTHONUNBUFFERED": ""},
}  # a new interpreter
SLOW = {"path": "/v1/identify", "delay_seconds": 25}  # longer than any test waits

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@pytest.fixture
def command(start, company):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES (:user)", *[{"user": f"u{number}"} for number in range(MANY)])
    return start({"In": PEOPLE})


@pytest.fixture
def full():
    with Path("/dev/full").open("w", encoding="utf-8") as file:
        yield file


@pytest.fixture
def unread():
    """A pipe whose reader has closed it, as `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        yield file


def user_count(sandbox):
    return len(sandbox.state.snapshot()["users"])


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_work_needs_no_open_streams(command, sandbox, closed):
    process = command.popen("sync", **REAL | {"preexec_fn": lambda: [os.close(number) for number in closed]})
    code, output = command.ended(process)
    assert (code, user_count(sandbox)) == (0, MANY), output


def test_a_closed_pipe_changes_neither_work_nor_exit_code(command, sandbox, unread):
    code, output = command("sync", stdout=unread, **REAL)
    assert (code, user_count(sandbox)) == (0, MANY), output
    assert "pipe" not in output.lower()
    sandbox.state.api_key = "another"
    code, output = command("sync", "--full", stdout=unread, **REAL)
    assert (code, "api_key" in output) == (1, True), output


def test_a_log_that_cannot_be_written_does_not_end_the_work(command, sandbox, full, unread):
    assert command("sync", stderr=full, **REAL)[0] == 0
    assert user_count(sandbox) == MANY
    assert command("sync", "--full", stderr=unread, **REAL)[0] == 0
    assert len(sandbox.state.requests) == 2 * MANY


def test_output_that_cannot_be_written_is_reported(command, sandbox, full):
    code, output = command("sync", stdout=full, **REAL)
    assert (code, "No space left on device" in output) == (1, True), output
    assert user_count(sandbox) == MANY


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_after_a_signal_a_delivery_finishes_its_requests_in_flight(start, command, sandbox, number):
    command = start({"In": PEOPLE}, identify_per_minute=60)
    handlers = {
        "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    }  # even if the test run ignores it
    process = command.popen("sync", **REAL | handlers)
    until(lambda: user_count(sandbox) > 1)
    process.send_signal(number)
    code, output = command.ended(process)
    assert code == 1, output
    assert user_count(sandbox) < MANY
    assert "continues with the pending ones" in output
    statuses = [each["status"] for each in command.document("deliveries")]
    assert sorted(statuses) == ["accepted"] * user_count(sandbox) + ["pending"] * (MANY - user_count(sandbox))
    assert command.document("status")["deliverer"] is None


def test_nohup_works(command, sandbox):
    sandbox.faults.add(SLOW | {"delay_seconds": 1, "times": 1})
    process = command.popen(
        "sync", **REAL | {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    )
    until(lambda: sandbox.state.requests)
    process.send_signal(signal.SIGHUP)
    assert command.ended(process)[0] == 0
    assert user_count(sandbox) == MANY


@pytest.mark.parametrize("name", ["sync", "daemon"])
def test_a_second_signal_ends_at_once(start, command, sandbox, name):
    command = start({"In": PEOPLE}, extra='[defaults]\nschedule = "every 1 minute"')
    assert command("sync", "--no-deliver")[0] == 0
    sandbox.faults.add(SLOW)
    process = command.popen(name, **REAL)
    until(lambda: len(sandbox.state.requests) >= 8)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()

    def is_ended():
        process.send_signal(signal.SIGINT)  # a busy process may have taken it and the one before it for one
        time.sleep(0.5)
        return process.poll() is not None

    until(is_ended)
    code, output = command.ended(process)
    assert code == 1, output
    assert time.monotonic() - began < SLOW["delay_seconds"]  # no answer was waited for
    assert "Nothing is lost" in output
    sandbox.faults.clear()
    sandbox.stop()  # requests that it still has are not applied
    sandbox.start()
    until(lambda: command("deliver")[0] == 0)
    assert user_count(sandbox) == MANY


def test_the_death_of_the_parent_does_not_end_the_work(command, sandbox):
    sandbox.faults.add(SLOW | {"delay_seconds": 1, "times": 8})
    called = [sys.executable, "-m", "audience_sync", "--config", str(command.path), "sync"]
    parent = subprocess.Popen(
        ["sh", "-c", '"$@" & wait', "sh", *called], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until(lambda: sandbox.state.requests)
    parent.kill()
    parent.stdout.close()
    parent.wait()
    until(lambda: user_count(sandbox) == MANY)
    until(lambda: command.document("status")["deliverer"] is None)
    assert [each["status"] for each in command.document("deliveries")] == ["accepted"] * MANY
