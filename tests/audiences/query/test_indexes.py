"""Compiled queries find the events of a window by an index, on both databases: they do not read whole tables."""

import datetime as dt
import re
from dataclasses import replace

import pytest

from audience_sync.audiences.query.catalog import read_catalog
from audience_sync.audiences.query.compiler import compile_query
from audience_sync.audiences.query.configured import ConfiguredQuery, TableMapping
from audience_sync.audiences.query.parser import parse_condition
from audience_sync.db import dialects, engines
from tests.plans import recorded_plans

NOW = dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC)
PLAIN = {"no_parameters": True}
BY_NAME, BY_USER = "ix_events_name_timestamp", "ix_events_user_id_timestamp"
# 10,000 users, 2,000 of them with 30,000 events in 400 days: 75 a day, a third of them orders.
FILL = {
    "sqlite": """
INSERT INTO profiles (user_id, traits, trait_times, first_seen_at, last_seen_at)
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)
SELECT 'u' || i, '{"country": "' || substr('DEFR', 1 + 2 * (i % 2), 2) || '"}', '{}', '2026-01-01', '2026-01-01' FROM n;
INSERT INTO events (call_id, user_id, name, properties, context, timestamp, received_at)
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)
SELECT i, 'u' || (1 + i * 7919 % 2000), substr('OrderCart Page ', 1 + 5 * (i % 3), 5), '{"total": 5}', '{}',
strftime('%Y-%m-%d %H:%M:%S', '2026-11-27 12:00:00', '-' || (i * 1152) || ' seconds') || '.000000', '2026-11-27' FROM n;
CREATE TABLE shop (customer text, kind text, happened_at timestamp, total integer);
INSERT INTO shop SELECT user_id, name, timestamp, 5 FROM events;
CREATE INDEX ix_shop ON shop (kind, happened_at);
CREATE INDEX ix_shop_customer ON shop (customer, happened_at);
ANALYZE""",
    "postgresql": """
INSERT INTO audience_sync.profiles (user_id, traits, trait_times, first_seen_at, last_seen_at)
SELECT 'u' || i, jsonb_build_object('country', substr('DEFR', 1 + 2 * (i % 2), 2)), '{}', '2026-01-01', '2026-01-01'
FROM generate_series(1, 10000) i;
INSERT INTO audience_sync.events (call_id, user_id, name, properties, context, timestamp, received_at)
SELECT i, 'u' || (1 + i * 7919 % 2000), substr('OrderCart Page ', 1 + 5 * (i % 3), 5), '{"total": 5}', '{}',
timestamptz '2026-11-27 12:00:00+00' - i * 1152 * interval '1 second', '2026-11-27' FROM generate_series(1, 30000) i;
CREATE TABLE public.shop (customer text, kind text, happened_at timestamptz, total integer);
INSERT INTO public.shop SELECT user_id, name, timestamp, 5 FROM audience_sync.events;
CREATE INDEX ix_shop ON public.shop (kind, happened_at);
CREATE INDEX ix_shop_customer ON public.shop (customer, happened_at);
ANALYZE""",
}


@pytest.fixture
def filled(engine):
    with engines.write(engine) as connection:
        for statement in FILL[engine.dialect.name].split(";\n"):
            connection.exec_driver_sql(statement, execution_options=PLAIN)
    return engine


INDEX = re.compile(r"(?:using|Bitmap Index Scan on|INDEX) (\w+)")
WHOLE = {"sqlite": re.compile(r"^SCAN (\w+)"), "postgresql": re.compile(r"Seq Scan on (\w+)")}


def plan(engine, text, *mappings):
    """Return the indexes that a query's plan uses, and the tables that it reads whole."""
    compiled, lines = plan_lines(engine, text, *mappings)
    names = {alias: table for table, alias in re.findall(r"(?:FROM|JOIN) (\w+) AS (\w+)", compiled)}
    indexes = {found[1] for line in lines if (found := INDEX.search(line))}
    whole = {found[1] for line in lines if (found := WHOLE[engine.dialect.name].search(line))}
    return indexes, {names.get(table, table) for table in whole} & {"events", "profiles", "shop"}


def plan_lines(engine, text, *mappings):
    query = ConfiguredQuery(text, parse_condition(text), mappings)
    with engines.read(engine) as connection:
        catalog = read_catalog(connection, query, is_own=True)
        compiled = compile_query(query.query, catalog, NOW, is_trait=False).sql
        with recorded_plans(engine) as recorded:
            connection.exec_driver_sql(compiled, execution_options=PLAIN)
    ((_, lines),) = recorded
    return compiled, lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("event('Order').within(3 days).count() >= 1", {BY_NAME}),
        ("event('Order').between(3 days, 5 days).count() > 2", {BY_NAME}),
        ("event('Order').where(property('total') > 4).within(3 days).sum(property('total')) > 5", {BY_NAME}),
        (
            "event('Order').within(3 days).count() >= 1 AND event('Page ').within(2 days).count() = 0",
            {BY_NAME},
        ),
        ("event('Order').within(1 day).last(property('total')) = 5", {BY_NAME}),
        (
            "event('Cart ').where(NOT event('Order').within(parent: 1 day).count() >= 1).within(1 day).count() >= 1",
            {BY_NAME, BY_USER},
        ),
        (
            "event('Cart ').where(event('Order').between(parent: 1 hour, 2 days).count() = 2).within(1 day).count() > 0",
            {BY_NAME, BY_USER},
        ),
    ],
)
def test_a_window_reads_its_events_by_index(filled, text, expected):
    indexes, whole = plan(filled, text)
    assert indexes == expected
    assert whole == set()


def test_profiles_of_a_windows_users_are_read_by_key(filled):
    text = "trait('country') = 'DE' AND event('Order').within(1 day).count() >= 1"
    indexes, whole = plan(filled, text)
    assert BY_NAME in indexes
    assert whole == set()


def test_a_query_of_all_users_reads_profiles_but_not_all_events(filled):
    indexes, whole = plan(filled, "NOT event('Order').within(3 days).count() >= 1 OR trait('country') = 'DE'")
    assert BY_NAME in indexes
    assert whole == {"profiles"}


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # PostgreSQL may prefer to hash
@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("event('Order').within(3 days).count() >= 2", BY_NAME),
        ("NOT event('Order').count() >= 1", BY_USER),
    ],
)
def test_a_count_reads_no_events_but_only_their_index(filled, text, index):
    _, lines = plan_lines(filled, text)
    events = [line for line in lines if "ix_events" in line]
    assert events
    assert all(f"USING COVERING INDEX {index} " in line for line in events), lines


@pytest.mark.parametrize(
    ("mapping", "index"),
    [
        (TableMapping("shop", "{schema}shop", user_id="customer", timestamp="happened_at"), "ix_shop_day"),
        (
            TableMapping(
                "shop",
                sql="SELECT * FROM {schema}shop WHERE kind = 'Order'",
                user_id="customer",
                timestamp="happened_at",
            ),
            "ix_shop",
        ),
    ],
)
def test_a_window_reads_the_rows_of_a_mapped_table_by_index(filled, mapping, index):
    schema = "" if dialects.is_sqlite(filled) else "public."
    with engines.write(filled) as connection:
        if index == "ix_shop_day":
            connection.exec_driver_sql(f"CREATE INDEX ix_shop_day ON {schema}shop (happened_at)")
    mapping = replace(
        mapping,
        table=mapping.table and mapping.table.format(schema=schema),
        sql=mapping.sql and mapping.sql.format(schema=schema),
    )
    indexes, whole = plan(filled, "entity('shop').within(3 days).count() >= 1", mapping)
    assert indexes == {index}
    assert whole == set()


def test_rows_of_a_mapped_parent_are_read_by_index(filled):
    schema = "" if dialects.is_sqlite(filled) else "public."
    shop = TableMapping("shop", f"{schema}shop", user_id="customer", timestamp="happened_at")
    text = "event('Cart ').where(entity('shop').within(parent: 1 day).count() = 0).within(1 day).count() >= 1"
    indexes, whole = plan(filled, text, shop)
    assert indexes == {BY_NAME, "ix_shop_customer"}
    assert whole == set()
