"""Actions: what each does, who may do it, and their record."""

import datetime as dt
import re

import pytest

from audience_sync.audiences import decisions
from audience_sync.audiences.runs import RunOptions
from audience_sync.db import dialects, engines, tables
from audience_sync.errors import DatabaseError
from audience_sync.queue import destination
from audience_sync.web import actions
from tests.web.conftest import HERE, USERS, Browser
from tests.web.test_access import fill

SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here
NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)


def record(browser):
    """The record of actions, the oldest first."""
    query = "SELECT user_name, address, action, target, status, result FROM {our}actions ORDER BY action_id"
    return [tuple(row) for row in rows(browser, query)]


def rows(browser, query):
    with engines.read(browser.app.engine) as connection:
        return dialects.sql(connection, query).all()


def statuses(browser):
    return [status for (status,) in rows(browser, "SELECT status FROM {our}deliveries ORDER BY delivery_id")]


QUEUED = "queued again. To send now: `audience-sync deliver`."
DISCARDED = "cancelled. Userpilot lacks discarded values of audiences and traits until the next full sync."


def notice(browser, answer):
    """The text that the page shows to which an action leads."""
    assert answer.status_code == 303
    page = browser.get(answer.headers["location"]).text
    text = re.search(r'<p class="notice".*</span> (.*?) <small>', page)[1]
    return re.sub("</?code>", "`", text.replace("&#39;", "'"))


def hold_a_run(browser, *people):
    app = browser.app
    with engines.write(app.engine) as connection:
        where = "" if dialects.is_sqlite(app.engine) else "public."
        dialects.sql(connection, f"CREATE TABLE {where}people (user_id text)")
        for user_id in people:
            dialects.sql(connection, f"INSERT INTO {where}people VALUES (:user_id)", user_id=user_id)
    [definition] = app.definitions()
    return app.sync(definition, app.clock.now(), RunOptions(hold=True))


def add_deliveries(browser, *some):
    """Deliveries of a definition `vips`, each with what differs from a dead one."""
    with engines.write(browser.app.engine) as connection:
        connection.execute(
            tables.definitions.insert(),
            [
                {
                    "definition_id": number,
                    "key": key,
                    "name": key,
                    "kind": "audience",
                    "created_at": NOON,
                }
                for number, key in ((1, "vips"), (2, "big_spenders"))
            ],
        )
        for number, differences in enumerate(some, 1):
            values = {
                "delivery_id": number,
                "action": "identify",
                "subject_id": f"user{number}",
                "body": {"vips": True},
                "class": "change",
                "run_id": 1,
                "definition_id": 1,
                "value_at": NOON,
                "status": "dead",
                "created_at": NOON,
                "next_attempt_at": NOON,
                "settled_at": NOON,
                "error": "HTTP 400: no such property",
            }
            connection.execute(tables.deliveries.insert().values(values | differences))


# Held runs.


def test_a_held_run_is_approved(olga):
    run_id = hold_a_run(olga, "ann", "bob")
    answer = olga.act(f"/runs/{run_id}/approve", back="/actions?before=99")
    assert answer.headers["location"] == "/actions?before=99&notice=1"
    done = "Run 1 of vips is committed: 2 entered, 0 exited, 0 changed. `audience-sync deliver` sends its changes."
    assert notice(olga, answer) == done
    assert statuses(olga) == ["pending", "pending"]
    assert record(olga) == [("olga", "127.0.0.1", "approve", "run 1", "done", done)]


def test_who_decides_about_a_run_is_on_its_page(olga):
    run_id = hold_a_run(olga, "ann")
    assert "Approved" not in olga.get(f"/runs/{run_id}").text
    with engines.write(olga.app.engine) as connection:
        destination.record_heartbeat(connection, olga.app.clock.now())
    answer = olga.act(f"/runs/{run_id}/approve", back=f"/runs/{run_id}")
    assert notice(olga, answer).endswith("The daemon sends its changes.")
    page = olga.get(f"/runs/{run_id}").text
    assert "<strong>Approved</strong> by olga, <time" in page
    assert "; it was held by --hold" in page
    assert f'<a href="/runs/{run_id}">run {run_id}</a>' in olga.get("/actions").text


def test_a_run_that_is_decided_on_the_command_line_says_so(olga):
    run_id = hold_a_run(olga, "ann")
    decisions.approve(olga.app.engine, run_id, olga.app.clock, olga.app.destination)
    page = olga.get(f"/runs/{run_id}").text
    assert "<strong>Approved</strong> on the command line; it was held by --hold" in page


def test_the_refusal_of_a_reader_names_the_role_that_is_needed(rita):
    run_id = hold_a_run(rita, "ann")
    for path in ("/", f"/runs/{run_id}"):
        page = rita.get(path).text
        assert "Ask an operator to decide." in page
        assert "audience-sync approve" not in page


def test_an_action_leads_to_its_deliveries(olga):
    add_deliveries(olga, {}, {})
    olga.act("/deliveries/retry", id=["2", "1"])
    olga.act("/deliveries/discard", all="dead")
    page = olga.get("/actions").text
    assert '<a href="/deliveries?before=3">deliveries 2, 1</a>' in page
    assert '<a href="/deliveries">all dead deliveries</a>' in page


def test_a_held_run_is_rejected(olga):
    run_id = hold_a_run(olga, "ann")
    answer = olga.act(f"/runs/{run_id}/reject")
    done = "Run 1 is rejected. None of its changes are sent, and the next run computes again."
    assert notice(olga, answer) == done
    assert statuses(olga) == ["cancelled"]
    answer = olga.act(f"/runs/{run_id}/approve")
    assert notice(olga, answer) == "Run 1 is not held: its status is rejected."
    assert [row[4] for row in record(olga)] == ["done", "refused"]


@SQLITE
@pytest.mark.parametrize(
    ("run_id", "result"),
    [
        ("7", "There is no run 7: `audience-sync history` lists them."),
        ("x", "The run id must be a whole number, not 'x'"),
        ("-1", "The run id must be a whole number, not '-1'"),
        ("9" * 30, f"The run id must be a whole number, not '{'9' * 30}'"),
    ],
)
def test_a_run_that_does_not_exist_is_refused(olga, run_id, result):
    assert notice(olga, olga.act(f"/runs/{run_id}/approve")) == result
    assert record(olga) == [("olga", "127.0.0.1", "approve", f"run {run_id}", "refused", result)]


# Deliveries.


def test_selected_deliveries_are_retried_and_discarded(olga):
    add_deliveries(olga, {}, {}, {}, {"status": "accepted", "request_id": 1})
    answer = olga.act("/deliveries/retry", id=["1", "2", "1"])
    assert notice(olga, answer) == f"2 deliveries are {QUEUED}"
    assert statuses(olga) == ["pending", "pending", "dead", "accepted"]
    answer = olga.act("/deliveries/retry", id=["3", "4", "77"])
    assert notice(olga, answer) == (
        f"1 delivery is {QUEUED} 2 more cannot be queued: Delivery 4 is accepted, not dead."
    )
    answer = olga.act("/deliveries/discard", id=["2", "4"])
    assert notice(olga, answer) == (
        f"1 delivery is {DISCARDED} The others are settled already, or belong to a held run."
    )
    assert statuses(olga) == ["pending", "cancelled", "pending", "accepted"]
    assert [row[2:5] for row in record(olga)] == [
        ("retry", "deliveries 1, 2, 1", "done"),
        ("retry", "deliveries 3, 4, 77", "done"),
        ("discard", "deliveries 2, 4", "done"),
    ]


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, {1, 2, 3, 4, 5}),
        ({"key": "vips"}, {1, 2, 4}),
        ({"key": "big_spenders", "error": ""}, {3}),
        ({"key": "nothing"}, set()),
        ({"action": "company"}, {4}),
        ({"error": "NO SUCH"}, {1, 3, 4, 5}),
        ({"error": "%"}, {2}),
        ({"user": "user1"}, {1}),
        ({"user": "user4"}, set()),
        ({"user": "user5", "error": "400", "action": "identify"}, {5}),
        ({"run": "1"}, {1, 2, 3, 4}),
        ({"run": "1", "user": "user2"}, {2}),
        ({"run": "2"}, set()),
    ],
)
@pytest.mark.parametrize("verb", ["retry", "discard"])
def test_all_dead_deliveries_that_a_filter_matches(olga, monkeypatch, verb, fields, chosen):
    monkeypatch.setattr(actions, "CHUNK", 2)
    add_deliveries(
        olga,
        {},
        {"error": "HTTP 500: 100 % wrong"},
        {"definition_id": 2},
        {"action": "company"},
        {"run_id": None, "definition_id": None, "call_id": 1, "class": "call"},
        {"status": "pending", "settled_at": None},
        {"status": "cancelled"},
    )
    before = statuses(olga)
    answer = olga.act(f"/deliveries/{verb}", all="dead", **fields)
    words = {"retry": QUEUED, "discard": DISCARDED}[verb]
    number = "1 delivery is" if len(chosen) == 1 else f"{len(chosen)} deliveries are"
    assert notice(olga, answer) == f"{number} {words if chosen else words.partition('.')[0] + '.'}"
    after = {"retry": "pending", "discard": "cancelled"}[verb]
    assert statuses(olga) == [after if n in chosen else status for n, status in enumerate(before, 1)]
    given = "".join(f", {name} {value}" for name, value in sorted(fields.items()) if value)
    assert sorted(record(olga)[0][3].split(", ")) == sorted(f"all dead deliveries{given}".split(", "))


@SQLITE
@pytest.mark.parametrize("verb", ["retry", "discard"])
@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({}, "No delivery is selected. Select at least one."),
        ({"id": "x"}, "A delivery id must be a whole number, not 'x'"),
        ({"id": ["1", "9" * 19]}, f"A delivery id must be a whole number, not '{'9' * 19}'"),
        ({"all": "accepted"}, "all must be `dead`."),
        ({"all": "dead", "run": "x"}, "The run id must be a whole number, not 'x'"),
    ],
)
def test_an_invalid_selection_changes_nothing(olga, verb, fields, result):
    add_deliveries(olga, {})
    assert notice(olga, olga.act(f"/deliveries/{verb}", **fields)) == result
    assert statuses(olga) == ["dead"]
    assert record(olga)[0][4] == "refused"


@SQLITE
def test_a_daemon_that_runs_sends_what_is_retried(olga):
    add_deliveries(olga, {})
    with engines.write(olga.app.engine) as connection:
        destination.record_heartbeat(connection, olga.app.clock.now())
    answer = olga.act("/deliveries/retry", id=["1"])
    assert notice(olga, answer) == "1 delivery is queued again. The daemon sends it."


# The destination.


def test_the_destination_is_accepted_if_it_accepts_the_key(browse, sandbox):
    text = f'endpoint = "{sandbox.url}"\n{USERS}'
    olga = browse(text)
    olga.sign_in()
    run_id = hold_a_run(olga, "ann")
    olga.act(f"/runs/{run_id}/approve")
    with engines.write(olga.app.engine) as connection:
        dialects.sql(connection, "UPDATE {our}definitions SET fingerprint = 'other'")
        dialects.sql(connection, "UPDATE {our}deliveries SET status = 'held', fingerprint = 'other'")
    refused = notice(olga, olga.act("/destination/accept"))
    assert "put the right key into [destination] api_key." in refused
    assert statuses(olga) == ["held"]
    right = browse(text.replace("endpoint", 'api_key = "sandbox"\nendpoint', 1), first_key="")
    right.cookies = olga.cookies
    assert notice(right, right.act("/destination/accept")) == "The destination is accepted for vips."
    assert statuses(right) == ["pending"]


# Who may act.


def test_readers_are_refused_every_action(rita):
    add_deliveries(rita, {})
    assert "<button>Approve" not in rita.get("/").text
    for path in actions.ACTIONS:
        answer = rita.act(fill(path), id="1", all="dead")
        assert answer.status_code == 403
        assert "Your role is read." in answer.text
    assert statuses(rita) == ["dead"]
    done = record(rita)
    assert [(row[0], row[2], row[4]) for row in done] == [
        ("rita", action.name, "refused") for action in actions.ACTIONS.values()
    ]
    page = rita.get("/actions").text
    assert page.count("Your role is read.") == len(actions.ACTIONS)


@pytest.mark.parametrize("path", actions.ACTIONS)
@SQLITE
def test_an_action_needs_a_session_its_token_and_a_form_of_our_own(olga, path):
    add_deliveries(olga, {})
    csrf, path = olga.csrf, fill(path)
    fields = {"csrf": csrf, "id": "1", "back": "/actions"}
    stranger = Browser(olga.app, olga.asgi)
    assert stranger.post(path, fields).headers["location"] == "/login"
    assert record(olga) == []
    forged = [
        ({}, {"Origin": "http://evil.example"}),
        ({}, {"Origin": "null"}),
        ({}, {"Origin": ""}),
        ({}, {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}),
        ({}, {"Sec-Fetch-Site": "cross-site"}),
        ({"csrf": ""}, {}),
        ({"csrf": csrf[:-1]}, {}),
        ({"csrf": csrf.upper()}, {}),
        ({"csrf": "ü"}, {}),
    ]
    other = Browser(olga.app, olga.asgi)
    other.sign_in("olga")
    forged.append(({"csrf": other.csrf}, {}))
    for changed, headers in forged:
        assert olga.post(path, fields | changed, headers=headers).status_code == 403, (changed, headers)
    answer = olga("POST", path, data={"id": "1"}, headers={"Origin": HERE})
    assert answer.status_code == 403
    assert olga.get(path).status_code == 405
    assert [row[4] for row in record(olga)] == ["refused"] * (len(forged) + 1)
    assert statuses(olga) == ["dead"]


@SQLITE
def test_an_action_leads_only_to_pages_of_the_dashboard(olga):
    for back in (
        "//evil.example",
        "https://evil.example/",
        "/\\evil.example",
        "/a\r\nX: y",
        "javascript:1",
        "",
    ):
        location = olga.act("/runs/1/approve", back=back).headers["location"]
        assert re.fullmatch(r"/\?notice=\d+", location), back
    location = olga.act("/runs/1/approve", back="/deliveries?key=a%26b&notice=3&status=").headers["location"]
    assert location == "/deliveries?key=a%26b&status=&notice=7"


# The record.


@SQLITE
def test_an_action_is_recorded_before_it_is_done(olga, monkeypatch):
    at_work = []
    monkeypatch.setattr(actions.decisions, "approve", lambda *_: at_work.append(record(olga)) or 1 / 0)
    answer = olga.act("/runs/1/approve")
    assert at_work == [[("olga", "127.0.0.1", "approve", "run 1", "running", None)]]
    assert notice(olga, answer).startswith("An unexpected error: ZeroDivisionError")
    assert record(olga)[0][4] == "failed"


@SQLITE
def test_an_action_that_the_database_refuses_has_failed(olga, monkeypatch):
    def fail(*_):
        raise DatabaseError("The disk is full.")

    monkeypatch.setattr(actions.decisions, "reject", fail)
    assert notice(olga, olga.act("/runs/1/reject")) == "The disk is full."
    assert record(olga) == [("olga", "127.0.0.1", "reject", "run 1", "failed", "The disk is full.")]


@SQLITE
def test_a_notice_is_shown_only_to_the_person_who_acted(olga):
    olga.act("/runs/1/approve")
    assert 'class="notice"' in olga.get("/actions?notice=1").text
    rita = Browser(olga.app, olga.asgi)
    rita.sign_in("rita")
    for browser, path in ((rita, "/actions?notice=1"), (olga, "/actions?notice=2")):
        answer = browser.get(path)
        assert (answer.status_code, 'class="notice"' in answer.text) == (200, False)
    assert olga.get("/actions?notice=<b>Buy</b>").status_code == 400


def test_the_record_has_pages_and_escapes_what_it_shows(olga):
    done = {"started_at": NOON, "ended_at": NOON, "user_name": "<b>", "address": "<b>", "action": "<b>"}
    with engines.write(olga.app.engine) as connection:
        connection.execute(
            tables.actions.insert(),
            [done | {"target": f"run {n}", "status": "done", "result": "<b>"} for n in range(55)],
        )
    first = olga.get("/actions").text
    assert "<b>" not in first
    assert first.count("<tr>") == 51
    older = re.search(r'href="(/actions\?before=\d+)">Older', first)[1]
    rest = olga.get(older).text
    assert rest.count("<tr>") == 6
    assert "Older" not in rest
    assert 'href="/actions">Newest' in rest
    newest, oldest = re.findall(r"run \d+", first)[0], re.findall(r"run \d+", rest)[-1]
    assert (newest, oldest) == ("run 54", "run 0")


@SQLITE
def test_the_address_in_the_record_is_that_of_the_browser_behind_a_trusted_proxy(browse):
    for trusted, address in (('"127.0.0.1"', "192.0.2.7"), ("", "127.0.0.1")):
        olga = browse(f"[web]\ntrusted_proxies = [{trusted}]\n{USERS}")
        olga.sign_in()
        olga.act("/runs/1/approve", headers={"X-Forwarded-For": "192.0.2.7"})
        assert record(olga)[-1][1] == address
