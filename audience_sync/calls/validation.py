"""Validation of a call: Segment's rules, and the limits of JSON and of the databases. Next: mappings.py.

An unusual value with one sensible meaning is corrected, and recorded in `corrections`; any other is refused.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any

import msgspec

from audience_sync.calls.model import Call, CallType
from audience_sync.calls.operations import compact_json
from audience_sync.calls.times import parse_complete, parse_time
from audience_sync.errors import CallError

MAX_CALL_BYTES = 32 * 1024
MAX_ID_LENGTH = 255
MAX_GROUP_ID_LENGTH = 500
MAX_MESSAGE_ID_LENGTH = 100
MAX_EVENT_LENGTH = 500  # PostgreSQL cannot index much longer text
MAX_LEVELS = 20  # of objects and lists, including the call itself
MAX_TRAITS = 300  # of an identify or group call, as at Segment
MAX_NUMBER_BITS = 1023  # the range of a double; most JSON parsers accept no larger number
OBJECTS = ("traits", "properties", "context", "integrations")
FUTURE = "timestamp lies in the future: the time of arrival is used"
UNSET_DATE = "0000-00-00"  # what MySQL has for a time that was never set
# A timestamp up to this far in the future is corrected without a message.
CLOCK_TOLERANCE = timedelta(seconds=1)
_BLANK = re.compile(r"[\s\u200b\u200c\u200d\u2060\ufeff]*")
_TYPES = {call_type.value: call_type for call_type in CallType}
_CONTAINERS = (dict, list)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_json(text: bytes) -> Any:
    """Decode a JSON document. Raises CallError if it is not one."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    # Accepts lone surrogates, NaN and numbers of any length, so that validation can name them and refuse only that call.
    try:
        return json.loads(text, parse_int=_parse_int)
    except (ValueError, RecursionError):
        raise CallError("not valid JSON") from None


def _parse_int(digits: str) -> int:
    return int(digits[: MAX_NUMBER_BITS + 1])  # a number with more digits is too large, too


class TooDeepError(CallError):
    def __init__(self) -> None:
        super().__init__(f"objects and lists are nested more than {MAX_LEVELS} levels deep")


def parse_call(
    raw: Mapping[str, Any],
    *,
    received_at: datetime,
    new_id: Callable[[], str],
    sent_at: datetime | None = None,
    corrections: Sequence[str] = (),
) -> Call:
    """Check a call in Segment's camel-case fields.

    `timestamp` may also be a datetime; a naive one is UTC. `sent_at` is the time at which the call was sent, by the
    sender's clock, whose error it corrects in the call's time (Segment's rule: receivedAt - (sentAt -
    originalTimestamp)). `corrections`: those that were made before. Raises CallError, which names the field and the
    problem.
    """
    if not isinstance(raw, Mapping):
        raise CallError("a call must be a JSON object")
    document = dict(raw)
    document.pop("writeKey", None)  # a secret
    if isinstance(document.get("timestamp"), date):
        document["timestamp"] = document["timestamp"].isoformat()
    corrected = list(corrections)
    left_out = _check_document(document, corrected)
    call_type = _call_type(document.get("type"))
    user_id, anonymous_id = _user_ids(document, corrected)
    group_id = read_id(document, "groupId", MAX_GROUP_ID_LENGTH) if call_type is CallType.GROUP else None
    if call_type is CallType.GROUP and group_id is None:
        raise CallError("groupId is required in a group call")
    if call_type is CallType.ALIAS and read_id(document, "previousId", MAX_ID_LENGTH) is None:
        raise CallError("previousId is required in an alias call")
    for name in OBJECTS:
        value = document.get(name)
        if value is None or isinstance(value, dict):
            continue
        if value not in ([], ""):
            raise CallError(f"{name} must be an object")
        document[name] = {}
        corrected.append(f"{name} is an empty list or text: read as an empty object")
    if call_type in (CallType.IDENTIFY, CallType.GROUP):
        left_out |= _cut_traits(document, corrected)
    return Call(
        type=call_type,
        message_id=_message_id(document.get("messageId")) or new_id(),
        user_id=user_id,
        anonymous_id=anonymous_id,
        group_id=group_id,
        event=_event(document.get("event")) if call_type is CallType.TRACK else None,
        timestamp=_timestamp(document, received_at, sent_at, corrected),
        document=document,
        corrections=tuple(corrected),
        left_out=left_out,
    )


def _user_ids(document: dict[str, Any], corrected: list[str]) -> tuple[str | None, str | None]:
    """Read userId and anonymousId; an empty one counts as absent if the other is present, as browsers send it."""
    names = ("userId", "anonymousId")
    for name, other in (names, names[::-1]):
        if document.get(name) == "" and document.get(other) not in (None, ""):
            del document[name]
            corrected.append(f"{name} is empty: {other} is used")
    user_id, anonymous_id = (read_id(document, name, MAX_ID_LENGTH) for name in names)
    if user_id is None and anonymous_id is None:
        raise CallError("userId or anonymousId is required")
    return user_id, anonymous_id


def _cut_traits(document: dict[str, Any], corrected: list[str]) -> dict[str, Any]:
    """Remove the traits beyond the limit from the call, and return them."""
    names = list(document.get("traits") or ())
    if len(names) <= MAX_TRAITS:
        return {}
    traits = document["traits"]
    document["traits"] = {name: traits[name] for name in names[:MAX_TRAITS]}
    corrected.append(f"{len(names):,} traits: those after the first {MAX_TRAITS} are left out")
    return {name: traits[name] for name in names[MAX_TRAITS:]}


def _call_type(value: object) -> CallType:
    call_type = _TYPES.get(value) if isinstance(value, str) else None
    if call_type is None:
        raise CallError(f"type must be one of {', '.join(_TYPES)}")
    return call_type


def read_id(document: dict[str, Any], name: str, max_length: int) -> str | None:
    """Return the id in a field, None if it is absent, and make the field a string."""
    value = document.get(name)
    if value is None:
        return None
    text = value if isinstance(value, str) else _number_text(name, value)
    if is_blank(text):
        raise CallError(f"{name} is empty" if not text else f"{name} is only white space")
    if len(text) > max_length:
        raise CallError(f"{name} is longer than {max_length} characters")
    document[name] = text
    return text


def _number_text(name: str, value: object) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CallError(f"{name} must be a string or a number, not {_KINDS.get(type(value), 'an object')}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # in JSON, 1.0 and 1 are the same number
    return str(value)


_KINDS = {bool: "true or false", list: "a list"}


def is_blank(text: str) -> bool:
    """Return whether a text is empty, or only white space and zero-width characters."""
    return _BLANK.fullmatch(text) is not None


def _message_id(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or is_blank(value):
        raise CallError("messageId must be a non-empty string")
    if len(value) > MAX_MESSAGE_ID_LENGTH:
        raise CallError(f"messageId is longer than {MAX_MESSAGE_ID_LENGTH} characters")
    return value


def _event(value: object) -> str:
    if not isinstance(value, str) or is_blank(value):
        raise CallError("event must be a non-empty string in a track call")
    if len(value) > MAX_EVENT_LENGTH:
        raise CallError(f"event is longer than {MAX_EVENT_LENGTH} characters")
    return value


def _timestamp(
    document: Mapping[str, Any], received_at: datetime, sent_at: datetime | None, corrected: list[str]
) -> datetime:
    """Return when the call happened, at most `received_at`: a time in the future would make later calls look old."""
    timestamp = read_time(document, "timestamp", corrected)
    original = read_optional_time(document, "originalTimestamp", corrected) or timestamp
    happened_at = timestamp or original or received_at
    if sent_at is not None:
        try:
            happened_at = received_at - (sent_at - original) if original else received_at
        except OverflowError as error:
            if original is None or original > sent_at:
                raise CallError("timestamp is out of range") from error
            corrected.append("sentAt is out of range: it is not used")
    if happened_at - received_at > CLOCK_TOLERANCE:
        corrected.append(FUTURE)
    return min(happened_at, received_at)


def read_optional_time(document: Mapping[str, Any], name: str, corrected: list[str]) -> datetime | None:
    """Return the time in an optional field: None if it is absent or not a time."""
    try:
        return read_time(document, name, corrected)
    except CallError:
        corrected.append(f"{name} is not a time: it is not used")
        return None


def read_time(document: Mapping[str, Any], name: str, corrected: list[str]) -> datetime | None:
    """Return the time in a field, None if it is absent; add a correction unless it is ordinary ISO 8601.

    Raises CallError if the field is not a time.
    """
    value = document.get(name)
    if value is None:
        return None
    if isinstance(value, str) and (time := parse_complete(value)) and time.year > 1:
        return time
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise CallError(f"{name} must be an ISO 8601 string, such as 2024-05-01T12:00:00Z")
    if isinstance(value, str) and is_blank(value):
        corrected.append(f"{name} is empty: it is not used")
        return None
    if isinstance(value, str) and value.startswith(UNSET_DATE):
        corrected.append(f"{name} is {UNSET_DATE}: it is not used")
        return None
    try:
        time = parse_time(value)
    except ValueError as error:
        raise CallError(f"{name} is not ISO 8601, such as 2024-05-01T12:00:00Z") from error
    if time.year == 1:  # what Go and .NET send for a time that was never set
        corrected.append(f"{name} is in the year 1: it is not used")
        return None
    corrected.append(f"{name} was read as {time.isoformat().replace('+00:00', 'Z')}")
    return time


def _check_document(document: dict[str, Any], corrected: list[str]) -> dict[str, Any]:
    """Check the whole call as `check_json` does; remove and return traits and properties that are nested too deeply."""
    left_out: dict[str, Any] = {}
    try:
        check_json(document)
    except TooDeepError:
        for name in ("traits", "properties"):
            members = document.get(name)
            if isinstance(members, dict):
                deep = {member for member, value in members.items() if _is_too_deep(value)}
                document[name] = {member: value for member, value in members.items() if member not in deep}
                left_out |= dict.fromkeys(deep)
        if not left_out:
            raise
        check_json(document)
        corrected.append(f"members nested more than {MAX_LEVELS} levels deep are left out")
    return left_out


def _is_too_deep(value: object) -> bool:
    try:
        _check_values({"": {"": value}})
    except TooDeepError:
        return True
    return False


def check_json(document: dict[str, Any]) -> None:
    """Raise CallError for values that are not JSON, too large, nested too deeply, or that a database cannot store."""
    _check_values(document)
    if len(_encoded(document)) > MAX_CALL_BYTES:
        raise CallError("the call is larger than 32 KB")


def _encoded(document: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(document)
    except (TypeError, ValueError, OverflowError):  # msgspec does not encode every JSON value
        return compact_json(document).encode()


def _check_values(document: dict[str, Any]) -> None:
    """Check all nested values, level by level.

    Each value takes at least one byte, so the size limit also stops at a structure that contains itself.
    """
    level, budget, layer = 1, MAX_CALL_BYTES, [document]
    texts: list[str] = []
    while layer:
        if level > MAX_LEVELS:
            raise TooDeepError
        inner: list[Any] = []
        for container in layer:
            budget -= 1 + len(container)
            if budget < 0:
                raise CallError("the call is larger than 32 KB")
            _collect(container, inner, texts)
        level, layer = level + 1, inner
    try:
        if sum(map(len, texts)) > MAX_CALL_BYTES:
            raise CallError("the call is larger than 32 KB")
        _check_text("".join(texts))
    except TypeError:  # only a name can cause it
        raise CallError("the names in an object must be strings") from None


def _collect(container: dict[Any, Any] | list[Any], inner: list[Any], texts: list[str]) -> None:
    """Add the container's objects and lists to `inner`, its strings and names to `texts`; check other values."""
    members: Iterable[Any] = container
    if isinstance(container, dict):
        texts += container
        members = container.values()
    for member in members:
        if isinstance(member, str):
            texts.append(member)
        elif isinstance(member, _CONTAINERS):
            inner.append(member)
        elif member is not None and not isinstance(member, bool):
            _check_number(member)


def _check_text(value: str) -> None:
    if "\0" in value:
        raise CallError("text with a NUL character cannot be stored")
    if not value.isascii() and _LONE_SURROGATE.search(value):
        raise CallError("text with a lone surrogate is not valid Unicode")


def _check_number(value: object) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CallError("NaN and Infinity are not JSON")
    elif isinstance(value, int):
        if value.bit_length() > MAX_NUMBER_BITS:
            raise CallError("a number is too large")
    else:
        raise CallError(f"a {type(value).__name__} is not a JSON value")
