"""The tracking API described: OpenAPI 3.1, as `GET /openapi.json` gives it."""

from typing import Any

from audience_sync import __version__
from audience_sync.calls.model import CallType

_OBJECT = {"type": ["object", "null"]}
_ID = {"type": ["string", "number", "null"]}
_FIELDS: dict[str, Any] = {
    "userId": {**_ID, "description": "At most 255 characters; this or anonymousId is required."},
    "anonymousId": _ID,
    "messageId": {
        "type": ["string", "null"],
        "maxLength": 100,
        "description": "A call with an id that is known already changes nothing.",
    },
    "timestamp": {"type": ["string", "null"], "description": "ISO 8601; when it happened."},
    "sentAt": {
        "type": ["string", "null"],
        "description": "ISO 8601, by the sender's clock, which is corrected.",
    },
    "context": _OBJECT,
    "integrations": {**_OBJECT, "description": "Userpilot or All: false keeps it from Userpilot."},
    "writeKey": {"description": "A string; read only where there is no Authorization header."},
}
_OWN: dict[CallType, dict[str, Any]] = {
    CallType.IDENTIFY: {"traits": _OBJECT},
    CallType.TRACK: {"event": {"type": "string", "minLength": 1, "maxLength": 500}, "properties": _OBJECT},
    CallType.GROUP: {"groupId": {"type": ["string", "number"]}, "traits": _OBJECT},
    CallType.PAGE: {"name": {}, "properties": _OBJECT},
    CallType.SCREEN: {"name": {}, "properties": _OBJECT},
    CallType.ALIAS: {"previousId": {"minLength": 1}},
}
_REQUIRED = {CallType.TRACK: ["event"], CallType.GROUP: ["groupId"], CallType.ALIAS: ["previousId"]}
_BATCH = {
    "type": "object",
    "required": ["batch"],
    "properties": {
        "batch": {"type": "array", "maxItems": 2500, "items": {"$ref": "#/components/schemas/call"}},
        "context": {**_OBJECT, "description": "Merged into each call, whose own members win."},
        "integrations": _OBJECT,
        "sentAt": _FIELDS["sentAt"],
        "writeKey": _FIELDS["writeKey"],
    },
}
_VERDICT = {
    "type": "object",
    "required": ["messageId", "status"],
    "properties": {
        "messageId": {"type": ["string", "null"]},
        "status": {"enum": ["accepted", "ignored", "repeated", "refused"]},
        "reason": {"type": "string"},
        "leftOut": {"type": "array", "items": {"type": "string"}, "description": "Traits that are not sent."},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["success"],
    "properties": {
        "success": {"type": "boolean"},
        "error": {"type": "string"},
        "calls": {"type": "array", "items": {"$ref": "#/components/schemas/verdict"}},
    },
}
_STATUS = {
    "type": "object",
    "required": ["status"],
    "properties": {
        "status": {"enum": ["ok", "failing"]},
        "reason": {"type": "string"},
        "daemon_heartbeat_at": {
            "type": ["string", "null"],
            "description": "Who delivers was last seen then.",
        },
    },
}
_REFUSALS = {
    "400": "Not JSON, not gzip, or not a call.",
    "401": "The write key is missing or not known.",
    "403": "Without write keys only programs on this machine may send.",
    "408": "The body took too long.",
    "413": "Larger than 32 KB a call, 500 KB or 2,500 calls a batch.",
    "429": "More calls than [tracking] calls_per_second: Retry-After says when.",
    "503": "The database, or another connection, cannot be had: try again.",
}


def _answer(description: str, schema: str = "answer") -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": content}


def _post(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "security": [{"writeKey": []}, {}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {
                "200": _answer("All that is accepted is committed; a verdict for each call."),
                **{status: _answer(why) for status, why in _REFUSALS.items()},
            },
        }
    }


def _call(call_type: CallType) -> dict[str, Any]:
    properties = {**_FIELDS, **_OWN[call_type]}
    return {"type": "object", "required": _REQUIRED.get(call_type, []), "properties": properties}


_HEALTH = {
    "get": {
        "summary": "Whether calls can be kept now.",
        "responses": {
            "200": _answer("They can.", "health"),
            "503": _answer("They cannot: reason says why.", "health"),
        },
    }
}

DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "audience-sync tracking API", "version": __version__},
    "paths": {
        **{f"/v1/{each}": _post(f"Hand in one {each} call.", _call(each)) for each in CallType},
        "/v1/batch": _post("Hand in many calls.", _BATCH),
        "/healthz": _HEALTH,
    },
    "components": {
        "schemas": {
            "answer": _ANSWER,
            "verdict": _VERDICT,
            "health": _STATUS,
            "call": {"type": "object", "properties": {"type": {"enum": list(CallType)}, **_FIELDS}},
        },
        "securitySchemes": {
            "writeKey": {
                "type": "http",
                "scheme": "basic",
                "description": "The write key is the user name; the password is empty.",
            }
        },
    },
}
