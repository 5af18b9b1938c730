"""The snapshot of a definition and its difference to the members, as set-based SQL.

Both live in temporary tables of one connection: {temp}audience_sync_snapshot (user_id, row_count and, for a
trait, low and high: the smallest and greatest value as JSON text) and {temp}audience_sync_changes. A value of
'!' is not a primitive. Until `commit`, nothing of ours is written.
"""

import datetime as dt
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.definitions.model import Kind
from audience_sync.store.engines import is_sqlite, sql

LOAD_ROWS = 20_000  # rows a batch on the way in from a source

# SQLite gives each value its own type. char(0) stands for null: a primary key takes none.
_SQLITE_ID = """
CASE typeof(user_id)
  WHEN 'text' THEN user_id
  WHEN 'integer' THEN CAST(user_id AS TEXT)
  WHEN 'real' THEN CASE WHEN user_id = CAST(user_id AS INTEGER) THEN CAST(CAST(user_id AS INTEGER) AS TEXT)
                        ELSE printf('%.15g', user_id) END
  WHEN 'blob' THEN char(0) || 'binary'
  ELSE char(0) END"""
_SQLITE_VALUE = """
CASE typeof(value)
  WHEN 'integer' THEN CAST(value AS TEXT)
  WHEN 'real' THEN CASE WHEN value IN (9e999, -9e999) THEN '!' WHEN value = 0 THEN '0'
                        ELSE printf('%.15g', value) END
  WHEN 'text' THEN json_quote(value)
  WHEN 'blob' THEN '!' END"""

# PostgreSQL types a column: the expression is chosen by the type's category and name in pg_type.
_NOT_FINITE = "('NaN', 'Infinity', '-Infinity')"
_PG_FLOAT = (
    f"CASE WHEN CAST(value AS text) IN {_NOT_FINITE} THEN '!' WHEN value = 0 THEN '0' "
    "ELSE CAST(CAST(CAST(value AS text) AS float8) AS text) END"
)
_PG_NUMERIC = (
    f"CASE WHEN CAST(value AS text) IN {_NOT_FINITE} THEN '!' WHEN value = trunc(value) "
    "THEN CAST(trunc(value) AS text) ELSE CAST(CAST(value AS float8) AS text) END"
)
_PG_JSON = (
    "CASE jsonb_typeof(CAST(value AS jsonb)) WHEN 'object' THEN '!' WHEN 'array' THEN '!' WHEN 'null' THEN NULL "
    "ELSE CAST(CAST(value AS jsonb) AS text) END"
)

# What cannot be a user id, in the order in which it is looked for. Widths are in characters.
_BAD_SQLITE = """
CASE WHEN user_id = char(0) THEN 'null'
     WHEN user_id = char(0) || 'binary' THEN 'binary'
     WHEN instr(user_id, char(0)) > 0 THEN 'nul_character'
     WHEN trim(user_id, char(9, 10, 13, 32)) = '' THEN 'empty'
     WHEN length(user_id) > 255 THEN 'too_long' END"""
_BAD_POSTGRESQL = """
CASE WHEN user_id IS NULL THEN 'null'
     WHEN btrim(user_id, E' \\t\\n\\r') = '' THEN 'empty'
     WHEN length(user_id) > 255 THEN 'too_long' END"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a definition's result; the type as PostgreSQL's pg_type has it, empty on SQLite."""

    name: str
    type_name: str = ""
    category: str = ""


def take(
    connection: sa.Connection,
    select: str,
    kind: Kind,
    columns: Sequence[Column],
    as_of: sa.BindParameter[Any] | None,
) -> None:
    """Compute a definition on our own database, as a subquery: no row leaves it.

    `select` is its bound text, which gives the columns (they were checked); `as_of` its parameter, if it uses it.
    """
    by_name = {column.name: column for column in columns}
    user_id = _SQLITE_ID if is_sqlite(connection) else _pg_id(by_name["user_id"])
    value = ""
    if kind is Kind.TRAIT:
        value = _SQLITE_VALUE if is_sqlite(connection) else f'({_pg_value(by_name["value"])}) COLLATE "C"'
    _group(connection, f"({select}) AS definition", user_id, value, as_of)


def load(connection: sa.Connection, rows: Iterable[tuple[str, str | None]], kind: Kind) -> None:
    """Take over a result from a source: (user id, JSON text) rows that were checked, in bounded memory."""
    temp = "temp." if is_sqlite(connection) else "pg_temp."
    sql(connection, "DROP TABLE IF EXISTS {temp}audience_sync_rows")
    sql(connection, "CREATE TEMPORARY TABLE audience_sync_rows (user_id text, value text)")
    raw: Any = connection.connection.dbapi_connection
    if is_sqlite(connection):
        insert = f"INSERT INTO {temp}audience_sync_rows VALUES (?, ?)"
        iterator = iter(rows)
        while batch := list(itertools.islice(iterator, LOAD_ROWS)):
            raw.executemany(insert, batch)
    else:
        with raw.cursor() as cursor, cursor.copy(f"COPY {temp}audience_sync_rows FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    value = "value" if kind is Kind.TRAIT else ""
    user_id = "user_id" if is_sqlite(connection) else 'user_id COLLATE "C"'
    _group(connection, f"{temp}audience_sync_rows", user_id, value)
    sql(connection, "DROP TABLE {temp}audience_sync_rows")


def _group(
    connection: sa.Connection,
    origin: str,
    user_id: str,
    value: str,
    as_of: sa.BindParameter[Any] | None = None,
) -> None:
    sql(connection, "DROP TABLE IF EXISTS {temp}audience_sync_snapshot")
    columns, made = ", low text, high text", f", min({value}), max({value})"
    if not value:
        columns, made = "", ""
    if is_sqlite(connection):
        sql(
            connection,
            "CREATE TEMPORARY TABLE audience_sync_snapshot "
            f"(user_id text PRIMARY KEY, row_count integer{columns}) WITHOUT ROWID",
        )
    else:
        sql(
            connection,
            'CREATE TEMPORARY TABLE audience_sync_snapshot (user_id text COLLATE "C", '
            f"row_count bigint{columns})",
        )
        sql(connection, "SET LOCAL extra_float_digits = 0")  # floats as text at 15 digits, as SQLite prints
    temp = "temp." if is_sqlite(connection) else "pg_temp."
    statement = sa.text(
        f"INSERT INTO {temp}audience_sync_snapshot SELECT {user_id}, count(*){made} FROM {origin} GROUP BY 1"
    )
    connection.execute(statement if as_of is None else statement.bindparams(as_of))


def set_aside(connection: sa.Connection, kind: Kind) -> dict[str, int]:
    """Take out of the snapshot what cannot be sent, and count it by reason.

    A user whose trait is not one primitive value stays in it, marked by a null value: a bad row does not
    say that he left, so the difference passes him over.
    """
    bad = _BAD_SQLITE if is_sqlite(connection) else _BAD_POSTGRESQL
    rows = sql(
        connection,
        f"SELECT {bad} AS reason, sum(row_count), count(*) FROM {{temp}}audience_sync_snapshot GROUP BY 1",
    ).all()
    counts = {reason: int(row_count) for reason, row_count, _ in rows if reason is not None}
    if counts:
        sql(connection, f"DELETE FROM {{temp}}audience_sync_snapshot WHERE {bad} IS NOT NULL")
    if kind is Kind.TRAIT:
        sql(connection, "DELETE FROM {temp}audience_sync_snapshot WHERE low IS NULL")
        for reason, condition in (("not_primitive", "low = '!'"), ("unequal_values", "low <> high")):
            marked = sql(
                connection,
                f"UPDATE {{temp}}audience_sync_snapshot SET low = NULL, high = NULL WHERE {condition}",
            ).rowcount
            if marked:
                counts[reason] = marked
    duplicates = sum(int(row_count) - int(users) for reason, row_count, users in rows if reason is None)
    if duplicates and kind is Kind.AUDIENCE:
        counts["duplicate"] = duplicates
    return counts


def diff(connection: sa.Connection, definition_id: int | None, kind: Kind) -> dict[str, int]:
    """Compare the snapshot with the members: entered, exited and, for traits, changed users, counted."""
    trait = kind is Kind.TRAIT
    sql(connection, "DROP TABLE IF EXISTS {temp}audience_sync_changes")
    new_value = "s.low" if trait else "NULL"
    members = "SELECT * FROM {our}members WHERE definition_id = :definition_id"
    entered = "m.user_id IS NULL" + (" AND s.low IS NOT NULL" if trait else "")
    changed = "s.low <> m.value" if trait else "1 = 0"
    if is_sqlite(connection):
        joins = [
            ("entered", "{temp}audience_sync_snapshot s LEFT", "{our}members m", entered),
            ("exited", "{our}members m LEFT", "{temp}audience_sync_snapshot s", "s.user_id IS NULL"),
        ]
        if trait:
            joins.append(("changed", "{temp}audience_sync_snapshot s", "{our}members m", changed))
        mine = "m.definition_id = :definition_id"
        parts = [
            f"SELECT coalesce(s.user_id, m.user_id) AS user_id, '{change}' AS change, {new_value} AS value, "
            f"m.entered_run_id, m.value AS old_value FROM {left} JOIN {right} ON m.user_id = s.user_id "
            + (f"AND {mine} WHERE {where}" if change == "entered" else f"WHERE {mine} AND {where}")
            for change, left, right, where in joins
        ]
        query = " UNION ALL ".join(parts)
    else:
        query = (
            "SELECT coalesce(s.user_id, m.user_id) AS user_id, CASE WHEN m.user_id IS NULL THEN 'entered' "
            f"WHEN s.user_id IS NULL THEN 'exited' ELSE 'changed' END AS change, CAST({new_value} AS text) "
            "AS value, m.entered_run_id, m.value AS old_value "
            f"FROM {{temp}}audience_sync_snapshot s FULL JOIN ({members}) m ON m.user_id = s.user_id "
            f"WHERE ({entered}) OR s.user_id IS NULL OR {changed}"
        )
    sql(
        connection,
        f"CREATE TEMPORARY TABLE audience_sync_changes AS {query}",
        definition_id=definition_id or 0,
    )
    rows = sql(connection, "SELECT change, count(*) FROM {temp}audience_sync_changes GROUP BY change")
    return {change: int(count) for change, count in rows}


def sample(connection: sa.Connection, change: str, limit: int = 5) -> list[str]:
    query = (
        "SELECT user_id FROM {temp}audience_sync_changes WHERE change = :change ORDER BY user_id LIMIT :limit"
    )
    return list(sql(connection, query, change=change, limit=limit).scalars())


@dataclass(frozen=True, slots=True)
class Commit:
    """What a run writes: its ids, the key's two bodies, and the moment that its values are of."""

    run_id: int
    definition_id: int
    key: str
    kind: Kind
    as_of: dt.datetime
    now: dt.datetime
    full: bool
    first: bool
    fingerprint: str | None


def commit(connection: sa.Connection, run: Commit, counts: dict[str, int]) -> None:
    """Write the new baseline and its deliveries; the caller's transaction makes them one."""
    ids = {"definition_id": run.definition_id, "run_id": run.run_id}
    if counts.get("exited") or counts.get("changed"):
        sql(
            connection,
            "INSERT INTO {our}past_members (definition_id, user_id, entered_run_id, exited_run_id, value) "
            "SELECT :definition_id, user_id, entered_run_id, :run_id, old_value "
            "FROM {temp}audience_sync_changes WHERE change <> 'entered'",
            **ids,
        )
        sql(
            connection,
            "DELETE FROM {our}members WHERE definition_id = :definition_id AND user_id IN "
            "(SELECT user_id FROM {temp}audience_sync_changes WHERE change <> 'entered')",
            definition_id=run.definition_id,
        )
    if counts.get("entered") or counts.get("changed"):
        sql(
            connection,
            "INSERT INTO {our}members (definition_id, user_id, entered_run_id, value) "
            "SELECT :definition_id, user_id, :run_id, value "
            "FROM {temp}audience_sync_changes WHERE change <> 'exited'",
            **ids,
        )
    _cancel_unheard(connection, run, counts)
    if run.full:
        _deliver_everyone(connection, run)
    else:
        _revive_dead(connection, run)
        if counts:
            _insert_deliveries(
                connection, run, "{temp}audience_sync_changes", "push" if run.first else "change"
            )


def _body(connection: sa.Connection, run: Commit) -> str:
    """The expression of a delivery's body for a row with change and value; keys need no quoting."""
    start, gone = f'{{"{run.key}": ', "false" if run.kind is Kind.AUDIENCE else "null"
    value = "'true'" if run.kind is Kind.AUDIENCE else "value"
    body = f"'{start}' || CASE change WHEN 'exited' THEN '{gone}' ELSE {value} END || '}}'"
    return f"({body})" if is_sqlite(connection) else f"CAST({body} AS json)"


def _insert_deliveries(connection: sa.Connection, run: Commit, rows: str, delivery_class: str) -> None:
    body = _body(connection, run)
    unheard = "change = 'exited' AND user_id IN (SELECT user_id FROM {temp}audience_sync_unheard)"
    sql(
        connection,
        "INSERT INTO {our}deliveries (action, subject_id, body, class, run_id, definition_id, value_at, "
        "fingerprint, status, created_at, next_attempt_at, settled_at, error) "
        f"SELECT 'identify', user_id, {body}, :class, :run_id, :definition_id, :as_of, :fingerprint, "
        f"CASE WHEN {unheard} THEN 'cancelled' ELSE 'pending' END, :now, :now, "
        f"CASE WHEN {unheard} THEN CAST(:now AS {_time_type(connection)}) END, "
        f"CASE WHEN {unheard} THEN 'left before anything was sent' END FROM {rows}",
        **{"class": delivery_class},
        run_id=run.run_id,
        definition_id=run.definition_id,
        as_of=run.as_of,
        fingerprint=run.fingerprint,
        now=run.now,
    )


def _time_type(connection: sa.Connection) -> str:
    return "text" if is_sqlite(connection) else "timestamptz"


def _cancel_unheard(connection: sa.Connection, run: Commit, counts: dict[str, int]) -> None:
    """An exit whose entry is pending, where nothing for the key and user was ever tried, cancels both."""
    sql(connection, "DROP TABLE IF EXISTS {temp}audience_sync_unheard")
    sql(
        connection,
        "CREATE TEMPORARY TABLE audience_sync_unheard AS SELECT c.user_id FROM {temp}audience_sync_changes c "
        "WHERE c.change = 'exited' AND EXISTS (SELECT 1 FROM {our}deliveries d WHERE d.subject_id = c.user_id "
        "AND d.definition_id = :definition_id AND d.status = 'pending') "
        "AND NOT EXISTS (SELECT 1 FROM {our}deliveries d WHERE d.subject_id = c.user_id "
        "AND d.definition_id = :definition_id AND (d.attempt_count > 0 OR d.status IN ('sending', 'accepted', 'dead')))",
        definition_id=run.definition_id,
    )
    if counts.get("exited"):
        sql(
            connection,
            "UPDATE {our}deliveries SET status = 'cancelled', settled_at = :now, "
            "error = 'left before anything was sent' WHERE status = 'pending' AND definition_id = :definition_id "
            "AND subject_id IN (SELECT user_id FROM {temp}audience_sync_unheard)",
            now=run.now,
            definition_id=run.definition_id,
        )


def _deliver_everyone(connection: sa.Connection, run: Commit) -> None:
    """A full run: members as they are, and everyone who ever held it and left, but for whom Userpilot never knew."""
    everyone = (
        "(SELECT user_id, 'entered' AS change, value FROM {our}members WHERE definition_id = :definition_id "
        "UNION ALL SELECT DISTINCT p.user_id, 'exited', NULL FROM {our}past_members p "
        "WHERE p.definition_id = :definition_id AND NOT EXISTS (SELECT 1 FROM {our}members m "
        "WHERE m.definition_id = p.definition_id AND m.user_id = p.user_id)) AS everyone"
    )
    _insert_deliveries(connection, run, everyone, "push")


def _revive_dead(connection: sa.Connection, run: Commit) -> None:
    """One new attempt for each dead delivery whose value is still current (the newest of its user)."""
    current = "(CASE WHEN m.user_id IS NULL THEN 'exited' ELSE 'entered' END)"
    body = (
        _body(connection, run).replace("CASE change", f"CASE {current}").replace("ELSE value", "ELSE m.value")
    )
    if not is_sqlite(connection):
        body = f"CAST({body} AS text)"
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'pending', settled_at = NULL, next_attempt_at = :now "
        "WHERE delivery_id IN (SELECT d.delivery_id FROM {our}deliveries d LEFT JOIN {our}members m "
        "ON m.definition_id = d.definition_id AND m.user_id = d.subject_id "
        f"WHERE d.status = 'dead' AND d.definition_id = :definition_id AND CAST(d.body AS text) = {body} "
        "AND NOT EXISTS (SELECT 1 FROM {our}deliveries n WHERE n.subject_id = d.subject_id "
        "AND n.definition_id = d.definition_id AND n.delivery_id > d.delivery_id) "
        "AND NOT EXISTS (SELECT 1 FROM {temp}audience_sync_changes c WHERE c.user_id = d.subject_id))",
        now=run.now,
        definition_id=run.definition_id,
    )


def _pg_id(column: Column) -> str:
    if column.category == "N":
        number = "user_id" if column.type_name.startswith("int") else "trim_scale(CAST(user_id AS numeric))"
        return f'CAST({number} AS text) COLLATE "C"'
    return 'CAST(user_id AS text) COLLATE "C"'


def _pg_value(column: Column) -> str:
    match column.category, column.type_name:
        case ("B", _) | ("N", "int2" | "int4" | "int8"):
            return "CAST(value AS text)"
        case ("N", "float4" | "float8"):
            return _PG_FLOAT
        case ("N", "numeric"):
            return _PG_NUMERIC
        case ("U", "json" | "jsonb"):
            return _PG_JSON
        case ("S" | "E" | "X", _) | ("U", "uuid"):
            return "CAST(to_json(CAST(value AS text)) AS text)"
        case ("D", _):
            return "CAST(to_json(value) AS text)"
    return "CASE WHEN value IS NOT NULL THEN '!' END"


def id_is_possible(column: Column) -> bool:
    """Whether a column of this PostgreSQL type can hold user ids."""
    return column.category in {"", "S", "N", "E", "X"} or column.type_name in {"uuid", "citext"}
