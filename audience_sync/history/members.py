"""Questions about the members of an audience, now or at a past time."""

import datetime as dt
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from audience_sync.db import engines, tables
from audience_sync.history.paging import PAGE


def member_rows(
    engine: sa.Engine, definition_id: int, at: dt.datetime | None
) -> Iterator[tuple[str, str | None]]:
    """(user id, JSON text of a trait's value) of each member, now or at a past time, ordered by user id.

    Each page has a transaction of its own, so that a slow reader locks nothing. All pages show the members after the
    same run, even if another one is committed meanwhile.
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


def _last_committed(connection: sa.Connection, definition_id: int, at: dt.datetime | None) -> int | None:
    """The last run that was committed, for a moment that is not after `at`. Later runs have greater ids."""
    query = sa.select(sa.func.max(tables.runs.c.run_id)).where(
        tables.runs.c.definition_id == definition_id, tables.runs.c.status == "succeeded"
    )
    return connection.execute(query if at is None else query.where(tables.runs.c.as_of <= at)).scalar()


def _page_end(connection: sa.Connection, definition_id: int, after: str) -> str | None:
    """The last user id of a page of members and past members; None if all the remaining ones fit into the page."""
    heads = []
    for table in (tables.members, tables.past_members):
        is_left = (table.c.definition_id == definition_id, table.c.user_id > after)
        head = sa.select(table.c.user_id).where(*is_left).order_by(table.c.user_id).limit(PAGE)
        heads.append(sa.select(head.subquery()))
    users = sa.union_all(*heads).subquery()
    query = sa.select(users.c.user_id).order_by(users.c.user_id).offset(PAGE - 1).limit(1)
    return connection.execute(query).scalar()


def _members_after(run_id: int, definition_id: int, after: str, last: str | None) -> sa.CompoundSelect[Any]:
    parts = []
    for table in (tables.members, tables.past_members):
        part = sa.select(table.c.user_id, table.c.value).where(
            table.c.definition_id == definition_id, table.c.user_id > after, table.c.entered_run_id <= run_id
        )
        if last is not None:
            part = part.where(table.c.user_id <= last)
        if table is tables.past_members:
            part = part.where(table.c.exited_run_id > run_id)
        parts.append(part)
    return sa.union_all(*parts).order_by("user_id")
