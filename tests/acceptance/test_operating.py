"""An operator's tasks: hold, approve, reject, canary, change the destination, retire, forget, restore."""

import csv
import datetime as dt
import gzip
import json
import shutil
from collections import Counter

import pytest
import sqlalchemy as sa

from audience_sync.sandbox import Limits, Sandbox
from tests.audiences.query.test_real_orders import AUDIENCES

GOOD = "SELECT user_id FROM people"
HIGH = "high_value_customers"
COLUMNS = {"sqlite": "ordered_on text, total_gbp real", "postgresql": "ordered_on date, total_gbp numeric"}


def documents(command, *calls):
    """Exit code and JSON document of each command; they run at the same time."""
    processes = [command.popen(*arguments, "--json") for arguments in calls]
    results = []
    for process in processes:
        with process:
            out, err = process.communicate(timeout=100)
        assert "Traceback" not in err
        assert out, err
        results.append((process.returncode, json.loads(out)))
    return results


def ended(command, *calls):
    """Exit code and output of each command; they run at the same time."""
    return [command.ended(process) for process in [command.popen(*arguments) for arguments in calls]]


def sync(command, *arguments):
    """Exit code and run of a sync of one definition."""
    [(code, done)] = documents(command, ("sync", *arguments))
    [run] = done["runs"]
    return code, run


def counts(run):
    return tuple(run[f"{name}_count"] for name in ("member", "entered", "exited", "accepted"))


def sent(sandbox, after=0):
    """(user, properties) of every Identify, sorted by user."""
    entries = sandbox.state.requests[after:]
    return sorted(
        ((each.body["user_id"], each.body["metadata"]) for each in entries if each.path == "/v1/identify"),
        key=str,
    )


def audience(sandbox, key):
    """The audience at Userpilot: each user's value."""
    users = sandbox.state.snapshot()["users"]
    return {user: each["properties"][key] for user, each in users.items() if key in each["properties"]}


@pytest.fixture
def people(url):
    """Writes the table that the audience is computed from, and leaves no connection open."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    def write(*users):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS people (user_id text)")
            connection.exec_driver_sql("DELETE FROM people")
            rows = [{"user": user} for user in users]
            connection.execute(sa.text("INSERT INTO people VALUES (:user)"), rows)

    return write


@pytest.fixture
def good(start):
    """A configuration with one audience, and further lines."""
    return lambda **output: start({"Good": GOOD}, **output)


@pytest.fixture(scope="module")
def orders(request):
    """(user id, day, pence) of each real order up to June 2011."""
    path = request.config.rootpath / "audience_sync" / "demo_data" / "orders.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [
            (row["user_id"], dt.date.fromisoformat(row["ordered_on"]), round(float(row["total_gbp"]) * 100))
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row[1] <= dt.date(2011, 6, 30)]


@pytest.fixture
def shop(company, backend, orders):
    """The company's table of orders, with a copy from which it can be repaired."""
    company(f"CREATE TABLE orders (number integer, user_id text, {COLUMNS[backend]})")
    day = "CAST(:day AS date)" if backend == "postgresql" else ":day"
    rows = [
        {"number": number, "user": user, "day": str(ordered_on), "gbp": pence / 100}
        for number, (user, ordered_on, pence) in enumerate(orders)
    ]
    company(f"INSERT INTO orders VALUES (:number, :user, {day}, :gbp)", *rows)
    company("CREATE TABLE kept_orders AS SELECT * FROM orders")
    return company


@pytest.fixture
def high_value(start, backend):
    """A configuration with the demo's audience of that name; on PostgreSQL with its expression for a day."""
    _, query = AUDIENCES["High Value Customers"]
    if backend == "postgresql":
        query = query.replace("date(:as_of)", "CAST(:as_of AS date)")
    return start({"High Value Customers": query})


def expected(orders, day):
    """High value customers at the start of a day of June 2011."""
    spent = Counter()
    for user, ordered_on, pence in orders:
        if ordered_on <= dt.date(2011, 6, day):
            spent[user] += pence
    return {user for user, pence in spent.items() if pence >= 200_000}


def on(day):
    return "--as-of", f"2011-06-{day:02}T00:00:00Z"


def mend(shop):
    shop("DELETE FROM orders")
    shop("INSERT INTO orders SELECT * FROM kept_orders")


def held_by_guard(command, sandbox, day, before, now, why):
    """Check that a sync to `now` is held, sends nothing and gives a reason; return its run id."""
    seen = len(sandbox.state.requests)
    entered, exited = now - before, before - now
    code, run = sync(command, *on(day))
    assert (code, run["status"]) == (3, "held")
    assert counts(run) == (len(now), len(entered), len(exited), 0)
    assert run["pending_count"] == len(entered) + len(exited)
    (_, shown), (_, status) = documents(command, ("show", str(run["run_id"])), ("status",))
    reason = f"The guard holds it: {why}."
    assert (shown["held_by"], shown["error"]) == ("guard", reason)
    assert (shown["entered_sample"], shown["exited_sample"]) == (sorted(entered)[:5], sorted(exited)[:5])
    named = {"run_id": run["run_id"], "key": HIGH, "held_by": "guard", "reason": reason}
    assert status["held_runs"] == [named]
    assert f"0 accepted, {run['pending_count']} held, 0 dead" in command("show", str(run["run_id"]))[1]
    assert len(sandbox.state.requests) == seen
    return str(run["run_id"])


def test_the_guard_on_real_orders(orders, shop, high_value, sandbox):
    command, day = high_value, {number: expected(orders, number) for number in (1, 2, 3, 6)}
    assert [len(members) for members in day.values()] == [305, 307, 309, 310]
    assert sync(command, *on(1))[0] == 0
    assert audience(sandbox, HIGH) == dict.fromkeys(day[1], True)

    shop("DELETE FROM orders WHERE (number & 1) = 1")
    half = expected(orders[::2], 2)
    left = f"{len(day[1] - half)} of 305 members would leave, and max_exit_ratio is 0.5"
    held_by_guard(command, sandbox, 2, day[1], half, left)
    mend(shop)
    code, run = sync(command, *on(2))
    assert (code, run["status"], counts(run)) == (0, "succeeded", (307, 2, 0, 2))
    assert audience(sandbox, HIGH) == dict.fromkeys(day[2], True)

    shop("DELETE FROM orders")
    empty = "the snapshot is empty, and max_exit_ratio is 0.5"
    run_id = held_by_guard(command, sandbox, 3, day[2], set(), empty)
    assert command("reject", run_id)[0] == 0
    mend(shop)
    code, run = sync(command, *on(3))
    assert (code, run["status"], counts(run)) == (0, "succeeded", (309, 2, 0, 2))
    assert audience(sandbox, HIGH) == dict.fromkeys(day[3], True)

    shop("INSERT INTO orders SELECT number, 'copy of ' || user_id, ordered_on, total_gbp FROM orders")
    doubled = day[6] | {f"copy of {user}" for user in day[6]}
    more = "311 users would enter an audience of 309 members, and max_enter_ratio is 1"
    run_id = held_by_guard(command, sandbox, 6, day[3], doubled, more)
    seen = len(sandbox.state.requests)
    assert command("approve", run_id)[0] == 0
    assert len(sandbox.state.requests) == seen
    (code, _), (_, runs) = documents(command, ("deliver",), ("history",))
    assert code == 0
    assert sent(sandbox, seen) == [(user, {HIGH: True}) for user in sorted(doubled - day[3])]
    assert audience(sandbox, HIGH) == dict.fromkeys(doubled, True)

    assert [(run["status"], run["member_count"], run["error"]) for run in runs] == [
        ("succeeded", 620, None),
        ("succeeded", 309, None),
        ("rejected", 0, "It was rejected by hand."),
        ("succeeded", 307, None),
        ("rejected", len(half), "Replaced by run 3."),
        ("succeeded", 305, None),
    ]


def test_a_held_run_is_applied_as_it_was_computed(good, people, sandbox):
    command = good()
    people("ann", "bob", "cid")
    assert sync(command)[0] == 0
    people("ann", "dan", "eve")
    code, run = sync(command, "--hold")
    assert (code, run["status"], counts(run)) == (3, "held", (3, 2, 2, 0))
    people("ann", "zoe")
    assert command("approve", "2")[0] == 0
    assert len(sandbox.state.requests) == 3
    assert command("deliver")[0] == 0
    assert sent(sandbox, 3) == [
        ("bob", {"good": False}),
        ("cid", {"good": False}),
        ("dan", {"good": True}),
        ("eve", {"good": True}),
    ]
    (code, output), (unknown, said_of_unknown) = ended(command, ("approve", "2"), ("approve", "99"))
    assert (code, "Run 2 is not held: its status is succeeded" in output) == (2, True), output
    assert (unknown, "There is no run 99" in said_of_unknown) == (2, True), said_of_unknown
    assert len(sandbox.state.requests) == 7


def test_a_held_run_cannot_be_approved_after_another_commit(good, people, sandbox):
    command = good()
    people("ann", "bob")
    assert sync(command, "--hold")[0] == 3
    assert sync(command, "good", "--user", "ann")[0] == 0
    code, output = command("approve", "1")
    assert sent(sandbox) == [("ann", {"good": True})]
    assert "`audience-sync sync good --hold` again" in output
    assert code == 1


def test_a_canary_sends_only_its_users(good, people, sandbox):
    command = good()
    people("u1", "u2", "u3", "u4", "u5")
    code, run = sync(command, "good", "--user", "u1", "--user", "u2")
    assert (code, run["mode"], counts(run)) == (0, "canary", (2, 2, 0, 2))
    assert sent(sandbox) == [("u1", {"good": True}), ("u2", {"good": True})]

    without_key = command.popen("sync", "--user", "u1")
    planned = command.document("plan")
    code, output = command.ended(without_key)
    assert (code, "audience-sync sync KEY --user USER_ID" in output) == (2, True), output
    assert planned["delivery"]["request_count"] == 3
    assert planned["definitions"] == [
        {
            "key": "good",
            "member_count": 5,
            "entered_count": 3,
            "exited_count": 0,
            "changed_count": 0,
            "entered_sample": ["u3", "u4", "u5"],
            "exited_sample": [],
            "held_by": None,
        }
    ]

    code, run = sync(command)
    assert (code, run["mode"], counts(run)) == (0, "first", (5, 3, 0, 3))
    assert sent(sandbox, 2) == [("u3", {"good": True}), ("u4", {"good": True}), ("u5", {"good": True})]

    people("u1", "u3", "u4", "u5", "u6")
    code, run = sync(command, "good", "--user", "u1", "--user", "u2", "--full")
    assert (code, run["mode"], counts(run)) == (0, "canary", (4, 0, 1, 2))
    assert sent(sandbox, 5) == [("u1", {"good": True}), ("u2", {"good": False})]

    assert [(run["mode"], *counts(run)) for run in command.document("history")] == [
        ("canary", 4, 0, 1, 2),
        ("first", 5, 3, 0, 3),
        ("canary", 2, 2, 0, 2),
    ]


def test_another_key_holds_all_until_it_is_accepted(good, people, sandbox):
    people("ann", "bob")
    assert sync(good())[0] == 0
    people("ann", "bob", "cid")
    assert sync(good(), "--no-deliver")[0] == 0
    people("bob", "cid", "dan")
    sandbox.state.api_key = "rotated"
    command = good(key="rotated")
    code, run = sync(command)
    assert (code, run["status"], counts(run)) == (3, "held", (3, 1, 1, 0))
    assert "audience-sync sync good --full" in run["error"]
    assert "audience-sync check --accept-destination" in run["error"]
    for output in (command("status")[1], command("check")[1]):
        assert "If the endpoint or the API key is wrong, correct it." in output
        assert "audience-sync approve" not in output  # it would be refused
    assert sent(sandbox) == [("ann", {"good": True}), ("bob", {"good": True})]
    held = command.document("deliveries", "--status", "held")
    subjects = sorted((each["subject_id"], each["run_id"]) for each in held)
    assert subjects == [("ann", 3), ("cid", 2), ("dan", 3)]

    code, output = command("check", "--accept-destination")
    assert code == 0, output
    assert sync(command)[0] == 0
    assert sent(sandbox) == [
        ("ann", {"good": False}),
        ("ann", {"good": True}),
        ("bob", {"good": True}),
        ("cid", {"good": True}),
        ("dan", {"good": True}),
    ]
    assert audience(sandbox, "good") == {"ann": False, "bob": True, "cid": True, "dan": True}


def test_check_warns_of_a_percentage_where_a_share_is_needed(start, people):
    people("ann")
    command = start(
        {"Good": GOOD}, extra="[defaults]\nmax_exit_ratio = 50\nmax_change_ratio = 1.0\nmax_enter_ratio = 3"
    )
    warnings = [line for line in command("check")[1].splitlines() if "_ratio" in line]
    assert warnings == [
        "warn   definition good: 1 member, but max_exit_ratio is 50, which no run exceeds: it is a share, and half is 0.5"
    ]


def test_check_names_no_single_definition_when_several_belong_to_another_destination(start, people):
    people("ann")
    audiences = {"Good": GOOD, "Fine": GOOD}
    assert start(audiences)("sync")[0] == 0
    output = start(audiences, key="rotated")("check")[1]
    assert "wrong  destination: the last sync of fine, good was made for another destination" in output
    assert "run `audience-sync sync KEY --full`" in output


def test_a_new_environment_receives_everything_and_nothing_of_the_old_queue(good, people, sandbox):
    people("ann", "bob", "cid")
    command = good()
    assert sync(command)[0] == 0
    people("ann", "bob", "dan")
    call = ("identify", "guest", "--trait", "plan=pro", "--no-deliver")
    assert [code for code, _ in ended(command, ("sync", "--no-deliver"), call)] == [0, 0]
    people("bob", "eve")
    seen = len(sandbox.state.requests)
    with Sandbox(limits=Limits(identify_per_minute=1_000_000)) as other:
        command = good(endpoint=other.url)
        [(_, done)] = documents(command, ("sync", "good", "--full"))
        assert [(run["mode"], run["status"]) for run in done["runs"]] == [("full", "succeeded")]
        assert (done["delivery"]["dead_count"], done["delivery"]["pending_count"]) == (0, 0)
        once = Counter(user for user, _ in sent(other))
        assert set(once.values()) == {1}
        assert "guest" not in once
        values = {"ann": True, "bob": True, "cid": True, "dan": False} | audience(other, "good")
        assert values == {"ann": False, "bob": True, "cid": False, "dan": False, "eve": True}
    assert len(sandbox.state.requests) == seen


def test_a_retired_key_is_false_for_everyone_and_stays_reserved(start, people, sandbox):
    spend = f'[[traits]]\nname = "Spend"\nsql = "SELECT user_id, 5 AS value FROM ({GOOD}) AS members"'
    people("ann", "bob")
    assert start({"Good": GOOD}, extra=spend)("sync")[0] == 0
    assert sent(sandbox) == [(user, {"good": True, "spend": 5}) for user in ("ann", "bob")]
    command = start({"Good": GOOD})

    checking = command.popen("check")
    states = {each["key"]: each["state"] for each in command.document("list")}
    assert states == {"good": "enabled", "spend": "not configured"}
    code, output = command.ended(checking)
    assert (code, "no longer in the configuration: spend." in output) == (0, True), output
    assert "audience-sync retire KEY" in output

    assert [code for code, _ in ended(command, ("retire", "good"), ("retire", "spend"))] == [0, 0]
    assert len(sent(sandbox)) == 2
    assert command("deliver")[0] == 0
    assert sent(sandbox, 2) == [(user, {"good": False, "spend": None}) for user in ("ann", "bob")]

    code, output = command("sync")
    assert (code, "has only retired or disabled definitions: add one under [[audiences]]" in output) == (
        2,
        True,
    ), output
    resting, checking = command.popen("sync", "good"), command.popen("check")
    states = {each["key"]: each["state"] for each in command.document("list")}
    assert states == {"good": "retired", "spend": "retired"}
    code, output = command.ended(resting)
    assert (code, "The key good was retired" in output) == (2, True), output
    code, output = command.ended(checking)
    assert (code, "every key that was synced is configured or retired" in output) == (2, True), output


def test_a_definition_that_never_had_a_member_need_not_be_retired(start, people):
    people("ann")
    tried = {
        "Broken": "SELECT user_id FROM nowhere",
        "Empty": f"SELECT user_id FROM ({GOOD}) AS g WHERE 1 = 2",
    }
    assert start({"Good": GOOD} | tried)("sync", "--no-deliver")[0] == 1
    assert start({"Good": GOOD, "Waiting": GOOD})("sync", "waiting", "--hold")[0] == 3
    command = start({"Good": GOOD})
    states = {row["key"]: row["state"] for row in command.document("list")}
    assert states == {"good": "enabled", "waiting": "not configured"}
    assert command("reject", "4")[0] == 0
    code, output = command("check")
    assert (code, "ok     keys: every key that was synced is configured or retired" in output) == (0, True), (
        output
    )
    assert command.document("history", "broken")[0]["status"] == "failed"


def contents(url):
    """Contents of our tables as text."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    schema = None if engine.dialect.name == "sqlite" else "audience_sync"
    with engine.connect() as connection:
        tables = set(sa.inspect(connection).get_table_names(schema=schema)) - {"people"}
        texts = {}
        for table in tables:
            rows = connection.exec_driver_sql(f"SELECT * FROM {f'{schema}.' if schema else ''}{table}")
            texts[table] = "\n".join(sorted(str(tuple(row)) for row in rows))
    return texts


def mentions(url, user):
    return sorted(table for table, text in contents(url).items() if user in text)


def test_a_forgotten_user_is_erased_and_stays_away(good, people, sandbox, url):
    command = good()
    people("ann", "bob", "erase-me")
    assert sync(command)[0] == 0
    assert command("track", "erase-me", "Seen")[0] == 0
    assert mentions(url, "erase-me") == ["calls", "deliveries", "events", "members", "profiles"]

    sandbox.faults.add({"path": "/v1/users", "status": 500, "headers": {"retry-after": "0.1"}})
    before = contents(url)
    code, output = command("forget", "erase-me")
    assert (code, "nothing was changed" in output) == (1, True), output
    assert contents(url) == before
    assert sandbox.state.deletions == []

    sandbox.faults.clear()
    code, output = command("forget", "erase-me")
    erased = "Erased here for erase-me: 1 membership, 2 deliveries, 1 call, 1 event, 1 profile."
    assert (code, erased in output) == (0, True), output
    assert [deletion["ids"] for deletion in sandbox.state.deletions] == [["erase-me"]]
    assert mentions(url, "erase-me") == []
    sandbox.state.delete_now()

    seen = len(sandbox.state.requests)
    code, run = sync(command)
    assert (code, run["status"], counts(run)) == (0, "succeeded", (2, 0, 1, 0))
    output = command("sync")[1]
    assert "row" not in output
    assert "erase-me was erased on " in (shown := command("user", "erase-me")[1])
    assert "Runs and calls leave this user out until `audience-sync forget erase-me --allow-return`" in shown
    asked = command.popen("identify", "erase-me", "--trait", "plan=pro")
    assert command.document("show", str(run["run_id"]))["set_aside"] == {"forgotten": 1}
    code, output = command.ended(asked)
    assert (code, "ignored: the user was forgotten" in output) == (0, True), output

    assert command("forget", "erase-me", "--allow-return")[0] == 0
    assert "The user may be computed and sent again from " in command("user", "erase-me")[1]
    code, run = sync(command)
    assert (code, run["set_aside_count"], counts(run)) == (0, 1, (2, 0, 0, 0))
    assert mentions(url, "erase-me") == []
    assert len(sandbox.state.requests) == seen
    assert audience(sandbox, "good") == {"ann": True, "bob": True}


def test_an_erased_user_without_stored_rows_is_left_out_later(good, people, sandbox):
    command = good()
    people("ann")
    code, output = command("forget", "no one")
    assert (code, output.splitlines()[0]) == (0, "Nothing was stored here about no one.")
    assert "Later runs and calls leave this user out." in output
    assert [deletion["ids"] for deletion in sandbox.state.deletions] == [["no one"]]
    assert "no one was erased on " in command("user", "no one")[1]
    assert (
        command("user", "ann")[1]
        == "There is nothing about ann: no membership, no profile and no delivery.\n"
    )
    people("ann", "no one")
    code, run = sync(command)
    assert (code, run["set_aside_count"], counts(run)) == (0, 1, (1, 1, 0, 1))


def test_only_rows_that_cannot_be_used_are_announced(start, people):
    people("ann", "bob", "erase-me")
    with_null = "SELECT user_id FROM people UNION ALL SELECT NULL"
    eligible = "SELECT user_id FROM people WHERE user_id <> 'bob'"
    command = start({"Good": with_null}, extra=f'[defaults]\neligible_sql = "{eligible}"')
    assert command("forget", "erase-me")[0] == 0
    planned = "good would leave out 1 row that cannot be used: 1 null."
    assert planned in command("plan")[1].splitlines()
    warning = "warn   definition good: 1 member, but a sync would leave out 1 row that cannot be used: 1 null"
    assert warning in command("check")[1].splitlines()
    code, output = command("sync", "--no-deliver")
    assert (code, "Run 1 of good left out 1 row that cannot be used" in output) == (0, True), output
    assert "INFO rows left out run_id=1 key=good rows=1\n" in output
    assert command.document("show", "1")["set_aside"] == {"not_eligible": 1, "forgotten": 1, "null": 1}
    assert command.document("history")[0]["set_aside_count"] == 3
    assert "Nothing needs attention." in command("status")[1]


def test_a_run_that_left_out_most_of_its_rows_needs_attention(start, people):
    people("ann")
    command = start({"Good": "SELECT user_id FROM people UNION ALL SELECT NULL UNION ALL SELECT NULL"})
    assert command("sync", "--no-deliver")[0] == 0
    line = "- The last run of good (1) left out 2 rows that cannot be used: 2 null; it has 1 member. Check its query."
    code, output = command("status")
    assert (code, line in output.splitlines()) == (0, True), output


def test_a_call_without_a_user_id_shows_its_anonymous_id(good, people, tmp_path):
    people("ann")
    lines = (
        '{"type": "identify", "userId": "ann", "anonymousId": "a-1"}',
        '{"type": "page", "anonymousId": "a-2"}',
    )
    (tmp_path / "calls.ndjson").write_text("\n".join(lines), encoding="utf-8")
    command = good()
    assert command("import", str(tmp_path / "calls.ndjson"))[0] == 0
    output = command("calls")[1]
    assert "a-2 (anonymous)" in output
    assert "a-1" not in output
    assert "ann (anonymous)" not in output


def test_a_plan_that_fails_prints_the_error_only(start, people):
    people("ann")
    broken = start({"Broken": "SELECT user_id FROM nowhere"})
    code, output = broken("plan")
    assert code == 1
    assert output.startswith("audience-sync: broken: its SQL does not work: ")
    assert len(output.splitlines()) == 1
    code, output = start({"Broken": "SELECT user_id FROM nowhere", "Good": GOOD})("plan")
    assert (code, "good" in output, "A sync would send 1 request" in output) == (1, True, True), output


@pytest.fixture
def back_up(url, backend, tmp_path, request):
    """Copies the database with the company's tables; the result is a function that restores the copy."""

    def copy_file():
        shutil.copy(tmp_path / "own.db", tmp_path / "copy.db")
        return lambda: shutil.copy(tmp_path / "copy.db", tmp_path / "own.db")

    def copy_database():
        server, name = request.getfixturevalue("postgres"), sa.make_url(url).database
        copied = server.create(name)

        def restore():
            server.run(f"DROP DATABASE {name}")
            server.run(f"CREATE DATABASE {name} TEMPLATE {copied}")

        return restore

    return copy_file if backend == "sqlite" else copy_database


def test_a_full_sync_is_right_after_an_old_backup_was_restored(good, people, sandbox, back_up):
    command = good()
    people("always", "left before", "left after", "left unseen", "returned", "returned and left")
    assert sync(command)[0] == 0
    people("always", "left after", "left unseen")
    assert sync(command)[0] == 0
    restore = back_up()
    people("always", "left unseen", "joined", "came and went", "returned", "returned and left")
    assert sync(command)[0] == 0
    people("always", "left unseen", "joined", "returned", "returned and left")
    assert sync(command)[0] == 0
    restore()
    people("always", "joined", "returned", "new")
    code, run = sync(command, "--full")
    assert (code, run["run_id"], run["mode"]) == (0, 3, "full")
    assert audience(sandbox, "good") == {
        "always": True,
        "joined": True,
        "returned": True,
        "new": True,
        "left before": False,
        "left after": False,
        "left unseen": False,
        "returned and left": False,
        "came and went": False,
    }


def test_a_full_sync_is_right_although_the_backup_held_a_queue_that_was_sent_since(
    good, people, sandbox, back_up
):
    command = good()
    people("ann", "bob")
    assert sync(command, "--no-deliver")[0] == 0
    restore = back_up()
    assert command("deliver")[0] == 0
    assert audience(sandbox, "good") == {"ann": True, "bob": True}
    restore()
    people("ann")
    assert command("deliver")[0] == 0  # the copy has deliveries as pending that were sent since
    assert sync(command, "--full")[0] == 0
    assert audience(sandbox, "good") == {"ann": True, "bob": False}
