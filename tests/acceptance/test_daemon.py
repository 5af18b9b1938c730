"""Daemons as real processes: signals, a hung definition, two at once, and one suspended until its lease expired."""

import contextlib
import itertools
import re
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from audience_sync.daemon import ENDING_SECONDS
from audience_sync.db import dialects, engines
from tests.waiting import until

YEARLY = 'schedule = "0 0 1 1 *"'  # one slot that is due, and no other while a test runs
PEOPLE = "SELECT user_id FROM people WHERE is_in = 1"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT CAST(max(i) AS text) AS user_id FROM n"


@pytest.fixture(autouse=True)
def people(company):
    company("CREATE TABLE people (user_id text, number integer, is_in integer)")
    company(
        "INSERT INTO people VALUES (:user, :number, 1)", *[{"user": f"u{n}", "number": n} for n in range(40)]
    )


@pytest.fixture
def own(engine):
    def execute(statement):
        with engines.write(engine) as connection:
            return dialects.sql(connection, statement)

    return execute


@pytest.fixture
def make_due(own):
    """Makes the newest slot of every definition due, as if it were years old and no slot had been taken."""

    def back_date(command):
        assert command("sync", "--no-deliver")[0] in {0, 1}
        own("DELETE FROM {our}schedule_slots")
        own("UPDATE {our}definitions SET created_at = '2020-01-01 00:00:00.000000'")

    return back_date


@pytest.fixture
def log(tmp_path):
    """A file for a daemon's log."""
    with (tmp_path / "daemon.log").open("w+") as file:
        yield file


def logged(log):
    return Path(log.name).read_text(encoding="utf-8")


def runs(command, trigger="schedule"):
    return [
        (run["key"], run["status"]) for run in command.document("history")[::-1] if run["trigger"] == trigger
    ]


def stop(command, process, sent=signal.SIGTERM):
    process.send_signal(sent)
    code, output = command.ended(process)
    assert code == 0, output
    return output


def suspend(daemon, engine):
    """Suspend the process at a moment when it holds no lock that others would wait for."""

    def is_free():
        daemon.send_signal(signal.SIGSTOP)
        if holds_no_lock(engine):
            return True
        daemon.send_signal(signal.SIGCONT)
        return False

    until(is_free)


def holds_no_lock(engine):
    if dialects.is_sqlite(engine):
        try:
            with contextlib.closing(sqlite3.connect(engine.url.database, timeout=0.1)) as database:
                database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True
    with engines.read(
        engine
    ) as connection:  # a lock on a row is also a lock on its table, in one of these modes
        count = dialects.sql(
            connection,
            "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
            "WHERE c.relnamespace = CAST('audience_sync' AS regnamespace) "
            "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            "AND l.mode IN ('RowShareLock', 'RowExclusiveLock')",
        ).scalar_one()
    return count == 0


def members(sandbox):
    return {user for user, each in sandbox.state.snapshot()["users"].items() if each["properties"]["in"]}


def test_a_daemon_catches_up_delivers_and_stops(start, company, make_due, sandbox):
    command = start({"In": PEOPLE}, extra=f"[defaults]\n{YEARLY}\n[logging]\nformat = 'json'")
    make_due(command)
    company("UPDATE people SET is_in = 0 WHERE number < 10")
    daemon = command.popen("daemon")
    until(lambda: len(members(sandbox)) == 30)
    status = command.document("status")
    assert status["daemon"]["is_alive"] is True
    assert [each["key"] for each in status["next_slots"]] == ["in"]
    output = stop(command, daemon)
    assert runs(command) == [("in", "succeeded")]
    assert '"message": "run succeeded"' in output
    assert '"message": "daemon stopped"' in output
    assert "runs are late" not in output  # it was due before the daemon started
    assert command.document("status")["daemon"]["is_alive"] is False
    assert len({entry.user_id for entry in sandbox.state.requests}) == len(sandbox.state.requests)


def test_a_hung_definition_delays_no_other_and_ends_with_the_daemon(start, make_due, sandbox, own):
    command = start({"In": PEOPLE}, extra=f"[defaults]\n{YEARLY}")
    make_due(command)
    command = start({"In": PEOPLE, "Hung": ENDLESS}, extra=f"[defaults]\n{YEARLY}\ntimeout = '2 hours'")
    own(
        "INSERT INTO {our}definitions (key, name, kind, created_at) "
        "VALUES ('hung', 'Hung', 'audience', '2020-01-01 00:00:00.000000')"
    )
    daemon = command.popen("daemon")
    until(lambda: len(members(sandbox)) == 40 and len(runs(command)) == 2)
    assert sorted(runs(command)) == [("hung", "running"), ("in", "succeeded")]
    began = time.monotonic()
    stop(command, daemon, signal.SIGINT)
    assert time.monotonic() - began < ENDING_SECONDS  # it is interrupted, not waited for
    assert sorted(runs(command)) == [("hung", "failed"), ("in", "succeeded")]
    assert [row.key for row in own(TAKEN)] == ["in"]  # the hung one's slot is due again


TAKEN = (
    "SELECT d.key FROM {our}schedule_slots s JOIN {our}definitions d ON d.definition_id = s.definition_id "
    "ORDER BY d.key"
)


def test_two_daemons_and_a_sync_run_a_slot_once(start, company, make_due, sandbox, own):
    audiences = {"In": PEOPLE, "Low": f"{PEOPLE} AND number < 20", "High": f"{PEOPLE} AND number >= 20"}
    command = start(audiences, extra=f"[defaults]\n{YEARLY}")
    make_due(command)
    company("UPDATE people SET is_in = 0 WHERE number < 10")
    daemons = [command.popen("daemon") for _ in range(2)]
    code, output = command("sync")
    assert code in {0, 75}, output
    succeeded = [("high", "succeeded"), ("in", "succeeded"), ("low", "succeeded")]
    until(lambda: len(members(sandbox)) == 30 and sorted(runs(command)) == succeeded)
    for daemon in daemons:
        stop(command, daemon)
    assert sorted(runs(command)) == succeeded
    assert [row.key for row in own(TAKEN)] == ["high", "in", "low"]
    for lines in sandbox.state.history.values():
        for key in ("in", "low", "high"):
            values = [value for name, value, _ in lines if name == key]
            assert all(left != right for left, right in itertools.pairwise(values)), lines


def test_sighup_takes_a_valid_configuration_and_refuses_an_invalid_one(start, make_due, sandbox, own, log):
    command = start({"In": PEOPLE}, extra=f"[defaults]\n{YEARLY}")
    make_due(command)
    daemon = command.popen("daemon", stderr=log)
    until(lambda: len(members(sandbox)) == 40)
    good = command.path.read_text()
    command.path.write_text("no = 1")
    daemon.send_signal(signal.SIGHUP)
    until(lambda: re.search("configuration refused.*unknown name no", logged(log)))
    command.path.write_text(good.replace('"In"', '"Others"'))
    daemon.send_signal(signal.SIGHUP)
    until(lambda: "others" in [row.key for row in own("SELECT key FROM {our}definitions")])
    own("UPDATE {our}definitions SET created_at = '2020-01-01 00:00:00.000000'")  # makes its slot due
    until(lambda: ("others", "succeeded") in runs(command))
    stop(command, daemon)
    assert "configuration reloaded" in logged(log)


def test_a_run_that_slept_through_its_lease_changes_nothing(start, make_due, own, engine, tmp_path, log):
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None)) as shop:
        shop.execute("CREATE TABLE buyers AS SELECT 'u1' AS user_id")
        extra = f'[sources.shop]\nurl = "sqlite:///{tmp_path}/shop.db"\n[defaults]\n{YEARLY}'
        command = start({"Far": "SELECT user_id FROM buyers"}, extra=extra, source="shop")
        make_due(command)
        assert command("deliver")[0] == 0
        shop.execute("BEGIN EXCLUSIVE")  # the daemon's query waits for this
        daemon = command.popen("daemon", stderr=log)
        until(lambda: runs(command) == [("far", "running")])
        suspend(daemon, engine)
        own("UPDATE {our}leases SET expires_at = '2020-01-01 00:00:00.000000' WHERE owner IS NOT NULL")
        command = start({"Far": "SELECT 'u2' AS user_id UNION SELECT 'u3'"}, extra=extra)
        assert command("sync")[0] == 0
        own(TAKEN_OVER)
        known = command.document("deliveries")
        daemon.send_signal(signal.SIGCONT)
        shop.execute("ROLLBACK")
    until(lambda: re.search("run failed run_id=2 key=far error=LeaseLost", logged(log)))
    stop(command, daemon)
    assert runs(command) == [("far", "abandoned")]
    assert command.document("deliveries") == known
    assert command("members", "far") == (0, "u2\nu3\n")


# As by another daemon. Otherwise the slot of the abandoned run is due again, and the daemon that wakes up takes it
# at its next tick, unless it is stopped before.
TAKEN_OVER = (
    "UPDATE {our}schedule_slots SET run_id = (SELECT max(run_id) FROM {our}runs WHERE status = 'succeeded')"
)


def test_a_delivery_that_slept_through_its_lease_sends_nothing_more(
    start, make_due, sandbox, own, engine, log
):
    extra = f"[defaults]\n{YEARLY}"
    command = start({"In": PEOPLE}, extra=extra, identify_per_minute=60)
    make_due(command)
    daemon = command.popen("daemon", stderr=log)
    until(lambda: len(members(sandbox)) >= 2)
    suspend(daemon, engine)
    own("UPDATE {our}leases SET expires_at = '2020-01-01 00:00:00.000000' WHERE owner IS NOT NULL")
    command = start({"In": PEOPLE}, extra=extra)
    assert command("deliver")[0] == 0
    assert len(members(sandbox)) == 40
    known = len(sandbox.state.requests)
    daemon.send_signal(signal.SIGCONT)
    taken_over = "Another process took over (queue); this one stops and has written nothing"
    until(lambda: taken_over in logged(log))
    stop(command, daemon)
    assert len(sandbox.state.requests) - known <= 8
    assert [each["status"] for each in command.document("deliveries")] == ["accepted"] * 40


def test_a_scheduled_run_is_held_and_logged(start, company, make_due, sandbox):
    extra = f"[defaults]\n{YEARLY}\nguard_above = 10"
    command = start({"In": PEOPLE}, extra=extra)
    make_due(command)
    assert command("deliver")[0] == 0
    company("DELETE FROM people")
    daemon = command.popen("daemon")
    until(lambda: runs(command) == [("in", "held")])
    output = stop(command, daemon)
    assert re.search(r"run held by guard run_id=2 key=in .*exited=40", output)
    (held,) = command.document("status")["held_runs"]
    assert (held["key"], held["held_by"]) == ("in", "guard")
    assert len(members(sandbox)) == 40


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)  # a file does not go away
def test_the_daemon_waits_for_a_server_that_is_down(start, make_due, sandbox, url, postgres):
    command = start({"In": PEOPLE}, extra=f"[defaults]\n{YEARLY}")
    make_due(command)
    daemon = command.popen("daemon")
    until(lambda: len(members(sandbox)) == 40)
    name = sa.make_url(url).database
    postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    before = command.document("status")["daemon"]["heartbeat_at"]
    until(lambda: command.document("status")["daemon"]["heartbeat_at"] > before)
    stop(command, daemon)


def test_a_scheduled_run_that_failed_is_reported_until_it_succeeds(start, company, make_due):
    command = start({"In": PEOPLE}, extra=f"[defaults]\n{YEARLY}")
    make_due(command)
    company("ALTER TABLE people RENAME TO persons")
    daemon = command.popen("daemon")
    until(lambda: runs(command) == [("in", "failed")])
    stop(command, daemon)
    code, output = command("status")
    assert code == 1
    assert re.search(
        r"- The last run of in \(2\) failed\. .*people.* It will be tried again at 20..-..-.. ..:.. UTC\.",
        output,
    )
    company("ALTER TABLE persons RENAME TO people")
    assert command("sync", "--no-deliver")[0] == 0
    code, output = command("status")
    assert (code, "failed" in output) == (0, False)
