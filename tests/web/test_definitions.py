"""The pages of a definition: chart, text, runs, members now and at past times, and the download."""

import asyncio
import csv
import datetime as dt
import io
from itertools import chain

import anyio
import httpx
import pytest

from audience_sync.audiences import decisions
from audience_sync.web import definitions
from audience_sync.web.definitions import cell, trend
from tests.web.synced import SPEND, VIPS, Pages

HOSTILE = [
    "<script>alert(1)</script>",
    "x" * 255,
    "\u202e\u05d0\u05d1",
    "🦊",
    "a&b?c=d#e",
    "../../x",
    "a/b",
    "'\"",
    "ends ",
]


@pytest.fixture
def pages(engine, url, tmp_path):
    return Pages(engine, tmp_path, url)


def test_a_definition_shows_its_state_and_its_query(pages):
    pages.configure(
        '[[audiences]]\nname = "VIPs"\nsql = "SELECT user_id FROM people -- <b>"\nschedule = "@daily"\n'
        'timezone = "Europe/Paris"\neligible_sql = "SELECT user_id FROM people"\nguard_above = 2000\n'
    )
    pages.people("ann", "bob")
    run_id = pages.sync()
    text = pages.text("/definitions/vips")
    assert text.startswith("vips VIPs · audience · ● enabled · 2 members · next run 2026-01-01 23:00")
    assert "SELECT user_id FROM people -- <b>" in text
    assert "Who may enter (eligible_sql)" in text
    assert "@daily (Europe/Paris)" in text
    assert "From 2,000 members on, a run is held if more than 50% leave or more than 100% enter." in text
    page = pages.get("/definitions/vips").text
    assert '<span class="comment">-- &lt;b&gt;</span>' in page
    assert f'href="/runs/{run_id}"' in page
    assert "<title>vips · audience-sync</title>" in page


def test_a_query_is_laid_out_and_explained(pages):
    pages.configure("[[audiences]]\nname = \"Pro\"\nquery = \"trait('plan')='pro'\"\n")
    text = pages.text("/definitions/pro")
    assert "Users where plan is “pro”. trait ( 'plan' ) = 'pro' Schedule" in text  # each word is coloured
    assert "It has never run. audience-sync plan pro" in text
    assert "There are none before the first run." in text


def test_the_chart_has_columns_and_leaves_the_entries_of_the_first_run_out(pages):
    pages.configure(VIPS)
    assert pages.get("/definitions/vips/sizes.json").json()["times"] == []
    for users in (["ann", "bob"], ["ann"], ["ann", "cyd", "dan"]):
        pages.people(*users)
        pages.sync()
    assert pages.get("/definitions/vips/sizes.json").json() == {
        "times": [1767225661, 1767225724, 1767225787],
        "members": [2, 1, 3],
        "entered": [None, 0, 2],
        "exited": [None, 1, 0],
    }
    page = pages.get("/definitions/vips").text
    assert 'data-sizes="/definitions/vips/sizes.json"' in page
    assert 'aria-label="1 to 3 members from 2026-01-01 to 2026-01-01"' in page
    assert "Grew from 2 to 3 members in 2 minutes." in pages.text("/definitions/vips")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ([], ""),
        ([(0, 5)], ""),
        ([(0, 5), (10, 5)], "The same size as 10 days before: 5 members."),
        ([(0, 9_000), (10, 1_850), (40, 1_991)], "Grew from 1,850 to 1,991 members in 30 days."),
        ([(0, 9), (1, 8)], "Shrank from 9 to 8 members in 24 hours."),
        ([(0, 9), (300, 8)], "Shrank from 9 to 8 members in 300 days."),
    ],
)
def test_the_trend_of_a_month_is_a_sentence(sizes, sentence):
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    points = [{"as_of": start + dt.timedelta(days=day), "member_count": size} for day, size in sizes]
    assert trend(points) == sentence


def test_members_are_found_by_the_beginning_of_their_id_byte_by_byte(pages):
    pages.configure(VIPS)
    pages.people(
        "An", "Anna", "an", "ana", "a%", "a_", "ao", "Åsa", "\ud7ff1", "\ue000", "a\U0010ffff", "a\U0010ffffb"
    )
    pages.sync()
    for prefix, found in {
        "An": ["An", "Anna"],
        "an": ["an", "ana"],
        "a%25": ["a%"],
        "a_": ["a_"],
        "%C3%85": ["Åsa"],
        "%ED%9F%BF": ["\ud7ff1"],
        "a%F4%8F%BF%BF": ["a\U0010ffff", "a\U0010ffffb"],
        "%F4%8F%BF%BF": [],
    }.items():
        assert pages.users(f"/definitions/vips/members?prefix={prefix}") == [found], prefix
    assert "No member's id begins with zz . Upper and lower case differ." in pages.text(
        "/definitions/vips/members?prefix=zz"
    )


def test_members_are_shown_page_by_page_now_and_at_a_past_time(pages):
    pages.configure(VIPS)
    users = [f"u{number:03}" for number in range(120)]
    pages.people(*users)
    pages.sync()
    then = pages.clock.moment.isoformat().replace("+", "%2B")
    pages.people(*users[::2], "zoe")
    pages.sync()
    found = pages.users("/definitions/vips/members")
    assert [len(page) for page in found] == [50, 11]
    assert list(chain(*found)) == [*users[::2], "zoe"]
    found = pages.users(f"/definitions/vips/members?at={then}")
    assert [len(page) for page in found] == [50, 50, 20]
    assert list(chain(*found)) == users
    assert pages.users("/definitions/vips/members?prefix=u01") == [users[10:20:2]]
    assert "There was no committed run at that time." in pages.text("/definitions/vips/members?at=2020-01-01")
    assert "There are no members." not in pages.text("/definitions/vips/members?after=zz")
    assert "at must be a date or a time, such as" in pages.text("/definitions/vips/members?at=yesterday", 400)
    page = pages.get("/definitions/vips/members?at=yesterday", 400).text
    assert 'name="at" value="yesterday"' in page
    assert pages.get("/definitions/vips/members?at=0001-01-01T00:00%2B14:00", 400)


def test_few_members_among_many_who_left_are_found(pages, monkeypatch):
    monkeypatch.setattr("audience_sync.history.paging.PAGE", 5)
    pages.configure(VIPS.replace("sql", "max_exit_ratio = 1.0\nsql"))
    users = [f"u{number:03}" for number in range(200)]
    pages.people(*users)
    pages.sync()
    pages.people("u000", "u190")
    pages.sync()
    found = pages.users("/definitions/vips/members")
    assert len(found) == 5  # each of the first four reads ten pieces of five users
    assert list(chain(*found)) == ["u000", "u190"]
    assert "There is no member on this page. Continue with the next page." in pages.text(
        "/definitions/vips/members?after=u001"
    )


def test_values_of_a_trait_are_shown_with_the_time_since_when(pages):
    pages.configure(SPEND)
    pages.people(("ann", "12"), ("bob", "<b>"))
    pages.sync("spend")
    for path in ("/definitions/spend", "/definitions/spend/members"):
        assert 'User Value Member since ann "12" 2026-01-01 00:01 bob "<b>" 2026-01-01 00:01' in pages.text(
            path
        )


def test_hostile_ids_are_shown_as_they_are(pages):
    pages.configure(VIPS)
    pages.people(*HOSTILE)
    pages.sync()
    assert sorted(chain(*pages.users("/definitions/vips/members"))) == sorted(HOSTILE)
    assert "<script>alert" not in pages.get("/definitions/vips/members").text


def test_the_download_has_all_members_now_and_at_a_past_time(pages):
    pages.configure(VIPS + SPEND)
    pages.people(("ann", "1"), ("=1+1", "-3"), ("+49", "@x"), ('quo"te', "a,b"), ("-7", "two\nlines"))
    pages.sync()
    pages.sync("spend")
    then = pages.clock.moment.isoformat().replace("+", "%2B")
    pages.people(("bob", "2"))
    pages.sync()
    answer = pages.get("/definitions/vips/members.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"].startswith('attachment; filename="vips-2026-01-01T00')
    assert answer.text == "user_id\r\nbob\r\n"
    answer = pages.get(f"/definitions/spend/members.csv?at={then}")
    assert list(csv.reader(io.StringIO(answer.text, newline=""))) == [
        ["user_id", "value"], ["'+49", "'@x"], ["-7", "two\nlines"], ["'=1+1", "-3"], ["ann", "1"], ['quo"te', "a,b"],
    ]  # fmt: skip
    assert pages.get("/definitions/vips/members.csv?at=2020-01-01").text == "user_id\r\n"


@pytest.mark.parametrize("text", ["=1", "+1", "-1+2", "@a", "\tx", "\rx", "-", "\n=1"])
def test_a_formula_in_a_cell_is_escaped(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "-1", "-1.5", "1", "a=1", "ann@example.org", "true"])
def test_other_cells_stay_as_they_are(text):
    assert cell(text) == text


def test_removed_and_retired_keys_have_pages(pages):
    pages.configure(VIPS)
    pages.people("ann")
    pages.sync()
    pages.configure()
    text = pages.text("/definitions/vips")
    assert "○ not configured · 1 member" in text
    assert "until audience-sync retire vips clears them." in text
    assert pages.users("/definitions/vips/members") == [["ann"]]
    decisions.retire(pages.engine, "vips", pages.clock, pages.app.destination)
    assert "This key is retired" in pages.text("/definitions/vips")
    assert pages.get("/definitions/vips/members.csv").text == "user_id\r\n"


def test_a_definition_says_what_is_wrong(pages):
    pages.configure('[[audiences]]\nname = "Broken"\nsql = "SELECT user_id FROM nowhere_at_all"\n' + VIPS)
    run_id = pages.sync("broken")
    assert f"run {run_id} of broken failed: broken: its SQL does not work" in pages.text(
        "/definitions/broken"
    )
    pages.people("ann")
    run_id = pages.sync(hold=True)
    assert f"A run waits for a decision: run {run_id} of vips" in pages.text("/definitions/vips")


@pytest.mark.parametrize("key", ["nobody", "%3Cscript%3E", "a%00b", "%F0%9F%A6%8A", "x" * 3000])
@pytest.mark.parametrize("page", ["", "/members", "/members.csv", "/sizes.json"])
def test_an_unknown_key_is_not_found(pages, key, page):
    answer = pages.get(f"/definitions/{key}{page}", 404)
    assert "There is no definition with the key" in answer.text
    assert "<script>" not in answer.text


def test_a_download_is_made_in_the_turns_of_pages_and_not_for_its_head_alone(pages, monkeypatch):
    async def download():
        limiter = anyio.CapacityLimiter(1)
        pieces = (f"{limiter.borrowed_tokens} taken" for _ in range(2))
        return [piece async for piece in definitions._in_turn(pieces, limiter)]

    assert asyncio.run(download()) == ["1 taken", "1 taken"]
    pages.configure(VIPS)
    pages.sync()
    monkeypatch.setattr(definitions.history, "member_rows", None)  # would fail
    transport = httpx.ASGITransport(pages.asgi, client=("127.0.0.1", 50_000))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.head("/definitions/vips/members.csv")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/csv; charset=utf-8")
