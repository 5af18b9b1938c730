"""The dashboard in this process, on a database of the test, and a browser that uses it without a network."""

import asyncio
import re
from dataclasses import dataclass, field

import httpx
import pytest

from audience_sync import settings
from audience_sync.app import App
from audience_sync.db import engines
from audience_sync.web import site
from tests.conftest import SCHEMA
from tests.queue.conftest import HandClock

HERE = "http://localhost:8040"
PASSWORD = "correct horse battery staple"
# Of the password, with parameters that take a millisecond.
HASH = "$scrypt$ln=12,r=1,p=1$c2FsdC1vZi10aGUtdGVzdA$WjEbwmNVfUwSFrf9fjU/pXPpR/Jq+FrcRDGoXsAzz9g"
USERS = "".join(
    f'[[web.users]]\nname = "{name}"\nrole = "{role}"\npassword = "{HASH}"\n'
    for name, role in (("olga", "operate"), ("rita", "read"))
)


@dataclass
class Browser:
    """A browser with its cookies, which does not follow redirects and sends what browsers send with a form."""

    app: App
    asgi: object
    address: str = HERE
    peer: str = "127.0.0.1"
    cookies: httpx.Cookies = field(default_factory=httpx.Cookies)

    def __call__(self, method, path, **options):
        async def ask():
            transport = httpx.ASGITransport(self.asgi, client=(self.peer, 50_000))
            async with httpx.AsyncClient(
                transport=transport, base_url=self.address, cookies=self.cookies
            ) as client:
                answer = await client.request(method, path, **options)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())

    def get(self, path, **options):
        return self("GET", path, **options)

    def post(self, path, data=None, *, headers=None):
        """Send a form from a page of the dashboard."""
        sent = {"Origin": self.address, "Sec-Fetch-Site": "same-origin"} | (headers or {})
        return self(
            "POST",
            path,
            data=data or {"button": ""},
            headers={name: value for name, value in sent.items() if value},
        )

    def sign_in(self, name="olga", password=PASSWORD, **fields):
        return self.post("/login", {"name": name, "password": password, **fields})

    @property
    def csrf(self):
        return re.search(r'name="csrf" value="(\w+)"', self.get("/actions").text)[1]

    def act(self, path, headers=None, **fields):
        """Send the form of an action that a page of this session shows."""
        return self.post(path, {"csrf": self.csrf, "back": "/actions"} | fields, headers=headers)


@pytest.fixture
def make_app(url, tmp_path):
    """Make an app on the test's database; `text` is added to its configuration, after the key of the destination."""
    opened = []

    def make(text="", first_key='api_key = "k"'):
        path = tmp_path / "audience_sync.toml"
        path.write_text(
            f'[database]\nurl = "{url}"\n[destination]\n{first_key}\n{text}\n'
            '[[audiences]]\nname = "VIPs"\nsql = "SELECT user_id FROM people"\n'
        )
        engine = engines.open_own(url, SCHEMA)
        opened.append(App(settings.load(path, {}), engine, HandClock()))
        return opened[-1]

    yield make
    for app in opened:
        app.close()


@pytest.fixture
def browse(make_app):
    """Open the dashboard of a configuration in a browser."""

    def browse(text="", **options):
        app = make_app(text, **options)
        return Browser(app, site.dashboard(app))

    return browse


@pytest.fixture
def olga(browse):
    """The browser of a user who may operate, signed in."""
    browser = browse(USERS)
    assert browser.sign_in("olga").status_code == 303
    return browser


@pytest.fixture
def rita(browse):
    """The browser of a user who may read, signed in."""
    browser = browse(USERS)
    assert browser.sign_in("rita").status_code == 303
    return browser
