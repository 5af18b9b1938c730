"""A daemon over a company's people, whose clock the test sets."""

import datetime as dt
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

from audience_sync import history, settings
from audience_sync.app import App
from audience_sync.audiences import slots
from audience_sync.daemon import Daemon
from audience_sync.db import dialects, engines

BERLIN = "Europe/Berlin"
HOUR = dt.timedelta(hours=1)
USERS = [f"u{number}" for number in range(6)]
CONFIGURATION = """
[database]
url = "{url}"
[destination]
endpoint = "{endpoint}"
api_key = "{key}"
identify_per_minute = 100_000
[defaults]
schedule = "30 2 * * *"
full_schedule = "0 3 1 * *"
timezone = "Europe/Berlin"
guard_above = 5
[[audiences]]
name = "In"
sql = "SELECT user_id FROM people WHERE is_in = 1"
"""


@dataclass
class SetClock:
    moment: dt.datetime

    def now(self):
        return self.moment

    def monotonic(self):
        return self.moment.timestamp()

    def sleep(self, seconds):
        self.moment += dt.timedelta(seconds=seconds)


def utc(text):
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def take_due(engine, definitions, now, *, limit, running=()):
    """Take at most `limit` due slots of these definitions; `running` are keys to skip."""
    return slots.take(engine, slots.find_due(engine, definitions, now, running), now, limit=limit)


class Life:
    """A daemon that ticks and delivers once an hour, and the company's people."""

    def __init__(self, url, path, sandbox):
        self.url, self.path, self.sandbox = url, path, sandbox
        self.company = sa.create_engine(url)
        self.run("CREATE TABLE people (user_id text, is_in integer)")
        self.run(f"INSERT INTO people VALUES {', '.join(f'({user!r}, 1)' for user in USERS)}")
        self.write("sandbox")
        self.clock = SetClock(utc("2026-03-15 00:00"))
        self.daemon = self.begin()

    def run(self, statement):
        with self.company.begin() as connection:
            connection.exec_driver_sql(statement)

    def write(self, key):
        text = CONFIGURATION.format(url=self.url, endpoint=self.sandbox.url, key=key)
        self.path.write_text(text, encoding="utf-8")

    def tick_at(self, text):
        self.clock.moment = utc(text)
        self.daemon.tick()

    def status(self):
        app = self.daemon.app
        with engines.read(app.engine) as connection:
            return history.status(connection, app.settings, self.clock.now())

    def begin(self):
        loaded = settings.load(self.path, {})
        app = App(loaded, engines.open_own(self.url, "audience_sync"), self.clock)
        return Daemon(app, App.reloaded, start=lambda _, work: work())

    def live_until(self, text):
        """Tick and deliver every hour until that time, UTC."""
        while self.clock.moment < utc(text):
            self.clock.moment = self.clock.moment.replace(minute=0, second=0, microsecond=0) + HOUR
            self.daemon.tick()
            self.daemon.deliver()

    def set_in(self, users):
        self.run("UPDATE people SET is_in = 0")
        for user in users:
            self.run(f"UPDATE people SET is_in = 1 WHERE user_id = {user!r}")

    def members_at_userpilot(self):
        state = self.sandbox.state.snapshot()["users"]
        return {user for user, each in state.items() if each["properties"].get("in")}

    def history(self):
        with engines.read(self.daemon.app.engine) as connection:
            return history.run_rows(connection)[::-1]

    def slots(self):
        with engines.read(self.daemon.app.engine) as connection:
            rows = dialects.sql(connection, "SELECT slot_at FROM {our}schedule_slots ORDER BY slot_at")
            return [str(slot_at)[:16] for (slot_at,) in rows]

    def close(self):
        self.daemon.app.close()
        self.company.dispose()


@pytest.fixture
def life(url, tmp_path, sandbox):
    life = Life(url, tmp_path / "audience_sync.toml", sandbox)
    yield life
    life.close()
