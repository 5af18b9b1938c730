"""Payloads of Userpilot's API, built from deliveries; client.py sends them."""

import json
from enum import StrEnum
from typing import Any, assert_never

from audience_sync.userpilot.properties import primitives, trait_properties

COMPANY = "@company"  # in a user's body: the id of the user's company
MAX_PROPERTIES = 500
MAX_NAME_LENGTH = 255
MAX_VALUE_LENGTH = 65_535
_PLAIN = (bool, int, float, type(None))


class Action(StrEnum):
    IDENTIFY = "identify"
    TRACK = "track"
    COMPANY = "company"


def build(
    action: str, subject_id: str, body: dict[str, Any], *, booleans: str, nested: str
) -> tuple[str, dict[str, Any]]:
    """Build the path below the endpoint and the payload of one delivery.

    `body` has the traits of a user (with the id of the user's company under COMPANY) or of a company, which may be in the
    form of `properties.with_gone`; for a track it is `{"event_name": …, "metadata": …}`, where metadata is optional.
    `booleans` is native or string, `nested` flatten or json. Raises ValueError if the action is unknown.
    """
    match Action(action):
        case Action.IDENTIFY:
            traits = {name: value for name, value in body.items() if name != COMPANY}
            payload = {
                "user_id": subject_id,
                "metadata": _in_form(trait_properties(traits, nested), booleans),
            }
            if COMPANY in body:
                payload["company"] = {"id": body[COMPANY]}
            return "v1/identify", payload
        case Action.COMPANY:
            metadata = _in_form(trait_properties(body, nested), booleans)
            return "v1/companies/identify", {"company_id": subject_id, "metadata": metadata}
        case Action.TRACK:
            payload = {"user_id": subject_id, "event_name": body["event_name"]}
            if "metadata" in body:
                payload["metadata"] = _in_form(primitives(body["metadata"], nested), booleans)
            return "v1/track", payload
        case unknown:
            assert_never(unknown)


def bulk_row(payload: dict[str, Any]) -> bytes | None:
    """Convert an identify payload to a line of an NDJSON upload to v1/users/bulk_identify.

    Return None if the payload must be sent alone, because a bulk job does not report errors of single rows: if it has an
    id that is empty or not a string, a company with more than an id, a value that is not a primitive, NaN or infinity,
    text that UTF-8 cannot encode, or more than 500 properties, 255 characters in a name or 65,535 in a value. These
    limits are from third parties; Userpilot documents none.
    """
    match payload:
        case {"user_id": str(user_id), "metadata": dict(metadata), **rest} if user_id and _fits(metadata):
            row = {"user_id": user_id, "metadata": metadata}
        case _:
            return None
    match rest:
        case {"company": {"id": str(company_id), **others}, **unknown} if company_id and not others | unknown:
            row["company_id"] = company_id
        case {**unknown} if unknown:
            return None
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except ValueError:  # NaN, a number of thousands of digits, a lone surrogate
        return None


def _fits(metadata: dict[str, Any]) -> bool:
    return len(metadata) <= MAX_PROPERTIES and all(
        len(name) <= MAX_NAME_LENGTH
        and (len(value) <= MAX_VALUE_LENGTH if isinstance(value, str) else isinstance(value, _PLAIN))
        for name, value in metadata.items()
    )


def _in_form(properties: dict[str, Any], booleans: str) -> dict[str, Any]:
    if booleans == "native":
        return properties
    return {
        name: ("true" if value else "false") if isinstance(value, bool) else value
        for name, value in properties.items()
    }
