"""Queries about who entered, exited or changed in a run.

The changes of a committed run are read from the memberships that it began and ended; the changes of a held or rejected
run from its deliveries and the members. Each query reads an index in order and stops at its limit.
"""

import json
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, tables
from audience_sync.history.queue import STATUSES
from audience_sync.history.runs import SAMPLE, held_id, run_facts

CHANGES = ("entered", "exited", "changed")
SORTED_ROWS = 10_000  # deliveries of a held run that a query may sort

_OF_RUN = "{alias}.{event}_run_id = :run_id AND {alias}.definition_id = :definition_id"
_ENDED = _OF_RUN.format(alias="e", event="exited")
_PARTS = {
    "entered": (
        "SELECT b.user_id, CAST(NULL AS text) AS old_value, b.value AS new_value FROM {our}{table} b {by_entry} "
        f"WHERE {_OF_RUN.format(alias='b', event='entered')} AND b.user_id > :after AND NOT EXISTS "
        f"(SELECT 1 FROM {{our}}past_members e WHERE {_ENDED} AND e.user_id = b.user_id)"
    ),
    "changed": (
        "SELECT e.user_id, e.value AS old_value, b.value AS new_value FROM {our}past_members e {by_exit} "
        f"CROSS JOIN {{our}}{{table}} b WHERE {_ENDED} AND e.user_id > :after AND b.definition_id = :definition_id "
        "AND b.user_id = e.user_id AND b.entered_run_id = :run_id"
    ),
}
_BEGAN = (
    "SELECT 1 FROM {our}{table} b WHERE b.definition_id = :definition_id AND b.user_id = e.user_id "
    "AND b.entered_run_id = :run_id"
)
_TABLES = ("members", "past_members")
_INDEXES = {
    "{by_exit}": "ix_past_members_exited_run_id",
    "{by_entry_of_members}": "ix_members_entered_run_id",
    "{by_entry_of_past_members}": "ix_past_members_entered_run_id",
}


def _both(part: str) -> str:
    """Return the union of a part over both tables of memberships."""
    parts = [f"SELECT * FROM ({_of(table, part)} ORDER BY 1 LIMIT :limit) AS of_{table}" for table in _TABLES]
    return f"{' UNION ALL '.join(parts)} ORDER BY user_id LIMIT :limit"


def _of(table: str, part: str) -> str:
    return part.replace("{by_entry}", f"{{by_entry_of_{table}}}").replace("{table}", table)


_COMMITTED = {what: _both(part) for what, part in _PARTS.items()} | {
    "exited": (
        "SELECT e.user_id, e.value AS old_value, CAST(NULL AS text) AS new_value FROM {our}past_members e {by_exit} "
        f"WHERE {_ENDED} AND e.user_id > :after"
        + "".join(f" AND NOT EXISTS ({_BEGAN.replace('{table}', table)})" for table in _TABLES)
        + " ORDER BY e.user_id LIMIT :limit"
    )
}


def change_rows(
    connection: sa.Connection, run_id: int, what: str, *, after: str = "", limit: int
) -> list[dict[str, Any]]:
    """The users who entered, exited or changed in a run, with a trait's old and new value, ordered by user id.

    `after`: only greater user ids. A held or rejected run has the users that it would change. Users who were erased since
    are missing, and so are users whose past memberships were pruned.
    """
    row = connection.execute(
        sa.select(tables.runs, tables.definitions.c.key, tables.definitions.c.kind)
        .join(tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id)
        .where(tables.runs.c.run_id == run_id)
    ).one()
    if not getattr(row, f"{what}_count"):
        return []
    is_committed = row.status not in {"held", "rejected"}
    statement, more = (
        (_committed(connection, what), {"run_id": run_id}) if is_committed else _held(connection, row, what)
    )
    page = {"definition_id": row.definition_id, "after": after, "limit": limit}
    users = dialects.sql(connection, statement, **page, **more)
    return [
        {"user_id": user.user_id, "old_value": _value(user.old_value), "new_value": _value(user.new_value)}
        for user in users
    ]


def deliveries_of(connection: sa.Connection, run_id: int, user_ids: Collection[str]) -> dict[str, Any]:
    """The deliveries of these users' changes in a run, by user id, as far as they are still stored.

    The ids of the run's deliveries limit the search, because a user may have very many others.
    """
    column = tables.deliveries.c
    statement = sa.select(tables.runs.c.run_id, tables.runs.c.status, tables.runs.c.deliveries_run_id)
    stored_under = held_id(connection.execute(statement.where(tables.runs.c.run_id == run_id)).one())
    ends = [
        sa.select(end(column.delivery_id)).where(column.run_id == stored_under, column.status == status)
        for end in (sa.func.min, sa.func.max)
        for status in STATUSES
    ]
    ids = [row_id for row_id in connection.execute(sa.union_all(*ends)).scalars() if row_id is not None]
    if not ids:
        return {}
    query = sa.select(
        column.subject_id, column.status, column.settled_at, column.request_id, column.error
    ).where(
        dialects.is_among(connection, column.subject_id, user_ids),
        column.action == "identify",
        column.delivery_id.between(min(ids), max(ids)),
        column.run_id + 0 == stored_under,  # the index of runs would find all deliveries of the run
    )
    return {row.subject_id: row._asdict() for row in connection.execute(query)}


def _committed(connection: sa.Connection, what: str) -> str:
    """Return the statement about a committed run, which reads the memberships of the run by their indexes."""
    statement = _COMMITTED[what]
    for place, index in _INDEXES.items():
        statement = statement.replace(place, dialects.indexed_by(connection, index))
    return statement


def _value(stored: str | None) -> Any:
    return None if stored is None else json.loads(stored)


def _held(connection: sa.Connection, run: Any, what: str) -> tuple[str, dict[str, Any]]:
    """Return the statement about users that a held or rejected run would change, and its parameters."""
    counts = (run.member_count, run.entered_count, run.exited_count, run.changed_count)
    is_large = run.status == "held" and sum(filter(None, counts)) > SORTED_ROWS
    # A large run is read in the order of its users: + 0, because the index by run would find all of them.
    by_user = dialects.indexed_by(connection, "ix_deliveries_waiting") if is_large else ""
    status = "= 'held' AND d.status IN ('held', 'dead')" if run.status == "held" else "<> 'held'"
    is_trait = run.kind == "trait"
    # Keys need no quoting, so a body is its value between texts of a known length.
    new_value = (
        f"substr(CAST(d.body AS text), {len(run.key) + 6}, length(CAST(d.body AS text)) - {len(run.key) + 6})"
    )
    condition = {
        "entered": "CAST(d.body AS text) <> :exit_body AND m.user_id IS NULL",
        "exited": "CAST(d.body AS text) = :exit_body",
        "changed": f"CAST(d.body AS text) <> :exit_body AND m.value <> {new_value}",
    }[what]
    nothing = "CAST(NULL AS text)"
    is_member = "m.definition_id = :definition_id AND m.user_id = d.subject_id"
    # In SQLite, CROSS JOIN fixes the order.
    with_members = f"CROSS JOIN {{our}}members m WHERE {is_member} AND"
    if what == "entered":
        with_members = f"LEFT JOIN {{our}}members m ON {is_member} WHERE"
    statement = (
        f"SELECT d.subject_id AS user_id, {'m.value' if is_trait else nothing} AS old_value, "
        f"{new_value if is_trait and what != 'exited' else nothing} AS new_value FROM {{our}}deliveries d {by_user} "
        f"{with_members} d.run_id {'+ 0' if is_large else ''} = :held_id AND d.status {status} "
        f"AND d.subject_id > :after AND {condition} ORDER BY d.subject_id LIMIT :limit"
    )
    exit_body = f'{{"{run.key}": {"null" if is_trait else "false"}}}'
    return statement, {"held_id": held_id(run), "exit_body": exit_body}


def run_in_full(connection: sa.Connection, run_id: int) -> dict[str, Any] | None:
    """A run with what was set aside and samples of the users who changed; None if there is no such run."""
    facts = run_facts(connection, run_id)
    if facts is None:
        return None
    shown = {name: value for name, value in facts.items() if name not in {"name", "kind", "baseline_run_id"}}
    for what in CHANGES:
        users = change_rows(connection, run_id, what, limit=SAMPLE)
        shown[f"{what}_sample"] = [user["user_id"] for user in users]
    return shown
