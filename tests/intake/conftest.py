"""The tracking API: in this process without a network, and its server on a socket in a thread."""

import asyncio
import base64
import contextlib
import re
import signal
import threading
from dataclasses import dataclass

import httpx
import pytest

from audience_sync import settings
from audience_sync.app import App
from audience_sync.db import dialects, engines
from audience_sync.intake import http, server
from audience_sync.intake.writer import Writer
from tests.acceptance.conftest import forker, start  # noqa: F401  (fixtures)
from tests.conftest import SCHEMA
from tests.queue.conftest import HandClock

KEY, OTHER_KEY = "canary-of-the-shop", "canary-of-the-app"
AS_SHOP = {"Authorization": f"Basic {base64.b64encode(f'{KEY}:'.encode()).decode()}"}
ADDRESS = "http://127.0.0.1:8040"
IDENTIFY = {"type": "identify", "userId": "ann", "messageId": "m1", "traits": {"plan": "pro"}}
NO_PATH = "there is no such path: calls go to /v1/batch, and /openapi.json describes the API"
SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here


def accepted(*message_ids):
    return [{"messageId": each, "status": "accepted"} for each in message_ids]


def refusal(answer):
    return answer.status_code, answer.json()


def refused(error):
    return {"success": False, "error": error}


@dataclass
class ApiClient:
    """The API of an application with a clock that is moved by hand."""

    app: App
    clock: HandClock
    api: object

    def __call__(self, method, path, *, address=ADDRESS, **options):
        async def ask():
            transport = httpx.ASGITransport(self.api)
            async with httpx.AsyncClient(transport=transport, base_url=address) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def post(self, path, document, *, headers=AS_SHOP, **options):
        body = {"content": document} if isinstance(document, bytes) else {"json": document}
        return self("POST", f"/v1/{path}", headers=headers, **body, **options)

    def batch(self, *calls, **shared):
        """The verdicts of a batch that is accepted."""
        answer = self.post("batch", {"batch": list(calls), **shared})
        assert (answer.status_code, answer.json()["success"]) == (200, True)
        return answer.json()["calls"]

    def rows(self, table, columns="*"):
        with engines.read(self.app.engine) as connection:
            return dialects.sql(connection, f"SELECT {columns} FROM {{our}}{table} ORDER BY 1").all()


@pytest.fixture
def make_app(url, tmp_path):
    """Makes applications on the test's database; `tracked` is the text of [tracking]."""
    path = tmp_path / "audience_sync.toml"
    opened = []

    def make(tracked=f'write_keys = ["{KEY}", "{OTHER_KEY}"]', clock=None):
        path.write_text(
            f'[database]\nurl = "{url}"\n[destination]\napi_key = "k"\n[tracking]\n{tracked}\n'
            '[[audiences]]\nname = "VIPs"\nsql = "SELECT user_id FROM people"\n'
        )
        opened.append(
            App(settings.load(path, {}), engines.open_own(url, SCHEMA), *([clock] if clock else []))
        )
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def make_api(make_app):
    with contextlib.ExitStack() as stack:

        def make(dashboard=None, **options):
            clock = HandClock()
            app = make_app(clock=clock, **options)
            writer = stack.enter_context(Writer(app))
            return ApiClient(app, clock, http.TrackingApi(app, writer).asgi(dashboard))

        yield make


@pytest.fixture
def api(make_api):
    return make_api()


@pytest.fixture
def serving(make_app):
    """Serves an application, a new one unless it is given, in a thread; gives its (host, port)."""

    @contextlib.contextmanager
    def serve(app=None):
        app = app or make_app()
        with server.listen("127.0.0.1", 0) as listening, Writer(app) as writer:
            running = server.TrackingServer(http.TrackingApi(app, writer).asgi(), app.stop)
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
            address = listening.getsockname()
            thread.start()
            try:
                yield address
            finally:
                app.stop.set()
                thread.join()

    return serve


@contextlib.contextmanager
def served(command, port=0):
    """A process of `serve` as (process, port), killed at the end if it still runs."""
    with command.popen("serve", "--port", str(port)) as process:
        said = process.stdout.readline()
        try:
            yield process, int(re.fullmatch(r"The dashboard is at http://127.0.0.1:(\d+)/, .*\n", said)[1])
        finally:
            process.send_signal(signal.SIGKILL)
