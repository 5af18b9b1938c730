"""The command line as real processes, with a database, a sandbox and a configuration for each test."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.acceptance.faults import cutting, here, own_server, people, through  # noqa: F401  (fixtures)
from tests.acceptance.forking import Forker


@dataclass(frozen=True)
class Command:
    """`audience-sync` with a configuration; its output is never a traceback."""

    path: Path
    forker: Forker

    def __call__(self, *arguments, **options):
        """Run a command; return its exit code and output."""
        return self.ended(self.popen(*arguments, **options))

    def document(self, *arguments):
        with self.popen(*arguments, "--json") as process:
            return json.loads(process.communicate(timeout=100)[0])

    def popen(self, *arguments, environ=None, **options):
        called = ["--config", str(self.path), *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        environ = clean() | (environ or {})
        if "preexec_fn" not in options:
            return self.forker.start(called, environ, **streams)
        program = [sys.executable, "-m", "audience_sync", *called]
        return subprocess.Popen(program, env=environ, text=True, **streams)

    @staticmethod
    def ended(process):
        with process:
            output = "".join(filter(None, process.communicate(timeout=100)))
        assert "Traceback" not in output
        return process.returncode, output


def clean():
    """The environment without variables that change our configuration."""
    return {
        name: value
        for name, value in os.environ.items()
        if "AUDIENCE_SYNC" not in name and "USERPILOT" not in name
    }


@pytest.fixture
def environ():
    return clean()


@pytest.fixture
def company(url):
    """Runs statements on the company's tables, which are in the same database as ours."""
    engine = sa.create_engine(url)

    def execute(statement, *rows):
        with engine.begin() as connection:
            if rows:
                connection.execute(sa.text(statement), rows)
            else:
                connection.exec_driver_sql(statement)

    yield execute
    engine.dispose()


@pytest.fixture(scope="session")
def forker():
    running = Forker()
    yield running
    running.close()


@pytest.fixture(scope="session")
def forkers(forker):
    """One forker for each scene that runs at the same time."""
    more = [Forker(forker) for _ in range(3)]
    yield [forker, *more]
    for one in more:
        one.close()


@pytest.fixture
def new_url(backend, tmp_path, request):
    """new_url() creates a database without tables and returns its URL."""
    if backend == "sqlite":
        numbers = itertools.count()
        return lambda: f"sqlite:///{tmp_path}/{next(numbers)}.db"
    server = request.getfixturevalue("postgres")
    return lambda: server.url(server.create())


@pytest.fixture
def start(url, tmp_path, sandbox, forker):
    """start(audiences, ...) writes a configuration with this SQL by name, and returns its Command."""
    path = tmp_path / "audience_sync.toml"

    def write(audiences, extra="", key="sandbox", source=None, **destination):
        lines = ["[database]", f'url = "{url}"', "[destination]", f'api_key = "{key}"']
        destination = {"endpoint": sandbox.url, "identify_per_minute": 100_000} | destination
        lines += [f"{name} = {json.dumps(value)}" for name, value in destination.items()]
        lines.append(extra)
        for name, query in audiences.items():
            lines += ["[[audiences]]", f'name = "{name}"', f"sql = {json.dumps(query)}"]
            lines += [f'source = "{source}"'] if source and name == "Far" else []
        path.write_text("\n".join(lines), encoding="utf-8")
        return Command(path, forker)

    return write
