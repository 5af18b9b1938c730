"""A script that a team without such a tool would run from cron: `script.py` compares audience-sync to it.

It is a careful one: it sends changes only, keeps the pace, retries, and remembers the members it has sent.
    0 */2 * * * rival.py --database shop.db --sql "SELECT …" --property vips --state vips.json
"""

import argparse
import json
import os
import sqlite3
import sys
import time
from pathlib import Path

import httpx

RETRIES = 3


def select_users(database, sql):
    if "://" in database:
        import psycopg

        connection = psycopg.connect(database)
    else:
        connection = sqlite3.connect(database)
    try:
        cursor = connection.cursor()
        cursor.execute(sql)
        return {str(user_id) for (user_id,) in cursor}
    finally:
        connection.close()


def read_state(path):
    return set(json.loads(path.read_text())) if path.exists() else set()


def write_state(path, users):
    path.with_suffix(".new").write_text(json.dumps(sorted(users)))
    path.with_suffix(".new").replace(path)


class Userpilot:
    def __init__(self, endpoint, api_key, per_minute):
        headers = {"Authorization": f"Token {api_key}", "X-API-Version": "2020-09-22"}
        self.client = httpx.Client(base_url=endpoint, headers=headers, timeout=30)
        self.pause, self.next_at = 60 / per_minute, 0.0

    def identify(self, user_id, **metadata):
        body = {"user_id": user_id, "metadata": metadata}
        for attempt in range(1 + RETRIES):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            time.sleep(max(0.0, self.next_at - time.monotonic()))
            self.next_at = time.monotonic() + self.pause
            try:
                response = self.client.post("/v1/identify", json=body)
            except httpx.TransportError as error:
                problem = str(error)
                continue
            if response.is_success:
                return
            problem = f"answered {response.status_code}"
            if response.status_code != 429 and response.status_code < 500:
                break
        raise RuntimeError(problem)


def main():
    parser = argparse.ArgumentParser(description="Send Userpilot the changes of an audience.")
    parser.add_argument("--database", required=True, help="an SQLite file or postgresql://…")
    parser.add_argument("--sql", required=True, help="gives the user ids of the members")
    parser.add_argument("--property", required=True)
    parser.add_argument(
        "--state", type=Path, required=True, help="a file with the members that were sent last"
    )
    parser.add_argument("--endpoint", default="https://analytex.userpilot.io/")
    parser.add_argument("--per-minute", type=int, default=600)
    arguments = parser.parse_args()

    before = read_state(arguments.state)
    now = select_users(arguments.database, arguments.sql)
    changes = [(user_id, True) for user_id in sorted(now - before)]
    changes += [(user_id, False) for user_id in sorted(before - now)]
    print(f"{len(now)} members, {len(changes)} changes")

    userpilot = Userpilot(arguments.endpoint, os.environ["USERPILOT_API_KEY"], arguments.per_minute)
    sent, failed = set(before), 0
    for number, (user_id, value) in enumerate(changes, 1):
        try:
            userpilot.identify(user_id, **{arguments.property: value})
        except RuntimeError as error:
            print(f"{user_id}: {error}", file=sys.stderr)
            failed += 1
        else:
            (sent.add if value else sent.discard)(user_id)
        if number % 1000 == 0:
            print(f"{number} of {len(changes)}")
    write_state(arguments.state, sent)
    print(f"{len(changes) - failed} sent, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
