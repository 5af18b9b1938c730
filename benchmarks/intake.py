"""Pace at which calls are stored, over HTTP and from a file, compared with that of the database alone.

    python benchmarks/intake.py [--calls 100000] [--lines 200000] [--database both]

Batches of 100 calls over HTTP, durable when they are answered, to a server on one core; for comparison the same server
with nothing stored, and bare INSERTs of the same rows: the driver's executemany, 100 calls a commit, in one process.
Meanwhile another client sends single calls, one after the other; their latency is reported as well.
CPU is that of the server or of the import with its second process, and of PostgreSQL's processes (as Linux counts it).
Then a file is imported. One call in two is a track, one in ten a group, the others identify, of 20,000 users.
"""

import argparse
import base64
import contextlib
import gc
import http.client
import json
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from delivery import databases
from rich.console import Console
from rich.table import Table

from audience_sync import intake
from audience_sync.app import open_app
from audience_sync.db import tables
from audience_sync.intake import files
from audience_sync.intake.writer import Writer

SPAWN = multiprocessing.get_context("spawn")
BATCH, CLIENTS, USERS = 100, 16, 20_000
CONFIGURATION = """
[database]
url = "{url}"
[tracking]
write_keys = ["benchmark"]
calls_per_second = 1_000_000
"""
HEADERS = {
    "Authorization": "Basic " + base64.b64encode(b"benchmark:").decode(),
    "Content-Type": "application/json",
}
FILLED = (tables.calls, tables.events, tables.deliveries, tables.profiles, tables.companies)


def call(number):
    """A call as Segment's Node library writes it, about 600 bytes."""
    chance = random.Random(number)
    user = chance.randrange(USERS)
    common = {
        "messageId": f"node-next-{number:012}-{chance.getrandbits(64):016x}",
        "userId": f"user-{user}",
        "timestamp": f"2026-11-01T10:{number // 60 % 60:02}:{number % 60:02}.123Z",
        "context": {"library": {"name": "@segment/analytics-node", "version": "3.1.0"}, "ip": "203.0.113.7"},
        "integrations": {},
        "_metadata": {"nodeVersion": "20.20.2", "jsRuntime": "node"},
    }
    match number % 10:
        case 0 | 2 | 4 | 6 | 8:
            items = [{"sku": f"A{n}", "price": 9.5 + n, "quantity": n} for n in range(2)]
            properties = {
                "order_id": number,
                "total": 31.5,
                "currency": "GBP",
                "products": items,
                "gift": False,
            }
            return common | {"type": "track", "event": "Order Completed", "properties": properties}
        case 1:
            traits = {"name": f"Company {user // 50}", "employees": user % 500, "plan": "business"}
            return common | {"type": "group", "groupId": f"company-{user // 50}", "traits": traits}
        case _:
            traits = {"email": f"user-{user}@example.com", "plan": "pro", "seats": number % 9, "vip": False}
            return common | {"type": "identify", "traits": traits}


# The server, in a separate process, on one core.


class NullWriter:
    """A writer that stores nothing and answers at once."""

    is_alive, waiting_count = True, 0

    def submit(self, calls):
        done = Future()
        done.set_result([intake.Receipt(0, call.message_id) for call in calls])
        return done


def serve(pipe, configuration, *, stores):
    from audience_sync.intake import http as tracking
    from audience_sync.intake import server

    gc.set_threshold(200_000)  # as the command line does
    os.sched_setaffinity(0, {0})
    with open_app(configuration) as app, server.listen("127.0.0.1", 0) as listening, Writer(app) as writer:
        api = tracking.TrackingApi(app, writer if stores else NullWriter()).asgi()
        pipe.send(listening.getsockname()[1])
        server.TrackingServer(api, app.stop).run(sockets=[listening])


@contextmanager
def server_on_one_core(configuration, *, stores=True):
    pipe, other = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(other, configuration), kwargs={"stores": stores}, daemon=True)
    process.start()
    other.close()
    yield pipe.recv(), process.pid
    process.kill()
    process.join()


def post(connection, path, body):
    connection.request("POST", path, body, HEADERS)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    assert b"refused" not in content


def by_http(port, batches):
    """Seconds for all batches, and of each single call that another client sent meanwhile."""
    os.sched_setaffinity(0, set(range(os.cpu_count())) - {0} or {0})
    waiting = iter(batches)
    is_over = False
    singles = []

    def send():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for batch in waiting:
            post(connection, "/v1/batch", batch)

    def send_single():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        number = 10**9
        while not is_over:
            number += 10
            started = time.perf_counter()
            post(connection, "/v1/track", json.dumps(call(number)).encode())
            singles.append(time.perf_counter() - started)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        started = time.perf_counter()
        single = pool.submit(send_single)
        for each in [pool.submit(send) for _ in range(CLIENTS)]:
            each.result()
        seconds = time.perf_counter() - started
        is_over = True
        single.result()
    os.sched_setaffinity(0, range(os.cpu_count()))
    return seconds, singles


class Shared:
    """An iterator that threads share."""

    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self._items.pop()
        except IndexError:
            raise StopIteration from None


# The same rows, by the driver alone.


def megabytes_on_disk(app):
    if app.engine.dialect.name == "sqlite":
        return Path(app.engine.url.database).stat().st_size / 1e6
    with app.engine.connect() as connection:
        return connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar() / 1e6


def cpu_seconds(*pids):
    """CPU seconds of these processes and all of PostgreSQL's, including those that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, *fields = stat.read_text().partition("(")[2].rpartition(")")
            if name == "postgres" or int(stat.parent.name) in pids:
                ticks += sum(map(int, fields[1].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def stored_rows(configuration):
    with open_app(configuration) as app, app.engine.connect() as connection:
        return {table: connection.execute(sa.select(table)).all() for table in FILLED}


def bare_inserts(configuration, rows, count):
    os.sched_setaffinity(0, {0})
    with open_app(configuration) as app:
        dialect = app.engine.dialect
        connection = app.engine.raw_connection()
        our = app.engine.get_execution_options()["our"]
        cursor = connection.cursor()
        pieces = max(1, count // BATCH)
        statements = []
        for table, all_rows in rows.items():
            columns = list(table.columns)
            mark = "?" if dialect.name == "sqlite" else "%s"
            names = ", ".join(f'"{column.name}"' for column in columns)
            statement = f"INSERT INTO {our}{table.name} ({names}) VALUES ({', '.join([mark] * len(columns))})"
            writers = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]
            written = [
                tuple(
                    value if write is None else write(value)
                    for write, value in zip(writers, row, strict=True)
                )
                for row in all_rows
            ]
            size = -(-len(written) // pieces)
            statements.append((statement, [written[at * size : (at + 1) * size] for at in range(pieces)]))
        if dialect.name == "sqlite":
            connection.rollback()
        started = time.perf_counter()
        for piece in range(pieces):
            if dialect.name == "sqlite":
                cursor.execute("BEGIN IMMEDIATE")
            for statement, parts in statements:
                if parts[piece]:
                    cursor.executemany(statement, parts[piece])
            connection.commit()
        seconds = time.perf_counter() - started
        connection.close()
    os.sched_setaffinity(0, range(os.cpu_count()))
    return seconds


# The whole measurement.


def measure(name, calls, lines):
    gc.set_threshold(200_000)
    documents = [call(number) for number in range(calls)]
    batches = [json.dumps({"batch": documents[at : at + BATCH]}).encode() for at in range(0, calls, BATCH)]
    with databases(name) as database, tempfile.TemporaryDirectory() as folder:

        def fresh(title):
            place = Path(folder, title)
            place.mkdir()
            configuration = place / "audience_sync.toml"
            configuration.write_text(CONFIGURATION.format(url=database(place)))
            with open_app(configuration):
                return configuration

        with server_on_one_core(fresh("forgetful"), stores=False) as (port, _):
            nothing, _ = by_http(port, Shared(batches[::-1]))
        mine = fresh("mine")
        with server_on_one_core(mine) as (port, pid):
            before = cpu_seconds(pid)
            stored, singles = by_http(port, Shared(batches[::-1]))
            server_cpu = (cpu_seconds(pid) - before) / (calls + len(singles)) * 1e6
        rows = stored_rows(mine)
        assert len(rows[tables.calls]) == calls + len(singles)
        bare = bare_inserts(fresh("bare"), rows, calls) * calls / len(rows[tables.calls])
        del documents, batches, rows  # or the garbage collector walks them during the import
        imported = fresh("imported")
        file = Path(folder, "calls.ndjson")
        with file.open("w") as written:
            for number in range(lines):
                written.write(json.dumps(call(number)) + "\n")
        with open_app(imported) as app, file.open("rb") as opened:
            empty, before = megabytes_on_disk(app), cpu_seconds(os.getpid())
            started = time.perf_counter()
            summary = files.import_calls(app, files.decompressed(opened), print, second_process=True)
            import_seconds = time.perf_counter() - started
            assert summary.accepted_count == lines
            for process in multiprocessing.active_children():
                process.join()
            importing = (cpu_seconds(os.getpid()) - before) / lines * 1e6
            on_disk = (megabytes_on_disk(app) - empty) / lines * 1e6
    return {
        "HTTP, stored": calls / stored,
        "HTTP, nothing stored": calls / nothing,
        "bare INSERTs": calls / bare,
        "import of a file": lines / import_seconds,
        "singles": sorted(singles),
        "a million calls by HTTP": f"{server_cpu:.0f} s of CPU",
        "a million lines imported": f"{importing:.0f} s of CPU",
        "a million lines on disk": f"{on_disk:,.0f} MB",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    options = parser.parse_args()
    names = ("sqlite", "postgresql") if options.database == "both" else (options.database,)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.calls:,} calls, {options.lines:,} lines."
    )
    results = {name: measure(name, options.calls, options.lines) for name in names}
    table = Table("calls a second", *names)
    for way in ("HTTP, stored", "HTTP, nothing stored", "bare INSERTs", "import of a file"):
        table.add_row(way, *(f"{results[name][way]:,.0f}" for name in names))
    for share, title in ((0.5, "median"), (0.99, "99 %")):
        cells = [
            f"{1000 * results[name]['singles'][int(share * len(results[name]['singles']))]:.0f} ms"
            for name in names
        ]
        table.add_row(f"a single call meanwhile, {title}", *cells)
    for cost in ("a million calls by HTTP", "a million lines imported", "a million lines on disk"):
        table.add_row(cost, *(results[name][cost] for name in names))
    Console(width=80).print(table)
    for name in names:
        lines = results[name]
        ratio = lines["HTTP, stored"] / lines["bare INSERTs"]
        for what, figure, is_reached in (
            ("5,000 calls a second by HTTP", f"{lines['HTTP, stored']:,.0f}", lines["HTTP, stored"] >= 5_000),
            ("half the pace of bare INSERTs", f"{ratio:.2f}", ratio >= 0.5),
            (
                "20,000 lines a second",
                f"{lines['import of a file']:,.0f}",
                lines["import of a file"] >= 20_000,
            ),
        ):
            print(f"{'reached' if is_reached else 'MISSED':<8}{name}, {what}: {figure}")


if __name__ == "__main__":
    main()
