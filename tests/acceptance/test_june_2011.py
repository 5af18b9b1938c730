"""The demo's audiences on its real orders for every day of June 2011, compared with sets in plain Python."""

import csv
import datetime as dt
import gzip
import re
from collections import defaultdict

import pytest

from tests.audiences.query.test_real_orders import AUDIENCES

DAYS = [dt.date(2011, 6, day) for day in range(1, 31)]
RECENT, HIGH, AT_RISK = KEYS = ("order_completed_last_30days", "high_value_customers", "at_risk")
COLUMNS = {"sqlite": "ordered_on text, total_gbp real", "postgresql": "ordered_on date, total_gbp numeric"}


@pytest.fixture(scope="module")
def orders(request):
    """(user id, day, pence) of each order, without credit notes."""
    path = request.config.rootpath / "audience_sync" / "demo_data" / "orders.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [
            (row["user_id"], dt.date.fromisoformat(row["ordered_on"]), round(float(row["total_gbp"]) * 100))
            for row in csv.DictReader(file)
        ]


@pytest.fixture
def audiences(backend):
    """The demo's audiences in SQL; on PostgreSQL with its expressions for days."""
    queries = {name: sql for name, (_, sql) in AUDIENCES.items()}
    if backend == "sqlite":
        return queries
    day = r"date\(:as_of(?:, '-(\d+) days')?\)"
    return {
        name: re.sub(day, lambda match: f"(CAST(:as_of AS date) - {match[1] or 0})", query)
        for name, query in queries.items()
    }


def expected(orders, day):
    """Members of each audience at the start of a day."""
    known = [order for order in orders if order[1] <= day]
    newest, spent = defaultdict(lambda: dt.date.min), defaultdict(int)
    for user, ordered_on, pence in known:
        newest[user] = max(newest[user], ordered_on)
        spent[user] += pence
    return {
        RECENT: {user for user, ordered_on, _ in known if (day - ordered_on).days < 30},
        HIGH: {user for user, pence in spent.items() if pence >= 200_000},
        AT_RISK: {user for user, ordered_on in newest.items() if (day - ordered_on).days >= 90},
    }


def test_every_day_equals_the_result_of_plain_python(orders, audiences, start, company, backend, sandbox):
    company(f"CREATE TABLE orders (user_id text, {COLUMNS[backend]})")
    rows = [{"user": user, "day": str(day), "gbp": pence / 100} for user, day, pence in orders]
    day_of = "CAST(:day AS date)" if backend == "postgresql" else ":day"
    company(f"INSERT INTO orders VALUES (:user, {day_of}, :gbp)", *rows)
    command = start(audiences)
    before, ever = {key: set() for key in KEYS}, {key: set() for key in KEYS}
    for day in DAYS:
        done = command.document("sync", "--as-of", f"{day}T00:00:00Z")
        assert (done["delivery"]["pending_count"], done["delivery"]["dead_count"]) == (0, 0)
        now = expected(orders, day)
        counted = {
            run["key"]: (run["member_count"], run["entered_count"], run["exited_count"])
            for run in done["runs"]
        }
        assert counted == {
            key: (len(now[key]), len(now[key] - before[key]), len(before[key] - now[key])) for key in KEYS
        }, day
        ever = {key: ever[key] | now[key] for key in KEYS}
        assert audience(sandbox) == {
            user: {key: user in now[key] for key in KEYS if user in ever[key]}
            for user in set().union(*ever.values())
        }, day
        before = now
    assert all(len(members) > 300 for members in ever.values())


def audience(sandbox):
    return {user: each["properties"] for user, each in sandbox.state.snapshot()["users"].items()}
