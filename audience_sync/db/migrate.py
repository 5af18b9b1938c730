"""The version of the database, and the migrations between versions.

Alembic is imported only to migrate, because its import takes longer than a whole sync without changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import audience_sync
from audience_sync.db import dialects, engines
from audience_sync.db.tables import metadata
from audience_sync.errors import DatabaseError

KNOWN = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
    "0006",
    "0007",
    "0008",
    "0009",
    "0010",
    "0011",
    "0012",
    "0013",
    "0014",
    "0015",
    "0016",
)
HEAD = KNOWN[-1]
VERSION_TABLE = "audience_sync_version"
_ENCODINGS = ("UTF8", "SQL_ASCII")  # SQL_ASCII stores any bytes
_LOCK = 4_710_226_013  # the key of PostgreSQL's advisory lock for migrations; any constant would do


def current(engine: sa.Engine) -> str | None:
    """Return the revision of the database; None if it has none of our tables.

    Raises:
        DatabaseError: it cannot be reached, its encoding cannot represent all text, or it has a table with one of our
            names but no version.

    """
    schema = engine.get_execution_options().get("schema")
    with engines.plain_errors(engine), engine.connect() as connection:
        _check_encoding(connection)
        names = set(sa.inspect(connection).get_table_names(schema=schema))
        if VERSION_TABLE in names:
            query = f"SELECT version_num FROM {{our}}{VERSION_TABLE}"
            revision: str | None = dialects.sql(connection, query).scalar_one_or_none()
            if revision is not None:
                return revision
        foreign = sorted(names & set(metadata.tables))
        if foreign:
            raise DatabaseError(
                f"The database has a table {foreign[0]} that audience-sync did not make. Keep your own tables "
                "in a separate file or schema, name it under [sources], and give [database] another url."
            )
        return None


def _check_encoding(connection: sa.Connection) -> None:
    """Refuse PostgreSQL in an encoding in which user ids, or our own statements, may have no equivalent."""
    raw: Any = connection.connection.dbapi_connection
    if dialects.is_sqlite(connection):
        return
    encoding = (raw.info.parameter_status("server_encoding") or "UTF8").upper()
    if encoding not in _ENCODINGS:
        raise DatabaseError(
            f"The database {raw.info.dbname} has the encoding {encoding}, which cannot represent every user id: give "
            "[database] url a database with UTF8 (CREATE DATABASE … TEMPLATE template0 ENCODING 'UTF8'), and name this "
            "one under [sources] if definitions read from it."
        )


def ensure(engine: sa.Engine) -> None:
    """Check that the database is at the newest version; set up an empty one.

    Raises:
        DatabaseError: it is older or newer than this program.

    """
    revision = current(engine)
    if revision is None:
        upgrade(engine)
    elif revision not in KNOWN:
        raise DatabaseError(
            f"The database is at version {revision}, which audience-sync {audience_sync.__version__} does "
            "not know: it is newer. Upgrade audience-sync."
        )
    elif revision != HEAD:
        raise DatabaseError(
            f"The database is at version {revision} and this program needs {HEAD}: back it up, then run "
            "`audience-sync db upgrade`."
        )


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    current(engine)  # raises for a foreign table, before anything is created
    _run(engine, "upgrade", revision)


def downgrade(engine: sa.Engine, revision: str) -> None:
    _run(engine, "downgrade", revision)


def script_folder() -> Path:
    """Return the folder of the migrations, which is inside the package in a wheel, and next to it in a checkout."""
    package = Path(audience_sync.__file__).parent
    shipped = package / "_migrations"
    return shipped if shipped.is_dir() else package.parent / "migrations"


def _run(engine: sa.Engine, direction: str, revision: str) -> None:
    import alembic.command  # noqa: PLC0415
    import alembic.config  # noqa: PLC0415

    config = alembic.config.Config()
    config.set_main_option("script_location", str(script_folder()).replace("%", "%%"))
    with engines.plain_errors(engine), engine.connect() as connection:
        connection.execution_options(schema_translate_map=None)  # names resolve by the search path here
        with _without_foreign_keys(connection), engines.begin_write(connection):
            if not dialects.is_sqlite(engine):
                _enter_schema(connection, engine.get_execution_options()["schema"])
            config.attributes["connection"] = connection
            run: Any = getattr(alembic.command, direction)
            run(config, revision)


@contextmanager
def _without_foreign_keys(connection: sa.Connection) -> Iterator[None]:
    """Switch foreign keys off on SQLite: batch mode rebuilds tables, which would delete the rows that refer to them.

    The pragma has no effect inside a transaction, so it runs on the driver's connection, outside any transaction.
    """
    if not dialects.is_sqlite(connection):
        yield
        return
    raw: Any = connection.connection.dbapi_connection
    raw.execute("PRAGMA foreign_keys = OFF")
    try:
        yield
        broken = raw.execute("PRAGMA foreign_key_check").fetchone()
    finally:
        raw.execute("PRAGMA foreign_keys = ON")
    if broken is not None:
        raise DatabaseError(
            f"After the migration, {broken[0]} has rows that refer to missing ones: restore the backup."
        )


def _enter_schema(connection: sa.Connection, schema: str) -> None:
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    connection.exec_driver_sql(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    connection.exec_driver_sql(f'SET LOCAL search_path TO "{schema}"')
