"""Two commands at once, on both databases: one run per definition, one pace, no change lost or sent twice."""

import contextlib
import datetime as dt
import itertools
import random
import signal
import sqlite3
import time

import pytest
import sqlalchemy as sa

from audience_sync.db import dialects, engines
from audience_sync.db.tables import requests
from audience_sync.sandbox import Limits
from tests.waiting import until

# Always true, after some tenths of a second: two processes that start together usually meet here.
SLOWLY = "(SELECT count(*) FROM seats a, seats b, seats c WHERE a.number < 100 AND a.number + b.number + c.number = 1) = 3"
TAKEN = "SELECT user_id FROM seats WHERE taken = 1"
AUDIENCES = {
    "Taken": f"{TAKEN} AND {SLOWLY}",
    "Free": "SELECT user_id FROM seats WHERE taken = 0",
    "Low": "SELECT user_id FROM seats WHERE taken = 1 AND number < 100",
}
SEATS = 200
DATABASE_ERRORS = (
    "sqlalche",
    "sqlite3",
    "psycopg",
    "operationalerror",
    "integrityerror",
    "database is locked",
    "deadlock",
    "serialize",
    "unique",
    "lock timeout",
)


@pytest.fixture
def seats(company):
    """The states of the seats, all free at first, in a list that follows the table."""
    company("CREATE TABLE seats (user_id text, number integer, taken integer)")
    rows = [{"user_id": f"u{number}", "number": number} for number in range(SEATS)]
    company("INSERT INTO seats VALUES (:user_id, :number, 0)", *rows)
    return [0] * SEATS


def move(company, seats, chosen):
    for number in chosen:
        seats[number] = 1 - seats[number]
    company(
        "UPDATE seats SET taken = 1 - taken WHERE number = :number", *[{"number": each} for each in chosen]
    )


def together(command, *names):
    """Run commands at once: each succeeds or names the process that syncs its definition; none shows a database error."""
    processes, codes = [command.popen(name) for name in names], []
    for process in processes:
        code, output = command.ended(process)
        others = [f"is being synced by process {each.pid} on" for each in processes if each is not process]
        assert code == 0 or (code == 75 and any(other in output for other in others)), (code, output)
        assert not any(word in output.lower() for word in DATABASE_ERRORS), output
        codes.append(code)
    return codes


def assert_up_to_date(sandbox, seats):
    users = sandbox.state.snapshot()["users"]
    for number, taken in enumerate(seats):
        properties = {"taken": False, "free": False, "low": False} | users[f"u{number}"]["properties"]
        assert properties == {"taken": taken == 1, "free": taken == 0, "low": taken == 1 and number < 100}, (
            number
        )


def assert_nothing_sent_twice(sandbox):
    """No value was sent to a user twice in a row."""
    for user, lines in sandbox.state.history.items():
        for key in {name for name, _, _ in lines}:
            values = [value for name, value, _ in lines if name == key]
            assert all(left != right for left, right in itertools.pairwise(values)), (user, lines)


def test_two_syncs_share_the_work(start, company, seats, sandbox):
    command = start(AUDIENCES)
    chance, codes, moved = random.Random(7), [], 0
    assert command("sync")[0] == 0
    rounds = 0
    while rounds < 6 or (75 not in codes and rounds < 40):  # until one met the other
        rounds += 1
        chosen = chance.sample(range(SEATS), 60)
        moved += len(chosen)
        move(company, seats, chosen)
        codes += together(command, "sync", "sync")
        assert_up_to_date(sandbox, seats)
    assert 75 in codes
    runs = [run for run in command.document("history") if run["key"] == "taken"]
    assert {run["status"] for run in runs} == {"succeeded"}
    assert sum(run["entered_count"] + run["exited_count"] for run in runs) == moved
    assert_nothing_sent_twice(sandbox)


def test_syncs_at_once_set_up_a_new_database(start, url, backend, sandbox, request, tmp_path):
    command = start({"Few": "SELECT 'u1' AS user_id UNION SELECT 'u2'", "One": "SELECT 'u1' AS user_id"})
    own = command.path.read_text()
    for number in range(2):
        if backend == "sqlite":
            fresh = f"sqlite:///{tmp_path}/fresh{number}.db"
        else:
            server = request.getfixturevalue("postgres")
            fresh = server.url(server.create())
        sandbox.state.reset()
        command.path.write_text(own.replace(url, fresh))
        together(command, "sync", "sync", "sync")
        users = sandbox.state.snapshot()["users"]
        assert {user: each["properties"] for user, each in users.items()} == {
            "u1": {"few": True, "one": True},
            "u2": {"few": True},
        }
        assert_nothing_sent_twice(sandbox)


def test_a_deliver_during_a_sync(start, company, seats, sandbox):
    command = start(AUDIENCES)
    chance = random.Random(8)
    assert command("sync", "--no-deliver")[0] == 0
    for _ in range(4):
        move(company, seats, chance.sample(range(SEATS), 60))
        assert together(command, "sync", "deliver") == [0, 0]
        assert_up_to_date(sandbox, seats)
    assert_nothing_sent_twice(sandbox)


def test_processes_share_one_limit(start, company, seats, sandbox):
    limit = 40
    sandbox.state.set_limits(Limits(identify_per_minute=limit))
    command = start({"Taken": TAKEN}, identify_per_minute=limit, bulk=False)
    assert command("sync")[0] == 0
    move(company, seats, range(SEATS))
    processes = [command.popen(name) for name in ("sync", "sync", "deliver")]
    until(lambda: len(sandbox.state.requests) >= limit)
    time.sleep(3)
    stop(command, *processes)
    later = command.popen("deliver")  # in the same minute
    until(lambda: command.document("status")["deliverer"])
    stop(command, later)
    times = [entry.monotonic for entry in sandbox.state.requests]
    assert {entry.status for entry in sandbox.state.requests} == {202}
    for first in times:  # on a slow machine more than a minute may have passed
        assert sum(first <= each < first + 60 for each in times) <= limit, times


def test_processes_spread_one_push(start, company, seats, sandbox, engine):
    move(company, seats, range(24))
    command = start({"Taken": TAKEN}, identify_per_minute=120)
    together(command, "sync", "sync", "deliver")
    assert command("deliver")[0] == 0
    assert len(sandbox.state.requests) == 24
    with engines.read(engine) as connection:
        times = list(connection.execute(sa.select(requests.c.started_at)).scalars())
    assert len(times) == 24
    for first in times:  # two a second; two to catch up, and one with which a process begins
        assert sum(first <= each < first + dt.timedelta(seconds=5) for each in times) <= 13, times


def stop(command, *processes):
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        assert command.ended(process)[0] in {0, 1, 75}


def test_a_run_of_a_dead_process_is_taken_over(start, seats, sandbox):
    command = start(AUDIENCES)
    killed = command.popen("sync", environ={"AUDIENCE_SYNC_CRASH_AT": "changes_written:2"})
    assert command.ended(killed)[0] == -signal.SIGKILL
    assert [run["status"] for run in command.document("history")] == ["running", "succeeded"]
    code, output = command("sync")
    assert code == 0, output
    runs = [(run["key"], run["status"]) for run in command.document("history")][::-1]
    assert runs[:2] == [("taken", "succeeded"), ("free", "abandoned")]
    assert runs[2:] == [("taken", "succeeded"), ("free", "succeeded"), ("low", "succeeded")]
    assert_up_to_date(sandbox, seats)


def test_a_sync_whose_run_was_taken_over_fails(start, engine, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None)) as shop:
        shop.execute("CREATE TABLE buyers AS SELECT 'u1' AS user_id")
        extra = f'[sources.shop]\nurl = "sqlite:///{tmp_path}/shop.db"'
        command = start({"Far": "SELECT user_id FROM buyers"}, extra=extra, source="shop")
        shop.execute("BEGIN EXCLUSIVE")  # the first sync waits for this
        first = command.popen("sync")
        until(lambda: [run["status"] for run in command.document("history")] == ["running"])
        with engines.write(engine) as connection:
            dialects.sql(connection, "UPDATE {our}leases SET expires_at = '2020-01-01 00:00:00.000000'")
        command = start({"Far": "SELECT 'u2' AS user_id"}, extra=extra)
        assert command("sync")[0] == 0
        shop.execute("ROLLBACK")
    code, output = command.ended(first)
    assert code == 1
    assert "Run 1 of far abandoned: Its process ended before it was done, or another one took over." in output
    assert command("members", "far") == (0, "u2\n")
