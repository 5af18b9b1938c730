"""Many rows of one table at once, by the fastest way of each database.

SQLite takes some hundred in a statement: it prepares the lists in CHECK constraints anew for each, which costs more
than a row. PostgreSQL takes them as one JSON document, and many by COPY. Values are text, numbers or None; `moment` and
`document` make text of what is neither.
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

from audience_sync.db.engines import copy_in, document, is_sqlite
from audience_sync.db.tables import UtcDateTime

MANY = 1_000  # rows for which COPY is worth its round trips
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
    if not rows:
        return 0
    into, names = f"{_our(connection)}{table.name}", _names(columns)
    if is_sqlite(connection):
        places = f"({', '.join('?' * len(columns))})"
        whole = len(rows) - len(rows) % TOGETHER
        count = 0
        for some, together in ((rows[:whole], TOGETHER), (rows[whole:], len(rows) - whole)):
            flat = [
                tuple(itertools.chain.from_iterable(some[at : at + together]))
                for at in range(0, len(some), together or 1)
            ]
            if flat:
                statement = (
                    f"INSERT INTO {into} AS t ({names}) VALUES {', '.join([places] * together)} {suffix}"
                )
                count += connection.exec_driver_sql(statement, flat).rowcount
        return count
    if len(rows) >= MANY and not suffix:
        _copy(connection, into, columns, rows)
        return len(rows)
    with _new(connection, table, columns, rows) as (source, values, parameters):
        told = ", ".join(values.values())
        statement = f"INSERT INTO {into} AS t ({names}) SELECT {told} FROM {source} {suffix}"
        return connection.exec_driver_sql(statement, parameters).rowcount


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
    if not rows:
        return 0
    what = f"{_our(connection)}{table.name}"
    if is_sqlite(connection):
        places = {name: f"?{number}" for number, name in enumerate(columns, 1)}
        statement = f"UPDATE {what} AS t SET {_assigned(columns, places, where)}"
        return connection.exec_driver_sql(statement, list(rows)).rowcount
    with _new(connection, table, columns, rows) as (source, values, parameters):
        statement = f"UPDATE {what} AS t SET {_assigned(columns, values, where, f'FROM {source}')}"
        return connection.exec_driver_sql(statement, parameters).rowcount


def _assigned(columns: tuple[str, ...], told: Mapping[str, str], where: str, source: str = "") -> str:
    key, *others = columns
    assigned = ", ".join(f'"{each}" = {told[each]}' for each in others)
    return f'{assigned} {source} WHERE t."{key}" = {told[key]} AND {where.format(**told)}'


@contextmanager
def _new(
    connection: sa.Connection, table: sa.Table, columns: tuple[str, ...], rows: Sequence[Row]
) -> Iterator[tuple[str, dict[str, str], tuple[str, ...]]]:
    """The rows in a statement of PostgreSQL: its source, each column's value in it, and the parameters."""
    values = _casts(table, columns)
    if len(rows) < MANY:
        told = msgspec.json.encode([dict(zip(columns, row, strict=True)) for row in rows])
        texts = ", ".join(f'"{each}" text' for each in columns)
        yield f"json_to_recordset(CAST(%s AS json)) AS new ({texts})", values, (told.decode(),)
        return
    connection.exec_driver_sql(_PLACE)
    _copy(connection, "pg_temp.audience_sync_new", tuple(_PLACES[: len(columns)]), rows)
    yield f"pg_temp.audience_sync_new AS new ({_names(columns)})", values, ()
    connection.exec_driver_sql("DELETE FROM pg_temp.audience_sync_new")


# One for all and kept: what is created and dropped each time leaves dead rows in PostgreSQL's catalogues.
_PLACES = [f"value_{number}" for number in range(1, 17)]
_PLACE = (
    f"CREATE TEMPORARY TABLE IF NOT EXISTS audience_sync_new ({', '.join(f'{each} text' for each in _PLACES)}) "
    "ON COMMIT DELETE ROWS"
)
_POSTGRESQL = postgresql.dialect()  # type: ignore[no-untyped-call]


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
    connection.exec_driver_sql("SET LOCAL timezone = 'UTC'")  # for moments, whatever the URL's options are
    with copy_in(connection, f"COPY {table} ({_names(columns)}) FROM STDIN") as copy:
        for start in range(0, len(rows), MANY):  # PostgreSQL stores the first, while the next become text
            some = rows[start : start + MANY]
            copy.write("".join(["\t".join([_copied(value) for value in row]) + "\n" for row in some]))


def _copied(value: Any) -> str:
    """In COPY's text form."""
    if value is None:
        return r"\N"
    text = str(value)
    for special, escaped in _SPECIAL:
        if special in text:
            text = text.replace(special, escaped)
    return text


_SPECIAL = (("\\", r"\\"), ("\n", r"\n"), ("\t", r"\t"), ("\r", r"\r"))


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{each}"' for each in columns)


def _our(connection: sa.Connection) -> str:
    our: str = connection.get_execution_options()["our"]
    return our
