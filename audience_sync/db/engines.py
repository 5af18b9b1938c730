"""Connections: transactions that begin as they mean to go on, and the few differences of the databases.

`read` and `write` are the only ways in. On SQLite a write takes the lock when it begins (BEGIN IMMEDIATE),
because a read that turns into a write fails at once whatever the busy timeout (SQLITE_BUSY_SNAPSHOT).
"""

import contextlib
import datetime as dt
import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db.tables import UtcDateTime
from audience_sync.errors import DatabaseError

CHUNK = 500  # ids in a statement
CANCEL_SECONDS = 5.0
Id = TypeVar("Id", int, str)
# Outlasts the longest transaction of ours: the commit of a first sync of several million members.
BUSY_SECONDS = 300
# Where the other side is gone without a word, both sides learn of it within about a minute: the server too, or a
# transaction that nobody is in would hold its locks. Seconds, but tcp_user_timeout: milliseconds in which nobody
# confirms what was sent, which keepalives do not watch.
_POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_POSTGRESQL_OPTIONS = (
    "-c lock_timeout=300s -c idle_in_transaction_session_timeout=1h -c timezone=UTC -c tcp_keepalives_idle=30 "
    "-c tcp_keepalives_interval=10 -c tcp_keepalives_count=3 -c tcp_user_timeout=60000"
)
TEMP = "temp"  # the schema of temporary tables; pg_temp on PostgreSQL


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite is free of the WAL-reset bug (sqlite.org/wal.html#walresetbug).

    Fixed in 3.51.3, and in the branches 3.50.7 and 3.44.6.
    """
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def open_own(url: str, schema: str) -> sa.Engine:
    """The engine of our own database.

    Raises:
        DatabaseError: the driver is missing, or the folder of an SQLite file.

    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _open_sqlite(parsed, **_JSON)
        return engine.execution_options(our="")
    engine = open_postgresql(parsed, **_JSON)
    return engine.execution_options(
        our=f'"{schema}".', schema=schema, schema_translate_map={None: schema, TEMP: "pg_temp"}
    )


def open_postgresql_source(url: sa.URL) -> sa.Engine:
    """A database that is only read; numbers in its JSON are as exact as where it computes with them itself."""
    return open_postgresql(url, json_deserializer=partial(json.loads, parse_float=Decimal))


def open_postgresql(url: sa.URL, **options: Any) -> sa.Engine:
    """An engine whose waits end; where the URL has parameters of its own for that, those hold."""
    arguments = {name: value for name, value in _POSTGRESQL_ARGUMENTS.items() if name not in url.query}
    options_of_url = " ".join(url.normalized_query.get("options", ()))
    try:
        engine = sa.create_engine(
            url,
            **options,
            hide_parameters=True,
            pool_pre_ping=True,
            max_overflow=-1,  # each run that takes long keeps one, and none may keep the others out
            connect_args=arguments | {"options": f"{_POSTGRESQL_OPTIONS} {options_of_url}"},
        )
    except ImportError as error:
        raise DatabaseError(
            "PostgreSQL needs the driver psycopg: pip install 'audience-sync[postgres]'."
        ) from error

    @sa.event.listens_for(engine, "invalidate")
    def leave(raw: Any, _record: Any, _error: BaseException | None) -> None:
        cancel(raw)  # a signal ended the wait for its statement: closing alone would let the statement run on

    return engine


def cancel(raw: Any) -> None:
    """Ask PostgreSQL to end the statement that a connection waits for; nothing where there is none, or no answer."""
    with contextlib.suppress(Exception):
        if raw.info.transaction_status.name == "ACTIVE":
            raw.cancel_safe(timeout=CANCEL_SECONDS)


def document(value: Any) -> str:
    """A value as JSON text."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError):  # whatever msgspec does not write
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def value_of(text: str) -> Any:
    """The value of JSON text that `document` wrote."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return json.loads(text)


_JSON: dict[str, Any] = {"json_serializer": document, "json_deserializer": value_of}


def _open_sqlite(url: sa.URL, **options: Any) -> sa.Engine:
    if url.database and url.database != ":memory:" and not Path(url.database).parent.is_dir():
        raise DatabaseError(
            f"The folder of the database file {url.database} does not exist: create it, or change [database] url."
        )
    _make_private(url.database)
    waits = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = sa.create_engine(url, **options, hide_parameters=True, max_overflow=-1, connect_args=waits)
    journal = "WAL" if wal_is_safe(sqlite3.sqlite_version_info[:3]) else "DELETE"

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin by the event below, DDL included
        for pragma in (
            f"journal_mode = {journal}",
            "synchronous = FULL",
            "foreign_keys = ON",
            "trusted_schema = OFF",
            "cache_size = -32768",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _make_private(database: str | None) -> None:
    """A new file is for its owner alone: it will hold ids of users. What goes wrong, opening it will say."""
    if database and not database.startswith((":", "file:")):
        with contextlib.suppress(OSError):
            os.close(os.open(database, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def is_sqlite(bind: sa.Engine | sa.Connection) -> bool:
    return bind.dialect.name == "sqlite"


def is_among(
    connection: sa.Connection, column: sa.Column[str], values: Iterable[str]
) -> sa.ColumnElement[bool]:
    """IN; of PostgreSQL with one parameter, as each of thousands would cost more than its row."""
    if is_sqlite(connection):
        return column.in_(list(values))
    return column == sa.any_(sa.literal(list(values), postgresql.ARRAY(sa.Text)))


@contextmanager
def read(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that sees one state of the database and changes nothing."""
    with plain_errors(engine), engine.connect() as connection:
        if not is_sqlite(engine):
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with connection.begin():
            yield connection


@contextmanager
def write(engine: sa.Engine) -> Iterator[sa.Connection]:
    with plain_errors(engine), engine.connect() as connection, begin_write(connection):
        yield connection


@contextmanager
def begin_write(connection: sa.Connection) -> Iterator[sa.Connection]:
    """A write transaction on a connection that is kept (for its temporary tables)."""
    connection.execution_options(write=True)
    with connection.begin():
        yield connection


@contextmanager
def plain_errors(engine: sa.Engine) -> Iterator[None]:
    """Turn the driver's errors about our own database into ones that say what to do."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        where = engine.url.render_as_string(hide_password=True)
        raise DatabaseError(
            f"The database {where} cannot be used: {reason(error)}. {advice(error)}"
        ) from error


def reason(error: sa.exc.DBAPIError) -> str:
    """The driver's own words, without the statement and its values; one line.

    Of PostgreSQL's the first: its details quote rows.
    """
    words = getattr(getattr(error.orig, "diag", None), "message_primary", None) or str(error.orig)
    return re.sub(r"\s+", " ", words).strip().rstrip(".")


def advice(error: sa.exc.DBAPIError) -> str:
    text = str(error.orig).lower()
    if "locked" in text or "lock timeout" in text:
        return "Another program holds its lock: close it, and run the command again."
    if "disk is full" in text or "no space left" in text:
        return "Nothing was lost: make room on the disk, and run the command again."
    if "disk i/o error" in text:
        return "Nothing was lost: see whether the disk has room and is well, and run the command again."
    if "readonly" in text or "permission denied" in text or "unable to open" in text:
        return "Give this user the right to write there, or change [database] url."
    if isinstance(error, sa.exc.OperationalError) and (
        error.statement is None or error.connection_invalidated
    ):
        return "Is the server running, and are the address and password in [database] url right?"
    return "Nothing was half done: run the command again when it is mended."


@contextmanager
def copy_in(connection: sa.Connection, statement: str) -> Iterator[Any]:
    """PostgreSQL's COPY FROM STDIN: what to `write` text to. Its errors are SQLAlchemy's, as other statements' are."""
    raw: Any = connection.connection.dbapi_connection
    kind = connection.dialect.loaded_dbapi.Error
    try:
        with raw.cursor() as cursor, cursor.copy(statement) as copy:
            try:
                yield copy
            except Exception:
                raise
            except BaseException:  # a signal: or the COPY would be waited for before it is called off
                cancel(raw)
                raise
    except kind as error:
        is_gone = connection.dialect.is_disconnect(error, raw, None)
        raise sa.exc.DBAPIError.instance(
            statement, None, error, kind, hide_parameters=True, connection_invalidated=is_gone
        ) from error
    except Exception:
        raise
    except BaseException:  # a signal: the COPY may be under way yet, and no other statement could follow
        connection.invalidate()
        raise


def now(connection: sa.Connection) -> dt.datetime:
    """The database's clock: on SQLite that is this machine's."""
    if is_sqlite(connection):
        return dt.datetime.now(dt.UTC)
    moment: dt.datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment.astimezone(dt.UTC)


def sql(connection: sa.Connection, statement: str, **parameters: Any) -> sa.CursorResult[*tuple[Any, ...]]:
    """Run a statement on our tables: `{our}` and `{temp}` stand before their names; lists are for IN."""
    our = connection.get_execution_options()["our"]
    moments = tuple(name for name, value in parameters.items() if isinstance(value, dt.datetime))
    lists = tuple(name for name, value in parameters.items() if isinstance(value, list))
    return connection.execute(_clause(statement, our, is_sqlite(connection), moments, lists), parameters)


@lru_cache(maxsize=512)
def _clause(
    statement: str, our: str, sqlite: bool, moments: tuple[str, ...], lists: tuple[str, ...]
) -> sa.TextClause:
    temp = "temp." if sqlite else "pg_temp."
    clause = sa.text(statement.replace("{our}", our).replace("{temp}", temp))
    return clause.bindparams(
        *(sa.bindparam(name, type_=UtcDateTime) for name in moments),
        *(sa.bindparam(name, expanding=True) for name in lists),
    )


def process_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def open_sqlite_source(url: sa.URL) -> sa.Engine:
    """A file that is only read; a path that leads nowhere is an error, not a new file."""
    engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_SECONDS})

    @sa.event.listens_for(engine, "do_connect")
    def connect(
        _dialect: sa.Dialect, _record: Any, _arguments: Any, options: dict[str, Any]
    ) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(
            f"{Path(url.database or '').absolute().as_uri()}?mode=ro", uri=True, **options
        )
        connection.execute("PRAGMA query_only = ON")
        return connection

    return engine


def chunks(ids: Collection[Id]) -> Iterator[Sequence[Id]]:
    """The ids without repeats, as many as a statement takes well."""
    unique = list(dict.fromkeys(ids))
    return (unique[start : start + CHUNK] for start in range(0, len(unique), CHUNK))
