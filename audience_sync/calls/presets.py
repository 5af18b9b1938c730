"""The three presets: what Segment's own Userpilot destination sends for a call."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, assert_never

from audience_sync.calls.model import Action, Call, CallType
from audience_sync.calls.validation import parse_moment
from audience_sync.errors import CallError

AUTOMATIC_PROPERTIES = frozenset({"first_seen_at", "last_seen_at"})  # Userpilot keeps these itself


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One thing to tell Userpilot. `body` is the metadata, or of a track the event_name and metadata."""

    action: Action
    subject_id: str
    body: dict[str, Any]


def deliveries_for(call: Call, *, reserved_keys: Collection[str]) -> tuple[list[Outgoing], dict[str, Any]]:
    """What the call asks of Userpilot, and the traits that must not be sent.

    `reserved_keys` are the keys of definitions: those properties belong to their runs, whatever a call says.
    """
    match call.type:
        case CallType.IDENTIFY:
            body, left_out = _divide(_metadata(call.traits), AUTOMATIC_PROPERTIES | set(reserved_keys))
            return [Outgoing(Action.IDENTIFY, _required(call.subject_id, "userId"), body)], left_out
        case CallType.GROUP:
            body, left_out = _divide(_metadata(call.traits), AUTOMATIC_PROPERTIES)
            return [Outgoing(Action.COMPANY, _required(call.group_id, "groupId"), body)], left_out
        case CallType.TRACK:
            body = {"event_name": _required(call.event, "event")}
            if call.properties:
                body["metadata"] = dict(call.properties)
            return [Outgoing(Action.TRACK, _required(call.subject_id, "userId"), body)], {}
        case _:
            assert_never(call.type)


def _metadata(traits: dict[str, Any]) -> dict[str, Any]:
    """The traits with createdAt under Userpilot's name for it; a null createdAt counts as not given."""
    metadata = {name: value for name, value in traits.items() if name != "createdAt"}
    created_at = traits.get("createdAt")
    if created_at is not None:
        _check_date(created_at)
        metadata["created_at"] = created_at
    return metadata


def _check_date(value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return  # a Unix time, in seconds or milliseconds
    try:
        parse_moment(value if isinstance(value, str) else "")
    except ValueError as error:
        raise CallError("createdAt is not a date: give ISO 8601, such as 2024-05-01T12:00:00Z") from error


def _divide(metadata: dict[str, Any], unsendable: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    sendable = {name: value for name, value in metadata.items() if name not in unsendable}
    return sendable, {name: value for name, value in metadata.items() if name in unsendable}


def _required(value: str | None, name: str) -> str:
    if not value:
        raise CallError(f"{name} is required")
    return value
