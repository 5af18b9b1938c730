"""Every page in Chromium: no errors, accessible, fits a phone, readable without JavaScript, and its links work."""

import re
from urllib.parse import urlencode, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe

from audience_sync.web.site import PAGES
from tests.web.browser import scene
from tests.web.browser.conftest import ONE_DATABASE, PHONE

QUERY = "event('Order Completed').within(30 days).count() >= 1"
# Addresses that show something of a page. A page that is not here is opened at its path. See `Site.ids` for the ids.
ADDRESSES = {
    "/": ["/"],
    "/definitions/{key}": [f"/definitions/{key}" for key in ("at_risk", "odd_ids", "order_count", "broken")],
    "/definitions/{key}/members": ["/definitions/at_risk/members", "/definitions/odd_ids/members"],
    "/runs/{run_id}": ["/runs/{first}", "/runs/{held}", "/runs/{failed}"],
    "/runs/{run_id}/changes": ["/runs/{held}/changes?what=exited"],
    "/user": ["/user?id=12347", f"/user?{urlencode({'id': scene.USER_ID})}"],
    "/deliveries": ["/deliveries?user=12347", "/deliveries?status=dead"],
    "/requests/{request_id}": ["/requests/{refused}"],
    "/query": [f"/query?{urlencode({'text': text, 'source': 'shop'})}" for text in (QUERY, scene.MARKER)],
}
FILES = {"/definitions/{key}/members.csv", "/definitions/{key}/sizes.json"}
WALK = [address for page in PAGES if page not in FILES for address in ADDRESSES.get(page, [page])]
# On a phone: tables that are wider than the screen, and cells that are too low for their label.
CLIPPED = """tables => [
    ...tables.filter(table => table.scrollWidth > table.clientWidth),
    ...tables.flatMap(table => [...table.querySelectorAll("td[data-label]")]).filter(
        cell => cell.checkVisibility() && cell.clientHeight < 15),
].map(element => element.outerHTML.slice(0, 300))"""
FACTS = "h1, h2, h3, caption, th, td, dt, dd, #main p, #main li"
LINKS_OF_A_KIND = 2  # that are followed, such as those to runs


def complaints_of_axe(tab, *rules):
    options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    found = Axe().run(tab, options=options).response["violations"]
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in {"serious", "critical"}
    ]


def overflow(tab):
    return tab.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")


def facts(tab):
    """The texts of a page that are not for those with JavaScript only: buttons and charts are."""
    texts = tab.locator(FACTS).evaluate_all(
        """elements => elements.filter(element => element.checkVisibility() && !element.closest(".charts")).map(element => {
            const buttons = [...element.querySelectorAll("button")].map(button => button.innerText);
            return buttons.reduce((text, button) => text.replace(button, ""), element.innerText);
        })"""
    )
    texts = [re.sub(r"[\d.]+ seconds", "some seconds", re.sub(r"\s+", " ", text)).strip() for text in texts]
    return [text for text in texts if text]


@pytest.mark.parametrize("address", WALK)
def test_a_page_answers_and_reads_the_same_without_javascript(address, tab, tabs, site):
    address = address.format(**site.ids)
    assert tab.goto(address).status == 200
    assert re.fullmatch(r"\S.* · audience-sync", tab.title())
    assert tab.locator("h1").count() == 1
    shown = facts(tab)
    for link in links_to_follow(tab, site):
        assert tab.request.get(link).status == 200, link
    plain = tabs.lasting(java_script_enabled=False)
    plain.goto(address)
    assert facts(plain) == shown


@ONE_DATABASE
@pytest.mark.parametrize("address", WALK)
def test_a_page_is_accessible_and_fits_a_phone(address, tab, site):
    tab.goto(address.format(**site.ids))
    assert complaints_of_axe(tab) == []
    tab.emulate_media(color_scheme="dark")
    assert complaints_of_axe(tab, "color-contrast") == []
    tab.set_viewport_size(PHONE)
    assert overflow(tab) <= 0
    assert tab.locator(".cards").evaluate_all(CLIPPED) == []


def links_to_follow(tab, site):
    """Links to our own pages that are not yet checked, some of each kind."""
    for link in dict.fromkeys(tab.locator("a[href]").evaluate_all("links => links.map(link => link.href)")):
        url = urlsplit(link)
        kind = re.sub(r"\d+", "0", f"{url.path}?{'&'.join(re.findall('([a-z_]+)=', url.query))}")
        if link.startswith(site.address) and site.checked.count(kind) < LINKS_OF_A_KIND:
            site.checked.append(kind)
            yield link


USER = f"/user?{urlencode({'id': scene.USER_ID})}"
SHOWN = {
    "the error of a run on the overview": ("/", scene.ERROR_OF_RUN),
    "a name": ("/definitions/odd_ids", scene.NAME),
    "SQL": ("/definitions/odd_ids", scene.SQL),
    "a member": ("/definitions/odd_ids/members", scene.USER_ID),
    "the error of a run": ("/runs/{failed}", scene.ERROR_OF_RUN),
    "an id": (USER, scene.USER_ID),
    "a trait": (USER, scene.TRAIT),
    "a value of a trait": (USER, scene.MARKER),
    "an event of a user": (USER, scene.EVENT),
    "the user of a delivery": ("/deliveries?status=dead", scene.USER_ID),
    "the event of a delivery": ("/deliveries?status=dead", scene.EVENT),
    "the error of a delivery": ("/deliveries?status=dead", scene.ERROR),
    "the user of a call": ("/calls", scene.USER_ID),
    "the event of a call": ("/calls", scene.EVENT),
    "the error of a request": ("/requests/{refused}", scene.ERROR),
    "a query": (f"/query?{urlencode({'text': scene.MARKER})}", scene.MARKER),
}


@ONE_DATABASE
@pytest.mark.parametrize(("address", "text"), list(SHOWN.values()), ids=list(SHOWN))
def test_hostile_text_is_shown_as_it_is(address, text, tab, site):
    tab.goto(address.format(**site.ids))
    assert text in re.sub(r"\s+", " ", tab.get_by_role("main").inner_text())
