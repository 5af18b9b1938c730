"""Calls are merged into profiles and companies as a slow, obvious model merges them."""

import datetime as dt
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync.calls import mappings, records, validation
from audience_sync.db import dialects, engines, rows, tables

NOON = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
_numbers = itertools.count()

TRAITS = st.dictionaries(
    st.sampled_from(["plan", "seats", "größe"]),
    st.sampled_from([None, 0, 1.5, "pro", True, ["a"], {"b": None}]),
)
TOLD = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["identify", "identify", "group", "track"]),
        "user": st.sampled_from(["ann", "bob"]),
        "company": st.sampled_from(["acme", "bolt"]),
        "hour": st.integers(0, 4),  # few: many calls have one moment
        "traits": TRAITS,
    }
)


def keep(engine, raws):
    parsed = [
        validation.parse_call(raw, received_at=NOON + dt.timedelta(days=9), new_id=lambda: "none")
        for raw in raws
    ]
    prepared = [
        records.prepare_call(call, mappings.decide(call, mappings.PRESETS, reserved_keys=()))
        for call in parsed
    ]
    with engines.write(engine) as connection:
        return records.save_calls(connection, prepared, received_at=NOON, fingerprint=None)


def raw(told, prefix):
    """The call in Segment's form, of users and companies that no other example has."""
    members = {
        "identify": {"traits": told["traits"]},
        "group": {"traits": told["traits"], "groupId": prefix + told["company"]},
        "track": {"event": "Clicked", "properties": told["traits"]},
    }
    return {
        "type": told["type"],
        "userId": prefix + told["user"],
        "messageId": f"m{next(_numbers)}",
        "timestamp": (NOON + dt.timedelta(hours=told["hour"])).isoformat(),
        **members[told["type"]],
    }


class Model:
    """One call after the other: the newest timestamp wins, of equal ones the later arrival."""

    def __init__(self):
        self.users, self.companies = {}, {}

    def take(self, told):
        at = told["hour"]
        user = self._seen(self.users, told["user"], at)
        if told["type"] == "identify":
            self._learn(user, told["traits"], at)
        if told["type"] == "group":
            self._learn(self._seen(self.companies, told["company"], at), told["traits"], at)
            self._learn(user, {"@company": told["company"]}, at)

    @staticmethod
    def _seen(known, name, at):
        found = known.setdefault(name, {"values": {}, "seen": set()})
        found["seen"].add(at)
        return found

    @staticmethod
    def _learn(subject, traits, at):
        for name, value in traits.items():
            if name not in subject["values"] or subject["values"][name][0] <= at:
                subject["values"][name] = (at, value)

    @staticmethod
    def told(known):
        """By name: traits, company, first and last hour."""
        found = {}
        for name, subject in known.items():
            traits = {each: value for each, (_, value) in subject["values"].items() if value is not None}
            company = traits.pop("@company", None)
            found[name] = (traits, company, min(subject["seen"]), max(subject["seen"]))
        return found


def kept(engine, table, key, prefix):
    with engines.read(engine) as connection:
        found = connection.execute(
            table.select().where(table.c[key].startswith(prefix, autoescape=True))
        ).all()
    return {
        row[0].removeprefix(prefix): (
            row.traits,
            row.company_id.removeprefix(prefix) if table is tables.profiles and row.company_id else None,
            (row.first_seen_at - NOON) // dt.timedelta(hours=1),
            (row.last_seen_at - NOON) // dt.timedelta(hours=1),
        )
        for row in found
    }


@pytest.mark.parametrize("many", [1, rows.COPY_FROM], ids=["many", "few"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(batches=st.lists(st.lists(TOLD, min_size=1, max_size=8), min_size=1, max_size=4))
def test_profiles_and_companies_equal_those_of_the_model(engine, many, monkeypatch, batches):
    monkeypatch.setattr(rows, "COPY_FROM", many)
    prefix = f"{next(_numbers)}-"
    model = Model()
    for batch in batches:
        keep(engine, [raw(told, prefix) for told in batch])
        for told in batch:
            model.take(told)
    assert kept(engine, tables.profiles, "user_id", prefix) == Model.told(model.users)
    assert kept(engine, tables.companies, "company_id", prefix) == Model.told(model.companies)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_repeat_whose_id_lies_between_new_ids_stays_a_repeat(engine):
    def identify(*message_ids):
        return keep(
            engine, [{"type": "identify", "userId": "ann", "messageId": each} for each in message_ids]
        )

    def say(statement):
        with engines.write(engine) as connection:
            dialects.sql(connection, statement)

    sequence = "{our}calls_call_id_seq"
    say(f"SELECT setval('{sequence}', 2)")
    assert [each.call_id for each in identify("m1", "m2")] == [3, 4]
    say(
        f"ALTER SEQUENCE {sequence} MAXVALUE 6 CYCLE"
    )  # the next ids are 5, 6, 1 and 2: others took those between
    again = identify("m0", "m1", "m2", "m3")
    assert [each.is_repeat for each in again] == [False, True, True, False]
    with engines.read(engine) as connection:
        assert dialects.sql(connection, "SELECT count(*) FROM {our}deliveries").scalar() == 4
