import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.calls.model import Call, CallType
from audience_sync.calls.validation import parse_call
from audience_sync.errors import CallError

RECEIVED_AT = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)


def parsed(**fields):
    raw = {"type": "identify", "userId": "u1", **fields}
    return parse_call(raw, received_at=RECEIVED_AT, new_id=lambda: "made")


def test_an_identify():
    raw = {
        "type": "identify",
        "messageId": "m1",
        "userId": "u1",
        "anonymousId": "a1",
        "traits": {"plan": "pro"},
        "context": {"ip": "::1"},
        "timestamp": "2024-04-30T10:00:00+02:00",
    }
    assert parse_call(raw, received_at=RECEIVED_AT, new_id=lambda: "made") == Call(
        type=CallType.IDENTIFY,
        message_id="m1",
        user_id="u1",
        anonymous_id="a1",
        group_id=None,
        event=None,
        timestamp=datetime(2024, 4, 30, 8, 0, tzinfo=UTC),
        document=raw,
    )


def test_missing_fields_get_defaults():
    call = parsed()
    assert (call.message_id, call.timestamp, call.traits) == ("made", RECEIVED_AT, {})


def test_the_subject_is_the_user_else_the_anonymous_id():
    assert parsed(anonymousId="a1").subject_id == "u1"
    assert parsed(userId=None, anonymousId="a1").subject_id == "a1"


@pytest.mark.parametrize(
    ("given_id", "user_id"),
    [
        (7, "7"),
        (7.0, "7"),
        (1.5, "1.5"),
        (0, "0"),
        (2**63, "9223372036854775808"),
        ("007", "007"),
        ("é" * 255, "é" * 255),
    ],
)
def test_ids_are_text(given_id, user_id):
    assert parsed(userId=given_id).user_id == user_id


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2024-04-30T10:00:00Z", datetime(2024, 4, 30, 10, tzinfo=UTC)),
        ("2024-04-30T10:00:00", datetime(2024, 4, 30, 10, tzinfo=UTC)),
        ("2024-04-30", datetime(2024, 4, 30, tzinfo=UTC)),
        (
            datetime(2024, 4, 30, 10, tzinfo=timezone(timedelta(hours=1))),
            datetime(2024, 4, 30, 9, tzinfo=UTC),
        ),
        (datetime(2024, 4, 30, 10), datetime(2024, 4, 30, 10, tzinfo=UTC)),  # noqa: DTZ001
    ],
)
def test_timestamps(value, moment):
    assert parsed(timestamp=value).timestamp == moment


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        ("2024-04-30T10:00:00z", "2024-04-30T10:00:00Z"),
        ("2024-04-30t10:00:00z", "2024-04-30T10:00:00Z"),
        ("2024-04-30T09:59:60Z", "2024-04-30T10:00:00Z"),
        ("2024-04-29T24:00:00Z", "2024-04-30T00:00:00Z"),
        ("2024-121", "2024-04-30T00:00:00Z"),
        ("2024-121T10:00:00+02:00", "2024-04-30T08:00:00Z"),
        ("2024121T100000Z", "2024-04-30T10:00:00Z"),
        ("2024-W18-2", "2024-04-30T00:00:00Z"),
        ("2024-W18-2T24:00", "2024-05-01T00:00:00Z"),
        ("2024-04-30T10:00:00", "2024-04-30T10:00:00Z"),
        ("2024-4-30 9:05:00 +0200", "2024-04-30T07:05:00Z"),
        ("2024-04-30 10:00:00.5 +0000 UTC", "2024-04-30T10:00:00.500000Z"),
        ("Tue, 30 Apr 2024 10:00:00 GMT", "2024-04-30T10:00:00Z"),
        (1714471200, "2024-04-30T10:00:00Z"),
        (1714471200.25, "2024-04-30T10:00:00.250000Z"),
        (1714471200123, "2024-04-30T10:00:00.123000Z"),
        (1714471200123456, "2024-04-30T10:00:00.123456Z"),
        ("1714471200123", "2024-04-30T10:00:00.123000Z"),
        ("20240430100000", "2024-04-30T10:00:00Z"),
        ("2024/04/30 10:00:00", "2024-04-30T10:00:00Z"),
        ("2024.4.30", "2024-04-30T00:00:00Z"),
        ("2024-04-30T10:00:00Z[UTC]", "2024-04-30T10:00:00Z"),
        ("2024-04-30T10:00+02:00[Europe/Berlin]", "2024-04-30T08:00:00Z"),
        ("2024-04-30 10:00:00.5 +0200 CEST m=+0.004", "2024-04-30T08:00:00.500000Z"),
        ("Tue Apr 30 2024 10:00:00 GMT+0200 (Central European Summer Time)", "2024-04-30T08:00:00Z"),
        ("Tuesday, 30-Apr-24 10:00:00 GMT", "2024-04-30T10:00:00Z"),
        ("Tue, 30 Apr 2024 10:00:00 +0200 (CEST)", "2024-04-30T08:00:00Z"),
        ("Tue Apr 30 10:00:00 2024", "2024-04-30T10:00:00Z"),
        ("Tue Apr 30 10:00:00 UTC 2024", "2024-04-30T10:00:00Z"),
        ("2024-04-30+02:00", "2024-04-29T22:00:00Z"),
        ("2024-04-30-05:00", "2024-04-30T05:00:00Z"),
        ("20240430Z", "2024-04-30T00:00:00Z"),
        ("2024-W18-2+02:00", "2024-04-29T22:00:00Z"),
        ("2024-04-30-10:00:00", "2024-04-30T10:00:00Z"),
        ("2024-04-30_10:00:00", "2024-04-30T10:00:00Z"),
        ("+002024-04-30T10:00:00Z", "2024-04-30T10:00:00Z"),
        ("2024-04-30T10,5Z", "2024-04-30T10:30:00Z"),
        ("2024-04-30T10:30.25+02:00", "2024-04-30T08:30:15Z"),
        ("2024-04-30T09:59:60.5Z", "2024-04-30T10:00:00.500000Z"),
        ("2024-04-30T10:00:00.Z", "2024-04-30T10:00:00Z"),
        ("202404301000", "2024-04-30T10:00:00Z"),
        (202404301000, "2024-04-30T10:00:00Z"),
        (20240430100000, "2024-04-30T10:00:00Z"),
        ("20240430100000123", "2024-04-30T10:00:00.123000Z"),
    ],
)
def test_a_time_with_one_sensible_meaning_is_read_and_recorded(value, read_as):
    call = parsed(timestamp=value)
    assert call.timestamp == datetime.fromisoformat(read_as)
    assert call.corrections == (f"timestamp was read as {read_as}",)


@pytest.mark.parametrize(
    "value", ["2024-04-30T10:00:00Z", "2024-04-30T10:00:00.123+02:00", "20240430T100000Z", None]
)
def test_usual_times_need_no_correction(value):
    assert parsed(timestamp=value).corrections == ()


@pytest.mark.parametrize(
    "value",
    [
        "2023-366",
        "2024-04-30T24:00:01Z",
        "2024-04-30T10:00:61Z",
        "2024-04",
        "30/04/2024",
        "0",
        "1e9",
        "2024/04-30",
        "20241301000000",
        "202413010000",
        "2024-04-30T24:00.5Z",
        "2024-04-30x10:00:00",
        "2024-04-30T10:00:00[Europe/Berlin]",
        "Tue, 30 Apr 2024 10:00:00 CEST",
        "Tue Apr 30 10:00:00 CEST 2024",
        "Tue, 99 Apr 2024 10:00:00 GMT",
    ],
)
def test_a_time_without_one_sensible_meaning_is_refused(value):
    with pytest.raises(CallError, match="timestamp is not ISO 8601"):
        parsed(timestamp=value)


@pytest.mark.parametrize(
    ("fields", "correction"),
    [
        ({"timestamp": ""}, "timestamp is empty: it is not used"),
        ({"timestamp": "0001-01-01T00:00:00Z"}, "timestamp is in the year 1: it is not used"),
        ({"timestamp": "0000-00-00 00:00:00"}, "timestamp is 0000-00-00: it is not used"),
        ({"timestamp": "2024-05-01T13:00:00Z"}, "timestamp lies in the future: the time of arrival is used"),
        ({"originalTimestamp": "soon"}, "originalTimestamp is not a time: it is not used"),
    ],
)
def test_the_arrival_replaces_a_time_that_cannot_be_used(fields, correction):
    call = parsed(**fields)
    assert (call.timestamp, call.corrections) == (RECEIVED_AT, (correction,))


def test_a_clock_that_is_a_little_ahead_is_corrected_without_a_message():
    call = parsed(timestamp="2024-05-01T12:00:00.900Z")
    assert (call.timestamp, call.corrections) == (RECEIVED_AT, ())


@pytest.mark.parametrize("name", ["traits", "properties", "context", "integrations"])
@pytest.mark.parametrize("value", [[], ""])
def test_an_empty_list_or_text_is_an_empty_object(name, value):
    call = parsed(**{name: value})
    assert call.document[name] == {}
    assert call.corrections == (f"{name} is an empty list or text: read as an empty object",)


def test_an_empty_id_beside_another_one_is_absent():
    call = parsed(userId="", anonymousId="a1")
    assert (call.user_id, call.subject_id, "userId" in call.document) == (None, "a1", False)
    assert call.corrections == ("userId is empty: anonymousId is used",)
    call = parsed(anonymousId="")
    assert (call.subject_id, call.anonymous_id) == ("u1", None)
    assert call.corrections == ("anonymousId is empty: userId is used",)


@pytest.mark.parametrize("call_type", ["identify", "group"])
def test_traits_beyond_300_are_left_out(call_type):
    traits = {f"t{number}": number for number in range(302)}
    call = parsed(type=call_type, groupId="g", traits=traits)
    assert list(call.traits) == [f"t{number}" for number in range(300)]
    assert call.left_out == {"t300": 300, "t301": 301}
    assert call.corrections == ("302 traits: those after the first 300 are left out",)


def test_members_that_are_nested_too_deep_are_left_out():
    call = parsed(traits={"a": nested(19), "b": nested(18), "c": LOOP}, properties={"d": nested(19)})
    assert (call.traits, call.properties) == ({"b": nested(18)}, {})
    assert call.left_out == {"a": None, "c": None, "d": None}
    assert call.corrections == ("members nested more than 20 levels deep are left out",)


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


LOOP = {}
LOOP["self"] = LOOP
WIDE = []
for _ in range(17):
    WIDE = [WIDE] * 10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": None}, "type must be one of identify, track, group, page, screen, alias"),
        ({"type": ["identify"]}, "type must be one of identify, track, group, page, screen, alias"),
        ({"userId": None}, "userId or anonymousId is required"),
        ({"userId": ""}, "userId is empty"),
        ({"userId": "", "anonymousId": ""}, "userId is empty"),
        ({"userId": "", "anonymousId": None}, "userId is empty"),
        ({"userId": " \t"}, "userId is only white space"),
        ({"userId": "\u3000\u200b"}, "userId is only white space"),
        ({"userId": " ", "anonymousId": "a1"}, "userId is only white space"),
        ({"anonymousId": "\n"}, "anonymousId is only white space"),
        ({"userId": True}, "userId must be a string or a number, not true or false"),
        ({"userId": ["u1"]}, "userId must be a string or a number, not a list"),
        ({"userId": "u" * 256}, "userId is longer than 255 characters"),
        ({"type": "track"}, "event must be a non-empty string in a track call"),
        ({"type": "track", "event": ""}, "event must be a non-empty string in a track call"),
        ({"type": "track", "event": 7}, "event must be a non-empty string in a track call"),
        ({"type": "track", "event": "\u00a0"}, "event must be a non-empty string in a track call"),
        ({"type": "alias"}, "previousId is required in an alias call"),
        ({"type": "alias", "previousId": " "}, "previousId is only white space"),
        ({"type": "alias", "previousId": []}, "previousId must be a string or a number, not a list"),
        ({"type": "group", "groupId": "  "}, "groupId is only white space"),
        ({"messageId": " "}, "messageId must be a non-empty string"),
        ({"type": "group"}, "groupId is required in a group call"),
        ({"type": "group", "groupId": ""}, "groupId is empty"),
        ({"type": "group", "groupId": "g" * 501}, "groupId is longer than 500 characters"),
        ({"type": "group", "groupId": "g", "userId": None}, "userId or anonymousId is required"),
        ({"traits": ["plan"]}, "traits must be an object"),
        ({"integrations": "all"}, "integrations must be an object"),
        ({"properties": "x"}, "properties must be an object"),
        ({"context": 7}, "context must be an object"),
        ({"messageId": 7}, "messageId must be a non-empty string"),
        ({"messageId": "m" * 101}, "messageId is longer than 100 characters"),
        ({"timestamp": True}, "timestamp must be an ISO 8601 string, such as 2024-05-01T12:00:00Z"),
        ({"timestamp": 7}, "timestamp is not ISO 8601, such as 2024-05-01T12:00:00Z"),
        ({"timestamp": "yesterday"}, "timestamp is not ISO 8601, such as 2024-05-01T12:00:00Z"),
        (
            {"timestamp": "0001-01-01T00:00:00+14:00"},
            "timestamp is not ISO 8601, such as 2024-05-01T12:00:00Z",
        ),
        ({"userId": "a\0b"}, "text with a NUL character cannot be stored"),
        ({"traits": {"a": [{"b\0": 1}]}}, "text with a NUL character cannot be stored"),
        ({"traits": {"a": "\udc00"}}, "text with a lone surrogate is not valid Unicode"),
        ({"traits": {"a": float("nan")}}, "NaN and Infinity are not JSON"),
        ({"traits": {"a": float("-inf")}}, "NaN and Infinity are not JSON"),
        ({"traits": {"a": 10**400}}, "a number is too large"),
        ({"traits": {"a": 10**5000}}, "a number is too large"),
        ({"traits": {"a": {1, 2}}}, "a set is not a JSON value"),
        ({"traits": {1: "a"}}, "the names in an object must be strings"),
        ({"context": {"a": nested(19)}}, "objects and lists are nested more than 20 levels deep"),
        ({"context": LOOP}, "objects and lists are nested more than 20 levels deep"),
        ({"traits": {"a": WIDE}}, "the call is larger than 32 KB"),
        ({"traits": {"a": [[0] * 1000] * 1000}}, "the call is larger than 32 KB"),
        ({"traits": {"a": "é" * 16_384}}, "the call is larger than 32 KB"),
    ],
)
def test_an_invalid_call_is_refused_with_a_reason(fields, words):
    with pytest.raises(CallError) as refused:
        parsed(**fields)
    assert str(refused.value) == words


def test_twenty_levels_are_taken():
    assert parsed(traits={"a": nested(18)}).traits == {"a": nested(18)}


def test_exactly_32_kb_are_taken():
    rest = len(b'{"type":"identify","userId":"u1","traits":{"a":""}}')
    assert parsed(traits={"a": "x" * (32 * 1024 - rest)}).user_id == "u1"
    with pytest.raises(CallError, match="larger than 32 KB"):
        parsed(traits={"a": "x" * (32 * 1024 - rest + 1)})


def test_a_call_must_be_an_object():
    with pytest.raises(CallError, match="a call must be a JSON object"):
        parse_call(["identify"], received_at=RECEIVED_AT, new_id=lambda: "made")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "type",
    "userId",
    "anonymousId",
    "groupId",
    "event",
    "traits",
    "properties",
    "messageId",
    "timestamp",
]


@given(
    st.dictionaries(st.sampled_from(FIELDS), anything), st.sampled_from(["identify", "track", "group", None])
)
def test_any_input_is_a_call_or_a_call_error(raw, call_type):
    if call_type:
        raw["type"] = call_type
    try:
        call = parse_call(raw, received_at=RECEIVED_AT, new_id=lambda: "made")
    except CallError:
        return
    assert call.subject_id
    assert call.timestamp.utcoffset() == timedelta(0)
    json.dumps([call.traits, call.properties], allow_nan=False, ensure_ascii=False).encode()


def corrected(sent_at, **times):
    raw = {"type": "identify", "userId": "u1", **times}
    return parse_call(raw, received_at=RECEIVED_AT, sent_at=sent_at, new_id=str).timestamp


def test_the_senders_clock_is_corrected():
    ahead = RECEIVED_AT + timedelta(hours=2)
    assert corrected(ahead, timestamp="2024-05-01T13:59:50Z") == RECEIVED_AT - timedelta(seconds=10)
    original = {"timestamp": "2001-01-01T00:00:00Z", "originalTimestamp": "2024-05-01T11:00:00Z"}
    assert corrected(RECEIVED_AT, **original) == RECEIVED_AT - timedelta(hours=1)
    assert corrected(ahead) == RECEIVED_AT
    assert corrected(None) == RECEIVED_AT
    assert corrected(None, originalTimestamp="2024-05-01T11:00:00Z") == RECEIVED_AT - timedelta(hours=1)
    assert corrected(None, **original) == datetime(2001, 1, 1, tzinfo=UTC)
    with pytest.raises(CallError, match="timestamp is out of range"):
        corrected(RECEIVED_AT - timedelta(days=1), timestamp="9999-12-31T00:00:00Z")


def test_a_sent_at_that_puts_the_call_before_all_time_is_not_used():
    raw = {"type": "identify", "userId": "u1", "timestamp": "2024-04-30T10:00:00Z"}
    sent_at = datetime(9999, 12, 31, tzinfo=UTC)
    call = parse_call(raw, received_at=RECEIVED_AT, sent_at=sent_at, new_id=str)
    assert call.timestamp == datetime(2024, 4, 30, 10, tzinfo=UTC)
    assert call.corrections == ("sentAt is out of range: it is not used",)


def test_a_future_timestamp_counts_as_the_time_of_receipt():
    assert corrected(None, timestamp="9999-01-01T00:00:00Z") == RECEIVED_AT
    assert corrected(RECEIVED_AT, timestamp="9999-01-01T00:00:00Z") == RECEIVED_AT


def test_a_write_key_is_dropped():
    assert "writeKey" not in parsed(writeKey="s3cret").document


def test_ids_become_text_in_the_document():
    assert parsed(userId=7.0).document["userId"] == "7"
