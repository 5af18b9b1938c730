"""The demo: a year of real orders, three audiences and a month of daily syncs, against the sandbox.

The figures it prints are read from the database and from the sandbox.
"""

import csv
import datetime as dt
import gzip
import importlib.resources
import json
import os
import shlex
import shutil
import sqlite3
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from audience_sync import history, intake
from audience_sync.app import App, open_app
from audience_sync.cli import output
from audience_sync.db import engines
from audience_sync.errors import ConfigError
from audience_sync.sandbox import Limits, Sandbox

FIRST_DAY = dt.datetime(2011, 6, 1, tzinfo=dt.UTC)
DAYS = 30
PER_MINUTE = 1_000_000  # lifts the sandbox's rate limits, so that a month takes seconds

SUFFIXES = ("", "-journal", "-wal", "-shm")  # of SQLite's files
FILES = (
    *(f"{name}{suffix}" for name in ("audience_sync.db", "shop.db") for suffix in SUFFIXES),
    "audience_sync.toml",
)
CONFIGURATION = """\
# Written by `audience-sync demo`: real orders, and a local stand-in for Userpilot.
[database]
url = "sqlite:///audience_sync.db"

[sources.shop]
url = "sqlite:///shop.db"

[destination]
endpoint = "{url}"
api_key = "sandbox"
identify_per_minute = {per_minute}
track_per_minute = {per_minute}

[defaults]
schedule = ""   # the demo itself syncs, as of days of 2011

[tables.orders]
source = "shop"
table = "orders"
user_id = "user_id"
timestamp = "ordered_on"
event = "Order Completed"

[[audiences]]
name = "Order Completed Last 30days"
source = "shop"
query = "event('Order Completed').within(30 days).count() >= 1"

[[audiences]]
name = "High Value Customers"
source = "shop"
query = "event('Order Completed').sum(property('total_gbp')) >= 2000"

[[audiences]]
name = "At Risk"
source = "shop"
query = '''
event('Order Completed').count() >= 1
AND NOT event('Order Completed').within(90 days).count() >= 1
'''
"""


def run(folder: Path) -> None:
    """Run the demo in a new folder, or in the folder of an earlier demo."""
    _make_folder(folder)
    order_count, customer_count = _load_orders(folder / "shop.db")
    output.line(
        f"Loaded {order_count:,} real orders of {customer_count:,} customers into {folder / 'shop.db'}."
    )
    output.line('("Online Retail" by Daqing Chen, UCI Machine Learning Repository, CC BY 4.0)')
    with Sandbox(limits=Limits(identify_per_minute=PER_MINUTE, track_per_minute=PER_MINUTE)) as sandbox:
        configuration = folder / "audience_sync.toml"
        text = CONFIGURATION.format(url=sandbox.url, per_minute=PER_MINUTE)
        configuration.write_text(text, encoding="utf-8")
        output.line(f"Started a local stand-in for Userpilot at {sandbox.url}, without rate limits.")
        with open_app(configuration) as app:
            _sync_days(app, sandbox.url)
            _send_calls(app, sandbox.url)
            _show_history(app)
    output.line()
    output.line(
        "Everything that was computed and sent is stored. To see it, open the dashboard in a browser:"
    )
    program = f"{_program()} --config {shlex.quote(str(configuration))}"
    output.line(f"  {program} serve")
    output.line("It prints its address. These commands show the same in the terminal:")
    for command in (
        "list",
        "explain at_risk",
        "history at_risk",
        "user 12347",
        "members high_value_customers --at 2011-06-15",
    ):
        output.line(f"  {program} {command}")
    output.line("To begin with your own database:")
    output.line(f"  {_program()} init my-audiences")


def _make_folder(folder: Path) -> None:
    try:
        if _holds_a_demo(folder):
            for name in FILES:  # the configuration goes last: it marks the folder as a demo's
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=folder.is_dir() and not any(folder.iterdir()))
    except FileExistsError:
        raise ConfigError(
            f"{folder} exists and contains something other than an earlier demo: name another folder."
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created: {error.strerror}. Name another folder.") from None


def _holds_a_demo(folder: Path) -> bool:
    """Return whether a folder contains only the files of an earlier demo."""
    configuration = folder / "audience_sync.toml"
    if not configuration.is_file() or {path.name for path in folder.iterdir()} - set(FILES):
        return False
    return configuration.read_text("utf-8", "replace").startswith(CONFIGURATION.partition(":")[0])


def _load_orders(path: Path) -> tuple[int, int]:
    """Load the orders into SQLite; return the number of orders and of customers."""
    packed = importlib.resources.files("audience_sync") / "demo_data" / "orders.csv.gz"
    shop = sqlite3.connect(path)
    with packed.open("rb") as file, gzip.open(file, "rt", encoding="utf-8", newline="") as text, shop:
        rows = csv.reader(text)
        next(rows)
        shop.execute("CREATE TABLE orders (order_id TEXT, user_id TEXT, ordered_on DATE, total_gbp REAL)")
        shop.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", rows)
        shop.execute("CREATE INDEX ix_orders ON orders (ordered_on, user_id)")
    counts = shop.execute("SELECT count(*), count(DISTINCT user_id) FROM orders").fetchone()
    shop.close()
    return int(counts[0]), int(counts[1])


def _sync_days(app: App, url: str) -> None:
    """Sync every audience as of each day, and print what each day's syncs changed and sent."""
    output.line()
    output.line("Syncing three audiences as of each day from 1 June to 1 July 2011:")
    rows, request_count, started = [], 0, time.monotonic()
    is_terminal = sys.stderr.isatty()
    for day in range(DAYS + 1):
        as_of = FIRST_DAY + dt.timedelta(days=day)
        if is_terminal:
            print(f"\r{as_of:%Y-%m-%d}", end="", file=sys.stderr, flush=True)  # noqa: T201
        run_ids = [app.sync(definition, as_of) for definition in app.definitions()]
        report = app.deliver(run_ids)
        if report.pending_count or report.dead_count:
            raise ConfigError(
                f"The sandbox accepted {report.accepted_count} deliveries and {report.pending_count} are left."
            )
        with engines.read(app.engine) as connection:
            runs = history.run_rows(connection, ids=run_ids)
        received = len(_ask(url, f"requests?after={request_count}"))
        request_count += received
        counts = [sum(run[f"{name}_count"] for run in runs) for name in ("entered", "exited", "accepted")]
        rows.append([f"{as_of:%Y-%m-%d}", *map(output.count, (*counts, received))])
    if is_terminal:
        print("\r          \r", end="", file=sys.stderr)  # noqa: T201
    names = ["entered", "exited", "accepted", "requests"]
    output.table(["as of", *names], rows, numbers=names)
    output.line(
        "The first sync sent every member, each later one only the changes. A user's changes share a request."
    )
    output.line(f"{DAYS + 1} syncs of three audiences took {time.monotonic() - started:.1f} s.")


def _send_calls(app: App, url: str) -> None:
    intake.identify(app, "12347", {"plan": "pro", "seats": 3})
    intake.track(app, "12347", "Guide Finished", {"guide": "Welcome"})
    intake.track(app, "12347", "Order Completed", {"total": 224.82})
    report = app.deliver()
    output.line()
    output.line(
        f"Submitted an Identify and two Track calls of user 12347: {report.accepted_count} accepted. The stand-in now "
        "has for this user:"
    )
    output.line(f"  {json.dumps(_ask(url, 'state')['users'].get('12347'))}")


def _show_history(app: App) -> None:
    with engines.read(app.engine) as connection:
        runs = history.run_rows(connection, limit=6)
    names = ["member", "entered", "exited", "accepted"]
    rows = [
        [str(run["run_id"]), run["key"], f"{run['as_of']:%Y-%m-%d}"]
        + [output.count(run[f"{name}_count"]) for name in names]
        for run in runs
    ]
    output.line()
    output.line("The newest runs, as the database has them:")
    numbers = ["members", "entered", "exited", "accepted"]
    output.table(["run", "key", "as of", *numbers], rows, numbers=["run", *numbers])


def _ask(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}_sandbox/{path}", timeout=10) as answer:  # noqa: S310  (our own loopback)
        return json.load(answer)


def _program() -> str:
    """The command with which this program was started."""
    called = Path(sys.argv[0])
    return "audience-sync" if shutil.which("audience-sync") == str(called) else os.path.relpath(called)
