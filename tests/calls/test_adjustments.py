"""A profile leaves traits out of its calls, and sends null for properties that a trait no longer has."""

import datetime as dt
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync.calls import adjustments, mappings, profiles, records, validation
from audience_sync.db import engines, tables
from audience_sync.queue import outcomes
from audience_sync.userpilot import payloads

NOON = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)


class Userpilot:
    """Saves calls of one user and company, and sends what they queue in one request for each."""

    def __init__(self, engine, nested="flatten", reserved=()):
        self.engine, self.nested, self.reserved = engine, nested, reserved
        self.number, self.sent = 0, 0
        self.properties = {"identify": {}, "company": {}}
        self.last = None

    def call(self, traits, call_type="identify", at=None, user="ann", **fields):
        """Save a call, an hour after the one before unless `at` says another hour."""
        self.number += 1
        hour = self.number if at is None else at
        raw = {
            "type": call_type,
            "userId": user,
            "groupId": "acme",
            "traits": traits,
            "messageId": f"m{self.number}",
            "timestamp": (NOON + dt.timedelta(hours=hour)).isoformat(),
            **fields,
        }
        received_at = NOON + dt.timedelta(hours=max(hour, self.number))
        parsed = validation.parse_call(raw, received_at=received_at, new_id=str)
        decision = mappings.decide(parsed, mappings.PRESETS, reserved_keys=self.reserved)
        prepared = records.prepare_call(parsed, decision, flatten=self.nested == "flatten")
        with engines.write(self.engine) as connection:
            return records.save_calls(connection, [prepared], received_at=received_at, fingerprint=None)[0]

    def deliver(self):
        """Send all queued deliveries of each subject in one request; return the last payload's metadata."""
        deliveries = tables.deliveries
        with engines.read(self.engine) as connection:
            rows = connection.execute(
                deliveries.select()
                .where(deliveries.c.delivery_id > self.sent)
                .order_by(deliveries.c.value_at, deliveries.c.delivery_id)
            ).all()
        self.sent = max([self.sent, *(row.delivery_id for row in rows)])
        for action, properties in self.properties.items():
            of_action = [row for row in rows if row.action == action]
            if not of_action:
                continue
            body = outcomes.body_of(of_action)
            _, payload = payloads.build(action, "any", body, booleans="native", nested=self.nested)
            self.last = payload["metadata"]
            properties.update(self.last)
            for name in [name for name, value in properties.items() if value is None]:
                del properties[name]
        return self.last


@pytest.mark.parametrize("call_type", ["identify", "group"])
@pytest.mark.parametrize(
    ("before", "after", "sent"),
    [
        (["a", "b"], ["c"], {"t.0": "c", "t.1": None}),
        (["a", "b"], [], {"t.0": None, "t.1": None}),
        ({"city": "Rome", "zip": "1"}, {"city": "Bern"}, {"t.city": "Bern", "t.zip": None}),
        ({"city": "Rome"}, {}, {"t.city": None}),
        ({"geo": {"lat": 1, "lon": 2}}, {"geo": {"lat": 3}}, {"t.geo.lat": 3, "t.geo.lon": None}),
        ([{"sku": "A", "price": 1}], [{"sku": "B"}], {"t.0.sku": "B", "t.0.price": None}),
        (["a", "b"], "c", {"t": "c", "t.0": None, "t.1": None}),
        ({"city": "Rome"}, 7, {"t": 7, "t.city": None}),
        ({"city": "Rome"}, None, {"t": None, "t.city": None}),
        ("Rome", {"city": "Rome"}, {"t": None, "t.city": "Rome"}),
        ("Rome", ["Rome"], {"t": None, "t.0": "Rome"}),
        ("Rome", [], {"t": None}),
        (["a"], {"city": "Rome"}, {"t.0": None, "t.city": "Rome"}),
        ({"city": "Rome"}, ["a"], {"t.0": "a", "t.city": None}),
        ({"a": 1}, {"a": {"b": 1}}, {"t.a": None, "t.a.b": 1}),
        ([], ["a"], {"t.0": "a"}),
        ("a", "b", {"t": "b"}),
        ({"@value": 1, "@gone": ["x"]}, {"@value": 2}, {"t.@value": 2, "t.@gone.0": None}),
    ],
)
def test_parts_that_a_value_no_longer_has_become_null(engine, call_type, before, after, sent):
    userpilot = Userpilot(engine)
    userpilot.call({"t": before}, call_type)
    userpilot.deliver()
    userpilot.call({"t": after}, call_type)
    userpilot.deliver()
    assert userpilot.last == sent


def test_an_empty_list_that_was_never_anything_else_makes_no_property(engine):
    userpilot = Userpilot(engine)
    userpilot.call({"tags": [], "address": {}, "deep": {"none": []}, "plan": "pro"})
    assert userpilot.deliver() == {"plan": "pro"}


def test_names_vanish_in_order_when_calls_are_merged(engine):
    userpilot = Userpilot(engine)
    userpilot.call({"tags": ["a", "b", "c"]})
    userpilot.deliver()
    userpilot.call({"tags": ["a", "b"]})
    userpilot.call({"tags": ["x"], "plan": "pro"})
    assert userpilot.deliver() == {"tags.0": "x", "tags.1": None, "tags.2": None, "plan": "pro"}
    userpilot.call({"tags": []})
    userpilot.call({"tags": ["y", "z"]})
    userpilot.deliver()
    assert userpilot.properties["identify"] == {"tags.0": "y", "tags.1": "z", "plan": "pro"}


def test_a_name_that_returns_is_not_null(engine):
    userpilot = Userpilot(engine)
    for tags in (["a", "b"], ["a"], ["a", "b"]):
        userpilot.call({"tags": tags})
    assert userpilot.deliver() == {"tags.0": "a", "tags.1": "b"}


def test_calls_of_one_batch_are_compared_with_each_other(engine):
    userpilot = Userpilot(engine)
    calls = [
        {"type": "identify", "userId": "ann", "traits": {"tags": tags}, "messageId": str(number)}
        for number, tags in enumerate((["a", "b"], ["a"], []))
    ]
    prepared = []
    for raw in calls:
        parsed = validation.parse_call(raw, received_at=NOON, new_id=str)
        decision = mappings.decide(parsed, mappings.PRESETS, reserved_keys=())
        prepared.append(records.prepare_call(parsed, decision))
    with engines.write(engine) as connection:
        records.save_calls(connection, prepared, received_at=NOON, fingerprint=None)
    assert userpilot.deliver() == {"tags.0": None, "tags.1": None}


def test_an_older_call_that_comes_late_does_not_leave_its_names(engine):
    userpilot = Userpilot(engine)
    userpilot.call({"tags": ["new"]}, at=5)
    userpilot.call({"tags": ["old", "older"]}, at=1)
    userpilot.call({"tags": ["newest"]}, at=9)
    assert userpilot.deliver() == {"tags.0": "newest", "tags.1": None}


def test_values_that_were_not_sent_do_not_hide_values_that_were_sent(engine):
    userpilot = Userpilot(engine)
    userpilot.call({"tags": ["a", "b"]})
    userpilot.deliver()
    userpilot.call({"tags": "none"}, integrations={"Userpilot": False})
    userpilot.call({"tags": ["c"]})
    userpilot.deliver()
    assert userpilot.properties["identify"] == {"tags.0": "c"}


def test_a_property_of_another_trait_is_left_alone(engine):
    userpilot = Userpilot(engine)
    userpilot.call({"a": {"b": 1, "c": 1}})
    userpilot.deliver()
    userpilot.call({"a.b": 2})
    userpilot.deliver()
    userpilot.call({"a": {"d": 3}})
    userpilot.deliver()
    assert userpilot.properties["identify"] == {"a.b": 2, "a.d": 3}


def test_as_json_text_nothing_changes(engine):
    userpilot = Userpilot(engine, nested="json")
    for tags in (["a", "b"], ["a"], []):
        userpilot.call({"tags": tags})
        assert userpilot.deliver() == {"tags": json.dumps(tags, separators=(",", ":"))}
    with engines.read(engine) as connection:
        bodies = [row.body for row in connection.execute(tables.deliveries.select())]
    assert bodies == [{"tags": ["a", "b"]}, {"tags": ["a"]}, {"tags": []}]


def test_a_week_later_a_vanished_name_is_not_sent_again(engine):
    userpilot = Userpilot(engine)
    userpilot.call({"tags": ["a", "b"]})
    userpilot.call({"tags": ["a"]})
    userpilot.deliver()
    userpilot.call({"tags": ["c"]}, at=24 * 6)
    assert userpilot.deliver() == {"tags.0": "c", "tags.1": None}
    userpilot.call({"tags": ["d"]}, at=24 * 8)
    assert userpilot.deliver() == {"tags.0": "d"}


@pytest.mark.parametrize("nested", ["flatten", "json"])
def test_a_profile_has_a_limit_of_traits(engine, nested):
    userpilot = Userpilot(engine, nested)
    for start in range(0, 1_000, 250):
        userpilot.call({f"t{number}": 1 for number in range(start, start + 250)})
    receipt = userpilot.call({"t0": 2, "new": 3, "newer": None})
    assert (receipt.left_out, receipt.ignored) == (("new",), None)
    assert receipt.corrected == ("traits beyond the profile's 1,000 or 256 KB are left out",)
    with engines.read(engine) as connection:
        call = connection.execute(
            tables.calls.select().where(tables.calls.c.call_id == receipt.call_id)
        ).one()
        profile = connection.execute(tables.profiles.select()).one()
    assert (call.left_out, call.corrected) == ({"new": 3}, list(receipt.corrected))
    assert (len(profile.traits), profile.traits["t0"], "new" in profile.traits) == (1_000, 2, False)
    userpilot.deliver()
    assert "new" not in userpilot.properties["identify"]
    userpilot.call({"t1": None})
    assert userpilot.call({"new": 4}).left_out == ()


def test_the_times_of_removed_traits_have_a_limit(engine):
    userpilot = Userpilot(engine)
    for start in range(0, 1_500, 250):
        userpilot.call({f"t{number}": None for number in range(start, start + 250)})
    with engines.read(engine) as connection:
        profile = connection.execute(tables.profiles.select()).one()
    assert (profile.traits, len(profile.trait_times), "t0" in profile.trait_times) == ({}, 1_000, False)


VALUES = st.recursive(
    st.sampled_from([None, 1, "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab0"), inner, max_size=3),
    max_leaves=5,
)
CALLS = st.tuples(
    st.dictionaries(st.sampled_from(["t", "u", "t.a"]), VALUES, min_size=1, max_size=2), st.booleans()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(calls=st.lists(CALLS, min_size=1, max_size=6))
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_userpilot_ends_with_the_properties_of_the_newest_values(engine, calls):
    """In any merging of calls. If two traits have the same property, its value may be from either trait."""
    userpilot = Userpilot(engine)
    with engines.write(engine) as connection:
        for table in (tables.profiles, tables.calls, tables.deliveries):
            connection.execute(table.delete())
    newest = {}
    for traits, is_delivered in calls:
        userpilot.call(traits)
        newest |= traits
        if is_delivered:
            userpilot.deliver()
    userpilot.deliver()
    wanted = {
        name
        for trait, value in newest.items()
        for name, leaf in payloads.trait_properties({trait: value}, "flatten").items()
        if leaf is not None
    }
    found = {name for name in userpilot.properties["identify"] if "~" not in name}
    nulls = {
        name
        for trait, value in newest.items()
        for name, leaf in payloads.trait_properties({trait: value}, "flatten").items()
        if leaf is None
    }
    shared = any(name.startswith("t.a") for name in newest) and "t" in newest
    assert shared or (found <= wanted and wanted - found <= nulls)


def identify(traits, number):
    raw = {"type": "identify", "userId": "ann", "traits": traits, "messageId": f"m{number}"}
    parsed = validation.parse_call(raw, received_at=NOON, new_id=str)
    return records.prepare_call(parsed, mappings.decide(parsed, mappings.PRESETS, reserved_keys=()))


def test_a_profile_has_a_limit_of_size(engine):
    userpilot = Userpilot(engine)
    large = "x" * 26_000
    for number in range(10):
        assert userpilot.call({f"t{number}": large}).left_out == ()
    assert userpilot.call({"small": 1, "long": {"a": large}}).left_out == ("long",)
    assert userpilot.call({"t0": [large, 4_000 * "y"], "t2": "short"}).left_out == ("t0",)
    assert userpilot.call({"t1": None, "t3": large[1:]}).left_out == ()
    assert userpilot.call({"new": [large]}).left_out == ()
    assert userpilot.call({"newer": large}).left_out == ()
    assert userpilot.call({"newest": large}).left_out == ("newest",)
    with engines.read(engine) as connection:
        traits = connection.execute(tables.profiles.select()).one().traits
    assert (traits["small"], traits["t0"], traits["t2"], "t1" in traits) == (1, large, "short", False)
    length = len(json.dumps(traits, separators=(",", ":")))
    assert profiles.MAX_PROFILE_LENGTH - 30_000 < length <= profiles.MAX_PROFILE_LENGTH


@pytest.mark.parametrize("size", [1, 2])
def test_the_limit_of_size_is_the_same_for_calls_in_a_batch(engine, monkeypatch, size):
    monkeypatch.setattr(profiles, "MAX_PROFILE_LENGTH", len('{"a":1,"b":2,"c":3}'))
    calls = [
        {"a": 7, "b": 7},
        {"a": 7, "b": 7},
        {"a": 1, "b": 2, "c": 3},
        {"d": 4, "a": None},
        {"e": 5, "f": 6},
    ]
    prepared = [identify(traits, number) for number, traits in enumerate(calls)]
    with engines.write(engine) as connection:
        for start in range(0, len(prepared), size):
            records.save_calls(connection, prepared[start : start + size], received_at=NOON, fingerprint=None)
    with engines.read(engine) as connection:
        traits = connection.execute(tables.profiles.select()).one().traits
    assert traits == {"b": 2, "c": 3, "d": 4}


@pytest.mark.parametrize("length", [3, 200])
def test_an_object_with_other_names_in_each_call_of_a_batch_is_sent_with_a_limited_number_of_vanished_names(
    engine, monkeypatch, length
):
    monkeypatch.setattr(adjustments, "MAX_NAMES", 50)
    monkeypatch.setattr(adjustments, "MAX_NAMES_LENGTH", 5_000)
    prepared = []
    for number in range(40):
        names = [f"{number}-{part}".rjust(length, "x") for part in range(10)]
        prepared.append(identify({"cart": dict.fromkeys(names, 1)}, number))
    with engines.write(engine) as connection:
        records.save_calls(connection, prepared, received_at=NOON, fingerprint=None)
    with engines.read(engine) as connection:
        bodies = [row.body for row in connection.execute(tables.deliveries.select())]
        stored = connection.execute(tables.profiles.select()).one().sent_names
    most = 50 if length < 100 else 5_000 // (len("cart.") + length)
    assert len(bodies[-1]["cart"]["@gone"]) <= most + 10  # with those of the value before
    assert bodies[-1]["cart"]["@gone"][-1] == f"cart.{'39-9'.rjust(length, 'x')}".replace("39", "38")
    assert len(stored) <= most
