"""What makes a call valid: Segment's rules, and those that JSON and the databases set."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from audience_sync.calls.model import Call, CallType
from audience_sync.errors import CallError

MAX_CALL_BYTES = 32 * 1024
MAX_ID_LENGTH = 255
MAX_GROUP_ID_LENGTH = 500
MAX_MESSAGE_ID_LENGTH = 100
MAX_EVENT_LENGTH = 500  # much longer ones fit into no index of PostgreSQL
MAX_LEVELS = 20  # of objects and lists; the call itself is the first
MAX_NUMBER_BITS = 1023  # what a double holds: more is no number to most readers of JSON
_OBJECTS = ("traits", "properties", "context", "integrations")
_TYPES = {each.value: each for each in CallType}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(
    raw: Mapping[str, Any],
    *,
    received_at: datetime,
    new_id: Callable[[], str],
    sent_at: datetime | None = None,
) -> Call:
    """Check a call as it came in, in Segment's camel-case fields, and give it its types.

    `timestamp` may be a datetime, too; a naive one is UTC. `sent_at` is when the sender's clock says that it sent
    the call: its times are then corrected by how much that clock is off (Segment's rule: receivedAt - (sentAt -
    originalTimestamp)).

    Raises:
        CallError: what is wrong; the message names the field.

    """
    if not isinstance(raw, Mapping):
        raise CallError("a call is an object")
    document = dict(raw)
    document.pop("writeKey", None)  # it is nobody's to read
    if isinstance(document.get("timestamp"), datetime):
        document["timestamp"] = document["timestamp"].isoformat()
    check_json(document)
    call_type = _call_type(document.get("type"))
    user_id = id_in(document, "userId", MAX_ID_LENGTH)
    anonymous_id = id_in(document, "anonymousId", MAX_ID_LENGTH)
    if user_id is None and anonymous_id is None:
        raise CallError("userId or anonymousId is required")
    group_id = id_in(document, "groupId", MAX_GROUP_ID_LENGTH) if call_type is CallType.GROUP else None
    if call_type is CallType.GROUP and group_id is None:
        raise CallError("groupId is required in a group call")
    if call_type is CallType.ALIAS and not document.get("previousId"):
        raise CallError("previousId is required in an alias call")
    for name in _OBJECTS:
        _check_object(document, name)
    return Call(
        type=call_type,
        message_id=_message_id(document.get("messageId")) or new_id(),
        user_id=user_id,
        anonymous_id=anonymous_id,
        group_id=group_id,
        event=_event(document.get("event")) if call_type is CallType.TRACK else None,
        timestamp=_timestamp(document, received_at, sent_at),
        document=document,
    )


def parse_moment(text: str) -> datetime:
    """ISO 8601, naive meaning UTC, as an aware moment in UTC; ValueError if it is not one."""
    moment = datetime.fromisoformat(text)
    try:
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except OverflowError as error:
        raise ValueError("out of range") from error


def _call_type(value: object) -> CallType:
    found = _TYPES.get(value) if isinstance(value, str) else None
    if found is None:
        raise CallError(f"type must be one of {', '.join(_TYPES)}")
    return found


def id_in(document: dict[str, Any], name: str, max_length: int) -> str | None:
    """The id that a field holds, and from now on as a string; None where there is none; CallError for what is no id."""
    value = document.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON does not tell 1.0 from 1
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise CallError(f"{name} must be a string or a number")
    if not value:
        raise CallError(f"{name} is empty")
    if len(value) > max_length:
        raise CallError(f"{name} is longer than {max_length} characters")
    document[name] = value
    return value


def _message_id(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise CallError("messageId must be a string that is not empty")
    if len(value) > MAX_MESSAGE_ID_LENGTH:
        raise CallError(f"messageId is longer than {MAX_MESSAGE_ID_LENGTH} characters")
    return value


def _event(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise CallError("event is required in a track call: a string that is not empty")
    if len(value) > MAX_EVENT_LENGTH:
        raise CallError(f"event is longer than {MAX_EVENT_LENGTH} characters")
    return value


def _check_object(document: Mapping[str, Any], name: str) -> None:
    if document.get(name) is not None and not isinstance(document[name], dict):
        raise CallError(f"{name} must be an object")


def _timestamp(document: Mapping[str, Any], received_at: datetime, sent_at: datetime | None) -> datetime:
    """A moment to come counts as when the call came: a clock that is ahead would silence all that follows."""
    said = moment_in(document, "timestamp")
    original = moment_in(document, "originalTimestamp") or said
    if sent_at is None:
        return min(said or original or received_at, received_at)
    try:
        return min(received_at - (sent_at - original), received_at) if original else received_at
    except OverflowError as error:
        raise CallError("timestamp is out of range") from error


def moment_in(document: Mapping[str, Any], name: str) -> datetime | None:
    """The moment that a field holds, None where there is none; CallError where it is not ISO 8601."""
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise CallError(f"{name} must be a string in ISO 8601")
    try:
        return parse_moment(value)
    except ValueError as error:
        raise CallError(f"{name} is not ISO 8601, such as 2024-05-01T12:00:00Z") from error


def check_json(document: dict[str, Any]) -> None:
    """CallError for what is no JSON, too large or too deep, or what one of the databases cannot store."""
    _check_values(document)
    if len(_text(document)) > MAX_CALL_BYTES:
        raise CallError("the call is larger than 32 KB")


def _text(document: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(document)
    except (TypeError, ValueError, OverflowError):  # whatever msgspec does not write
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _check_values(document: dict[str, Any]) -> None:
    """Check all values within, a level after the other.

    Each takes a byte at least: that ends structures that hold themselves many times over before they become text.
    """
    level, budget, layer = 1, MAX_CALL_BYTES, [document]
    texts: list[str] = []
    while layer:
        if level > MAX_LEVELS:
            raise CallError(f"objects and lists are nested over {MAX_LEVELS} levels")
        inner: list[Any] = []
        for each in layer:
            budget -= 1 + len(each)
            if budget < 0:
                raise CallError("the call is larger than 32 KB")
            _sort_out(each, inner, texts)
        level, layer = level + 1, inner
    try:
        if sum(map(len, texts)) > MAX_CALL_BYTES:
            raise CallError("the call is larger than 32 KB")
        _check_text("".join(texts))
    except TypeError:  # which none of the values can cause
        raise CallError("the names in an object must be strings") from None


def _sort_out(value: dict[Any, Any] | list[Any], inner: list[Any], texts: list[str]) -> None:
    """Add its objects and lists to `inner`, and its strings, names included, to `texts`; all else is checked."""
    members: Iterable[Any] = value
    if isinstance(value, dict):
        texts += value
        members = value.values()
    for member in members:
        kind = type(member)
        if kind is str or isinstance(member, str):
            texts.append(member)
        elif kind is dict or kind is list or isinstance(member, dict | list):
            inner.append(member)
        elif member is not None and kind is not bool:
            _check_number(member)


def _check_text(value: str) -> None:
    if "\0" in value:
        raise CallError("text with a NUL character cannot be stored")
    if not value.isascii() and _LONE_SURROGATE.search(value):
        raise CallError("text with a lone surrogate is not Unicode")


def _check_number(value: object) -> None:
    match value:
        case float() if not math.isfinite(value):
            raise CallError("NaN and Infinity are not JSON")
        case int() if value.bit_length() > MAX_NUMBER_BITS:
            raise CallError("a number is too large")
        case int() | float():
            pass
        case _:
            raise CallError(f"a {type(value).__name__} is not a JSON value")
