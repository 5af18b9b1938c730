"""Engines, read and write transactions, and database errors that say what to do.

`read` and `write` are the only ways to our own database. On SQLite a write transaction begins with BEGIN IMMEDIATE,
because one that reads before it writes may fail at once, whatever the busy timeout is (SQLITE_BUSY_SNAPSHOT).
"""

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import sqlalchemy as sa

from audience_sync.db.dialects import is_sqlite, set_locally
from audience_sync.db.watch import Watch, cancel
from audience_sync.errors import DatabaseError, DatabaseLocked

# Longer than our longest transaction: the commit of a first sync of several million members.
BUSY_SECONDS = 300
ANSWER_SECONDS = 10  # within which PostgreSQL accepts a connection, and answers on one that was idle
# With these, both sides notice within about a minute that the network is gone. Until then the server keeps the locks of
# the abandoned transaction. tcp_user_timeout (in milliseconds; the others are in seconds) applies to sent data that is
# not acknowledged, which keepalives do not cover.
_POSTGRESQL_ARGUMENTS = {
    "client_encoding": "UTF8",
    "connect_timeout": ANSWER_SECONDS,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_POSTGRESQL_SETTINGS = {
    "lock_timeout": "300s",
    "idle_in_transaction_session_timeout": "1h",
    "timezone": "UTC",
    "default_transaction_isolation": "read committed",
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
# Our statements and times depend on these, so URL and database cannot change them. ISO does not fix the order of day and
# month.
_REQUIRED_SETTINGS = {"datestyle": "ISO", "standard_conforming_strings": "on"}
IDLE_SECONDS = 5.0  # our own connections that were used more recently need no watch, which would be slow
_USED_AT = "used_at"  # in a connection's info: when it was last used, by the monotonic clock
_WATCH = "watch"  # in a connection's info, until it is used for the first time
_POOLED = "is_pooled"  # in a connection's info: it is connected to a pooler such as PgBouncer
_REFUSES_OPTIONS = re.compile("unsupported startup parameter|command-line options", re.IGNORECASE)
# How long a new connection to SQLite may wait for a lock, because its pragmas read the file. None: the default.
_wait_seconds: ContextVar[float | None] = ContextVar("wait_seconds", default=None)
_SQLITE_PRAGMAS = (
    "synchronous = FULL",
    "foreign_keys = ON",
    "trusted_schema = OFF",
    "cache_size = -32768",
    "secure_delete = ON",  # so that nothing is left of erased users; some libraries are built without it
)


def to_json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError):  # such as an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return json.loads(text)


_JSON: dict[str, Any] = {"json_serializer": to_json, "json_deserializer": from_json}


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Return whether this SQLite is free of the WAL-reset bug (sqlite.org/wal.html#walresetbug).

    Fixed in 3.51.3, and in the branches 3.50.7 and 3.44.6.
    """
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def parse_url(text: str) -> sa.URL:
    """Parse a URL and decode all its parts; SQLAlchemy 2.0 leaves host and database percent-encoded, 2.1 the host."""
    url = sa.make_url(text)
    if url.database and sa.make_url("x:///%41").database != "A":
        url = url.set(database=unquote(url.database))
    return url.set(host=unquote(url.host)) if url.host else url


def open_own(url: str, schema: str) -> sa.Engine:
    """Open our own database.

    Raises:
        DatabaseError: the driver is missing, or the folder of an SQLite file.

    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed).execution_options(our="")
    engine = open_postgresql(parsed, IDLE_SECONDS, **_JSON)
    return engine.execution_options(our=f'"{schema}".', schema=schema, schema_translate_map={None: schema})


def open_postgresql(url: sa.URL, idle_seconds: float = 0.0, **options: Any) -> sa.Engine:
    """Open PostgreSQL with time limits on every wait; parameters of the URL take precedence over ours.

    A connection that was used less than `idle_seconds` ago is trusted to answer in time.
    """
    arguments: dict[str, Any] = {
        name: value for name, value in _POSTGRESQL_ARGUMENTS.items() if name not in url.query
    }
    settings = _POSTGRESQL_SETTINGS | _settings(" ".join(url.normalized_query.get("options", ())))
    threshold = url.query.get("prepare_threshold")
    if threshold is not None:
        arguments["prepare_threshold"] = None if threshold == "none" else int(str(threshold))
    try:
        engine = sa.create_engine(
            url.difference_update_query(["options", "prepare_threshold"]),
            **options,
            hide_parameters=True,
            max_overflow=-1,  # a long run keeps one connection, which must not block the others
            connect_args=arguments | {"options": _startup_options(settings)},
        )
    except ImportError as error:
        raise DatabaseError(
            "PostgreSQL needs the driver psycopg: pip install 'audience-sync[postgres]'."
        ) from error

    @sa.event.listens_for(engine, "invalidate")
    def stop_statement(raw: Any, _record: Any, _error: BaseException | None) -> None:
        cancel(raw)  # after a signal; closing the connection would leave the statement running

    _work_through_poolers(engine, settings, is_preparing=threshold is not None)
    _require_answers(engine, idle_seconds)
    return engine


def _require_answers(engine: sa.Engine, idle_seconds: float) -> None:
    """Check each connection before it is used, and close those that do not answer; SQLAlchemy would wait for ever."""

    @sa.event.listens_for(engine, "connect", insert=True)  # before the first statements
    def watch(raw: Any, record: Any) -> None:
        record.info[_WATCH] = Watch(raw, ANSWER_SECONDS)

    @sa.event.listens_for(engine, "checkout")
    def check(raw: Any, record: Any, _proxy: Any) -> None:
        if (watch := record.info.pop(_WATCH, None)) is not None:
            watch.end()  # it has answered
            return
        was_idle = time.monotonic() - record.info.get(_USED_AT, 0.0) >= idle_seconds
        try:
            with Watch(raw, ANSWER_SECONDS) if was_idle else contextlib.nullcontext():
                engine.dialect.do_ping(raw)
        except engine.dialect.loaded_dbapi.Error as error:
            raise sa.exc.InvalidatePoolError from error

    @sa.event.listens_for(engine, "checkin")
    def note(_raw: Any, record: Any) -> None:
        record.info[_USED_AT] = time.monotonic()


def _settings(options: str) -> dict[str, str]:
    """Return the settings of a URL's `options`, whose values escape spaces by a backslash."""
    pairs = re.findall(r"(?:-c\s*|--)([\w.]+)=((?:\\.|[^\s\\])*)", options)
    return {name.lower(): re.sub(r"\\(.)", r"\1", value) for name, value in pairs}


def _startup_options(settings: Mapping[str, str]) -> str:
    escaped = {name: re.sub(r"([\s\\])", r"\\\1", value) for name, value in settings.items()}
    return " ".join(f"-c {name}={value}" for name, value in escaped.items())


def _work_through_poolers(engine: sa.Engine, settings: Mapping[str, str], *, is_preparing: bool) -> None:
    """Make an engine work with a pooler, such as PgBouncer, that gives each transaction another server connection.

    A pooler refuses or drops settings at the start of a connection, so each transaction sets them itself. Statements are
    not prepared, because they would belong to one server connection, unless the URL asks for it (`is_preparing`).
    """

    @sa.event.listens_for(engine, "do_connect")
    def connect(dialect: sa.Dialect, _record: Any, arguments: Any, options: dict[str, Any]) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.Error as error:
            if not _REFUSES_OPTIONS.search(str(error)):
                raise
        options.pop("options", None)  # for all later connections, too
        return dialect.connect(*arguments, **options)

    @sa.event.listens_for(engine, "connect")
    def recognize(raw: Any, record: Any) -> None:
        with raw.transaction(), raw.cursor() as cursor:
            pid = cursor.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()[0]
        record.info[_POOLED] = pid != raw.info.backend_pid  # a pooler reports an invented one
        if record.info[_POOLED] and not is_preparing:
            raw.prepare_threshold = None
        if not record.info[_POOLED]:
            with raw.transaction(), raw.cursor() as cursor:
                for name, value in _REQUIRED_SETTINGS.items():
                    cursor.execute(f"SET {name} = {value}")

    # TCP settings belong to the connections between pooler and server.
    lasting = {name: value for name, value in settings.items() if not name.startswith("tcp_")}
    lasting |= _REQUIRED_SETTINGS

    @sa.event.listens_for(engine, "begin")
    def set_for_transaction(connection: sa.Connection) -> None:
        if is_pooled(connection):
            set_locally(connection, lasting)


def is_pooled(connection: sa.Connection) -> bool:
    """Return whether a pooler, such as PgBouncer, is between this process and PostgreSQL."""
    return bool(connection.info.get(_POOLED))


def reset_settings(connection: sa.Connection) -> None:
    """Undo what functions of a definition changed on PostgreSQL with SET or set_config, such as the search path.

    A pooler's server connections are left alone, because its other clients have settings there.
    """
    if not is_pooled(connection):
        required = "; ".join(f"SET {name} = {value}" for name, value in _REQUIRED_SETTINGS.items())
        connection.exec_driver_sql(f"RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; {required}")


def sqlite_file(url: sa.URL) -> Path:
    """Return the file of a URL, which may be a URI of SQLite."""
    return Path((url.database or "").removeprefix("file:")).absolute()


def sqlite_options(url: sa.URL) -> dict[str, str]:
    """Return the options of a URL that are SQLite's own, and work only in a URI."""
    return {name: str(value) for name, value in url.query.items() if name not in {"timeout", "uri"}}


def _open_sqlite(url: sa.URL) -> sa.Engine:
    if url.database and url.database != ":memory:":
        file = sqlite_file(url)
        if not file.parent.is_dir():
            raise DatabaseError(
                f"The folder of the database file {file} does not exist: create it, or change [database] url."
            )
        if url.query.get("mode", "rwc") == "rwc":  # the other modes do not create a file
            _create_private(file)
        url = _with_options(url, file)
    waits = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = sa.create_engine(
        url,
        **_JSON,
        hide_parameters=True,
        max_overflow=-1,
        pool_use_lifo=True,  # each connection has a cache, which fills when it is used in turn
        connect_args=waits,
    )
    journal = "WAL" if wal_is_safe(sqlite3.sqlite_version_info[:3]) else "DELETE"

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the event below begins transactions, around DDL too
        with waiting_at_most(connection, _wait_seconds.get()):
            for pragma in (f"journal_mode = {journal}", *_SQLITE_PRAGMAS):
                connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _with_options(url: sa.URL, file: Path) -> sa.URL:
    """Return the URL of a file in the form in which SQLite reads its options."""
    if sqlite_options(url):
        return url.set(database=file.as_uri()).update_query_dict({"uri": "true"})
    return url.set(database=str(file)).difference_update_query(["uri"])


def _create_private(file: Path) -> None:
    """Create a missing file for its owner only, as it will contain user ids. Opening it later reports any failure."""
    with contextlib.suppress(OSError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


@contextmanager
def read(engine: sa.Engine, wait_seconds: float | None = None) -> Iterator[sa.Connection]:
    """Begin a transaction that sees one state of the database and changes nothing.

    `wait_seconds`: how long to wait for a lock, which a commit holds on SQLite; None for the default.
    """
    with plain_errors(engine), connected(engine, wait_seconds) as connection:
        if not is_sqlite(engine):
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with connection.begin():
            _limit_lock_waits(connection, wait_seconds)
            yield connection


@contextmanager
def write(engine: sa.Engine, wait_seconds: float | None = None) -> Iterator[sa.Connection]:
    """Begin a write transaction. `wait_seconds`: how long to wait for a lock; None for the default."""
    with plain_errors(engine), connected(engine, wait_seconds) as connection, begin_write(connection):
        _limit_lock_waits(connection, wait_seconds)
        yield connection


def _limit_lock_waits(connection: sa.Connection, seconds: float | None) -> None:
    """Shorten PostgreSQL's lock timeout until the transaction ends, without taking a snapshot."""
    if seconds is not None and not is_sqlite(connection):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(seconds * 1000)}")


@contextmanager
def connected(engine: sa.Engine, wait_seconds: float | None) -> Iterator[sa.Connection]:
    """Open a connection; `wait_seconds` limits how long opening and using it may wait for a lock on SQLite."""
    token = _wait_seconds.set(wait_seconds)
    try:
        opened = engine.connect()
    finally:
        _wait_seconds.reset(token)
    with opened as connection:
        raw = connection.connection.dbapi_connection
        with waiting_at_most(raw, wait_seconds if is_sqlite(engine) else None):
            yield connection


@contextmanager
def waiting_at_most(raw: Any, seconds: float | None) -> Iterator[None]:
    """Shorten SQLite's busy timeout, which also applies to BEGIN and COMMIT."""
    if seconds is None:
        yield
        return
    (usual,) = raw.execute("PRAGMA busy_timeout").fetchone()
    raw.execute(f"PRAGMA busy_timeout = {min(usual, round(seconds * 1000))}")
    try:
        yield
    finally:
        with contextlib.suppress(sqlite3.ProgrammingError):  # a signal closed it
            raw.execute(f"PRAGMA busy_timeout = {usual}")


@contextmanager
def begin(connection: sa.Connection) -> Iterator[sa.Connection]:
    """Begin a transaction, or a savepoint in the one that `one_transaction` began."""
    with connection.begin_nested() if connection.in_transaction() else connection.begin():
        yield connection


@contextmanager
def begin_write(connection: sa.Connection) -> Iterator[sa.Connection]:
    """Begin a write transaction on a connection that stays open after it, for its temporary tables."""
    connection.execution_options(write=True)
    with begin(connection):
        yield connection


@contextmanager
def one_transaction(connection: sa.Connection) -> Iterator[None]:
    """Make the transactions of a block that share temporary tables one transaction, on PostgreSQL.

    A pooler may give the next transaction another server connection, without the tables. On SQLite they stay separate,
    because one transaction would hold the write lock while it computes.
    """
    with contextlib.nullcontext() if is_sqlite(connection) else connection.begin():
        yield


@contextmanager
def plain_errors(engine: sa.Engine) -> Iterator[None]:
    """Convert the driver's errors about our own database to a DatabaseError that says what to do."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        kind = DatabaseLocked if is_locked(error) else DatabaseError
        where = without_secrets(engine.url)
        raise kind(f"The database {where} cannot be used: {reason(error)}. {advice(error)}") from error


def without_secrets(url: sa.URL) -> str:
    """Return a URL without secrets; of its options, only those that say where the database is."""
    place = {name: value for name, value in url.query.items() if name in {"host", "port", "service"}}
    return url.set(query=place).render_as_string(hide_password=True)


def reason(error: sa.exc.DBAPIError) -> str:
    """Return the driver's message on one line, without the statement and its values.

    For PostgreSQL, only the primary message, because the details quote rows.
    """
    message = getattr(getattr(error.orig, "diag", None), "message_primary", None) or str(error.orig)
    if message.startswith("unsafe use of "):  # because of trusted_schema = OFF
        message += f" in a view, by SQLite {sqlite3.sqlite_version}: read the view's own SELECT in its place"
    message = re.sub(r"\s+", " ", message).strip()
    return re.sub(r" Is the server running[^?]*\?$", "", message).rstrip(".")  # libpq asks what `advice` asks


def failure(error: sa.exc.DBAPIError) -> str:
    return f"The database failed: {reason(error)}. {advice(error)}"


def is_locked(error: sa.exc.DBAPIError) -> bool:
    text = str(error.orig).lower()
    return "locked" in text or "lock timeout" in text


def advice(error: sa.exc.DBAPIError) -> str:
    text = str(error.orig).lower()
    if is_locked(error):
        return "Another program holds its lock: close it, and run the command again."
    if "disk is full" in text or "no space left" in text:
        return "Nothing was lost: free some space on the disk, and run the command again."
    if "disk i/o error" in text:
        return "Nothing was lost: check the disk's free space and health, and run the command again."
    if "permission denied for database" in text:  # PostgreSQL, when our schema is created
        return "Grant CREATE on the database to this role, or change [database] url."
    if "readonly" in text or "permission denied" in text or "unable to open" in text:
        return "Allow this user to write there, or change [database] url."
    if isinstance(error, sa.exc.OperationalError) and (
        error.statement is None or error.connection_invalidated
    ):
        return "Is the server running, and are the address and password in [database] url right?"
    return "The transaction was rolled back: fix the cause, and run the command again."
