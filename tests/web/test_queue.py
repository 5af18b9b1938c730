"""The pages of deliveries, requests and calls."""

import re

import pytest

from audience_sync import history
from audience_sync.db import engines, tables
from tests.queue.conftest import START
from tests.web.pages import CALL, HOSTILE, HOUR, REQUEST, Pages, open_pages


@pytest.fixture
def pages(url, tmp_path):
    opened = open_pages(url, tmp_path)
    opened.add_definition("vips")
    opened.add_run(7)
    yield opened
    opened.app.close()


@pytest.fixture
def _deliveries(pages):
    """Deliveries 1 to 4."""
    pages.add(tables.requests, REQUEST | {"request_id": 5, "status_code": 400, "x_request_id": "xyz"})
    pages.add_delivery("ann", "dead", run_id=7, error="No such USER", request_id=5, attempt_count=3)
    pages.add_delivery("bob", "pending", body={"plan": "pro"}, attempt_count=1, error="100% busy")
    pages.add_delivery("ann", "dead", action="track", body={"event_name": "Seen", "metadata": {"a": 1}})
    pages.add_delivery("ann", "held", action="company", body={"name": "Acme", "size": 5})


@pytest.mark.usefixtures("_deliveries")
def test_each_delivery_has_its_content_status_and_answer(pages):
    text = pages.text("/deliveries")
    for words in (
        "vips → true",
        "✕ dead 3 attempts",
        "request 5: HTTP 400 x-request-id xyz No such USER",
        'plan → "pro"',
        "100% busy next attempt 2026-01-01 00:00",
        "event Seen",
        "company ann",
        "2 properties",
    ):
        assert words in text
    links = {"/user?id=bob", "/requests/5", "/runs/7", "/calls?before=2"}
    assert links <= set(pages.addresses("/deliveries"))


@pytest.mark.usefixtures("_deliveries")
@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, [4, 3, 2, 1]),
        ({"status": "dead"}, [3, 1]),
        ({"action": "track"}, [3]),
        ({"key": "vips"}, [1]),
        ({"key": "unknown"}, []),
        ({"run": 7}, [1]),
        ({"run": 7, "status": "pending"}, []),
        ({"user": "ann"}, [3, 1]),
        ({"user": "ann", "run": 7, "status": "dead"}, [1]),
        ({"error": "such user"}, [1]),
        ({"error": "%"}, [2]),
        ({"before": 3}, [2, 1]),
        ({"status": "dead", "before": 3}, [1]),
        ({"user": "ann", "before": 3}, [1]),
        ({"status": "", "user": ""}, [4, 3, 2, 1]),
    ],
)
def test_deliveries_are_filtered(pages, filters, ids):
    body = pages.get("/deliveries", **filters).text
    assert [number for number in (4, 3, 2, 1) if f'<th scope="row">{number}<small>' in body] == ids


ODD = [{name: "0" * zeros + "9" * 19} for name in ("run", "before", "notice") for zeros in (5, 9_000)]


@pytest.mark.usefixtures("_deliveries")
@pytest.mark.parametrize(
    "filters", [{"status": "gone"}, {"action": "x"}, {"run": "x"}, {"before": -1}, {"user": "\0"}, *ODD]
)
def test_a_filter_that_cannot_be_used_is_explained(pages, filters):
    answer = pages.get("/deliveries", **filters)
    assert (answer.status_code, "This address cannot be used" in answer.text) == (400, True)


def test_an_event_without_a_name_and_other_odd_bodies_are_shown(pages):
    for body in ({}, {"event_name": None}, [1], "text", {"items": 1, "values": 2}):
        pages.add_delivery("ann", action="track", body=body)
        pages.add_delivery("ann", body=body)
    for address in ("/deliveries", "/user?id=ann"):
        assert "[ 1 ]" in pages.text(address)


@pytest.mark.usefixtures("_deliveries")
def test_a_page_leads_to_the_older_rows_with_its_filters(pages, monkeypatch):
    monkeypatch.setattr("audience_sync.web.queue.PAGE_ROWS", 1)
    assert "/deliveries?before=3&status=dead" in pages.addresses("/deliveries", status="dead")
    last = pages.addresses("/deliveries", status="dead", before=3)
    assert "/deliveries?status=dead" in last
    assert not [address for address in last if address.startswith("/deliveries?before")]


@pytest.mark.usefixtures("_deliveries")
def test_a_search_for_a_text_that_is_longer_than_any_error_finds_nothing(pages):
    for error in ("x" * 51_000, "_%" * 10_000, "\u20ac" * 6_000):
        assert "No delivery matches." in pages.text("/deliveries", error=error)


@pytest.mark.usefixtures("_deliveries")
def test_a_search_reads_a_limited_number_of_rows_and_says_so(pages, monkeypatch):
    monkeypatch.setattr("audience_sync.history.paging.SEARCHED", 2)
    text = pages.text("/deliveries", error="such")
    assert "No match among the newest deliveries, searched down to number 3. Search the older ones" in text
    [older] = [address for address in pages.addresses("/deliveries", error="such") if "before=3" in address]
    assert "No such USER" in pages.text(older)


def test_the_deliveries_of_a_run_are_paged_across_statuses(pages):
    for status in ("accepted", "dead", "accepted", "cancelled", "pending", "dead"):
        pages.add_delivery("ann", status, run_id=7, request_id=1)
    seen, before = [], 100
    with engines.read(pages.app.engine) as connection:
        while before is not None:
            hits = history.find_deliveries(connection, run_id=7, before=before, limit=2)
            seen += hits.ids
            before = hits.older
    assert seen == [6, 5, 4, 3, 2, 1]


@pytest.mark.usefixtures("_deliveries")
def test_dead_deliveries_that_match_are_counted(pages, monkeypatch):
    none = {"action": None, "key": None, "user_id": None, "error": None}
    some = {"key": "vips", "error": "SUCH", "user_id": "ann"}
    with engines.read(pages.app.engine) as connection:
        assert history.count_dead(connection, **none) == (2, False)
        assert history.count_dead(connection, **none | {"action": "track"}) == (1, False)
        assert history.count_dead(connection, **none | some) == (1, False)
        monkeypatch.setattr("audience_sync.history.queue.COUNTED", 1)
        assert history.count_dead(connection, **none) == (1, True)


@pytest.fixture
def _sent(pages):
    """Requests 1 to 4, one of each outcome."""
    pages.add(tables.requests, REQUEST | {"status_code": 202, "x_request_id": "first"})
    pages.add(tables.requests, REQUEST | {"status_code": 400, "lane": "track", "error": HOSTILE})
    pages.add(tables.requests, REQUEST | {"error": "no answer within 30 s", "ended_at": START + HOUR})
    pages.add(tables.requests, REQUEST | {"ended_at": None, "lane": "bulk"})


@pytest.mark.usefixtures("_sent")
@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, [4, 3, 2, 1]),
        ({"outcome": "accepted"}, [1]),
        ({"outcome": "refused"}, [2]),
        ({"outcome": "no answer"}, [3]),
        ({"outcome": "under way"}, [4]),
        ({"lane": "identify"}, [3, 1]),
        ({"x_request_id": "first"}, [1]),
        ({"before": 2}, [1]),
    ],
)
def test_requests_are_filtered_by_lane_and_outcome(pages, filters, ids):
    addresses = pages.addresses("/requests", **filters)
    shown = [address for address in addresses if address.startswith("/requests/")]
    assert shown == [f"/requests/{number}" for number in ids]


@pytest.mark.usefixtures("_sent")
def test_a_request_has_its_answer_its_deliveries_and_its_job(pages):
    for number in range(3):
        pages.add_delivery(f"user{number}", "accepted", request_id=1)
    pages.add_delivery("other", "accepted", request_id=2)
    text = pages.text("/requests/1")
    assert "✓ accepted HTTP 202" in text
    assert [name in text for name in ("user0", "user2", "other")] == [True, True, False]
    job = {"request_id": 4, "filename": "f.ndjson", "job_id": "j<1>", "status": "running"}
    pages.add(tables.bulk_jobs, job | {"created_at": START, "row_count": 1200, "completed_count": 3})
    text = pages.text("/requests/4")
    for words in ("Bulk job", "j<1>", "1,200, 3 done", "None belongs to it now"):
        assert words in text
    is_live = ['hx-trigger="every' in pages.get(f"/requests/{number}").text for number in (4, 1)]
    assert is_live == [True, False]
    assert (pages.get("/requests/99").status_code, pages.get("/requests/x").status_code) == (404, 400)


@pytest.fixture
def _called(pages):
    """Calls 1 to 3."""
    body = {"properties": {"x": 1}}
    pages.add(tables.calls, CALL | {"message_id": "a", "user_id": "ann", "event": "Seen", "body": body})
    ignored = {"status": "ignored", "reason": HOSTILE, "corrected": [HOSTILE], "left_out": {"vips": "key"}}
    pages.add(tables.calls, CALL | ignored | {"message_id": HOSTILE, "user_id": "bob", "event": HOSTILE})
    group = {"message_id": "c", "type": "group", "anonymous_id": "anon", "group_id": "acme"}
    pages.add(tables.calls, CALL | group)


@pytest.mark.usefixtures("_called")
@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, [3, 2, 1]),
        ({"status": "ignored"}, [2]),
        ({"status": "ignored", "user": "ann"}, []),
        ({"type": "group"}, [3]),
        ({"user": "ann"}, [1]),
        ({"event": "Seen"}, [1]),
        ({"event": "seen"}, []),
        ({"before": 3, "type": "track"}, [2, 1]),
    ],
)
def test_calls_are_filtered(pages, filters, ids):
    body = pages.get("/calls", **filters).text
    assert [number for number in (3, 2, 1) if f'<th scope="row">{number}</th>' in body] == ids
    assert ("No call matches" in body) == (not ids)


@pytest.mark.usefixtures("_called")
def test_a_call_has_its_body_and_why_it_was_ignored(pages):
    text = pages.text("/calls")
    for words in ('"properties": { "x": 1 }', "anonymous anon", "acme", "○ ignored", '{"vips": "key"}'):
        assert words in text


def forms(browser, address):
    """The addresses of a page's forms and buttons that change something."""
    body = browser.get(address).text.partition("<main")[2]
    return re.findall(r'(?:action|formaction)="(/deliveries/[^"]*)"', body)


def test_operators_see_the_forms_for_deliveries(olga):
    dead = Pages(olga.app)
    dead.add_definition("vips")
    dead.add_run(7)
    dead.add_delivery("ann", "dead", run_id=7)
    dead.add_delivery("bob", "accepted", run_id=7, request_id=1)
    both = ["/deliveries/retry", "/deliveries/discard"]
    assert forms(olga, "/deliveries") == both
    assert forms(olga, "/deliveries?status=dead&key=vips") == [*both, *both]
    assert forms(olga, "/deliveries?status=accepted") == []
    body = olga.get("/deliveries?status=dead&key=vips&error=HTTP").text
    assert 'name="id" value="1" form="chosen"' in body
    assert "This applies to <strong>1</strong> delivery" in body
    for field in ('name="all" value="dead"', 'name="key" value="vips"', 'name="error" value="HTTP"'):
        assert field in body
    answer = olga.act("/deliveries/retry", all="dead", key="vips", back="/deliveries?status=dead")
    assert "1 delivery is queued again." in olga.get(answer.headers["location"]).text


def test_readers_are_sent_to_an_operator(rita):
    dead = Pages(rita.app)
    dead.add_delivery("ann", "dead", call_id=1)
    assert forms(rita, "/deliveries?status=dead") == []
    page = rita.get("/deliveries?status=dead").text
    assert ("ask an operator" in page, "audience-sync retry" in page) == (True, False)
    assert "data-select-all" not in page


@pytest.mark.usefixtures("_deliveries")
def test_without_users_the_commands_are_shown(pages):
    text = pages.text("/deliveries?status=dead")
    assert "Dead calls and events are sent only after a retry: audience-sync retry ID" in text


def test_a_long_x_request_id_is_short_in_the_table_and_whole_in_its_title(pages):
    name = "c408bc4095734f6d9c5e6f0f7a1b2c3d"
    pages.add(tables.requests, REQUEST | {"request_id": 5, "status_code": 202, "x_request_id": name})
    pages.add_delivery("ann", "accepted", run_id=7, request_id=5)
    assert f'<code title="{name}">c408bc4095734…</code>' in pages.get("/deliveries").text


def test_a_key_may_continue_on_the_next_line_after_an_underscore(pages):
    pages.add_delivery("ann", body={"order_<b>_done": True})
    assert "order_<wbr>&lt;b&gt;_<wbr>done" in pages.get("/deliveries").text


def test_times_of_deliveries_have_seconds_throughout(pages):
    pages.add_delivery("ann", "accepted", request_id=1)
    assert "2026-01-01 00:00:00 settled 2026-01-01 00:00:00" in pages.text("/deliveries")
