"""The pace of the other users' deliveries while one user has very many deliveries.

    python benchmarks/hot.py [--hot 1000000] [--others 10000] [--action track] [--multiple 20] [--database sqlite]

The sandbox runs in a separate process with the documented limits times the multiple. The others' deliveries are sent first
alone, then together with those of the hot user, which were queued before them: a quarter of these, then all. The
benchmark measures the pace of the others until the last of them is accepted, and the peak memory of the delivering process.
"""

import argparse
import os
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from delivery import SPAWN, databases, fresh_sandbox
from rich.console import Console
from rich.table import Table

from audience_sync.app import open_app
from audience_sync.db import dialects, engines

LIMIT = 600  # a minute, documented
CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "sandbox"
identify_per_minute = {limit}
track_per_minute = {limit}
company_per_minute = {limit}
bulk = false
"""
BODY = {"track": '{"event_name": "Seen"}', "identify": '{"visits": 1}', "company": '{"seats": 1}'}
FILL = """INSERT INTO {{our}}deliveries
(action, subject_id, body, class, call_id, fingerprint, value_at, status, created_at, next_attempt_at)
SELECT :action, {subject}, {body}, :class, n, :fingerprint, :now, 'pending', :now, :now FROM {numbers}"""
LEFT = """SELECT 1 FROM {{our}}deliveries {index} WHERE status IN ('pending', 'sending')
AND subject_id > 'user-' AND subject_id < 'user.' LIMIT 1"""


@dataclass(frozen=True)
class Line:
    hot: int
    others: int
    seconds: float
    hot_sent: int
    megabytes: float

    @property
    def per_second(self):
        return self.others / self.seconds


def fill(configuration, action, hot, others):
    """Queue the deliveries as calls leave them."""
    with open_app(configuration) as app:
        for count, subject in ((hot, "'guest'"), (others, "'user-' || n")):
            insert(app, action, count, subject)


def insert(app, action, count, subject, delivery_class="call"):
    engine, now, fingerprint = app.engine, app.clock.now(), app.destination.fingerprint
    numbers = f"generate_series(1, {count}) AS g(n)"
    body = f"CAST('{BODY[action]}' AS json)"
    if dialects.is_sqlite(engine):
        numbers = f"(WITH RECURSIVE g(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM g WHERE n < {count}) SELECT n FROM g)"
        body = f"'{BODY[action]}'"
    if count:
        with engines.write(engine) as connection:
            statement = FILL.format(subject=subject, body=body.replace(": ", "\\: "), numbers=numbers)
            parameters = {"action": action, "now": now, "fingerprint": fingerprint, "class": delivery_class}
            dialects.sql(connection, statement, **parameters)


def deliver(configuration, others):
    """Deliver until the others are all accepted; (seconds, requests of the hot user, megabytes)."""
    with open_app(configuration) as app:
        stop = threading.Event()
        checked_at = started = time.perf_counter()

        def check(_report):
            nonlocal checked_at
            if time.perf_counter() - checked_at > 0.2:
                checked_at = time.perf_counter()
                with engines.read(app.engine) as connection:
                    index = dialects.indexed_by(connection, "ix_deliveries_unsettled")
                    if dialects.sql(connection, LEFT.format(index=index)).first() is None:
                        stop.set()

        report = app.deliver(on_progress=check, stop=stop)
        seconds = time.perf_counter() - started
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds, report.request_count - others, megabytes


def measure(action, hot, others, multiple, database):
    with tempfile.TemporaryDirectory() as folder, fresh_sandbox(multiple) as url:
        configuration = Path(folder, "audience_sync.toml")
        text = CONFIGURATION.format(url=database(folder), endpoint=url, limit=LIMIT * multiple)
        configuration.write_text(text)
        with ProcessPoolExecutor(1, SPAWN) as filler:
            filler.submit(fill, configuration, action, hot, others).result()
        with ProcessPoolExecutor(1, SPAWN) as child:
            seconds, hot_sent, megabytes = child.submit(deliver, configuration, others).result()
        return Line(hot, others, seconds, hot_sent, megabytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hot", type=int, default=1_000_000, help="deliveries of one user")
    parser.add_argument("--others", type=int, default=10_000, help="other users, with a delivery each")
    parser.add_argument("--action", choices=tuple(BODY), default="track")
    parser.add_argument("--multiple", type=int, default=5, help="of the documented limits")
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    options = parser.parse_args()
    names = ("sqlite", "postgresql") if options.database == "both" else (options.database,)
    print(f"{options.action}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.")
    table = Table("database", "hot", "others", "seconds", "others/s", "of alone", "hot requests", "MB")
    for column in table.columns[1:]:
        column.justify = "right"
    reached = []
    for name in names:
        with databases(name) as database:
            lines = [
                measure(options.action, hot, options.others, options.multiple, database)
                for hot in (0, options.hot // 4, options.hot)
            ]
        for line in lines:
            share = line.per_second / lines[0].per_second
            table.add_row(
                name, f"{line.hot:,}", f"{line.others:,}", f"{line.seconds:.1f}", f"{line.per_second:.1f}",
                f"{share:.1%}", f"{line.hot_sent:,}", f"{line.megabytes:.0f}",
            )  # fmt: skip
        alone, quarter, whole = lines
        share = whole.per_second / alone.per_second
        growth = whole.megabytes / quarter.megabytes - 1  # caches are full at a quarter
        reached.append((f"{name}: the others at 90 % of their pace alone: {share:.1%}", share >= 0.9))
        reached.append((f"{name}: at most 10 % more memory than at a quarter: {growth:.1%}", growth <= 0.1))
        more = whole.megabytes - alone.megabytes
        # SQLite's cache takes up to 32 MB, however long the queue is.
        reached.append((f"{name}: at most 45 MB more than alone: {more:.0f}", more <= 45))
    Console(width=110).print(table)
    for what, is_reached in reached:
        print(f"{'reached' if is_reached else 'MISSED':<8}{what}")


if __name__ == "__main__":
    main()
