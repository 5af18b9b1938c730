"""What goes wrong outside of us: the exit code, a message that says what to do, and never a traceback."""

import resource
import signal
import subprocess
import sys

import pytest
import sqlalchemy as sa

from tests.waiting import until

GOOD = "SELECT user_id FROM people"


@pytest.fixture(autouse=True)
def people(company):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES ('u1'), ('u2'), ('u3')")


@pytest.fixture
def good(start):
    """The configuration that is right, but for what is given."""
    return lambda **said: start({"Good": GOOD}, **said)


def test_no_configuration(tmp_path, environ):
    called = [sys.executable, "-m", "audience_sync", "sync"]
    found = subprocess.run(called, capture_output=True, text=True, cwd=tmp_path, env=environ, check=False)
    assert found.returncode == 2
    assert "audience-sync init" in found.stderr
    assert "Traceback" not in found.stderr


def test_configuration_that_is_wrong(good):
    code, said = good(identfy_per_minute=5)("sync")
    assert (code, "did you mean identify_per_minute?" in said) == (2, True), said
    code, said = good(endpoint="https://elsewhere.example/")("sync")
    assert (code, "allow_custom_endpoint" in said) == (2, True), said


def test_a_missing_key_stops_only_what_sends(good, sandbox):
    command = good(key="${NO_SUCH_KEY}")
    for name in ("sync", "deliver"):
        code, said = command(name)
        assert (code, "set the environment variable NO_SUCH_KEY" in said) == (2, True), said
    assert command.document("history") == []
    assert sandbox.state.requests == []


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("SELECT user_id FROM peopel", "peopel"),
        ("SELECT user_id FROM people WHERE (", "more ( than it closes"),
        ("DELETE FROM people RETURNING user_id", "SELECT"),
        ("SELECT user_id FROM people; DELETE FROM people", "exactly one query"),
        ("SELECT user_id AS person FROM people", "user_id"),
    ],
)
def test_a_bad_definition_fails_alone(start, sandbox, query, told):
    command = start({"Bad": query, "Good": GOOD})
    code, said = command("sync")
    assert code == 1
    assert told in said
    runs = {run["key"]: run["status"] for run in command.document("history")}
    assert runs == {"bad": "failed", "good": "succeeded"}
    assert {user: each["properties"] for user, each in sandbox.state.snapshot()["users"].items()} == {
        user: {"good": True} for user in ("u1", "u2", "u3")
    }


def test_a_source_that_is_down_fails_alone(start):
    command = start(
        {"Far": GOOD, "Good": GOOD},
        source="shop",
        extra='[sources.shop]\nurl = "postgresql+psycopg://nobody:secret7@127.0.0.1:1/shop"',
    )
    code, said = command("sync")
    assert code == 1
    assert "[sources.shop]" in said
    assert "secret7" not in said
    assert {run["status"] for run in command.document("history")} == {"failed", "succeeded"}


def test_a_database_of_a_newer_version(good, engine, backend):
    schema = "audience_sync." if backend == "postgresql" else ""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {schema}audience_sync_version SET version_num = '9999'")
    code, said = good()("sync")
    assert code == 2
    assert "newer" in said
    assert "Upgrade audience-sync" in said


def test_a_database_that_is_behind(good):
    command = good()
    later = (  # the program as it will be when there is another migration
        "from audience_sync.db import migrate; migrate.HEAD = '9999'; migrate.KNOWN += ('9999',);"
        "from audience_sync.cli import main; main()"
    )
    called = [sys.executable, "-c", later, "--config", str(command.path), "sync"]
    found = subprocess.run(called, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "audience-sync db upgrade" in found.stderr
    assert "Traceback" not in found.stderr
    assert command.document("history") == []


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # PostgreSQL's: the test below
def test_a_disk_without_room_loses_nothing(start, tmp_path, sandbox):
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {})"
    everyone = f"{numbers} SELECT 'u' || i AS user_id FROM n"
    command = start({"All": everyone.format(10)})
    assert command("sync")[0] == 0
    command = start({"All": everyone.format(1_500)})
    room = (tmp_path / "own.db").stat().st_size + 20_000

    def fill_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    code, said = command("sync", preexec_fn=fill_disk)
    assert (code, "check the disk's free space" in said) == (1, True), said
    assert len(sandbox.state.snapshot()["users"]) == 10
    assert command("sync")[0] == 0
    assert len(sandbox.state.snapshot()["users"]) == 1_500
    runs = [(run["status"], run["member_count"]) for run in command.document("history")]
    assert (runs[0], runs[-1]) == (("succeeded", 1_500), ("succeeded", 10))


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_server_without_room_to_sort_loses_nothing(start, url, postgres, sandbox):
    """A test cannot fill the server's disk; its limit on temporary files is as good as a full one."""
    database = sa.make_url(url).database
    everyone = (
        "SELECT 'a long id, so that there is much to sort: ' || i AS user_id FROM generate_series(1, {}) i"
    )
    assert start({"All": everyone.format(10)})("sync")[0] == 0
    command = start({"All": everyone.format(30_000)})
    postgres.run(f"ALTER DATABASE {database} SET temp_file_limit = '64kB'")
    code, said = command("sync")
    assert (code, "temp_file_limit" in said) == (1, True), said
    assert len(sandbox.state.snapshot()["users"]) == 10
    postgres.run(f"ALTER DATABASE {database} RESET temp_file_limit")
    assert command("sync", "--no-deliver")[0] == 0
    runs = [(run["status"], run["member_count"], run["pending_count"]) for run in command.document("history")]
    assert runs == [("succeeded", 30_000, 29_990), ("failed", None, 0), ("succeeded", 10, 0)]


def test_a_key_without_rights_stops_at_once(good, company, sandbox):
    company("INSERT INTO people VALUES (:user)", *[{"user": f"more{number}"} for number in range(57)])
    command = good(identify_per_minute=1_000_000)
    sandbox.faults.add({"path": "/v1/identify", "status": 403, "body": {"error": "not for this app"}})
    code, said = command("sync")
    assert (code, "403" in said) == (1, True), said
    assert [each["status"] for each in command.document("deliveries")] == ["pending"] * 60
    assert len(sandbox.state.requests) <= 8  # those that were in flight together
    assert "not for this app" in command.document("status")["stopped"]["reason"]
    sandbox.faults.clear()
    assert command("deliver")[0] == 0
    assert len(sandbox.state.snapshot()["users"]) == 60


def test_a_wrong_key_loses_nothing(good, sandbox):
    code, said = good(key="wrong")("sync")
    assert code == 1
    assert "api_key" in said
    command = good()
    found = command.document("deliveries")
    assert [each["status"] for each in found] == ["pending"] * 3
    assert command.document("status")["stopped"]
    assert sandbox.state.snapshot()["users"] == {}
    code, said = command("deliver")
    assert code == 0, said
    assert len(sandbox.state.snapshot()["users"]) == 3
    assert command.document("status")["stopped"] is None


def test_moments_that_cannot_be(good):
    command = good()
    code, said = command("sync", "--as-of", "2999-01-01T00:00:00Z")
    assert (code, "in the future" in said) == (2, True), said
    assert command("sync")[0] == 0
    code, said = command("sync", "--as-of", "2020-01-01T00:00:00Z")
    assert (code, "before the last committed run" in said) == (2, True), said
    code, said = command("sync", "--as-of", "yesterday")
    assert (code, "ISO 8601" in said) == (2, True), said


def test_sigterm_while_delivery_is_paced(good, sandbox):
    command = good(identify_per_minute=2)
    process = command.popen("sync")
    until(lambda: sandbox.state.snapshot()["users"])
    process.send_signal(signal.SIGTERM)
    code, said = command.ended(process)
    assert code == 1, said
    statuses = [each["status"] for each in command.document("deliveries")]
    told = len(sandbox.state.snapshot()["users"])
    assert sorted(statuses) == ["accepted"] * told + ["pending"] * (3 - told)
    assert 0 < told < 3
    assert command.document("status")["deliverer"] is None
