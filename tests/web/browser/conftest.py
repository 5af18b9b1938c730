"""Chromium, and `serve` on both databases with the same data. See scene.py for the data."""

import fcntl
import os
import shutil
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from tests.conftest import SCHEMA
from tests.tools import required
from tests.web.browser import running, scene
from tests.web.conftest import PASSWORD, USERS

ONE_DATABASE = pytest.mark.parametrize("site", ["sqlite"], indirect=True)  # where they do not differ
PATIENCE_MS = 60_000  # for any step, on a busy machine
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """A folder with the configuration and the databases, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, is_made = shared / "scene", shared / "scene is made"
    with (shared / "scene.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made.exists():
            scene.make(folder)
            is_made.touch()
    return folder


@dataclass
class Site:
    """A running `serve`, and its database."""

    address: str
    engine: sa.Engine
    ids: dict[str, int]  # of some runs and requests
    checked: list[str] = field(default_factory=list)  # kinds of links that were followed


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def site(request, scene_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"site-{request.param}")
    shutil.copytree(scene_folder, folder, dirs_exist_ok=True)
    path, url = folder / "audience_sync.toml", f"sqlite:///{folder}/audience_sync.db"
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        name = server.create(request.getfixturevalue("_postgres_template"))
        server.created.remove(name)  # it stays
        sqlite_url, url = url, server.url(name)
        path.write_text(path.read_text().replace("sqlite:///audience_sync.db", url))
    path.write_text(path.read_text() + USERS)
    engine = engines.open_own(url, SCHEMA)
    if request.param == "postgresql":
        scene.copy_rows(sqlite_url, engine)
    with running.served(path) as address:
        yield Site(address, engine, scene.interesting_ids(engine))
    engine.dispose()


@pytest.fixture(scope="module")
def browser():
    """Chromium. Of a module, because Playwright's event loop would be in the way of other tests' loops."""
    executable = required("chromium", "install Debian's package chromium")
    with running.chromium(executable) as browser:
        yield browser


class Tabs:
    """Tabs of users who are signed in, and the errors that the browser reports in them."""

    def __init__(self, browser, site):
        self.complaints = []
        self._browser, self._site, self._lasting = browser, site, {}

    def open(self, user="olga", **options):
        """Open a tab in a new context; `options` are those of the context."""
        context = self._browser.new_context(base_url=self._site.address, **{"viewport": DESKTOP} | options)
        context.set_default_timeout(PATIENCE_MS)
        if user:
            form, headers = {"name": user, "password": PASSWORD}, {"Origin": self._site.address}
            assert context.request.post("/login", form=form, headers=headers, max_redirects=0).status == 303
        tab = context.new_page()
        tab.on("console", lambda message: self._complain(f"console {message.type}: {message.text}"))
        tab.on("pageerror", lambda error: self._complain(f"error: {error}"))
        tab.on("requestfailed", self._complain_of_request)
        tab.on("dialog", lambda dialog: (self._complain(f"dialog: {dialog.message}"), dialog.dismiss()))
        return tab

    def lasting(self, **options):
        """Return the tab of a user with these options that the tests of a module share."""
        name = str(options)
        if name not in self._lasting:
            self._lasting[name] = self.open(**options)
        tab = self._lasting[name]
        tab.set_viewport_size(DESKTOP)
        tab.emulate_media(media="screen", color_scheme="light")
        return tab

    def _complain_of_request(self, request):
        if request.failure != "net::ERR_ABORTED":  # as what a page still loads when it is left
            self._complain(f"no answer: {request.url}, {request.failure}")

    def _complain(self, complaint):
        self.complaints.append(complaint)


@pytest.fixture(scope="module")
def _tabs_of_module(browser, site):
    return Tabs(browser, site)


@pytest.fixture
def tabs(_tabs_of_module):
    """Opens tabs; at the end of the test, the browser may have reported no error in them."""
    yield _tabs_of_module
    complaints = list(_tabs_of_module.complaints)
    _tabs_of_module.complaints.clear()
    assert complaints == []


@pytest.fixture
def tab(tabs):
    return tabs.lasting()
