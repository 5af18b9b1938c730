import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.sandbox import Sandbox
from audience_sync.userpilot.client import Client
from audience_sync.userpilot.payloads import build, bulk_row


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


def test_a_track_has_metadata_only_if_the_delivery_has():
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


def row(metadata, **members):
    return bulk_row({"user_id": "u1", "metadata": metadata} | members)


def test_a_bulk_row_is_one_compact_line():
    assert row({"vip": True, "plan": None, "city": "Zürich\nCH"}) == (
        '{"user_id":"u1","metadata":{"vip":true,"plan":null,"city":"Zürich\\nCH"}}\n'.encode()
    )


def test_the_company_of_a_bulk_row_is_flat():
    assert row({}, company={"id": "c1"}) == b'{"user_id":"u1","metadata":{},"company_id":"c1"}\n'


@pytest.mark.parametrize(
    "metadata",
    [{f"p{number}": 1 for number in range(500)}, {"n" * 255: 1}, {"a": "v" * 65_535}, {"a": "😀" * 65_535}],
    ids=["properties", "name", "value", "emoji"],
)
def test_a_bulk_row_at_the_limits(metadata):
    assert json.loads(row(metadata))["metadata"] == metadata


@pytest.mark.parametrize(
    "metadata",
    [
        {f"p{number}": 1 for number in range(501)},
        {"n" * 256: 1},
        {"a": "v" * 65_536},
        {"a": float("nan")},
        {"a": float("-inf")},
        {"a": 10**5000},
        {"a": "\ud800"},
        {"\udfff": 1},
        {"a": [1]},
        {"a": {"b": 1}},
    ],
    ids=[
        "properties",
        "name",
        "value",
        "nan",
        "inf",
        "digits",
        "surrogate",
        "name-surrogate",
        "list",
        "object",
    ],
)
def test_a_payload_that_a_job_might_lose_has_no_bulk_row(metadata):
    assert row(metadata) is None


@pytest.mark.parametrize(
    "payload",
    [
        {"user_id": "", "metadata": {}},
        {"user_id": "\ud800", "metadata": {}},
        {"user_id": 7, "metadata": {}},
        {"user_id": "u1"},
        {"user_id": "u1", "metadata": {}, "event_name": "Bought"},
        {"user_id": "u1", "metadata": {}, "company": {"id": "c1", "plan": "pro"}},
        {"user_id": "u1", "metadata": {}, "company": {"id": "c1"}, "event_name": "Bought"},
        {"user_id": "u1", "metadata": {}, "company": {"id": ""}},
        {"user_id": "u1", "metadata": {}, "company": {"id": 7}},
        {"user_id": "u1", "metadata": {}, "company": {}},
        {"user_id": "u1", "metadata": {}, "company": None},
    ],
)
def test_a_payload_other_than_a_plain_identify_has_no_bulk_row(payload):
    assert bulk_row(payload) is None


@pytest.fixture(scope="module")
def bulk_sandbox():
    with Sandbox() as sandbox, Client(sandbox.url, "sandbox") as client:
        yield sandbox, client


texts = st.text(st.characters(exclude_categories=[]), max_size=6)  # lone surrogates as well
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
bodies = st.tuples(texts, st.dictionaries(texts, values, max_size=5), st.none() | texts)


@given(st.lists(bodies, min_size=1, max_size=20), st.sampled_from(["flatten", "json"]))
def test_a_job_accepts_every_bulk_row_with_the_values_of_its_identify(bulk_sandbox, users, nested):
    sandbox, client = bulk_sandbox
    payloads = [
        build("identify", user_id, body, booleans="native", nested=nested)[1]
        | ({} if company_id is None else {"company": {"id": company_id}})
        for user_id, body, company_id in users
    ]
    rows = [(payload, line) for payload in payloads if (line := bulk_row(payload))]
    if not rows:
        return
    answer = client.upload("v1/users/bulk_identify", "users.ndjson", b"".join(line for _, line in rows))
    assert (answer.status_code, answer.document["total_rows"]) == (202, len(rows)), answer
    job_rows = sandbox.state.jobs[answer.document["job_id"]].rows
    assert job_rows == [
        {"user_id": payload["user_id"], "metadata": payload["metadata"]}
        | ({"company_id": payload["company"]["id"]} if "company" in payload else {})
        for payload, _ in rows
    ]
    sandbox.state.reset()
