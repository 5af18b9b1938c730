"""The pace of all lanes at Userpilot's documented limits when each answer takes a second.

    python benchmarks/latency.py [--latency 1] [--seconds 120] [--database sqlite]

Long backlogs of identifies, events and companies are delivered at the same time, the identifies also by bulk jobs. The
window fills in the first minute and a half; after that, the requests that the sandbox accepts are counted.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

from delivery import BULK, LIVE, ask, databases, fresh_sandbox
from hot import insert
from rich.console import Console
from rich.table import Table

from audience_sync.app import open_app

CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "sandbox"
bulk_rows_per_job = 1000
"""
PATHS = {"identify": "/v1/identify", "track": "/v1/track", "company": "/v1/companies/identify"}
FILLING_SECONDS = 90


def accepted(url):
    """Return how many requests of each lane, and rows of jobs, the sandbox has accepted."""
    counts = ask(url, "_sandbox/counts")
    lanes = {lane: counts.get(f"POST {path}", {}).get("202", 0) for lane, path in PATHS.items()}
    ids = [quote(job["job_id"], safe=":") for job in ask(url, "v1/background_jobs")]
    rows = sum(ask(url, f"v1/background_jobs/{job_id}")["completed_rows"] for job_id in ids)
    refused = sum(each.get("429", 0) for each in counts.values())
    return lanes | {"bulk": rows, "429": refused}


def measure(database, latency, seconds):
    """Return what each lane reached, as a share of its limit, and how many requests were refused."""
    with tempfile.TemporaryDirectory() as folder, fresh_sandbox(1) as url:
        for path in PATHS.values():
            ask(url, "_sandbox/faults", {"path": path, "delay_seconds": latency})
        configuration = Path(folder, "audience_sync.toml")
        configuration.write_text(CONFIGURATION.format(url=database(folder), endpoint=url))
        minutes = (FILLING_SECONDS + seconds) / 60 + 1
        with open_app(configuration) as app:
            stop = threading.Event()
            insert(app, "identify", int(minutes * (LIVE + BULK)), "'user-' || n", "push")
            insert(app, "track", int(minutes * LIVE), "'visitor-' || n", "push")
            insert(app, "company", int(minutes * LIVE), "'company-' || n", "push")
            working = threading.Thread(target=app.deliver, kwargs={"stop": stop})
            working.start()
            time.sleep(FILLING_SECONDS)
            before, began_at = accepted(url), time.perf_counter()
            time.sleep(seconds)
            after, minutes = accepted(url), (time.perf_counter() - began_at) / 60
            stop.set()
            working.join()
    limits = dict.fromkeys(PATHS, LIVE) | {"bulk": BULK}
    return {lane: (after[lane] - before[lane]) / minutes / limits[lane] for lane in limits}, after["429"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=1.0, help="seconds of each answer")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the measurement")
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    options = parser.parse_args()
    names = ("sqlite", "postgresql") if options.database == "both" else (options.database,)
    print(f"Answers in {options.latency:g} s; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.")
    table = Table("database", *PATHS, "bulk", "429")
    for name in names:
        with databases(name) as database:
            shares, refused = measure(database, options.latency, options.seconds)
        table.add_row(name, *(f"{share:.1%}" for share in shares.values()), str(refused))
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
