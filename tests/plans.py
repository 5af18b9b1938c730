"""Recording of how a database runs our statements."""

from contextlib import contextmanager

import sqlalchemy as sa

from audience_sync.db import dialects


@contextmanager
def recorded_plans(engine):
    """A list to which each statement of the block is added, with the lines of its plan."""
    recorded = []
    how = "EXPLAIN QUERY PLAN" if dialects.is_sqlite(engine) else "EXPLAIN"

    def explain(connection, _cursor, statement, parameters, *_):
        if statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            cursor = connection.connection.dbapi_connection.cursor()
            cursor.execute(
                f"{how} {statement}", parameters[0] if isinstance(parameters, list) else parameters
            )
            recorded.append((statement, [str(row[-1]) for row in cursor.fetchall()]))

    sa.event.listen(engine, "before_cursor_execute", explain)
    try:
        yield recorded
    finally:
        sa.event.remove(engine, "before_cursor_execute", explain)
