"""The page of a user: the memberships, since when and why, and whether Userpilot accepted them."""

import pytest

from audience_sync.db import engines, tables
from audience_sync.retention import erasure
from tests.queue.conftest import START
from tests.web.pages import CALL, HOSTILE, HOUR, REQUEST, open_pages

CONFIGURATION = "[[audiences]]\nname = \"VIPs\"\nquery = \"trait('plan') = 'pro'\"\n"


@pytest.fixture
def pages(url, tmp_path):
    opened = open_pages(url, tmp_path, CONFIGURATION)
    opened.add_definition("vips")
    opened.add_run(1)
    yield opened
    opened.app.close()


@pytest.fixture
def member(pages):
    """A function that makes a member, with a delivery if it has a status."""

    def make(user_id="ann", **delivery):
        pages.add(tables.members, {"definition_id": 1, "user_id": user_id, "entered_run_id": 1})
        if delivery:
            pages.add_delivery(user_id, run_id=1, **delivery)

    return make


def test_an_accepted_membership_shows_its_request(pages, member):
    pages.add(tables.requests, REQUEST | {"request_id": 812, "status_code": 202, "x_request_id": "abc"})
    member(status="accepted", request_id=812)
    text = pages.text("/user", id="ann")
    assert "vips since 2026-01-01 00:00 (run 1)" in text
    assert "Users where plan is “pro”." in text
    assert "Sent in request 812, accepted with HTTP 202 at 2026-01-01 00:00, x-request-id abc." in text
    assert {"/definitions/vips", "/runs/1", "/requests/812"} <= set(pages.addresses("/user", id="ann"))


@pytest.mark.parametrize(
    ("delivery", "words"),
    [
        ({"status": "pending"}, "Waiting to be sent since 2026-01-01 00:00"),
        (
            {"status": "pending", "attempt_count": 2, "error": "HTTP 503"},
            "Not accepted yet, after 2 attempts: HTTP 503. The next attempt is at 2026-01-01 00:00.",
        ),
        ({"status": "sending", "request_id": 9}, "Being sent in request 9."),
        ({"status": "held"}, "Waiting for a decision about run 1"),
        ({"status": "dead", "error": "no such user"}, "Refused: no such user"),
        ({"status": "cancelled", "error": "discarded by hand"}, "Not sent: discarded by hand."),
        ({}, "Its delivery is no longer stored."),
    ],
)
def test_the_state_of_a_membership_is_described(pages, member, delivery, words):
    member(**delivery)
    assert words in pages.text("/user", id="ann")


def test_a_delivery_behind_many_newer_ones_is_found(pages, member, monkeypatch):
    monkeypatch.setattr("audience_sync.history.users.LOOKED_AT", 2)
    pages.add(tables.requests, REQUEST | {"request_id": 5, "status_code": 202})
    member(status="accepted", request_id=5)
    for _ in range(3):
        pages.add_delivery("ann", "accepted", request_id=5, value_at=START + HOUR)
    assert "Sent in request 5, accepted with HTTP 202" in pages.text("/user", id="ann")


def test_the_delivery_of_a_later_full_run_is_the_answer(pages, member):
    pages.add_run(2, mode="full", at=START + HOUR)
    member(status="accepted", request_id=5)
    pages.add_delivery("ann", "dead", run_id=2, error="refused later")
    assert "Refused: refused later" in pages.text("/user", id="ann")


def test_the_time_line_has_each_change_once(pages):
    pages.add_definition("spend", 2, kind="trait")
    for run_id in range(2, 7):
        pages.add_run(run_id, 2, at=START + run_id * HOUR)
    value, vip = {"definition_id": 2, "user_id": "ann"}, {"definition_id": 1, "user_id": "ann"}
    pages.add(tables.past_members, value | {"entered_run_id": 2, "exited_run_id": 3, "value": "1"})
    pages.add(tables.past_members, value | {"entered_run_id": 3, "exited_run_id": 5, "value": "2"})
    pages.add(tables.members, value | {"entered_run_id": 6, "value": "3"})
    pages.add(tables.past_members, vip | {"entered_run_id": 1, "exited_run_id": 4})
    text = pages.text("/user", id="ann").partition("Timeline")[2]
    order = [
        "06:00 → entered spend 3 run 6",
        "05:00 ← exited spend run 5",
        "04:00 ← exited vips run 4",
        "03:00 ↻ changed spend 2 run 3",
        "02:00 → entered spend 1 run 2",
        "00:00 → entered vips run 1",
    ]
    places = [text.index(line) for line in order]
    assert places == sorted(places)
    older = pages.text("/user", id="ann", before=4).partition("Timeline")[2]
    assert ("run 4" in older, "changed spend 2 run 3" in older) == (False, True)


def test_a_long_time_line_leads_to_its_older_part(pages, monkeypatch):
    monkeypatch.setattr("audience_sync.web.users.PAGE_ROWS", 2)
    for run_id in range(2, 7):
        pages.add_run(run_id)
    for run_id in (1, 3, 5):
        interval = {"definition_id": 1, "user_id": "ann", "entered_run_id": run_id}
        pages.add(tables.past_members, interval | {"exited_run_id": run_id + 1})
    seen, address = [], "/user?id=ann"
    while address:
        text = pages.text(address).partition("Timeline")[2]
        seen += [run_id for run_id in range(6, 0, -1) if f"vips run {run_id} " in text]
        address = next((link for link in pages.addresses(address) if "before=" in link), None)
    assert seen == [6, 5, 4, 3, 2, 1]


def test_profile_calls_and_what_is_pending_are_shown(pages):
    pages.add(tables.calls, CALL | {"call_id": 3, "message_id": "m", "user_id": "ann", "event": "Seen"})
    times = {"first_seen_at": START, "last_seen_at": START + HOUR}
    profile = {"user_id": "ann", "traits": {"plan": "pro"}, "trait_times": {}, "company_id": "acme"}
    pages.add(tables.profiles, profile | times)
    pages.add_delivery("ann", call_id=3, body={"plan": "pro"})
    text = pages.text("/user", id="ann")
    for words in ("In no audience at the moment", "Not settled yet", "acme", 'plan "pro"', "Seen", "01:00"):
        assert words in text


def test_ids_are_compared_exactly_and_similar_ones_are_offered(pages, member):
    member("Ann-1")
    member("ann-2")
    assert "Nothing is known about ann-1" in pages.text("/user", id="ann-1")
    assert "/user?id=ann-2" in pages.addresses("/user", id="ann-1")
    assert "/user?id=Ann-1" in pages.addresses("/user", id=" Ann-1 ")
    assert "Similar ids" not in pages.text("/user", id="zoe")


def test_the_page_of_an_erased_user_differs_from_that_of_an_unknown_one(pages, member):
    member()
    with engines.write(pages.app.engine) as connection:
        erasure.forget(connection, "ann", START)
    text = pages.text("/user", id="ann")
    assert "This user was erased on 2026-01-01 00:00" in text
    assert "audience-sync forget USER_ID --allow-return" in text
    with engines.write(pages.app.engine) as connection:
        erasure.allow_return(connection, "ann")
    assert "may be computed and sent again from 2026-01-01 02:00 on" in pages.text("/user", id="ann")


def test_hostile_text_is_escaped(pages, member):
    member(HOSTILE, status="dead", error=HOSTILE, body={HOSTILE: HOSTILE})
    assert HOSTILE[:25] in pages.text("/user", id=HOSTILE)
    assert "Find a user" in pages.text("/user")
    assert pages.get("/user", id="a\0b").status_code == 400
    assert pages.get("/user", id="ann", before="x").status_code == 400


def test_a_user_with_many_deliveries_gets_the_newest(pages):
    for number in range(25):
        pages.add_delivery("ann", "accepted", request_id=1, body={f"trait{number}": number})
    text = pages.text("/user", id="ann")
    assert ("trait24 " in text, "trait0 " in text) == (True, False)
    assert "/deliveries?user=ann" in pages.addresses("/user", id="ann")


def test_a_reader_is_sent_to_an_operator_and_others_to_the_command(pages, member, rita):
    member(status="dead", error="no such user")
    assert "audience-sync retry 1 gives it a new attempt" in pages.text("/user", id="ann")
    page = rita.get("/user?id=ann").text
    assert ("Ask an operator to retry or discard it" in page, "audience-sync retry" in page) == (True, False)


def test_audiences_that_the_user_is_not_in_are_listed(pages):
    pages.add_delivery("ann", body={"plan": "pro"})
    assert "Not in: vips" in pages.text("/user", id="ann")


def test_the_timeline_has_the_order_and_time_of_runs_and_the_time_that_they_computed(pages):
    pages.add_run(2, at=START + HOUR, as_of=START - HOUR)
    pages.add(tables.members, {"definition_id": 1, "user_id": "ann", "entered_run_id": 2})
    line = pages.text("/user", id="ann").partition("Timeline")[2]
    assert "2026-01-01 01:00 → entered vips run 2 as of 2025-12-31 23:00" in line
