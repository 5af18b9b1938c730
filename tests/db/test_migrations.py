"""The migrated database equals the metadata, including what `alembic check` does not compare."""

import datetime as dt
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from audience_sync.db import dialects, engines, migrate
from audience_sync.db.tables import metadata
from audience_sync.errors import DatabaseError
from tests.db.catalogs import catalog

VIEWS = {"snapshots", "membership_history", "user_deliveries"}


@pytest.fixture
def empty(empty_url):
    engine = engines.open_own(empty_url, "audience_sync")
    yield engine
    engine.dispose()


def test_the_migrated_catalog_equals_that_of_the_metadata(empty):
    migrate.upgrade(empty)
    migrated = catalog(empty)
    migrate.downgrade(empty, "base")
    with engines.write(empty) as connection:
        metadata.create_all(connection)
    described = catalog(empty)
    assert migrated == described
    assert "without rowid" in str(migrated).lower() or not dialects.is_sqlite(empty)
    assert len(migrated) > len(metadata.tables)


def test_a_downgrade_and_upgrade_restore_the_catalog(empty):
    migrate.upgrade(empty)
    before = catalog(empty)
    migrate.downgrade(empty, "base")
    assert catalog(empty) in ({}, set())
    assert migrate.current(empty) is None
    migrate.upgrade(empty)
    assert migrate.current(empty) == migrate.HEAD
    assert catalog(empty) == before


def test_a_downgrade_gives_held_deliveries_the_id_of_their_run(empty):
    migrate.upgrade(empty)
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    with engines.write(empty) as connection:
        for statement in (
            "INSERT INTO {our}definitions (key, name, kind, created_at) VALUES ('vips', 'VIPs', 'audience', :at)",
            (
                'INSERT INTO {our}runs (definition_id, mode, "trigger", status, held_by, as_of, started_at, finished_at, '
                "deliveries_run_id) VALUES (1, 'changes', 'manual', 'rejected', 'guard', :at, :at, :at, NULL), "
                "(1, 'changes', 'manual', 'held', 'guard', :at, :at, :at, 1)"
            ),
            (
                "INSERT INTO {our}deliveries (action, subject_id, body, class, run_id, definition_id, value_at, status, "
                "created_at, next_attempt_at) VALUES ('identify', 'ann', 'true', 'change', 1, 1, :at, 'held', :at, :at)"
            ),
        ):
            dialects.sql(connection, statement, at=moment)
    migrate.downgrade(empty, "0008")
    with engines.read(empty) as connection:
        assert dialects.sql(connection, "SELECT run_id FROM {our}deliveries").scalars().all() == [2]


def test_a_downgrade_and_upgrade_keep_the_rows(empty):
    migrate.upgrade(empty, "0001")
    before = catalog(empty)
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    with engines.write(empty) as connection:
        dialects.sql(
            connection,
            "INSERT INTO {our}definitions (key, name, kind, created_at) VALUES ('vips', 'VIPs', 'audience', :at)",
            at=moment,
        )
        dialects.sql(
            connection,
            'INSERT INTO {our}runs (definition_id, mode, "trigger", status, as_of, started_at, finished_at, '
            "member_count, entered_count, exited_count, changed_count) "
            "VALUES (1, 'first', 'manual', 'succeeded', :at, :at, :at, 3, 3, 0, 0)",
            at=moment,
        )
    for _ in range(2):
        migrate.upgrade(empty)
        with engines.read(empty) as connection:
            rows = dialects.sql(connection, "SELECT key, size, accepted FROM {our}snapshots").all()
        assert [tuple(row) for row in rows] == [("vips", 3, 0)]
        migrate.downgrade(empty, "0001")
        assert catalog(empty) == before


def test_an_upgrade_of_the_newest_version_changes_nothing(engine):
    before = catalog(engine)
    migrate.upgrade(engine)
    assert catalog(engine) == before


def test_the_views_can_be_queried(engine):
    with engines.read(engine) as connection:
        names = set(
            sa.inspect(connection).get_view_names(schema=engine.get_execution_options().get("schema"))
        )
        assert names == VIEWS
        for view in VIEWS:
            assert dialects.sql(connection, f"SELECT * FROM {{our}}{view}").all() == []


def test_the_view_of_deliveries_shows_the_answer(engine):
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    with engines.write(engine) as connection:
        connection.execute(
            metadata.tables["requests"]
            .insert()
            .values(
                lane="identify",
                epoch=1,
                started_at=moment,
                status_code=202,
                x_request_id="x",
                delivery_count=1,
            )
        )
        connection.execute(
            metadata.tables["deliveries"]
            .insert()
            .values(
                {
                    "action": "identify",
                    "subject_id": "ann",
                    "body": {"vips": True},
                    "class": "push",
                    "run_id": 1,
                    "definition_id": 1,
                    "value_at": moment,
                    "status": "accepted",
                    "created_at": moment,
                    "next_attempt_at": moment,
                    "settled_at": moment,
                    "request_id": 1,
                }
            )
        )
    with engines.read(engine) as connection:
        row = dialects.sql(
            connection, "SELECT user_id, status, status_code, x_request_id FROM {our}user_deliveries"
        ).one()
    assert tuple(row) == ("ann", "accepted", 202, "x")


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("deliveries", {"status": "accepted", "settled_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}),
        ("deliveries", {"status": "dead", "settled_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}),
        ("deliveries", {"status": "pending", "settled_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}),
        ("deliveries", {"status": "cancelled"}),
        ("deliveries", {"status": "sending"}),
        ("deliveries", {"status": "unknown"}),
        ("deliveries", {"call_id": 1}),
    ],
)
def test_constraints_tie_a_status_to_its_columns(engine, table, values):
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    row = {
        "action": "identify",
        "subject_id": "ann",
        "body": {},
        "class": "push",
        "run_id": 1,
        "definition_id": 1,
        "value_at": moment,
        "status": "pending",
        "created_at": moment,
        "next_attempt_at": moment,
    }
    insert = metadata.tables[table].insert()
    with engine.connect() as connection:
        with connection.begin():
            connection.execute(insert.values(row))
        with pytest.raises(sa.exc.IntegrityError), connection.begin():
            connection.execute(insert.values(row | values))


@pytest.mark.parametrize("name", ["sessions", "actions"])
def test_a_foreign_table_with_a_name_that_is_new_stops_the_upgrade(empty, name):
    migrate.upgrade(empty, "0011")
    with engines.write(empty) as connection:
        dialects.sql(connection, f"CREATE TABLE {{our}}{name} (mine int)")
    before = catalog(empty)
    with pytest.raises(DatabaseError, match=f"has a table {name} that audience-sync did not make, and needs"):
        migrate.upgrade(empty)
    assert (catalog(empty), migrate.current(empty)) == (before, "0011")
    with engines.write(empty) as connection:
        dialects.sql(connection, f"DROP TABLE {{our}}{name}")
    migrate.upgrade(empty)


def test_a_foreign_table_with_one_of_our_names_stops_the_upgrade(empty):
    with engines.write(empty) as connection:
        if not dialects.is_sqlite(empty):
            connection.exec_driver_sql("CREATE SCHEMA audience_sync")
        dialects.sql(connection, "CREATE TABLE {our}events (id integer)")
    with pytest.raises(DatabaseError, match="has a table events that audience-sync did not make"):
        migrate.ensure(empty)
    with engines.read(empty) as connection:
        schema = empty.get_execution_options().get("schema")
        assert sa.inspect(connection).get_table_names(schema=schema) == ["events"]


def test_a_new_database_is_set_up(empty):
    migrate.ensure(empty)
    assert migrate.current(empty) == migrate.HEAD


def test_a_newer_database_is_left_alone(engine):
    with engines.write(engine) as connection:
        dialects.sql(connection, f"UPDATE {{our}}{migrate.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(
        DatabaseError, match=r"at version 9999, .* does not know: it is newer. Upgrade audience-sync"
    ):
        migrate.ensure(engine)


def test_an_older_database_is_refused_with_what_to_do(empty):
    migrate.upgrade(empty, "0001")
    with pytest.raises(
        DatabaseError, match=r"at version 0001 and this program needs \d+: back it up, then run"
    ):
        migrate.ensure(empty)


def test_the_program_knows_every_migration():
    names = sorted(path.name for path in (migrate.script_folder() / "versions").glob("[0-9]*.py"))
    assert tuple(name[:4] for name in names) == migrate.KNOWN
    assert migrate.KNOWN[-1] == migrate.HEAD


@pytest.mark.parametrize("start", ["base", "0001"])
def test_an_upgrade_that_is_killed_at_any_statement_changes_nothing(empty_url, empty, backend, start):
    urls = empty_url if backend == "postgresql" else empty_url.replace("own.db", "{}.db")
    script = str(Path(__file__).parent / "upgrading.py")
    step = os.environ.get("KILLED_STATEMENTS_STEP", "17")  # soak/ kills at each
    called = [sys.executable, script, urls, start, step]
    upgrading = subprocess.run(called, capture_output=True, text=True, check=False)
    assert upgrading.returncode == 0, upgrading.stderr
    assert int(upgrading.stdout) > 20
    migrate.upgrade(empty)
    upgraded = engines.open_own(urls.format(upgrading.stdout.strip()), "audience_sync")
    assert catalog(upgraded) == catalog(empty)
    upgraded.dispose()


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "EUC_JP", "SQL_ASCII"])
def test_our_own_tables_need_an_encoding_for_all_text(postgres, encoding):
    name = f"encoding_{encoding.lower()}"
    options = f"TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    postgres.run(f"CREATE DATABASE {name} {options}")
    postgres.created.append(name)
    engine = engines.open_own(postgres.url(name), "audience_sync")
    if encoding == "SQL_ASCII":
        migrate.ensure(engine)
    else:
        message = f"The database {name} has the encoding {encoding}, which cannot represent every user id: "
        with pytest.raises(DatabaseError, match=message):
            migrate.ensure(engine)
    engine.dispose()
