"""The differences between SQLite and PostgreSQL: statements, temporary tables, COPY, the clock.

In a statement, `{our}` is the prefix of the names of our tables, and `{temp}` of temporary tables.
"""

import datetime as dt
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db.tables import UtcDateTime
from audience_sync.db.watch import cancel

# Ids in a statement as single parameters, whose number is limited: SQLite 32,766, PostgreSQL 65,535.
CHUNK = 500
MAX_ID = 2**63 - 1
Id = TypeVar("Id", int, str)


def is_sqlite(bind: sa.Engine | sa.Connection) -> bool:
    return bind.dialect.name == "sqlite"


def sql(connection: sa.Connection, statement: str, **parameters: Any) -> sa.CursorResult[*tuple[Any, ...]]:
    """Run a statement on our tables and temporary tables. A parameter for `IN :name` is a list of any length."""
    our = connection.get_execution_options()["our"]
    for name, value in parameters.items():
        if isinstance(value, list) and len(value) > CHUNK:
            statement = re.sub(rf"IN :{name}\b", f"IN {_listed(connection, name, value)}", statement)
            parameters[name] = json.dumps(value)
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


def _listed(connection: sa.Connection, name: str, values: Sequence[Any]) -> str:
    """Return a query for the values in a parameter that is a JSON list."""
    if is_sqlite(connection):
        return f"(SELECT value FROM json_each(:{name}))"
    kind = "bigint" if isinstance(values[0], int) else "text"
    return f"(SELECT CAST(value AS {kind}) FROM json_array_elements_text(CAST(:{name} AS json)))"


def is_among(
    connection: sa.Connection, column: sa.Column[Any], values: Iterable[Any]
) -> sa.ColumnElement[bool]:
    """Return an IN condition for a list of any length.

    PostgreSQL always gets one array, because thousands of parameters cost more than their rows.
    """
    listed = list(values)
    if not is_sqlite(connection):
        kind = sa.BigInteger() if column.type.python_type is int else sa.Text()
        return column == sa.any_(sa.literal(listed, postgresql.ARRAY(kind)))
    if len(listed) <= CHUNK:
        return column.in_(listed)
    return column.in_(sa.select(sa.column("value")).select_from(sa.func.json_each(json.dumps(listed))))


def newest_of(
    connection: sa.Connection,
    columns: Mapping[sa.Column[Any], Any],
    id_column: sa.Column[int],
    before: int | None,
) -> tuple[list[sa.ColumnElement[bool]], list[sa.UnaryExpression[Any]]]:
    """Return conditions and an order for rows with these values, newest first, by an index on these columns and the id.

    PostgreSQL compares whole index entries. If it compared single columns, it would expect such rows everywhere, and might
    read the whole table backwards to find the first one.
    """
    below = MAX_ID if before is None else before
    if is_sqlite(connection) or not columns:
        return [column == value for column, value in columns.items()] + [id_column < below], [
            id_column.desc()
        ]
    entry, values = [*columns, id_column], list(columns.values())
    types = [column.type for column in entry]
    first, end = sa.tuple_(*values, -1, types=types), sa.tuple_(*values, below, types=types)
    present = [column.is_not(None) for column in columns]  # so that a partial index is used
    is_between = [sa.tuple_(*entry) > first, sa.tuple_(*entry) < end]
    return [*present, *is_between], [column.desc() for column in entry]


def indexed_by(connection: sa.Connection, index: str) -> str:
    """Return the clause after a table's name that makes SQLite use an index; empty for PostgreSQL.

    SQLite has no statistics, so it may choose a slower plan.
    """
    return f"INDEXED BY {index}" if is_sqlite(connection) else ""


def json_list(connection: sa.Connection, parameter: str) -> str:
    """Return a FROM item with the column `value`: the texts in a parameter that is a JSON list of any length."""
    if is_sqlite(connection):
        return f"(SELECT value FROM json_each(:{parameter}))"
    return f"(SELECT value FROM json_array_elements_text(CAST(:{parameter} AS json)))"


def json_keys(connection: sa.Connection, column: str) -> str:
    """Return a FROM item with the column `name`: the names in a JSON object, unless it is nested too deeply for SQLite."""
    if is_sqlite(connection):
        return f"(SELECT key AS name FROM json_each(CASE WHEN json_valid({column}) THEN {column} END))"
    return f"(SELECT json_object_keys({column}) AS name)"


def chunks(ids: Collection[Id]) -> Iterator[Sequence[Id]]:
    """Split the ids, without duplicates, into parts that fit into one statement."""
    unique = list(dict.fromkeys(ids))
    return (unique[start : start + CHUNK] for start in range(0, len(unique), CHUNK))


def now(connection: sa.Connection) -> dt.datetime:
    """Return the time by the database's clock; on SQLite, by this machine's."""
    if is_sqlite(connection):
        return dt.datetime.now(dt.UTC)
    moment: dt.datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment.astimezone(dt.UTC)


def time_of(engine: sa.Engine) -> dt.datetime | None:
    """Return the time by the database's clock, None if it cannot be reached."""
    try:
        with engine.connect() as connection:
            return now(connection)
    except sa.exc.DBAPIError:
        return None


def create_temp_table(
    connection: sa.Connection, name: str, columns: str, *, unique_ids: bool = False
) -> None:
    """Create {temp}audience_sync_NAME, and drop an older one.

    In `columns`, `{id}` is the type of a user id: text that is compared byte by byte. With `unique_ids` SQLite stores the
    rows in the order of the id column and refuses duplicates. PostgreSQL, which joins by hash, gets no index.
    """
    is_keyed = unique_ids and is_sqlite(connection)
    id_type = "text" if is_sqlite(connection) else 'text COLLATE "C"'
    drop_temp_table(connection, name)
    sql(
        connection,
        f"CREATE TEMPORARY TABLE audience_sync_{name} "
        f"({columns.replace('{id}', 'text PRIMARY KEY' if is_keyed else id_type)})"
        f"{' WITHOUT ROWID' if is_keyed else ''}"
        # In a part of one transaction, the table ends with it: a pooler gives the connection to others afterwards.
        f"{' ON COMMIT DROP' if connection.in_nested_transaction() else ''}",
    )


def drop_temp_table(connection: sa.Connection, name: str) -> None:
    sql(connection, f"DROP TABLE IF EXISTS {{temp}}audience_sync_{name}")


@contextmanager
def with_settings(connection: sa.Connection, settings: Mapping[str, str]) -> Iterator[None]:
    """Change settings of PostgreSQL for a block of a transaction; an error rolls the block back and so resets them."""
    present = [f"pg_catalog.current_setting('{name}')" for name in settings]
    before = connection.exec_driver_sql(f"SELECT {', '.join(present)}").one()
    set_locally(connection, settings)
    yield
    set_locally(connection, dict(zip(settings, before, strict=True)))


def set_locally(connection: sa.Connection, settings: Mapping[str, str]) -> None:
    """Change settings of PostgreSQL until the transaction ends."""
    calls = ", ".join(["pg_catalog.set_config(%s, %s, true)"] * len(settings))
    values = tuple(text for pair in settings.items() for text in pair)
    connection.exec_driver_sql(f"SELECT {calls}", values, execution_options={"stream_results": False})


def copy_rows(
    connection: sa.Connection,
    table: str,
    batches: Iterable[Sequence[Sequence[Any]]],
    columns: str = "",
) -> None:
    """Write rows by PostgreSQL's COPY, with one batch in memory as text.

    `table` is the whole name, `columns` a list in parentheses. Values are text without NUL, numbers or None.
    """
    with copy_in(connection, f"COPY {table} {columns} FROM STDIN") as copy:
        for batch in batches:
            copy.write(_copy_text(batch))


# Placeholders for the end of a value, the end of a row and NULL, while the values themselves are escaped.
_VALUE_END, _ROW_END, _NULL = "\0t", "\0n", "\0z"
_COPY_ESCAPES = (
    ("\\", r"\\"), ("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r"),
    (_VALUE_END, "\t"), (_ROW_END, "\n"), (_NULL, r"\N"),
)  # fmt: skip


def _copy_text(rows: Sequence[Sequence[Any]]) -> str:
    try:
        lines = [_VALUE_END.join(row) for row in rows]
    except TypeError:  # not all values are text
        lines = [_VALUE_END.join([_NULL if value is None else str(value) for value in row]) for row in rows]
    text = _ROW_END.join([*lines, ""])
    for plain, escaped in _COPY_ESCAPES:
        text = text.replace(plain, escaped)
    return text


@contextmanager
def copy_in(connection: sa.Connection, statement: str) -> Iterator[Any]:
    """Run PostgreSQL's COPY FROM STDIN; yield the object to `write` text to. Errors become SQLAlchemy's."""
    raw: Any = connection.connection.dbapi_connection
    kind = connection.dialect.loaded_dbapi.Error
    try:
        with raw.cursor() as cursor, cursor.copy(statement) as copy:
            try:
                yield copy
            except Exception:
                raise
            except BaseException:  # a signal; without this psycopg would wait for the COPY before it ends it
                cancel(raw)
                raise
    except kind as error:
        is_gone = connection.dialect.is_disconnect(error, raw, None)
        raise sa.exc.DBAPIError.instance(
            statement, None, error, kind, hide_parameters=True, connection_invalidated=is_gone
        ) from error
    except Exception:
        raise
    except BaseException:  # a signal; the COPY may still be running, and no other statement could follow
        connection.invalidate()
        raise
