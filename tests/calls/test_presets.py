from datetime import UTC, datetime

import pytest

from audience_sync.calls.model import Action
from audience_sync.calls.presets import Outgoing, deliveries_for
from audience_sync.calls.validation import parse
from audience_sync.errors import CallError

RECEIVED_AT = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)


def told(reserved_keys=(), **fields):
    call = parse({"userId": "u1", **fields}, received_at=RECEIVED_AT, new_id=lambda: "made")
    return deliveries_for(call, reserved_keys=reserved_keys)


def identified(**traits):
    [outgoing], _ = told(type="identify", traits=traits)
    return outgoing.body


def test_an_identify_sends_its_traits():
    assert told(type="identify", traits={"vip": True}) == (
        [Outgoing(Action.IDENTIFY, "u1", {"vip": True})],
        {},
    )


def test_an_identify_without_traits_sends_an_empty_object():
    assert identified() == {}


def test_an_identify_without_a_user_is_about_the_anonymous_id():
    [outgoing], _ = told(type="identify", userId=None, anonymousId="a1")
    assert outgoing.subject_id == "a1"


@pytest.mark.parametrize("created_at", ["2024-05-01T12:00:00Z", "2024-05-01", 1714557600, 1714557600000])
def test_created_at_goes_under_userpilots_name_as_it_is(created_at):
    assert identified(createdAt=created_at, created_at="1999-01-01") == {"created_at": created_at}


def test_an_explicit_created_at_stays():
    assert identified(created_at="then", createdAt=None) == {"created_at": "then"}


@pytest.mark.parametrize("created_at", ["soon", "", True, {}, ["2024-05-01"]])
def test_a_created_at_that_is_no_date_is_an_error(created_at):
    with pytest.raises(CallError, match="createdAt is not a date"):
        identified(createdAt=created_at)


def test_traits_that_are_not_the_calls_to_set_are_left_out_and_told():
    traits = {"big_spender": True, "plan": "pro", "first_seen_at": "x", "last_seen_at": "y"}
    [outgoing], left_out = told({"big_spender"}, type="identify", traits=traits)
    assert outgoing.body == {"plan": "pro"}
    assert left_out == {"big_spender": True, "first_seen_at": "x", "last_seen_at": "y"}


def test_a_created_at_that_is_a_definitions_key_is_left_out():
    [outgoing], left_out = told({"created_at"}, type="identify", traits={"createdAt": "2024-05-01"})
    assert (outgoing.body, left_out) == ({}, {"created_at": "2024-05-01"})


def test_a_track_sends_its_event_and_properties():
    [outgoing], left_out = told({"a"}, type="track", event="Bought", properties={"a": 1, "createdAt": "x"})
    body = {"event_name": "Bought", "metadata": {"a": 1, "createdAt": "x"}}
    assert (outgoing, left_out) == (Outgoing(Action.TRACK, "u1", body), {})


def test_a_track_without_properties_has_no_metadata():
    [outgoing], _ = told(type="track", event="Bought")
    assert outgoing.body == {"event_name": "Bought"}


def test_a_group_is_about_the_company():
    traits = {"createdAt": "2024-05-01", "vip": True, "last_seen_at": "x"}
    assert told({"vip"}, type="group", groupId=7, traits=traits) == (
        [Outgoing(Action.COMPANY, "7", {"vip": True, "created_at": "2024-05-01"})],
        {"last_seen_at": "x"},
    )
