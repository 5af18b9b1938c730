"""Pages of rows: each is read in a transaction of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

from audience_sync.db import engines

PAGE = 1_000  # rows that are read in one transaction


def older(query: sa.Select[Any], column: sa.Column[int], before: int | None) -> sa.Select[Any]:
    return query if before is None else query.where(column < before)


def pages(
    engine: sa.Engine, rows: Callable[..., list[dict[str, Any]]], id_name: str
) -> Iterator[dict[str, Any]]:
    """All rows, newest first. Each page has a transaction of its own, so that a slow reader locks nothing."""
    before = None
    while True:
        with engines.read(engine) as connection:
            page = rows(connection, before=before, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        before = page[-1][id_name]
