"""Definitions over a table `people` in our own database, synced at moments that a test sets."""

import datetime as dt
import time
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa

from audience_sync.audiences import runs
from audience_sync.audiences.definition import Definition, Guard, Kind
from audience_sync.db import dialects, engines, tables
from audience_sync.queue.destination import Destination

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
WARY = Guard(above=4, max_exit_ratio=0.5, max_enter_ratio=1.0)
FIVE = ["ann", "bob", "cid", "dan", "eve"]


@dataclass
class HandClock:
    """A clock that a test sets; it advances by a second each time it is read."""

    moment: dt.datetime = START

    def now(self):
        self.moment += dt.timedelta(seconds=1)
        return self.moment

    def monotonic(self):
        return (self.moment - START).total_seconds()

    def sleep(self, seconds):
        self.moment += dt.timedelta(seconds=seconds)


@dataclass
class World:
    """A database with people, and helpers to sync definitions and read the results."""

    engine: sa.Engine
    clock: HandClock = field(default_factory=HandClock)

    def audience(self, sql="SELECT user_id FROM people", key="vips", **options):
        return Definition(key, key, Kind.AUDIENCE, sql, **options)

    def trait(self, sql="SELECT user_id, value FROM people", key="spend", **options):
        return Definition(key, key, Kind.TRAIT, sql, **options)

    def execute(self, statement, **parameters):
        with engines.write(self.engine) as connection:
            return dialects.sql(connection, statement, **parameters)

    def query(self, statement, **parameters):
        with engines.read(self.engine) as connection:
            return [tuple(row) for row in dialects.sql(connection, statement, **parameters)]

    def wait_for_statements(self):
        """Wait until PostgreSQL runs no statement in this database; a cancelled one must end within seconds."""
        if dialects.is_sqlite(self.engine):
            return
        others = "datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()"
        deadline = time.monotonic() + 30
        while self.query(f"SELECT query FROM pg_stat_activity WHERE {others}"):
            assert time.monotonic() < deadline, "a statement is still running"
            time.sleep(0.1)

    def people(self, *rows):
        """Replace the people: user ids, or pairs of a user id and a value."""
        pairs = [row if isinstance(row, tuple) else (row, None) for row in rows]
        table = sa.table("people", sa.column("user_id"), sa.column("value"), schema=self.schema)
        with engines.write(self.engine) as connection:
            connection.execute(table.delete())
            if pairs:
                connection.execute(table.insert(), [{"user_id": u, "value": v} for u, v in pairs])

    @property
    def schema(self):
        return None if dialects.is_sqlite(self.engine) else "public"

    def sync(self, definition, source=None, fingerprint=None, **options):
        """Sync a definition for a destination; return the row of its run."""
        now = self.clock.now()
        as_of = runs.resolve_as_of(self.engine, [definition], None, now)[definition.key]
        options = runs.RunOptions(**options, destination=Destination(fingerprint))
        return self.run(runs.sync(self.engine, definition, as_of, self.clock, options, source=lambda: source))

    def run(self, run_id):
        with engines.read(self.engine) as connection:
            return connection.execute(sa.select(tables.runs).where(tables.runs.c.run_id == run_id)).one()

    def members(self, key="vips"):
        return dict(
            self.query(
                "SELECT m.user_id, m.value FROM {our}members m JOIN {our}definitions d "
                "ON d.definition_id = m.definition_id WHERE d.key = :key",
                key=key,
            )
        )

    def deliveries(self, run_id):
        """Return (user, body, status) of a run's deliveries, ordered by user."""
        return self.query(
            "SELECT subject_id, CAST(body AS text), status FROM {our}deliveries WHERE run_id = :run_id "
            "ORDER BY subject_id, delivery_id",
            run_id=run_id,
        )

    def settle(self, status, where="true", *, attempts=1):
        """Settle pending deliveries as if a worker had sent them."""
        now = self.clock.now()
        self.execute(
            "UPDATE {our}deliveries SET status = :status, attempt_count = attempt_count + :attempts, "
            "request_id = 1, error = :error, settled_at = :settled WHERE status = 'pending' AND " + where,
            status=status,
            attempts=attempts,
            error="refused" if status == "dead" else None,
            settled=now,
        )


@pytest.fixture
def world(engine):
    with engines.write(engine) as connection:
        schema = "" if dialects.is_sqlite(engine) else "public."
        dialects.sql(connection, f"CREATE TABLE {schema}people (user_id text, value double precision)")
    return World(engine)


@pytest.fixture
def known(world):
    """Five members whose deliveries were accepted."""
    world.people(*FIVE)
    world.sync(world.audience())
    world.settle("accepted")
    return world


def held(world):
    return world.query("SELECT run_id, held_by, error FROM {our}runs WHERE status = 'held'")


def counts(run):
    return (run.member_count, run.entered_count, run.exited_count, run.changed_count)
