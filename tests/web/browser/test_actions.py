"""What a person does in the browser: sign in and out, and decide about runs and deliveries."""

import re

import pytest
import sqlalchemy as sa
from playwright.sync_api import expect

from audience_sync.db import engines, tables
from tests.faulty_sandbox import FaultySandbox
from tests.web.browser.conftest import ONE_DATABASE, PATIENCE_MS
from tests.web.conftest import PASSWORD

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture
def value(site):
    """value(column, condition) reads one value of a table."""

    def read(column, condition):
        with engines.read(site.engine) as connection:
            return connection.execute(sa.select(column).where(condition)).scalar_one()

    return read


@pytest.fixture
def status_of_delivery(value):
    """The status of a user's refused event."""

    def read(user_id):
        is_it = (tables.deliveries.c.subject_id == user_id) & (tables.deliveries.c.action == "track")
        return value(tables.deliveries.c.status, is_it)

    return read


def test_a_person_signs_in_and_out(tabs):
    tab = tabs.open(user=None)
    tab.goto("/schedule")
    tab.get_by_label("Name").fill("rita")
    tab.get_by_label("Password").fill(PASSWORD)
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("heading", name="Schedule", level=1)).to_be_visible()
    tab.get_by_role("button", name="Sign out").click()
    expect(tab.get_by_role("heading", name="Sign in")).to_be_visible()
    tab.goto("/schedule")
    expect(tab.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_refused_delivery_is_retried_then_discarded(tab, status_of_delivery):
    tab.goto("/deliveries?status=dead&user=bob")
    tab.get_by_role("checkbox", name="Select all on this page").check()
    tab.get_by_role("button", name="Retry selected").click()
    expect(tab.get_by_role("status")).to_contain_text("1 delivery is queued again.")
    assert status_of_delivery("bob") == "pending"
    tab.goto("/deliveries?user=bob")
    tab.get_by_role("checkbox", name="Select delivery").check()
    tab.get_by_role("button", name="Discard selected").click()
    expect(tab.get_by_role("status")).to_contain_text("1 delivery is cancelled.")
    assert status_of_delivery("bob") == "cancelled"
    tab.goto("/actions")
    expect(tab.get_by_role("row").nth(1)).to_contain_text("olga")


def test_all_refused_deliveries_that_match_are_discarded(tab, status_of_delivery):
    tab.goto("/deliveries?status=dead&user=eve")
    tab.get_by_text("Retry or discard all dead deliveries").click()
    tab.get_by_role("button", name="Discard all").click()
    expect(tab.get_by_role("status")).to_contain_text("1 delivery is cancelled.")
    assert status_of_delivery("eve") == "cancelled"


@pytest.mark.parametrize(
    ("key", "button", "result", "status"),
    [
        ("big_spenders", "Send", "is committed", "succeeded"),
        ("order_count", "Reject", "is rejected", "rejected"),
    ],
)
def test_a_held_run_is_decided(key, button, result, status, tab, value):
    is_of = (
        sa.select(tables.definitions.c.definition_id).where(tables.definitions.c.key == key).scalar_subquery()
    )
    is_held = (tables.runs.c.definition_id == is_of) & (tables.runs.c.status == "held")
    run_id = value(tables.runs.c.run_id, is_held)
    tab.goto("/")
    tab.get_by_role("link", name=f"Run {run_id} of {key}").click()
    tab.get_by_role("button", name=button).click()
    expect(tab.get_by_role("status")).to_contain_text(result)
    assert value(tables.runs.c.status, tables.runs.c.run_id == run_id) == status


@ONE_DATABASE
def test_a_changed_destination_is_accepted(tab, site, value, scene_folder):
    is_it = tables.definitions.c.key == "odd_ids"
    with engines.write(site.engine) as connection:
        connection.execute(tables.definitions.update().where(is_it).values(fingerprint="another"))
    port = int(re.search(r"127\.0\.0\.1:(\d+)", (scene_folder / "audience_sync.toml").read_text())[1])
    with FaultySandbox(port):
        tab.goto("/")
        tab.get_by_role("button", name="It is the same environment").click()
        expect(tab.get_by_role("status")).to_contain_text("The destination is accepted for odd_ids.")
    assert value(tables.definitions.c.fingerprint, is_it) != "another"
    expect(tab.get_by_role("button", name="It is the same environment")).to_have_count(0)


def test_readers_see_no_buttons_for_actions(tabs, site):
    tab = tabs.open(user="rita")
    for address in ("/deliveries?status=dead", f"/runs/{site.ids['failed']}", "/"):
        tab.goto(address)
        assert [button.inner_text() for button in tab.locator("main form[method=post] button").all()] == []


def test_a_form_of_another_site_does_nothing(tabs, site, value):
    tab = tabs.open()
    is_dead = tables.deliveries.c.status == "dead"
    before = value(sa.func.count(), is_dead)
    form = f'<form method="post" action="{site.address}/deliveries/discard"><input name="all" value="dead"></form>'
    tab.route("http://elsewhere.test/", lambda route: route.fulfill(body=form, content_type="text/html"))
    tab.goto("http://elsewhere.test/")
    tab.evaluate("document.forms[0].submit()")
    expect(tab.get_by_role("heading", name="Sign in")).to_be_visible()  # the session's cookie was not sent
    assert before == value(sa.func.count(), is_dead) > 0
