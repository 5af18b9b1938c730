"""Compute a definition into a temporary table: on our own database, or streamed from a source.

`ready_sql` and `eligible_sql` run on the same database as the definition. Every query runs in a read-only transaction
with a deadline (reading.py). snapshot.py has the tables that the rows are put into, values.py and postgresql_values.py
the canonical text of ids and values.
"""

import datetime as dt
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from audience_sync.audiences import postgresql_values, snapshot, statement, values
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.reading import (
    BoundQuery,
    authorize,
    begin_reading,
    execute_query,
    lock_seconds,
    timeout_message,
)
from audience_sync.audiences.schedule import load_zone
from audience_sync.db import dialects, engines
from audience_sync.errors import AudienceSyncError, DefinitionError, unexpected
from audience_sync.stopping import Stop

if TYPE_CHECKING:
    from audience_sync.audiences.query.compiler import CompiledQuery

# A definition's queries, as messages call them.
SQL, QUERY, READY, ELIGIBLE = "SQL", "query", "ready_sql", "eligible_sql"
FETCH_ROWS = 20_000


def compute(
    connection: sa.Connection,
    definition: Definition,
    as_of: dt.datetime,
    source: sa.Engine | None,
    stop: Stop | None = None,
) -> None:
    """Fill the snapshot table and, if the definition has an `eligible_sql`, the eligible table.

    `connection` is to our own database, outside a transaction.

    Raises:
        DefinitionError: a query is invalid, took too long or failed unexpectedly, or `ready_sql` did not return true.
        SourceError: the source cannot be reached.
        Interrupted: a signal, or `stop`, ended it.

    """
    deadline = time.monotonic() + definition.timeout_seconds

    columns = ("user_id", "value") if definition.kind is Kind.TRAIT else ("user_id",)
    dialect = (source or connection).dialect

    def prepare(name: str, sql: str, *columns: str, conversions: Iterable[str | None] = ()) -> BoundQuery:
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
        return BoundQuery(
            definition, name, text, arguments, columns, wanted, source, deadline, stop or Stop()
        )

    connection.execution_options(write=False)
    with _contained(definition):
        if definition.ready_sql:
            _check_ready(connection, prepare(READY, definition.ready_sql, "value"))
        if definition.query is None:
            query = prepare(SQL, definition.sql, *columns, conversions=[definition.value_type])
        else:
            lookup = BoundQuery(definition, QUERY, "", None, (), (), source, deadline, stop or Stop())
            for sql in definition.query.sql_texts():
                prepare(SQL, sql)
            compiled = _compile(connection, lookup, as_of)
            conversions = [compiled.value_type, definition.value_type]
            query = prepare(QUERY, compiled.sql, *columns, conversions=conversions)
        _fill(connection, snapshot.SNAPSHOT, query)
        if definition.eligible_sql:
            _fill(connection, snapshot.ELIGIBLE, prepare(ELIGIBLE, definition.eligible_sql, "user_id"))


def _compile(connection: sa.Connection, query: BoundQuery, as_of: dt.datetime) -> "CompiledQuery":
    """Compile a definition's query for the database where it runs, from which the columns of its tables are read."""
    from audience_sync.audiences.query import catalog, compiler  # noqa: PLC0415  (only where there is a query)

    definition = query.definition
    assert definition.query is not None  # noqa: S101  (the caller checked)
    with begin_reading(connection, query) as reading:
        tables = catalog.read_catalog(reading, definition.query, is_own=query.source is None)
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
    """Return warnings about a definition's query: names that were never seen, and values of an unexpected kind."""
    if definition.query is None:
        return []
    from audience_sync.audiences.query.catalog import read_catalog  # noqa: PLC0415  (only where there is a query)
    from audience_sync.audiences.query.review import review_query  # noqa: PLC0415

    lookup = _lookup(definition, source)
    with (
        engines.connected(engine, lock_seconds(definition)) as connection,
        _contained(definition),
        begin_reading(connection, lookup) as reading,
    ):
        catalog = read_catalog(reading, definition.query, is_own=source is None)
        return review_query(reading, definition.query, catalog, as_of)


def _lookup(definition: Definition, source: sa.Engine | None) -> BoundQuery:
    """Return an empty query, with which the catalog of tables is read within the definition's timeout."""
    deadline = time.monotonic() + definition.timeout_seconds
    return BoundQuery(definition, QUERY, "", None, (), (), source, deadline, Stop())


@contextmanager
def _contained(definition: Definition) -> Iterator[None]:
    """Convert an unexpected error of a driver or a library to an error of this definition."""
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


def _check_ready(connection: sa.Connection, query: BoundQuery) -> None:
    """Raise an error unless the first value of the query is true, or a number other than 0."""
    with begin_reading(connection, query) as reading:
        authorize(reading, query)
        canonical = _canonical(reading, query)
        row = execute_query(reading, f"{canonical} LIMIT 1" if canonical else query.text, query).first()
    raw = row[0] if row else None
    value = raw if canonical else values.canonical_value(raw)
    if value is None or value.startswith((values.NOT_PRIMITIVE, '"')) or value in {"false", "0"}:
        raise DefinitionError(
            f"{query.definition.key}: not ready: its ready_sql did not return true. The next run checks again."
        )


def _fill(connection: sa.Connection, table: str, query: BoundQuery) -> None:
    """Put the rows of a query into a temporary table."""
    if query.source is None:
        with engines.begin(connection):
            snapshot.create_table(connection, table, query.columns)
        with begin_reading(connection, query):
            authorize(connection, query)
            text = _canonical(connection, query)
            snapshot.fill_from_query(
                connection, table, text, query.arguments, query.columns, query.conversions
            )
    else:
        with closing(_batches(connection, query)) as batches:
            next(batches)  # the source answers before our own transaction begins
            with engines.begin(connection):
                snapshot.fill_from_rows(connection, table, batches, query.columns, query.conversions)


def _canonical(connection: sa.Connection, query: BoundQuery) -> str:
    """Return the SELECT of the query's canonical text; empty for databases without expressions for it.

    It renames the query's columns, because their names need not be unique.
    """
    if connection.dialect.name not in {"sqlite", "postgresql"}:
        return ""
    result = execute_query(connection, f"SELECT * FROM ({query.text}) AS definition LIMIT 0", query)
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


def _batches(connection: sa.Connection, query: BoundQuery) -> Generator[Sequence[values.Row]]:
    """Yield an empty batch once the source has answered, then batches of rows, one in memory at a time."""
    with begin_reading(connection, query) as reading:
        authorize(reading, query)
        if reading.dialect.name == "postgresql":  # plan for reading all rows
            reading.exec_driver_sql("SET LOCAL cursor_tuple_fraction = 1")
        canonical = _canonical(reading, query)
        reading.execution_options(stream_results=True)
        with closing(execute_query(reading, canonical or query.text, query)) as result:
            convert = _converter(reading, query, result)
            yield []
            batch: Sequence[Sequence[Any]] = result.fetchmany(1)  # SQLAlchemy has already fetched it
            while batch:
                yield convert(batch)
                if time.monotonic() > query.deadline:
                    raise DefinitionError(timeout_message(query.definition))
                batch = _fetch(reading, result.cursor)


def _converter(
    connection: sa.Connection, query: BoundQuery, result: sa.CursorResult[*tuple[Any, ...]]
) -> Callable[[Sequence[Sequence[Any]]], Sequence[values.Row]]:
    """Return the function that converts a batch of the driver's rows to canonical rows."""
    match connection.dialect.name:
        case "postgresql":
            return values.plain_rows
        case "sqlite":
            return partial(values.decode_ids, encoding=values.sqlite_encoding(connection))
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


def _check_columns(query: BoundQuery, names: Sequence[str]) -> None:
    for name in query.columns:
        if names.count(name) != 1:
            raise DefinitionError(
                f"{query.definition.key}: its {query.name} must return one column called {name}; "
                f"it returns {', '.join(names) or 'none'}. Write SELECT … AS {name}."
            )
