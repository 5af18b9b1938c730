"""From a call to what it asks of Userpilot: each mapping whose trigger matches builds an action's fields.

The presets are mappings like those of the configuration: they send what Segment's own Userpilot destination sends
(docs/reference/segment-differences.md names the differences).
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from audience_sync.calls import directives
from audience_sync.calls.model import Call, CallType
from audience_sync.calls.validation import MAX_GROUP_ID_LENGTH, MAX_ID_LENGTH, check_json, id_in, parse_moment
from audience_sync.errors import CallError, ConfigError
from audience_sync.userpilot.payloads import COMPANY, Action

MOST_MAPPINGS = 50  # a destination of Segment's holds no more; the presets count
AUTOMATIC_PROPERTIES = frozenset({"first_seen_at", "last_seen_at"})  # Userpilot keeps these itself
NAMES = ("Userpilot", "Userpilot Cloud (Actions)")  # of this destination in a call's integrations

_USER = {
    "@if": {
        "exists": {"@path": "$.userId"},
        "then": {"@path": "$.userId"},
        "else": {"@path": "$.anonymousId"},
    }
}
_TRAITS = {"createdAt": {"@path": "$.traits.createdAt"}, "traits": {"@path": "$.traits"}}
FIELDS: dict[str, dict[str, Any]] = {  # of each action, with what fills a field that a mapping does not name
    "identifyUser": {"userId": _USER, **_TRAITS},
    "identifyCompany": {"groupId": {"@path": "$.groupId"}, "userId": _USER, **_TRAITS},
    "trackEvent": {"userId": _USER, "name": {"@path": "$.event"}, "properties": {"@path": "$.properties"}},
}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One thing to tell Userpilot.

    `body` is the metadata of a user or company, a user's with the id of the company under COMPANY; of a track
    the event_name and metadata.
    """

    action: Action
    subject_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a call asks of Userpilot; `left_out` are traits that must not be sent, `problems` why something is not."""

    outgoing: list[Outgoing] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str | None:
        return "; ".join(self.problems) or None


@dataclass(frozen=True, slots=True)
class Mapping:
    name: str
    action: str
    matches: Callable[[dict[str, Any]], bool]
    fields: directives.Template
    makes_values: bool = False  # other than those of the call


def compile_mapping(name: str, action: str, trigger: str, fields: dict[str, Any]) -> Mapping:
    """A mapping as the configuration writes it; fields that it does not name are filled as the presets fill them.

    Raises:
        ConfigError: the trigger or a field is not right; the message says which, and where in it.

    """
    from audience_sync.calls import fql  # noqa: PLC0415  (its grammar takes time, and presets need none)

    known = FIELDS[action]
    for each in fields:
        if each not in known:
            near = difflib.get_close_matches(each, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"fields: {action} has no field {each[:60]!a}: {hint}")
    template = directives.compile({**known, **fields}, "fields")
    try:
        matches = fql.compile(fql.parse(trigger))
    except ConfigError as error:
        raise ConfigError(f"trigger: {error}") from None
    return Mapping(name, action, matches, template, makes_values=True)


def _preset(name: str, action: str, call_type: CallType) -> Mapping:
    return Mapping(
        name,
        action,
        lambda document: document["type"] == call_type,
        directives.compile(FIELDS[action], "fields"),
    )


PRESETS = (
    _preset("Identify User", "identifyUser", CallType.IDENTIFY),
    _preset("Identify Company", "identifyCompany", CallType.GROUP),
    _preset("Track Event", "trackEvent", CallType.TRACK),
)


def decide(call: Call, mappings: Sequence[Mapping], *, reserved_keys: Collection[str]) -> Decision:
    """What each mapping that matches the call asks for.

    `reserved_keys` are the keys of definitions: those properties of users belong to their runs, whatever a
    call says. A mapping that fails is a problem; the others send.
    """
    decision = Decision()
    if not _is_for_us(call.document.get("integrations") or {}):
        decision.problems.append("integrations leaves Userpilot out")
        return decision
    matching = [mapping for mapping in mappings if mapping.matches(call.document)]
    if not matching:
        takes_none = call.type in {CallType.PAGE, CallType.SCREEN, CallType.ALIAS}
        decision.problems.append(
            f"no mapping matched{f': Userpilot takes no {call.type} calls' if takes_none else ''}"
        )
    for mapping in matching:
        try:
            fields = mapping.fields.resolve(call.document)
            if mapping.makes_values:
                check_json(fields)
            decision.outgoing.extend(_ACTIONS[mapping.action](fields))
        except CallError as error:
            decision.problems.append(f"{mapping.name}: {error}")
    for each in decision.outgoing:
        if each.action is not Action.TRACK:
            unsendable = AUTOMATIC_PROPERTIES.union(reserved_keys if each.action is Action.IDENTIFY else ())
            for name in unsendable & each.body.keys():
                decision.left_out[name] = each.body.pop(name)
    return decision


def _is_for_us(integrations: dict[str, Any]) -> bool:
    """Our own name counts more than All; an object of options means yes, as Segment's."""
    own = [integrations[name] for name in NAMES if integrations.get(name) is not None]
    return own[0] is not False if own else integrations.get("All") is not False


def _identify_user(fields: dict[str, Any]) -> list[Outgoing]:
    return [Outgoing(Action.IDENTIFY, _id(fields, "userId", MAX_ID_LENGTH), _metadata(fields))]


def _identify_company(fields: dict[str, Any]) -> list[Outgoing]:
    """The company's traits and, where the call names a user, that the user is in it."""
    company_id = _id(fields, "groupId", MAX_GROUP_ID_LENGTH)
    told = [Outgoing(Action.COMPANY, company_id, _metadata(fields))]
    if fields.get("userId") is not None:
        told.append(Outgoing(Action.IDENTIFY, _id(fields, "userId", MAX_ID_LENGTH), {COMPANY: company_id}))
    return told


def _track_event(fields: dict[str, Any]) -> list[Outgoing]:
    name = fields.get("name")
    if isinstance(name, bool):
        name = str(name).lower()
    elif isinstance(name, int | float):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        raise CallError("name is required: a string that is not empty")
    body: dict[str, Any] = {"event_name": name}
    if properties := _object(fields, "properties"):
        body["metadata"] = properties
    return [Outgoing(Action.TRACK, _id(fields, "userId", MAX_ID_LENGTH), body)]


_ACTIONS: dict[str, Callable[[dict[str, Any]], list[Outgoing]]] = {
    "identifyUser": _identify_user,
    "identifyCompany": _identify_company,
    "trackEvent": _track_event,
}


def _id(fields: dict[str, Any], name: str, most: int) -> str:
    found = id_in(fields, name, most)
    if found is None:
        raise CallError(f"{name} is required")
    return found


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CallError(f"{name} must be an object")
    return dict(value)


def _metadata(fields: dict[str, Any]) -> dict[str, Any]:
    """The traits with createdAt under Userpilot's name for it; a null createdAt counts as not given."""
    metadata = _object(fields, "traits")
    metadata.pop("createdAt", None)
    if COMPANY in metadata:
        raise CallError(f"a trait may not be called {COMPANY}")
    created_at = fields.get("createdAt")
    if created_at is not None:
        _check_date(created_at)
        metadata["created_at"] = created_at
    return metadata


def _check_date(value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return  # a Unix time, in seconds or milliseconds
    if isinstance(value, str) and value.isdecimal():
        return  # the same, as Segment's destination lets it pass
    try:
        parse_moment(value if isinstance(value, str) else "")
    except ValueError as error:
        raise CallError("createdAt is not a date: give ISO 8601, such as 2024-05-01T12:00:00Z") from error
