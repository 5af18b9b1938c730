"""We send the same for a call as Segment's own Userpilot destination, except for the differences listed here.

A rule rewrites the requests that Segment sends into those that we mean to send. The reasons are in
docs/reference/segment-differences.md.
"""

import gzip
import json
from collections import Counter
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pytest

from audience_sync.calls import mappings, validation
from audience_sync.errors import CallError
from audience_sync.userpilot import payloads


def ours(call):
    """The requests that we send for a call; none for one that we refuse."""
    try:
        parsed = validation.parse_call(
            call, received_at=datetime(2024, 5, 1, tzinfo=UTC), new_id=lambda: "made"
        )
    except CallError:
        return []
    built = [
        payloads.build(one.action, one.subject_id, one.body, booleans="native", nested="flatten")
        for one in mappings.decide(parsed, mappings.PRESETS, reserved_keys=()).outgoing
    ]
    return [{"method": "POST", "path": path, "body": body} for path, body in built]


def canonical(value):
    """JSON text in which 1.0 is 1, as JavaScript has it, while true is not."""
    return json.dumps(json.loads(json.dumps(value), parse_float=number), sort_keys=True)


def number(text):
    return int(float(text)) if float(text).is_integer() else float(text)


@cache
def recorded():
    """Each recorded call's line, by the call's canonical text."""
    lines = gzip.decompress(Path(__file__).with_name("recorded.ndjson.gz").read_bytes()).splitlines()
    answers = map(json.loads, lines)
    return {canonical(answer["call"]): answer for answer in answers if "requests" in answer}


def refused_if(is_refused):
    return lambda call, requests: [] if is_refused(call) else requests


def with_body(rewrite):
    return lambda call, requests: [{**sent, "body": rewrite(call, sent["body"])} for sent in requests]


def with_metadata(rewrite):
    def in_body(call, body):
        return {**body, "metadata": rewrite(call, body["metadata"])} if "metadata" in body else body

    return with_body(in_body)


def as_if(change, restore=str):
    """For calls at which Segment fails: what it sends for the changed call, `restore` run on the text."""

    def rule(call, requests):
        if not (changed := change(call)):
            return requests
        return json.loads(restore(json.dumps(recorded()[canonical(changed)]["requests"])))

    return rule


def without_null_context(call):
    if call.get("context", ...) is None:
        return {name: value for name, value in call.items() if name != "context"}
    return None


def with_plain_date(call):
    if created_at(call) == "2024-W18-3":
        return {**call, "traits": {**call["traits"], "createdAt": "2024-05-01"}}
    return None


def with_week_date(text):
    return text.replace("2024-05-01", "2024-W18-3")


def without_the_empty_id(call):
    """The call without the empty one of two ids, if it has such a one."""
    for name, other in (("userId", "anonymousId"), ("anonymousId", "userId")):
        if call.get(name) == "" and call.get(other) not in (None, ""):
            return {key: value for key, value in call.items() if key != name}
    return None


def with_empty_objects(call):
    """The call with {} for an empty list or text, if it has such a one."""
    empty = [name for name in OBJECTS if call.get(name) in ("", [])]
    return {**call, **{name: {} for name in empty}} if empty else None


def without_deep_members(call):
    """The call without traits and properties that are nested too deep, if it has such ones."""
    changed = dict(call)
    for name in ("traits", "properties"):
        if isinstance(call.get(name), dict):
            changed[name] = {
                member: value for member, value in call[name].items() if "[" * 19 not in json.dumps(value)
            }
    return changed if changed != call else None


OBJECTS = ("traits", "properties", "context", "integrations")


def with_usual_times(call):
    """The call with ISO 8601 for times in other forms, if it has such ones."""
    changed = {**call}
    if isinstance(call.get("timestamp"), str | int | float) and call["timestamp"] in USUAL_TIMES:
        changed["timestamp"] = USUAL_TIMES[call["timestamp"]]
    if call["type"] != "track" and created_at(call) == MAIL_TIME:
        changed["traits"] = {**call["traits"], "createdAt": USUAL_TIMES[MAIL_TIME]}
    return changed if changed != call else None


MAIL_TIME = "Wed, 01 May 2024 12:00:00 GMT"
UNIX_TIMES = (1714557600, 1714557600000, 1714557600.5, "1714557600", "1714557600000")
USUAL_TIMES = {
    MAIL_TIME: "2024-05-01T12:00:00Z",
    "": None,
    " ": None,
    **dict.fromkeys(UNIX_TIMES, "2024-05-01T10:00:00Z"),
}


def corrected(call):
    """The call as it should have been written, if it has unusual values with only one sensible meaning."""
    if call.get("type") not in SUBSCRIBED:
        return None
    changed = call
    for correct in (without_the_empty_id, with_empty_objects, without_deep_members, with_usual_times):
        changed = correct(changed) or changed
    return changed if changed != call else None


def created_at(call):
    traits = call.get("traits")
    return traits.get("createdAt") if isinstance(traits, dict) and call["type"] != "track" else None


def is_iso(value):
    try:
        return bool(datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def ids(call):
    group_id = ["groupId"] if call["type"] == "group" else []
    return {name: call[name] for name in ("userId", "anonymousId", *group_id) if call.get(name) is not None}


def is_about_nobody(call):
    return call.get("userId") is None and call.get("anonymousId") is None


def has_a_strange_id(call):
    return any(isinstance(value, bool | list | dict) for value in ids(call).values())


def has_a_blank_id(call):
    return any(isinstance(value, str) and not value.strip() for value in ids(call).values())


def has_a_long_id(call):
    return any(len(str(value)) > (500 if name == "groupId" else 255) for name, value in ids(call).items())


def has_no_text_as_event(call):
    return call["type"] == "track" and not (isinstance(call.get("event"), str) and call["event"].strip())


def has_no_object(call):
    given = [call.get(name) for name in ("traits", "properties", "context", "integrations")]
    return any(value is not None and not isinstance(value, dict) for value in given)


def has_no_moment(call):
    return call.get("timestamp") is not None and not is_iso(call["timestamp"])


def has_a_strange_message_id(call):
    message_id = call.get("messageId")
    return message_id is not None and not (isinstance(message_id, str) and 1 <= len(message_id) <= 100)


def is_created_at_no_moment(call):
    value = created_at(call)
    return isinstance(value, list) or (isinstance(value, str) and not is_iso(value) and not value.isdigit())


def is_large(call):
    return len(json.dumps(call)) > 32 * 1024


def has_strange_text(call):
    return any(mark in json.dumps(call) for mark in ("\\u0000", "\\ud800"))


def has_a_giant_number(call):
    return "0" * 400 in json.dumps(call)


def times_left_out(call, metadata):
    left_out = () if call["type"] == "track" else ("first_seen_at", "last_seen_at")
    return {name: value for name, value in metadata.items() if name not in left_out}


def null_left_out(call, metadata):
    if call["type"] == "track" or metadata.get("createdAt", ...) is not None:
        return metadata
    return {name: value for name, value in metadata.items() if name != "createdAt"}


def zero_renamed(call, metadata):
    if call["type"] == "track" or metadata.get("createdAt") != 0:
        return metadata
    return {name: value for name, value in metadata.items() if name != "createdAt"} | {"created_at": 0}


def flattened(call, metadata):
    flat = {}
    for name, value in metadata.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict) and inner:
            flat |= {f"{name}.{rest}": leaf for rest, leaf in flattened(call, inner).items()}
        elif not isinstance(inner, dict):
            flat[name] = value
        elif call["type"] == "track":
            flat[name] = json.dumps(value)
    return flat


def id_in_our_digits(_call, body):
    digits = {
        "9223372036854776000": "9223372036854775808",
        "1e+21": "1000000000000000000000",
        "1e-7": "1e-07",
    }
    return {name: value if name == "metadata" else digits.get(value, value) for name, value in body.items()}


def exact_number(_call, metadata):
    return {name: 2**53 + 1 if value == 2**53 else value for name, value in metadata.items()}


def empty_properties_left_out(call, body):
    return {name: value for name, value in body.items() if call["type"] != "track" or value != {}}


def leaves_us_out(call):
    integrations = call.get("integrations")
    return isinstance(integrations, dict) and False in (
        integrations.get("All"),
        integrations.get("Userpilot Cloud (Actions)"),
    )


def with_the_user_in_the_company(call, requests):
    if call["type"] != "group" or not requests:
        return requests
    user_id = call.get("userId") if call.get("userId") is not None else call["anonymousId"]
    if isinstance(user_id, float) and user_id.is_integer():
        user_id = int(user_id)
    company = {"id": requests[0]["body"]["company_id"]}
    body = {"user_id": str(user_id), "metadata": {}, "company": company}
    return [*requests, {"method": "POST", "path": "v1/identify", "body": body}]


SUBSCRIBED = ["identify", "track", "group", "delete"]  # for all others Segment sends nothing, either

# Each name, how many of the recorded calls it changes, and the rule. They are applied one after the other.
RULES = [
    ("a null context does no harm", 3, as_if(without_null_context)),
    ("a week date is a date", 8, as_if(with_plain_date, with_week_date)),
    ("a deletion is a command, not a call", 40, refused_if(lambda call: call["type"] == "delete")),
    ("a call names its user", 10, refused_if(is_about_nobody)),
    ("an id is not empty, nor only white space", 32, refused_if(has_a_blank_id)),
    ("an id is a string or a number", 57, refused_if(has_a_strange_id)),
    ("an id has at most 255 characters, a company's 500", 48, refused_if(has_a_long_id)),
    ("an event is a text", 18, refused_if(has_no_text_as_event)),
    ("traits, properties, context and integrations are objects", 115, refused_if(has_no_object)),
    ("a timestamp is ISO 8601", 91, refused_if(has_no_moment)),
    ("a messageId is a string of 1 to 100 characters", 42, refused_if(has_a_strange_message_id)),
    ("createdAt is ISO 8601 or a number", 63, refused_if(is_created_at_no_moment)),
    ("a call has at most 32 KB", 8, refused_if(is_large)),
    ("text has no NUL and is Unicode", 38, refused_if(has_strange_text)),
    ("a number fits a double", 6, refused_if(has_a_giant_number)),
    ("first_seen_at and last_seen_at are left out", 132, with_metadata(times_left_out)),
    ("a null createdAt is left out", 15, with_metadata(null_left_out)),
    ("createdAt 0 is a date", 18, with_metadata(zero_renamed)),
    ("nested values are flattened", 159, with_metadata(flattened)),
    ("a numeric id is written in our digits", 16, with_body(id_in_our_digits)),
    ("a number is exact", 4, with_metadata(exact_number)),
    ("empty properties are left out", 32, with_body(empty_properties_left_out)),
    ("integrations is heeded", 23, refused_if(leaves_us_out)),
    ("a group puts its user into the company", 350, with_the_user_in_the_company),
]


def judged(answer):
    """The requests that we should send, and the names of the rules that make them differ from Segment's."""
    requests, applied = answer["requests"], []
    if answer["call"].get("type") not in SUBSCRIBED:
        return requests, applied
    for name, _, rule in RULES:
        changed = rule(answer["call"], requests)
        if canonical(changed) != canonical(requests):
            requests = changed
            applied.append(name)
    return requests, applied


@pytest.fixture(scope="module")
def judgements():
    return {key: judged(answer) for key, answer in recorded().items() if corrected(answer["call"]) is None}


def test_a_corrected_call_is_sent_as_if_it_was_written_right():
    pairs = [(answer["call"], corrected(answer["call"])) for answer in recorded().values()]
    pairs = [(call, right) for call, right in pairs if right is not None]
    assert len(pairs) > 100
    assert [call for call, right in pairs if ours(call) != ours(right)] == []


def test_we_send_what_segment_sends_except_for_the_rules(judgements):
    sent = {key: ours(recorded()[key]["call"]) for key in judgements}
    assert [
        (key, sent[key], expected)
        for key, (expected, _) in judgements.items()
        if canonical(sent[key]) != canonical(expected)
    ] == []


def test_each_rule_is_needed_as_often_as_it_says(judgements):
    counts = Counter(name for _, applied in judgements.values() for name in applied)
    assert counts == {name: count for name, count, _ in RULES}


@pytest.mark.parametrize("kind", ["identify", "track", "group"])
def test_most_calls_need_no_rule(judgements, kind):
    sent = [
        key for key in judgements if recorded()[key]["requests"] and recorded()[key]["call"]["type"] == kind
    ]
    plain = [key for key in sent if not set(judgements[key][1]) - {"a group puts its user into the company"}]
    assert len(plain) > 150
