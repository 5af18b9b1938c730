"""Compute a definition into a temporary table: on our own database, or streamed from a source.

`ready_sql` and `eligible_sql` run on the same database as the definition itself. Every query runs in a transaction
with a deadline, in which the database itself enforces that it only reads. snapshot.py has the tables that the rows go
into, values.py and postgresql_values.py the canonical text of ids and values.
"""

import contextlib
import datetime as dt
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from audience_sync.audiences import postgresql_values, snapshot, statement, values
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.schedule import load_zone
from audience_sync.db import dialects, engines
from audience_sync.errors import AudienceSyncError, DefinitionError, Interrupted, SourceError, unexpected
from audience_sync.stopping import Stop

if TYPE_CHECKING:
    from audience_sync.audiences.query.compiler import CompiledQuery

SQL, QUERY, READY, ELIGIBLE = (
    "SQL",
    "query",
    "ready_sql",
    "eligible_sql",
)  # a definition's queries, as messages call them
FETCH_ROWS = 20_000
PREVIEW_LOCK_SECONDS = 5  # how long a preview waits for a lock
CLIENT_CHECK_SECONDS = 5  # how often PostgreSQL checks whether our process is still connected
PROGRESS_STEPS = 20_000  # of SQLite's virtual machine between checks of the deadline: some milliseconds
_QUERY_ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
# SQLite asks for these when a query first uses a virtual table, such as json_each or one of FTS5. It refuses a statement
# that would itself change its schema table.
_VIRTUAL_TABLE_ACTIONS = {(sqlite3.SQLITE_UPDATE, "sqlite_master"), (sqlite3.SQLITE_PRAGMA, "data_version")}
_DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

# Errors that the definition did not cause: SQLSTATE classes (connection, resources, operator, system), SQLite's codes.
_CANCELLED = "57014"
_SERVER_STATES = ("08", "53", "55P03", "57", "58", "XX")  # 55P03: a lock was not released in time
_SERVER_CODES = ("FULL", "IOERR", "BUSY", "LOCKED", "CORRUPT", "NOTADB", "CANTOPEN", "NOMEM", "READONLY")


@dataclass(frozen=True, slots=True)
class _Query:
    """One of a definition's queries, checked and bound; `text` and `arguments` are in the driver's style."""

    definition: Definition
    name: str
    text: str
    arguments: Any
    columns: tuple[str, ...]  # those that it must return
    conversions: tuple[str, ...]  # of a trait's values, in this order; values.py has them
    source: sa.Engine | None
    deadline: float  # monotonic seconds
    stop: Stop


def compute(
    connection: sa.Connection,
    definition: Definition,
    as_of: dt.datetime,
    source: sa.Engine | None,
    stop: Stop | None = None,
) -> None:
    """Fill the snapshot table, and the eligible table where the definition has an `eligible_sql`.

    `connection` is to our own database, outside a transaction.

    Raises:
        DefinitionError: a query is invalid or took too long, `ready_sql` did not return true, or anything unexpected.
        SourceError: the source cannot be reached.
        Interrupted: a signal, or `stop`, ended it.

    """
    deadline = time.monotonic() + definition.timeout_seconds

    columns = ("user_id", "value") if definition.kind is Kind.TRAIT else ("user_id",)
    dialect = (source or connection).dialect

    def prepare(name: str, sql: str, *columns: str, conversions: Iterable[str | None] = ()) -> _Query:
        try:
            if name != QUERY:  # the compiler's SQL only reads
                statement.check_before_run(sql, dialect.name)
            bound = statement.bind(sql, dialect.name)
        except DefinitionError as error:
            where = "" if name == SQL else f"{name}: "
            raise DefinitionError(f"{definition.key}: {where}{error}.") from error
        arguments = bound.arguments(dialect.paramstyle, _parameters(dialect.name, as_of, definition))
        text = bound.render(dialect.paramstyle)
        wanted = tuple(filter(None, conversions))
        return _Query(definition, name, text, arguments, columns, wanted, source, deadline, stop or Stop())

    connection.execution_options(write=False)
    with _contained(definition):
        if definition.ready_sql:
            _check_ready(connection, prepare(READY, definition.ready_sql, "value"))
        if definition.query is None:
            query = prepare(SQL, definition.sql, *columns, conversions=[definition.value_type])
        else:
            lookup = _Query(definition, QUERY, "", None, (), (), source, deadline, stop or Stop())
            for sql in definition.query.sql_texts():
                prepare(SQL, sql)
            compiled = _compile(connection, lookup, as_of)
            conversions = [compiled.value_type, definition.value_type]
            query = prepare(QUERY, compiled.sql, *columns, conversions=conversions)
        _fill(connection, snapshot.SNAPSHOT, query)
        if definition.eligible_sql:
            _fill(connection, snapshot.ELIGIBLE, prepare(ELIGIBLE, definition.eligible_sql, "user_id"))


def _compile(connection: sa.Connection, query: _Query, as_of: dt.datetime) -> "CompiledQuery":
    """Compile a definition's query for the database where it runs, which knows the columns of its tables."""
    from audience_sync.audiences.query import catalog, compiler  # noqa: PLC0415  (only where there is a query)

    definition, is_own = query.definition, query.source is None
    assert definition.query is not None  # noqa: S101  (the caller checked)
    with _reading_own(connection, query) if is_own else _reading_source(query) as reading:
        tables = catalog.read_catalog(reading, definition.query, is_own=is_own)
    is_trait = definition.kind is Kind.TRAIT
    return compiler.compile_query(definition.query.query, tables, as_of, is_trait=is_trait)


def sql_of(engine: sa.Engine, definition: Definition, as_of: dt.datetime, source: sa.Engine | None) -> str:
    """Return the SQL that computes a definition."""
    if definition.query is None:
        return definition.sql
    with engines.connected(engine, lock_seconds(definition)) as connection, _contained(definition):
        return _compile(connection, _lookup(definition, source), as_of).sql


def review(
    engine: sa.Engine, definition: Definition, as_of: dt.datetime, source: sa.Engine | None
) -> list[str]:
    """Return warnings about a definition's query: names never seen, and values of an unexpected kind."""
    if definition.query is None:
        return []
    from audience_sync.audiences.query.catalog import read_catalog  # noqa: PLC0415  (only where there is a query)
    from audience_sync.audiences.query.review import review_query  # noqa: PLC0415

    lookup = _lookup(definition, source)
    with (
        engines.connected(engine, lock_seconds(definition)) as connection,
        _contained(definition),
        _reading_own(connection, lookup) if source is None else _reading_source(lookup) as reading,
    ):
        catalog = read_catalog(reading, definition.query, is_own=source is None)
        return review_query(reading, definition.query, catalog, as_of)


def lock_seconds(definition: Definition) -> float | None:
    """Return how long a definition waits for a lock; None is the usual time."""
    return PREVIEW_LOCK_SECONDS if definition.is_preview else None


def _lookup(definition: Definition, source: sa.Engine | None) -> _Query:
    """Return an empty query for reading the catalog of tables within the definition's timeout."""
    deadline = time.monotonic() + definition.timeout_seconds
    return _Query(definition, QUERY, "", None, (), (), source, deadline, Stop())


@contextmanager
def _contained(definition: Definition) -> Iterator[None]:
    """Turn an unexpected error of a driver or a library into an error of this definition."""
    try:
        yield
    except (AudienceSyncError, sa.exc.DBAPIError):
        raise
    except Exception as error:
        raise DefinitionError(
            f"{definition.key}: it could not be computed: its SQL, its source's driver or a value of its result "
            f"caused an unexpected error, {unexpected(error)}. Simplify the SQL, or cast its columns to text."
        ) from error


def _parameters(dialect: str, as_of: dt.datetime, definition: Definition) -> dict[str, Any]:
    """Return the values of `:as_of` and `:today` in the database's form."""
    utc = as_of.astimezone(dt.UTC)
    today = as_of.astimezone(load_zone(definition.timezone)).date()
    match dialect:
        case "sqlite":
            moment = utc.replace(microsecond=0, tzinfo=None)
            return {"as_of": moment.isoformat(" "), "today": today.isoformat()}
        case "postgresql":
            return {"as_of": utc, "today": today}
    return {"as_of": utc.replace(tzinfo=None), "today": today}


def _check_ready(connection: sa.Connection, query: _Query) -> None:
    """Raise an error unless the first value of the query is true, or a number other than 0."""
    with _reading_own(connection, query) if query.source is None else _reading_source(query) as reading:
        _authorize(reading, query)
        canonical = _canonical(reading, query)
        row = _execute(reading, f"{canonical} LIMIT 1" if canonical else query.text, query).first()
    raw = row[0] if row else None
    value = raw if canonical else values.canonical_value(raw)
    if value is None or value.startswith((values.NOT_PRIMITIVE, '"')) or value in {"false", "0"}:
        raise DefinitionError(
            f"{query.definition.key}: not ready: its ready_sql did not return true. The next run checks again."
        )


def _fill(connection: sa.Connection, table: str, query: _Query) -> None:
    """Put the rows of a query into a temporary table."""
    if query.source is None:
        with engines.begin(connection):
            snapshot.create_table(connection, table, query.columns)
        with _reading_own(connection, query):
            _authorize(connection, query)
            text = _canonical(connection, query)
            snapshot.fill_from_query(
                connection, table, text, query.arguments, query.columns, query.conversions
            )
    else:
        with closing(_batches(query)) as batches:
            next(batches)  # the source answers before our own transaction begins
            with engines.begin(connection):
                snapshot.fill_from_rows(connection, table, batches, query.columns, query.conversions)


def _canonical(connection: sa.Connection, query: _Query) -> str:
    """Return the query's SELECT of canonical text; empty for databases without expressions for it.

    It gives the query's columns new names, because the query's own names need not be unique.
    """
    if connection.dialect.name not in {"sqlite", "postgresql"}:
        return ""
    result = _execute(connection, f"SELECT * FROM ({query.text}) AS definition LIMIT 0", query)
    description: Any = result.cursor.description if result.cursor else ()
    # SQLite calls the second user_id of a subquery user_id:1.
    names = [column[0].partition(":")[0].lower() for column in description]
    oids = [column[1] for column in description]
    result.close()
    if query.name == READY:
        names = [*query.columns, *("" for _ in names[1:])]
    _check_columns(query, names)
    names = [name if name in query.columns else f"column{number}" for number, name in enumerate(names)]
    if dialects.is_sqlite(connection):
        values.register_functions(connection)
        return values.sqlite_select(query.columns, query.text, names, streamed=query.source is not None)
    rows = connection.execute(_TYPES, {"oids": oids})
    types = {row.oid: (row.typname, row.typcategory, row.encoding) for row in rows}
    columns = [postgresql_values.Column(name, *types[oid]) for name, oid in zip(names, oids, strict=True)]
    return postgresql_values.select(query.columns, query.text, columns, streamed=query.source is not None)


def _batches(query: _Query) -> Generator[Sequence[values.Row]]:
    """Yield an empty batch once the source has answered, then batches of rows, of which one is in memory."""
    with _reading_source(query) as reading:
        _authorize(reading, query)
        if reading.dialect.name == "postgresql":  # plan for reading all rows
            reading.exec_driver_sql("SET LOCAL cursor_tuple_fraction = 1")
        canonical = _canonical(reading, query)
        reading.execution_options(stream_results=True)
        with closing(_execute(reading, canonical or query.text, query)) as result:
            convert = _converter(reading, query, result)
            yield []
            batch: Sequence[Sequence[Any]] = result.fetchmany(1)  # SQLAlchemy has already fetched it
            while batch:
                if time.monotonic() > query.deadline:
                    raise DefinitionError(_timeout_message(query.definition))
                yield convert(batch)
                batch = _fetch(reading, result.cursor)


def _converter(
    connection: sa.Connection, query: _Query, result: sa.CursorResult[*tuple[Any, ...]]
) -> Callable[[Sequence[Sequence[Any]]], Sequence[values.Row]]:
    """Return the function that makes canonical rows of a batch that the driver returns."""
    match connection.dialect.name:
        case "postgresql":
            return values.plain_rows
        case "sqlite":
            return values.decode_ids
    names = [name.lower() for name in result.keys()]  # noqa: SIM118  (a result, not a dict)
    _check_columns(query, names)
    return partial(values.canonical_rows, positions=[names.index(name) for name in query.columns])


def _fetch(connection: sa.Connection, cursor: Any) -> Sequence[Sequence[Any]]:
    """Fetch rows directly from the driver: SQLAlchemy's row objects would double the time of loading."""
    try:
        rows: Sequence[Sequence[Any]] = cursor.fetchmany(FETCH_ROWS)
    except connection.dialect.loaded_dbapi.Error as error:
        raw: Any = connection.connection.dbapi_connection
        is_lost = connection.dialect.is_disconnect(error, raw, cursor)
        raise sa.exc.DBAPIError("FETCH", None, error, connection_invalidated=is_lost) from error
    return rows


_TYPES = sa.text(
    "SELECT oid, typname, typcategory, current_setting('server_encoding') AS encoding "
    "FROM pg_catalog.pg_type WHERE oid = ANY(:oids)"
)


def _check_columns(query: _Query, names: Sequence[str]) -> None:
    for name in query.columns:
        if names.count(name) != 1:
            raise DefinitionError(
                f"{query.definition.key}: its {query.name} must return one column called {name}; "
                f"it returns {', '.join(names) or 'none'}. Write SELECT … AS {name}."
            )


def _execute(connection: sa.Connection, text: str, query: _Query) -> sa.CursorResult[*tuple[Any, ...]]:
    if query.stop.is_set():
        raise Interrupted("The process was asked to stop.")
    return connection.exec_driver_sql(text, query.arguments or None)


@contextmanager
def _reading_own(connection: sa.Connection, query: _Query) -> Iterator[sa.Connection]:
    """Begin a transaction, or a part of one, in which PostgreSQL writes to temporary tables only."""
    with engines.begin(connection), _translated_errors(query), _limits(connection, query):
        if not dialects.is_sqlite(connection):
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
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
        is_allowed = action in _QUERY_ACTIONS or (action, argument) in _VIRTUAL_TABLE_ACTIONS
        if is_allowed and not is_denied:
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
    """Interrupt a statement when the deadline passes or the process is asked to stop. No wait for a lock is longer."""
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
            limited = dialects.with_settings(connection, settings)
            try:
                with limited, stop.interrupting(partial(dialects.cancel, raw)):
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
def _translated_errors(query: _Query) -> Iterator[None]:
    """Turn a driver's error into a DefinitionError or SourceError; errors of our own database pass unchanged."""
    definition = query.definition
    try:
        yield
    except sa.exc.DBAPIError as error:
        reason = engines.reason(error)
        if query.stop.is_set():
            raise Interrupted("The process was asked to stop.") from error
        late_seconds = time.monotonic() - query.deadline
        is_cancelled = getattr(error.orig, "sqlstate", None) == _CANCELLED
        if (is_cancelled and late_seconds > -1) or (reason == "interrupted" and late_seconds > 0):
            raise DefinitionError(_timeout_message(definition)) from error
        if reason in {"interrupted", "user-defined function raised exception"}:
            # SQLite hides the exception that a signal raises during a callback.
            raise Interrupted("A signal stopped the statement.") from error
        if not _is_server_error(error):
            raise DefinitionError(f"{definition.key}: its {query.name} does not work: {reason}.") from error
        if query.source is None:
            raise
        advice = f"Is it running, and is its url in [sources.{definition.source}] right?"
        if engines.is_locked(error):
            advice = engines.advice(error)
        raise SourceError(
            f"{definition.key}: the source {definition.source} cannot be read: {reason}. {advice}"
        ) from error


def _timeout_message(definition: Definition) -> str:
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
