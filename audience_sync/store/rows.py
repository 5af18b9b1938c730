"""Many rows of one table at once, by the fastest way of each database.

SQLite takes some hundred in a statement: it prepares the lists in CHECK constraints anew for each, which costs more
than a row. PostgreSQL takes them as one JSON document. Values are text, numbers or None; `moment` and `document` make
text of what is neither.
"""

import datetime as dt
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.store.engines import document, is_sqlite
from audience_sync.store.tables import UtcDateTime

TOGETHER = 500  # rows in a statement of SQLite, which takes 32,766 values
Row = tuple[Any, ...]
__all__ = ("Row", "document", "insert", "moment", "update")


@lru_cache(maxsize=10_000)  # a call's moment goes into several tables
def moment(value: dt.datetime) -> str:
    return UtcDateTime.text(value)


def insert(
    connection: sa.Connection,
    table: sa.Table,
    columns: tuple[str, ...],
    rows: Sequence[Row],
    suffix: str = "",
) -> int:
    """Insert the rows in their order; how many were. `suffix` is an ON CONFLICT clause, in which `t` is the table."""
    our = _our(connection)
    if not is_sqlite(connection):
        return _run(connection, _insert(table, columns, suffix, our, 0), columns, rows)
    count = 0
    whole = len(rows) - len(rows) % TOGETHER
    for some, together in ((rows[:whole], TOGETHER), (rows[whole:], len(rows) - whole)):
        flat = [
            tuple(itertools.chain.from_iterable(some[at : at + together]))
            for at in range(0, len(some), together or 1)
        ]
        if flat:
            statement = _insert(table, columns, suffix, our, together)
            count += connection.exec_driver_sql(statement, flat).rowcount
    return count


def update(
    connection: sa.Connection,
    table: sa.Table,
    columns: tuple[str, ...],
    rows: Sequence[Row],
    where: str = "true",
) -> int:
    """Set the columns, but the first, of the rows that the first one tells; how many were.

    `where` says which of those; in it `t` is the table, and `{name}` what is told of a column.
    """
    statement = _update(table, columns, where, _our(connection), is_sqlite(connection))
    return _run(connection, statement, columns, rows)


@lru_cache(maxsize=64)
def _insert(table: sa.Table, columns: tuple[str, ...], suffix: str, our: str, together: int) -> str:
    """`together`: how many rows SQLite's statement takes; 0 is PostgreSQL's."""
    names = ", ".join(f'"{each}"' for each in columns)
    if together:
        row = f"({', '.join('?' * len(columns))})"
        values = f"VALUES {', '.join([row] * together)}"
    else:
        values = f"SELECT {', '.join(_told(table, columns, sqlite=False).values())} FROM {_NEW}"
    return f"INSERT INTO {our}{table.name} AS t ({names}) {values} {suffix}".replace(
        "{names}", _texts(columns)
    )


@lru_cache(maxsize=64)
def _update(table: sa.Table, columns: tuple[str, ...], where: str, our: str, sqlite: bool) -> str:
    told = _told(table, columns, sqlite=sqlite)
    key, *others = columns
    assigned = ", ".join(f'"{each}" = {told[each]}' for each in others)
    source = "" if sqlite else f"FROM {_NEW.replace('{names}', _texts(columns))}"
    which = f'"{key}" = {told[key]} AND {where.format(**told)}'
    return f"UPDATE {our}{table.name} AS t SET {assigned} {source} WHERE t.{which}"


_POSTGRESQL = postgresql.dialect()  # type: ignore[no-untyped-call]
_NEW = "json_to_recordset(CAST(%s AS json)) AS new ({names})"


def _told(table: sa.Table, columns: tuple[str, ...], *, sqlite: bool) -> dict[str, str]:
    """Of each column the expression for its new value."""
    if sqlite:
        return {name: f"?{number}" for number, name in enumerate(columns, 1)}
    return {name: _cast(table.c[name].type, f'new."{name}"') for name in columns}


def _cast(kind: sa.types.TypeEngine[Any], value: str) -> str:
    if isinstance(kind, UtcDateTime):
        return f"CAST({value} || '+00' AS timestamptz)"
    if isinstance(kind, sa.Text):
        return value
    return f"CAST({value} AS {kind.compile(_POSTGRESQL)})"


def _texts(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{each}" text' for each in columns)


def _our(connection: sa.Connection) -> str:
    our: str = connection.get_execution_options()["our"]
    return our


def _run(connection: sa.Connection, statement: str, columns: tuple[str, ...], rows: Sequence[Row]) -> int:
    if not rows:
        return 0
    if is_sqlite(connection):
        return connection.exec_driver_sql(statement, list(rows)).rowcount
    told = msgspec.json.encode([dict(zip(columns, row, strict=True)) for row in rows])
    return connection.exec_driver_sql(statement, (told.decode(),)).rowcount
