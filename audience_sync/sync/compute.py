"""Compute a definition into the snapshot table: on our own database, or streamed from a source."""

import datetime as dt
import sqlite3
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import sqlalchemy as sa

from audience_sync.definitions import sql as definition_sql
from audience_sync.definitions.model import Definition, Kind
from audience_sync.errors import DefinitionError, Interrupted, SourceError
from audience_sync.store import engines, forms, snapshots
from audience_sync.store.tables import UtcDateTime
from audience_sync.sync import values

FETCH_ROWS = 20_000
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


def compute(
    connection: sa.Connection, definition: Definition, as_of: dt.datetime, source: sa.Engine | None
) -> Counter[str]:
    """Fill the snapshot table with the definition's result as of a moment; what of it could not be loaded, by reason.

    `connection` is to our own database, and not in a transaction.

    Raises:
        DefinitionError: the definition cannot be computed as it is written, or not in its time.
        SourceError: its source cannot be reached.

    """
    deadline = time.monotonic() + definition.timeout_seconds
    dialect = (source or connection).dialect.name
    try:
        definition_sql.check(definition.sql, dialect)
        bound = sa.text(definition_sql.bind(definition.sql, dialect))
    except DefinitionError as error:
        raise DefinitionError(f"{definition.key}: {error}.") from error
    connection.execution_options(write=False)
    if source is None:
        with connection.begin(), _words(definition, None, deadline), _limits(connection, deadline):
            _take(connection, definition, bound, as_of)
        return Counter()
    return _stream(connection, definition, bound, as_of, source, deadline)


def _take(
    connection: sa.Connection, definition: Definition, bound: sa.TextClause, as_of: dt.datetime
) -> None:
    parameter = _as_of(connection, definition, as_of)
    _authorize(connection, definition, bound, parameter)
    columns = _columns(connection, bound, parameter)
    _need_columns(definition, [column.name for column in columns])
    user_id = next(column for column in columns if column.name == "user_id")
    if not forms.id_is_possible(user_id):
        raise DefinitionError(
            f"{definition.key}: the column user_id is of type {user_id.type_name}: give text, a number or a uuid."
        )
    snapshots.take(connection, bound.text, definition.kind, columns, parameter)


def _stream(
    connection: sa.Connection,
    definition: Definition,
    bound: sa.TextClause,
    as_of: dt.datetime,
    source: sa.Engine,
    deadline: float,
) -> Counter[str]:
    """Read a source in batches and load them; only one batch is in memory."""
    counts: Counter[str] = Counter()
    with closing(_batches(definition, bound, as_of, source, deadline, counts)) as batches:
        next(batches)  # the source is asked before our own transaction begins
        with connection.begin():
            snapshots.load(connection, batches, definition.kind)
    return counts


def _batches(
    definition: Definition,
    bound: sa.TextClause,
    as_of: dt.datetime,
    source: sa.Engine,
    deadline: float,
    counts: Counter[str],
) -> Generator[list[values.Row]]:
    """An empty batch once the query has begun, then its rows."""
    with _words(definition, source, deadline), source.connect() as reading:
        if source.dialect.name == "postgresql":
            reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with reading.begin(), _limits(reading, deadline):
            parameter = _as_of(reading, definition, as_of)
            _authorize(reading, definition, bound, parameter)
            if source.dialect.name == "postgresql":  # all rows are read, so plan for all
                reading.exec_driver_sql("SET LOCAL cursor_tuple_fraction = 1")
            reading.execution_options(stream_results=True)
            with closing(_execute(reading, bound, parameter)) as result:
                names = [name.lower() for name in result.keys()]  # noqa: SIM118  (a result, not a dict)
                places = [names.index(name) for name in _need_columns(definition, names)]
                yield []
                batch: Sequence[Sequence[Any]] = result.fetchmany(1)  # SQLAlchemy took it to see the columns
                while batch:
                    if time.monotonic() > deadline:
                        raise DefinitionError(_too_long(definition))
                    yield values.rows(batch, places, counts)
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
    connection: sa.Connection, statement: sa.TextClause, parameter: sa.BindParameter[Any] | None
) -> sa.CursorResult[*tuple[Any, ...]]:
    return connection.execute(statement if parameter is None else statement.bindparams(parameter))


def _as_of(
    connection: sa.Connection, definition: Definition, as_of: dt.datetime
) -> sa.BindParameter[Any] | None:
    if not definition_sql.uses_as_of(definition.sql, connection.dialect.name):
        return None
    utc = as_of.astimezone(dt.UTC)
    match connection.dialect.name:
        case "sqlite":
            return sa.bindparam("as_of", f"{utc:%Y-%m-%d %H:%M:%S}", type_=sa.Text())
        case "postgresql":
            return sa.bindparam("as_of", utc, type_=UtcDateTime())
    return sa.bindparam("as_of", utc.replace(tzinfo=None), type_=sa.DateTime())


def _columns(
    connection: sa.Connection, bound: sa.TextClause, parameter: sa.BindParameter[Any] | None
) -> list[forms.Column]:
    result = _execute(connection, sa.text(f"SELECT * FROM ({bound.text}) AS definition LIMIT 0"), parameter)
    description: Any = result.cursor.description if result.cursor else ()
    names = [(column[0], column[1]) for column in description]
    result.close()
    if engines.is_sqlite(connection):
        # Of a subquery's columns, the second called user_id is user_id:1.
        return [forms.Column(name.partition(":")[0].lower()) for name, _ in names]
    types = connection.execute(
        sa.text("SELECT oid, typname, typcategory FROM pg_catalog.pg_type WHERE oid = ANY(:oids)"),
        {"oids": [oid for _, oid in names]},
    )
    known = {oid: (name, category) for oid, name, category in types}
    return [forms.Column(name, *known[oid]) for name, oid in names]


def _need_columns(definition: Definition, names: Sequence[str]) -> list[str]:
    needed = ["user_id", "value"] if definition.kind is Kind.TRAIT else ["user_id"]
    for name in needed:
        if names.count(name) != 1:
            raise DefinitionError(
                f"{definition.key}: its SQL must give one column called {name}; it gives {', '.join(names)}. "
                f"Write SELECT … AS {name}."
            )
    return needed


def _authorize(
    connection: sa.Connection,
    definition: Definition,
    bound: sa.TextClause,
    parameter: sa.BindParameter[Any] | None,
) -> None:
    """On SQLite: prepare a definition alone, under an authorizer that knows nothing but reading."""
    if not engines.is_sqlite(connection):
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
        _execute(connection, sa.text(f"EXPLAIN {bound.text}"), parameter).close()
    except sa.exc.DBAPIError as error:
        if not refused:
            raise
        raise DefinitionError(
            f"{definition.key}: a definition may only read, and this one does more ({refused[0]})."
        ) from error
    finally:
        raw.set_authorizer(None)


@contextmanager
def _limits(connection: sa.Connection, deadline: float) -> Iterator[None]:
    """Let statements run until then, and no longer, and not after a signal."""
    raw: Any = connection.connection.dbapi_connection
    match connection.dialect.name:
        case "sqlite":
            raw.set_progress_handler(lambda: time.monotonic() > deadline, PROGRESS_STEPS)
            try:
                yield
            finally:
                raw.set_progress_handler(None, 0)
        case "postgresql":
            milliseconds = max(1, int((deadline - time.monotonic()) * 1000))
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds}")
            try:
                yield
            except Interrupted:
                raw.cancel_safe()
                connection.invalidate()
                raise
        case _:
            yield


def _too_long(definition: Definition) -> str:
    return (
        f"{definition.key}: its SQL ran longer than {definition.timeout_seconds:g} seconds. Make it faster, "
        "or give the definition a longer timeout."
    )


@contextmanager
def _words(definition: Definition, source: sa.Engine | None, deadline: float) -> Iterator[None]:
    """Say a driver's error as the definition's, or the source's; our own database's stays as it is."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        told = engines.reason(error)
        if "statement timeout" in told or (told == "interrupted" and time.monotonic() > deadline):
            raise DefinitionError(_too_long(definition)) from error
        if told in {"interrupted", "user-defined function raised exception"}:
            # SQLite swallows what a signal raises while it calls back.
            raise Interrupted("A signal stopped the statement.") from error
        if not _is_servers(error):
            raise DefinitionError(f"{definition.key}: its SQL does not work: {told}.") from error
        if source is None:
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
