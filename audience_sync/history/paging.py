"""Bounded reading: pages of rows, newest first, of all rows or of those that a search finds, and bounded counts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.db import dialects, engines

PAGE = 1_000  # rows read in one transaction
SEARCHED = 5_000  # rows that a search reads for one page
MAX_COUNTED = 100_000  # rows, where a page shows a number that may be large
UNITED = 100  # queries in a statement; SQLite allows 500
Matches = Callable[[Any], Iterable[sa.ColumnElement[bool]]]  # conditions on a table's columns


def older(query: sa.Select[Any], column: sa.Column[int], before: int | None) -> sa.Select[Any]:
    return query if before is None else query.where(column < before)


def pages(
    engine: sa.Engine, rows: Callable[..., list[dict[str, Any]]], id_name: str
) -> Iterator[dict[str, Any]]:
    """All rows, newest first. Each page has its own transaction, so that a slow reader locks nothing."""
    before = None
    while True:
        with engines.read(engine) as connection:
            page = rows(connection, before=before, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        before = page[-1][id_name]


def count_of(rows: sa.Select[Any], most: int | None = None) -> sa.Select[int]:
    """A query for the number of rows, which stops at `most`, by default at MAX_COUNTED."""
    return sa.select(sa.func.count()).select_from(rows.limit(most or MAX_COUNTED).subquery())


@dataclass(frozen=True, slots=True)
class Found:
    """Ids of rows, newest first.

    `older`: the next page has the ids below this; None if there is no next page. `is_cut`: the search stopped there
    because it had read SEARCHED rows, the limit that keeps searches short.
    """

    ids: list[int]
    older: int | None = None
    is_cut: bool = False


def search(
    connection: sa.Connection,
    table: sa.Table,
    indexed: Mapping[sa.Column[Any], Any],
    matches: Matches = lambda _: (),
    *,
    where: sa.ColumnElement[bool] | sa.TextClause | None = None,
    before: int | None,
    limit: int,
) -> Found:
    """Search the rows with these values in indexed columns, newest first, for those that match all conditions.

    There must be an index on these columns and the id, in this order. `where`: the condition of a partial index, or a
    condition that nearly all rows meet.
    """
    [id_column] = table.primary_key.columns
    conditions, order = dialects.newest_of(connection, indexed, id_column, before)
    rows = sa.select(id_column).where(*conditions).order_by(*order)
    if where is not None:
        rows = rows.where(where)
    if not list(matches(table.c)):
        ids = list(connection.execute(rows.limit(limit + 1)).scalars())
        return Found(ids[:limit], ids[limit - 1] if len(ids) > limit else None)
    searched = rows.with_only_columns(table).limit(SEARCHED).subquery("searched")
    found_id = searched.c[id_column.name]
    query = sa.select(found_id).where(*matches(searched.c)).order_by(found_id.desc()).limit(limit + 1)
    ids = list(connection.execute(query).scalars())
    if len(ids) > limit:
        return Found(ids[:limit], ids[limit - 1])
    end, count = connection.execute(sa.select(sa.func.min(found_id), sa.func.count(found_id))).one()
    return Found(ids, end, is_cut=True) if count == SEARCHED else Found(ids)


def united(connection: sa.Connection, queries: Sequence[sa.Select[Any]]) -> Iterator[sa.Row[Any]]:
    """The rows of many queries of the same columns, each with its own order and limit, in few statements."""
    for start in range(0, len(queries), UNITED):
        parts = (sa.select(query.subquery()) for query in queries[start : start + UNITED])
        yield from connection.execute(sa.union_all(*parts))
