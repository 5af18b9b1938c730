"""Compute a definition into the snapshot table: on our own database, or streamed from a source.

Whether it is ready, and who is eligible, is asked where the definition runs.
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
GONE_SECONDS = 5
PROGRESS_STEPS = 20_000  # virtual machine steps between two looks at the clock: some milliseconds
_QUERY_ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

# Not the definition's fault: SQLSTATE classes (connection, resources, operator, system) and SQLite's codes.
_SERVER_STATES = ("08", "53", "57", "58", "XX")
_SERVER_CODES = ("FULL", "IOERR", "BUSY", "LOCKED", "CORRUPT", "NOTADB", "CANTOPEN", "NOMEM", "READONLY")


@dataclass(frozen=True, slots=True)
class _Query:
    """One of a definition's queries, checked and bound: where it runs, for which moment, and until when."""

    definition: Definition
    called: str  # as messages name it
    bound: sa.TextClause
    uses_as_of: bool
    needs: tuple[str, ...]  # columns
    as_of: dt.datetime
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
    """Fill the snapshot table with the definition's result as of a moment; what of it could not be loaded, by reason.

    Where it has an `eligible_sql`, the eligible table is filled too. `connection` is to our own database, and
    not in a transaction.

    Raises:
        DefinitionError: the definition cannot be computed as it is written, or not in its time, or is not ready.
        SourceError: its source cannot be reached.

    """
    deadline = time.monotonic() + definition.timeout_seconds

    def query(called: str, text: str, *needs: str) -> _Query:
        dialect = (source or connection).dialect.name
        try:
            statement.check(text, dialect)
            bound = sa.text(statement.bind(text, dialect))
        except DefinitionError as error:
            where = "" if called == SQL else f"{called}: "
            raise DefinitionError(f"{definition.key}: {where}{error}.") from error
        uses_as_of = statement.uses_as_of(text, dialect)
        return _Query(definition, called, bound, uses_as_of, needs, as_of, source, deadline, stop or Stop())

    connection.execution_options(write=False)
    if definition.ready_sql:
        _need_ready(connection, query("ready_sql", definition.ready_sql))
    needs = ("user_id", "value") if definition.kind is Kind.TRAIT else ("user_id",)
    unloaded = _fill(connection, query(SQL, definition.sql, *needs), snapshot.SNAPSHOT)
    if definition.eligible_sql:
        _fill(connection, query("eligible_sql", definition.eligible_sql, "user_id"), snapshot.ELIGIBLE)
    return unloaded


def _need_ready(connection: sa.Connection, query: _Query) -> None:
    if query.source is None:
        with _own(connection, query):
            _authorize(connection, query)
            row = _execute(connection, query.bound, query).first()
    else:
        with _reading(query) as reading:
            row = _execute(reading, query.bound, query).first()
    value = row[0] if row else None
    if not isinstance(value, bool | int) or not value:
        raise DefinitionError(
            f"{query.definition.key}: not ready: its ready_sql did not give true. The next run asks again."
        )


def _fill(connection: sa.Connection, query: _Query, table: str) -> Counter[str]:
    """Put a query's rows into a temporary table."""
    if query.source is None:
        with _own(connection, query):
            _take(connection, query, table)
        return Counter()
    counts: Counter[str] = Counter()
    with closing(_batches(query, counts)) as batches:
        next(batches)  # the source is asked before our own transaction begins
        with connection.begin():
            snapshot.load_rows(connection, batches, query.needs, table)
    return counts


@contextmanager
def _own(connection: sa.Connection, query: _Query) -> Iterator[None]:
    with connection.begin(), _words(query), _limits(connection, query):
        yield


@contextmanager
def _reading(query: _Query) -> Iterator[sa.Connection]:
    """A read-only transaction on the source, in which all queries see one state of it."""
    source = query.source
    assert source is not None  # noqa: S101  (whoever asks knows)
    with _words(query), source.connect() as reading:
        if source.dialect.name == "postgresql":
            reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with reading.begin(), _limits(reading, query):
            _authorize(reading, query)
            yield reading


def _take(connection: sa.Connection, query: _Query, table: str) -> None:
    _authorize(connection, query)
    columns = _columns(connection, query)
    _need_columns(query, [column.name for column in columns])
    by_name = {column.name: column for column in columns}
    if not values.id_is_possible(by_name["user_id"]):
        raise DefinitionError(
            f"{query.definition.key}: the column user_id of its {query.called} is of type "
            f"{by_name['user_id'].type_name}: give text, a number or a uuid."
        )
    needed = [by_name[name] for name in query.needs]
    snapshot.compute_into(connection, query.bound.text, needed, _as_of(connection, query), table)


def _batches(query: _Query, counts: Counter[str]) -> Generator[list[values.Row]]:
    """An empty batch once the query has begun, then its rows; only one batch is in memory."""
    with _reading(query) as reading:
        if reading.dialect.name == "postgresql":  # all rows are read, so plan for all
            reading.exec_driver_sql("SET LOCAL cursor_tuple_fraction = 1")
        reading.execution_options(stream_results=True)
        with closing(_execute(reading, query.bound, query)) as result:
            names = [name.lower() for name in result.keys()]  # noqa: SIM118  (a result, not a dict)
            _need_columns(query, names)
            places = [names.index(name) for name in query.needs]
            yield []
            batch: Sequence[Sequence[Any]] = result.fetchmany(1)  # SQLAlchemy took it to see the columns
            while batch:
                if time.monotonic() > query.deadline:
                    raise DefinitionError(_too_long(query.definition))
                yield values.canonical_rows(batch, places, counts)
                batch = _fetch(reading, result.cursor)


def _fetch(connection: sa.Connection, cursor: Any) -> Sequence[Sequence[Any]]:
    """The next rows as the driver has them: SQLAlchemy's cost as much as everything else here."""
    try:
        rows: Sequence[Sequence[Any]] = cursor.fetchmany(FETCH_ROWS)
    except connection.dialect.loaded_dbapi.Error as error:
        raw: Any = connection.connection.dbapi_connection
        is_lost = connection.dialect.is_disconnect(error, raw, cursor)
        raise sa.exc.DBAPIError("FETCH", None, error, connection_invalidated=is_lost) from error
    return rows


def _execute(
    connection: sa.Connection, clause: sa.TextClause, query: _Query
) -> sa.CursorResult[*tuple[Any, ...]]:
    if query.stop.is_set():
        raise Interrupted("The process was asked to stop.")
    parameter = _as_of(connection, query)
    return connection.execute(clause if parameter is None else clause.bindparams(parameter))


def _as_of(connection: sa.Connection, query: _Query) -> sa.BindParameter[Any] | None:
    if not query.uses_as_of:
        return None
    utc = query.as_of.astimezone(dt.UTC)
    match connection.dialect.name:
        case "sqlite":
            return sa.bindparam("as_of", f"{utc:%Y-%m-%d %H:%M:%S}", type_=sa.Text())
        case "postgresql":
            return sa.bindparam("as_of", utc, type_=UtcDateTime())
    return sa.bindparam("as_of", utc.replace(tzinfo=None), type_=sa.DateTime())


def _columns(connection: sa.Connection, query: _Query) -> list[values.Column]:
    clause = sa.text(f"SELECT * FROM ({query.bound.text}) AS definition LIMIT 0")
    result = _execute(connection, clause, query)
    description: Any = result.cursor.description if result.cursor else ()
    names = [(column[0], column[1]) for column in description]
    result.close()
    if dialects.is_sqlite(connection):
        # Of a subquery's columns, the second called user_id is user_id:1.
        return [values.Column(name.partition(":")[0].lower()) for name, _ in names]
    types = connection.execute(
        sa.text("SELECT oid, typname, typcategory FROM pg_catalog.pg_type WHERE oid = ANY(:oids)"),
        {"oids": [oid for _, oid in names]},
    )
    known = {oid: (name, category) for oid, name, category in types}
    return [values.Column(name, *known[oid]) for name, oid in names]


def _need_columns(query: _Query, names: Sequence[str]) -> None:
    for name in query.needs:
        if names.count(name) != 1:
            raise DefinitionError(
                f"{query.definition.key}: its {query.called} must give one column called {name}; "
                f"it gives {', '.join(names)}. Write SELECT … AS {name}."
            )


def _authorize(connection: sa.Connection, query: _Query) -> None:
    """On SQLite: prepare a query alone, under an authorizer that knows nothing but reading."""
    if not dialects.is_sqlite(connection):
        return
    raw: Any = connection.connection.dbapi_connection
    refused: list[str] = []

    def authorizer(action: int, argument: str | None, name: str | None, *_: object) -> int:
        if action in _QUERY_ACTIONS and not (
            action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS
        ):
            return sqlite3.SQLITE_OK
        refused.append(str(name or argument or action))
        return sqlite3.SQLITE_DENY

    raw.set_authorizer(authorizer)
    try:
        _execute(connection, sa.text(f"EXPLAIN {query.bound.text}"), query).close()
    except sa.exc.DBAPIError as error:
        if not refused:
            raise
        raise DefinitionError(
            f"{query.definition.key}: a definition may only read, and this one does more ({refused[0]})."
        ) from error
    finally:
        with _if_open():
            raw.set_authorizer(None)


def _if_open() -> contextlib.AbstractContextManager[None]:
    """For what is set back on SQLite's connection: a signal in the middle of a statement closes it."""
    return contextlib.suppress(sqlite3.ProgrammingError)


@contextmanager
def _limits(connection: sa.Connection, query: _Query) -> Iterator[None]:
    """Let statements run until their time is over, and no longer, and not after a signal."""
    raw: Any = connection.connection.dbapi_connection
    deadline, stop = query.deadline, query.stop
    match connection.dialect.name:
        case "sqlite":
            raw.set_progress_handler(lambda: stop.is_set() or time.monotonic() > deadline, PROGRESS_STEPS)
            try:
                yield
            finally:
                with _if_open():
                    raw.set_progress_handler(None, 0)
        case "postgresql":
            milliseconds = max(1, int((deadline - time.monotonic()) * 1000))
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds}")
            _end_with_us(connection)
            try:
                with stop.interrupting(partial(dialects.cancel, raw)):
                    yield
            except Interrupted:
                connection.invalidate()
                raise
        case _:
            yield


def _end_with_us(connection: sa.Connection) -> None:
    """Let PostgreSQL end the statements of a process that is gone, not finish them; before 14 it cannot."""
    with contextlib.suppress(sa.exc.DBAPIError), connection.begin_nested():  # nor can it on Windows
        connection.exec_driver_sql(
            f"SELECT pg_catalog.set_config(name, '{GONE_SECONDS}s', true) FROM pg_catalog.pg_settings "
            "WHERE name = 'client_connection_check_interval'"
        )


def _too_long(definition: Definition) -> str:
    return (
        f"{definition.key}: its SQL ran longer than {definition.timeout_seconds:g} seconds. Make it faster, "
        "or give the definition a longer timeout."
    )


@contextmanager
def _words(query: _Query) -> Iterator[None]:
    """Say a driver's error as the definition's, or the source's; our own database's stays as it is."""
    definition = query.definition
    try:
        yield
    except sa.exc.DBAPIError as error:
        told = engines.reason(error)
        if query.stop.is_set():
            raise Interrupted("The process was asked to stop.") from error
        if "statement timeout" in told or (told == "interrupted" and time.monotonic() > query.deadline):
            raise DefinitionError(_too_long(definition)) from error
        if told in {"interrupted", "user-defined function raised exception"}:
            # SQLite swallows what a signal raises while it calls back.
            raise Interrupted("A signal stopped the statement.") from error
        if not _is_servers(error):
            raise DefinitionError(f"{definition.key}: its {query.called} does not work: {told}.") from error
        if query.source is None:
            raise
        raise SourceError(
            f"{definition.key}: the source {definition.source} cannot be read: {told}. Is it running, and "
            f"is its url in [sources.{definition.source}] right?"
        ) from error


def _is_servers(error: sa.exc.DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or ""
    code = getattr(error.orig, "sqlite_errorname", None) or ""
    return (
        error.connection_invalidated
        or error.statement is None  # no statement yet: it could not connect
        or state.startswith(_SERVER_STATES)
        or code.removeprefix("SQLITE_").startswith(_SERVER_CODES)
    )
