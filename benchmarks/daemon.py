"""The cost of a daemon's tick, and how late definitions run when many are due at once.

    python benchmarks/daemon.py [--definitions 500] [--slots 50] [--ticks 60] [--concurrency 4] [--database both]

First every definition gets a history of slots with runs, and the tick is timed while none of them is due. Then all are
due at the same moment, and the daemon computes them with its threads: for each, the time from its slot to the start of
its run. Its ticks continue and are timed again. Each definition finds 100 users. Nothing is delivered.
"""

import argparse
import datetime as dt
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from delivery import databases
from rich.console import Console
from rich.table import Table

from audience_sync.app import App, open_app
from audience_sync.daemon import TICK_SECONDS, Daemon
from audience_sync.db import dialects, engines, tables

CONFIGURATION = """
[database]
url = "{url}"
[destination]
api_key = "benchmark"
[daemon]
concurrency = {concurrency}
[defaults]
schedule = "{schedule}"
full_schedule = "{full}"
timezone = "Europe/Berlin"
"""
AUDIENCE = """
[[audiences]]
name = "Audience {number}"
sql = "SELECT user_id FROM people WHERE number / 100 = {number}"
"""
RUN = """INSERT INTO {our}runs (definition_id, mode, trigger, status, as_of, started_at, finished_at, member_count)
SELECT definition_id, 'changes', 'schedule', 'succeeded', :at, :at, :at, 0 FROM {our}definitions"""
SLOT = """INSERT INTO {our}schedule_slots (definition_id, slot_at, taken_at, run_id)
SELECT definition_id, started_at, started_at, run_id FROM {our}runs"""
STARTED = tables.runs.c.started_at
STARTS = sa.select(sa.func.min(STARTED, type_=STARTED.type)).group_by(tables.runs.c.definition_id)


def prepare(folder, url, count, concurrency):
    configuration = Path(folder) / "audience_sync.toml"
    far = dt.datetime.now(ZoneInfo("Europe/Berlin")) - dt.timedelta(hours=12)
    daily = f"{far.minute} {far.hour} * * "
    text = CONFIGURATION.format(url=url, concurrency=concurrency, schedule=f"{daily}*", full=f"{daily}1")
    text += "".join(AUDIENCE.format(number=number) for number in range(count))
    configuration.write_text(text)
    company = sa.create_engine(url)
    with company.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE people (user_id text, number integer)")
        people = [{"user_id": f"user-{number}", "number": number} for number in range(100 * count)]
        connection.execute(sa.text("INSERT INTO people VALUES (:user_id, :number)"), people)
    company.dispose()
    return configuration


def fill_history(app, slot_count):
    """Give each definition slots with runs that succeeded, one an hour, up to now."""
    now = app.clock.now()
    with engines.write(app.engine) as connection:
        for hours in range(slot_count, 0, -1):
            dialects.sql(connection, RUN, at=now - dt.timedelta(hours=hours - 1))
        dialects.sql(connection, SLOT)
    if not dialects.is_sqlite(app.engine):
        with app.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ANALYZE")


def tick_times(daemon, count):
    """Return the seconds of each tick, and of this thread's CPU in each."""
    seconds, cpu = [], []
    for _ in range(count):
        started, cpu_started = time.perf_counter(), time.thread_time()
        daemon.tick()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.thread_time() - cpu_started)
    return seconds, cpu


def make_due(app):
    """Forget all slots and runs of definitions that were registered yesterday, so that each has one slot that is due."""
    yesterday = app.clock.now() - dt.timedelta(hours=23)
    with engines.write(app.engine) as connection:
        dialects.sql(connection, "DELETE FROM {our}schedule_slots")
        dialects.sql(connection, "DELETE FROM {our}runs")
        dialects.sql(connection, "UPDATE {our}definitions SET created_at = :yesterday", yesterday=yesterday)


def measure(name, options):
    with (
        databases(name) as database,
        tempfile.TemporaryDirectory() as folder,
        open_app(prepare(folder, database(folder), options.definitions, options.concurrency)) as app,
    ):
        threads, connections = [], []

        def start(_name, work):
            threads.append(threading.Thread(target=work))
            threads[-1].start()

        daemon = Daemon(app, App.reloaded, start)
        daemon.tick()
        fill_history(app, options.slots)
        idle = tick_times(daemon, options.ticks)
        make_due(app)
        since, started = app.clock.now(), time.perf_counter()
        busy, _ = tick_times(daemon, 1)
        next_tick = started + TICK_SECONDS
        while any(thread.is_alive() for thread in threads):
            connections.append(app.engine.pool.checkedout())
            time.sleep(0.02)
            if time.perf_counter() >= next_tick:
                next_tick += TICK_SECONDS
                busy += tick_times(daemon, 1)[0]
        seconds = time.perf_counter() - started
        with engines.read(app.engine) as connection:
            late = sorted((moment - since).total_seconds() for moment in connection.execute(STARTS).scalars())
        assert len(late) == options.definitions
        return idle, busy, late, seconds, max(connections)


def milliseconds(seconds):
    return f"{statistics.median(seconds) * 1000:.0f} ms, at most {max(seconds) * 1000:.0f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--definitions", type=int, default=500)
    parser.add_argument("--slots", type=int, default=50)
    parser.add_argument("--ticks", type=int, default=60)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    options = parser.parse_args()
    names = ("sqlite", "postgresql") if options.database == "both" else (options.database,)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.definitions:,} definitions.")
    results = {name: measure(name, options) for name in names}
    table = Table("", *names)
    lines = {
        "a tick, nothing due": lambda idle, *_: milliseconds(idle[0]),
        "its CPU, without the server's": lambda idle, *_: milliseconds(idle[1]),
        "a tick while runs are computed": lambda _, busy, *__: milliseconds(busy),
        "from the slot to the run, median": lambda _, __, late, *___: f"{statistics.median(late):.1f} s",
        "from the slot to the run, the last": lambda _, __, late, *___: f"{late[-1]:.1f} s",
        "runs a second": lambda _, __, late, seconds, ___: f"{len(late) / seconds:.1f}",
        "connections at most": lambda *result: str(result[-1]),
    }
    for title, cell in lines.items():
        table.add_row(title, *(cell(*results[name]) for name in names))
    Console(width=90).print(table)
    for name in names:
        tick = statistics.median(results[name][0][0])
        print(
            f"{'reached' if tick < 0.05 else 'MISSED':<8}{name}, an idle tick under 50 ms: {tick * 1000:.0f} ms"
        )


if __name__ == "__main__":
    main()
