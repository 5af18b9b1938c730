"""The requests of Userpilot's API as data; where they go is the client's business."""

from typing import Any, assert_never

from audience_sync.calls.model import Action
from audience_sync.calls.shapes import primitives


def build(
    action: str, subject_id: str, body: dict[str, Any], *, booleans: str, nested: str
) -> tuple[str, dict[str, Any]]:
    """The path below the endpoint and the payload for one delivery.

    `body` is the metadata of a user or company, or of a track `{"event_name": …, "metadata": …}`, where
    metadata may be missing and is then not sent. `booleans` is native or string, `nested` flatten or json.
    ValueError if the action is none of Action.
    """
    match Action(action):
        case Action.IDENTIFY:
            return "v1/identify", {"user_id": subject_id, "metadata": _properties(body, booleans, nested)}
        case Action.COMPANY:
            metadata = _properties(body, booleans, nested)
            return "v1/companies/identify", {"company_id": subject_id, "metadata": metadata}
        case Action.TRACK:
            payload = {"user_id": subject_id, "event_name": body["event_name"]}
            if "metadata" in body:
                payload["metadata"] = _properties(body["metadata"], booleans, nested)
            return "v1/track", payload
        case unknown:
            assert_never(unknown)


def _properties(metadata: dict[str, Any], booleans: str, nested: str) -> dict[str, Any]:
    properties = primitives(metadata, nested)
    if booleans == "native":
        return properties
    return {
        name: ("true" if value else "false") if isinstance(value, bool) else value
        for name, value in properties.items()
    }
