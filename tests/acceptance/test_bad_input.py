"""Mistakes and faults outside the program: the exit code, a message with a remedy, never a traceback."""

import resource
import signal
import subprocess
import sys

import pytest
import sqlalchemy as sa

from tests.waiting import until

NAMING = (["forget"], ["user"], ["members"], ["history"], ["retire"], ["sync", "good", "--user"])
GOOD = "SELECT user_id FROM people"


@pytest.fixture(autouse=True)
def people(company):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES ('u1'), ('u2'), ('u3')")


@pytest.fixture
def good(start):
    """A correct configuration, apart from the changes passed to it."""
    return lambda **output: start({"Good": GOOD}, **output)


def test_no_configuration(tmp_path, environ):
    called = [sys.executable, "-m", "audience_sync", "sync"]
    process = subprocess.run(called, capture_output=True, text=True, cwd=tmp_path, env=environ, check=False)
    assert process.returncode == 2
    assert "audience-sync init" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_wrong_command_line(good, sandbox):
    command = good()
    for arguments, message in (
        (("sync", "--config", "x.toml"), "No such option: --config. It goes before the command: "),
        (("db", "current", "--config=x.toml"), "No such option: --config. It goes before the command: "),
        (
            ("sync", "--dry-run"),
            "No such option: --dry-run. `audience-sync plan` shows what a sync would change.",
        ),
        (("forget", ""), "a user id is never empty."),
        (("forget", "\u3000", "--allow-return"), "a user id is never only white space."),
        (("user", " "), "a user id is never only white space."),
        (("sync", "good", "--user", "u1", "--user", "\u200b"), "a user id is never only white space."),
        *(((*each, "K\udcf6ln"), "it is not valid UTF-8.") for each in NAMING),
        (("show", "good"), "good is not the number of a run: `audience-sync history` lists them."),
    ):
        code, output = command(*arguments)
        assert (code, message in output) == (2, True), output
    port = sandbox.url.strip("/").rsplit(":")[-1]
    code, output = command("sandbox", "--port", port)
    assert code == 2
    assert output.startswith(f"audience-sync: Port {port} cannot be used: "), output


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_configuration_that_exists_is_not_replaced(good, tmp_path):
    command = good()
    assert command("init", str(tmp_path / "new"))[0] == 0
    path = tmp_path / "new" / "config" / "audience_sync.toml"
    path.write_text("# mine")
    code, output = command("init", str(tmp_path / "new"))
    assert code == 2
    assert f"{path} exists already and was not changed: edit it, or name another folder" in output
    assert path.read_text() == "# mine"


def test_a_wrong_configuration(good):
    code, output = good(identfy_per_minute=5)("sync")
    assert (code, "did you mean identify_per_minute?" in output) == (2, True), output
    code, output = good(endpoint="https://elsewhere.example/")("sync")
    assert (code, "allow_custom_endpoint" in output) == (2, True), output


def test_a_missing_key_stops_only_what_sends(good, sandbox):
    command = good(key="${NO_SUCH_KEY}")
    for name in ("sync", "deliver"):
        code, output = command(name)
        assert (code, "set the environment variable NO_SUCH_KEY" in output) == (2, True), output
    assert command.document("history") == []
    assert sandbox.state.requests == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT user_id FROM peopel", "peopel"),
        ("SELECT user_id FROM people WHERE (", "more ( than it closes"),
        ("DELETE FROM people RETURNING user_id", "SELECT"),
        ("SELECT user_id FROM people; DELETE FROM people", "exactly one query"),
        ("SELECT user_id AS person FROM people", "user_id"),
    ],
)
def test_a_bad_definition_fails_alone(start, sandbox, query, message):
    command = start({"Bad": query, "Good": GOOD})
    code, output = command("sync")
    assert code == 1
    assert message in output
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
    code, output = command("sync")
    assert code == 1
    assert "[sources.shop]" in output
    assert "secret7" not in output
    assert {run["status"] for run in command.document("history")} == {"failed", "succeeded"}


def test_a_database_of_a_newer_version(good, engine, backend):
    schema = "audience_sync." if backend == "postgresql" else ""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {schema}audience_sync_version SET version_num = '9999'")
    code, output = good()("sync")
    assert code == 2
    assert "newer" in output
    assert "Upgrade audience-sync" in output


def test_a_database_that_is_behind(good):
    command = good()
    later = (  # a version of the program with another migration
        "from audience_sync.db import migrate; migrate.HEAD = '9999'; migrate.KNOWN += ('9999',);"
        "from audience_sync.cli import main; main()"
    )
    called = [sys.executable, "-c", later, "--config", str(command.path), "sync"]
    process = subprocess.run(called, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "audience-sync db upgrade" in process.stderr
    assert "Traceback" not in process.stderr
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

    code, output = command("sync", preexec_fn=fill_disk)
    assert (code, "check the disk's free space" in output) == (1, True), output
    assert len(sandbox.state.snapshot()["users"]) == 10
    assert command("sync")[0] == 0
    assert len(sandbox.state.snapshot()["users"]) == 1_500
    runs = [(run["status"], run["member_count"]) for run in command.document("history")]
    assert (runs[0], runs[-1]) == (("succeeded", 1_500), ("succeeded", 10))


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_server_without_room_to_sort_loses_nothing(start, url, postgres, sandbox):
    """The limit on temporary files replaces a full disk, which a test cannot cause."""
    database = sa.make_url(url).database
    everyone = (
        "SELECT 'a long id, so that there is much to sort: ' || i AS user_id FROM generate_series(1, {}) i"
    )
    assert start({"All": everyone.format(10)})("sync")[0] == 0
    command = start({"All": everyone.format(30_000)})
    postgres.run(f"ALTER DATABASE {database} SET temp_file_limit = '64kB'")
    code, output = command("sync")
    assert (code, "temp_file_limit" in output) == (1, True), output
    assert len(sandbox.state.snapshot()["users"]) == 10
    postgres.run(f"ALTER DATABASE {database} RESET temp_file_limit")
    assert command("sync", "--no-deliver")[0] == 0
    runs = [(run["status"], run["member_count"], run["pending_count"]) for run in command.document("history")]
    assert runs == [("succeeded", 30_000, 29_990), ("failed", None, 0), ("succeeded", 10, 0)]


def test_a_key_without_rights_stops_at_once(good, company, sandbox):
    company("INSERT INTO people VALUES (:user)", *[{"user": f"more{number}"} for number in range(57)])
    command = good(identify_per_minute=1_000_000)
    sandbox.faults.add({"path": "/v1/*", "status": 403, "body": {"error": "not for this app"}})
    code, output = command("sync")
    assert (code, "403" in output) == (1, True), output
    assert [each["status"] for each in command.document("deliveries")] == ["pending"] * 60
    assert len(sandbox.state.requests) <= 32 + 1  # those that were in flight together, and one about the key
    assert "not for this app" in command.document("status")["stopped"]["reason"]
    sandbox.faults.clear()
    assert command("deliver")[0] == 0
    assert len(sandbox.state.snapshot()["users"]) == 60


def test_a_wrong_key_loses_nothing(good, sandbox):
    code, output = good(key="wrong")("sync")
    assert code == 1
    assert "Userpilot refused the API key (HTTP 401: unauthorized: " in output
    assert "api_key" in output
    command = good()
    deliveries = command.document("deliveries")
    assert [delivery["status"] for delivery in deliveries] == ["pending"] * 3
    assert command.document("status")["stopped"]
    assert sandbox.state.snapshot()["users"] == {}
    code, output = command("deliver")
    assert code == 0, output
    assert len(sandbox.state.snapshot()["users"]) == 3
    assert command.document("status")["stopped"] is None


def test_invalid_moments(good):
    command = good()
    code, output = command("sync", "--as-of", "2999-01-01T00:00:00Z")
    assert (code, "in the future" in output) == (2, True), output
    assert command("sync")[0] == 0
    code, output = command("sync", "--as-of", "2020-01-01T00:00:00Z")
    assert (code, "before the last committed run" in output) == (2, True), output
    code, output = command("sync", "--as-of", "yesterday")
    assert (code, "ISO 8601" in output) == (2, True), output


def test_sigterm_while_delivery_is_paced(good, sandbox):
    command = good(identify_per_minute=2)
    process = command.popen("sync")
    until(lambda: sandbox.state.snapshot()["users"])
    process.send_signal(signal.SIGTERM)
    code, output = command.ended(process)
    assert code == 1, output
    statuses = [each["status"] for each in command.document("deliveries")]
    accepted_count = len(sandbox.state.snapshot()["users"])
    assert sorted(statuses) == ["accepted"] * accepted_count + ["pending"] * (3 - accepted_count)
    assert 0 < accepted_count < 3
    assert command.document("status")["deliverer"] is None
