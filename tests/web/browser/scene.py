"""The data that the browser tests show: the demo, failures of all kinds, and hostile text wherever text is shown."""

import contextlib
import datetime as dt
import json
import re
import sqlite3
from functools import partial

import pytest
import sqlalchemy as sa

from audience_sync import intake
from audience_sync.app import open_app
from audience_sync.audiences.runs import RunOptions
from audience_sync.cli import demo
from audience_sync.db import dialects, engines, tables
from audience_sync.errors import DefinitionError
from audience_sync.sandbox import Limits
from tests.faulty_sandbox import FaultySandbox

MARKER = "<img src=x onerror=alert(1)>"
USER_ID = f"{MARKER}\"'&/?#%25 ü"
EVENT = "</td><script>alert(2)</script>"
TRAIT = "<svg onload=alert(3)>"
NAME = "Odd <b>ids</b> {{ 7 * 7 }}"
ERROR = "</title></textarea><iframe src=javascript:alert(4)>"
ERROR_OF_RUN = f"no such table: {MARKER}"
SQL = "SELECT user_id FROM odd -- </pre><script>alert(5)</script>"
DEFINITIONS = f"""
[[audiences]]
name = {json.dumps(NAME)}
key = "odd_ids"
source = "shop"
schedule = "0 3 * * *"
sql = {json.dumps(SQL)}

[[audiences]]
name = "Big Spenders"
source = "shop"
sql = "SELECT user_id FROM spenders"

[[audiences]]
name = "Broken"
source = "shop"
sql = 'SELECT user_id FROM "{MARKER}"'

[[traits]]
name = "Order Count"
source = "shop"
sql = "SELECT user_id, count(*) AS value FROM orders WHERE user_id < '12400' GROUP BY user_id"
"""


def make(folder):
    """Run the demo in a folder, then add what goes wrong, and hostile text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DAYS", 20)  # 63 runs: more than a page has
        patch.setattr(demo, "_load_orders", partial(load_some, demo._load_orders))
        demo.run(folder)
    path = folder / "audience_sync.toml"
    path.write_text(path.read_text() + DEFINITIONS)
    shop = sa.create_engine(f"sqlite:///{folder}/shop.db")
    with shop.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE odd (user_id TEXT)")
        connection.exec_driver_sql("CREATE TABLE spenders (user_id TEXT)")
        connection.exec_driver_sql("INSERT INTO odd VALUES (?)", [(USER_ID,), ("ann",)])
        connection.exec_driver_sql("INSERT INTO spenders SELECT DISTINCT user_id FROM orders LIMIT 200")
    port = int(re.search(r"127\.0\.0\.1:(\d+)", path.read_text())[1])
    with FaultySandbox(port, limits=Limits(identify_per_minute=1_000_000)) as sandbox, open_app(path) as app:
        errors = {"errors": [{"message": ERROR, "status": 400}]}
        sandbox.faults.add({"user_id": USER_ID, "path": "/v1/track", "status": 400, "body": errors})
        for user_id in ("bob", "eve"):
            sandbox.faults.add({"user_id": user_id, "path": "/v1/track", "status": 400, "body": errors})
            intake.track(app, user_id, "Refused")
        now = app.clock.now() - dt.timedelta(minutes=5)
        by_key = {definition.key: definition for definition in app.definitions()}
        for key in ("odd_ids", "big_spenders", "order_count"):
            app.sync(by_key[key], now)
        intake.identify(app, USER_ID, {TRAIT: MARKER, "plan": "pro"})
        intake.track(app, USER_ID, EVENT, {TRAIT: MARKER})
        intake.group(app, "ann", USER_ID, {TRAIT: MARKER})
        call = {"type": "track", "userId": "ann", "event": EVENT, "integrations": {"All": False}}
        intake.submit(app, call)
        app.deliver()
        with shop.begin() as connection:
            connection.exec_driver_sql("DELETE FROM spenders WHERE user_id > '12500'")
        app.sync(by_key["big_spenders"], app.clock.now())  # the guard holds it
        app.sync(by_key["order_count"], app.clock.now(), RunOptions(full=True, hold=True))
        with contextlib.suppress(DefinitionError):
            app.sync(by_key["broken"], app.clock.now())
        with engines.write(app.engine) as connection:  # else the requests of the last minute become fewer
            connection.execute(tables.requests.update().values(started_at=now - dt.timedelta(hours=1)))
    shop.dispose()


def load_some(load_all, path):
    """Load the orders of one customer in three, 12347 among them: each request to the sandbox takes a while."""
    counts = load_all(path)
    with contextlib.closing(sqlite3.connect(path)) as shop, shop:
        shop.execute("DELETE FROM orders WHERE CAST(user_id AS INTEGER) % 3 <> 2")
    return counts


def interesting_ids(engine):
    """Ids of runs and of a request, by what they show."""
    runs, requests = tables.runs.c, tables.requests.c
    queries = {
        "first": sa.select(sa.func.min(runs.run_id)),
        "held": sa.select(sa.func.min(runs.run_id)).where(runs.status == "held"),
        "failed": sa.select(sa.func.max(runs.run_id)).where(runs.status == "failed"),
        "refused": sa.select(sa.func.max(requests.request_id)).where(requests.status_code == 400),
    }
    with engines.read(engine) as connection:
        return {name: connection.execute(query).scalar_one() for name, query in queries.items()}


def copy_rows(source_url, engine):
    """Copy all rows of our tables from a database on SQLite to a migrated one on PostgreSQL."""
    source = sa.create_engine(source_url)
    with source.connect() as reading, engines.write(engine) as connection:
        for table in tables.metadata.sorted_tables:
            rows = [dict(row) for row in reading.execute(sa.select(table)).mappings()]
            if rows:
                connection.execute(table.delete())
                connection.execute(table.insert(), rows)
            column = table.autoincrement_column
            if rows and column is not None:
                name = f"pg_get_serial_sequence('{{our}}{table.name}', '{column.name}')"
                newest = max(row[column.name] for row in rows)
                dialects.sql(connection, f"SELECT setval({name}, {newest}) WHERE {name} IS NOT NULL")
    source.dispose()
