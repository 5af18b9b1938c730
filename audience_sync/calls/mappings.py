"""Mappings decide what a call sends to Userpilot: each mapping whose trigger matches builds the fields of an action.

The presets work like configured mappings. They send the same as Segment's Userpilot destination, with the differences
that docs/reference/segment-differences.md lists. Next: records.py.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from audience_sync.calls import directives
from audience_sync.calls.model import Call, CallType
from audience_sync.calls.times import parse_time
from audience_sync.calls.validation import (
    MAX_GROUP_ID_LENGTH,
    MAX_ID_LENGTH,
    check_json,
    is_blank,
    read_id,
)
from audience_sync.errors import CallError, ConfigError
from audience_sync.suggest import did_you_mean
from audience_sync.userpilot.payloads import COMPANY, Action

MAX_MAPPINGS = 50  # as in Segment; the presets count
AUTOMATIC_PROPERTIES = frozenset({"first_seen_at", "last_seen_at"})  # Userpilot sets these itself
NAMES = ("Userpilot", "Userpilot Cloud (Actions)")  # of this destination in a call's integrations

_USER = {
    "@if": {
        "exists": {"@path": "$.userId"},
        "then": {"@path": "$.userId"},
        "else": {"@path": "$.anonymousId"},
    }
}
_TRAITS = {"createdAt": {"@path": "$.traits.createdAt"}, "traits": {"@path": "$.traits"}}
# The fields of each action, with the defaults of those that a mapping leaves out.
FIELDS: dict[str, dict[str, Any]] = {
    "identifyUser": {"userId": _USER, **_TRAITS},
    "identifyCompany": {"groupId": {"@path": "$.groupId"}, "userId": _USER, **_TRAITS},
    "trackEvent": {"userId": _USER, "name": {"@path": "$.event"}, "properties": {"@path": "$.properties"}},
}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A delivery of a call.

    `body` is the metadata of a user or a company, and the id of a user's company under COMPANY; for a track it is
    event_name and metadata. `corrections` say which values are sent in another form.
    """

    action: Action
    subject_id: str
    body: dict[str, Any]
    corrections: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The deliveries of a call, the traits that must not be sent, and the reasons why anything is not sent."""

    outgoing: list[Outgoing] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str | None:
        return "; ".join(self.problems) or None

    @property
    def corrections(self) -> tuple[str, ...]:
        """Corrections without duplicates: several mappings may send the same value."""
        return tuple(dict.fromkeys(text for outgoing in self.outgoing for text in outgoing.corrections))


@dataclass(frozen=True, slots=True)
class Mapping:
    name: str
    action: str
    matches: Callable[[dict[str, Any]], bool]
    fields: directives.Template
    makes_values: bool = False  # its values may differ from the call's, so they must be checked again


def compile_mapping(name: str, action: str, trigger: str, fields: dict[str, Any]) -> Mapping:
    """Compile a configured mapping; fields that it leaves out are filled as in the presets.

    Raises ConfigError if the trigger or a field is wrong; the message says where.
    """
    from audience_sync.calls import fql  # noqa: PLC0415  (loading its grammar is slow, and presets need none)

    known = FIELDS[action]
    for field_name in fields:
        if field_name not in known:
            raise ConfigError(
                f"fields: {action} has no field {field_name[:60]!a}: {did_you_mean(field_name, known)}"
            )
    template = directives.compile_template({**known, **fields}, "fields")
    try:
        matches = fql.compile_trigger(fql.parse_trigger(trigger))
    except ConfigError as error:
        raise ConfigError(f"trigger: {error}") from None
    return Mapping(name, action, matches, template, makes_values=True)


def _preset(name: str, action: str, call_type: CallType) -> Mapping:
    return Mapping(
        name,
        action,
        lambda document: document["type"] == call_type,
        directives.compile_template(FIELDS[action], "fields"),
    )


PRESETS = (
    _preset("Identify User", "identifyUser", CallType.IDENTIFY),
    _preset("Identify Company", "identifyCompany", CallType.GROUP),
    _preset("Track Event", "trackEvent", CallType.TRACK),
)


def decide(call: Call, mappings: Sequence[Mapping], *, reserved_keys: Collection[str]) -> Decision:
    """Collect the deliveries of the mappings that match a call.

    `reserved_keys` are the keys of definitions: only their runs may set these properties of users. A mapping that
    fails adds a problem and does not stop the others.
    """
    decision = Decision()
    if not _is_for_us(call.document.get("integrations") or {}):
        decision.problems.append("integrations leaves Userpilot out")
        return decision
    matching = [mapping for mapping in mappings if mapping.matches(call.document)]
    if not matching:
        has_preset = call.type not in {CallType.PAGE, CallType.SCREEN, CallType.ALIAS}
        hint = "" if has_preset else f": Userpilot has no {call.type} calls"
        decision.problems.append(f"no mapping matched{hint}")
    for mapping in matching:
        try:
            fields = mapping.fields.resolve(call.document)
            if mapping.makes_values:
                check_json(fields)
            decision.outgoing.extend(_ACTIONS[mapping.action](fields))
        except CallError as error:
            decision.problems.append(f"{mapping.name}: {error}")
    for outgoing in decision.outgoing:
        if outgoing.action is not Action.TRACK:
            withheld = outgoing.body.keys() & AUTOMATIC_PROPERTIES
            if outgoing.action is Action.IDENTIFY:
                withheld |= outgoing.body.keys() & reserved_keys
            for name in withheld:
                decision.left_out[name] = outgoing.body.pop(name)
    return decision


def _is_for_us(integrations: dict[str, Any]) -> bool:
    """Return whether the call is for Userpilot. Userpilot's entry overrides All; an object means true (as in Segment)."""
    own = [integrations[name] for name in NAMES if integrations.get(name) is not None]
    return own[0] is not False if own else integrations.get("All") is not False


def _identify_user(fields: dict[str, Any]) -> list[Outgoing]:
    return [Outgoing(Action.IDENTIFY, _id(fields, "userId", MAX_ID_LENGTH), *_metadata(fields))]


def _identify_company(fields: dict[str, Any]) -> list[Outgoing]:
    """Send the company's traits and, if the call names a user, the user's company."""
    company_id = _id(fields, "groupId", MAX_GROUP_ID_LENGTH)
    outgoing = [Outgoing(Action.COMPANY, company_id, *_metadata(fields))]
    if fields.get("userId") is not None:
        user_id = _id(fields, "userId", MAX_ID_LENGTH)
        outgoing.append(Outgoing(Action.IDENTIFY, user_id, {COMPANY: company_id}))
    return outgoing


def _track_event(fields: dict[str, Any]) -> list[Outgoing]:
    name = fields.get("name")
    if isinstance(name, bool):
        name = str(name).lower()
    elif isinstance(name, int | float):
        name = str(name)
    if not isinstance(name, str) or is_blank(name):
        raise CallError("name must be a non-empty string")
    body: dict[str, Any] = {"event_name": name}
    if properties := _object(fields, "properties"):
        body["metadata"] = properties
    return [Outgoing(Action.TRACK, _id(fields, "userId", MAX_ID_LENGTH), body)]


_ACTIONS: dict[str, Callable[[dict[str, Any]], list[Outgoing]]] = {
    "identifyUser": _identify_user,
    "identifyCompany": _identify_company,
    "trackEvent": _track_event,
}


def _id(fields: dict[str, Any], name: str, max_length: int) -> str:
    value = read_id(fields, name, max_length)
    if value is None:
        raise CallError(f"{name} is required")
    return value


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CallError(f"{name} must be an object")
    return dict(value)


def _metadata(fields: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the traits, with createdAt under Userpilot's name, and corrections; a null createdAt counts as absent."""
    metadata = _object(fields, "traits")
    metadata.pop("createdAt", None)
    if COMPANY in metadata:
        raise CallError(f"a trait must not be called {COMPANY}")
    created_at = fields.get("createdAt")
    if created_at is None:
        return metadata, ()
    metadata["created_at"] = date = _date(created_at)
    return metadata, (f"createdAt was read as {date}",) if date != created_at else ()


def _date(value: object) -> Any:
    """Return a date as it is sent: unchanged if it is ISO 8601 or a number, otherwise as ISO 8601 in UTC."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value  # a Unix time, in seconds or milliseconds
    if not isinstance(value, str):
        raise CallError(_NO_DATE)
    if value.isdecimal():
        return value  # a Unix time as text, which Segment's destination sends too
    try:
        datetime.fromisoformat(value)
    except ValueError:
        pass
    else:
        return value
    try:
        return parse_time(value).isoformat().replace("+00:00", "Z")
    except ValueError as error:
        raise CallError(_NO_DATE) from error


_NO_DATE = "createdAt is not a date: write ISO 8601, such as 2024-05-01T12:00:00Z"
