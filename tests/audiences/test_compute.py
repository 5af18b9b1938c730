"""Definitions are computed on our own database or a source; errors name the definition."""

import contextlib
import datetime as dt
import os
import signal
import sqlite3
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from audience_sync.audiences import compute, reading, snapshot
from audience_sync.db import dialects, engines, watch
from audience_sync.db.sources import open_source
from audience_sync.errors import DefinitionError, Interrupted, SourceError
from audience_sync.stopping import Stop

AS_OF = dt.datetime(2026, 3, 1, 13, 30, tzinfo=dt.UTC)
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS user_id FROM n"


@pytest.fixture
def computed(engine):
    """Compute a definition; return the user ids with their values, and the set-aside rows by reason."""

    def run(definition, source=None):
        with engine.connect() as connection:
            compute.compute(connection, definition, AS_OF, source)
            counts = snapshot.diff(connection, None, definition, AS_OF).set_aside
            rows = dialects.sql(connection, "SELECT user_id, value FROM {temp}audience_sync_changes").all()
        return dict(map(tuple, rows)), counts

    return run


@pytest.fixture(params=["sqlite", "postgresql"])
def shop(request, tmp_path):
    """A source with two orders of ann and one of bob."""
    if request.param == "sqlite":
        path = tmp_path / "shop.db"
        sqlite3.connect(path).close()
        url = f"sqlite:///{path}"
    else:
        server = request.getfixturevalue("postgres")
        url = server.url(server.create())
    maker = sa.create_engine(url)
    with maker.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE orders (user_id text, total double precision, ordered_on date)"
        )
        connection.exec_driver_sql(
            "INSERT INTO orders VALUES ('ann', 1.5, '2026-02-28'), ('ann', 1.5, '2026-03-02'), ('bob', 2, NULL)"
        )
    maker.dispose()
    source = open_source("shop", url)
    yield source
    source.dispose()


def test_a_definition_reads_the_companys_tables_and_ours(world, computed):
    world.people("ann")
    ours = world.engine.get_execution_options()["our"].replace('"', "")
    world.execute(
        "INSERT INTO {our}events (call_id, user_id, name, properties, context, timestamp, received_at) "
        "VALUES (1, 'bob', 'Signed Up', '{}', '{}', :now, :now)",
        now=AS_OF,
    )
    sql = f"SELECT user_id FROM people UNION ALL SELECT user_id FROM {ours}events WHERE name = 'Signed Up'"
    assert computed(world.audience(sql)) == ({"ann": None, "bob": None}, {})


def test_the_moment_of_the_run_is_bound(world, computed):
    if dialects.is_sqlite(world.engine):
        sql = "SELECT :as_of AS user_id UNION ALL SELECT date(:as_of, '-30 days')"
        expected = {"2026-03-01 13:30:00", "2026-01-30"}
    else:
        sql = "SELECT :as_of::date::text AS user_id UNION ALL SELECT (:as_of - interval '30 days')::text"
        expected = {"2026-03-01", "2026-01-30 13:30:00+00"}
    assert set(computed(world.audience(sql))[0]) == expected


@pytest.mark.parametrize(
    ("zone", "today", "tomorrow"),
    [
        ("UTC", "2026-03-01", "2026-03-02"),
        ("Pacific/Kiritimati", "2026-03-02", "2026-03-03"),
        ("Pacific/Pago_Pago", "2026-03-01", "2026-03-02"),
    ],
)
def test_today_is_the_date_in_the_zone_of_the_definition(world, computed, shop, zone, today, tomorrow):
    for source in (None, shop):
        is_sqlite = dialects.is_sqlite(source or world.engine)
        following = "date(:today, '+1 day')" if is_sqlite else "(:today + 1)::text"
        as_text = "" if is_sqlite else "::text"
        sql = f"SELECT :today{as_text} AS user_id UNION ALL SELECT {following}"
        name = source and "shop"
        assert set(computed(world.audience(sql, timezone=zone, source=name), source)[0]) == {today, tomorrow}
        for wanted in (today, tomorrow):
            ready = f"SELECT :today{as_text} = '{wanted}'"
            definition = world.audience(sql, timezone=zone, source=name, ready_sql=ready, eligible_sql=sql)
            if wanted == today:
                assert computed(definition, source)[0].keys() == {today, tomorrow}
            else:
                with pytest.raises(DefinitionError, match="not ready"):
                    computed(definition, source)


def test_percents_colons_and_question_marks_are_left_alone(world, computed):
    world.people("a%b", "a?b", "a:b", "ab")
    sql = "SELECT user_id FROM people WHERE user_id LIKE 'a%b' AND user_id <> '?:x' AND user_id <> '100%s' -- %:as"
    assert set(computed(world.audience(sql))[0]) == {"a%b", "a?b", "a:b", "ab"}


def test_ids_compare_byte_by_byte(world, computed):
    collation = "NOCASE" if dialects.is_sqlite(world.engine) else '"default"'
    world.people("ann", "Ann", "ann ", "a\u0301", "\u00e1")
    sql = f"SELECT user_id COLLATE {collation} AS user_id FROM people"
    assert len(computed(world.audience(sql))[0]) == 5


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT user_id AS id FROM people", "must return one column called user_id; it returns id"),
        ("SELECT p.user_id, q.user_id FROM people p, people q", "it returns user_id, user_id"),
        ("SELECT user_id FROM people WHERE", "its SQL does not work"),
        (
            "SELECT user_id FROM missing",
            r"its SQL does not work: .*missing.*\. It runs on the database of audience-sync: `source` names another",
        ),
        ("SELECT user_id FROM people WHERE user_id = :name", "there is no parameter :name"),
        ("DELETE FROM people", "vips: "),
        ("", "vips: the SQL is empty"),
    ],
)
def test_an_invalid_definition_is_refused_with_its_error(world, computed, sql, message):
    with pytest.raises(DefinitionError, match=message):
        computed(world.audience(sql))


def test_a_trait_needs_a_value(world, computed):
    with pytest.raises(DefinitionError, match="spend: its SQL must return one column called value"):
        computed(world.trait("SELECT user_id FROM people"))


def test_a_definition_without_rows_is_an_empty_snapshot(world, computed):
    assert computed(world.audience("SELECT NULL AS user_id WHERE 1 = 0")) == ({}, {})
    assert computed(world.audience("SELECT NULL AS user_id")) == ({}, {"null": 1})
    assert computed(world.trait("SELECT 'ann' AS user_id, NULL AS value")) == ({}, {})


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_authorizer_refuses_more_than_reading(world, computed, monkeypatch):
    monkeypatch.setattr(compute.statement, "check", lambda *_: [])  # as if the check had missed it
    for sql in ("SELECT load_extension('x') AS user_id", "ATTACH 'other.db' AS other", "DELETE FROM people"):
        with pytest.raises(DefinitionError, match="may only read, and this one does more"):
            computed(world.audience(sql))
    world.people("ann")
    assert computed(world.audience())[0] == {"ann": None}  # the authorizer is gone again


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_definition_may_read_virtual_tables(world, computed):
    world.execute("CREATE VIRTUAL TABLE notes USING fts5(user_id, text)")
    world.execute("INSERT INTO notes VALUES ('ann', 'large order')")
    sql = "SELECT user_id FROM notes WHERE notes MATCH 'order'"
    assert computed(world.audience(sql)) == ({"ann": None}, {})
    source = open_source("shop", str(world.engine.url))
    sql += """ UNION ALL SELECT value FROM json_each('["bob", 7, 2.5, true, null]')"""
    expected = {"ann": None, "bob": None, "7": None, "2.5": None, "1": None}
    for definition, engine in ((world.audience(sql), None), (world.audience(sql, source="shop"), source)):
        assert computed(definition, engine) == (expected, {"null": 1})
    source.dispose()


def test_a_definition_that_takes_too_long_is_stopped(world, computed):
    with pytest.raises(DefinitionError, match=r"vips: its SQL ran longer than 0.1 seconds. Make it faster"):
        computed(world.audience(ENDLESS, timeout_seconds=0.1))
    world.people("ann")
    assert computed(world.audience(timeout_seconds=5)) == ({"ann": None}, {})


def test_a_source_is_read_and_loaded(world, computed, shop, monkeypatch):
    monkeypatch.setattr(compute, "FETCH_ROWS", 2)
    sql = "SELECT User_ID, total AS VALUE FROM orders"
    assert computed(world.audience(sql, source="shop"), shop) == (
        {"ann": None, "bob": None},
        {},
    )
    assert computed(world.trait(sql, source="shop"), shop) == ({"ann": "1.5", "bob": "2"}, {})
    sql = "SELECT user_id FROM orders WHERE ordered_on <= :as_of AND user_id LIKE '%'"
    assert computed(world.audience(sql, source="shop"), shop) == ({"ann": None}, {})


def test_text_from_a_source_arrives_as_it_was(world, computed, shop):
    odd = [
        "tab\there",
        "new\nline",
        "return\r",
        "back\\slash",
        "\\N",
        "\\.",
        '"quoted"',
        "\u00e9\u4e16\U0001f600",
        "a, b",
    ]
    maker = sa.create_engine(shop.url)
    table = sa.table("orders", sa.column("user_id"))
    with maker.begin() as connection:
        connection.execute(table.delete())
        connection.execute(table.insert(), [{"user_id": each} for each in odd])
    maker.dispose()
    assert set(computed(world.audience("SELECT user_id FROM orders", source="shop"), shop)[0]) == set(odd)
    values = computed(world.trait("SELECT user_id, user_id AS value FROM orders", source="shop"), shop)[0]
    assert values["tab\there"] == r'"tab\there"'
    assert values["\\N"] == r'"\\N"'
    assert values["\u00e9\u4e16\U0001f600"] == '"\u00e9\u4e16\U0001f600"'


def test_a_source_that_takes_too_long_is_stopped(world, computed, shop):
    with pytest.raises(DefinitionError, match=r"ran longer than 0.2 seconds"):
        computed(world.audience(ENDLESS, source="shop", timeout_seconds=0.2), shop)
    drip = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS user_id FROM n"
    with pytest.raises(DefinitionError, match=r"ran longer than 0.2 seconds"):
        computed(world.audience(drip, source="shop", timeout_seconds=0.2), shop)


@pytest.mark.parametrize("shop", ["postgresql"], indirect=True)
def test_a_timeout_is_reported_although_it_ended_a_statement_whose_error_is_ignored(
    world, computed, shop, monkeypatch
):
    def waste_time(connection):
        with contextlib.suppress(sa.exc.DBAPIError):
            connection.exec_driver_sql("SELECT pg_sleep(60)")

    monkeypatch.setattr(reading, "_end_with_our_process", waste_time)
    with pytest.raises(DefinitionError, match=r"ran longer than 0.1 seconds"):
        computed(world.audience("SELECT user_id FROM orders", source="shop", timeout_seconds=0.1), shop)


def test_no_wait_for_a_lock_outlasts_a_definitions_timeout(world, computed, shop):
    with _locked(shop), pytest.raises((DefinitionError, SourceError), match=r"locked|ran longer than 0\.2"):
        computed(world.audience("SELECT user_id FROM orders", source="shop", timeout_seconds=0.2), shop)


def test_a_preview_has_its_own_limit_for_waiting_for_a_lock(world, computed, shop, monkeypatch):
    monkeypatch.setattr(reading, "PREVIEW_LOCK_SECONDS", 0.1)
    preview = world.audience("SELECT user_id FROM orders", source="shop", is_preview=True)
    with (
        _locked(shop),
        pytest.raises(
            SourceError, match=r"the source shop cannot be read: .*lock.*\. Another program holds its lock"
        ),
    ):
        computed(preview, shop)
    assert set(computed(preview, shop)[0]) == {"ann", "bob"}


@contextmanager
def _locked(shop):
    """Hold a lock on the orders that keeps others from reading them."""
    other = sa.create_engine(shop.url)
    with other.connect() as connection:
        is_sqlite = dialects.is_sqlite(connection)
        lock = "BEGIN EXCLUSIVE" if is_sqlite else "LOCK TABLE orders IN ACCESS EXCLUSIVE MODE"
        connection.exec_driver_sql(lock)
        yield
        connection.rollback()
    other.dispose()


def test_a_preview_that_takes_too_long_gets_advice_for_previews(world, computed):
    with pytest.raises(DefinitionError) as caught:
        computed(world.audience(ENDLESS, timeout_seconds=0.1, is_preview=True))
    assert str(caught.value) == (
        "vips: its SQL ran longer than 0.1 seconds. Narrow its windows or add an index. A definition in the "
        "configuration can have a longer timeout."
    )


def test_a_source_is_only_read(world, computed, shop, monkeypatch):
    monkeypatch.setattr(compute.statement, "check", lambda *_: [])
    sql = "DELETE FROM orders RETURNING user_id"
    if shop.dialect.name == "postgresql":
        with shop.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION empty_it() RETURNS text LANGUAGE sql AS 'DELETE FROM orders RETURNING user_id'"
            )
        sql = "SELECT empty_it() AS user_id"
    with pytest.raises(DefinitionError, match="read"):
        computed(world.audience(sql, source="shop"), shop)


def test_an_sql_error_on_a_source_is_an_error_of_the_definition(world, computed, shop):
    with pytest.raises(DefinitionError, match=r"vips: its SQL does not work: .*missing(?!.*database)"):
        computed(world.audience("SELECT user_id FROM missing", source="shop"), shop)
    with pytest.raises(DefinitionError, match="must return one column called user_id; it returns total"):
        computed(world.audience("SELECT total FROM orders", source="shop"), shop)
    assert computed(world.audience("SELECT user_id FROM orders", source="shop"), shop)[0].keys() == {
        "ann",
        "bob",
    }


def test_a_source_of_another_kind_gives_rows_that_python_makes_canonical(
    world, computed, tmp_path, monkeypatch
):
    sqlite3.connect(tmp_path / "shop.db").close()
    source = open_source("shop", f"sqlite:///{tmp_path}/shop.db")
    monkeypatch.setattr(source.dialect, "name", "duckdb")
    rows = (
        "(7.0, 1), ('é', 'yes'), (NULL, 0), (zeroblob(1), 0), ('', 0), (' ', 0), (' a', 2), ('b', NULL), "
        "('a' || char(0), 1)"
    )
    sql = f"SELECT column2 AS VALUE, column1 AS User_ID FROM (VALUES {rows}) WHERE :as_of = :as_of AND '%' <> ':x'"
    trait = world.trait(sql, source="shop", value_type="boolean", ready_sql="SELECT 1")
    counts = {"null": 1, "binary": 1, "empty": 2, "nul_character": 1, "not_a_boolean": 1}
    assert computed(trait, source) == ({"7": "true", "é": "true"}, counts)
    with pytest.raises(DefinitionError, match="not ready"):
        computed(world.trait(sql, source="shop", ready_sql="SELECT 0"), source)
    with pytest.raises(DefinitionError, match="one column called value; it returns user_id"):
        computed(world.trait("SELECT 1 AS user_id", source="shop"), source)
    source.dispose()


@pytest.mark.parametrize(
    "address", ["sqlite:///nowhere/shop.db", "postgresql+psycopg://nobody@127.0.0.1:1/shop"]
)
def test_a_source_that_is_down_fails_its_runs_and_no_others(world, address):
    world.people("ann")
    source = open_source("shop", address)
    run = world.sync(world.audience("SELECT user_id FROM orders", source="shop"), source=source)
    source.dispose()
    assert run.status == "failed"
    assert run.error.startswith("vips: the source shop cannot be read: ")
    assert run.error.endswith("Is it running, and is its url in [sources.shop] right?")
    assert world.sync(world.audience(key="others")).status == "succeeded"


def test_a_source_that_dies_while_it_is_read_is_a_source_error(world, computed, postgres, monkeypatch):
    monkeypatch.setattr(compute, "FETCH_ROWS", 10)
    source = open_source("shop", postgres.url(postgres.create()))
    plain_rows = compute.values.plain_rows

    def kill(batch):
        name = source.url.database
        postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        return plain_rows(batch)

    monkeypatch.setattr(compute.values, "plain_rows", kill)
    sql = "SELECT i AS user_id FROM generate_series(1, 100000) i"
    with pytest.raises(SourceError, match="vips: the source shop cannot be read"):
        computed(world.audience(sql, source="shop"), source)
    source.dispose()


def make_failing(shop, name, message, state):
    """Make a function on the source that raises this error."""
    maker = sa.create_engine(shop.url)
    with maker.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE FUNCTION {name}() RETURNS boolean LANGUAGE plpgsql STABLE AS "
            f"$$ BEGIN RAISE '{message}' USING ERRCODE = '{state}'; END $$"
        )
    maker.dispose()


@pytest.mark.parametrize("shop", ["postgresql"], indirect=True)
def test_a_conflict_on_a_source_is_no_error_of_the_definition(world, computed, shop):
    make_failing(shop, "conflict", "conflict with recovery", "40001")
    message = r"the source shop cannot be read: conflict with recovery\. Its server ended the query .*: run it again"
    with pytest.raises(SourceError, match=message):
        computed(world.audience("SELECT user_id FROM orders WHERE conflict()", source="shop"), shop)


@pytest.mark.parametrize("shop", ["postgresql"], indirect=True)
def test_the_error_of_a_missing_privilege_says_what_to_grant(world, computed, shop):
    make_failing(shop, "salaries", "permission denied for table salaries", "42501")
    message = r"permission denied for table salaries\. Grant it to the role in the url: SELECT on a table"
    with pytest.raises(DefinitionError, match=message):
        computed(world.audience("SELECT user_id FROM orders WHERE salaries()", source="shop"), shop)


@pytest.fixture
def silent(postgres, monkeypatch):
    """Give a source, and a function that makes its server stop answering; all time limits are short."""
    for module, name in ((watch, "CANCEL_SECONDS"), (watch, "CLOSE_SECONDS"), (engines, "ANSWER_SECONDS")):
        monkeypatch.setattr(module, name, 0.2)
    monkeypatch.setattr(reading, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(compute, "FETCH_ROWS", 10)
    source = open_source("shop", postgres.url(postgres.create()))
    stopped = []

    def fall_silent():
        with postgres.engine.connect() as connection:
            servers = sa.text("SELECT pid FROM pg_stat_activity WHERE datname = :name")
            for pid in connection.execute(servers, {"name": source.url.database}).scalars():
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)

    yield source, fall_silent
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    source.dispose()


@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_source_that_falls_silent_holds_a_run_no_longer_than_its_timeout(
    world, silent, monkeypatch, is_stopping
):
    source, fall_silent = silent
    stop, plain_rows = Stop(), compute.values.plain_rows

    def convert(batch):
        fall_silent()
        if is_stopping:
            stop.set()
        return plain_rows(batch)

    monkeypatch.setattr(compute.values, "plain_rows", convert)
    sql = "SELECT i AS user_id FROM generate_series(1, 100000) i"
    seconds = 3600 if is_stopping else 0.5
    definition = world.audience(sql, source="shop", timeout_seconds=seconds)
    error = Interrupted if is_stopping else SourceError
    with pytest.raises(error) as raised, snapshot.connection_with_temp_tables(world.engine) as connection:
        compute.compute(connection, definition, AS_OF, source, stop)
    if not is_stopping:
        assert "cannot be read: it did not answer within 0.5 seconds. Is it running" in str(raised.value)


def test_a_connection_that_fell_silent_between_two_runs_is_replaced(world, computed, silent):
    source, fall_silent = silent
    definition = world.audience("SELECT 'ann' AS user_id", source="shop")
    computed(definition, source)
    fall_silent()
    assert computed(definition, source) == ({"ann": None}, {})


def test_a_file_that_is_not_an_sqlite_database_is_a_source_error(world, computed, tmp_path):
    (tmp_path / "shop.db").write_text("not a database at all, but long enough to look at" * 20)
    source = open_source("shop", f"sqlite:///{tmp_path}/shop.db")
    with pytest.raises(SourceError, match="file is not a database"):
        computed(world.audience("SELECT user_id FROM orders", source="shop"), source)
    source.dispose()
