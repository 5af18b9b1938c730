"""Behaviour of an open page: keys, and refreshing while work is in progress."""

import contextlib
import datetime as dt
import re

import pytest
import sqlalchemy as sa
from playwright.sync_api import expect

from audience_sync.db import engines, leases, tables
from tests.web.browser.conftest import ONE_DATABASE, PATIENCE_MS

POLL_MS = 3_100  # a little more than the seconds between two looks of a live page
expect.set_options(timeout=PATIENCE_MS)


@contextlib.contextmanager
def running(site, key):
    """A run that is in progress; finish(member_count) ends it. Both are removed at the end."""
    now = dt.datetime.now(dt.UTC)
    with engines.write(site.engine) as connection:
        find = sa.select(tables.definitions.c.definition_id).where(tables.definitions.c.key == key)
        fields = {
            "mode": "changes",
            "trigger": "manual",
            "status": "running",
            "as_of": now,
            "started_at": now,
        }
        fields["definition_id"] = connection.execute(find).scalar_one()
        insert = tables.runs.insert().values(**fields).returning(tables.runs.c.run_id)
        run_id = connection.execute(insert).scalar_one()
        lease = {"owner": "test", "host": "here", "pid": 1, "expires_at": now + dt.timedelta(hours=1)}
        name = leases.of_definition(key)
        connection.execute(tables.leases.update().where(tables.leases.c.name == name).values(**lease))
    this = tables.runs.c.run_id == run_id

    def finish(member_count):
        done = {"status": "succeeded", "finished_at": now, "member_count": member_count}
        done |= {"entered_count": 1, "exited_count": 0, "changed_count": 0}
        with engines.write(site.engine) as connection:
            connection.execute(tables.runs.update().where(this).values(**done))

    try:
        yield finish
    finally:
        free = dict.fromkeys(("owner", "host", "pid", "expires_at"))
        with engines.write(site.engine) as connection:
            connection.execute(tables.runs.delete().where(this))
            connection.execute(tables.leases.update().where(tables.leases.c.name == name).values(**free))


def requested(tab):
    """A list of the pages that a tab asks for from now on."""
    addresses = []
    tab.on("request", lambda request: addresses.append(request.url))
    return addresses


def test_a_page_refreshes_only_while_a_run_is_in_progress(tabs, site):
    tab = tabs.open()
    tab.clock.install()
    with running(site, "at_risk") as finish:
        tab.goto("/")
        row = tab.get_by_role("row", name="at_risk")
        expect(row).to_contain_text("running")
        finish(1_234_567)
        tab.clock.run_for(POLL_MS)
        expect(row).to_contain_text("1,234,567")
    assert row.locator("time[title]").count() == row.locator("time").count() > 0
    addresses = requested(tab)
    tab.clock.run_for(20 * POLL_MS)
    tab.evaluate("1")  # what the tab sent before is known by now
    assert addresses == []


def test_a_live_page_does_not_refresh_a_focused_element(tabs, site):
    tab = tabs.open()
    tab.clock.install()
    with running(site, "at_risk"):
        tab.goto("/")
        link = tab.locator("#live a[href]").first
        link.focus()
        tab.keyboard.press("Shift+Tab")
        tab.keyboard.press("Tab")
        with tab.expect_response("**/"):
            tab.clock.run_for(POLL_MS)
        tab.clock.run_for(POLL_MS)
        expect(link).to_be_focused()


def test_a_slash_goes_to_the_search_of_a_user(tab):
    tab.goto("/")
    search = tab.get_by_role("searchbox", name="Find a user by id")
    tab.keyboard.press("/")
    expect(search).to_be_focused()
    tab.keyboard.type("a/b")
    expect(search).to_have_value("a/b")


def test_the_first_tab_skips_to_the_content(tab):
    tab.goto("/")
    tab.keyboard.press("Tab")
    skip = tab.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("main")).to_be_focused()


@pytest.mark.parametrize("media", ["screen", "print"])
def test_only_the_content_is_printed(tab, media):
    tab.goto("/")
    tab.emulate_media(media=media)
    expect(tab.get_by_role("main")).to_be_visible()
    assert tab.get_by_role("search").is_visible() == (media == "screen")


def first_time_shown(tab, chart=0):
    """The time in the legend of a chart while its left end is pointed at."""
    plot = tab.locator(".charts .u-over").nth(chart)
    plot.hover(position={"x": 2, "y": 20})
    return tab.locator(".charts .u-legend").nth(chart).locator(".u-value").first.inner_text()


@ONE_DATABASE
def test_dragging_zooms_both_charts_and_a_double_click_shows_all(tab):
    tab.goto("/definitions/at_risk")
    plot = tab.locator(".charts .u-over").first
    expect(plot).to_be_visible()
    begin = first_time_shown(tab)
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 5, box["y"] + 20, steps=4)
    tab.mouse.up()
    zoomed = first_time_shown(tab)
    assert zoomed > begin
    assert first_time_shown(tab, chart=1) == zoomed
    plot.dblclick()
    assert first_time_shown(tab) == begin


@ONE_DATABASE
def test_a_query_shows_its_errors_while_it_is_typed_and_its_block_is_copied(tabs):
    tab = tabs.open(permissions=["clipboard-read", "clipboard-write"])
    tab.goto("/query")
    query, answer = tab.get_by_role("textbox", name="Query"), tab.locator("#answer")
    query.fill("event('Order Completed'")
    expect(answer).to_contain_text("The query cannot be used yet")
    query.fill("event('Order Completed').count() >= 1")
    expect(answer).to_contain_text("In plain English")
    expect(answer).not_to_contain_text("cannot be used yet")
    expect(answer).not_to_contain_text("Computed in")  # only Preview computes it
    answer.get_by_role("button", name="Copy").click()
    expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == answer.locator("#block").inner_text().strip()
    assert copied.startswith("[[audiences]]\n")


@ONE_DATABASE
def test_the_members_are_downloaded_as_a_file(tab):
    tab.goto("/definitions/at_risk/members")
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download all as CSV").click()
    assert re.fullmatch(r"at_risk-\d{4}-\d\d-\d\dT\d{4}Z\.csv", download.value.suggested_filename)
    assert download.value.path().read_text().startswith("user_id\n")
