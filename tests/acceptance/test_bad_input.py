"""What goes wrong outside of us: the exit code, a message that says what to do, and never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import sqlalchemy as sa

GOOD = "SELECT user_id FROM people"


@pytest.fixture
def start(url, tmp_path, sandbox):
    """Writes the configuration: definitions by name, and what else is said; gives a starter of commands."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE people (user_id text)")
        connection.exec_driver_sql("INSERT INTO people VALUES ('u1'), ('u2'), ('u3')")
    engine.dispose()
    path = tmp_path / "audience_sync.toml"

    def write(definitions=None, extra="", key="sandbox", **destination):
        lines = ["[database]", f'url = "{url}"', "[destination]", f'api_key = "{key}"']
        destination = {"endpoint": sandbox.url, "identify_per_minute": 100_000} | destination
        lines += [f"{name} = {json.dumps(value)}" for name, value in destination.items()]
        lines.append(extra)
        for name, query in (definitions or {"Good": GOOD}).items():
            source = 'source = "shop"' if name == "Far" else ""
            lines += ["[[audiences]]", f'name = "{name}"', f"sql = {json.dumps(query)}", source]
        path.write_text("\n".join(lines), encoding="utf-8")

        def popen(*arguments):
            called = [sys.executable, "-m", "audience_sync", "--config", str(path), *arguments]
            return subprocess.Popen(
                called, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean()
            )

        return popen

    return write


def clean():
    return {
        name: value
        for name, value in os.environ.items()
        if "AUDIENCE_SYNC" not in name and "USERPILOT" not in name
    }


def ended(process):
    """Exit code and all that was said, which is never a traceback."""
    with process:
        out, err = process.communicate(timeout=100)
    assert "Traceback" not in out + err
    return process.returncode, out + err


def document(process):
    with process:
        return json.loads(process.communicate(timeout=100)[0])


def test_no_configuration(tmp_path):
    called = [sys.executable, "-m", "audience_sync", "sync"]
    found = subprocess.run(called, capture_output=True, text=True, cwd=tmp_path, env=clean(), check=False)
    assert found.returncode == 2
    assert "audience-sync init" in found.stderr
    assert "Traceback" not in found.stderr


def test_configuration_that_is_wrong(start):
    code, said = ended(start(identfy_per_minute=5)("sync"))
    assert (code, "did you mean identify_per_minute?" in said) == (2, True), said
    code, said = ended(start(endpoint="https://elsewhere.example/")("sync"))
    assert (code, "allow_custom_endpoint" in said) == (2, True), said


def test_a_missing_key_stops_only_what_sends(start, sandbox):
    popen = start(key="${NO_SUCH_KEY}")
    for command in ("sync", "deliver"):
        code, said = ended(popen(command))
        assert (code, "set the environment variable NO_SUCH_KEY" in said) == (2, True), said
    assert document(popen("history", "--json")) == []
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
    popen = start({"Bad": query, "Good": GOOD})
    code, said = ended(popen("sync"))
    assert code == 1
    assert told in said
    runs = {run["key"]: run["status"] for run in document(popen("history", "--json"))}
    assert runs == {"bad": "failed", "good": "succeeded"}
    assert {user: each["properties"] for user, each in sandbox.state.snapshot()["users"].items()} == {
        user: {"good": True} for user in ("u1", "u2", "u3")
    }


def test_a_source_that_is_down_fails_alone(start):
    popen = start(
        {"Far": GOOD, "Good": GOOD},
        '[sources.shop]\nurl = "postgresql+psycopg://nobody:secret7@127.0.0.1:1/shop"',
    )
    code, said = ended(popen("sync"))
    assert code == 1
    assert "[sources.shop]" in said
    assert "secret7" not in said
    assert {run["status"] for run in document(popen("history", "--json"))} == {"failed", "succeeded"}


def test_a_database_of_a_newer_version(start, engine, backend):
    schema = "audience_sync." if backend == "postgresql" else ""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {schema}audience_sync_version SET version_num = '9999'")
    code, said = ended(start()("sync"))
    assert code == 2
    assert "newer" in said
    assert "Upgrade audience-sync" in said


def test_a_wrong_key_loses_nothing(start, sandbox):
    code, said = ended(start(key="wrong")("sync"))
    assert code == 1
    assert "api_key" in said
    popen = start()
    found = document(popen("deliveries", "--json"))
    assert [each["status"] for each in found] == ["pending"] * 3
    assert document(popen("status", "--json"))["stopped"]
    assert sandbox.state.snapshot()["users"] == {}
    code, said = ended(popen("deliver"))
    assert code == 0, said
    assert len(sandbox.state.snapshot()["users"]) == 3
    assert document(popen("status", "--json"))["stopped"] is None


def test_moments_that_cannot_be(start):
    popen = start()
    code, said = ended(popen("sync", "--as-of", "2999-01-01T00:00:00Z"))
    assert (code, "in the future" in said) == (2, True), said
    assert ended(popen("sync"))[0] == 0
    code, said = ended(popen("sync", "--as-of", "2020-01-01T00:00:00Z"))
    assert (code, "before the last committed run" in said) == (2, True), said
    code, said = ended(popen("sync", "--as-of", "yesterday"))
    assert (code, "ISO 8601" in said) == (2, True), said


@pytest.mark.parametrize("arguments", [("sync", "--hold"), ("sync", "--user", "u1"), ("daemon",)])
def test_what_comes_later_says_so(start, arguments):
    code, said = ended(start()(*arguments))
    assert (code, "not yet" in said) == (2, True), said


def test_sigterm_while_delivery_is_paced(start, sandbox):
    popen = start(identify_per_minute=2)
    process = popen("sync")
    deadline = time.monotonic() + 60
    while not sandbox.state.snapshot()["users"] and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 1, said
    statuses = [each["status"] for each in document(popen("deliveries", "--json"))]
    told = len(sandbox.state.snapshot()["users"])
    assert sorted(statuses) == ["accepted"] * told + ["pending"] * (3 - told)
    assert 0 < told < 3
    assert document(popen("status", "--json"))["deliverer"] is None
