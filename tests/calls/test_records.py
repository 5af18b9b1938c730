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
CALLS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["identify", "identify", "group", "track"]),
        "user": st.sampled_from(["ann", "bob"]),
        "company": st.sampled_from(["acme", "bolt"]),
        "hour": st.integers(0, 4),  # few: many calls have one moment
        "traits": TRAITS,
    }
)


def store(engine, raws):
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


def raw(call, prefix):
    """The call in Segment's form, of users and companies that no other example has."""
    members = {
        "identify": {"traits": call["traits"]},
        "group": {"traits": call["traits"], "groupId": prefix + call["company"]},
        "track": {"event": "Clicked", "properties": call["traits"]},
    }
    return {
        "type": call["type"],
        "userId": prefix + call["user"],
        "messageId": f"m{next(_numbers)}",
        "timestamp": (NOON + dt.timedelta(hours=call["hour"])).isoformat(),
        **members[call["type"]],
    }


class Model:
    """One call after another: the newest timestamp wins; if timestamps are equal, the later arrival."""

    def __init__(self):
        self.users, self.companies = {}, {}

    def take(self, call):
        at = call["hour"]
        user = self._seen(self.users, call["user"], at)
        if call["type"] == "identify":
            self._learn(user, call["traits"], at)
        if call["type"] == "group":
            self._learn(self._seen(self.companies, call["company"], at), call["traits"], at)
            self._learn(user, {"@company": call["company"]}, at)

    @staticmethod
    def _seen(known, name, at):
        subject = known.setdefault(name, {"values": {}, "seen": set()})
        subject["seen"].add(at)
        return subject

    @staticmethod
    def _learn(subject, traits, at):
        for name, value in traits.items():
            if name not in subject["values"] or subject["values"][name][0] <= at:
                subject["values"][name] = (at, value)

    @staticmethod
    def expected(known):
        """By name: traits, company, first and last hour."""
        rows = {}
        for name, subject in known.items():
            traits = {each: value for each, (_, value) in subject["values"].items() if value is not None}
            company = traits.pop("@company", None)
            rows[name] = (traits, company, min(subject["seen"]), max(subject["seen"]))
        return rows


def stored(engine, table, key, prefix):
    with engines.read(engine) as connection:
        stored_rows = connection.execute(
            table.select().where(table.c[key].startswith(prefix, autoescape=True))
        ).all()
    return {
        row[0].removeprefix(prefix): (
            row.traits,
            row.company_id.removeprefix(prefix) if table is tables.profiles and row.company_id else None,
            (row.first_seen_at - NOON) // dt.timedelta(hours=1),
            (row.last_seen_at - NOON) // dt.timedelta(hours=1),
        )
        for row in stored_rows
    }


@pytest.mark.parametrize("many", [1, rows.COPY_FROM], ids=["many", "few"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(batches=st.lists(st.lists(CALLS, min_size=1, max_size=8), min_size=1, max_size=4))
def test_profiles_and_companies_equal_those_of_the_model(engine, many, monkeypatch, batches):
    monkeypatch.setattr(rows, "COPY_FROM", many)
    prefix = f"{next(_numbers)}-"
    model = Model()
    for batch in batches:
        store(engine, [raw(call, prefix) for call in batch])
        for call in batch:
            model.take(call)
    assert stored(engine, tables.profiles, "user_id", prefix) == Model.expected(model.users)
    assert stored(engine, tables.companies, "company_id", prefix) == Model.expected(model.companies)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_repeat_whose_id_lies_between_new_ids_stays_a_repeat(engine):
    def identify(*message_ids):
        return store(
            engine, [{"type": "identify", "userId": "ann", "messageId": each} for each in message_ids]
        )

    def say(statement):
        with engines.write(engine) as connection:
            dialects.sql(connection, statement)

    sequence = "{our}calls_call_id_seq"
    say(f"SELECT setval('{sequence}', 2)")
    assert [each.call_id for each in identify("m1", "m2")] == [3, 4]
    # The next ids are 5, 6, 1 and 2: others took those between.
    say(f"ALTER SEQUENCE {sequence} MAXVALUE 6 CYCLE")
    again = identify("m0", "m1", "m2", "m3")
    assert [each.is_repeat for each in again] == [False, True, True, False]
    with engines.read(engine) as connection:
        assert dialects.sql(connection, "SELECT count(*) FROM {our}deliveries").scalar() == 4
