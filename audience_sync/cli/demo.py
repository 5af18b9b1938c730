"""The demo: a year of real orders, three audiences, a month of daily syncs, against a sandbox on loopback.

What it prints is read back from the database and from the sandbox.
"""

import csv
import datetime as dt
import gzip
import importlib.resources
import json
import os
import shutil
import sqlite3
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from audience_sync import history, intake
from audience_sync.app import App, open_app
from audience_sync.audiences import runs
from audience_sync.cli import output
from audience_sync.db import engines
from audience_sync.errors import ConfigError
from audience_sync.sandbox import Limits, Sandbox

FIRST_DAY = dt.datetime(2011, 6, 1, tzinfo=dt.UTC)
DAYS = 30
PACE = 1_000_000  # a minute: the sandbox's limits are lifted, so that a month takes seconds

DATABASES, BESIDE = ("audience_sync.db", "shop.db"), ("", "-journal", "-wal", "-shm")
FILES = (*(f"{name}{end}" for name in DATABASES for end in BESIDE), "audience_sync.toml")
CONFIGURATION = """\
# Written by `audience-sync demo`: real orders, and a local Userpilot instead of the real one.
[database]
url = "sqlite:///audience_sync.db"

[sources.shop]
url = "sqlite:///shop.db"

[destination]
endpoint = "{url}"
api_key = "sandbox"
identify_per_minute = {pace}
track_per_minute = {pace}

[[audiences]]
name = "Order Completed Last 30days"
source = "shop"
sql = '''
SELECT DISTINCT user_id FROM orders
WHERE ordered_on > date(:as_of, '-30 days') AND ordered_on <= date(:as_of)
'''

[[audiences]]
name = "High Value Customers"
source = "shop"
sql = '''
SELECT user_id FROM orders WHERE ordered_on <= date(:as_of)
GROUP BY user_id HAVING sum(total_gbp) >= 2000
'''

[[audiences]]
name = "At Risk"
source = "shop"
sql = '''
SELECT user_id FROM orders WHERE ordered_on <= date(:as_of)
GROUP BY user_id HAVING max(ordered_on) <= date(:as_of, '-90 days')
'''
"""


def run(folder: Path) -> None:
    """Make the folder and everything in it, and show what happens."""
    _make_folder(folder)
    orders, customers = _load_orders(folder / "shop.db")
    output.line(f"{orders:,} real orders of {customers:,} customers: {folder / 'shop.db'}")
    output.line("(Online Retail by Daqing Chen, UCI Machine Learning Repository, CC BY 4.0)")
    with Sandbox(limits=Limits(identify_per_minute=PACE, track_per_minute=PACE)) as sandbox:
        configuration = folder / "audience_sync.toml"
        configuration.write_text(CONFIGURATION.format(url=sandbox.url, pace=PACE), encoding="utf-8")
        output.line(
            f"A local Userpilot listens on {sandbox.url}; its pace is lifted (Userpilot takes 2,400 users a minute)."
        )
        with open_app(configuration) as opened:
            _sync_days(opened, sandbox.url)
            _send_calls(opened, sandbox.url)
            _show_history(opened)
    output.line("Look around:")
    program = f"{_program()} --config {configuration}"
    for command in ("history at_risk", "user 12347", "members high_value_customers --at 2011-06-15"):
        output.line(f"  {program} {command}")


def _make_folder(folder: Path) -> None:
    try:
        if _holds_a_demo(folder):
            for name in FILES:  # the mark goes last: broken off, it is a demo's still
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=folder.is_dir() and not any(folder.iterdir()))
    except FileExistsError:
        raise ConfigError(
            f"{folder} is there already and holds more than a demo, or none: name another folder."
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}. Name another folder.") from None


def _holds_a_demo(folder: Path) -> bool:
    """Whether there is what an earlier demo wrote, and nothing else."""
    configuration = folder / "audience_sync.toml"
    if not configuration.is_file() or {each.name for each in folder.iterdir()} - set(FILES):
        return False
    return configuration.read_text("utf-8", "replace").startswith(CONFIGURATION.partition(":")[0])


def _load_orders(path: Path) -> tuple[int, int]:
    packed = importlib.resources.files("audience_sync") / "demo_data" / "orders.csv.gz"
    shop = sqlite3.connect(path)
    with packed.open("rb") as file, gzip.open(file, "rt", encoding="utf-8", newline="") as text, shop:
        rows = csv.reader(text)
        next(rows)
        shop.execute("CREATE TABLE orders (order_id TEXT, user_id TEXT, ordered_on TEXT, total_gbp REAL)")
        shop.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", rows)
        shop.execute("CREATE INDEX ix_orders ON orders (ordered_on, user_id)")
    found = shop.execute("SELECT count(*), count(DISTINCT user_id) FROM orders").fetchone()
    shop.close()
    return int(found[0]), int(found[1])


def _sync_days(opened: App, url: str) -> None:
    """A first full sync, then one each day; what each day's requests were, the sandbox tells."""
    rows, seen, started = [], 0, time.monotonic()
    terminal = sys.stderr.isatty()
    for day in range(DAYS + 1):
        as_of = FIRST_DAY + dt.timedelta(days=day)
        definitions = opened.definitions()
        runs.resolve_as_of(opened.engine, definitions, as_of, opened.clock.now())
        run_ids = [opened.sync(definition, as_of) for definition in definitions]
        report = opened.deliver(run_ids)
        if report.pending_count or report.dead_count:
            raise ConfigError(
                f"The sandbox took {report.accepted_count} deliveries and left {report.pending_count}."
            )
        with engines.read(opened.engine) as connection:
            found = history.run_rows(connection, ids=run_ids)
        received = len(_ask(url, f"requests?after={seen}"))
        counts = [
            str(sum(each[f"{name}_count"] for each in found)) for name in ("entered", "exited", "accepted")
        ]
        rows.append([f"{as_of:%Y-%m-%d}", *counts, str(received)])
        seen += received
        if terminal:
            print(f"\r{as_of:%Y-%m-%d}", end="", file=sys.stderr, flush=True)  # noqa: T201
    if terminal:
        print("\r          \r", end="", file=sys.stderr)  # noqa: T201
    names = ["entered", "exited", "accepted", "requests"]
    output.table(["as of", *names], rows, numbers=names)
    output.line(f"{DAYS + 1} syncs of 3 audiences in {time.monotonic() - started:.1f} s.")


def _send_calls(opened: App, url: str) -> None:
    intake.identify(opened, "12347", {"plan": "pro", "seats": 3})
    intake.track(opened, "12347", "Guide Finished", {"guide": "Welcome"})
    intake.track(opened, "12347", "Order Completed", {"total": 224.82})
    report = opened.deliver()
    output.line(
        f"An Identify and two Tracks: {report.accepted_count} accepted. What the sandbox holds of user 12347:"
    )
    found = _ask(url, "state")
    output.line(f"  {json.dumps(found['users'].get('12347'))}")


def _show_history(opened: App) -> None:
    with engines.read(opened.engine) as connection:
        found = history.run_rows(connection, limit=6)
    names = ["member", "entered", "exited", "accepted"]
    rows = [
        [str(each["run_id"]), each["key"], f"{each['as_of']:%Y-%m-%d}"]
        + [output.count(each[f"{name}_count"]) for name in names]
        for each in found
    ]
    output.line("The newest runs, from the database:")
    numbers = ["members", "entered", "exited", "accepted"]
    output.table(["run", "key", "as of", *numbers], rows, numbers=["run", *numbers])


def _ask(url: str, what: str) -> Any:
    with urllib.request.urlopen(f"{url}_sandbox/{what}", timeout=10) as answer:  # noqa: S310  (our own loopback)
        return json.load(answer)


def _program() -> str:
    """How this program was called, as a shell takes it."""
    called = Path(sys.argv[0])
    return "audience-sync" if shutil.which("audience-sync") == str(called) else os.path.relpath(called)
