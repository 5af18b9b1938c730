"""Options of a URL take effect, messages show no secrets, and no source is created by a misspelt name."""

import sqlite3
import threading
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from audience_sync.cli import setup
from audience_sync.db import checks, engines, sources
from audience_sync.errors import DatabaseError, DatabaseLocked, SourceError


@pytest.fixture
def opened():
    """Open engines that the test need not close."""
    running = []

    def open_engine(engine):
        running.append(engine)
        return engine

    yield open_engine
    for engine in running:
        engine.dispose()


def settings_of(engine, *names):
    with engine.connect() as connection:
        return [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]


@pytest.mark.parametrize(
    "open_engine", [lambda url: engines.open_own(url, "x"), lambda url: sources.open_source("s", url)]
)
def test_options_of_a_postgresql_url_take_effect(postgres, opened, open_engine):
    more = "&options=-c%20lock_timeout%3D7s%20--application_name%3Dmine%5C%20own%20-cwork_mem%3D5MB&prepare_threshold=9"
    engine = opened(open_engine(postgres.base + more))
    assert settings_of(engine, "lock_timeout", "application_name", "work_mem") == ["7s", "mine own", "5MB"]
    assert settings_of(engine, "timezone", "idle_in_transaction_session_timeout") == ["UTC", "1h"]
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection.prepare_threshold == 9
        assert not engines.is_pooled(connection)


@pytest.mark.parametrize(
    "more", ["", "&options=-c%20DateStyle%3DGerman%20-c%20standard_conforming_strings%3Doff"]
)
def test_neither_a_url_nor_a_database_changes_how_our_statements_and_times_are_read(postgres, opened, more):
    name = postgres.create()
    for setting in ("datestyle = 'SQL, DMY'", "default_transaction_isolation = 'serializable'"):
        postgres.run(f"ALTER DATABASE {name} SET {setting}")
    engine = opened(engines.open_own(postgres.url(name) + more, "x"))
    names = ("datestyle", "standard_conforming_strings", "default_transaction_isolation")
    assert settings_of(engine, *names) == ["ISO, DMY", "on", "read committed"]


@pytest.mark.parametrize(("written", "threshold"), [("none", None), ("0", 0)])
def test_prepared_statements_can_be_switched_off(postgres, opened, written, threshold):
    engine = opened(sources.open_source("s", f"{postgres.base}&prepare_threshold={written}"))
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection.prepare_threshold == threshold


@pytest.mark.parametrize("option", ["sslpassword", "sslkey", "passfile", "options"])
def test_a_message_shows_no_option_of_a_url_that_may_be_a_secret(opened, option):
    value = "-c%20a.b%3Ds3cret" if option == "options" else "s3cret"
    engine = opened(
        engines.open_own(f"postgresql+psycopg://u:s3cret@127.0.0.1:1/x?host=127.0.0.1&{option}={value}", "x")
    )
    with pytest.raises(DatabaseError) as raised, engines.read(engine):
        pass
    assert "s3cret" not in str(raised.value)
    assert "postgresql+psycopg://u:***@127.0.0.1:1/x?host=127.0.0.1 cannot be used" in str(raised.value)
    assert str(raised.value).count("s the server running") == 1  # our question in place of libpq's


class FileDialect(SQLiteDialect_pysqlite):
    """Stands in for the dialect of another database in a file, which creates a missing one."""

    name = "filedb"
    supports_statement_cache = True


class DuckDialect(FileDialect):
    """Stands in for DuckDB's dialect, which opens a file for reading only where `read_only` is set."""

    name = "duckdb"
    supports_statement_cache = True

    def connect(self, path, *, read_only=False, **options):
        mode = "ro" if read_only else "rwc"
        return super().connect(f"file:{path}?mode={mode}", **options | {"uri": True})


@pytest.fixture
def _stand_ins():
    known = sa.dialects.registry.impls
    stand_ins = {"filedb": lambda: FileDialect, "duckdb": lambda: DuckDialect}
    before = dict(known)
    known.update(stand_ins)
    yield
    known.clear()
    known.update(before)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("scheme", ["sqlite", "filedb", "duckdb"])
def test_a_misspelt_file_is_not_created(opened, tmp_path, scheme):
    engine = opened(sources.open_source("shop", f"{scheme}:///{tmp_path}/shp.db"))
    with pytest.raises(SourceError, match=f"cannot be reached: the file {tmp_path}/shp.db does not exist"):
        checks.source_is_writable(engine)
    assert list(tmp_path.iterdir()) == []
    sqlite3.connect(tmp_path / "shp.db").close()
    assert checks.source_is_writable(engine) is False


@pytest.mark.usefixtures("_stand_ins")
def test_check_reports_the_missing_guarantees_of_an_experimental_source(opened, tmp_path):
    sqlite3.connect(tmp_path / "shop.db").close()
    engine = opened(sources.open_source("shop", f"filedb:///{tmp_path}/shop.db"))
    (warning,) = setup._check_source(SimpleNamespace(open_source=lambda _: engine), "shop").warnings
    assert warning.startswith(
        "reachable, experimental: neither a timeout nor Ctrl-C ends a running statement"
    )


def test_a_source_by_uri_is_opened(opened, tmp_path):
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE orders (user_id)")
    engine = opened(sources.open_source("shop", f"sqlite:///file:{tmp_path}/shop.db?uri=true&mode=rw"))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM orders").scalar_one() == 0
        with pytest.raises(sa.exc.OperationalError, match="readonly"):
            connection.exec_driver_sql("INSERT INTO orders VALUES (1)")


@pytest.mark.parametrize("url", ["sqlite:///{}?mode={}", "sqlite:///file:{}?uri=true&mode={}"])
def test_the_options_of_sqlite_apply_to_our_own_file(opened, tmp_path, url):
    file = tmp_path / "50%41 own.db"
    quoted = quote(str(file))
    with (
        pytest.raises(sa.exc.OperationalError, match="unable to open"),
        opened(engines.open_own(url.format(quoted, "rw"), "x")).connect(),
    ):
        pass
    assert not file.exists()
    with opened(engines.open_own(url.format(quoted, "rwc"), "x")).connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n)")
    assert file.stat().st_mode & 0o777 == 0o600
    with (
        opened(engines.open_own(url.format(quoted, "ro"), "x")).connect() as connection,
        pytest.raises(sa.exc.OperationalError, match="readonly"),
    ):
        connection.exec_driver_sql("CREATE TABLE u (n)")


def test_our_own_file_by_uri_is_created_for_its_owner_only(opened, tmp_path):
    with opened(engines.open_own(f"sqlite:///file:{tmp_path}/own.db?uri=true&cache=private", "x")).connect():
        assert (tmp_path / "own.db").stat().st_mode & 0o777 == 0o600


def test_the_options_of_sqlite_apply_to_a_source(opened, tmp_path):
    sqlite3.connect(tmp_path / "shop.db").close()
    url = f"sqlite:///{tmp_path}/shop.db?mode=rw&immutable=1"
    with opened(sources.open_source("shop", url)).connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
    with pytest.raises(sa.exc.OperationalError, match="no such vfs: none"):
        opened(sources.open_source("shop", f"{url}&vfs=none")).connect()


@pytest.mark.usefixtures("_stand_ins")
def test_a_duckdb_source_is_opened_for_reading_only(opened, tmp_path):
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE orders (user_id text)")
    engine = opened(sources.open_source("shop", f"duckdb:///{tmp_path}/shop.db"))
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="readonly"):
        connection.exec_driver_sql("DELETE FROM orders")


def test_a_new_connection_to_a_locked_file_waits_as_short_as_asked(tmp_path, opened):
    url = f"sqlite:///{tmp_path / 'own.db'}"
    sqlite3.connect(tmp_path / "own.db").execute("CREATE TABLE t (n integer)").connection.close()
    locking = sqlite3.connect(tmp_path / "own.db", isolation_level=None, check_same_thread=False)
    locking.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(30, locking.rollback)  # for one that waits the usual time
    release.start()
    try:
        for begin in (engines.read, engines.write):
            with pytest.raises(DatabaseLocked), begin(opened(engines.open_own(url, "x")), 0.01) as connection:
                connection.exec_driver_sql("SELECT * FROM t")
    finally:
        release.cancel()
        locking.close()


def test_the_message_names_the_privilege_that_creating_our_schema_needs(postgres):
    with postgres.engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        connection.exec_driver_sql("CREATE ROLE without_create")
        connection.exec_driver_sql("SET LOCAL ROLE without_create")
        with pytest.raises(sa.exc.ProgrammingError) as caught:
            connection.exec_driver_sql("CREATE SCHEMA ours")
    assert "Grant CREATE on the database to this role" in engines.failure(caught.value)
