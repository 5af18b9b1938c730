"""Queries over a company's own tables: columns of every kind, nested entities, profiles, views and queries as tables."""

import datetime as dt

import pytest
import sqlalchemy as sa

from audience_sync.audiences.query.catalog import read_catalog
from audience_sync.audiences.query.compiler import compile_query
from audience_sync.audiences.query.configured import ConfiguredQuery, QueryDefinition, TableMapping
from audience_sync.audiences.query.parser import parse_query
from audience_sync.db import dialects, engines
from audience_sync.errors import DefinitionError

NOW = dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC)
TABLES = """
CREATE TABLE {schema}customers (id integer, country text, joined date,
  seen timestamp, is_vip boolean, rank numeric(6,2), extra {json});
CREATE TABLE {schema}orders (order_id integer, customer_id integer, created_at timestamp, total real,
  state text, "a b" text);
CREATE TABLE {schema}lines (order_id integer, sku text, quantity integer);
CREATE TABLE {schema}logins (who text, day date);
CREATE VIEW {schema}paid AS SELECT * FROM {schema}orders WHERE state = 'paid';
INSERT INTO {schema}customers VALUES
  (1, 'DE', '2026-11-20', '2026-11-27 11:00:00', {true}, 1.50, '{{"plan": "pro", "seats": [1, 2]}}'),
  (2, 'FR', NULL, NULL, {false}, NULL, NULL),
  (3, 'DE', '2020-01-01', '2026-11-27 10:00:00.25', NULL, 2, '{{"plan": null}}');
INSERT INTO {schema}orders VALUES
  (10, 1, '2026-11-27 12:00:00', 100, 'paid', 'x'), (11, 1, '2026-11-27 12:00:01', 7, 'paid', 'x'),
  (12, 2, '2026-11-20 12:00:00', 50, 'open', 'y'), (13, 2, '2026-11-20 12:00:01', 25.5, 'paid', NULL),
  (14, NULL, '2026-11-25 00:00:00', 1000, 'paid', 'z');
INSERT INTO {schema}lines VALUES (10, 'a', 1), (10, 'b', 3), (12, 'a', 2), (13, NULL, NULL);
INSERT INTO {schema}logins VALUES ('1', '2026-11-27'), ('3', '2026-11-20'), ('4', '2026-11-21');
"""
MAPPINGS = (
    TableMapping("customers", "{schema}customers", user_id="id", profile=True),
    TableMapping(
        "orders",
        "{schema}orders",
        user_id="customer_id",
        timestamp="created_at",
        event="Order",
        id="order_id",
    ),
    TableMapping("lines", "{schema}lines", parent="orders", parent_id="order_id"),
    TableMapping("paid", "{schema}paid", user_id="customer_id"),
    TableMapping(
        "big", sql="SELECT * FROM {schema}orders WHERE total >= 50;", user_id="customer_id", id="order_id"
    ),
    TableMapping("logins", "{schema}logins", user_id="who", timestamp="day", event="Login"),
)
AUDIENCES = {
    "event('Order').count() >= 1": "1 2",
    "event('Order').within(7 days).count() >= 1": "1 2",
    "event('Order').within(7 days).count() = 1": "1 2",
    "event('Order').count() = 2": "2",
    "event('Order').where(property('total') > 60).count() = 1": "1",
    "event('Order').where(property('a b') = 'x').count() = 1": "1",
    "event('Order').where(property('a b').absent()).count() = 1": "2",
    "event('Order').where(property('nothing').exists()).count() = 1": "",
    "event('Order').sum(property('total')) = 75.5": "2",
    "entity('paid').count() = 1": "2",
    "entity('paid').count() = 2": "1",
    "entity('big').count() = 1": "1 2",
    "entity('big').where(entity('lines').count() > 0).count() > 0": "1 2",
    "entity('orders').where(entity('lines').count() = 2).count() = 1": "1",
    "entity('orders').where(entity('lines').where(property('quantity') > 1).count() > 0).count() > 0": "1 2",
    "entity('orders').where(entity('lines').sum(property('quantity')) = 4).count() = 1": "1",
    "entity('lines').count() = 2": "1 2",
    "event('Login').within(7 days).count() = 1": "1 4",
    "event('Login').within(8 days).count() = 1": "1 3 4",
    "event('Login').where(event('Order').within(parent: 13 hours).count() > 0).count() > 0": "1",
    "event('Login').last(property('day')) = '2026-11-21'": "4",
    "NOT (event('Order').count() > 0)": "3",
    "NOT (event('Login').count() > 0 OR event('Order').count() > 0)": "",
    "trait('country') = 'DE'": "1 3",
    "trait('is_vip') = true": "1",
    "trait('is_vip') = 'false'": "2",
    "trait('is_vip').absent()": "3",
    "trait('rank') = 1.5": "1",
    "trait('rank') > 1": "1 3",
    "trait('joined').within_last(7 days)": "1",
    "trait('joined').within_last(6 days)": "",
    "trait('joined') = '2026-11-20'": "1",
    "trait('joined') < '2021'": "3",
    "trait('seen').within_last(1 hours)": "1",
    "trait('seen') = '2026-11-27T11:00:00Z'": "1",
    "trait('seen') = '2026-11-27T10:00:00.25Z'": "3",
    "trait('extra.plan') = 'pro'": "1",
    "trait('extra.plan').absent()": "2 3",
    "trait('extra.seats.$') = 2": "1",
    "trait('extra.seats.1') = 2": "1",
    "trait('country.x').absent()": "1 2 3",
    "trait('buyers') = true AND trait('country') = 'FR'": "2",
    "trait('spent') > 80": "1",
}  # fmt: skip


@pytest.fixture
def shop(engine):
    """Our own database with the company's tables in it; the schema's prefix."""
    is_sqlite = dialects.is_sqlite(engine)
    names = {
        "schema": "" if is_sqlite else "public.",
        "json": "json" if is_sqlite else "jsonb",
        "true": "1" if is_sqlite else "true",
        "false": "0" if is_sqlite else "false",
    }
    with engines.write(engine) as connection:
        for statement in filter(str.strip, TABLES.format(**names).split(";")):
            connection.exec_driver_sql(statement)
    return names["schema"]


def configured(text, schema, mappings=MAPPINGS, **definitions):
    def filled(value):
        return value.format(schema=schema) if isinstance(value, str) else value

    tables = tuple(
        TableMapping(**{name: filled(getattr(mapping, name)) for name in TableMapping.__dataclass_fields__})
        for mapping in mappings
    )
    return ConfiguredQuery(text, parse_query(text), tables, definitions)


def users_of(connection, query):
    catalog = read_catalog(connection, query, is_own=True)
    compiled = compile_query(query.query, catalog, NOW, is_trait=False)
    rows = connection.exec_driver_sql(compiled.sql, execution_options={"no_parameters": True})
    return {user for (user,) in rows}


def test_every_audience_has_the_users_counted_by_hand(engine, shop):
    definitions = {
        "buyers": QueryDefinition(
            False,
            sql=f"SELECT DISTINCT customer_id AS user_id FROM {shop}orders WHERE customer_id IS NOT NULL",
        ),
        "spent": QueryDefinition(
            True,
            sql=f"SELECT customer_id AS user_id, sum(total) AS value FROM {shop}orders GROUP BY customer_id",
        ),
    }
    if not dialects.is_sqlite(engine):  # there a query has no declared types
        definitions["spent"] = QueryDefinition(
            True, sql=definitions["spent"].sql.replace("sum(total)", "CAST(sum(total) AS float8)")
        )
    with engines.read(engine) as connection:
        for text, users in AUDIENCES.items():
            assert users_of(connection, configured(text, shop, **definitions)) == set(users.split()), text


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (TableMapping("orders", "{schema}order", user_id="customer_id"), r"\[tables.orders\] cannot be read"),
        (
            TableMapping("orders", "{schema}orders", user_id="customer"),
            r"\[tables.orders\] user_id: it has no column customer: did you mean customer_id\?",
        ),
        (
            TableMapping("orders", "{schema}orders", user_id="customer_id", timestamp="created"),
            r"timestamp: it has no column created: did you mean created_at\?",
        ),
    ],
)
def test_a_mapping_that_does_not_match_its_table_is_an_error(engine, shop, mapping, message):
    with engines.read(engine) as connection, pytest.raises(DefinitionError, match=message):
        users_of(connection, configured("entity('orders').count() > 0", shop, [mapping]))


def test_hostile_names_are_quoted(engine, shop):
    name = 'a"b; DROP TABLE x --'
    quoted = name.replace('"', '""')
    with engines.write(engine) as connection:
        connection.exec_driver_sql(f'CREATE TABLE {shop}"{quoted}" ("{quoted}" text, "x:y" integer)')
        connection.execute(sa.text(f"INSERT INTO {shop}\"{quoted}\" VALUES ('it''s', 1)".replace(":", "\\:")))
    mapping = TableMapping("odd", f"{shop}{name}", user_id=name)
    text = "entity('odd').where(property('x:y') = 1 AND property('x:y') != ';--').count() > 0"
    with engines.read(engine) as connection:
        assert users_of(connection, configured(text, "", [mapping])) == {"it's"}
