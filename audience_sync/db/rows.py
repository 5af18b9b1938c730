"""Insert and update many rows of one table, in the fastest way for each database.

SQLite gets several hundred rows in a statement, because it rebuilds the lists in CHECK constraints for each
statement, which costs more than a row. PostgreSQL gets rows in a JSON document, and many of them by COPY. Values are
text, numbers or None; `moment` and `engines.to_json` turn other values into text.
"""

import datetime as dt
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db.dialects import copy_rows, is_sqlite
from audience_sync.db.tables import UtcDateTime

COPY_FROM = 1_000  # the fewest rows for which COPY is worth its round trips
ROWS_PER_STATEMENT = 500  # on SQLite, where a statement has at most 32,766 values
Row = tuple[Any, ...]
_POSTGRESQL = postgresql.dialect()  # type: ignore[no-untyped-call]
_ONE_DOCUMENT = msgspec.json.Encoder()


@lru_cache(maxsize=10_000)  # a call's moment is written to several tables
def moment(value: dt.datetime) -> str:
    return UtcDateTime.text(value)


def insert(
    connection: sa.Connection,
    table: sa.Table,
    columns: tuple[str, ...],
    rows: Sequence[Row],
    suffix: str = "",
) -> int:
    """Insert the rows in this order; return how many were inserted.

    `suffix` is an ON CONFLICT clause, in which `t` is the table.
    """
    if not rows:
        return 0
    into = f"INSERT INTO {_our(connection)}{table.name} AS t ({_quoted(columns)})"
    if is_sqlite(connection):
        return _insert_into_sqlite(connection, into, len(columns), rows, suffix)
    if len(rows) >= COPY_FROM and not suffix:
        _copy(connection, f"{_our(connection)}{table.name}", columns, rows)
        return len(rows)
    with _as_source(connection, table, columns, rows) as (source, values, parameters):
        statement = f"{into} SELECT {', '.join(values.values())} FROM {source} {suffix}"
        return connection.exec_driver_sql(statement, parameters).rowcount


def _insert_into_sqlite(
    connection: sa.Connection, into: str, width: int, rows: Sequence[Row], suffix: str
) -> int:
    placeholders = f"({', '.join('?' * width)})"
    whole = len(rows) - len(rows) % ROWS_PER_STATEMENT
    count = 0
    for part, size in ((rows[:whole], ROWS_PER_STATEMENT), (rows[whole:], len(rows) - whole)):
        if part:
            statement = f"{into} VALUES {', '.join([placeholders] * size)} {suffix}"
            starts = range(0, len(part), size)
            flat = [tuple(itertools.chain.from_iterable(part[start : start + size])) for start in starts]
            count += connection.exec_driver_sql(statement, flat).rowcount
    return count


def update(
    connection: sa.Connection,
    table: sa.Table,
    columns: tuple[str, ...],
    rows: Sequence[Row],
    where: str = "true",
) -> int:
    """Update rows: the first column is the key, the others are set; return how many rows were changed.

    `where` is an additional condition, in which `t` is the table and `{name}` the new value of a column.
    """
    if not rows:
        return 0
    what = f"UPDATE {_our(connection)}{table.name} AS t SET"
    if is_sqlite(connection):
        placeholders = {name: f"?{number}" for number, name in enumerate(columns, 1)}
        statement = f"{what} {_assignments(columns, placeholders, where)}"
        return connection.exec_driver_sql(statement, list(rows)).rowcount
    with _as_source(connection, table, columns, rows) as (source, values, parameters):
        statement = f"{what} {_assignments(columns, values, where, f'FROM {source}')}"
        return connection.exec_driver_sql(statement, parameters).rowcount


def _assignments(columns: tuple[str, ...], values: Mapping[str, str], where: str, source: str = "") -> str:
    key, *others = columns
    assigned = ", ".join(f'"{name}" = {values[name]}' for name in others)
    return f'{assigned} {source} WHERE t."{key}" = {values[key]} AND {where.format(**values)}'


@contextmanager
def _as_source(
    connection: sa.Connection, table: sa.Table, columns: tuple[str, ...], rows: Sequence[Row]
) -> Iterator[tuple[str, dict[str, str], tuple[str, ...]]]:
    """Give rows to a PostgreSQL statement; yield its FROM item, each column's expression, and the parameters."""
    values = _casts(table, columns)
    if len(rows) < COPY_FROM:
        document = _ONE_DOCUMENT.encode([dict(zip(columns, row, strict=True)) for row in rows]).decode()
        types = ", ".join(f'"{name}" text' for name in columns)
        yield f"json_to_recordset(CAST(%s AS json)) AS new ({types})", values, (document,)
        return
    connection.exec_driver_sql(_CREATE_NEW)
    _copy(connection, "pg_temp.audience_sync_new", tuple(_NEW_COLUMNS[: len(columns)]), rows)
    yield f"pg_temp.audience_sync_new AS new ({_quoted(columns)})", values, ()
    connection.exec_driver_sql("DELETE FROM pg_temp.audience_sync_new")


# One table is reused and never dropped, because creating it each time would leave dead rows in PostgreSQL's catalogs.
_NEW_COLUMNS = [f"value_{number}" for number in range(1, 17)]
_CREATE_NEW = (
    f"CREATE TEMPORARY TABLE IF NOT EXISTS audience_sync_new ({', '.join(f'{name} text' for name in _NEW_COLUMNS)}) "
    "ON COMMIT DELETE ROWS"
)


@lru_cache(maxsize=64)
def _casts(table: sa.Table, columns: tuple[str, ...]) -> dict[str, str]:
    return {name: _cast(table.c[name].type, f'new."{name}"') for name in columns}


def _cast(kind: sa.types.TypeEngine[Any], value: str) -> str:
    if isinstance(kind, UtcDateTime):
        return f"CAST({value} || '+00' AS timestamptz)"
    if isinstance(kind, sa.Text):
        return value
    return f"CAST({value} AS {kind.compile(_POSTGRESQL)})"


def _copy(connection: sa.Connection, table: str, columns: tuple[str, ...], rows: Sequence[Row]) -> None:
    connection.exec_driver_sql("SET LOCAL timezone = 'UTC'")  # the text of moments has no zone
    # PostgreSQL stores one batch while we format the next.
    batches = (rows[start : start + COPY_FROM] for start in range(0, len(rows), COPY_FROM))
    copy_rows(connection, table, batches, f"({_quoted(columns)})")


def _quoted(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def _our(connection: sa.Connection) -> str:
    our: str = connection.get_execution_options()["our"]
    return our
