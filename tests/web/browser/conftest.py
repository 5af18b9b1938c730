"""Chromium, and `serve` on both databases with the same data. See scene.py for the data."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa
from playwright.sync_api import sync_playwright

from audience_sync.db import engines
from tests.acceptance.conftest import clean
from tests.conftest import SCHEMA
from tests.tools import required
from tests.web.browser import scene
from tests.web.conftest import PASSWORD, USERS

QUIET = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)
PATIENCE_MS = 60_000  # for whatever a busy machine is asked to do
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
    checked: list[str] = field(default_factory=list)  # kinds of links that were followed


@contextlib.contextmanager
def served(configuration):
    command = [sys.executable, "-m", "audience_sync", "--config", str(configuration), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean()) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        finally:
            process.kill()


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
    with served(path) as address:
        yield Site(address, engine)
    engine.dispose()


@pytest.fixture(scope="module")
def browser():
    """Chromium. Of a module, because Playwright's event loop would be in the way of other tests' loops."""
    executable = required("chromium", "install Debian's package chromium")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*QUIET.split(), *root])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser, site):
    """open_tab(...) opens a tab of a user who is signed in; at the end, none of the tabs may have complained."""
    with contextlib.ExitStack() as stack:
        complaints = []

        def open_tab(user="olga", **options):
            context = stack.enter_context(
                browser.new_context(base_url=site.address, **{"viewport": DESKTOP} | options)
            )
            context.set_default_timeout(PATIENCE_MS)
            if user:
                form, headers = {"name": user, "password": PASSWORD}, {"Origin": site.address}
                assert (
                    context.request.post("/login", form=form, headers=headers, max_redirects=0).status == 303
                )
            tab = context.new_page()
            tab.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
            tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            tab.on("requestfailed", lambda request: complaints.append(f"no answer: {request.url}"))
            tab.on(
                "dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss())
            )
            return tab

        yield open_tab
    assert complaints == []


@pytest.fixture
def tab(open_tab):
    return open_tab()
