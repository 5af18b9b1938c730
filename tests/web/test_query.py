"""The page for writing queries."""

import html
import re
import sqlite3
import threading
import tomllib

import pytest

from audience_sync.db import engines, tables
from audience_sync.errors import DefinitionError
from audience_sync.web import query
from tests.queue.conftest import START
from tests.web.pages import HOSTILE, open_pages

PRO = "trait('plan') = 'pro'"
TIMES = {"first_seen_at": START, "last_seen_at": START}
CONFIGURATION = (
    '[sources.shop]\nurl = "sqlite:///nowhere.db"\n'
    '[[audiences]]\nname = "VIPs"\nquery = "trait(\'a\').exists()"\n'
)


@pytest.fixture
def pages(url, tmp_path):
    opened = open_pages(url, tmp_path, CONFIGURATION)
    for number in range(3):
        profile = {"user_id": f"user{number}", "traits": {"plan": "pro", "n": number}, "trait_times": {}}
        opened.add(tables.profiles, profile | TIMES)
    event = {"call_id": 1, "user_id": "user0", "name": "It's <b>", "properties": {}, "context": {}}
    opened.add(tables.events, event | {"timestamp": START, "received_at": START})
    yield opened
    opened.app.close()


@pytest.fixture
def _one_preview(monkeypatch):
    monkeypatch.setattr(query, "_previews", threading.BoundedSemaphore(1))


def test_a_query_is_computed_read_in_english_and_ready_to_configure(pages):
    text = pages.text("/query", text=PRO, name="Pro users")
    for words in (
        "3 users",
        "user0 user1 user2",
        "Users where plan is “pro”.",
        "The SQL that runs",
        "SELECT",
    ):
        assert words in text
    body = pages.get("/query", text=PRO, name="Pro users").text
    block = html.unescape(re.search(r'<pre id="block"[^>]*>(.*?)</pre>', body, re.DOTALL)[1])
    assert tomllib.loads(block) == {"audiences": [{"name": "Pro users", "query": PRO}]}


def test_a_trait_has_values(pages):
    assert "user1 1" in pages.text("/query", text="trait('n')", kind="trait")


def test_the_place_of_a_mistake_is_marked(pages):
    body = pages.get("/query", text="trait('plan').exist()").text
    assert "The query cannot be used yet" in body
    assert "line 1, column 15" in body
    assert "\n                  ^" in body
    assert "For the configuration" not in body


@pytest.mark.parametrize("text", [HOSTILE, "trait('<script>alert(1)</script>') = 1", "(" * 500, "#", "'"])
def test_any_text_gives_a_page_that_shows_it(pages, text):
    assert text[:8] in pages.text("/query", text=text)


@pytest.mark.usefixtures("_one_preview")
def test_nothing_is_computed_while_the_user_types(pages):
    with query._previews:
        text = pages.text("/query", text=PRO, check="1")
    assert ("Users where plan is “pro”." in text, "try again" in text) == (True, False)


@pytest.mark.parametrize("site", ["none", "same-origin", "cross-site", "same-site"])
def test_a_link_from_another_site_computes_no_query(pages, site):
    body = pages.get("/query", headers={"Sec-Fetch-Site": site}, text=PRO).text
    is_ours = site in {"none", "same-origin"}
    assert ("Computed in" in body, "The link came from another site" in body) == (is_ours, not is_ours)


@pytest.mark.usefixtures("_one_preview")
def test_only_a_few_previews_run_at_a_time(pages):
    with query._previews:
        assert "try again in a moment" in pages.text("/query", text=PRO)
    for _ in range(2):
        assert "3 users" in pages.text("/query", text=PRO)


@pytest.mark.usefixtures("_one_preview")
def test_an_error_of_the_database_is_shown_and_another_preview_may_run(pages):
    for _ in range(2):
        text = pages.text("/query", text="trait('a').exists()", source="shop")
        assert "The query cannot be used yet query: the source shop cannot be read" in text


def test_names_that_a_query_can_use_are_listed(pages):
    text = pages.text("/query")
    for words in ("event('It\\'s <b>')", "trait('n')", "trait('plan')", "trait('vips')"):
        assert words in text
    assert [pages.get("/query", **{name: "x"}).status_code for name in ("source", "kind")] == [400, 400]


@pytest.mark.parametrize(
    "text",
    [
        PRO,
        "trait('''x''')",
        "line one\nline 'two'",
        'back\\slash "quoted"',
        "tab\tbell\x07 del\x7f",
        "ends '",
    ],
)
def test_the_block_is_toml_of_the_same_query(text):
    block = query._configuration(text, "shop", query.Kind.TRAIT, HOSTILE)
    [trait] = tomllib.loads(block)["traits"]
    assert (trait["query"].strip(), trait["name"], trait["source"]) == (text, HOSTILE, "shop")


def test_a_preview_ends_soon_and_locks_nothing_of_our_own_database(olga, monkeypatch):
    def write_meanwhile(engine, definition, *_):
        with engines.write(engine, 0.1) as connection:
            connection.execute(
                tables.profiles.insert(), {"user_id": "ann", "traits": {}, "trait_times": {}} | TIMES
            )
        raise DefinitionError(f"It was written within {definition.timeout_seconds:g} seconds.")

    monkeypatch.setattr(query.plan, "preview", write_meanwhile)
    answer = olga.get("/query", params={"text": PRO})
    assert "It was written within 30 seconds." in answer.text


SHOP = (
    '[sources.shop]\nurl = "sqlite:///{}"\n[tables.orders]\nsource = "shop"\ntable = "orders"\nuser_id = "user_id"\n'
    'timestamp = "at"\nevent = "Order Completed"\n'
    '[[audiences]]\nname = "Buyers"\nsource = "shop"\nquery = "event(\'Order Completed\').count() >= 1"\n'
)
ORDERED = "event('Order Completed').count() >= 1"


@pytest.fixture
def shop(url, tmp_path):
    """Pages with a source that has three users' orders; calls brought an order of one user."""
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE orders (user_id TEXT, at TEXT)")
        connection.executemany("INSERT INTO orders VALUES (?, '2025-12-31')", [("a",), ("b",), ("c",)])
    connection.close()
    opened = open_pages(url, tmp_path, SHOP.format(tmp_path / "shop.db"))
    event = {
        "user_id": "a",
        "properties": {"total": 5},
        "context": {},
        "timestamp": START,
        "received_at": START,
    }
    for number, name in enumerate(("Order Completed", "Login")):
        opened.add(tables.events, event | {"name": name, "call_id": number})
    yield opened
    opened.app.close()


@pytest.mark.parametrize(
    "text", [ORDERED, "entity('orders').count() >= 1", f"trait('buyers').exists() AND {ORDERED}"]
)
def test_a_query_runs_on_the_one_database_that_has_its_names(shop, text):
    shown = shop.text("/query", text=text)
    assert "3 users" in shown
    assert "It runs on shop" in shown
    assert 'source = "shop"' in shown


@pytest.mark.parametrize("text", ["event('Login').count() >= 1", "trait('plan').absent()"])
def test_a_query_of_other_names_runs_on_the_own_database(shop, text):
    shown = shop.text("/query", text=text)
    assert ("It runs on shop" in shown, 'source = "shop"' in shown) == (False, False)


def test_the_own_database_can_be_chosen_with_a_note_about_the_source(shop):
    shown = shop.text("/query", text=ORDERED, source="(own)")
    assert "1 user " in shown
    assert "The source shop has a table of this event too" in shown
    assert "source =" not in shown


def test_examples_have_names_that_exist_and_lead_to_their_answers(shop):
    examples = [address for address in shop.addresses("/query") if address.startswith("/query?text=")]
    assert len(examples) > 4
    for address in examples:
        assert "cannot be used yet" not in shop.text(address)


@pytest.mark.parametrize("text", ["SELECT user_id FROM orders", "with a as (select 1) select 2"])
def test_sql_has_a_message_of_its_own(shop, text):
    assert "put SQL into `sql =` of a definition" in shop.text("/query", text=text)


def test_a_query_that_fails_offers_no_configuration(pages):
    assert "For the configuration" not in pages.text("/query", text="trait('a').exists()", source="shop")
