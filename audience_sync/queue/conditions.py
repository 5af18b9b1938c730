"""SQL conditions on the deliveries of one subject (a user or a company), each answered by an index.

A subject may have any number of deliveries, so each query is written such that both databases can use an index.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import sqlalchemy as sa

from audience_sync.db.dialects import is_sqlite, json_list, set_locally, sql
from audience_sync.db.engines import to_json
from audience_sync.db.tables import UtcDateTime

OF_SUBJECT = "b.subject_id = {subject} AND b.action = :action"


def exists(condition: str, order: str) -> str:
    """Return the condition that a delivery exists, tested for each subject with the index on the column `order`.

    For EXISTS, PostgreSQL may join whole tables, and SQLite may choose another index.
    """
    return f"(SELECT 1 FROM {{our}}deliveries b WHERE {condition} ORDER BY b.{order} LIMIT 1) IS NOT NULL"


def for_subject(condition: str, subject: str) -> str:
    return condition.replace("{subject}", subject)


def subjects_where(
    connection: sa.Connection, subjects: Collection[str], condition: str, **parameters: Any
) -> set[str]:
    """Return the subjects for which a condition holds."""
    query = (
        f"SELECT a.value FROM {json_list(connection, 'subjects')} a WHERE {for_subject(condition, 'a.value')}"
    )
    return set(sql(connection, query, subjects=to_json(list(subjects)), **parameters).scalars())


def moments_of(connection: sa.Connection) -> Callable[[Any], Any]:
    """Return the function that converts times in the results of `sql`."""
    return partial(UtcDateTime().process_result_value, dialect=connection.dialect)


def prefer_index_scans(connection: sa.Connection) -> None:
    """Make PostgreSQL use the indexes in this transaction, even while its statistics describe an empty queue."""
    if not is_sqlite(connection):
        set_locally(connection, dict.fromkeys(_OFF, "off"))


# Before version 18, PostgreSQL gives a disabled plan a huge cost, and would compile it (`jit`) if there is no other.
_OFF = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "enable_hashjoin", "enable_mergejoin", "jit")
