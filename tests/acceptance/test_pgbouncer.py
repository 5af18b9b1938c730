"""The command line through PgBouncer, for our own database and a source, in both pool modes."""

import json

import pytest
import sqlalchemy as sa

from tests.acceptance.conftest import Command
from tests.db.pgbouncer import pgbouncer

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i)::text AS user_id FROM n"
WRITING = "SELECT nextval_of_numbers() AS user_id"
DEFINITIONS = """
[[audiences]]
name = "Own"
sql = "SELECT user_id FROM people WHERE joined_on <= :as_of"
ready_sql = "SELECT count(*) > 0 FROM people"
eligible_sql = "SELECT 'u' || i AS user_id FROM generate_series(1, 1000) i"
[[audiences]]
name = "Far"
source = "shop"
sql = "SELECT user_id FROM people"
[[traits]]
name = "Spend"
sql = "SELECT user_id, total AS value FROM people"
[[audiences]]
name = "Events"
sql = "SELECT DISTINCT user_id FROM audience_sync.events"
"""
PEOPLE = (
    "CREATE TABLE people (user_id text, total numeric, joined_on date)",
    "INSERT INTO people SELECT 'u' || i, i, date '2020-01-01' FROM generate_series(1, 200) i",
    "CREATE SEQUENCE numbers",
    "CREATE FUNCTION nextval_of_numbers() RETURNS text LANGUAGE sql AS $$ SELECT nextval('numbers')::text $$",
)


def run_statements(url, *statements):
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        results = [connection.exec_driver_sql(statement) for statement in statements]
        rows = results[-1].all() if results[-1].returns_rows else []
    engine.dispose()
    return rows


@pytest.fixture(params=["session", "transaction"])
def pooled(request, postgres):
    """URLs of a database with people: a function that gives the direct one, or the one through PgBouncer."""
    names = {name: postgres.create() for name in ("own", "shop")}
    for name in names.values():
        run_statements(postgres.url(name), *PEOPLE)
    with pgbouncer(postgres.base, request.param) as through:
        yield lambda name, direct=False: (postgres.url if direct else through)(names[name])


@pytest.fixture
def start(tmp_path, sandbox, forker, pooled):
    def write(definitions):
        path = tmp_path / "audience_sync.toml"
        path.write_text(
            f'[database]\nurl = "{pooled("own")}"\n[sources.shop]\nurl = "{pooled("shop")}"\n[destination]\n'
            f'api_key = "sandbox"\nendpoint = "{sandbox.url}"\nidentify_per_minute = 100000\npresets = false\n'
            f"{definitions}"
        )
        return Command(path, forker)

    return write


def runs(command):
    """The newest run of each key."""
    newest_last = reversed(command.document("history"))
    return {run["key"]: (run["status"], run["member_count"]) for run in newest_last}


def test_everything_works_through_pgbouncer(start, pooled, sandbox, tmp_path):
    command = start(DEFINITIONS)
    code, output = command("check")
    assert code == 0, output
    assert "ok     database: PostgreSQL through a connection pooler, schema audience_sync" in output
    calls = [
        {"type": "track", "userId": f"u{number}", "event": "Seen", "messageId": f"m{number}"}
        for number in range(1_500)  # enough for COPY
    ]
    (tmp_path / "calls.ndjson").write_text("\n".join(map(json.dumps, calls)))
    code, output = command("import", str(tmp_path / "calls.ndjson"))
    assert code == 0, output
    processes = [command.popen("sync", key, "--no-deliver") for key in ("own", "far", "spend", "events")]
    for process in processes:  # at the same time, so that PgBouncer gives each transaction another connection
        code, output = command.ended(process)
        assert code == 0, output
    assert runs(command) == {
        "own": ("succeeded", 200),
        "far": ("succeeded", 200),
        "spend": ("succeeded", 200),
        "events": ("succeeded", 1_500),
    }
    run_statements(pooled("own", direct=True), "DELETE FROM people WHERE total > 150")
    for arguments in (
        ["plan"],
        ["sync", "own", "--hold", "--no-deliver"],
        ["sync", "--no-deliver"],
        ["forget", "u3"],
        ["status"],
    ):
        code, output = command(*arguments)
        assert code in {0, 3}, output
    assert len(command("members", "own")[1].split()) == 149
    assert runs(command)["own"] == ("succeeded", 150)
    code, output = command("deliver")
    assert code == 0, output
    users = sandbox.state.snapshot()["users"]
    assert users["u1"]["properties"] == {"own": True, "far": True, "spend": 1, "events": True}
    code, output = command("retire", "far")
    assert code == 0, output
    assert command("user", "u1")[0] == 0
    assert command("db", "downgrade", "0001")[0] == 0
    assert command("db", "upgrade")[0] == 0


def test_a_definition_through_pgbouncer_is_stopped_in_time_and_only_reads(start, pooled):
    own = f'[[audiences]]\nname = "Own"\ntimeout = "1 second"\nsql = "{ENDLESS}"\n'
    far = own.replace("Own", "Far") + 'source = "shop"\n'
    writing = f'[[audiences]]\nname = "Writing"\nsql = "{WRITING}"\n'
    command = start(own + far + writing + writing.replace("Writing", "Far writing") + 'source = "shop"\n')
    assert command("sync")[0] == 1
    errors = {run["key"]: run["error"] for run in command.document("history")}
    assert "its SQL ran longer than 1 seconds" in errors["own"]
    assert "its SQL ran longer than 1 seconds" in errors["far"]
    assert "read-only transaction" in errors["writing"]
    assert "read-only transaction" in errors["far_writing"]
    assert command("plan")[0] in {1, 2}
    assert command("check")[0] == 2
    for name in ("own", "shop"):
        [row] = run_statements(pooled(name, direct=True), "SELECT is_called FROM numbers")
        assert row.is_called is False
