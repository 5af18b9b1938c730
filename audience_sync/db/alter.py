"""Alter a table in a migration, and keep everything that belongs to it.

SQLite cannot alter constraints, so Alembic creates a new table, copies the rows and drops the old table. That alone would
lose the table's counter of ids (so that ids of deleted rows are reused), its triggers and its indexes, and it would fail
if a view uses the table. Only migrations import this module, because importing Alembic is slow.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op
from alembic.operations import BatchOperations

from audience_sync.db.dialects import is_sqlite, sql


@contextmanager
def alter_table(table: sa.Table) -> Iterator[BatchOperations]:
    """Yield the operations that alter a table; `table` has its current columns and constraints, without indexes."""
    connection = op.get_bind()
    if not is_sqlite(connection):
        with op.batch_alter_table(table.name) as batch:
            yield batch
        return
    with _rebuilding(connection, table.name), op.batch_alter_table(table.name, copy_from=table) as batch:
        yield batch


@contextmanager
def _rebuilding(connection: sa.Connection, table: str) -> Iterator[None]:
    """Restore what SQLite loses when a table is rebuilt, and do not touch other tables' triggers or any views."""
    last_id = sql(connection, "SELECT seq FROM sqlite_sequence WHERE name = :table", table=table).scalar()
    is_lost = "tbl_name = :table AND type IN ('index', 'trigger') AND sql <> ''"
    lost = sql(connection, f"SELECT sql FROM sqlite_master WHERE {is_lost}", table=table).scalars().all()
    connection.exec_driver_sql("PRAGMA legacy_alter_table = ON")
    try:
        yield
    finally:
        connection.exec_driver_sql("PRAGMA legacy_alter_table = OFF")
    for statement in lost:
        connection.exec_driver_sql(statement)
    if last_id is not None:
        sql(connection, "DELETE FROM sqlite_sequence WHERE name = :table", table=table)
        insert = "INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last_id)"
        sql(connection, insert, table=table, last_id=last_id)
