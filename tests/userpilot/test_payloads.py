import pytest

from audience_sync.userpilot.payloads import build


def built(action, body, *, booleans="native", nested="flatten"):
    return build(action, "u1", body, booleans=booleans, nested=nested)


def test_an_audience_is_one_identify():
    body = {"first_time_shopper": True}
    assert built("identify", body) == (
        "v1/identify",
        {"user_id": "u1", "metadata": {"first_time_shopper": True}},
    )


def test_an_identify_without_properties_keeps_its_empty_metadata():
    assert built("identify", {}) == ("v1/identify", {"user_id": "u1", "metadata": {}})


def test_a_company():
    assert built("company", {"plan": None}) == (
        "v1/companies/identify",
        {"company_id": "u1", "metadata": {"plan": None}},
    )


def test_a_track_has_metadata_only_if_it_was_given():
    assert built("track", {"event_name": "Bought"}) == ("v1/track", {"user_id": "u1", "event_name": "Bought"})
    assert built("track", {"event_name": "Bought", "metadata": {"a": {"b": 1}}}) == (
        "v1/track",
        {"user_id": "u1", "event_name": "Bought", "metadata": {"a.b": 1}},
    )


def test_booleans_as_strings():
    body = {"vip": True, "new": False, "one": 1, "none": None, "list": [True]}
    assert built("identify", body, booleans="string")[1]["metadata"] == {
        "vip": "true",
        "new": "false",
        "one": 1,
        "none": None,
        "list.0": "true",
    }


def test_nested_values_as_json():
    assert built("identify", {"a": {"b": [1, True]}}, nested="json")[1]["metadata"] == {"a": '{"b":[1,true]}'}


def test_another_action_is_an_error():
    with pytest.raises(ValueError, match="page"):
        built("page", {})
