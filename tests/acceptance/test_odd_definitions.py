"""A definition that cannot be computed fails alone, with a message: the others run, and delivery continues."""

import json

import pytest

DEEP = f"SELECT {'(' * 3000}'x'{')' * 3000} AS user_id"
ODD = {
    "Missing": "SELECT user_id FROM missing",
    "Parameter": "SELECT user_id FROM people WHERE user_id = :name",
    "Unclosed": "SELECT 'x AS user_id",
    "Nothing": "-- nothing",
    "Columns": "SELECT user_id, user_id FROM people",
    "Braces": "SELECT {user_id} FROM people",
    "Percent": "SELECT user_id FROM people WHERE user_id LIKE '%s' AND %(x)s",
}
ODD_ON = {
    "sqlite": {
        "Deep": DEEP,
        "Overflow": "SELECT abs(-9223372036854775808) AS user_id",
        "Json": "SELECT json('{') AS user_id",
        "Blob": "SELECT zeroblob(2000000000) || 'x' AS user_id",
        "Dollars": "SELECT $$:z$$ AS user_id",
        "Question": "SELECT ? AS user_id",
        "Ours": "SELECT audience_sync_as_boolean(user_id, 1) AS user_id FROM people",
    },
    "postgresql": {
        "Division": "SELECT 1 / (length(user_id) - 3) AS user_id FROM people",
        "Date": "SELECT to_date(user_id, 'YYYY') AS user_id FROM people",
        "Long": "SELECT repeat('x', 2000000000) AS user_id",
        "Dollar": "SELECT $1 AS user_id",
        "Json": "SELECT ('\"\\u0000\"'::json) #>> '{}' AS user_id",
        "Stack": f"SELECT ('{'[' * 100_000}')::json AS user_id",
        "Nested": "SELECT /* /* */ user_id FROM people",
        "Extension": "SELECT CAST(public.internal_error() AS text) AS user_id",
    },
}
FINE = {
    "sqlite": {
        "Quotes": "SELECT '$$:z$$' AS user_id -- :z",
        "Modulo": "SELECT user_id FROM people WHERE 5 % 3 = 2 AND user_id LIKE '%nn'",
    },
    "postgresql": {
        "Quotes": "SELECT $$:z$$ AS user_id, $a$:z$a$, E'\\':z', '::z'::text, date '2026-01-01'::text -- :z",
        "Modulo": "SELECT user_id FROM people WHERE 5 % 3 = 2 AND user_id LIKE '%nn' AND '{\"a\": 1}'::jsonb ? 'a'",
        "Odd values": "SELECT user_id, date 'infinity', timestamptz '0044-03-15 BC', time '24:00', 'NaN'::numeric, "
        "jsonb '1e400', json '\"\\u0000\"', '\\xff'::bytea FROM people",
        "Moment": "SELECT user_id FROM people WHERE :as_of::date = :today",
        "Deep": DEEP,
    },
}  # fmt: skip


INTERNAL_ERROR = """
CREATE FUNCTION public.internal_error() RETURNS text LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'the geometry is not valid' USING ERRCODE = 'XX000'; END $$
"""


@pytest.fixture
def command(backend, start, company):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES ('ann')")
    if backend == "postgresql":
        company(INTERNAL_ERROR)
    return start(ODD | ODD_ON[backend] | FINE[backend] | {"Good": "SELECT user_id FROM people"})


def keys(definitions):
    return {name.lower().replace(" ", "_") for name in definitions}


def test_sync_runs_the_others_and_delivers(command, backend, sandbox):
    code, output = command("sync")
    assert code == 1
    runs = command.document("history")
    failed = {run["key"]: run["error"] for run in runs if run["status"] == "failed"}
    assert set(failed) == keys(ODD | ODD_ON[backend])
    assert all(error.startswith(f"{key}: ") for key, error in failed.items()), failed
    assert all(error in output for error in failed.values())
    properties = sandbox.state.snapshot()["users"]["ann"]["properties"]
    assert properties["good"] is True
    assert {run["key"] for run in runs if run["status"] == "succeeded"} == keys(FINE[backend]) | {"good"}


def test_plan_shows_the_others(command, backend):
    code, output = command("plan")
    assert code == 1
    assert "good " in output
    code, output = command("plan", "--json")
    document = json.loads("{" + output.split("{", 1)[1].rsplit("}", 1)[0] + "}")
    assert {row["key"] for row in document["errors"]} == keys(ODD | ODD_ON[backend])
    assert {row["key"] for row in document["definitions"]} == keys(FINE[backend]) | {"good"}
    assert command("plan", "good")[0] == 0


def test_check_names_each(command, backend):
    code, output = command("check")
    assert code == 2
    lines = output.splitlines()
    for key in keys(ODD | ODD_ON[backend]):
        assert any(line.startswith(f"wrong  definition {key}: ") for line in lines), key
    for key in keys(FINE[backend]) | {"good"}:
        # The deep one cannot be parsed before it runs, so check gives a warning.
        mark = "warn" if (key, backend) == ("deep", "postgresql") else "ok"
        assert any(line.startswith(f"{mark:6} definition {key}: 1 member") for line in lines), key


@pytest.mark.parametrize(
    "address", ["sqlite:///nowhere/x.db", "sqlite:///x.db?timeout=x", "postgresql://h:1/x?bogus=1"]
)
def test_a_source_that_cannot_be_opened_fails_its_definition_only(start, company, sandbox, address):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES ('ann')")
    audiences = {"Far": "SELECT user_id FROM people", "Good": "SELECT user_id FROM people"}
    command = start(audiences, f'[sources.shop]\nurl = "{address}"', source="shop")
    code, output = command("sync")
    if code == 2 and "sources.shop" in output:
        return  # the configuration says so already
    assert code == 1
    assert sandbox.state.snapshot()["users"]["ann"]["properties"]["good"] is True
    code, output = command("plan")
    assert code == 1
    assert "good" in output
    code, output = command("check")
    assert code == 2
    assert "wrong  source shop: " in output


SETTER = """
CREATE FUNCTION public.change(name text, value text) RETURNS text LANGUAGE plpgsql AS
$$ BEGIN PERFORM set_config(name, value, false); RETURN 'ann'; END $$
"""
SETTINGS = {
    "search_path": "nowhere",
    "statement_timeout": "1h",
    "lock_timeout": "1",
    "timezone": "Asia/Tokyo",
    "datestyle": "German, DMY",
    "standard_conforming_strings": "off",
    "client_encoding": "LATIN1",
    "default_transaction_read_only": "on",
    "session_authorization": "pg_monitor",
    "role": "pg_monitor",
    "extra_float_digits": "3",
    "app.tenant": "7",
}


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.parametrize("source", [None, "shop"])
def test_a_function_that_changes_settings_changes_them_for_its_definition_only(
    start, company, url, sandbox, source
):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES ('ann')")
    company(SETTER)
    good = "SELECT user_id FROM people WHERE '\\' = chr(92) AND CAST(:as_of AS text) LIKE '%+00' "
    good += "AND current_user = session_user AND current_setting('app.tenant', true) IS DISTINCT FROM '7'"
    names = [f"{kind} {name}" for name in SETTINGS for kind in ("Change", "After")]
    queries = [
        query
        for name, value in SETTINGS.items()
        for query in (f"SELECT public.change('{name}', '{value}') AS user_id", good)
    ]
    of_source = f'source = "{source}"\n' if source else ""
    extra = f'[sources.shop]\nurl = "{url}"\n' + "".join(
        f'[[audiences]]\nname = "{name}"\nsql = {json.dumps(query)}\n{of_source}'
        for name, query in zip(names, queries, strict=True)
    )
    command = start({}, extra)
    for _ in range(2):
        command("sync")
        states = {
            run["key"]: (run["status"], run["member_count"]) for run in command.document("history")[::-1]
        }
        for name in SETTINGS:
            key = f"after_{name.replace('.', '_')}"
            assert states[key] == ("succeeded", 1), key
    output = command("plan", "--json")[1]
    document = json.loads("{" + output.split("{", 1)[1].rsplit("}", 1)[0] + "}")
    planned = {row["key"] for row in document["definitions"] if row["member_count"] == 1}
    assert {f"after_{name.replace('.', '_')}" for name in SETTINGS} <= planned
    assert sandbox.state.snapshot()["users"]["ann"]["properties"]["after_role"] is True
