from datetime import UTC, datetime

import pytest

from audience_sync.calls.mappings import PRESETS, Outgoing, compile_mapping, decide
from audience_sync.calls.validation import parse_call
from audience_sync.errors import ConfigError
from audience_sync.userpilot.payloads import COMPANY, Action

RECEIVED_AT = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)


def decided(reserved_keys=(), mappings=PRESETS, **fields):
    call = parse_call({"userId": "u1", **fields}, received_at=RECEIVED_AT, new_id=lambda: "made")
    return decide(call, mappings, reserved_keys=reserved_keys)


def sent_by(reserved_keys=(), **fields):
    decision = decided(reserved_keys, **fields)
    assert decision.reason is None
    return decision.outgoing, decision.left_out


def mapped(trigger="type != null", action="trackEvent", called="Mine", **fields):
    return compile_mapping(called, action, trigger, fields)


def identified(**traits):
    [outgoing], _ = sent_by(type="identify", traits=traits)
    return outgoing.body


def test_an_identify_sends_its_traits():
    assert sent_by(type="identify", traits={"vip": True}) == (
        [Outgoing(Action.IDENTIFY, "u1", {"vip": True})],
        {},
    )


def test_an_identify_without_traits_sends_an_empty_object():
    assert identified() == {}


def test_an_identify_without_a_user_is_about_the_anonymous_id():
    [outgoing], _ = sent_by(type="identify", userId=None, anonymousId="a1")
    assert outgoing.subject_id == "a1"


@pytest.mark.parametrize("created_at", ["2024-05-01T12:00:00Z", "2024-05-01", 1714557600, 1714557600000])
def test_created_at_is_renamed_and_unchanged(created_at):
    assert identified(createdAt=created_at, created_at="1999-01-01") == {"created_at": created_at}


def test_an_explicit_created_at_stays():
    assert identified(created_at="then", createdAt=None) == {"created_at": "then"}


@pytest.mark.parametrize("created_at", ["soon", "", True, {}, ["2024-05-01"]])
def test_a_created_at_must_be_a_date(created_at):
    decision = decided(type="identify", traits={"createdAt": created_at})
    assert decision.outgoing == []
    assert decision.reason.startswith("Identify User: createdAt is not a date")


def test_reserved_traits_are_left_out_and_recorded():
    traits = {"big_spender": True, "plan": "pro", "first_seen_at": "x", "last_seen_at": "y"}
    [outgoing], left_out = sent_by({"big_spender"}, type="identify", traits=traits)
    assert outgoing.body == {"plan": "pro"}
    assert left_out == {"big_spender": True, "first_seen_at": "x", "last_seen_at": "y"}


def test_a_created_at_that_is_a_definitions_key_is_left_out():
    [outgoing], left_out = sent_by({"created_at"}, type="identify", traits={"createdAt": "2024-05-01"})
    assert (outgoing.body, left_out) == ({}, {"created_at": "2024-05-01"})


def test_a_track_sends_its_event_and_properties():
    [outgoing], left_out = sent_by({"a"}, type="track", event="Bought", properties={"a": 1, "createdAt": "x"})
    body = {"event_name": "Bought", "metadata": {"a": 1, "createdAt": "x"}}
    assert (outgoing, left_out) == (Outgoing(Action.TRACK, "u1", body), {})


def test_a_track_without_properties_has_no_metadata():
    [outgoing], _ = sent_by(type="track", event="Bought")
    assert outgoing.body == {"event_name": "Bought"}


def test_a_group_is_about_the_company_and_puts_the_user_into_it():
    traits = {"createdAt": "2024-05-01", "vip": True, "last_seen_at": "x"}
    assert sent_by({"vip"}, type="group", groupId=7, traits=traits) == (
        [
            Outgoing(Action.COMPANY, "7", {"vip": True, "created_at": "2024-05-01"}),
            Outgoing(Action.IDENTIFY, "u1", {COMPANY: "7"}),
        ],
        {"last_seen_at": "x"},
    )


def test_a_trait_cannot_pass_for_the_company():
    assert decided(type="identify", traits={COMPANY: "evil"}).outgoing == []


@pytest.mark.parametrize(
    ("integrations", "is_sent"),
    [
        (None, True),
        ({}, True),
        ({"All": False}, False),
        ({"All": True}, True),
        ({"Userpilot": False}, False),
        ({"All": False, "Userpilot": True}, True),
        ({"All": False, "Userpilot": {"option": 1}}, True),
        ({"All": True, "Userpilot Cloud (Actions)": False}, False),
        ({"Mixpanel": False}, True),
        ({"All": False, "Userpilot": None}, False),
    ],
)
def test_integrations_decide_whether_a_call_is_sent(integrations, is_sent):
    decision = decided(type="identify", integrations=integrations)
    assert bool(decision.outgoing) is is_sent
    assert decision.reason == (None if is_sent else "integrations leaves Userpilot out")


@pytest.mark.parametrize("call_type", ["page", "screen", "alias"])
def test_the_reason_names_call_types_that_userpilot_does_not_take(call_type):
    decision = decided(type=call_type, previousId="u0")
    assert (decision.outgoing, decision.reason) == (
        [],
        f"no mapping matched: Userpilot has no {call_type} calls",
    )


def test_a_page_may_be_mapped_to_an_event():
    mine = mapped('type = "page"', name={"@template": "Saw {{name}}"})
    [outgoing] = decided(mappings=[mine], type="page", name="Pricing", properties={"url": "/p"}).outgoing
    assert outgoing == Outgoing(Action.TRACK, "u1", {"event_name": "Saw Pricing", "metadata": {"url": "/p"}})


def test_each_matching_mapping_sends_and_a_failing_one_is_a_reason():
    mine = mapped('event = "Bought"', name={"@path": "$.properties.label"})
    other = mapped('event = "Bought"', "identifyUser", called="Buyers", traits={"buyer": True})
    decision = decided(mappings=[*PRESETS, mine, other], type="track", event="Bought")
    assert decision.outgoing == [
        Outgoing(Action.TRACK, "u1", {"event_name": "Bought"}),
        Outgoing(Action.IDENTIFY, "u1", {"buyer": True}),
    ]
    assert decision.reason == "Mine: name must be a non-empty string"


@pytest.mark.parametrize(("name", "sent"), [(7, "7"), (True, "true"), (1.5, "1.5"), ("x", "x")])
def test_an_event_name_becomes_text(name, sent):
    [outgoing] = decided(mappings=[mapped(name=name)], type="track", event="e").outgoing
    assert outgoing.body == {"event_name": sent}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": None}, "Mine: name must be a non-empty string"),
        ({"name": [1]}, "Mine: name must be a non-empty string"),
        ({"userId": ""}, "Mine: userId is empty"),
        ({"userId": {"@path": "$.traits.nobody"}}, "Mine: userId is required"),
        ({"userId": True}, "Mine: userId must be a string or a number, not true or false"),
        ({"properties": "x"}, "Mine: properties must be an object"),
    ],
)
def test_a_field_that_is_wrong_is_a_reason(fields, reason):
    assert decided(mappings=[mapped(**fields)], type="track", event="e").reason == reason


def test_an_unknown_field_is_refused_when_the_mapping_is_compiled():
    with pytest.raises(ConfigError, match="trackEvent has no field 'propertys': did you mean properties"):
        mapped(propertys={})
