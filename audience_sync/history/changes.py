"""Questions about who entered, exited or changed in a run.

Of a committed run, the memberships that it began and ended answer; of a held or rejected one, its deliveries and the
members. Each part of a question is read in the order of an index, and only as far as its limit.
"""

import json
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, tables
from audience_sync.history.runs import SAMPLE, held_id, run_facts

CHANGES = ("entered", "exited", "changed")
SORTED_ROWS = 10_000  # deliveries of a held run that a question may sort

_OF_RUN = "{alias}.{event}_run_id = :run_id AND {alias}.definition_id = :definition_id"
_ENDED = _OF_RUN.format(alias="e", event="exited")
_PARTS = {
    "entered": (
        "SELECT b.user_id, CAST(NULL AS text) AS old_value, b.value AS new_value FROM {our}{table} b "
        f"WHERE {_OF_RUN.format(alias='b', event='entered')} AND b.user_id > :after AND NOT EXISTS "
        f"(SELECT 1 FROM {{our}}past_members e WHERE {_ENDED} AND e.user_id = b.user_id)"
    ),
    "changed": (
        "SELECT e.user_id, e.value AS old_value, b.value AS new_value FROM {our}past_members e "
        "JOIN {our}{table} b ON b.definition_id = e.definition_id AND b.user_id = e.user_id "
        f"AND b.entered_run_id = :run_id WHERE {_ENDED} AND e.user_id > :after"
    ),
}
_BEGAN = (
    "SELECT 1 FROM {our}{table} b WHERE b.definition_id = :definition_id AND b.user_id = e.user_id "
    "AND b.entered_run_id = :run_id"
)
_TABLES = ("members", "past_members")


def _both(part: str) -> str:
    """Return the union of a part over both tables of memberships."""
    parts = [
        f"SELECT * FROM ({part.replace('{table}', table)} ORDER BY 1 LIMIT :limit) AS of_{table}"
        for table in _TABLES
    ]
    return f"{' UNION ALL '.join(parts)} ORDER BY user_id LIMIT :limit"


_COMMITTED = {what: _both(part) for what, part in _PARTS.items()} | {
    "exited": (
        "SELECT e.user_id, e.value AS old_value, CAST(NULL AS text) AS new_value FROM {our}past_members e "
        f"WHERE {_ENDED} AND e.user_id > :after"
        + "".join(f" AND NOT EXISTS ({_BEGAN.replace('{table}', table)})" for table in _TABLES)
        + " ORDER BY e.user_id LIMIT :limit"
    )
}


def change_rows(
    connection: sa.Connection, run_id: int, what: str, *, after: str = "", limit: int
) -> list[dict[str, Any]]:
    """The users who entered, exited or changed in a run, with a trait's old and new value, ordered by user id.

    `after`: only greater user ids. Of a held or rejected run, those that it would change. Users who were erased since
    are missing, and so are those whose past memberships were pruned.
    """
    row = connection.execute(
        sa.select(tables.runs, tables.definitions.c.key, tables.definitions.c.kind)
        .join(tables.definitions, tables.definitions.c.definition_id == tables.runs.c.definition_id)
        .where(tables.runs.c.run_id == run_id)
    ).one()
    if not getattr(row, f"{what}_count"):
        return []
    if row.status in {"held", "rejected"}:
        users = connection.execute(_held(row, what, after).limit(limit))
    else:
        users = dialects.sql(
            connection,
            _COMMITTED[what],
            run_id=run_id,
            definition_id=row.definition_id,
            after=after,
            limit=limit,
        )
    return [
        {"user_id": user.user_id, "old_value": _value(user.old_value), "new_value": _value(user.new_value)}
        for user in users
    ]


def _value(stored: str | None) -> Any:
    return None if stored is None else json.loads(stored)


def _held(run: Any, what: str, after: str) -> sa.Select[Any]:
    """Users that a held or rejected run would change, from its deliveries and the members."""
    deliveries, members = tables.deliveries.c, tables.members.c
    exit_body = f'{{"{run.key}": {"false" if run.kind == "audience" else "null"}}}'
    body = sa.cast(deliveries.body, sa.Text)
    old_value = members.value
    # Keys need no quoting, so a body is its value in a frame of a known length.
    new_value = sa.func.substr(body, len(run.key) + 6, sa.func.length(body) - len(run.key) - 6)
    is_member = members.user_id.is_not(None)
    where: tuple[sa.ColumnElement[bool], ...]
    match what:
        case "entered":
            where = (body != exit_body, ~is_member)
        case "exited":
            where = (body == exit_body, is_member)
        case _:
            where = (body != exit_body, is_member, old_value.is_not(None), new_value != old_value)
    is_shown = run.kind == "trait"
    none = sa.null()
    is_of_user = sa.and_(members.definition_id == run.definition_id, members.user_id == deliveries.subject_id)
    return (
        sa.select(
            deliveries.subject_id.label("user_id"),
            (old_value if is_shown else none).label("old_value"),
            (new_value if is_shown and what != "exited" else none).label("new_value"),
        )
        .select_from(tables.deliveries.outerjoin(tables.members, is_of_user))
        .where(*_of_held_run(run), deliveries.subject_id > after, *where)
        .order_by(deliveries.subject_id)
    )


def _of_held_run(run: Any) -> tuple[sa.ColumnElement[bool] | sa.TextClause, ...]:
    """The deliveries of a held or rejected run; many of them are read in the order of their users."""
    deliveries = tables.deliveries.c
    if run.status == "rejected":
        return deliveries.run_id == run.run_id, deliveries.status != "held"
    is_held = deliveries.status == "held"
    counts = (run.member_count, run.entered_count, run.exited_count, run.changed_count)
    if sum(filter(None, counts)) <= SORTED_ROWS:
        return deliveries.run_id == held_id(run), is_held
    # + 0, because the index by run would find all of them; the index of waiting ones has their users in order.
    return deliveries.run_id + 0 == held_id(run), is_held, tables.WAITING


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
