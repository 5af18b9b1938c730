"""The snapshot of a definition and its diff with the members, in set-based SQL.

It works with temporary tables of one connection, called {temp}audience_sync_NAME:

    snapshot  user_id, row_count; for a trait also low and high, the smallest and the greatest canonical value.
              On PostgreSQL, a user of an audience may have several rows, whose counts add up
    eligible  user_id, row_count
    changes   user_id, change (entered, exited, changed), value; for a member also entered_run_id and old_value

This module only reads our permanent tables. commit.py writes them, from the changes.
"""

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import postgresql_values, values
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.records import ChangeCounts
from audience_sync.db import engines
from audience_sync.db.dialects import (
    copy_rows,
    create_temp_table,
    drop_temp_table,
    is_sqlite,
    sql,
    with_settings,
)

SNAPSHOT, ELIGIBLE, CHANGES = "snapshot", "eligible", "changes"
WORK_MEMORY = "128MB"  # enough to hash one or two million ids
FEW_ROWS = 2  # for each user on average: grouping so few rows costs more than storing all of them


@dataclass(frozen=True, slots=True)
class Diff:
    """Counts of the changes, and of the rows that were set aside, by reason."""

    counts: ChangeCounts
    set_aside: dict[str, int]
    is_empty: bool  # the snapshot has no row with a usable id


def unusable_rows(set_aside: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of the rows that cannot be used, without those that were left out on purpose."""
    on_purpose = {"forgotten", "not_eligible"}
    return {reason: count for reason, count in set_aside.items() if reason not in on_purpose}


@contextmanager
def connection_with_temp_tables(
    engine: sa.Engine, wait_seconds: float | None = None
) -> Iterator[sa.Connection]:
    """Open a connection that is not returned to the pool, so that its temporary tables disappear with it.

    `wait_seconds`: how long it waits for a lock on SQLite; None for the default.
    """
    with engines.plain_errors(engine), engines.connected(engine, wait_seconds) as connection:
        try:
            yield connection
        finally:
            connection.invalidate()


def create_table(connection: sa.Connection, table: str, columns: Sequence[str]) -> None:
    """Create the snapshot or the eligible table; `columns` are user_id and, for a trait, value."""
    value_columns = ", low text, high text" if "value" in columns else ""
    row_columns = f"user_id {{id}}, row_count bigint DEFAULT 1{value_columns}"
    create_temp_table(connection, table, row_columns, unique_ids=True)


def fill_from_query(
    connection: sa.Connection,
    table: str,
    query: str,
    arguments: Any,
    columns: Sequence[str],
    conversions: Sequence[str],
) -> None:
    """Fill a temporary table from a query on our own database, as a subquery, so that no row leaves the database.

    `query` returns canonical ids and values, `arguments` are the arguments for the driver.
    """
    _group_into(connection, table, f"({query}) AS canonical", arguments, columns, conversions)


def fill_from_rows(
    connection: sa.Connection,
    table: str,
    batches: Iterable[Sequence[values.Row]],
    columns: Sequence[str],
    conversions: Sequence[str],
) -> None:
    """Fill a temporary table from a source's rows in canonical form, with one batch in memory."""
    create_table(connection, table, columns)
    if not is_sqlite(connection) and "value" not in columns:
        copy_rows(connection, f"pg_temp.audience_sync_{table}", batches, "(user_id)")
        return
    create_temp_table(connection, "rows", ", ".join(f"{name} {{id}}" for name in columns))
    rows = f"{'temp' if is_sqlite(connection) else 'pg_temp'}.audience_sync_rows"
    if is_sqlite(connection):
        insert = f"INSERT INTO {rows} VALUES ({', '.join('?' * len(columns))})"
        for batch in batches:
            if batch:
                connection.exec_driver_sql(insert, batch)
    else:
        copy_rows(connection, rows, batches)
    _group_into(connection, table, rows, (), columns, conversions)
    drop_temp_table(connection, "rows")


def _group_into(
    connection: sa.Connection,
    table: str,
    source: str,
    arguments: Any,
    columns: Sequence[str],
    conversions: Sequence[str],
) -> None:
    """Add the source's rows to a table, grouped by user where that is necessary or faster."""
    has_value = "value" in columns
    expressions = values.SQLITE_CONVERSIONS if is_sqlite(connection) else postgresql_values.CONVERSIONS
    for name in conversions:
        source = f"(SELECT user_id, {expressions[name]} AS value FROM {source}) AS converted"
    if is_sqlite(connection):
        values.register_functions(connection)
        statement = _sorted_upsert(table, source, has_value=has_value)
    elif not has_value and _has_few_rows_for_each_user(connection, source, arguments):
        statement = f"INSERT INTO pg_temp.audience_sync_{table} SELECT user_id, 1 FROM {source}"
    else:
        low_high = ", min(value) AS low, max(value) AS high" if has_value else ""
        statement = (
            f"INSERT INTO pg_temp.audience_sync_{table} SELECT user_id, count(*) AS row_count{low_high} "
            f"FROM {source} GROUP BY 1"
        )
    with _prepared_to_group(connection):
        connection.exec_driver_sql(statement, arguments or None)


def _sorted_upsert(table: str, source: str, *, has_value: bool) -> str:
    """Return SQLite's statement to group rows: a sorted upsert, which takes two thirds of the time of GROUP BY."""
    low_high = ", value AS low, value AS high" if has_value else ""
    merge = (
        ", low = coalesce(min(low, excluded.low), low, excluded.low), "
        "high = coalesce(max(high, excluded.high), high, excluded.high)"
    )
    return (
        f"INSERT INTO temp.audience_sync_{table} SELECT user_id, 1{low_high} FROM {source} "
        f"ORDER BY 1 ON CONFLICT (user_id) DO UPDATE SET row_count = row_count + 1{merge if has_value else ''}"
    )


def _has_few_rows_for_each_user(connection: sa.Connection, source: str, arguments: Any) -> bool:
    """Return whether PostgreSQL's planner expects about as many users as rows."""

    def expected_rows(query: str) -> int:
        plan = connection.exec_driver_sql(f"EXPLAIN {query}", arguments or None).scalars()
        return int(str(plan.first()).partition(" rows=")[2].split()[0])

    ids = f"SELECT user_id FROM {source}"
    return expected_rows(ids) <= FEW_ROWS * expected_rows(f"{ids} GROUP BY 1")


@contextmanager
def _prepared_to_group(connection: sa.Connection) -> Iterator[None]:
    """Give PostgreSQL enough memory to hash the ids, and set its numbers to 15 digits."""
    if is_sqlite(connection):
        yield
        return
    query = "SELECT pg_size_bytes(current_setting('work_mem')) < pg_size_bytes(:memory)"
    memory = {"work_mem": WORK_MEMORY} if sql(connection, query, memory=WORK_MEMORY).scalar_one() else {}
    with with_settings(connection, {"extra_float_digits": "0"} | memory):
        yield


def diff(
    connection: sa.Connection,
    definition_id: int | None,
    definition: Definition,
    now: dt.datetime,
    users: Sequence[str] | None = None,
) -> Diff:
    """Fill the changes from the snapshot and the members; `definition_id` is None before the first run.

    Ids and values that cannot be used, users who are not eligible to enter and users who were erased are set aside.
    `users`: leave out the changes of everyone else.
    """
    if definition.kind is Kind.TRAIT:
        set_aside = _set_aside_ids(connection, SNAPSHOT) | _set_aside_values(connection)
        _compare(connection, definition_id, definition.kind)
    else:  # cheaper among the changes: an invalid id was never a member, so it enters
        _compare(connection, definition_id, definition.kind)
        set_aside = _set_aside_ids(connection, CHANGES)
    if definition.eligible_sql:
        set_aside["not_eligible"] = _leave_out_ineligible(connection)
    set_aside["forgotten"] = _leave_out_erased(connection, now)
    if users is not None:
        _leave_out(connection, "user_id NOT IN :users", users=list(users))
    return Diff(_count_changes(connection), dict(+set_aside), _is_empty(connection))


def _compare(connection: sa.Connection, definition_id: int | None, kind: Kind) -> None:
    """Fill the changes: users only in the snapshot, users only among the members, and users whose value differs."""
    _create_changes(connection)
    insert = "INSERT INTO {temp}audience_sync_changes "
    members = "SELECT 1 FROM {our}members WHERE definition_id = :id LIMIT 1"
    if definition_id is None or sql(connection, members, id=definition_id).first() is None:
        with _prepared_to_group(connection):
            sql(connection, insert + _all_entered(kind))
        return
    query = _anti_joins(kind) if is_sqlite(connection) else _full_join(kind)
    sql(connection, insert + query, definition_id=definition_id)
    _prepare_to_commit(connection)


def _prepare_to_commit(connection: sa.Connection) -> None:
    """Give PostgreSQL the number of changes; without it, it may compare every change with every delivery."""
    if not is_sqlite(connection):
        sql(connection, "ANALYZE pg_temp.audience_sync_changes")
        # The members were just read, so looking up those who changed is cheap; a scan of all members would be slower.
        sql(connection, "SET LOCAL random_page_cost = 1.1")


def _create_changes(connection: sa.Connection) -> None:
    columns = "user_id {id}, change text, value text, entered_run_id bigint, old_value text"
    create_temp_table(connection, CHANGES, columns, unique_ids=True)


def _all_entered(kind: Kind) -> str:
    value, where = ("low", " WHERE low IS NOT NULL") if kind is Kind.TRAIT else ("NULL", "")
    columns = f"user_id, 'entered', {value}, CAST(NULL AS bigint), NULL"
    return f"SELECT DISTINCT {columns} FROM {{temp}}audience_sync_snapshot{where}"


def _anti_joins(kind: Kind) -> str:
    """Return SQLite's query, which looks up ids by the primary keys of both tables."""
    snapshot, members = "{temp}audience_sync_snapshot s", "{our}members m"
    is_member, same_user = "m.definition_id = :definition_id", "m.user_id = s.user_id"
    value, is_usable = ("s.low", " AND s.low IS NOT NULL") if kind is Kind.TRAIT else ("NULL", "")
    entered = (
        f"SELECT s.user_id, 'entered', {value}, NULL, NULL FROM {snapshot} "
        f"WHERE NOT EXISTS (SELECT 1 FROM {members} WHERE {is_member} AND {same_user}){is_usable}"
    )
    exited = (
        f"SELECT m.user_id, 'exited', NULL, m.entered_run_id, m.value FROM {members} "
        f"WHERE {is_member} AND NOT EXISTS (SELECT 1 FROM {snapshot} WHERE {same_user})"
    )
    changed = (  # CROSS JOIN is SQLite's way to fix the order of the loops
        f"SELECT m.user_id, 'changed', s.low, m.entered_run_id, m.value FROM {snapshot} "
        f"CROSS JOIN {members} WHERE {is_member} AND {same_user} AND s.low <> m.value"
    )
    return " UNION ALL ".join([entered, exited, changed] if kind is Kind.TRAIT else [entered, exited])


def _full_join(kind: Kind) -> str:
    """Return PostgreSQL's query.

    It runs with the session's work_mem: a hash in small batches that fit into the processor's cache is a third faster.
    """
    value, old_value, differs = "NULL", "NULL", "s.user_id IS NULL OR m.user_id IS NULL"
    if kind is Kind.TRAIT:
        value, old_value = "s.low", "m.value"
        differs = "s.user_id IS NULL OR (m.user_id IS NULL AND s.low IS NOT NULL) OR s.low <> m.value"
    return (
        "SELECT DISTINCT coalesce(s.user_id, m.user_id), CASE WHEN m.user_id IS NULL THEN 'entered' "
        f"WHEN s.user_id IS NULL THEN 'exited' ELSE 'changed' END, {value}, m.entered_run_id, {old_value} "
        "FROM {temp}audience_sync_snapshot s FULL JOIN "
        "(SELECT user_id, value, entered_run_id FROM {our}members WHERE definition_id = :definition_id) m "
        f"ON m.user_id = s.user_id WHERE {differs}"
    )


def _set_aside_ids(connection: sa.Connection, table: str) -> Counter[str]:
    """Remove ids that cannot be sent from a table; count their rows in the snapshot by reason."""
    needs_check, reason = _id_check(connection)
    suspects = f"FROM {{temp}}audience_sync_{table} WHERE {needs_check}"
    if table == CHANGES:
        suspects += " AND change = 'entered'"
    if sql(connection, f"SELECT 1 {suspects} LIMIT 1").first() is None:
        return Counter()
    rows = sql(
        connection,
        f"SELECT {reason}, sum(row_count) FROM {{temp}}audience_sync_snapshot "
        f"WHERE {needs_check} GROUP BY 1 HAVING {reason} IS NOT NULL",
    )
    set_aside = Counter({name: int(count) for name, count in rows})
    sql(connection, f"DELETE {suspects} AND {reason} IS NOT NULL")
    return set_aside


def _id_check(connection: sa.Connection) -> tuple[str, str]:
    """Return a cheap condition that selects ids for a closer check, and the reason why an id is invalid, or null."""
    if is_sqlite(connection):
        return values.SQLITE_NEEDS_CHECK, values.SQLITE_INVALID_REASON
    return postgresql_values.NEEDS_CHECK, postgresql_values.INVALID_REASON


def _is_empty(connection: sa.Connection) -> bool:
    needs_check, reason = _id_check(connection)
    usable = (
        f"SELECT 1 FROM {{temp}}audience_sync_snapshot WHERE NOT {needs_check} OR {reason} IS NULL LIMIT 1"
    )
    return sql(connection, usable).first() is None


def _set_aside_values(connection: sa.Connection) -> Counter[str]:
    """Clear the value of each user whose trait is not a single primitive value; count these users by reason.

    They stay in the snapshot but are not compared: an unusable value does not mean that a user left.
    """
    sql(connection, "DELETE FROM {temp}audience_sync_snapshot WHERE low IS NULL")
    conditions = {reason: f"low = '{mark}'" for mark, reason in values.UNUSABLE_VALUES.items()}
    conditions["unequal_values"] = "low <> high"
    update = "UPDATE {temp}audience_sync_snapshot SET low = NULL, high = NULL WHERE "
    return Counter({name: sql(connection, update + where).rowcount for name, where in conditions.items()})


def _leave_out_ineligible(connection: sa.Connection) -> int:
    """Remove the changes of users who are not in the eligible table; return how many would have entered.

    Eligibility is checked only on entry: members who are no longer eligible stay unchanged.
    """
    ineligible = (
        "NOT EXISTS (SELECT 1 FROM {temp}audience_sync_eligible e "
        "WHERE e.user_id = audience_sync_changes.user_id)"
    )
    entered_count = _leave_out(connection, f"change = 'entered' AND {ineligible}")
    _leave_out(connection, f"change <> 'entered' AND {ineligible}")
    return entered_count


def _leave_out_erased(connection: sa.Connection, now: dt.datetime) -> int:
    """Remove erased users who may not return yet from the entries (they are never members); return their number."""
    where = "WHERE returns_at IS NULL OR returns_at > :now"
    if sql(connection, f"SELECT 1 FROM {{our}}forgotten {where} LIMIT 1", now=now).first() is None:
        return 0
    user_hash = values.SQLITE_HASH if is_sqlite(connection) else postgresql_values.HASH
    hashes = f"SELECT user_hash FROM {{our}}forgotten {where}"
    return _leave_out(connection, f"change = 'entered' AND {user_hash} IN ({hashes})", now=now)


def _leave_out(connection: sa.Connection, where: str, **parameters: Any) -> int:
    return sql(connection, f"DELETE FROM {{temp}}audience_sync_changes WHERE {where}", **parameters).rowcount


def _count_changes(connection: sa.Connection) -> ChangeCounts:
    rows = sql(connection, "SELECT change, count(*) FROM {temp}audience_sync_changes GROUP BY change")
    return ChangeCounts(**{change: int(count) for change, count in rows})


def exit_everyone(connection: sa.Connection, definition_id: int) -> ChangeCounts:
    """Fill the changes with an exit of every member."""
    _create_changes(connection)
    sql(
        connection,
        "INSERT INTO {temp}audience_sync_changes SELECT user_id, 'exited', NULL, entered_run_id, value "
        "FROM {our}members WHERE definition_id = :definition_id",
        definition_id=definition_id,
    )
    _prepare_to_commit(connection)
    return _count_changes(connection)


def load_held_changes(
    connection: sa.Connection, run_id: int, definition_id: int, key: str, kind: Kind
) -> ChangeCounts:
    """Fill the changes from the deliveries of a held run, compared with the members."""
    _create_changes(connection)
    prefix = f'{{"{key}": '
    deliveries = (
        "SELECT subject_id, substr(CAST(body AS text), :start, length(CAST(body AS text)) - :start) AS value "
        "FROM {our}deliveries WHERE run_id = :run_id AND status = 'held'"
    )
    exit_value = "'null'" if kind is Kind.TRAIT else "'false'"
    value, differs = ("h.value", "h.value <> m.value") if kind is Kind.TRAIT else ("NULL", "false")
    sql(
        connection,
        "INSERT INTO {temp}audience_sync_changes SELECT h.subject_id, "
        f"CASE WHEN h.value = {exit_value} THEN 'exited' WHEN m.user_id IS NULL THEN 'entered' "
        f"ELSE 'changed' END, CASE WHEN h.value <> {exit_value} THEN {value} END, m.entered_run_id, m.value "
        f"FROM ({deliveries}) h "
        "LEFT JOIN {our}members m ON m.definition_id = :definition_id AND m.user_id = h.subject_id "
        f"WHERE CASE WHEN h.value = {exit_value} THEN m.user_id IS NOT NULL "
        f"ELSE m.user_id IS NULL OR {differs} END",
        start=len(prefix) + 1,
        run_id=run_id,
        definition_id=definition_id,
    )
    _prepare_to_commit(connection)
    return _count_changes(connection)
