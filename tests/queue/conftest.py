"""A queue that tests fill, a clock that they set, and workers on them."""

import datetime as dt
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import pytest
import sqlalchemy as sa

from audience_sync.clock import SystemClock
from audience_sync.db import dialects, engines
from audience_sync.db.tables import deliveries, leases, requests
from audience_sync.queue.worker import DeliverySettings, Worker
from audience_sync.userpilot import payloads
from audience_sync.userpilot.client import Client

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
FAST = {"identify": 1_000_000, "track": 1_000_000, "company": 1_000_000}


@dataclass
class HandClock:
    """A clock whose time passes only by sleeping."""

    seconds: float = 0.0

    def now(self):
        return START + dt.timedelta(seconds=self.seconds)

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds


@dataclass
class Queue:
    """The queue's tables, filled and read without the code under test."""

    engine: sa.Engine
    clock: object = field(default_factory=SystemClock)
    _runs: object = field(default_factory=lambda: itertools.count(1))

    def add(self, subject, body, *, action="identify", kind="call", at=None, **columns):
        now = self.clock.now()
        number = next(self._runs)
        origin = {"call_id": number} if kind == "call" else {"run_id": number, "definition_id": 1}
        row = {
            "action": action,
            "subject_id": subject,
            "body": body,
            "class": kind,
            "value_at": at or now,
            "status": "pending",
            "created_at": now,
            "next_attempt_at": now,
        }
        with engines.write(self.engine) as connection:
            result = connection.execute(deliveries.insert().values(row | origin | columns))
            return result.inserted_primary_key[0]

    def track(self, subject, event, **columns):
        return self.add(subject, {"event_name": event}, action="track", **columns)

    def fill(self, count, *, kind="change", prefix="u", **columns):
        with engines.write(self.engine) as connection:
            connection.execute(
                deliveries.insert(),
                [
                    {
                        "action": "identify",
                        "subject_id": f"{prefix}{number}",
                        "body": {"vip": True},
                        "class": kind,
                        "run_id": 1,
                        "definition_id": 1,
                        "value_at": self.clock.now(),
                        "status": "pending",
                        "created_at": self.clock.now(),
                        "next_attempt_at": self.clock.now(),
                    }
                    | columns
                    for number in range(count)
                ],
            )

    def rows(self, *where):
        with engines.read(self.engine) as connection:
            query = sa.select(deliveries).where(*where).order_by(deliveries.c.delivery_id)
            return list(connection.execute(query))

    def row(self, delivery_id):
        return self.rows(deliveries.c.delivery_id == delivery_id)[0]

    def statuses(self):
        with engines.read(self.engine) as connection:
            query = sa.select(deliveries.c.status).order_by(deliveries.c.delivery_id)
            return list(connection.execute(query).scalars())

    def counts(self):
        return dict(Counter(self.statuses()))

    def requests(self):
        with engines.read(self.engine) as connection:
            return list(connection.execute(sa.select(requests).order_by(requests.c.request_id)))

    def update(self, delivery_id, **columns):
        with engines.write(self.engine) as connection:
            connection.execute(
                deliveries.update().where(deliveries.c.delivery_id == delivery_id).values(columns)
            )

    def crash(self, delivery_id):
        """Leave a delivery in the state in which a process that is killed while sending leaves it."""
        with engines.write(self.engine) as connection:
            inserted = connection.execute(
                requests.insert().values(
                    lane=self.row(delivery_id).action, epoch=1, started_at=self.clock.now(), delivery_count=1
                )
            )
            connection.execute(
                deliveries.update()
                .where(deliveries.c.delivery_id == delivery_id)
                .values(status="sending", attempt_count=1, request_id=inserted.inserted_primary_key[0])
            )

    def lose_lease(self):
        """Raise the lease's epoch, as a process that takes over does."""
        with engines.write(self.engine) as connection:
            connection.execute(leases.update().values(epoch=leases.c.epoch + 1))

    def hold_lease(self, seconds=60):
        """Take the lease, as a process on another host does."""
        until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
        with engines.write(self.engine) as connection:
            connection.execute(leases.delete())
            connection.execute(
                leases.insert().values(
                    name="queue", owner="other", host="elsewhere", pid=1, epoch=7, expires_at=until
                )
            )

    def free_lease(self):
        with engines.write(self.engine) as connection:
            connection.execute(leases.update().values(owner=None, host=None, pid=None, expires_at=None))


class HeldSenders:
    """Senders in one thread: requests are sent when their replies are collected."""

    def __init__(self, clock):
        self.clock, self.sends = clock, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, send):
        self.sends.append(send)

    def collect(self, _seconds):
        replies, self.sends = [send() for send in self.sends], []
        return replies


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set; the database's goes with it, except for leases."""
    clock = HandClock()
    monkeypatch.setattr(dialects, "now", lambda _: clock.now())
    return clock


@pytest.fixture
def queue(engine):
    return Queue(engine)


@pytest.fixture
def hand_queue(engine, clock):
    """A queue with the clock that tests set."""
    return Queue(engine, clock)


def settings_of(**changes):
    build = partial(payloads.build, booleans="native", nested="flatten")
    defaults = {
        "per_minute": dict(FAST),
        "build": build,
        "grace": dt.timedelta(seconds=0.05),
        "poll_seconds": 0.02,
    }
    return DeliverySettings(**(defaults | changes))


@pytest.fixture
def worker_of(engine, sandbox):
    """Make workers that send to the sandbox over its socket."""
    clients = []

    def make(*, on=None, sender=None, clock=None, on_progress=lambda _: None, **changes):
        if sender is None:
            sender = Client(sandbox.url, "sandbox", deadline_seconds=5)
            clients.append(sender)
        return Worker(
            on or engine,
            sender,
            settings_of(**changes),
            clock or SystemClock(),
            rng=random.Random(1),
            on_progress=on_progress,
        )

    yield make
    for client in clients:
        client.close()


def log(sandbox):
    return [(entry.user_id, entry.body.get("metadata")) for entry in sandbox.state.requests]


def properties(sandbox):
    return {user: state["properties"] for user, state in sandbox.state.users.items()}
