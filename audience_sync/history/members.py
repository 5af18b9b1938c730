"""Queries about the members of an audience, now or at a past time."""

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, engines, tables
from audience_sync.history import paging

MAX_PIECES_READ = 10  # pieces of PAGE users that a page of members may take


def member_rows(
    engine: sa.Engine, definition_id: int, at: dt.datetime | None
) -> Iterator[tuple[str, str | None]]:
    """(user id, JSON text of a trait's value) of each member, now or at a past time, ordered by user id.

    Each page has its own transaction, so that a slow reader locks nothing. All pages show the members after the same run,
    even if another run is committed meanwhile.
    """
    with engines.read(engine) as connection:
        run_id = _last_committed(connection, definition_id, at)
    after: str | None = ""  # no user id is empty
    while run_id is not None and after is not None:
        with engines.read(engine) as connection:
            last = _page_end(connection, definition_id, after)
            rows = connection.execute(_members_after(run_id, definition_id, after, last)).all()
        yield from ((row.user_id, row.value) for row in rows)
        after = last


def member_page(
    connection: sa.Connection,
    definition_id: int,
    at: dt.datetime | None = None,
    *,
    prefix: str = "",
    after: str = "",
    limit: int,
) -> dict[str, Any]:
    """Members whose ids begin with a prefix, now or at a past time, ordered by user id: at most `limit` after an id.

    `run`: the run after which they were members, and its time; None before the first run. `after`: the id after which the
    next page begins; None on the last page. If most users have left, a page may have few members or none.
    """
    run_id = _last_committed(connection, definition_id, at)
    rows: list[sa.Row[Any]] = []
    last: str | None = after
    for _ in range(MAX_PIECES_READ if run_id is not None else 0):
        start, last = last or "", _page_end(connection, definition_id, last or "", prefix)
        query = _members_after(run_id or 0, definition_id, start, last, prefix)
        rows += connection.execute(query.limit(limit + 1 - len(rows)))
        if len(rows) > limit:
            last = rows[limit - 1].user_id
        if len(rows) > limit or last is None:
            break
    shown = rows[:limit]
    moments = _moments(connection, {run_id or 0, *(row.entered_run_id for row in shown)})
    return {
        "run": run_id and {"run_id": run_id, "as_of": moments[run_id]},
        "after": last or None,
        "members": [
            {
                "user_id": row.user_id,
                "value": None if row.value is None else json.loads(row.value),
                "since": moments.get(row.entered_run_id),
            }
            for row in shown
        ],
    }


def _moments(connection: sa.Connection, run_ids: set[int]) -> dict[int, dt.datetime]:
    runs = sa.select(tables.runs.c.run_id, tables.runs.c.as_of)
    rows = connection.execute(runs.where(dialects.is_among(connection, tables.runs.c.run_id, run_ids)))
    return {row.run_id: row.as_of for row in rows}


def _last_committed(connection: sa.Connection, definition_id: int, at: dt.datetime | None) -> int | None:
    """The last committed run as of a moment not after `at`. Later runs have greater ids."""
    query = sa.select(sa.func.max(tables.runs.c.run_id)).where(
        tables.runs.c.definition_id == definition_id, tables.runs.c.status == "succeeded"
    )
    return connection.execute(query if at is None else query.where(tables.runs.c.as_of <= at)).scalar()


def _is_left(table: sa.Table, definition_id: int, after: str, prefix: str) -> list[sa.ColumnElement[bool]]:
    """The conditions for a definition's users after an id whose ids begin with a prefix: one range of the index."""
    user_id = table.c.user_id
    is_after = user_id > after if after >= prefix else user_id >= prefix
    end = _end_of_prefix(prefix)
    return [table.c.definition_id == definition_id, is_after, *([user_id < end] if end else [])]


def _end_of_prefix(prefix: str) -> str:
    """The first text after all that begin with a prefix, byte by byte; empty if there is none."""
    prefix = prefix.rstrip(chr(0x10FFFF))
    if not prefix:
        return ""
    following = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if following == 0xD800 else following)  # there are no surrogates in UTF-8


def _page_end(connection: sa.Connection, definition_id: int, after: str, prefix: str = "") -> str | None:
    """The last user id of a page of members and past members; None if all remaining users fit into the page."""
    heads = []
    for table in (tables.members, tables.past_members):
        is_left = _is_left(table, definition_id, after, prefix)
        head = sa.select(table.c.user_id).where(*is_left).order_by(table.c.user_id).limit(paging.PAGE)
        heads.append(sa.select(head.subquery()))
    users = sa.union_all(*heads).subquery()
    query = sa.select(users.c.user_id).order_by(users.c.user_id).offset(paging.PAGE - 1).limit(1)
    return connection.execute(query).scalar()


def _members_after(
    run_id: int, definition_id: int, after: str, last: str | None, prefix: str = ""
) -> sa.CompoundSelect[Any]:
    parts = []
    for table in (tables.members, tables.past_members):
        part = sa.select(table.c.user_id, table.c.value, table.c.entered_run_id).where(
            *_is_left(table, definition_id, after, prefix), table.c.entered_run_id <= run_id
        )
        if last is not None:
            part = part.where(table.c.user_id <= last)
        if table is tables.past_members:
            part = part.where(table.c.exited_run_id > run_id)
        parts.append(part)
    return sa.union_all(*parts).order_by("user_id")
