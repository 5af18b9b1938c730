"""The demo's audiences mean the same in the query language and in SQL, on its year of real orders.

QUERY_DAYS=1 compares every day of the year in place of every thirtieth.
"""

import csv
import datetime as dt
import gzip
import os
import tomllib

import pytest

from audience_sync.audiences.query.catalog import read_catalog
from audience_sync.audiences.query.compiler import compile_query
from audience_sync.audiences.query.configured import ConfiguredQuery, TableMapping
from audience_sync.audiences.query.parser import parse_condition
from audience_sync.cli.demo import CONFIGURATION
from audience_sync.db import dialects, engines

AUDIENCES = {
    "Order Completed Last 30days": (
        "event('Order Completed').within(30 days).count() >= 1",
        (
            "SELECT DISTINCT user_id FROM orders "
            "WHERE ordered_on > date(:as_of, '-30 days') AND ordered_on <= date(:as_of)"
        ),
    ),
    "High Value Customers": (
        "event('Order Completed').sum(property('total_gbp')) >= 2000",
        (
            "SELECT user_id FROM orders WHERE ordered_on <= date(:as_of) "
            "GROUP BY user_id HAVING sum(total_gbp) >= 2000"
        ),
    ),
    "At Risk": (
        "event('Order Completed').count() >= 1 AND NOT event('Order Completed').within(90 days).count() >= 1",
        (
            "SELECT user_id FROM orders WHERE ordered_on <= date(:as_of) "
            "GROUP BY user_id HAVING max(ordered_on) <= date(:as_of, '-90 days')"
        ),
    ),
}
FIRST = dt.datetime(2010, 12, 1, tzinfo=dt.UTC)
STEP = int(os.environ.get("QUERY_DAYS", "30"))


def test_these_are_the_demos_audiences():
    configured = tomllib.loads(CONFIGURATION.format(url="", per_minute=1))["audiences"]
    assert {each["name"]: parse_condition(each["query"]) for each in configured} == {
        name: parse_condition(query) for name, (query, _) in AUDIENCES.items()
    }


@pytest.fixture
def orders(engine, request):
    """The schema's prefix of a table of the real orders."""
    schema, day = ("", "text") if dialects.is_sqlite(engine) else ("public.", "date")
    path = request.config.rootpath / "audience_sync" / "demo_data" / "orders.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [(row["user_id"], row["ordered_on"], float(row["total_gbp"])) for row in csv.DictReader(file)]
    with engines.write(engine) as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE {schema}orders (user_id text, ordered_on {day}, total_gbp numeric(12, 2))"
        )
        mark = "?" if dialects.is_sqlite(engine) else "%s"
        connection.exec_driver_sql(f"INSERT INTO {schema}orders VALUES ({mark}, {mark}, {mark})", rows)
        connection.exec_driver_sql(f"CREATE INDEX ix_orders ON {schema}orders (ordered_on)")
    return schema


def by_hand(schema, sql, day):
    """Return the SQL of an audience for a day, on either database."""
    text = sql.replace("FROM orders", f"FROM {schema}orders")
    for days in (30, 90):
        text = text.replace(f"date(:as_of, '-{days} days')", f"'{day - dt.timedelta(days=days):%Y-%m-%d}'")
    return text.replace("date(:as_of)", f"'{day:%Y-%m-%d}'")


@pytest.mark.parametrize("name", AUDIENCES)
def test_the_query_has_the_same_members_as_the_sql_on_every_day(engine, orders, name):
    text, sql = AUDIENCES[name]
    mapping = TableMapping(
        "orders", f"{orders}orders", user_id="user_id", timestamp="ordered_on", event="Order Completed"
    )
    query = ConfiguredQuery(text, parse_condition(text), (mapping,))
    members = 0
    with engines.read(engine) as connection:
        catalog = read_catalog(connection, query, is_own=True)
        for number in range(0, 400, STEP):
            day = FIRST + dt.timedelta(days=number)
            compiled = compile_query(query.query, catalog, day, is_trait=False)
            computed, expected = (
                {user for (user,) in connection.exec_driver_sql(each)}
                for each in (compiled.sql, by_hand(orders, sql, day))
            )
            assert computed == expected, day
            members += len(expected)
    assert members > 1_000
