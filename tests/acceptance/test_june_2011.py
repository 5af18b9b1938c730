"""The real orders of the demo, every day of June 2011, beside sets in plain Python over the CSV file."""

import csv
import datetime as dt
import gzip
from collections import defaultdict

import pytest

DAYS = [dt.date(2011, 6, day) for day in range(1, 31)]
AUDIENCES = {
    "Order Completed Last 30days": (
        "SELECT user_id FROM orders WHERE ordered_on <= {day} AND ordered_on > {day} - 30"
    ),
    "High Value Customers": (
        "SELECT user_id FROM orders WHERE ordered_on <= {day} GROUP BY user_id HAVING sum(pence) >= 200000"
    ),
    "At Risk": (
        "SELECT user_id FROM orders WHERE ordered_on <= {day} GROUP BY user_id HAVING max(ordered_on) <= {day} - 90"
    ),
}
KEYS = ("order_completed_last_30days", "high_value_customers", "at_risk")
# Of the run's moment; a day minus a number is a day on both databases where SQLite has days as numbers.
DAY = {"sqlite": "CAST(julianday(date(:as_of)) - 1721424.5 AS integer)", "postgresql": "CAST(:as_of AS date)"}


@pytest.fixture(scope="module")
def orders(request):
    """(user id, day, pence) of each order; credit notes have no order here."""
    path = request.config.rootpath / "audience_sync" / "demo_data" / "orders.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [
            (row["user_id"], dt.date.fromisoformat(row["ordered_on"]), round(float(row["total_gbp"]) * 100))
            for row in csv.DictReader(file)
        ]


def expected(orders, day):
    """The members of each audience at the start of a day."""
    known = [order for order in orders if order[1] <= day]
    newest, spent = defaultdict(lambda: dt.date.min), defaultdict(int)
    for user, ordered_on, pence in known:
        newest[user] = max(newest[user], ordered_on)
        spent[user] += pence
    return {
        KEYS[0]: {user for user, ordered_on, _ in known if (day - ordered_on).days < 30},
        KEYS[1]: {user for user, pence in spent.items() if pence >= 200_000},
        KEYS[2]: {user for user, ordered_on in newest.items() if (day - ordered_on).days >= 90},
    }


def test_every_day_is_as_plain_python_says(orders, start, company, backend, sandbox):
    kind, as_day = ("integer", dt.date.toordinal) if backend == "sqlite" else ("date", lambda day: day)
    company(f"CREATE TABLE orders (user_id text, ordered_on {kind}, pence integer)")
    rows = [{"user": user, "day": as_day(day), "pence": pence} for user, day, pence in orders]
    company("INSERT INTO orders VALUES (:user, :day, :pence)", *rows)
    command = start({name: query.format(day=DAY[backend]) for name, query in AUDIENCES.items()})
    before, ever = {key: set() for key in KEYS}, {key: set() for key in KEYS}
    for day in DAYS:
        done = command.document("sync", "--as-of", f"{day}T00:00:00Z")
        assert (done["delivery"]["pending_count"], done["delivery"]["dead_count"]) == (0, 0)
        now = expected(orders, day)
        runs = {run["key"]: run for run in done["runs"]}
        for key in KEYS:
            counts = [runs[key][f"{name}_count"] for name in ("member", "entered", "exited")]
            assert counts == [len(now[key]), len(now[key] - before[key]), len(before[key] - now[key])], (
                day,
                key,
            )
            ever[key] |= now[key]
        assert told(sandbox) == {
            user: {key: user in now[key] for key in KEYS if user in ever[key]}
            for user in set().union(*ever.values())
        }, day
        before = now
    assert all(len(members) > 300 for members in ever.values())


def told(sandbox):
    return {user: each["properties"] for user, each in sandbox.state.snapshot()["users"].items()}
