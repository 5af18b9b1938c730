"""Upgrades from an earlier version with unfinished work, and with a kill at each statement."""

import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from tests.acceptance.conftest import clean
from tests.acceptance.faults import EVERYONE, USERS, users_in, wanted


@pytest.fixture(autouse=True)
def _each_statement(monkeypatch):
    monkeypatch.setenv("KILLED_STATEMENTS_STEP", "1")


@pytest.fixture
def url(empty_url):
    return empty_url


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The last version with only the first migration, installed outside the checkout."""
    folder = tmp_path_factory.mktemp("earlier")
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    second = subprocess.run(
        [*git, "log", "--format=%H", "--diff-filter=A", "--", "migrations/versions/0002_operating.py"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    with (folder / "source.tar").open("wb") as file:
        subprocess.run([*git, "archive", f"{second}~1"], stdout=file, check=True)
    with tarfile.open(folder / "source.tar") as archive:
        archive.extractall(folder / "source", filter="data")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    wheel = [
        *pip,
        "wheel",
        str(folder / "source"),
        *offline,
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    subprocess.run(wheel, check=True)
    subprocess.run(
        [*pip, "install", *offline, "--target", str(folder / "installed"), *folder.glob("*.whl")], check=True
    )
    return folder / "installed"


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("killed_at", ["claimed:3", "after_send:20"])
def test_work_under_way_survives_an_upgrade(start, sandbox, earlier, tmp_path, killed_at):
    command = start({"In": EVERYONE})
    program = [sys.executable, "-P", "-m", "audience_sync", "--config", str(command.path)]
    before = clean() | {"PYTHONPATH": str(earlier)}

    def old(*arguments, **environ):
        return subprocess.run(
            [*program, *arguments],
            env=before | environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    assert "0001" in old("db", "upgrade").stdout
    killed = old("sync", AUDIENCE_SYNC_CRASH_AT=killed_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len(users_in(sandbox)) < USERS
    code, output = command("deliver")
    assert (code, "audience-sync db upgrade" in output) == (2, True), output
    assert command("db", "upgrade")[0] == 0
    statuses = Counter(each["status"] for each in command.document("deliveries"))
    assert sum(statuses.values()) == USERS
    assert statuses["pending"] + statuses["sending"] >= USERS - len(users_in(sandbox))
    code, output = command("deliver")
    assert code == 0, output
    assert users_in(sandbox) == wanted(range(USERS))
    code, output = command("sync")
    assert code == 0, output
    runs = command.document("history")[::-1]
    assert [(run["mode"], run["status"], run["member_count"]) for run in runs] == [
        ("first", "succeeded", USERS),
        ("changes", "succeeded", USERS),
    ]
    assert old("sync").returncode == 2  # the old version refuses the new database
