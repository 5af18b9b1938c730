"""No list is too long for a statement: SQLite takes 32,766 parameters at most, PostgreSQL 65,535."""

import datetime as dt

import pytest
import sqlalchemy as sa

from audience_sync import history
from audience_sync.db import dialects, engines, tables

MANY = {"sqlite": 33_000, "postgresql": 66_000}
NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
RUN = {
    "definition_id": 1,
    "mode": "changes",
    "trigger": "schedule",
    "status": "succeeded",
    "as_of": NOON,
    "started_at": NOON,
    "finished_at": NOON,
    "member_count": 0,
}


@pytest.fixture(params=["many"])
def count(request, backend):
    """A number of runs: by default, more than a statement takes parameters."""
    return MANY[backend] if request.param == "many" else request.param


@pytest.fixture
def runs(engine, count):
    """A database with this many runs."""
    definition = {"definition_id": 1, "key": "vips", "name": "VIPs", "kind": "audience", "created_at": NOON}
    with engines.write(engine) as connection:
        connection.execute(tables.definitions.insert(), definition)
        connection.execute(tables.runs.insert(), RUN)
        names = ", ".join(f'"{name}"' for name in RUN)
        numbers = "WITH RECURSIVE n(i) AS (SELECT 2 WHERE :i >= 2 UNION ALL SELECT i + 1 FROM n WHERE i < :i)"
        more = f"INSERT INTO {{our}}runs ({names}) {numbers} SELECT {names} FROM {{our}}runs CROSS JOIN n"
        dialects.sql(connection, more, i=count)
    return engine


def test_a_history_of_any_length_is_read(runs, count):
    with engines.read(runs) as connection:
        rows = history.run_rows(connection)
        assert [row["run_id"] for row in rows] == list(range(count, 0, -1))
        assert len(history.run_rows(connection, ids=[row["run_id"] for row in rows])) == count
        assert history.run_rows(connection, ids=[]) == []


@pytest.mark.parametrize("count", [1, 500, 501, "many"], indirect=True)
def test_a_list_of_any_length_is_a_parameter(runs, count):
    ids, keys = list(range(1, count + 1)), [f"key {number}" for number in range(1, count)] + ["vips"]
    with engines.read(runs) as connection:
        query = "SELECT count(*) FROM {our}runs WHERE run_id IN :ids AND run_id NOT IN :others"
        assert dialects.sql(connection, query, ids=ids, others=ids[1:] or [0]).scalar_one() == 1
        assert (
            dialects.sql(
                connection, "SELECT count(*) FROM {our}definitions WHERE key IN :keys", keys=keys
            ).scalar_one()
            == 1
        )
        for column, values, expected in (
            (tables.runs.c.run_id, ids, count),
            (tables.definitions.c.key, keys, 1),
        ):
            is_among = dialects.is_among(connection, column, values)
            query = sa.select(sa.func.count()).select_from(column.table).where(is_among)
            assert connection.execute(query).scalar_one() == expected
