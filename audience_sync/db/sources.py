"""Open the databases that definitions read from, for reading only if the database can enforce it."""

import re
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa

from audience_sync.db.engines import BUSY_SECONDS, open_postgresql, parse_url, sqlite_file, sqlite_options
from audience_sync.errors import SourceError


def open_source(name: str, url: str) -> sa.Engine:
    """Open a database that definitions read from.

    Raises:
        SourceError: the driver is missing, or the URL is invalid.

    """
    try:
        parsed = parse_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _open_sqlite_source(parsed)
        if parsed.get_backend_name() == "postgresql":
            return open_postgresql(parsed)
        return _open_experimental(parsed)
    except Exception as error:  # a driver may refuse a URL by any error
        raise SourceError(
            f"The source {name} cannot be opened: {type(error).__name__}. Is its url right, and is the Python "
            "driver that it names installed?"
        ) from error


def _open_sqlite_source(url: sa.URL) -> sa.Engine:
    """Open a file for reading only; a missing file is an error and is not created."""
    waits = {"timeout": float(str(url.query.get("timeout", BUSY_SECONDS)))}
    file = sqlite_file(url)
    uri = f"{file.as_uri()}?{urlencode(sqlite_options(url) | {'mode': 'ro'})}"
    engine = sa.create_engine(url.set(query={}), hide_parameters=True, max_overflow=-1, connect_args=waits)
    _require_file(engine, file)

    @sa.event.listens_for(engine, "do_connect")
    def connect(
        _dialect: sa.Dialect, _record: Any, _arguments: Any, options: dict[str, Any]
    ) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(uri, uri=True, **options)
        connection.execute("PRAGMA query_only = ON")
        return connection

    return engine


def _open_experimental(url: sa.URL) -> sa.Engine:
    """Open a database of another kind. A database file must exist, because many drivers would create it."""
    name = url.database or ""
    is_duckdb = url.get_backend_name() == "duckdb"
    in_file = name and ":memory:" not in name and not name.startswith(("md:", "motherduck:"))
    if not in_file or not (is_duckdb or (not url.host and re.search(r"[/\\.]", name))):
        return sa.create_engine(url, hide_parameters=True, pool_pre_ping=True)
    read_only = {"read_only": True} if is_duckdb else {}
    engine = sa.create_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args=read_only)
    _require_file(engine, Path(name))
    return engine


def _require_file(engine: sa.Engine, file: Path) -> None:
    @sa.event.listens_for(engine, "do_connect")
    def check(dialect: sa.Dialect, *_: Any) -> None:
        if not file.exists():
            raise dialect.loaded_dbapi.Error(f"the file {file} does not exist")
