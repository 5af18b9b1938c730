"""audience-sync compared with a script from cron (rival.py): the same work, sent to the sandbox.

python benchmarks/script.py [--users N]: speed and memory, then the data after a kill, after errors and with an empty
table. The sandbox runs in its own process without limits; wrong and repeated values are counted from its log.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from audience_sync.sandbox import Limits
from tests.faulty_sandbox import FaultySandbox

PER_MINUTE = 1_000_000
SQL = "SELECT user_id FROM customers WHERE vip = 1"
CONFIGURATION = """
[database]
url = "sqlite:///own.db"
[sources.shop]
url = "sqlite:///shop.db"
[destination]
endpoint = "{endpoint}"
identify_per_minute = {per_minute}
[[audiences]]
name = "VIPs"
source = "shop"
sql = "{sql}"
"""


def serve(pipe):
    limits = Limits(identify_per_minute=PER_MINUTE)
    with FaultySandbox(limits=limits) as sandbox:
        pipe.send(sandbox.url)
        pipe.recv()


def control(url, method, name, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}_sandbox/{name}", data, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer) if answer.status == 200 else None


def is_running(process):
    """Check without reaping the process, which is left to wait4."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


@dataclass
class Ran:
    exit_code: int  # negative: the signal that killed it
    seconds: float
    megabytes: float
    request_count: int


class Contest:
    """One contestant in its own folder, with a fresh source of `users` members and an empty sandbox."""

    def __init__(self, name, url, users):
        self.name, self.url = name, url
        self.folder = Path(tempfile.mkdtemp(prefix="audience-sync-bench-"))
        self.random = random.Random(1)
        self.newest = users
        configuration = CONFIGURATION.format(endpoint=url, per_minute=PER_MINUTE, sql=SQL)
        (self.folder / "audience_sync.toml").write_text(configuration)
        self.source("CREATE TABLE customers (user_id TEXT PRIMARY KEY, vip INTEGER NOT NULL)")
        self.source("INSERT INTO customers VALUES (?, 1)", [(f"user-{n}",) for n in range(users)])
        control(url, "DELETE", "faults")
        control(url, "POST", "reset")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def source(self, statement, rows=((),)):
        connection = sqlite3.connect(self.folder / "shop.db")
        with connection:
            connection.executemany(statement, rows)
        connection.close()

    def members(self):
        connection = sqlite3.connect(self.folder / "shop.db")
        members = {user_id for (user_id,) in connection.execute(SQL)}
        connection.close()
        return members

    def change(self, count):
        """Remove `count` / 2 random members, and add as many new ones."""
        leaving = self.random.sample(sorted(self.members()), count // 2)
        self.source("UPDATE customers SET vip = 0 WHERE user_id = ?", [(user_id,) for user_id in leaving])
        coming = range(self.newest, self.newest + count - count // 2)
        self.source("INSERT INTO customers VALUES (?, 1)", [(f"user-{n}",) for n in coming])
        self.newest = coming.stop

    def command(self):
        if self.name == "audience-sync":
            return [sys.executable, "-m", "audience_sync", "--config", "audience_sync.toml", "sync", "--json"]
        options = {
            "database": "shop.db",
            "sql": SQL,
            "property": "vips",
            "state": "vips.json",
            "endpoint": self.url,
        }
        options["per-minute"] = str(PER_MINUTE)
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        return [sys.executable, str(Path(__file__).parent / "rival.py"), *arguments]

    def run(self, kill_at=None):
        """Run the command once; `kill_at`: kill it when the sandbox has received this many requests."""
        before = self.request_count()
        environ = os.environ | {
            "USERPILOT_API_KEY": "sandbox",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        with (self.folder / "output").open("a") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                self.command(), cwd=self.folder, env=environ, stdout=output, stderr=subprocess.STDOUT
            )
            while kill_at is not None and is_running(process):
                if control(self.url, "GET", f"requests?after={kill_at - 1}"):
                    process.kill()
                    break
                time.sleep(0.005)
            _, status, usage = os.wait4(process.pid, 0)  # of this child; getrusage gives the maximum of all
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        return Ran(process.returncode, seconds, usage.ru_maxrss / 1024, self.request_count() - before)

    def request_count(self):
        return len(control(self.url, "GET", "requests"))

    def wrong_count(self):
        """Count the users whose value at Userpilot is not the source's."""
        users_in = {
            user
            for user, data in control(self.url, "GET", "state")["users"].items()
            if data["properties"]["vips"]
        }
        return len(users_in ^ self.members())

    def repeated_count(self):
        """Count the requests that repeated a user's last value."""
        history = control(self.url, "GET", "history").values()
        return sum(first[1] == second[1] for lines in history for first, second in pairwise(lines))

    def false_count(self):
        return sum(
            not user["properties"]["vips"] for user in control(self.url, "GET", "state")["users"].values()
        )


def measure(name, url, users):
    """Rows of the table: the measurement and its figure."""
    changes = users // 100
    with Contest(name, url, users) as contest:
        for title, change in ((f"First sync of {users:,} users", 0), (f"Then {changes:,} changes", changes)):
            contest.change(change)
            ran = contest.run()
            yield title, None
            yield "  time", f"{ran.seconds:.1f} s"
            yield "  peak memory", f"{ran.megabytes:.0f} MB"
            yield "  requests", f"{ran.request_count:,}"
            yield "  users wrong", f"{contest.wrong_count():,}"
            yield "  exit code", f"{ran.exit_code}"
    with Contest(name, url, users) as contest:
        yield f"Killed half-way, then {changes:,} changes", None
        if contest.run(kill_at=users // 2).exit_code != -signal.SIGKILL:
            sys.exit(f"{name} ended before it could be killed: use more --users")
        contest.change(changes)
        ran = contest.run()
        yield "  time of the second run", f"{ran.seconds:.1f} s"
        yield "  exit code", f"{ran.exit_code}"
        yield "  requests that repeated", f"{contest.repeated_count():,}"
        yield "  users wrong", f"{contest.wrong_count():,}"
        ran = contest.run()
        yield "  users wrong after another run", f"{contest.wrong_count():,}"
    some = users // 5  # the script waits a second after each failure
    with Contest(name, url, some) as contest:
        yield f"Every 10th request gets a 500, {some:,} users", None
        control(url, "POST", "faults", {"path": "/v1/identify", "every": 10, "status": 500})
        ran = contest.run()
        yield "  time", f"{ran.seconds:.1f} s"
        yield "  requests", f"{ran.request_count:,}"
        yield "  exit code", f"{ran.exit_code}"
        yield "  users wrong", f"{contest.wrong_count():,}"
    with Contest(name, url, users) as contest:
        yield "The source table is empty one night", None
        contest.run()
        contest.source("DELETE FROM customers")
        ran = contest.run()
        yield "  users sent as having left", f"{contest.false_count():,}"
        yield "  exit code", f"{ran.exit_code}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=5_000)
    users = parser.parse_args().users
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=serve, args=(other,), daemon=True)
    process.start()
    url = pipe.recv()
    figures = {name: list(measure(name, url, users)) for name in ("script", "audience-sync")}
    pipe.send("stop")
    process.join()

    table = Table("", *figures, title="audience-sync compared with a script from cron", width=78)
    for column in table.columns[1:]:
        column.justify = "right"
    for (title, first), (_, second) in zip(*figures.values(), strict=True):
        table.add_row(title, first, second, end_section=False)
    Console(width=80).print(table)
    print(f"SQLite, {os.cpu_count()} cores, Python {platform.python_version()}; one run of each; no limits.")


if __name__ == "__main__":
    main()
