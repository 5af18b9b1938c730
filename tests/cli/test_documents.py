"""The JSON that other programs read: one document on standard output, with the names of the contract."""

import datetime as dt
import json
import os
import subprocess
import sys

import pytest
import sqlalchemy as sa

from audience_sync.db import dialects, engines
from audience_sync.queue import destination

RUN = {
    "run_id", "key", "mode", "trigger", "status", "as_of", "started_at", "finished_at", "member_count",
    "entered_count", "exited_count", "changed_count", "set_aside_count", "accepted_count", "pending_count",
    "dead_count", "cancelled_count", "error",
}  # fmt: skip
DELIVERY = {"accepted_count": 0, "dead_count": 0, "pending_count": 0, "request_count": 0}


@pytest.fixture
def program(url, tmp_path, sandbox, forker, monkeypatch):
    """Runs the command line on a database with three people, two of them members. Given SQL, it returns the rows."""
    (tmp_path / "audience_sync.toml").write_text(
        f"""
[database]
url = "{url}"
[destination]
endpoint = "{sandbox.url}"
api_key = "sandbox"
identify_per_minute = 1000000
[[audiences]]
name = "VIPs"
key = "vips"
sql = "SELECT user_id FROM people WHERE spent > 10"
[[traits]]
name = "Spent"
sql = "SELECT user_id, spent AS value FROM people"
"""
    )
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE people (user_id text, spent integer)")
        connection.exec_driver_sql("INSERT INTO people VALUES ('a', 20), ('b', 30), ('c', 5), (NULL, 99)")
    engine.dispose()
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with forker.start(arguments, os.environ, **streams) as process:
            output, errors = process.communicate(timeout=100)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        return output

    def document(*arguments, code=0):
        return json.loads(run(*arguments, "--json", code=code))

    run.document = document
    return run


def test_a_sync_from_plan_to_history(program, sandbox):
    plan = program.document("plan")
    assert plan["delivery"] == {"request_count": 3, "bulk_row_count": 0, "estimated_seconds": 0.0}
    assert plan["definitions"][0] == {
        "key": "vips", "member_count": 2, "entered_count": 2, "exited_count": 0, "changed_count": 0,
        "entered_sample": ["a", "b"], "exited_sample": [], "held_by": None,
    }  # fmt: skip
    assert program.document("history") == []
    synced = program.document("sync")
    assert synced["delivery"] == DELIVERY | {"accepted_count": 5, "request_count": 3}
    assert [run.keys() for run in synced["runs"]] == [RUN, RUN]
    vips = synced["runs"][0]
    assert (vips["key"], vips["mode"], vips["trigger"], vips["status"]) == (
        "vips",
        "first",
        "manual",
        "succeeded",
    )
    assert (vips["member_count"], vips["entered_count"], vips["set_aside_count"]) == (2, 2, 1)
    assert vips["as_of"].endswith("Z")
    assert (vips["accepted_count"], vips["pending_count"], vips["error"]) == (2, 0, None)
    state = sandbox.state.snapshot()["users"]
    assert {user: held["properties"] for user, held in state.items()} == {
        "a": {"vips": True, "spent": 20}, "b": {"vips": True, "spent": 30}, "c": {"spent": 5},
    }  # fmt: skip

    assert [run["run_id"] for run in program.document("history")] == [2, 1]
    assert [run["run_id"] for run in program.document("history", "vips")] == [1]
    assert "vips" in program("history")
    assert "vips" not in program("history", "vips")  # every row would repeat it
    shown = program.document("show", "1")
    assert shown.keys() == RUN | {"set_aside", "held_by", "entered_sample", "exited_sample", "changed_sample"}
    assert (shown["set_aside"], shown["entered_sample"]) == ({"null": 1}, ["a", "b"])

    again = program.document("sync")
    assert [run["mode"] for run in again["runs"]] == ["changes", "changes"]
    assert again["delivery"] == DELIVERY


def test_what_is_not_delivered_is_counted_as_left(program):
    synced = program.document("sync", "--no-deliver")
    assert synced["delivery"] == DELIVERY | {"pending_count": 5}
    assert program.document("deliver") == DELIVERY | {"accepted_count": 5, "request_count": 3}


def test_looking_inside(program):
    assert program("members", "vips") == ""
    program("sync")
    assert program("members", "vips") == "a\nb\n"
    assert program("members", "spent") == "a\t20\nb\t30\nc\t5\n"
    assert program("members", "vips", "--at", "2001-01-01") == ""
    listed = program.document("list")
    assert [(each["key"], each["kind"], each["member_count"], each["state"]) for each in listed] == [
        ("vips", "audience", 2, "enabled"), ("spent", "trait", 3, "enabled"),
    ]  # fmt: skip
    assert listed[0].keys() == {"key", "name", "kind", "member_count", "last_run", "next_slot_at", "state"}
    user = program.document("user", "a")
    assert user.keys() == {"user_id", "memberships", "deliveries", "profile"}
    assert {each["key"]: (each["value"], each["to"]) for each in user["memberships"]} == {
        "vips": (True, None), "spent": (20, None),
    }  # fmt: skip
    assert [(each["body"], each["status"], each["status_code"]) for each in user["deliveries"]] == [
        ({"spent": 20}, "accepted", 202), ({"vips": True}, "accepted", 202),
    ]  # fmt: skip
    assert program.document("deliveries", "--status", "dead") == []
    status = program.document("status")
    assert (status["stopped"], status["pending_count"], status["dead_count"]) == (None, 0, 0)


def test_calls_from_the_command_line(program, sandbox):
    program("identify", "a", "--trait", "plan=pro", "--trait", "seats=3", "--trait", 'code="12"')
    program("track", "a", "Order Completed", "--property", "total=12.5")
    program("group", "a", "acme", "--trait", "size=40")
    held = sandbox.state.snapshot()
    assert held["users"]["a"]["properties"] == {"plan": "pro", "seats": 3, "code": "12"}
    assert held["companies"]["acme"] == {"properties": {"size": 40}}
    assert [call["type"] for call in program.document("calls")] == ["group", "track", "identify"]
    assert program.document("user", "a")["profile"]["company_id"] == "acme"


def test_a_full_sync_sends_false_to_those_who_left(program, sandbox, url):
    program("sync")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE people SET spent = 1 WHERE user_id = 'a'")
    engine.dispose()
    program("sync", "vips")
    assert sandbox.state.snapshot()["users"]["a"]["properties"]["vips"] is False
    run = program.document("sync", "vips", "--full")["runs"][0]
    assert (run["mode"], run["entered_count"], run["accepted_count"]) == ("full", 0, 2)


@pytest.mark.parametrize("arguments", [["--help"], ["sync", "--help"], ["db", "--help"], ["--version"]])
def test_help_loads_neither_database_nor_network(arguments):
    script = (
        "import sys\nfrom audience_sync.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('sqlalchemy', 'httpx', 'alembic', 'sqlglot', 'rich.table') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_sync_of_plain_queries_that_sends_nothing_loads_no_more_than_it_needs(program, tmp_path):
    program("sync")
    script = (
        "import sys\nfrom audience_sync.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('httpx', 'alembic', 'sqlglot', 'apscheduler', 'lark', 'rich', 'uvicorn', 'starlette')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "sync", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_key_stays_as_it_was_stored_at_first_use(program, url):
    program("sync")
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:  # as an earlier release derived it
        dialects.sql(connection, "UPDATE {our}definitions SET key = 'spent_in_all' WHERE key = 'spent'")
    engine.dispose()
    synced = program.document("sync")
    assert [(run["key"], run["mode"]) for run in synced["runs"]] == [
        ("vips", "changes"), ("spent_in_all", "changes"),
    ]  # fmt: skip
    assert [each["key"] for each in program.document("list")] == ["vips", "spent_in_all"]


def test_check_says_whether_any_key_was_synced(program):
    assert "ok     keys: none was synced yet" in program("check")
    program("sync", "vips")
    assert "ok     keys: every key that was synced is configured or retired" in program("check")


def test_a_name_that_no_longer_gives_a_key_keeps_the_stored_one(program, url, tmp_path):
    program("sync")
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:  # an earlier release left out the Cyrillic letters
        dialects.sql(connection, "UPDATE {our}definitions SET name = 'Spent (всего)' WHERE key = 'spent'")
    engine.dispose()
    path = tmp_path / "audience_sync.toml"
    path.write_text(path.read_text().replace('"Spent"', '"Spent (всего)"'), encoding="utf-8")
    assert [run["key"] for run in program.document("sync")["runs"]] == ["vips", "spent"]
    assert "definition spent" in program("check")
    (tmp_path / "calls.ndjson").write_text(
        '{"type": "identify", "userId": "a", "traits": {"spent": 1, "plan": "pro"}}\n' * 2
    )
    program("import", "calls.ndjson")
    assert [call["left_out"] for call in program.document("calls")] == [{"spent": 1}]
    path.write_text(path.read_text().replace('"Spent (всего)"', '"Spent (кроме)"'), encoding="utf-8")
    for command in ("sync", "status", "list"):
        program(command, code=2)
    assert "к cannot be written with a to z. Set a key, for example key = " in program("check", code=2)


def test_duplicates_that_an_earlier_release_stored_are_not_set_aside(program, url):
    program("sync", "vips")
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:
        dialects.sql(connection, """UPDATE {our}runs SET set_aside = '{"duplicate": 2, "null": 1}'""")
    engine.dispose()
    [run] = program.document("history")
    assert run["set_aside_count"] == 1
    assert program.document("show", "1")["set_aside"] == {"null": 1}
    assert "duplicate" not in program("show", "1")


def test_a_sync_that_collapses_duplicates_says_nothing_of_rows(program, url):
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM people WHERE user_id IS NULL")
        connection.exec_driver_sql("INSERT INTO people VALUES ('a', 20)")
    engine.dispose()
    output = program("sync", "vips")
    assert "row" not in output
    assert "Deliveries: 2 accepted, 0 still pending (2 requests to Userpilot)." in output


def test_a_failed_run_needs_attention_until_one_succeeds(program, url):
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE people RENAME TO persons")
    program("sync", "vips", code=1)
    [failed] = program.document("status")["failed_runs"]
    assert (failed["run_id"], failed["key"], failed["status"]) == (1, "vips", "failed")
    assert "- The last run of vips (1) failed." in program("status")
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE persons RENAME TO people")
    engine.dispose()
    program("sync", "vips")
    assert program("status").startswith("Nothing needs attention.\n")


def test_a_failing_lane_and_a_changed_destination_need_attention(program, url, tmp_path):
    program("sync", "vips", "--no-deliver")
    until = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=10)
    slow = {
        "factor": 1.0,
        "paused_until": until.isoformat(),
        "reason": "Connection refused",
        "pause_level": 9,
    }
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:
        destination.set_slow_downs(connection, {"identify": slow})
    engine.dispose()
    configuration = tmp_path / "audience_sync.toml"
    configuration.write_text(configuration.read_text().replace('"sandbox"', '"another"'))
    _, changed, failing, *_ = program("status").splitlines()
    assert changed.startswith("- The members of vips were made for another destination than the one that is")
    assert "`audience-sync sync vips --full`" in changed
    assert failing == (
        f"- The lane identify pauses until {until:%Y-%m-%d %H:%M:%S} UTC: Connection refused. `audience-sync deliver` "
        "tries again. Check [destination] endpoint and the network."
    )


def test_a_paused_reader_of_members_blocks_no_writer(program, url, tmp_path):
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM people")
        many = [
            {"user": f"a-user-with-a-long-id-{number:06}"} for number in range(9_000)
        ]  # more than a pipe holds
        connection.execute(sa.text("INSERT INTO people VALUES (:user, 20)"), many)
    program("sync", "vips", "--no-deliver")
    command = [sys.executable, "-m", "audience_sync", "members", "vips"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as paused:
        first = paused.stdout.readline()
        with engine.begin() as connection:  # waits for a lock for five seconds at most
            connection.exec_driver_sql("DELETE FROM people WHERE user_id > 'a-user-with-a-long-id-005000'")
        program("sync", "vips", "--no-deliver")
        users = [line.strip() for line in (first, *paused.stdout)]
    engine.dispose()
    assert users == [row["user"] for row in many]  # as of the run that was the last one when it began
    assert program("members", "vips").split() == users[:5_001]
