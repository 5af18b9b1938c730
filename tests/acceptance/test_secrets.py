"""Canary secrets and users pass through every failure; no secret may appear anywhere but in requests to Userpilot.

Everything visible of a command becomes a file in the test's folder: its output, its line in the list of processes,
the tables as text, and the files that it writes itself. All of these are searched.
"""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.acceptance.forking import Forker, Started
from tests.waiting import PATIENCE_SECONDS

KEY = "canary-key/7f3a+b9=="
SECRETS = (b"canary-key", b"canary-password", b"canary-source-password")
USERS = [f"canary-user-{number}" for number in range(70, 80)]
OF_USERS = ("canary-user", "canary-trait")
REPEATED = (  # answers of a server that repeats the request
    f"POST /v1/identify, Authorization: Token {KEY}, user_id canary-user-77, plan canary-trait-88"
)
NOBODY = "http://127.0.0.1:1/"  # no server listens there
CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "${{USERPILOT_API_KEY}}"
identify_per_minute = {per_minute}
[logging]
format = "{form}"
level = "debug"
[defaults]
schedule = "every 1 minute"
[[audiences]]
name = "Vip"
sql = "SELECT user_id FROM people"
[[traits]]
name = "Plan"
sql = "SELECT user_id, plan AS value FROM people"
"""
NONSENSE = '{"identify": {"paused_until": "canary-user-77"}}'  # not a time
BREAKS = {  # statements that break delivery with an error that contains a user, and their remedies
    "sqlite": (
        f"INSERT INTO destination (destination_id, slow_downs) VALUES (1, '{NONSENSE}')",
        "UPDATE destination SET slow_downs = '{}'",
    ),
    "postgresql": (
        "ALTER TABLE audience_sync.deliveries ADD CONSTRAINT mine CHECK (status <> 'sending')",
        "ALTER TABLE audience_sync.deliveries DROP CONSTRAINT mine",
    ),
}
COMPUTING = {  # counts definitions under way
    "sqlite": "SELECT count(*) FROM runs JOIN definitions USING (definition_id) WHERE key = 'slow'",
    "postgresql": (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND state = 'active' "
        "AND starts_with(query, 'INSERT INTO pg_temp.audience_sync_snapshot') AND strpos(query, 'n(i)') > 0"
    ),
}
SHOP = """
[sources.shop]
url = "postgresql+psycopg://reader:canary-source-password@127.0.0.1:1/shop"
[[audiences]]
name = "Far"
source = "shop"
sql = "SELECT user_id FROM people"
"""
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S.*")
# The last line of a command, and its answer to a signal, are not part of the log.
TO_A_PERSON = ("audience-sync: ", "Stopping after the requests in flight.")


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen | Started
    path: Path  # of its output, without the suffix

    @property
    def out(self):
        return self.path.with_suffix(".out").read_text(encoding="utf-8")

    @property
    def err(self):
        return self.path.with_suffix(".err").read_text(encoding="utf-8")

    def until(self, seen):
        """Wait until the text appears, while the process runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not seen():
            assert self.process.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.02)
        self.path.with_suffix(".cmdline").write_bytes(Path(f"/proc/{self.process.pid}/cmdline").read_bytes())

    def until_logged(self, text):
        self.until(lambda: text in self.err)

    def end(self, signal_number=None):
        if signal_number:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=PATIENCE_SECONDS)


@dataclass
class Witness:
    """Runs the command line, and stores everything visible of it below `folder`."""

    folder: Path
    url: str
    environ: dict[str, str]
    forker: Forker
    configuration: Path = Path()
    begun: list[subprocess.Popen | Started] = field(default_factory=list)
    _written: set[Path] = field(default_factory=set)  # by the test
    _numbers: itertools.count = field(default_factory=itertools.count)

    def configure(self, more="", *, endpoint=NOBODY, per_minute=100_000, form="text"):
        text = CONFIGURATION.format(url=self.url, endpoint=endpoint, per_minute=per_minute, form=form)
        self.write("audience_sync.toml", text + more)

    def write(self, name, text):
        """Write a configuration, which commands use from now on."""
        self.configuration = self.folder / name
        self.configuration.write_text(text, encoding="utf-8")
        self._written.add(self.configuration)

    def begin(self, *arguments, **environ):
        path = self.folder / "seen" / f"{next(self._numbers):02}-{arguments[0]}"
        called, cwd = ["--config", str(self.configuration), *arguments], self.folder / "here"
        with path.with_suffix(".out").open("wb") as out, path.with_suffix(".err").open("wb") as err:
            streams = {"stdout": out, "stderr": err}
            # The others are forks: the list of processes shows the forking server's line for them.
            if arguments[0] == "daemon":
                program = [sys.executable, "-m", "audience_sync", *called]
                process = subprocess.Popen(program, cwd=cwd, env=self.environ | environ, **streams)
            else:
                process = self.forker.start(called, self.environ | environ, cwd, **streams)
        path.with_suffix(".cmdline").write_bytes(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        self.begun.append(process)
        return Running(process, path)

    def __call__(self, *arguments, **environ):
        """Run a command and return its exit code."""
        return self.begin(*arguments, **environ).end()

    def together(self, *commands):
        """Run commands at the same time and return their exit codes."""
        return [each.end() for each in [self.begin(*command.split()) for command in commands]]

    def dump(self, engine, backend):
        """Store each of our tables as text."""
        schema = "audience_sync" if backend == "postgresql" else None
        names = sa.inspect(engine).get_table_names(schema=schema)
        assert {"runs", "deliveries", "requests", "calls", "destination"} <= set(names)
        with engine.connect() as connection:
            for name in names:
                rows = connection.exec_driver_sql(f"SELECT * FROM {schema + '.' if schema else ''}{name}")
                text = "\n".join(str(row) for row in rows)
                (self.folder / "seen" / f"table-{name}.txt").write_text(text, encoding="utf-8")

    def assert_silent(self):
        problems = self.leaks()
        assert problems == [], "\n".join(problems)

    def leaks(self):
        """List each file with a secret, and each line of a log that names a user or is malformed."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        problems = [
            f"{path.relative_to(self.folder)} contains {secret.decode()}"
            for path in files
            for secret in SECRETS
            if path not in self._written and secret in path.read_bytes()
        ]
        for path in (path for path in files if path.suffix == ".err"):
            by_itself = path.stem.endswith("-daemon")
            output = path.read_text(encoding="utf-8")
            if "Traceback" in output:
                problems.append(f"{path.name} ends in a traceback: {output.splitlines()[-1]}")
                continue
            for line in output.splitlines():
                if line.startswith(TO_A_PERSON) and not by_itself:
                    continue
                if any(word in line for word in OF_USERS):
                    problems.append(f"{path.name} logs a user: {line}")
                if not LOG_LINE.fullmatch(line) and not is_json_event(line):
                    problems.append(f"{path.name} has a line that is not an event: {line}")
        return problems


def is_json_event(line):
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and event.keys() >= {"at", "level", "logger", "message"}


def events(process, message, *names):
    """Events with this message, from lines of JSON; each has these members."""
    matching = [json.loads(line) for line in process.err.splitlines() if line.startswith("{")]
    matching = [event for event in matching if event["message"] == message]
    assert all(event.keys() >= set(names) for event in matching), matching
    return matching


def struck(sandbox):
    return [fault["struck"] for fault in sandbox.faults.list()]


def scalar(engine, statement):
    with engine.connect() as connection:
        return connection.exec_driver_sql(statement).scalar_one()


@pytest.fixture
def make_witness(tmp_path, environ, forker):
    for name in ("seen", "here", "temporary"):
        (tmp_path / name).mkdir()
    places = {"HOME": str(tmp_path / "here"), "TMPDIR": str(tmp_path / "temporary")}
    made = []

    def make(url):
        made.append(Witness(tmp_path, url, environ | places | {"USERPILOT_API_KEY": KEY}, forker))
        return made[-1]

    yield make
    for process in (process for each in made for process in each.begun if process.poll() is None):
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def witness(make_witness, url, company, sandbox):
    """A witness on a database whose URL contains a password, with a table of users and the sandbox's key."""
    company("CREATE TABLE people (user_id text, plan text)")
    company("INSERT INTO people VALUES (:user, 'canary-trait-88')", *[{"user": user} for user in USERS])
    sandbox.state.api_key = KEY
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(username=parsed.username or "postgres", password="canary-password")
    return make_witness(parsed.render_as_string(hide_password=False))


def test_answers_that_repeat_the_request(witness, sandbox, engine, backend):
    witness.configure(endpoint=sandbox.url, form="json")
    error = {"errors": [{"message": REPEATED, "details": REPEATED}]}

    sandbox.faults.add({"path": "/v1/identify", "status": 403, "body": REPEATED})
    sandbox.faults.add({"path": "/v1/*", "status": 401, "body": error})
    assert witness.together("sync", "check", "forget canary-user-77") == [1, 2, 1]

    sandbox.faults.clear()
    with_key = {"location": f"{sandbox.url}?key={KEY}", "x-request-id": KEY}
    for user, fault in {
        "canary-user-70": {"status": 400, "body": error, "times": None},
        "canary-user-71": {"status": 429, "body": error},
        "canary-user-72": {"status": 500, "body": REPEATED},
        "canary-user-73": {"garbage": True},
        "canary-user-74": {"drop": "before"},
        "canary-user-75": {"drop": "after"},
        "canary-user-76": {"status": 307, "body": REPEATED, "headers": with_key},
        "canary-user-77": {"status": 200, "body": f"<html>{REPEATED}</html>"},
        "canary-user-78": {"status": 502, "body": {"repeated": [REPEATED]}, "headers": with_key},
    }.items():
        sandbox.faults.add({"path": "/v1/identify", "user_id": user, "times": 1} | fault)
    delivering = witness.begin("deliver")
    delivering.until(lambda: struck(sandbox) == [3, 1, 1, 1, 1, 1, 1, 1, 1])
    assert delivering.end(signal.SIGTERM) == 1  # it would wait for the next attempts

    sandbox.faults.clear()
    sandbox.faults.add({"path": "/v1/*", "status": 400, "body": error})
    assert witness.together(
        "retry --all-dead",
        "identify canary-user-77 --trait plan=canary-trait-88 --no-deliver",
        "track canary-user-77 canary-trait-89 --property plan=canary-trait-88 --no-deliver",
    ) == [0, 0, 0]
    submitted = ("canary-user-77", "canary-user-company", "--trait", "plan=canary-trait-88")
    grouping = witness.begin("group", *submitted)
    grouping.until(lambda: struck(sandbox)[0] >= 5)
    assert grouping.end(signal.SIGTERM) == 1
    assert witness.together("status", "show 1", "history", "user canary-user-70") == [0, 0, 0, 0]
    witness.dump(engine, backend)
    deliveries = (witness.folder / "seen" / "table-deliveries.txt").read_text(encoding="utf-8")
    assert "Authorization: Token [API key], user_id canary-user-77" in deliveries
    witness.assert_silent()


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_key_that_is_repeated_in_another_spelling(witness, sandbox, engine, backend):
    witness.configure(endpoint=sandbox.url)
    for user, body in {
        "canary-user-70": r'{"request": {"Authorization": "Token canary-key\/7f3a+b9=="}}',
        "canary-user-71": r'{"request": {"Authorization": "Token canary-key/7f3a+b9\u003d\u003d"}}',
        "canary-user-72": "no route: /?token=canary-key%2F7f3a%2Bb9%3D%3D",
    }.items():
        sandbox.faults.add({"user_id": user, "status": 400, "body": body})
    assert witness("sync", "vip") == 1
    assert struck(sandbox) == [1, 1, 1]
    witness.dump(engine, backend)
    witness.assert_silent()


def test_definitions_that_fail(witness, sandbox, engine, backend):
    queries = {
        "No table": "SELECT user_id FROM peopel WHERE plan = 'canary-trait-88'",
        "No query": "DELETE FROM people WHERE user_id = 'canary-user-77' RETURNING user_id",
        "No number": "SELECT user_id FROM people WHERE CAST(plan AS integer) = 7",
        "No column": "SELECT plan FROM people",
    }
    more = "".join(f'[[audiences]]\nname = "{name}"\nsql = "{query}"\n' for name, query in queries.items())
    witness.configure(SHOP + more, endpoint=sandbox.url, form="json")
    syncing = witness.begin("sync")
    assert syncing.end() == 1
    failed = {event["key"] for event in events(syncing, "run failed", "run_id", "seconds", "error")}
    assert failed - {"no_number"} == {"far", "no_table", "no_query", "no_column"}
    assert ("no_number" in failed) == (backend == "postgresql")  # its error quotes canary-trait-88
    counts = ("run_id", "key", "seconds", "entered", "exited", "changed")
    assert [
        {name: event[name] for name in ("level", *counts) if name != "seconds"}
        for event in events(syncing, "run succeeded", *counts)
        if event["key"] != "no_number"
    ] == [
        {"level": "info", "run_id": 1, "key": "vip", "entered": 10, "exited": 0, "changed": 0},
        {"level": "info", "run_id": 7, "key": "plan", "entered": 10, "exited": 0, "changed": 0},
    ]
    assert witness.together("check", "plan far", "show 2") == [2, 1, 0]
    witness.dump(engine, backend)
    witness.assert_silent()


def test_signals(witness, sandbox, engine, backend):
    witness.configure(endpoint=sandbox.url)
    sandbox.stop()
    syncing = witness.begin("sync")
    syncing.until_logged("lane slows down lane=identify")
    assert syncing.end(signal.SIGINT) == 1
    sandbox.start()
    witness.configure(endpoint=sandbox.url, per_minute=30, form="json")
    delivering = witness.begin("deliver")
    delivering.until(lambda: sandbox.state.snapshot()["users"])
    assert delivering.end(signal.SIGTERM) == 1
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS user_id FROM n"
    witness.configure(f'[[audiences]]\nname = "Slow"\nsql = "{slow}"\n', endpoint=sandbox.url)
    syncing = witness.begin("sync", "vip", "plan", "slow")
    syncing.until(lambda: scalar(engine, COMPUTING[backend]))
    assert syncing.end(signal.SIGTERM) == 1
    witness.dump(engine, backend)
    witness.assert_silent()


def test_crashes(witness, sandbox, company, engine, backend):
    witness.configure(endpoint=sandbox.url)
    for point in ("changes_written", "after_send"):
        assert witness("sync", AUDIENCE_SYNC_CRASH_AT=point) == -signal.SIGKILL
        witness.dump(engine, backend)
        witness.assert_silent()  # including files of the dead process, such as its journal
    our = engine.get_execution_options()["our"]
    company(f"INSERT INTO {our}destination (destination_id, slow_downs) VALUES (1, '{NONSENSE}')")
    broken = witness.begin("deliver")
    assert broken.end() == 1
    assert "audience-sync: an unexpected error: ValueError (pace.py" in broken.err
    assert "Traceback" not in broken.err
    witness.dump(engine, backend)
    if backend == "sqlite":
        engine.dispose()
        (witness.folder / "own.db").write_bytes(b"this is no database" * 1000)
    else:
        company(f"DROP TABLE {our}deliveries CASCADE")
    assert witness.together("sync", "status") == [2, 2]
    witness.assert_silent()


def test_daemon(witness, sandbox, company, engine, backend):
    our = engine.get_execution_options()["our"]
    witness.configure(SHOP, endpoint=sandbox.url)
    assert witness("sync", "--no-deliver") == 1  # the source is down
    company("DELETE FROM people WHERE user_id = 'canary-user-70'")
    company(f"UPDATE {our}definitions SET created_at = '2026-01-01 00:00:00'")  # slots are due since then
    breaks, mends = BREAKS[backend]
    company(breaks)

    daemon = witness.begin("daemon")
    daemon.until_logged("WARNING run failed run_id=")
    vip = r"INFO run succeeded run_id=\d+ key=vip members=9 entered=0 exited=1 changed=0 seconds=[\d.]+\n"
    daemon.until(lambda: re.search(vip, daemon.err))
    daemon.until_logged({"sqlite": "ERROR delivery crashed", "postgresql": "ERROR failed error="}[backend])

    good = witness.configuration.read_text(encoding="utf-8")
    without_quotes = good.replace('"${USERPILOT_API_KEY}"', KEY)
    elsewhere = good.replace(witness.url, "postgresql+psycopg://u:canary-password@127.0.0.1:1/x")
    for number, bad in enumerate((without_quotes, elsewhere), 1):
        witness.write("audience_sync.toml", bad)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.until(lambda count=number: daemon.err.count("configuration refused") == count)

    repeated = {"errors": [{"message": REPEATED}]}
    sandbox.faults.add({"path": "/v1/identify", "status": 500, "times": 8, "body": repeated})
    sandbox.faults.add({"path": "/v1/*", "status": 401, "body": repeated})
    company(mends)
    daemon.until_logged("the destination is stopped: HTTP 401")

    sandbox.faults.clear()
    witness.configure(SHOP, endpoint=sandbox.url, form="json")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until(lambda: events(daemon, "configuration reloaded", "definitions"))
    daemon.until(lambda: events(daemon, "delivered", "accepted", "dead", "pending", "requests"))
    assert daemon.end(signal.SIGTERM) == 0
    assert len(events(daemon, "daemon stopped")) == 1
    witness.dump(engine, backend)
    witness.assert_silent()


@pytest.fixture
def refused(make_witness, tmp_path):
    """Runs a command with each changed configuration; checks for exit code 2 and no secret."""
    witness = make_witness(f"sqlite:///{tmp_path}/own.db")
    good = SHOP + CONFIGURATION.format(url=witness.url, endpoint=NOBODY, per_minute=600, form="text")

    def run(command, *changes, key=KEY):
        running = []
        for number, (old, new) in enumerate(changes):
            assert good.count(old) == 1, old
            witness.write(f"{number}.toml", good.replace(old, new))
            running.append(witness.begin(command, USERPILOT_API_KEY=key))
            if len(running) > 1:
                running[-2].end()
        codes = {change: each.end() for change, each in zip(changes, running, strict=True)}
        ended_otherwise = [f"exit code {code}: {change}" for change, code in codes.items() if code != 2]
        problems = witness.leaks() + ended_otherwise
        assert problems == [], "\n".join(problems)

    return run


def test_configurations_with_a_secret_next_to_the_mistake(refused):
    variable = '"${USERPILOT_API_KEY}"'
    refused(
        "deliver",
        (NOBODY, "https://elsewhere.example/"),
        (NOBODY, "https://u:canary-password@analytex.userpilot.io/"),
        (variable, KEY),
        (variable, f'"{KEY}'),
        (variable, f'"{KEY}"\napi_key = "{KEY}"'),
        (variable, f'"${{{KEY}}}"'),
        (variable, f'"{KEY}"\nkey_api = "{KEY}"'),
        ("= 600", '= "canary-password"'),
    )


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}é"])
def test_invalid_keys(refused, key):
    refused("deliver", ("= 600", "= 500"), key=key)


def test_database_urls_with_a_password(refused):
    at, scheme = 'url = "sqlite:', "postgresql+psycopg://"
    refused(
        "status",
        *[
            (at, f'url = "{address}" # ')
            for address in (
                "mysql://u:canary-password@127.0.0.1:1/x",
                f"{scheme}u:canary-password@127.0.0.1:1/x",
                f"{scheme}u:canary-password127.0.0.1:1/x",
                f"{scheme}u:head@canary-password@127.0.0.1:1/x",
                f"{scheme}127.0.0.1:1/x?user=u&password=canary-password",
            )
        ],
    )


def test_source_urls_with_a_password(refused):
    at, scheme = (
        "postgresql+psycopg://reader:canary-source-password@127.0.0.1:1/shop",
        "postgresql+psycopg://",
    )
    refused(
        "check",
        (at, at),
        (at, f"{scheme}u:canary-source-password127.0.0.1:1/x"),
        (at, f"{scheme}u:head@canary-source-password@127.0.0.1:1/x"),
        (at, f"{scheme}127.0.0.1:1/x?user=u&password=canary-source-password"),
    )
