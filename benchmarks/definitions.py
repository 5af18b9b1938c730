"""The time of queries, compared with SQL that an expert would write by hand.

    python benchmarks/definitions.py [--users 100000] [--events-per-user 20] [--database both]

Ten definitions over our own profiles and events, from a plain count to a funnel. Both ways must find the same users.
Each is run three times in turn, and the fastest counts. Both are wrapped in `count(*)`, so no rows are transferred.
The default takes some minutes; a million users take about an hour and 20 GB of disk in the temporary folder.
"""

import argparse
import datetime as dt
import platform
import statistics
import sys
import tempfile
import time

import sqlalchemy as sa
from delivery import databases
from rich.console import Console
from rich.table import Table

from audience_sync.audiences.query.catalog import own_catalog
from audience_sync.audiences.query.compiler import compile_query
from audience_sync.audiences.query.parser import parse_condition
from audience_sync.db import dialects, engines, migrate

NOW = dt.datetime(2026, 11, 27, 12, tzinfo=dt.UTC)
DAYS = 365
RUNS = 3
MEDIAN, MOST = 1.5, 3.0
PLAIN = {"no_parameters": True}  # a percent sign is not a parameter
# name: (query, SQL for SQLite, SQL for PostgreSQL); {days N} is the moment N days ago.
DEFINITIONS = {
    "bought in 30 days": (
        "event('Order Completed').within(30 days).count() >= 1",
        "SELECT DISTINCT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {30} AND timestamp <= {0}",
        "",
    ),
    "bought often in 90 days": (
        "event('Order Completed').within(90 days).count() >= 3",
        (
            "SELECT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {90} AND timestamp <= {0} "
            "GROUP BY user_id HAVING count(*) >= 3"
        ),
        "",
    ),
    "spent 500 in 90 days": (
        "event('Order Completed').within(90 days).sum(property('total')) >= 500",
        (
            "SELECT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {90} AND timestamp <= {0} "
            "GROUP BY user_id HAVING sum(json_extract(properties, '$.total')) >= 500"
        ),
        (
            "SELECT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {90} AND timestamp <= {0} "
            "GROUP BY user_id HAVING sum((properties ->> 'total')::numeric) >= 500"
        ),
    ),
    "one large order in 30 days": (
        "event('Order Completed').where(property('total') >= 190).within(30 days).count() >= 1",
        (
            "SELECT DISTINCT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {30} "
            "AND timestamp <= {0} AND json_extract(properties, '$.total') >= 190"
        ),
        (
            "SELECT DISTINCT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {30} "
            "AND timestamp <= {0} AND (properties ->> 'total')::numeric >= 190"
        ),
    ),
    "a trait": (
        "trait('country') = 'DE'",
        "SELECT user_id FROM profiles WHERE json_extract(traits, '$.country') = 'DE'",
        "SELECT user_id FROM profiles WHERE traits ->> 'country' = 'DE'",
    ),
    "a trait and an event": (
        "trait('country') = 'DE' AND event('Order Completed').within(30 days).count() >= 1",
        (
            "SELECT user_id FROM profiles p WHERE json_extract(traits, '$.country') = 'DE' AND user_id IN "
            "(SELECT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {30} AND timestamp <= {0})"
        ),
        (
            "SELECT user_id FROM profiles p WHERE traits ->> 'country' = 'DE' AND user_id IN "
            "(SELECT user_id FROM events WHERE name = 'Order Completed' AND timestamp > {30} AND timestamp <= {0})"
        ),
    ),
    "never bought": (
        "NOT event('Order Completed').count() >= 1",
        (
            "SELECT user_id FROM profiles p WHERE NOT EXISTS (SELECT 1 FROM events e WHERE e.user_id = p.user_id "
            "AND e.name = 'Order Completed' AND e.timestamp <= {0})"
        ),
        "",
    ),
    "at risk": (
        "event('Order Completed').count() >= 1 AND NOT event('Order Completed').within(90 days).count() >= 1",
        (
            "SELECT user_id FROM events WHERE name = 'Order Completed' AND timestamp <= {0} "
            "GROUP BY user_id HAVING max(timestamp) <= {90}"
        ),
        "",
    ),
    "abandoned cart": (
        (
            "event('Added to Cart').where(NOT event('Order Completed').within(parent: 1 day).count() >= 1)"
            ".within(7 days).count() >= 1"
        ),
        (
            "SELECT DISTINCT user_id FROM events c WHERE name = 'Added to Cart' AND timestamp > {7} AND timestamp <= {0} "
            "AND NOT EXISTS (SELECT 1 FROM events o WHERE o.user_id = c.user_id AND o.name = 'Order Completed' "
            "AND o.timestamp > c.timestamp AND o.timestamp <= datetime(c.timestamp, '+1 day') || substr(c.timestamp, 20) "
            "AND o.timestamp <= {0})"
        ),
        (
            "SELECT DISTINCT user_id FROM events c WHERE name = 'Added to Cart' AND timestamp > {7} AND timestamp <= {0} "
            "AND NOT EXISTS (SELECT 1 FROM events o WHERE o.user_id = c.user_id AND o.name = 'Order Completed' "
            "AND o.timestamp > c.timestamp AND o.timestamp <= c.timestamp + interval '1 day' AND o.timestamp <= {0})"
        ),
    ),
    "a funnel": (
        (
            "event('Page Viewed').where(event('Added to Cart').where(event('Order Completed').within(parent: 1 day)"
            ".count() >= 1).within(parent: 1 day).count() >= 1).within(7 days).count() >= 1"
        ),
        (
            "SELECT DISTINCT p.user_id FROM events p JOIN events c ON c.user_id = p.user_id AND c.name = 'Added to Cart' "
            "AND c.timestamp > p.timestamp "
            "AND c.timestamp <= datetime(p.timestamp, '+1 day') || substr(p.timestamp, 20) AND c.timestamp <= {0} "
            "JOIN events o ON o.user_id = c.user_id AND o.name = 'Order Completed' AND o.timestamp > c.timestamp "
            "AND o.timestamp <= datetime(c.timestamp, '+1 day') || substr(c.timestamp, 20) AND o.timestamp <= {0} "
            "WHERE p.name = 'Page Viewed' AND p.timestamp > {7} AND p.timestamp <= {0}"
        ),
        (
            "SELECT DISTINCT p.user_id FROM events p JOIN events c ON c.user_id = p.user_id AND c.name = 'Added to Cart' "
            "AND c.timestamp > p.timestamp AND c.timestamp <= p.timestamp + interval '1 day' AND c.timestamp <= {0} "
            "JOIN events o ON o.user_id = c.user_id AND o.name = 'Order Completed' AND o.timestamp > c.timestamp "
            "AND o.timestamp <= c.timestamp + interval '1 day' AND o.timestamp <= {0} "
            "WHERE p.name = 'Page Viewed' AND p.timestamp > {7} AND p.timestamp <= {0}"
        ),
    ),
}
PROFILES = {
    "sqlite": """INSERT INTO profiles (user_id, traits, trait_times, first_seen_at, last_seen_at)
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {users})
SELECT 'user-' || i, '{{"country": "' || substr('DEFRGBUSNL', 1 + 2 * (i % 5), 2) || '", "plan": "pro"}}', '{{}}',
'2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000' FROM n""",
    "postgresql": """INSERT INTO audience_sync.profiles (user_id, traits, trait_times, first_seen_at, last_seen_at)
SELECT 'user-' || i, jsonb_build_object('country', substr('DEFRGBUSNL', 1 + 2 * (i % 5), 2), 'plan', 'pro'), '{{}}',
'2026-01-01', '2026-01-01' FROM generate_series(1, {users}) i""",
}
EVENTS = {
    "sqlite": """INSERT INTO events (call_id, user_id, name, properties, context, timestamp, received_at)
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {events})
SELECT i, 'user-' || (1 + (i * 7919 + i / 13) % {users}),
CASE i % 4 WHEN 0 THEN 'Order Completed' WHEN 1 THEN 'Added to Cart' ELSE 'Page Viewed' END,
'{{"total": ' || (i * 31 % 200) || ', "sku": "sku-' || (i % 100) || '"}}', '{{}}',
strftime('%Y-%m-%d %H:%M:%S', '2026-11-27 12:00:00',
'-' || ((i * 104729 + (i % 1000003) * (i % 1000003) * 31) % {seconds}) || ' seconds') || '.000000',
'2026-11-27 12:00:00.000000' FROM n""",
    "postgresql": """INSERT INTO audience_sync.events (call_id, user_id, name, properties, context, timestamp, received_at)
SELECT i, 'user-' || (1 + (i * 7919 + i / 13) % {users}),
CASE i % 4 WHEN 0 THEN 'Order Completed' WHEN 1 THEN 'Added to Cart' ELSE 'Page Viewed' END,
jsonb_build_object('total', i * 31 % 200, 'sku', 'sku-' || (i % 100)), '{{}}',
timestamptz '2026-11-27 12:00:00+00' - ((i * 104729 + (i % 1000003) * (i % 1000003) * 31) % {seconds})
* interval '1 second', '2026-11-27 12:00:00+00'
FROM generate_series(1::bigint, {events}) i""",
}


def fill(engine, users, events):
    with engines.write(engine) as connection:
        values = {"users": users, "events": events, "seconds": DAYS * 86_400}
        for statements in (PROFILES, EVENTS):
            connection.exec_driver_sql(
                statements[engine.dialect.name].format(**values), execution_options=PLAIN
            )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in ("events", "profiles"):
            our = connection.get_execution_options()["our"]
            connection.exec_driver_sql(f"ANALYZE {our}{table}")


def by_hand(engine, for_sqlite, for_postgresql):
    text, our = for_sqlite, ""
    if not dialects.is_sqlite(engine):
        text, our = for_postgresql or for_sqlite, "audience_sync."
    for table in ("events", "profiles"):
        text = text.replace(f"FROM {table}", f"FROM {our}{table}").replace(
            f"JOIN {table}", f"JOIN {our}{table}"
        )
    moment = "%Y-%m-%d %H:%M:%S.000000" if dialects.is_sqlite(engine) else "%Y-%m-%d %H:%M:%S+00"
    for days in (0, 7, 30, 90):
        text = text.replace(f"{{{days}}}", f"'{NOW - dt.timedelta(days=days):{moment}}'")
    return text


def timed(connection, text):
    started = time.perf_counter()
    count = connection.exec_driver_sql(
        f"SELECT count(*) FROM ({text}) AS q", execution_options=PLAIN
    ).scalar_one()
    return time.perf_counter() - started, count


def measure(engine):
    """Return (name, users, seconds by hand, seconds of the query) of each definition."""
    catalog = own_catalog(engine.dialect.name, None if dialects.is_sqlite(engine) else "audience_sync")
    with engines.read(engine) as connection:
        for name, (query, *sql) in DEFINITIONS.items():
            compiled = compile_query(parse_condition(query), catalog, NOW, is_trait=False).sql
            hand = by_hand(engine, *sql)
            times = [(timed(connection, hand), timed(connection, compiled)) for _ in range(RUNS)]
            counts = {count for pair in times for _, count in pair}
            if len(counts) != 1:
                sys.exit(f"{name}: not the same users: {counts}")
            yield name, counts.pop(), min(pair[0][0] for pair in times), min(pair[1][0] for pair in times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--events-per-user", type=int, default=20)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    arguments = parser.parse_args()
    console = Console(width=110)
    names = ("sqlite", "postgresql") if arguments.database == "both" else (arguments.database,)
    for name in names:
        with databases(name) as create, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            engine = engines.open_own(create(folder), "audience_sync")
            migrate.upgrade(engine)
            fill(engine, arguments.users, arguments.users * arguments.events_per_user)
            table = Table(title=f"{name}: {arguments.users:,} users, {arguments.events_per_user} events each")
            for column in ("definition", "users", "by hand", "query", "times"):
                table.add_column(column, justify="left" if column == "definition" else "right")
            ratios = []
            for row, users, hand, query in measure(engine):
                ratios.append(query / hand)
                table.add_row(row, f"{users:,}", f"{hand:.3f} s", f"{query:.3f} s", f"{ratios[-1]:.2f}")
            console.print(table)
            median = statistics.median(ratios)
            for what, value, limit in (("median", median, MEDIAN), ("worst", max(ratios), MOST)):
                verdict = "reached" if value <= limit else "MISSED "
                console.print(f"{verdict} {name}: {what} at most {limit} times SQL by hand: {value:.2f}")
            engine.dispose()
    console.print(f"{platform.machine()}, SQLAlchemy {sa.__version__}; fastest of {RUNS} runs each.")


if __name__ == "__main__":
    main()
