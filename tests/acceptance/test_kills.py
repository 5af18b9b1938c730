"""kill -9 at every named point, on both databases: nothing is lost, and nothing that was told goes back in time."""

import itertools
import json
import os
import random
import signal
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

USERS = [f"u{number:02}" for number in range(60)]
MOVES = (
    30  # users that change between two syncs: at 8 requests at a time, at least three rounds of each point
)
KILLS = [  # of the run's points, the second and third passing are the second and third definition
    "run_started", "run_started:2", "snapshot_computed", "snapshot_computed:3",
    "changes_written", "changes_written:2", "changes_written:3", "run_committed", "run_committed:3",
    "claimed", "claimed:2", "claimed:3", "before_send", "before_send:5", "before_send:17",
    "after_send", "after_send:6", "after_send:19", "settled", "settled:2", "settled:3", "lease_released",
]  # fmt: skip
IN_FLIGHT = 8
CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "sandbox"
identify_per_minute = 1_000_000
[[audiences]]
name = "In"
sql = "SELECT user_id FROM people WHERE is_in = 1"
[[audiences]]
name = "Often in"
sql = "SELECT user_id FROM people WHERE is_in = 1 AND moved > 3"
[[traits]]
name = "Moved"
sql = "SELECT user_id, moved AS value FROM people"
"""


class People:
    """The company's table, and all that was ever true of each user in it."""

    def __init__(self, url):
        self._engine = sa.create_engine(url)
        self._random = random.Random(20260501)
        self._rows = {user: {"is_in": 0, "moved": 0} for user in USERS}
        self.truths = defaultdict(list)
        with self._engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE people (user_id text, is_in integer, moved integer)")
            connection.execute(
                sa.text("INSERT INTO people VALUES (:user_id, :is_in, :moved)"),
                [{"user_id": user, **row} for user, row in self._rows.items()],
            )
        self.note()

    def move(self):
        """Some enter and some leave; `moved` only ever grows."""
        users = self._random.sample(USERS, MOVES)
        for user in users:
            row = self._rows[user]
            self._rows[user] = {"is_in": 1 - row["is_in"], "moved": row["moved"] + 1}
        with self._engine.begin() as connection:
            connection.execute(
                sa.text("UPDATE people SET is_in = 1 - is_in, moved = moved + 1 WHERE user_id = :user_id"),
                [{"user_id": user} for user in users],
            )
        self.note()

    def note(self):
        for user in USERS:
            for key, value in self.now(user).items():
                self.truths[user, key].append(value)

    def now(self, user):
        row = self._rows[user]
        return {
            "in": row["is_in"] == 1,
            "often_in": row["is_in"] == 1 and row["moved"] > 3,
            "moved": row["moved"],
        }

    def close(self):
        self._engine.dispose()


@pytest.fixture
def people(url):
    found = People(url)
    yield found
    found.close()


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(url, tmp_path, sandbox, forker):
    """The command line on a configuration of the test's database and sandbox."""
    path = tmp_path / "audience_sync.toml"
    path.write_text(CONFIGURATION.format(url=url, endpoint=sandbox.url), encoding="utf-8")

    def run(*arguments, crash_at=None):
        environ = os.environ | ({"AUDIENCE_SYNC_CRASH_AT": crash_at} if crash_at else {})
        called = ["--config", str(path), *arguments]
        with forker.start(called, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            said = process.communicate(timeout=100)
        return Ended(process.returncode, *said)

    return run


def test_no_kill_loses_anything_or_turns_it_back(command, people, sandbox):
    assert command("sync").returncode == 0
    for number, point in enumerate(KILLS):
        people.move()
        killed = command("sync", crash_at=point)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
        assert_never_back(people, sandbox, point)
        if number % 2:  # what the killed process left behind is outdated when the next one comes
            people.move()
        again = command("sync")
        assert again.returncode == 0, (point, again.stdout, again.stderr)
        assert_true(people, sandbox, point)
        assert_never_back(people, sandbox, point)
    statuses = Counter(each["status"] for each in json.loads(command("deliveries", "--json").stdout))
    assert statuses.keys() <= {"accepted", "cancelled"}, statuses
    runs = json.loads(command("history", "--json").stdout)
    assert {run["status"] for run in runs} <= {"succeeded", "abandoned"}
    assert all(run["pending_count"] == run["dead_count"] == 0 for run in runs)
    assert repeated_requests(sandbox) <= IN_FLIGHT * len(KILLS)


def assert_true(people, sandbox, point):
    told = sandbox.state.snapshot()["users"]
    for user in USERS:
        properties = {"in": False, "often_in": False} | told[user]["properties"]  # never entered: never told
        assert properties == people.now(user), (point, user)


def assert_never_back(people, sandbox, point):
    """What a user's property was told, repeats aside, came true in this order."""
    for user, lines in sandbox.state.history.items():
        for key in ("in", "often_in", "moved"):
            told = [value for value, _ in itertools.groupby(value for name, value, _ in lines if name == key)]
            true = iter([False, *people.truths[user, key]] if key != "moved" else people.truths[user, key])
            assert all(any(value == each for each in true) for value in told), (point, user, key, told)


def repeated_requests(sandbox):
    """How many requests told a value that the user's property had already."""
    found = set()
    for lines in sandbox.state.history.values():
        last = {}
        for name, value, number in lines:
            if name in last and last[name] == value:
                found.add(number)
            last[name] = value
    return len(found)
