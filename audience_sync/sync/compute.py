"""Compute a definition into the snapshot table: on our own database, or streamed from a source."""

import datetime as dt
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from audience_sync.definitions import sql as definition_sql
from audience_sync.definitions.model import Definition, Kind
from audience_sync.errors import DefinitionError, SourceError
from audience_sync.store import engines, snapshots
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


def compute(
    connection: sa.Connection,
    definition: Definition,
    as_of: dt.datetime,
    source: sa.Engine | None,
    *,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Fill the snapshot table with the definition's result as of a moment; what was set aside, by reason.

    `connection` is to our own database, and not in a transaction. `alive` is called while rows stream.

    Raises:
        DefinitionError: the definition cannot be computed as it is written, or not in its time.
        SourceError: its source cannot be reached.

    """
    engine = source or connection.engine
    definition_sql.check(definition.sql, engine.dialect.name)
    with _words(definition, source):
        if source is not None:
            counts = _stream(connection, definition, as_of, source, alive)
        else:
            counts = _in_place(connection, definition, as_of)
    return {reason: counts[reason] for reason in sorted(counts)}


def _in_place(connection: sa.Connection, definition: Definition, as_of: dt.datetime) -> Counter[str]:
    bound = definition_sql.bind(definition.sql, connection.dialect.name)
    parameter = _as_of(connection, definition, as_of)
    connection.execution_options(write=False)
    with connection.begin(), _limits(connection, definition.timeout_seconds):
        if engines.is_sqlite(connection):
            _authorize(connection, bound, definition)
        columns = _columns(connection, bound, parameter)
        _need_columns(definition, [column.name for column in columns])
        user_id = next(column for column in columns if column.name == "user_id")
        if not snapshots.id_is_possible(user_id):
            raise DefinitionError(
                f"{definition.key}: the column user_id is of type {user_id.type_name}: give text, a number or a uuid."
            )
        snapshots.take(connection, bound, definition.kind, columns, parameter)
        return Counter(snapshots.set_aside(connection, definition.kind))


def _as_of(
    connection: sa.Connection, definition: Definition, as_of: dt.datetime
) -> sa.BindParameter[Any] | None:
    if not definition_sql.uses_as_of(definition.sql, connection.dialect.name):
        return None
    if engines.is_sqlite(connection):
        return sa.bindparam("as_of", f"{as_of.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S}", type_=sa.Text())
    if connection.dialect.name == "postgresql":
        return sa.bindparam("as_of", as_of, type_=UtcDateTime())
    return sa.bindparam("as_of", as_of.astimezone(dt.UTC).replace(tzinfo=None), type_=sa.DateTime())


def _columns(
    connection: sa.Connection, bound: str, parameter: sa.BindParameter[Any] | None
) -> list[snapshots.Column]:
    probe = sa.text(f"SELECT * FROM ({bound}) AS definition LIMIT 0")
    result = connection.execute(probe if parameter is None else probe.bindparams(parameter))
    description: Any = result.cursor.description if result.cursor else ()
    names = [(column[0], column[1]) for column in description]
    result.close()
    if engines.is_sqlite(connection):
        return [snapshots.Column(name) for name, _ in names]
    types = connection.execute(
        sa.text("SELECT oid, typname, typcategory FROM pg_catalog.pg_type WHERE oid = ANY(:oids)"),
        {"oids": [oid for _, oid in names]},
    )
    known = {oid: (name, category) for oid, name, category in types}
    return [snapshots.Column(name, *known[oid]) for name, oid in names]


def _need_columns(definition: Definition, names: list[str]) -> None:
    needed = ["user_id", "value"] if definition.kind is Kind.TRAIT else ["user_id"]
    for name in needed:
        if names.count(name) != 1:
            raise DefinitionError(
                f"{definition.key}: its SQL must give one column called {name}; it gives {', '.join(names)}. "
                f"Write SELECT … AS {name}."
            )


def _authorize(connection: sa.Connection, bound: str, definition: Definition) -> None:
    """Prepare a definition alone, under an authorizer that knows nothing but reading."""
    raw: Any = connection.connection.dbapi_connection
    refused: list[str] = []

    def authorizer(action: int, argument: str | None, name: str | None, *_: object) -> int:
        if action in _QUERY_ACTIONS and not (
            action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS
        ):
            return sqlite3.SQLITE_OK
        refused.append(str(argument or name or action))
        return sqlite3.SQLITE_DENY

    raw.set_authorizer(authorizer)
    try:
        statement = str(sa.text(f"EXPLAIN {bound}").compile(dialect=connection.dialect))
        raw.execute(statement, ("",) * statement.count("?") if ":as_of" not in statement else {"as_of": ""})
    except (sqlite3.Error, sqlite3.Warning) as error:
        if refused:
            raise DefinitionError(
                f"{definition.key}: a definition may only read, and this one does more ({refused[0]})."
            ) from error
        raise DefinitionError(f"{definition.key}: its SQL does not work: {error}.") from error
    finally:
        raw.set_authorizer(None)


@contextmanager
def _limits(connection: sa.Connection, seconds: float) -> Iterator[None]:
    """Let a statement run for so long, and no longer."""
    if not engines.is_sqlite(connection):
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text(f"SET LOCAL statement_timeout = {int(seconds * 1000)}"))
        yield
        return
    raw: Any = connection.connection.dbapi_connection
    deadline = time.monotonic() + seconds
    raw.set_progress_handler(lambda: time.monotonic() > deadline, PROGRESS_STEPS)
    try:
        yield
    finally:
        raw.set_progress_handler(None, 0)


def _stream(
    connection: sa.Connection,
    definition: Definition,
    as_of: dt.datetime,
    source: sa.Engine,
    alive: Callable[[], None],
) -> Counter[str]:
    """Read a source in batches and load them; only one batch is in memory."""
    counts: Counter[str] = Counter()
    bound = sa.text(definition_sql.bind(definition.sql, source.dialect.name))
    deadline = time.monotonic() + definition.timeout_seconds
    with source.connect() as reading:
        if source.dialect.name == "postgresql":
            reading.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with reading.begin(), _limits(reading, definition.timeout_seconds):
            parameter = _as_of(reading, definition, as_of)
            if engines.is_sqlite(reading):
                _authorize(reading, bound.text, definition)
            options = {"stream_results": True, "max_row_buffer": FETCH_ROWS}
            result = reading.execution_options(**options).execute(
                bound if parameter is None else bound.bindparams(parameter)
            )
            names = [name.lower() for name in result.keys()]  # noqa: SIM118  (a result, not a dict)
            _need_columns(definition, names)
            places = [names.index("user_id")]
            if definition.kind is Kind.TRAIT:
                places.append(names.index("value"))

            def rows() -> Iterator[tuple[str, str | None]]:
                for batch in result.partitions(FETCH_ROWS):
                    if time.monotonic() > deadline:
                        raise DefinitionError(_too_long(definition))
                    alive()
                    yield from values.rows(batch, places, counts)

            connection.execution_options(write=False)
            with connection.begin():
                snapshots.load(connection, rows(), definition.kind)
                counts.update(snapshots.set_aside(connection, definition.kind))
    return counts


def _too_long(definition: Definition) -> str:
    return (
        f"{definition.key}: its SQL ran longer than {definition.timeout_seconds:g} seconds. Make it faster, "
        "or give the definition a longer timeout."
    )


@contextmanager
def _words(definition: Definition, source: sa.Engine | None) -> Iterator[None]:
    """Say a driver's error as the definition's, or the source's."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        told = engines.reason(error)
        if "interrupted" in told or "statement timeout" in told:
            raise DefinitionError(_too_long(definition)) from error
        if source is not None and (error.connection_invalidated or error.statement is None):
            raise SourceError(
                f"{definition.key}: the source {definition.source} cannot be reached: {told}. Is it running, and "
                f"is its url in [sources.{definition.source}] right?"
            ) from error
        raise DefinitionError(f"{definition.key}: its SQL does not work: {told}.") from error
