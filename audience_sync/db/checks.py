"""Checks of our own database and of sources, for the command `check`."""

import sqlalchemy as sa

from audience_sync.db import dialects, engines
from audience_sync.errors import DatabaseError, SourceError

_MAY_CREATE_TEMP_TABLES = (
    "SELECT has_database_privilege(current_database(), 'TEMPORARY'), current_database(), current_user"
)
_MAY_WRITE = (
    "SELECT rolsuper OR EXISTS (SELECT 1 FROM information_schema.table_privileges WHERE grantee = current_user "
    "AND privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')) FROM pg_roles WHERE rolname = current_user"
)


def check_own(engine: sa.Engine, schema: str) -> str:
    """Describe our own database.

    Raises:
        DatabaseError: the role may not create temporary tables.

    """
    with engines.read(engine) as connection:
        if dialects.is_sqlite(connection):
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
            return f"SQLite, journal mode {mode}"
        through = " through a connection pooler" if engines.is_pooled(connection) else ""
        is_allowed, database, role = connection.exec_driver_sql(_MAY_CREATE_TEMP_TABLES).one()
    if not is_allowed:
        raise DatabaseError(
            "the role may not create temporary tables, which syncs and large imports need. Run: "
            f"GRANT TEMPORARY ON DATABASE {database} TO {role}"
        )
    return f"PostgreSQL{through}, schema {schema}"


def source_is_writable(engine: sa.Engine) -> bool:
    """Connect to a source; return whether its role may change tables (known for PostgreSQL only).

    Raises:
        SourceError: it cannot be reached.

    """
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            is_postgresql = engine.dialect.name == "postgresql"
            return is_postgresql and bool(connection.exec_driver_sql(_MAY_WRITE).scalar())
    except sa.exc.DBAPIError as error:
        raise SourceError(f"it cannot be reached: {engines.reason(error)}. Check its url.") from error
