"""Compute a definition into a temporary table: on our own database, or streamed from a source.

`ready_sql` and `eligible_sql` run on the same database as the definition itself. Every query runs in a transaction
with a deadline. On a source, and always on SQLite, the database itself enforces that the query only reads. snapshot.py
has the tables that the rows go into, values.py the canonical text of ids and values.
"""

import contextlib
import datetime as dt
import sqlite3
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import snapshot, statement, values
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.db import dialects, engines
from audience_sync.db.tables import UtcDateTime
from audience_sync.errors import DefinitionError, Interrupted, SourceError
from audience_sync.stopping import Stop

SQL = "SQL"
FETCH_ROWS = 20_000
CLIENT_CHECK_SECONDS = 5  # how often PostgreSQL checks whether our process is still connected
PROGRESS_STEPS = 20_000  # of SQLite's virtual machine between checks of the deadline: some milliseconds
_QUERY_ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

# Errors that the definition did not cause: SQLSTATE classes (connection, resources, operator, system), SQLite's codes.
_SERVER_STATES = ("08", "53", "57", "58", "XX")
_SERVER_CODES = ("FULL", "IOERR", "BUSY", "LOCKED", "CORRUPT", "NOTADB", "CANTOPEN", "NOMEM", "READONLY")


@dataclass(frozen=True, slots=True)
class _Query:
    """One of a definition's queries, checked and bound."""

    definition: Definition
    name: str  # as messages call it
    text: str
    columns: tuple[str, ...]  # those that it must return
    as_of: dt.datetime | None  # None: it does not use :as_of
    source: sa.Engine | None
    deadline: float  # monotonic seconds
    stop: Stop


def compute(
    connection: sa.Connection,
    definition: Definition,
    as_of: dt.datetime,
    source: sa.Engine | None,
    stop: Stop | None = None,
) -> Counter[str]:
    """Fill the snapshot table, and the eligible table where the definition has an `eligible_sql`.

    `connection` is to our own database, outside a transaction. Returns how many rows of a source were set aside
    while they were loaded, by reason; the diff counts the others.

    Raises:
        DefinitionError: a query is invalid or took too long, or `ready_sql` did not return true.
        SourceError: the source cannot be reached.
        Interrupted: a signal, or `stop`, ended it.

    """
    deadline = time.monotonic() + definition.timeout_seconds

    def prepare(name: str, sql: str, *columns: str) -> _Query:
        dialect = (source or connection).dialect.name
        try:
            statement.check(sql, dialect)
            bound = statement.bind(sql, dialect)
        except DefinitionError as error:
            where = "" if name == SQL else f"{name}: "
            raise DefinitionError(f"{definition.key}: {where}{error}.") from error
        moment = as_of if bound.uses_as_of else None
        return _Query(definition, name, bound.text, columns, moment, source, deadline, stop or Stop())

    connection.execution_options(write=False)
    if definition.ready_sql:
        _check_ready(connection, prepare("ready_sql", definition.ready_sql))
    columns = ("user_id", "value") if definition.kind is Kind.TRAIT else ("user_id",)
    set_aside = _fill(connection, snapshot.SNAPSHOT, prepare(SQL, definition.sql, *columns))
    if definition.eligible_sql:
        _fill(connection, snapshot.ELIGIBLE, prepare("eligible_sql", definition.eligible_sql, "user_id"))
    return set_aside


def _check_ready(connection: sa.Connection, query: _Query) -> None:
    with _reading_own(connection, query) if query.source is None else _reading_source(query) as reading:
        _authorize(reading, query)
        row = _execute(reading, query.text, query).first()
    value = row[0] if row else None
    if not isinstance(value, bool | int) or not value:
        raise DefinitionError(
            f"{query.definition.key}: not ready: its ready_sql did not return true. The next run checks again."
        )


def _fill(connection: sa.Connection, table: str, query: _Query) -> Counter[str]:
    """Put the rows of a query into a temporary table; count the rows of a source that were set aside, by reason."""
    set_aside: Counter[str] = Counter()
    if query.source is None:
        with _reading_own(connection, query):
            _compute_own(connection, table, query)
    else:
        with closing(_batches(query, set_aside)) as batches:
            next(batches)  # the source answers before our own transaction begins
            with connection.begin():
                snapshot.fill_from_rows(connection, table, query.columns, batches)
    return set_aside


def _compute_own(connection: sa.Connection, table: str, query: _Query) -> None:
    _authorize(connection, query)
    columns = {column.name: column for column in _result_columns(connection, query)}
    user_id = columns["user_id"]
    if not values.can_be_id(user_id):
        raise DefinitionError(
            f"{query.definition.key}: the column user_id of its {query.name} is of type {user_id.type_name}: "
            "return text, a number or a uuid."
        )
    needed = [columns[name] for name in query.columns]
    snapshot.fill_from_query(connection, table, query.text, needed, _parameter(connection, query))


def _result_columns(connection: sa.Connection, query: _Query) -> list[values.Column]:
    """Return the query's columns; on PostgreSQL with their types."""
    result = _execute(connection, f"SELECT * FROM ({query.text}) AS definition LIMIT 0", query)
    description: Any = result.cursor.description if result.cursor else ()
    columns = [(column[0], column[1]) for column in description]
    result.close()
    if dialects.is_sqlite(connection):
        # SQLite calls the second user_id of a subquery user_id:1.
        typed = [values.Column(name.partition(":")[0].lower()) for name, _ in columns]
    else:
        rows = connection.execute(
            sa.text("SELECT oid, typname, typcategory FROM pg_catalog.pg_type WHERE oid = ANY(:oids)"),
            {"oids": [oid for _, oid in columns]},
        )
        types = {row.oid: (row.typname, row.typcategory) for row in rows}
        typed = [values.Column(name, *types[oid]) for name, oid in columns]
    _check_columns(query, [column.name for column in typed])
    return typed


def _batches(query: _Query, set_aside: Counter[str]) -> Generator[list[values.Row]]:
    """Yield an empty batch once the source has answered, then batches of rows, of which one is in memory."""
    with _reading_source(query) as reading:
        _authorize(reading, query)
        if reading.dialect.name == "postgresql":  # plan for reading all rows
            reading.exec_driver_sql("SET LOCAL cursor_tuple_fraction = 1")
        reading.execution_options(stream_results=True)
        with closing(_execute(reading, query.text, query)) as result:
            names = [name.lower() for name in result.keys()]  # noqa: SIM118  (a result, not a dict)
            _check_columns(query, names)
            positions = [names.index(name) for name in query.columns]
            yield []
            batch: Sequence[Sequence[Any]] = result.fetchmany(1)  # SQLAlchemy has already fetched it
            while batch:
                if time.monotonic() > query.deadline:
                    raise DefinitionError(_timeout_message(query.definition))
                yield values.canonical_rows(batch, positions, set_aside)
                batch = _fetch(reading, result.cursor)


def _fetch(connection: sa.Connection, cursor: Any) -> Sequence[Sequence[Any]]:
    """Fetch rows directly from the driver: SQLAlchemy's row objects would double the time of loading."""
    try:
        rows: Sequence[Sequence[Any]] = cursor.fetchmany(FETCH_ROWS)
    except connection.dialect.loaded_dbapi.Error as error:
        raw: Any = connection.connection.dbapi_connection
        is_lost = connection.dialect.is_disconnect(error, raw, cursor)
        raise sa.exc.DBAPIError("FETCH", None, error, connection_invalidated=is_lost) from error
    return rows


def _check_columns(query: _Query, names: Sequence[str]) -> None:
    for name in query.columns:
        if names.count(name) != 1:
            raise DefinitionError(
                f"{query.definition.key}: its {query.name} must return one column called {name}; "
                f"it returns {', '.join(names)}. Write SELECT … AS {name}."
            )


def _execute(connection: sa.Connection, text: str, query: _Query) -> sa.CursorResult[*tuple[Any, ...]]:
    if query.stop.is_set():
        raise Interrupted("The process was asked to stop.")
    parameter = _parameter(connection, query)
    clause = sa.text(text)
    return connection.execute(clause if parameter is None else clause.bindparams(parameter))


def _parameter(connection: sa.Connection, query: _Query) -> sa.BindParameter[Any] | None:
    """Return the parameter `:as_of` in the database's form; None if the query does not use it."""
    if query.as_of is None:
        return None
    utc = query.as_of.astimezone(dt.UTC)
    match connection.dialect.name:
        case "sqlite":
            return sa.bindparam("as_of", f"{utc:%Y-%m-%d %H:%M:%S}", type_=sa.Text())
        case "postgresql":
            return sa.bindparam("as_of", utc, type_=UtcDateTime())
    return sa.bindparam("as_of", utc.replace(tzinfo=None), type_=sa.DateTime())


@contextmanager
def _reading_own(connection: sa.Connection, query: _Query) -> Iterator[sa.Connection]:
    with connection.begin(), _translated_errors(query), _limits(connection, query):
        yield connection


@contextmanager
def _reading_source(query: _Query) -> Iterator[sa.Connection]:
    """Open a read-only transaction on the source, in which all statements see one state of it."""
    source = query.source
    assert source is not None  # noqa: S101  (the caller checked)
    with _translated_errors(query), source.connect() as reading:
        if source.dialect.name == "postgresql":
            reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with reading.begin(), _limits(reading, query):
            yield reading


def _authorize(connection: sa.Connection, query: _Query) -> None:
    """Prepare the query under an authorizer that allows only reading (SQLite only)."""
    if not dialects.is_sqlite(connection):
        return
    raw: Any = connection.connection.dbapi_connection
    refused: list[str] = []

    def authorizer(action: int, argument: str | None, name: str | None, *_: object) -> int:
        is_denied = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS
        if action in _QUERY_ACTIONS and not is_denied:
            return sqlite3.SQLITE_OK
        refused.append(str(name or argument or action))
        return sqlite3.SQLITE_DENY

    raw.set_authorizer(authorizer)
    try:
        _execute(connection, f"EXPLAIN {query.text}", query).close()
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
    """Ignore that a signal closed SQLite's connection in the middle of a statement."""
    return contextlib.suppress(sqlite3.ProgrammingError)


@contextmanager
def _limits(connection: sa.Connection, query: _Query) -> Iterator[None]:
    """Interrupt a statement when the deadline passes or the process is asked to stop."""
    raw: Any = connection.connection.dbapi_connection
    deadline, stop = query.deadline, query.stop
    match connection.dialect.name:
        case "sqlite":
            raw.set_progress_handler(lambda: stop.is_set() or time.monotonic() > deadline, PROGRESS_STEPS)
            try:
                yield
            finally:
                with _ignoring_closed():
                    raw.set_progress_handler(None, 0)
        case "postgresql":
            milliseconds = max(1, int((deadline - time.monotonic()) * 1000))
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds}")
            _end_with_our_process(connection)
            try:
                with stop.interrupting(partial(dialects.cancel, raw)):
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
def _translated_errors(query: _Query) -> Iterator[None]:
    """Turn a driver's error into a DefinitionError or SourceError; errors of our own database pass unchanged."""
    definition = query.definition
    try:
        yield
    except sa.exc.DBAPIError as error:
        reason = engines.reason(error)
        if query.stop.is_set():
            raise Interrupted("The process was asked to stop.") from error
        if "statement timeout" in reason or (reason == "interrupted" and time.monotonic() > query.deadline):
            raise DefinitionError(_timeout_message(definition)) from error
        if reason in {"interrupted", "user-defined function raised exception"}:
            # SQLite hides the exception that a signal raises during a callback.
            raise Interrupted("A signal stopped the statement.") from error
        if not _is_server_error(error):
            raise DefinitionError(f"{definition.key}: its {query.name} does not work: {reason}.") from error
        if query.source is None:
            raise
        raise SourceError(
            f"{definition.key}: the source {definition.source} cannot be read: {reason}. Is it running, and "
            f"is its url in [sources.{definition.source}] right?"
        ) from error


def _timeout_message(definition: Definition) -> str:
    return (
        f"{definition.key}: its SQL ran longer than {definition.timeout_seconds:g} seconds. Make it faster, "
        "or give the definition a longer timeout."
    )


def _is_server_error(error: sa.exc.DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or ""
    code = getattr(error.orig, "sqlite_errorname", None) or ""
    return (
        error.connection_invalidated
        or error.statement is None  # the connection could not be opened
        or state.startswith(_SERVER_STATES)
        or code.removeprefix("SQLITE_").startswith(_SERVER_CODES)
    )
