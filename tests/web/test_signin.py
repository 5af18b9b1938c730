"""Sign-in, sessions and their end, and the limits on guessing."""

import asyncio
import threading

import httpx
import pytest

from audience_sync.db import dialects, engines
from audience_sync.settings import passwords
from audience_sync.web import access, signin, site
from tests.queue.conftest import HandClock
from tests.web.conftest import HASH, HERE, PASSWORD, USERS, Browser

SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here
IN = "correct horse battery staple"


def sessions(browser):
    with engines.read(browser.app.engine) as connection:
        return dialects.sql(connection, "SELECT * FROM {our}sessions ORDER BY created_at").all()


def is_in(browser, **options):
    return browser.get("/actions", **options).status_code == 200


def test_a_session_begins_with_the_password_and_ends_with_the_sign_out(browse):
    browser = browse(USERS)
    answer = browser.sign_in("olga", next="/actions?before=7")
    assert (answer.status_code, answer.headers["location"]) == (303, "/actions?before=7")
    cookie = answer.headers["set-cookie"]
    token = browser.cookies["audience_sync"]
    assert cookie == f"audience_sync={token}; HttpOnly; Max-Age=43200; Path=/; SameSite=strict"
    assert len(token) == 43
    page = browser.get("/")
    assert "olga (operate)" in page.text
    assert token not in page.text
    [row] = sessions(browser)
    assert token not in str(tuple(row))
    assert HASH not in str(tuple(row))
    answer = browser.post("/logout", {"csrf": browser.csrf})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert sessions(browser) == []
    browser.cookies.set("audience_sync", token)  # a copy of the old cookie
    assert not is_in(browser)


@SQLITE
def test_behind_https_the_cookie_is_only_for_this_host_and_https(browse):
    browser = browse(f'[web]\ntrusted_proxies = ["127.0.0.1"]\n{USERS}')
    proxied = {
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "sync.example",
        "X-Forwarded-For": "192.0.2.7",
    }
    data = {"name": "olga", "password": IN}
    assert browser.post("/login", data, headers=proxied).status_code == 403
    answer = browser.post("/login", data, headers=proxied | {"Origin": "https://sync.example"})
    assert answer.status_code == 303
    name, _, rest = answer.headers["set-cookie"].partition("=")
    assert name == "__Host-audience_sync"
    assert rest.partition("; ")[2] == "HttpOnly; Max-Age=43200; Path=/; SameSite=strict; Secure"
    token = rest.partition(";")[0]
    sent = {"Cookie": f"__Host-audience_sync={token}"}
    assert browser.get("/actions", headers=proxied | sent).status_code == 200
    assert browser.get("/actions", headers=sent).status_code == 303  # not by http
    assert browser.get("/actions", headers=proxied | {"Cookie": f"audience_sync={token}"}).status_code == 303


@SQLITE
@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("olga", "wrong"),
        ("olga", ""),
        ("Olga", IN),
        ("", IN),
        ("nobody", IN),
        ("olga", HASH),
        ("olga\r\nSet-Cookie: a=b", IN),
        ("<script>alert(1)</script>", IN),
        ("o" * 40_000, "p" * 20_000),
    ],
)
def test_a_wrong_name_and_a_wrong_password_look_the_same(browse, caplog, name, password):
    browser = browse(USERS)
    answer = browser.sign_in(name, password)
    assert answer.status_code == 403
    assert "The name or the password is wrong." in answer.text
    assert "<script>alert" not in answer.text
    assert "set-cookie" not in answer.headers
    assert sessions(browser) == []
    said = str([vars(record) for record in caplog.records])
    assert "wrong name or password" in said
    assert not {IN, HASH, "nobody"} & {word for word in (IN, HASH, "nobody") if word in said}


@SQLITE
def test_a_password_is_hashed_for_a_name_that_does_not_exist(browse, monkeypatch):
    computed = []
    monkeypatch.setattr(signin, "is_password", lambda *given: computed.append(given) or True)
    browser = browse(USERS)
    assert browser.sign_in("nobody", "x").status_code == 403
    assert computed == [("x", HASH)]


@SQLITE
@pytest.mark.parametrize(
    ("asked", "location"),
    [
        ("/runs?key=a&b=c", "/runs?key=a&b=c"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("\\\\evil.example", "/"),
        ("https://evil.example", "/"),
        ("javascript:alert(1)", "/"),
        ("/a\r\nSet-Cookie: x=y", "/"),
        ("/a\tb", "/"),
        ("evil", "/"),
        ("", "/"),
        ("/" + "a" * 3_000, "/"),
        ("/ü", "/%C3%BC"),
    ],
)
def test_the_sign_in_leads_only_to_pages_of_the_dashboard(browse, asked, location):
    answer = browse(USERS).sign_in(next=asked)
    assert (answer.status_code, answer.headers["location"]) == (303, location)
    assert access.local_path(asked) in {asked, "/"}


@SQLITE
def test_the_page_that_was_asked_for_is_opened_after_the_sign_in(browse):
    browser = browse(USERS)
    answer = browser.get("/actions?before=9&x=%22%3E")
    assert answer.headers["location"] == "/login?next=%2Factions%3Fbefore%3D9%26x%3D%2522%253E"
    form = browser.get(answer.headers["location"]).text
    assert 'name="next" value="/actions?before=9&amp;x=%22%3E"' in form
    browser.sign_in()
    assert browser.get(answer.headers["location"]).headers["location"] == "/actions?before=9&x=%22%3E"


@SQLITE
def test_a_link_from_another_site_is_opened_again_by_our_page_with_the_session(browse):
    browser = browse(USERS)
    by_link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    answer = browser.get("/runs/7?a=%22%3E", headers=by_link)
    assert answer.status_code in {200, 303}
    answer = browser.get("/actions?a=%22%3E", headers=by_link)
    assert answer.status_code == 200
    assert 'content="0;url=/actions?a=%22%3E"' in answer.text
    assert 'url=/"' in browser.get("//evil.example/", headers=by_link).text
    again = browser.get("/actions?a=%22%3E", headers={"Sec-Fetch-Site": "same-origin"})
    assert again.status_code == 303  # to the sign-in, not for ever


# The end of sessions.


@SQLITE
def test_a_session_ends_after_two_hours_without_use_and_after_twelve(browse):
    browser = browse(USERS)
    browser.sign_in()
    clock = browser.app.clock
    for _ in range(5):
        clock.sleep(2 * 3600 - 1)
        assert is_in(browser)
    clock.sleep(2 * 3600)
    assert not is_in(browser)
    browser.sign_in()
    clock.sleep(12 * 3600 - 5)
    assert not is_in(browser)
    browser.sign_in()
    for _ in range(7):
        clock.sleep(3600 * 12 / 7)
        last = is_in(browser)
    assert not last


@SQLITE
def test_use_is_recorded_once_a_minute_and_not_for_a_page_that_refreshes_itself(browse):
    browser = browse(USERS)
    browser.sign_in()
    begun = sessions(browser)[0].last_seen_at
    browser.app.clock.sleep(59)
    assert is_in(browser)
    assert sessions(browser)[0].last_seen_at == begun
    browser.app.clock.sleep(1)
    assert is_in(browser, headers={"HX-Request": "true"})
    assert sessions(browser)[0].last_seen_at == begun
    assert is_in(browser)
    assert sessions(browser)[0].last_seen_at != begun


@SQLITE
def test_a_page_is_shown_while_the_database_is_being_written(browse):
    browser = browse(USERS)
    browser.sign_in()
    browser.app.clock.sleep(60)
    with engines.write(browser.app.engine):
        assert is_in(browser)


@SQLITE
@pytest.mark.parametrize(
    "changed",
    [
        USERS.replace('name = "olga"', 'name = "otto"'),
        USERS.replace('role = "operate"', 'role = "read"'),
        USERS.replace(HASH, HASH.replace("$c2Fs", "$d2Fs"), 1),
    ],
)
def test_a_session_ends_when_its_user_has_changed(browse, changed):
    before = browse(USERS)
    before.sign_in("olga")
    assert is_in(before)
    after = browse(changed)
    after.cookies = before.cookies
    assert not is_in(after)
    same = browse(USERS)
    same.cookies = before.cookies
    assert is_in(same)


def test_each_sign_in_has_a_new_token_and_deletes_the_sessions_that_ended(browse):
    browser = browse(USERS)
    other = Browser(browser.app, browser.asgi)
    browser.sign_in()
    first = browser.cookies["audience_sync"]
    other.sign_in("rita")
    browser.sign_in()
    assert browser.cookies["audience_sync"] != first
    assert len(sessions(browser)) == 2  # the former session of this browser is over
    assert is_in(other)
    browser.cookies.set("audience_sync", first)
    assert not is_in(browser)
    browser.app.clock.sleep(13 * 3600)
    browser.sign_in()
    assert len(sessions(browser)) == 1


@SQLITE
@pytest.mark.parametrize("token", ["", "a", "0" * 43, "ä", "'; DROP TABLE sessions; --", "x" * 5_000])
def test_an_invented_cookie_is_not_a_session(olga, token):
    stranger = Browser(olga.app, olga.asgi)
    for name in ("audience_sync", "__Host-audience_sync"):
        sent = {"Cookie": f"{name}={token}".encode()}
        assert stranger.get("/", headers=sent).status_code == 303


# Forms of other sites.


@SQLITE
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:8041"},
        {"Origin": "https://localhost:8040"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "", "Referer": "http://evil.example/localhost:8040"},
        {"Origin": "", "Referer": "http://localhost:8040@evil.example/"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_site_signs_nobody_in_or_out(olga, headers):
    stranger = Browser(olga.app, olga.asgi)
    answer = stranger.post("/login", {"name": "olga", "password": IN}, headers=headers)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    answer = stranger.post("/logout", headers=headers)
    assert (answer.status_code, "set-cookie" in answer.headers) == (303, False)
    answer = olga.post("/logout", {"csrf": olga.csrf}, headers=headers)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert is_in(olga)


@SQLITE
def test_a_referer_stands_in_for_a_missing_origin(browse):
    browser = browse(USERS)
    data = {"name": "olga", "password": IN}
    answer = browser.post("/login", data, headers={"Origin": "", "Referer": f"{HERE}/login"})
    assert answer.status_code == 303


@SQLITE
def test_a_sign_out_needs_the_token_of_the_session(olga):
    for csrf in ("", "0" * 64, "ä"):
        assert olga.post("/logout", {"csrf": csrf}).status_code == 403
    assert is_in(olga)


# Guessing.


@SQLITE
def test_guessing_is_slowed_down_for_a_name_and_for_an_address(browse, caplog):
    browser = browse(USERS)
    for _ in range(signin.MAX_ATTEMPTS):
        assert browser.sign_in("olga", "guess").status_code == 403
    answer = browser.sign_in("olga", IN)  # right, but too late
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "61"
    assert "Too many attempts failed. Try again in 1 min" in answer.text
    assert browser.sign_in("rita", IN).status_code == 429  # from the same address
    elsewhere = Browser(browser.app, browser.asgi, peer="192.0.2.8")
    assert elsewhere.sign_in("olga", IN).status_code == 429  # the same name
    assert elsewhere.sign_in("rita", IN).status_code == 303
    assert "too many attempts" in str([vars(record) for record in caplog.records])
    browser.app.clock.sleep(60)
    assert browser.sign_in("olga", "guess").status_code == 403
    assert browser.sign_in("olga", IN).status_code == 429
    browser.app.clock.sleep(60)
    assert browser.sign_in("olga", IN).status_code == 303


@SQLITE
def test_sign_ins_that_succeed_do_not_count(browse):
    browser = browse(USERS)
    for _ in range(3 * signin.MAX_ATTEMPTS):
        assert browser.sign_in("olga", IN).status_code == 303


@SQLITE
def test_guessing_at_a_name_elsewhere_does_not_keep_its_owner_out(browse):
    owner = browse(USERS)
    assert owner.sign_in("olga", IN).status_code == 303
    stranger = Browser(owner.app, owner.asgi, peer="192.0.2.8")
    for _ in range(signin.MAX_ATTEMPTS):
        assert stranger.sign_in("olga", "guess").status_code == 403
    assert stranger.sign_in("olga", IN).status_code == 429
    newcomer = Browser(owner.app, owner.asgi, peer="192.0.2.9")
    assert newcomer.sign_in("olga", IN).status_code == 429  # unknown at this address
    for _ in range(signin.MAX_ATTEMPTS):
        assert owner.sign_in("rita", "guess").status_code == 403  # somebody else at the owner's address
    assert owner.sign_in("olga", IN).status_code == 303
    for _ in range(signin.MAX_ATTEMPTS):
        assert owner.sign_in("olga", "guess").status_code == 403
    assert owner.sign_in("olga", IN).status_code == 429  # ten each, too


def test_the_memory_of_attempts_is_bounded(monkeypatch):
    monkeypatch.setattr(signin, "MAX_REMEMBERED", 100)
    throttle = signin.Throttle(HandClock())
    for number in range(200):
        assert throttle.take(f"{number}{'x' * 100_000}", f"2001:db8:{number:x}::1") == 0
        throttle.succeeded(f"{number}{'x' * 100_000}", f"2001:db8:{number:x}::1")
    assert len(throttle._free_at) == len(throttle._known) == 100
    assert max(map(len, throttle._free_at)) < 300


def test_addresses_of_one_ipv6_network_count_together():
    throttle = signin.Throttle(HandClock())
    waits = [throttle.take(f"user{number}", f"2001:db8::{number:x}") for number in range(11)]
    assert waits == [0.0] * 10 + [60.0]


def test_attempts_at_the_same_moment_count_before_their_hashes_are_computed():
    throttle = signin.Throttle(HandClock())
    waits = []
    threads = [
        threading.Thread(target=lambda: waits.append(throttle.take("olga", "192.0.2.1"))) for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waits.count(0.0) == 10


# Forms.


@SQLITE
@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (413, b"a=" + b"b" * 70_000, "application/x-www-form-urlencoded"),
        (413, b"a=" + b"b" * 3_000_000, "application/x-www-form-urlencoded"),
        (400, b"&".join([b"id=1"] * 6_000), "application/x-www-form-urlencoded"),
        (400, b"name=%ff", "application/x-www-form-urlencoded"),
        (400, "name=ü".encode(), "application/x-www-form-urlencoded"),
        (400, b"name=%00", "application/x-www-form-urlencoded"),
        (415, b"name=olga", "text/plain"),
        (415, b'{"name": "olga"}', "application/json"),
        (415, b"--x\r\n", "multipart/form-data; boundary=x"),
        (415, b"", ""),
    ],
)
def test_a_form_that_cannot_be_read_is_refused(olga, status, content, kind):
    for path in ("/login", "/logout", "/deliveries/retry"):
        answer = olga("POST", path, content=content, headers={"Origin": HERE, "Content-Type": kind})
        assert (answer.status_code, answer.headers["connection"]) == (status, "close")
        assert "The form cannot be read" in answer.text


@SQLITE
def test_a_form_that_does_not_arrive_in_time_is_refused(olga, monkeypatch):
    monkeypatch.setattr(site, "FORM_SECONDS", 0.01)

    async def slowly():
        yield b"name="
        await site.asyncio.sleep(600)

    headers = {"Origin": HERE, "Content-Type": "application/x-www-form-urlencoded"}
    assert olga("POST", "/login", content=slowly(), headers=headers).status_code == 408


@SQLITE
def test_two_passwords_are_hashed_at_a_time_and_too_many_are_refused(browse, monkeypatch):
    at_work, most, sent = [], [], site.MAX_SIGN_INS + site.MAX_WAITING + 5
    enough = threading.Event()

    def slowly(*_):
        at_work.append(1)
        most.append(len(at_work))
        enough.wait(60)
        at_work.pop()
        return False

    monkeypatch.setattr(signin, "is_password", slowly)
    monkeypatch.setattr(signin, "MAX_ATTEMPTS", 1_000)
    browser = browse(USERS)

    async def crowd():
        transport = httpx.ASGITransport(browser.asgi)
        async with httpx.AsyncClient(transport=transport, base_url=HERE, headers={"Origin": HERE}) as client:
            data = {"name": "olga", "password": "guess"}
            tasks = [asyncio.ensure_future(client.post("/login", data=data)) for _ in range(sent)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            page = await client.get("/login")  # is not held up
            enough.set()
            return page, [await task for task in tasks]

    page, answers = asyncio.run(crowd())
    assert page.status_code == 200
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(429), statuses.count(403)) == (5, sent - 5)
    assert max(most) == 2


# Hashes.


def test_a_hash_is_of_its_password_only(monkeypatch):
    monkeypatch.setattr(passwords, "_LOG_N", 12)  # faster
    stored = passwords.hash_password(PASSWORD)
    assert stored.startswith("$scrypt$ln=12,r=8,p=3$")
    assert passwords.is_password(PASSWORD, stored)
    assert not passwords.is_password(PASSWORD + " ", stored)
    assert passwords.hash_password(PASSWORD) != stored


def test_the_same_letters_in_another_unicode_form_are_the_same_password():
    digest = passwords._encoded(passwords._scrypt("über", b"salt" * 4, 12, 1, 1, 32))
    stored = f"$scrypt$ln=12,r=1,p=1${passwords._encoded(b'salt' * 4)}${digest}"
    assert passwords.is_password("u\u0308ber", stored)
