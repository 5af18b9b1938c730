"""The dashboard in this process over a database with people, and definitions that a test configures and syncs."""

import asyncio
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import sqlalchemy as sa
from starlette.requests import Request

from audience_sync.app import App
from audience_sync.audiences import runs
from audience_sync.db import dialects, engines
from audience_sync.settings import load
from audience_sync.web.access import Viewer
from audience_sync.web.site import dashboard
from audience_sync.web.view import View
from tests.audiences.conftest import HandClock

OPERATOR = Viewer("olga", "operate", "secret")
VIPS = '[[audiences]]\nname = "VIPs"\nsql = "SELECT user_id FROM people"\n'
SPEND = '[[traits]]\nname = "Spend"\nsql = "SELECT user_id, value FROM people"\n'
LINK = re.compile(r'<a rel="next" href="([^"]+)"')
USER = re.compile(r'href="/user\?id=[^"]*"><bdi>(.*?)</bdi>')


@dataclass
class Pages:
    """Pages over definitions of `people`."""

    engine: sa.Engine
    folder: Path
    url: str
    clock: HandClock = field(default_factory=HandClock)
    app: App = None
    asgi: object = None

    def __post_init__(self):
        self.schema = "" if dialects.is_sqlite(self.engine) else "public."
        self.execute(f"CREATE TABLE {self.schema}people (user_id text, value text)")
        self.configure()

    def configure(self, text="", destination='api_key = "k"'):
        path = self.folder / "audience_sync.toml"
        path.write_text(f'[database]\nurl = "{self.url}"\n[destination]\n{destination}\n{text}')
        self.app = App(load(path, {}, resolve_keys=False), self.engine, self.clock)
        self.app.load_keys()
        self.asgi = dashboard(self.app)

    def execute(self, statement, **parameters):
        with engines.write(self.engine) as connection:
            return dialects.sql(connection, statement, **parameters)

    def people(self, *rows):
        """Replace the people: user ids, or pairs of a user id and a value."""
        pairs = [row if isinstance(row, tuple) else (row, None) for row in rows]
        with engines.write(self.engine) as connection:
            dialects.sql(connection, f"DELETE FROM {self.schema}people")
            for user_id, value in pairs:
                insert = f"INSERT INTO {self.schema}people VALUES (:user_id, :value)"
                dialects.sql(connection, insert, user_id=user_id, value=value)

    def sync(self, key="vips", **options):
        """Sync a definition now; return the run's id."""
        self.clock.sleep(60)
        [definition] = self.app.definitions([key])
        return self.app.sync(definition, self.clock.moment, runs.RunOptions(**options))

    def get(self, path, status=200):
        answer = asyncio.run(self._ask(path))
        assert answer.status_code == status, answer.text
        return answer

    async def _ask(self, path):
        transport = httpx.ASGITransport(self.asgi, client=("127.0.0.1", 50_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path)

    def text(self, path, status=200):
        """Text of a page, without tags, with single spaces."""
        return text_of(self.get(path, status).text)

    def as_operator(self, page, path, **parts):
        """HTML of a page for somebody who may operate."""
        name, _, query = path.partition("?")
        scope = {"type": "http", "method": "GET", "path": name, "query_string": query.encode(), "headers": []}
        scope |= {"server": ("127.0.0.1", 80), "path_params": parts}
        with engines.read(self.engine) as connection:
            return page(View(Request(scope), self.app, connection, OPERATOR)).body.decode()

    def users(self, path):
        """User ids on a page and on all that follow it, page by page."""
        pages = []
        while path:
            page = self.get(path).text
            pages.append([html.unescape(user) for user in USER.findall(page)])
            following = LINK.search(page)
            path = following and html.unescape(following[1])
        return pages


def text_of(page):
    """Text of a page's main part, with plain dashes."""
    main = page.partition("<main")[2].partition("</main>")[0]
    text = html.unescape(re.sub(r"<[^>]*>", " ", f"<{main}"))
    return re.sub(r"\s+", " ", re.sub("[\u2212\u2013]", "-", text)).strip()
