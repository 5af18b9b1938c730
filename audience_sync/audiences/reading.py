"""Run a definition's query in a transaction with a deadline, which the database itself keeps read-only."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import postgresql_values
from audience_sync.audiences.definition import Definition
from audience_sync.db import dialects, engines
from audience_sync.db.watch import Watch
from audience_sync.errors import DefinitionError, Interrupted, SourceError
from audience_sync.stopping import Stop

PREVIEW_LOCK_SECONDS = 5  # how long a preview waits for a lock
LATE_SECONDS = 1.0  # PostgreSQL's own timeout should end a statement before we do
CLIENT_CHECK_SECONDS = 5  # how often PostgreSQL checks whether our process is still connected
# Steps of SQLite's virtual machine between checks of the deadline: a few milliseconds.
PROGRESS_STEPS = 20_000
_QUERY_ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
# SQLite requests these when a query first uses a virtual table, such as json_each or an FTS5 table. It refuses
# statements that change its schema table.
_VIRTUAL_TABLE_ACTIONS = {(sqlite3.SQLITE_UPDATE, "sqlite_master"), (sqlite3.SQLITE_PRAGMA, "data_version")}
_DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

# Errors that the definition did not cause: SQLSTATE classes (connection, conflict, resources, operator, system), SQLite's
# codes.
_CANCELLED = ("57014", "25P02")  # 25P02: an earlier statement was cancelled, and its error was ignored
_MISSING_TABLE = "42P01"
_NO_PRIVILEGE = "42501"
_CONFLICT = "40"  # class: such as a replica that must apply a change of the rows that are read
# 55P03: a lock was not released in time; XX001 and XX002: damaged files. Extensions such as PostGIS raise XX000 for values.
_SERVER_STATES = ("08", _CONFLICT, "53", "55P03", "57", "58", "XX001", "XX002")
_SERVER_CODES = ("FULL", "IOERR", "BUSY", "LOCKED", "CORRUPT", "NOTADB", "CANTOPEN", "NOMEM", "READONLY")


@dataclass(frozen=True, slots=True)
class BoundQuery:
    """One of a definition's queries, checked and bound; `text` and `arguments` are in the driver's style."""

    definition: Definition
    name: str
    text: str
    arguments: Any
    columns: tuple[str, ...]  # the columns that it must return
    conversions: tuple[str, ...]  # conversions of a trait's values, in this order (values.py)
    source: sa.Engine | None
    deadline: float  # monotonic seconds
    stop: Stop


def lock_seconds(definition: Definition) -> float | None:
    """Return how long a definition waits for a lock; None for the default."""
    return PREVIEW_LOCK_SECONDS if definition.is_preview else None


def execute_query(
    connection: sa.Connection, text: str, query: BoundQuery
) -> sa.CursorResult[*tuple[Any, ...]]:
    if query.stop.is_set():
        raise Interrupted("The process was asked to stop.")
    return connection.exec_driver_sql(text, query.arguments or None)


def begin_reading(
    connection: sa.Connection, query: BoundQuery
) -> contextlib.AbstractContextManager[sa.Connection]:
    """Begin a read-only transaction, on the query's source or on `connection` to our own database."""
    return _reading_own(connection, query) if query.source is None else _reading_source(query)


@contextmanager
def _reading_own(connection: sa.Connection, query: BoundQuery) -> Iterator[sa.Connection]:
    """Begin a transaction (or a part of one) in which PostgreSQL writes only to temporary tables."""
    with (
        engines.begin(connection),
        _translated_errors(query),
        _watched(connection, query),
        _limits(connection, query),
    ):
        if not dialects.is_sqlite(connection):
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        yield connection
        if not dialects.is_sqlite(connection):
            engines.reset_settings(connection)


@contextmanager
def _reading_source(query: BoundQuery) -> Iterator[sa.Connection]:
    """Open a read-only transaction on the source, in which all statements see the same state."""
    source = query.source
    assert source is not None  # noqa: S101  (the caller checked)
    with _translated_errors(query), source.connect() as reading, _watched(reading, query):
        if source.dialect.name == "postgresql":
            reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with reading.begin() as transaction:
            with _limits(reading, query):
                yield reading
            transaction.rollback()  # undoes the settings that a function changed, too


def authorize(connection: sa.Connection, query: BoundQuery) -> None:
    """Prepare the query under an authorizer that allows only reading (SQLite only)."""
    if not dialects.is_sqlite(connection):
        return
    raw: Any = connection.connection.dbapi_connection
    refused: list[str] = []

    def authorizer(action: int, argument: str | None, name: str | None, *_: object) -> int:
        is_denied = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS
        is_allowed = action in _QUERY_ACTIONS or (action, argument) in _VIRTUAL_TABLE_ACTIONS
        if is_allowed and not is_denied:
            return sqlite3.SQLITE_OK
        refused.append(str(name or argument or action))
        return sqlite3.SQLITE_DENY

    raw.set_authorizer(authorizer)
    try:
        execute_query(connection, f"EXPLAIN {query.text}", query).close()
    except sa.exc.DBAPIError as error:
        if not refused:
            raise
        raise DefinitionError(
            f"{query.definition.key}: a definition may only read, and this one does more ({refused[0]})."
        ) from error
    finally:
        with _ignoring_closed():
            raw.set_authorizer(None)


def _ignoring_closed() -> contextlib.AbstractContextManager[None]:
    """Ignore the error when a signal closed SQLite's connection during a statement."""
    return contextlib.suppress(sqlite3.ProgrammingError)


@contextmanager
def _watched(connection: sa.Connection, query: BoundQuery) -> Iterator[None]:
    """End what PostgreSQL does not end itself soon after the deadline, or when the process is asked to stop."""
    if connection.dialect.name != "postgresql":
        yield
        return
    raw: Any = connection.connection.dbapi_connection
    left = max(0.0, query.deadline - time.monotonic())
    watch = Watch(raw, left + LATE_SECONDS, keeps_idle=True)
    with watch, query.stop.interrupting(watch.wake):
        yield


@contextmanager
def _limits(connection: sa.Connection, query: BoundQuery) -> Iterator[None]:
    """Interrupt a statement, also while it waits for a lock, at the deadline or when the process is asked to stop."""
    raw: Any = connection.connection.dbapi_connection
    deadline, stop = query.deadline, query.stop
    left, lock_wait = max(0.0, deadline - time.monotonic()), lock_seconds(query.definition)
    match connection.dialect.name:
        case "sqlite":
            raw.set_progress_handler(lambda: stop.is_set() or time.monotonic() > deadline, PROGRESS_STEPS)
            try:
                with engines.waiting_at_most(raw, left if lock_wait is None else min(left, lock_wait)):
                    yield
            finally:
                with _ignoring_closed():
                    raw.set_progress_handler(None, 0)
        case "postgresql":
            raw.prepare_threshold = None  # a prepared statement fails after the type of a column was changed
            settings = postgresql_values.SETTINGS | {"statement_timeout": str(max(1, int(left * 1000)))}
            if lock_wait is not None:
                settings["lock_timeout"] = f"{lock_wait}s"
            try:
                with dialects.with_settings(connection, settings):
                    _end_with_our_process(connection)
                    yield
            except Interrupted:
                connection.invalidate()
                raise
        case _:
            yield


def _end_with_our_process(connection: sa.Connection) -> None:
    """Make PostgreSQL (14 and later, not on Windows) end the statement if this process dies."""
    with contextlib.suppress(sa.exc.DBAPIError), connection.begin_nested():
        connection.exec_driver_sql(
            f"SELECT pg_catalog.set_config(name, '{CLIENT_CHECK_SECONDS}s', true) FROM pg_catalog.pg_settings "
            "WHERE name = 'client_connection_check_interval'"
        )


@contextmanager
def _translated_errors(query: BoundQuery) -> Iterator[None]:
    """Turn a driver's error into a DefinitionError or SourceError; errors of our own database pass unchanged."""
    definition = query.definition
    try:
        yield
    except sa.exc.DBAPIError as error:
        reason = engines.reason(error)
        if query.stop.is_set():
            raise Interrupted("The process was asked to stop.") from error
        late_seconds = time.monotonic() - query.deadline
        is_cancelled = getattr(error.orig, "sqlstate", None) in _CANCELLED
        if (is_cancelled and late_seconds > -1) or (reason == "interrupted" and late_seconds > 0):
            raise DefinitionError(timeout_message(definition)) from error
        if reason in {"interrupted", "user-defined function raised exception"}:
            # SQLite hides the exception that a signal raises during a callback.
            raise Interrupted("A signal stopped the statement.") from error
        if not _is_server_error(error):
            raise DefinitionError(
                f"{definition.key}: its {query.name} does not work: {reason}.{_hint(query, error, reason)}"
            ) from error
        if query.source is None:
            raise
        raise _source_error(query, error, reason) from error


def _source_error(query: BoundQuery, error: sa.exc.DBAPIError, reason: str) -> SourceError:
    definition = query.definition
    advice = f"Is it running, and is its url in [sources.{definition.source}] right?"
    if engines.is_locked(error):
        advice = engines.advice(error)
    elif (getattr(error.orig, "sqlstate", None) or "").startswith(_CONFLICT):
        advice = "Its server ended the query because of other work there: run it again."
    elif error.connection_invalidated and time.monotonic() > query.deadline:
        reason = f"it did not answer within {definition.timeout_seconds:g} seconds"
    return SourceError(f"{definition.key}: the source {definition.source} cannot be read: {reason}. {advice}")


def _hint(query: BoundQuery, error: sa.exc.DBAPIError, reason: str) -> str:
    state = getattr(error.orig, "sqlstate", None)
    if state == _NO_PRIVILEGE:
        return (
            " Grant it to the role in the url: SELECT on a table, USAGE on a schema, EXECUTE on a function."
        )
    if query.source is None and (reason.startswith("no such table") or state == _MISSING_TABLE):
        return " It runs on the database of audience-sync: `source` names another one."
    return ""


def timeout_message(definition: Definition) -> str:
    advice = "Make it faster, or give the definition a longer timeout."
    if definition.is_preview:
        advice = (
            "Narrow its windows or add an index. A definition in the configuration can have a longer timeout."
        )
    return f"{definition.key}: its SQL ran longer than {definition.timeout_seconds:g} seconds. {advice}"


def _is_server_error(error: sa.exc.DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or ""
    code = getattr(error.orig, "sqlite_errorname", None) or ""
    return (
        error.connection_invalidated
        or error.statement is None  # the connection could not be opened
        or state.startswith(_SERVER_STATES)
        or code.removeprefix("SQLITE_").startswith(_SERVER_CODES)
    )
