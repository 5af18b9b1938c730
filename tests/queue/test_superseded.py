"""Superseded values, compared with a model that compares all pairs of values."""

import datetime as dt
import random

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import deliveries
from audience_sync.queue import superseded

NOON = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
NEWER = ["accepted", "sending"]


def row(chance, number):
    status = chance.choice(["pending", "accepted", "sending", "dead"])
    return {
        "action": chance.choice(["identify", "company"]), "subject_id": chance.choice(["ann", "bob"]),
        "body": dict.fromkeys(chance.sample("abc", chance.randint(0, 2)), number), "class": "call", "call_id": number,
        "value_at": NOON + dt.timedelta(hours=chance.randint(0, 3)), "status": status, "created_at": NOON,
        "next_attempt_at": NOON, "request_id": number, "error": "refused",
        "settled_at": NOON if status in {"accepted", "dead"} else None,
    }  # fmt: skip


def model(values, rows):
    superseded = {}
    for value in values:
        names = {
            name
            for other in rows
            if other.status in NEWER
            and (other.action, other.subject_id) == (value.action, value.subject_id)
            and (other.value_at, other.delivery_id) > (value.value_at, value.delivery_id)
            for name in other.body
            if name in value.body
        }
        if names:
            superseded[value.delivery_id] = names
    return superseded


@pytest.mark.parametrize("seed", range(20))
def test_each_value_is_compared_with_all_newer_ones(engine, seed):
    chance = random.Random(seed)
    with engines.write(engine) as connection:
        connection.execute(deliveries.insert(), [row(chance, number) for number in range(1, 30)])
        rows = connection.execute(sa.select(deliveries)).all()
        values = [each for each in rows if each.status == "pending"]
        chance.shuffle(values)
        by_delivery = superseded.superseded_traits(connection, values, NEWER)
    assert {key: set(names) for key, names in by_delivery.items()} == model(values, rows)
