"""Faults of databases, networks and disks, with real processes."""

import contextlib
import json
import re
import resource
import signal
import socket
import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from audience_sync.db import dialects, engines, migrate
from tests.acceptance.faults import (
    EVERYONE,
    IN_FLIGHT,
    POSTGRESQL,
    SLOWLY,
    SQLITE,
    USERS,
    assert_never_partial,
    impatient,
    locked,
    users_in,
    wanted,
)
from tests.waiting import until


@POSTGRESQL
def test_a_restart_of_the_server_loses_nothing(here, own_server, sandbox):
    command = here({"In": EVERYONE})
    sandbox.faults.add({"path": "/v1/identify", "delay_seconds": 0.1})
    delivering = command.popen("sync")
    until(lambda: len(users_in(sandbox)) >= 10)
    own_server.control("restart")
    code, output = command.ended(delivering)
    assert code == 0, output
    assert users_in(sandbox) == wanted(range(USERS))
    assert len(sandbox.state.requests) <= USERS + IN_FLIGHT

    here.run("UPDATE people SET is_in = 0 WHERE number < 20")
    computing = here({"In": SLOWLY}).popen("sync")
    until(lambda: command.document("history")[0]["status"] == "running")
    own_server.control("restart")
    code, output = command.ended(computing)
    assert code in {1, 2}, output
    assert re.search("cannot be used|database failed", output)
    assert here({"In": EVERYONE})("sync")[0] == 0
    assert users_in(sandbox) == wanted(range(20, USERS))
    assert_never_partial(command, {USERS, USERS - 20})


@POSTGRESQL
@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_statement_does_not_outlive_its_process(start, engine, number):
    command = start({"Endless": ENDLESS}, extra="[defaults]\ntimeout = '2 hours'")
    process = command.popen("sync")
    until(lambda: endless_statements(engine) == 1)
    process.send_signal(number)
    code, _ = command.ended(process)
    assert code == (-number if number == signal.SIGKILL else 1)
    until(lambda: endless_statements(engine) == 0)


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS user_id FROM n"


def endless_statements(engine):
    with engines.read(engine) as connection:
        return dialects.sql(
            connection,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' "
            "AND starts_with(query, 'INSERT INTO pg_temp.audience_sync_snapshot') AND strpos(query, 'n(i)') > 0",
        ).scalar_one()


@POSTGRESQL
def test_check_reports_a_role_without_temporary_tables(start, url, postgres):
    command = start({})
    database = sa.make_url(url).database
    role = f"role_of_{database}"
    for statement in (
        f"CREATE ROLE {role} LOGIN",
        f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
        f"GRANT CREATE ON DATABASE {database} TO {role}",
    ):
        postgres.run(statement)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for what in ("USAGE ON SCHEMA", "ALL ON ALL TABLES IN SCHEMA", "ALL ON ALL SEQUENCES IN SCHEMA"):
            connection.exec_driver_sql(f"GRANT {what} audience_sync TO {role}")
    engine.dispose()
    command.path.write_text(command.path.read_text().replace("postgres:@", f"{role}@", 1))
    code, output = command("check")
    assert (code, "wrong  database: the role may not create temporary tables" in output) == (2, True), output
    postgres.run(re.search("GRANT .*", output)[0])
    assert "ok     database" in command("check")[1]


@POSTGRESQL
def test_both_sides_of_a_connection_watch_it(here):
    engine = engines.open_own(here.url, "audience_sync")
    with engine.connect() as connection:
        names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
        theirs = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]
        number = connection.connection.dbapi_connection.fileno()
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as ours:
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            mine = [ours.getsockopt(socket.IPPROTO_TCP, option) for option in options]
    engine.dispose()
    assert theirs == ["30", "10", "3", "60000"]
    assert mine == [30, 10, 3, 60_000]


@POSTGRESQL
def test_a_delivery_continues_after_a_silence(through, sandbox):
    sandbox.faults.add({"path": "/v1/identify", "delay_seconds": 0.3})
    command = through({"In": EVERYONE})
    process = command.popen("sync")
    until(lambda: len(users_in(sandbox)) >= 10)
    through.proxy.fall_silent()
    began = time.monotonic()
    line = next(line for line in process.stderr if "cannot be used" in line)
    assert re.search("timed out|timeout", line), line
    # Here tcp_user_timeout is 3 s, and keepalives would take as long again.
    assert time.monotonic() - began < 60
    through.proxy.speak_again()
    code, output = command.ended(process)
    assert (code, users_in(sandbox)) == (0, wanted(range(USERS))), output
    assert len(sandbox.state.requests) <= USERS + IN_FLIGHT


@pytest.mark.usefixtures("people")
def test_commands_wait_for_a_lock(start, engine, sandbox):
    command = start({"In": EVERYONE})
    with locked(engine):
        process = command.popen("sync")
        time.sleep(2)
        assert process.poll() is None
    code, output = command.ended(process)
    assert (code, users_in(sandbox)) == (0, wanted(range(USERS))), output


@pytest.mark.usefixtures("people")
def test_a_lock_that_is_not_released_is_reported(start, engine, sandbox, url, backend):
    command = impatient(start({"In": EVERYONE}), url, backend)
    assert command("sync", "--no-deliver")[0] == 0
    with locked(engine):
        for name in ("sync", "deliver"):
            code, output = command(name)
            assert code in {1, 2}, output
            assert "Another program holds its lock" in output
    assert command("deliver")[0] == 0
    assert users_in(sandbox) == wanted(range(USERS))


@SQLITE
@pytest.mark.usefixtures("people")
def test_a_disk_that_is_full_at_any_write_of_a_delivery_loses_nothing(start, sandbox, tmp_path):
    command = start({"In": EVERYONE})
    assert command("sync", "--no-deliver")[0] == 0
    size = (tmp_path / "own.db").stat().st_size
    for number, room in enumerate((0, 2_000, size // 3, size - 4096)):

        def fill_disk(room=room):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        code, output = command("deliver", preexec_fn=fill_disk)
        assert (code, "check the disk's free space" in output) == (2, True), output
        assert len(sandbox.state.requests) <= IN_FLIGHT * (number + 1)
    assert command("deliver")[0] == 0
    assert users_in(sandbox) == wanted(range(USERS))
    assert [each["status"] for each in command.document("deliveries")] == ["accepted"] * USERS


def test_five_upgrades_at_once_are_one(start, url, backend, tmp_path, request):
    if backend == "sqlite":
        fresh = f"sqlite:///{tmp_path}/fresh.db"
    else:
        server = request.getfixturevalue("postgres")
        fresh = server.url(server.create())
    command = start({"In": EVERYONE})
    command.path.write_text(command.path.read_text().replace(url, fresh))
    engine = engines.open_own(fresh, "audience_sync")
    with holding_upgrades(engine) as are_waiting:
        processes = [command.popen("db", "upgrade") for _ in range(5)]
        until(lambda: are_waiting(processes))
    for process in processes:
        code, output = command.ended(process)
        assert (code, migrate.HEAD in output) == (0, True), output
    assert migrate.current(engine) == migrate.HEAD
    assert command.document("history") == []
    engine.dispose()


def open_files(pid):
    paths = set()
    for each in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed in the meantime
            paths.add(str(each.readlink()))
    return paths


@contextlib.contextmanager
def holding_upgrades(engine):
    """Keep upgrades from beginning; the result checks whether these processes all wait for that."""
    if dialects.is_sqlite(engine):
        with contextlib.closing(sqlite3.connect(engine.url.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")

            def have_opened(processes):
                opened = [open_files(process.pid) for process in processes]
                return all(engine.url.database in each for each in opened)

            yield have_opened
            other.execute("ROLLBACK")
        return
    with engine.connect() as other:
        lock = sa.text("SELECT pg_advisory_xact_lock(:lock)")
        other.execute(lock, {"lock": migrate._LOCK})
        query = sa.text(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        yield lambda processes: other.execute(query).scalar() == len(processes)
        other.rollback()


NAMES = {
    "it's; DROP TABLE people --": "it_s_drop_table_people",
    'say "yes" 100%s': "say_yes_100_s",
    ":as_of {{our}} {temp}": "as_of_our_temp",
    "$(id) `id` %(x)s": "id_id_x_s",
}
IDS = [
    "it's", 'say "yes"', "a;b", "100%", "%s", ":x", "{our}", "a\\b", "two\nlines", "\u202eabc", "\U0001f600",
    "cafe\u0301", "caf\u00e9", "Ann", "ann", "007", "7", "7.0", " a ", "null", "x" * 255, "\u4e16" * 255,
]  # fmt: skip
UNFIT = ["", " \t", "\u00a0", "x" * 256, "y" * 1_000_000, None]


@pytest.mark.parametrize("name", ["two\\nlines", "\\u202eright to left"])
@SQLITE
def test_a_name_that_no_table_can_show_is_refused(start, name):
    code, output = start({name: EVERYONE})("sync")
    assert (code, "one line without control characters" in output) == (2, True), output


def test_names_and_ids_are_only_text(start, company, sandbox):
    company("CREATE TABLE ids (user_id text)")
    company("INSERT INTO ids VALUES (:user)", *[{"user": each} for each in (*IDS, *IDS, *UNFIT)])
    audiences = {json.dumps(name)[1:-1]: "SELECT user_id FROM ids" for name in NAMES}
    command = start(audiences)
    code, output = command("sync")
    assert code == 0, output
    users = sandbox.state.snapshot()["users"]
    assert users.keys() == set(IDS)
    assert all(each["properties"] == dict.fromkeys(NAMES.values(), True) for each in users.values())
    run = command.document("show", "1")
    assert run["set_aside"] == {"empty": 3, "null": 1, "too_long": 2}
    for user in IDS[:3]:
        assert command.document("user", user)["memberships"], user
