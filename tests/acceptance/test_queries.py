"""Definitions by query from the command line: preview, explain, check, plan and sync, on both databases."""

import json
import subprocess
import sys

import pytest

from audience_sync.db import dialects

CONFIGURATION = """
[tables.orders]
table = "{schema}orders"
user_id = "user_id"
timestamp = "ordered_at"
event = "Order Completed"

[[audiences]]
name = "Recent Buyers"
query = "event('Order Completed').within(30 days).count() >= 1"

[[audiences]]
name = "Good Recent Buyers"
query = "trait('recent_buyers') = true AND trait('total_spend') >= 100"

[[traits]]
name = "Total Spend"
query = "event('Order Completed').sum(property('total'))"

[[traits]]
name = "First Plan"
query = "event('Plan Chosen').first(property('plan'))"
"""


@pytest.fixture
def command(start, company, engine):
    schema = "" if dialects.is_sqlite(engine) else "public."
    company(f"CREATE TABLE {schema}orders (user_id integer, ordered_at timestamp, total real)")
    company(
        f"INSERT INTO {schema}orders VALUES (1, '2026-05-30 10:00:00', 80), (1, '2026-05-01 09:00:00', 20), "
        "(2, '2026-05-31 10:00:00', 99), (3, '2025-01-01 00:00:00', 500)"
    )
    command = start({}, CONFIGURATION.format(schema=schema))
    for user, plan in (("1", "pro"), ("2", "12"), ("3", "true")):
        code, output = command("track", user, "Plan Chosen", "--property", f"plan={plan}", "--no-deliver")
        assert code == 0, output
    return command


def test_queries_are_synced_like_any_other_definition(command, sandbox):
    assert (
        command("sync", "--as-of", "2026-06-01", "total_spend", "recent_buyers", "good_recent_buyers")[0] == 0
    )
    users = sandbox.state.users
    assert {user: users[user]["properties"] for user in users} == {
        "1": {"total_spend": 100, "recent_buyers": True, "good_recent_buyers": True},
        "2": {"total_spend": 99, "recent_buyers": True},
        "3": {"total_spend": 500},
    }
    assert command("sync", "first_plan")[0] == 0
    plans = {user: users[user]["properties"]["first_plan"] for user in users}
    assert plans == {"1": "pro", "2": 12, "3": True}

    (plan,) = command.document("plan", "--as-of", "2026-07-01", "recent_buyers")["definitions"]
    assert (plan["member_count"], plan["exited_sample"]) == (0, ["1", "2"])


def test_a_preview_of_an_audience(command):
    query = "event('Order Completed').within(30 days).sum(property('total')) > 90"
    previewed = command.document("preview", query, "--as-of", "2026-06-01")
    assert previewed["seconds"] >= 0
    del previewed["seconds"]
    assert previewed == {"member_count": 1, "sample": ["2"], "warnings": []}
    assert command("preview", query, "--as-of", "2026-06-01")[1].splitlines()[1:] == ["  2"]


def test_a_preview_of_a_trait(command):
    previewed = command.document("preview", "--trait", "event('Plan Chosen').last(property('plan'))")
    assert previewed["sample"] == {"1": "pro", "2": 12, "3": True}
    assert command("preview", "--trait", "trait('total_spend')")[1].splitlines()[1:] == [
        "  1\t100",
        "  2\t99",
        "  3\t500",
    ]


@pytest.mark.parametrize(
    ("query", "warnings"),
    [
        (
            "event('Order Complete').count() >= 1",
            ["event('Order Complete') was never seen: did you mean Order Completed?"],
        ),
        (
            "event('Refund').count() >= 1",
            [("event('Refund') was never seen: no event has a similar name; to read it from a table of yours, map that "
            "with [tables.NAME]")],
        ),
        (
            "event('Plan Chosen').where(property('plan') > 3).count() >= 1",
            [("property('plan') of event('Plan Chosen') is not a number in 2 of 3 events: "
            "the comparison needs a number")],
        ),
        (
            "event('Order Completed').where(property('totl') > 3).count() >= 1",
            ["property('totl') of event('Order Completed') was never seen: did you mean total?"],
        ),
        ("trait('country') = 'DE'", ["trait('country') was never seen"]),
        ("trait('recent_buyer') = true", ["trait('recent_buyer') was never seen: did you mean recent_buyers?"]),
        (
            "trait('recent_buyers') = 1",
            ["trait('recent_buyers') is an audience, so true or false: the comparison needs a number"],
        ),
        (
            "trait('total_spend') > '30'",
            ["trait('total_spend') is a number in 3 of 3 users: the comparison needs a string"],
        ),
        (
            "trait('first_plan').contains('pro', '1')",
            ["trait('first_plan') is not a string in 2 of 3 users: the comparison needs a string"],
        ),
        (
            "event('Order Completed').within(9000 days).sum(property('total')) >= '30'",
            ["event('Order Completed').sum(property('total')) is a number: the comparison needs a string"],
        ),
        (
            "event('Plan Chosen').count() > event('Plan Chosen').last(property('plan'))",
            [("property('plan') of event('Plan Chosen') is not a number in 2 of 3 events: "
            "the comparison needs a number")],
        ),
        (
            "event('Plan Chosen').unique(property('plan')) = 'pro'",
            ["event('Plan Chosen').unique(property('plan')) is a list: the comparison needs a string"],
        ),
        (
            "event('Order Completed').where(property('total') = true).count() > 0",
            [("property('total') of event('Order Completed') is a number in 4 of 4 events: "
            "the comparison needs a boolean")],
        ),
        (
            "event('Order Completed').where(property('total') > property('totl')).count() > 0",
            ["property('totl') of event('Order Completed') was never seen: did you mean total?"],
        ),
        ("event('Plan Chosen').where(property('plan') = 'true').count() > 0", [
            "property('plan') of event('Plan Chosen') is a number in 1 of 3 events: the comparison needs a string"
        ]),
        ("trait('total_spend') > 30 AND trait('recent_buyers') = 'true'", []),
        ("trait('total_spend') > trait('first_plan')", []),
    ],
)  # fmt: skip
def test_a_preview_warns_of_what_is_probably_a_mistake(command, query, warnings):
    assert command.document("preview", query)["warnings"] == warnings


def test_a_query_comes_from_a_file_or_from_standard_input(command, tmp_path, environ):
    path = tmp_path / "query.txt"
    path.write_text("\ufeffevent('Order Completed').count() >= 1 # everybody\n", encoding="utf-8")
    assert command.document("preview", str(path))["member_count"] == 3
    program = [sys.executable, "-m", "audience_sync", "--config", command.path, "preview", "-", "--json"]
    done = subprocess.run(program, input=path.read_bytes(), stdout=subprocess.PIPE, env=environ, check=True)
    assert json.loads(done.stdout)["member_count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preview", "event('A').count()"], "an audience needs a condition"),
        (["preview", "event('A').cout() > 1"], "unknown function cout: did you mean count?"),
        (["preview", ""], "The query is empty."),
        (["explain", " "], "The query is empty."),
        (
            ["preview", "SELECT user_id FROM orders"],
            "This is SQL, not a query: put it into the configuration",
        ),
        (["preview", "nothing.txt"], "nothing.txt is neither a query nor the key of a definition"),
        (["preview", "recent_buyers"], "recent_buyers is the key of a definition, and preview takes a query"),
        (["preview", "event('A').count()"], "It is a valid query of a trait: add --trait."),
        (["preview", "entity('order').count() > 1"], "entity('order') is not mapped"),
        (["preview", "entity('orders').count() > 1", "--source", "shop"], "There is no [sources.shop]"),
        (["preview", "trait('a') = 1", "--as-of", "2999-01-01"], "is in the future"),
        (["explain", "recent_buyer"], "recent_buyer is neither a query nor the key of a definition"),
    ],
)
def test_a_preview_that_fails_gives_the_reason(command, arguments, message):
    code, output = command(*arguments)
    assert code == 2
    assert message in output


@pytest.mark.parametrize("name", ["preview", "explain"])
@pytest.mark.parametrize(
    "pieces",
    [
        ["event(Order Completed).count() >= 1"],
        ["event(Order", "Completed).count() >= 1"],
        ["event(Order).where(property(total) > 3).count() >= 1"],
        ["trait('a') = 1 AND trait(plan.name) = pro"],
    ],
)
def test_a_query_without_its_quotes_gets_advice_about_the_shell(command, name, pieces):
    code, output = command(name, *pieces)
    assert code == 2
    assert (
        "The shell may have removed quotes: put the whole query into single quotes and its strings" in output
    )
    assert "pass it on standard input, with - in its place." in output
    assert "Usage" not in output


@pytest.mark.parametrize(
    "query", ["event('A').cout() > 1", "property(parent: 'a') = 1", "event().count() > 1"]
)
def test_a_query_with_its_quotes_gets_no_advice_about_the_shell(command, query):
    code, output = command("preview", query)
    assert (code, "shell" in output) == (2, False), output


def test_explain_shows_the_query_the_english_and_the_sql(command, engine):
    explained = command.document("explain", "good_recent_buyers")
    assert explained["query"] == "trait('recent_buyers') = true AND trait('total_spend') >= 100"
    assert explained["english"] == ("Users where recent_buyers is true and total_spend is at least 100.")
    assert explained["sql"].startswith("WITH ")
    assert explained["dialect"] == engine.dialect.name
    code, output = command("explain", "good_recent_buyers")
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[engine.dialect.name]
    parts = [explained["english"], explained["query"], f"The SQL that runs on {name}:", "WITH "]
    assert code == 0
    assert output.startswith("\n\n".join(parts))
    assert "SELECT" in command("explain", "event('A').count() > 1")[1]


def test_explain_shows_the_sql_of_a_definition_in_sql_alone(command):
    text = '[[audiences]]\nname = "Everybody"\nsql = "SELECT \'a\' AS user_id"\n'
    command.path.write_text(command.path.read_text() + text)
    assert command("explain", "everybody") == (0, "SELECT 'a' AS user_id\n")


def test_check_names_what_is_wrong_with_a_query(command):
    code, output = command("check")
    lines = output.splitlines()
    assert code == 0
    assert "ok     definition recent_buyers: 0 members" in lines or any(
        line.startswith("ok     definition recent_buyers: ") for line in lines
    )
    assert lines[-1] == "Everything is ready. `audience-sync plan` shows what a sync would send."
    text = command.path.read_text().replace("property('total')", "property('totals')")
    command.path.write_text(text.replace("'Plan Chosen'", "'Plan Choosen'"))
    code, output = command("check")
    lines = output.splitlines()
    assert (code, [line for line in lines if line.startswith("warn")]) == (0, [
        ("warn   definition total_spend: 0 members, but property('totals') of event('Order Completed') was never seen: "
         "did you mean total?"),
        ("warn   definition first_plan: 0 members, but event('Plan Choosen') was never seen: "
         "did you mean Plan Chosen?"),
    ])  # fmt: skip
    assert not any(line.startswith(("ok     definition total_spend", "wrong")) for line in lines)
    assert lines[-1].startswith("Everything is ready, with 2 warnings. ")
    command.path.write_text(text.replace('user_id = "user_id"', 'user_id = "user"'))
    code, output = command("check")
    assert code == 2
    assert "[tables.orders] user_id: it has no column user: did you mean user_id?" in output
    assert output.splitlines()[-1].startswith("3 checks failed: ")


def test_check_prints_each_warning_of_a_definition(command):
    text = command.path.read_text()
    command.path.write_text(
        text.replace("trait('recent_buyers') = true", "trait('recent') = 1 AND trait('x') = 1")
    )
    lines = command("check")[1].splitlines()
    key = "warn   definition good_recent_buyers: "
    assert [line for line in lines if line.startswith("warn")] == [
        f"{key}0 members, but trait('recent') was never seen: did you mean recent_buyers?",
        f"{key}trait('x') was never seen",
    ]
    assert lines[-1].startswith("Everything is ready, with 2 warnings. ")


def test_check_warns_of_mapped_profiles_that_hide_those_of_calls(command, company, engine):
    schema = "" if dialects.is_sqlite(engine) else "public."
    company(f"CREATE TABLE {schema}customers (id integer, country text)")
    company(f"INSERT INTO {schema}customers VALUES (1, 'DE')")
    mapped = f'[tables.customers]\ntable = "{schema}customers"\nuser_id = "id"\nprofile = true\n'
    command.path.write_text(command.path.read_text() + mapped)
    for user in ("1", "9"):
        assert command("identify", user, "--trait", "plan=pro", "--no-deliver")[0] == 0
    ours = "profiles" if dialects.is_sqlite(engine) else "audience_sync.profiles"
    hidden = (
        "the profiles that calls made are hidden from queries by profile = true of [tables.customers]. "
        f"To read them as well, map a query on our table {ours} with profile = true"
    )
    code, output = command("check")
    assert (code, f"warn   tables: 2 mapped, but {hidden}" in output.splitlines()) == (0, True), output
    assert output.splitlines()[-1].startswith("Everything is ready, with 1 warning. ")
    seen = "trait('plan') was seen in calls, but their profiles are hidden by profile = true of [tables.customers]"
    assert command.document("preview", "trait('plan') = 'pro'")["warnings"] == [seen]

    select = f"SELECT user_id, user_id AS plan FROM {ours}"
    company(f"CREATE VIEW {schema}people AS {select}")
    for table in (f'sql = "{select}"', f'table = "{schema}people"'):
        more = f'[tables.people]\n{table}\nuser_id = "user_id"\nprofile = true\n'
        command.path.write_text(command.path.read_text().partition("[tables.people]")[0] + more)
        assert "ok     tables: 3 mapped" in command("check")[1].splitlines()
        assert command.document("preview", "trait('plan') = '9'")["sample"] == ["9"]


def test_check_does_not_warn_about_profiles_when_no_call_made_one(command, engine):
    with engine.begin() as connection:
        dialects.sql(connection, "DELETE FROM {our}profiles")
    text = command.path.read_text()
    command.path.write_text(text.replace('event = "Order', 'profile = true\nevent = "Order'))
    assert "ok     tables: 1 mapped" in command("check")[1].splitlines()


def test_a_failing_query_does_not_stop_the_others(command):
    text = command.path.read_text().replace('timestamp = "ordered_at"\nevent', 'timestamp = "ordered"\nevent')
    command.path.write_text(text)
    code, output = command("sync", "--no-deliver", "--json")
    assert code == 1
    runs = {run["key"]: run for run in json.loads(output[output.index("{") : output.rindex("}") + 1])["runs"]}
    assert runs["first_plan"]["status"] == "succeeded"
    assert runs["recent_buyers"]["status"] == "failed"
    assert "timestamp: it has no column ordered" in runs["recent_buyers"]["error"]


def test_check_warns_of_a_column_that_a_definition_hides_and_of_times_that_are_none(command):
    text = command.path.read_text()
    hiding = text.replace('event = "Order', 'profile = true\nevent = "Order').replace("Total Spend", "Total")
    command.path.write_text(hiding.replace("trait('total_spend')", "trait('total')"))
    warning = "trait('total') is the definition total here, not the column of [tables.orders]"
    assert command.document("preview", "trait('total') > 1")["warnings"] == [warning]
    command.path.write_text(text.replace('timestamp = "ordered_at"', 'timestamp = "total"'))
    warning = "event('Order Completed') has no row with a user and a time up to now"
    assert warning in command.document("preview", "event('Order Completed').count() > 0")["warnings"]
