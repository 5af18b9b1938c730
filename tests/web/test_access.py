"""Access without users, headers of proxies and other sites, and the headers of every answer."""

import asyncio
import re
import threading

import httpx
import pytest
from starlette.requests import Request

from audience_sync import remote
from audience_sync.db import dialects, engines
from audience_sync.web import access, actions, signin, site
from tests.conftest import SCHEMA
from tests.web.conftest import HERE, USERS, Browser

SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here
SAFE = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
LOCAL_HOSTS = ["127.0.0.1:8040", "localhost", "LOCALHOST:1", "[::1]:8040", "127.9.9.9"]
FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:8040",  # DNS rebinding can point this host to our machine
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "localhost:1@evil.example",
    "evil.example#@localhost",
    "192.168.1.7:8040",
    "0.0.0.0:8040",
    "[::1",
    "",
]
OF_PROXIES = [
    {"Forwarded": "for=192.0.2.1"},
    {"Via": "1.1 proxy"},
    {"X-Real-IP": "127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-Host": "localhost"},
    {"X-Forwarded-Proto": "http"},
    {"x-forwarded-server": ""},
]
BY_LINK = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


def routes():
    """Each (method, path) of the dashboard that is not a static file, with a value for each parameter."""
    for path in [*site.PAGES, "/login"]:
        yield "GET", fill(path)
    for path in ["/login", "/logout", *actions.ACTIONS]:
        yield "POST", fill(path)


def fill(path):
    return re.sub(r"\{[^}]*\}", "1", path)


@SQLITE
def test_the_routes_are_the_pages_the_actions_and_the_static_files(browse):
    table = {
        (method, fill(route.path))
        for route in browse().asgi.routes
        for method in getattr(route, "methods", ["MOUNT"])
        if method != "HEAD"
    }
    assert table == {*routes(), ("MOUNT", "/static")}


# Without users.


@SQLITE
def test_without_users_every_page_is_for_a_browser_on_this_machine(browse):
    browser = browse()
    for host in LOCAL_HOSTS:
        assert browser.get("/actions", headers={"Host": host}).status_code == 200, host
    refused = [*({"Host": host} for host in FOREIGN_HOSTS), *OF_PROXIES]
    for number, (method, path) in enumerate(routes()):
        for headers in refused if path == "/" else [refused[number % len(refused)]]:
            answer = browser(method, path, headers=headers)
            assert answer.status_code == 403, (path, headers)
            assert "[[web.users]]" in answer.text
    for headers in [{"Host": "evil.example"}, *OF_PROXIES]:
        assert browser.get("/static/dashboard.css", headers=headers).status_code == 403


@SQLITE
def test_without_users_nobody_can_act(browse):
    browser = browse()
    for path in actions.ACTIONS:
        answer = browser.post(fill(path), {"id": "1"})
        assert answer.status_code == 403
        assert (
            "To use its buttons, configure [[web.users]]: <code>audience-sync password</code> makes the hash"
            in answer.text
        )
    assert "Nobody has done anything yet." in browser.get("/actions").text
    assert browser.sign_in().status_code == 403
    assert browser.get("/login").status_code == 404
    assert 'class="account"' not in browser.get("/").text


@pytest.mark.parametrize(("version", "is_passed_on"), [("1.0", True), ("1.1", False)])
def test_nginx_is_known_by_its_version_of_http(version, is_passed_on):
    scope = {"type": "http", "http_version": version, "headers": [(b"host", b"localhost")]}
    assert remote.came_through_proxy(scope) is is_passed_on
    assert remote.is_local(scope) is not is_passed_on


# Other sites.


@SQLITE
@pytest.mark.parametrize("text", ["", USERS])
def test_another_site_may_link_to_a_page_and_nothing_else(browse, text):
    browser = browse(text)
    for where in ("cross-site", "same-site"):
        by_link = {"Sec-Fetch-Site": where, **BY_LINK}
        assert browser.get("/", headers=by_link).status_code == 200
        for path, headers in [
            ("/", {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}),
            ("/", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}),
            ("/actions", {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}),
            ("/static/dashboard.js", {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}),
            ("/static/dashboard.js", BY_LINK),
        ]:
            assert browser.get(path, headers={"Sec-Fetch-Site": where} | headers).status_code == 403, path
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost",
        "https://localhost:8040",
        "http://[",
        "",
    ):
        assert browser.get("/", headers={"Origin": origin}).status_code == 403, origin


# Proxies.


def seen(browse, headers, peer="10.0.0.9", trusted='"10.0.0.0/8", "::1"'):
    """The address, scheme and host that the dashboard sees."""
    scopes = []

    async def app(scope, _receive, _send):
        scopes.append(scope)

    settings = browse(f"[web]\ntrusted_proxies = [{trusted}]\n{USERS}").app.settings.web
    middle = access.TrustedProxies(app, settings)
    given = [(name.lower().encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "scheme": "http", "client": (peer, 1), "headers": [(b"host", b"in:1"), *given]}
    running = middle(scope, None, None)
    with pytest.raises(StopIteration):
        running.send(None)
    request = Request(scopes[0])
    return request.client.host, scopes[0]["scheme"], request.headers["Host"]


@SQLITE
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], ("10.0.0.9", "http", "in:1")),
        ([("X-Forwarded-For", "192.0.2.1")], ("192.0.2.1", "http", "in:1")),
        ([("X-Forwarded-For", "203.0.113.7, 192.0.2.1")], ("192.0.2.1", "http", "in:1")),
        ([("X-Forwarded-For", "203.0.113.7, 192.0.2.1, 10.1.1.1")], ("192.0.2.1", "http", "in:1")),
        ([("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-For", "192.0.2.1")], ("192.0.2.1", "http", "in:1")),
        ([("X-Forwarded-For", "2001:db8::1")], ("2001:db8::1", "http", "in:1")),
        ([("X-Forwarded-For", "<script>")], ("10.0.0.9", "http", "in:1")),
        ([("X-Forwarded-For", "")], ("10.0.0.9", "http", "in:1")),
        ([("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "sync.example")], ("10.0.0.9", "https", "sync.example")),
        ([("X-Forwarded-Proto", "javascript")], ("10.0.0.9", "http", "in:1")),
    ],
)  # fmt: skip
def test_a_trusted_proxy_gives_the_address_scheme_and_host(browse, headers, expected):
    assert seen(browse, headers) == expected


@SQLITE
def test_headers_of_other_peers_are_ignored(browse):
    headers = [("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "x")]
    assert seen(browse, headers, peer="192.0.2.9") == ("192.0.2.9", "http", "in:1")
    assert seen(browse, headers, peer="") == ("", "http", "in:1")
    assert seen(browse, headers, trusted="") == ("10.0.0.9", "http", "in:1")
    assert seen(browse, headers[:1], peer="::ffff:10.0.0.9") == ("127.0.0.1", "http", "in:1")


@SQLITE
def test_a_trusted_proxy_is_refused_without_users(browse):
    browser = browse('[web]\ntrusted_proxies = ["127.0.0.1"]')
    forwarded = {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "localhost"}
    assert browser.get("/", headers=forwarded).status_code == 403


# Every answer.


@SQLITE
def test_every_answer_has_the_safe_headers_even_errors(browse, monkeypatch):
    for browser in (browse(), browse(USERS)):
        answers = [browser(method, path) for method, path in routes()]
        answers += [
            browser(method, path)
            for path in ("/", "/nothing", "/static/dashboard.css", "/static/none", "/runs/1/approve")
            for method in ("GET", "HEAD", "OPTIONS", "PUT", "TRACE", "POST")
        ]
        answers += [browser.get("/", headers={"Sec-Fetch-Site": "cross-site", **BY_LINK}), browser.sign_in()]
        monkeypatch.setitem(site.PAGES, "/", None)  # a page that fails
        broken = browse("" if not browser.app.settings.web.users else USERS)
        answers.append(broken.get("/"))
        monkeypatch.undo()
        for answer in answers:
            for name, value in SAFE.items():
                assert answer.headers.get_list(name) == [value], (answer.request.url, name)
            is_static = answer.request.url.path.startswith("/static/")
            assert answer.headers["cache-control"] == ("max-age=86400" if is_static else "no-store")
            assert "Traceback" not in answer.text


@SQLITE
def test_other_methods_are_refused_with_the_allowed_ones(browse):
    browser = browse()
    for method in ("OPTIONS", "PUT", "DELETE", "TRACE", "POST"):
        answer = browser(method, "/")
        assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})
    answer = browser.get("/runs/1/approve")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    head = browser("HEAD", "/")
    assert (head.status_code, head.content) == (200, b"")


@SQLITE
@pytest.mark.parametrize(
    "path",
    [
        "/static/../site.py",
        "/static/%2e%2e/site.py",
        "/static/..%2fsite.py",
        "/static/..%5csite.py",
        "/static/....//site.py",
        "/static/%252e%252e/site.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/%00",
        "/static/" + "a" * 5_000,
        "/static/vendor",
        "/static/vendor/",
        "/static/",
        "/static",
    ],
)
def test_other_files_are_not_served_as_static_files(browse, path):
    answer = browse().get(path)
    assert answer.status_code == 404
    assert "Not found" in answer.text


@SQLITE
def test_a_write_key_opens_no_page(browse):
    browser = browse(f'[tracking]\nwrite_keys = ["canary"]\n{USERS}')
    answer = browser.get("/", auth=("canary", ""))
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2F")


@SQLITE
def test_without_a_session_every_page_leads_to_the_sign_in(browse):
    browser = browse(USERS)
    for method, path in [*routes(), ("GET", "/nothing")]:
        if path == "/login":
            continue
        answer = browser(method, path) if method == "GET" else browser.post(path, {"id": "1"})
        assert answer.status_code == 303, path
        assert answer.headers["location"].startswith("/login"), path
        assert answer.text == ""
    assert "VIPs" not in browser.get("/login").text
    assert "<nav" not in browser.get("/login").text


def test_own_origin_is_that_of_the_browser():
    assert (
        access.own_origin(
            Request({"type": "http", "scheme": "https", "headers": [(b"host", b"Sync.example")]})
        )
        == "https://sync.example:443"
    )


# A database that is locked, and slow work.


def test_a_locked_database_gives_a_page_that_says_so_soon(olga, monkeypatch):
    monkeypatch.setattr(signin, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(actions, "WAIT_SECONDS", 0.1)
    csrf, engine = olga.csrf, engines.open_own(str(olga.app.settings.database.url), SCHEMA)
    with engines.write(engine) as connection:
        if dialects.is_sqlite(connection):
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
        else:
            dialects.sql(connection, "LOCK TABLE {our}sessions, {our}actions IN ACCESS EXCLUSIVE MODE")
        answers = [olga.get("/"), olga.sign_in(), olga.post("/logout", {"csrf": csrf})]
        answers.append(olga.post("/runs/1/approve", {"csrf": csrf}))
    engine.dispose()
    for answer in answers:
        assert (answer.status_code, "The database is busy" in answer.text) == (503, True)
    assert olga.get("/").status_code == 200


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)  # SQLite has one lock for everything
def test_an_action_does_not_wait_long_for_a_lock(olga, monkeypatch):
    monkeypatch.setattr(actions, "WAIT_SECONDS", 0.1)
    csrf, engine = olga.csrf, engines.open_own(str(olga.app.settings.database.url), SCHEMA)
    with engines.write(engine) as connection:
        dialects.sql(connection, "LOCK TABLE {our}deliveries IN ACCESS EXCLUSIVE MODE")
        answer = olga.post("/deliveries/retry", {"csrf": csrf, "id": "1", "back": "/actions"})
    engine.dispose()
    page = olga.get(answer.headers["location"]).text
    assert "failed" in page
    assert "Another program holds its lock" in page


@SQLITE
def test_actions_that_take_long_do_not_hold_up_the_pages(olga, monkeypatch):
    enough = threading.Event()
    monkeypatch.setattr(actions.decisions, "approve", lambda *_: enough.wait(60))
    csrf = olga.csrf

    async def crowd():
        transport = httpx.ASGITransport(olga.asgi, client=("127.0.0.1", 50_000))
        options = {"base_url": HERE, "headers": {"Origin": HERE}, "cookies": olga.cookies}
        async with httpx.AsyncClient(transport=transport, **options) as client:
            posts = [client.post("/runs/1/approve", data={"csrf": csrf}) for _ in range(2 * site.MAX_PAGES)]
            tasks = [asyncio.ensure_future(post) for post in posts]
            await asyncio.wait(tasks, timeout=0.2)
            page = await client.get("/actions")  # is not held up
            was_busy = not any(task.done() for task in tasks)
            enough.set()
            return page, was_busy, [await task for task in tasks]

    page, was_busy, answers = asyncio.run(crowd())
    assert (page.status_code, was_busy, {answer.status_code for answer in answers}) == (200, True, {303})


@SQLITE
def test_only_signed_in_users_see_where_a_broken_database_is(browse, olga, caplog):
    place = str(olga.app.engine.url.database)
    stranger, local = Browser(olga.app, olga.asgi), browse()
    with engines.write(olga.app.engine) as connection:
        dialects.sql(connection, "ALTER TABLE runs RENAME TO gone")
    for browser in (olga, local):
        assert place in browser.get("/").text
    with engines.write(olga.app.engine) as connection:
        dialects.sql(connection, "ALTER TABLE sessions RENAME TO lost")
    for answer in (olga.get("/"), stranger.sign_in()):
        assert (answer.status_code, "The log of audience-sync serve says why" in answer.text) == (503, True)
        assert place not in answer.text
    assert place in caplog.records[-1].fields["error"]
