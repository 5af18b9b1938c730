"""Sends calls with Segment's library for Python and prints each one's type and messageId, one JSON object a line.

    python send.py --host http://127.0.0.1:8080 --write-key KEY --count 10 [--gzip]

Exits with 1 when the library gave up on a call. Needs segment-analytics-python 2.4.
"""

import argparse
import json
import sys
import uuid

from segment.analytics.client import Client


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--write-key", required=True)
    parser.add_argument("--count", required=True, type=int)
    parser.add_argument("--gzip", action="store_true")
    arguments = parser.parse_args()
    failed = []
    client = Client(
        arguments.write_key,
        host=arguments.host,
        gzip=arguments.gzip,
        max_retries=10,
        max_queue_size=6 * arguments.count + 1,
        upload_size=20,
        on_error=lambda error, batch: failed.append((error, len(batch))),
    )
    for number in range(arguments.count):
        user_id = f"python-{number}"
        calls = {
            "identify": (user_id, {"plan": "pro", "number": number}),
            "track": (user_id, "Order Completed", {"total": number / 4, "paid": True}),
            "group": (user_id, f"company-{number}", {"name": "Größe GmbH"}),
            "page": (user_id, "Docs", "Home", {"url": "https://example.com/"}),
            "screen": (user_id, "Docs", "Start"),
            "alias": (f"anonymous-{number}", user_id),
        }
        for kind, parts in calls.items():
            message_id = f"python-{kind}-{uuid.uuid4()}"
            getattr(client, kind)(*parts, message_id=message_id)
            print(json.dumps({"type": kind, "messageId": message_id}))
    client.shutdown()
    for error, count in failed:
        print(f"{count} calls were given up: {error}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
