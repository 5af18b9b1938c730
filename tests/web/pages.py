"""A dashboard on a test's database, asked in this process, and rows for it to show."""

import asyncio
import datetime as dt
import html
import re
from dataclasses import dataclass

import httpx

from audience_sync import settings
from audience_sync.app import App
from audience_sync.db import engines, tables
from audience_sync.web import site
from tests.queue.conftest import START, HandClock

HOSTILE = "<script>alert(1)</script>\"'& \u202eRTL\u202c مرحبا 🎉 \\u0000 " + "x" * 500
BLOCKS = re.compile(r"</?(?:small|d[tdl]|div|li|t[dhr]|p|summary|option|pre|h\d|section)\b[^>]*>")
HOUR = dt.timedelta(hours=1)
CALL = {"type": "track", "body": {}, "timestamp": START, "received_at": START, "status": "accepted"}
REQUEST = {"lane": "identify", "epoch": 1, "started_at": START, "ended_at": START, "delivery_count": 1}
FACTS = {  # of a delivery with a status
    "accepted": {"settled_at": START},
    "dead": {"settled_at": START, "error": "HTTP 400"},
    "cancelled": {"settled_at": START},
}


@dataclass
class Pages:
    app: App

    def get(self, address, headers=None, **parameters):
        async def ask():
            transport = httpx.ASGITransport(site.dashboard(self.app), client=("127.0.0.1", 50_000))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8040") as client:
                return await client.get(address, params=parameters or None, headers=headers)

        return asyncio.run(ask())

    def text(self, address, **parameters):
        """The text of a page as a person reads it."""
        answer = self.get(address, **parameters)
        assert answer.status_code == 200, answer.text
        assert "<script>alert" not in answer.text
        body = answer.text.partition("<main")[2].partition("<footer")[0]
        body = re.sub(r"<[^>]*>", "", BLOCKS.sub(" ", body))
        return " ".join(html.unescape(body).split())

    def addresses(self, address, **parameters):
        """The addresses that a page leads to."""
        body = self.get(address, **parameters).text.partition("<main")[2]
        return [html.unescape(address) for address in re.findall(r'href="([^"]*)"', body)]

    def add(self, table, *rows):
        with engines.write(self.app.engine) as connection:
            for row in rows:
                connection.execute(table.insert(), row)

    def add_definition(self, key, number=1, kind="audience"):
        row = {"definition_id": number, "key": key, "name": key, "kind": kind, "created_at": START - HOUR}
        self.add(tables.definitions, row)

    def add_run(self, run_id, definition_id=1, at=START, **columns):
        row = {"mode": "changes", "trigger": "schedule", "status": "succeeded", "member_count": 1}
        row |= {"run_id": run_id, "definition_id": definition_id, "as_of": at, "started_at": at}
        self.add(tables.runs, row | {"finished_at": at} | columns)

    def add_delivery(self, subject, status="pending", *, run_id=None, call_id=None, **columns):
        row = {"action": "identify", "subject_id": subject, "body": {"vips": True}, "class": "call"}
        row |= {"value_at": START, "status": status, "created_at": START, "next_attempt_at": START}
        of_run = {"run_id": run_id, "definition_id": 1, "class": "change"}
        row |= {"call_id": call_id or 1} if run_id is None else of_run
        self.add(tables.deliveries, row | FACTS.get(status, {}) | columns)


def open_pages(url, folder, text=""):
    path = folder / "audience_sync.toml"
    path.write_text(f'[database]\nurl = "{url}"\n[destination]\napi_key = "k"\n{text}\n')
    return Pages(App(settings.load(path, {}), engines.open_own(url, "audience_sync"), HandClock()))
