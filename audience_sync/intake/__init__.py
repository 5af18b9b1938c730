"""The Python door for calls: Identify, Track and Group, queued in one transaction each.

    with open_app() as app:
        intake.identify(app, "u1", {"plan": "pro"})
        intake.track(app, "u1", "Order Completed", {"total": 12.5})
        app.deliver()

A call is accepted when the function returns: it is committed. Delivery is `app.deliver()`, a `sync`, or any
other process that works the queue.
"""

import datetime as dt
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from audience_sync.app import App
from audience_sync.calls import presets, validation
from audience_sync.errors import CallError
from audience_sync.store import calls, engines


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a call: accepted for delivery, or ignored for a reason. A repeat changed nothing."""

    call_id: int
    message_id: str
    ignored: str | None = None
    left_out: tuple[str, ...] = ()  # traits that are not sent
    is_repeat: bool = False


def identify(app: App, user_id: str, traits: Mapping[str, Any] | None = None, **fields: Any) -> Receipt:
    """Tell traits of a user. `fields`: message_id, timestamp (aware datetime), context.

    Raises:
        CallError: the call is not valid; nothing was kept.

    """
    return _accept(app, {"type": "identify", "userId": user_id, "traits": dict(traits or {})}, fields)


def track(
    app: App, user_id: str, event: str, properties: Mapping[str, Any] | None = None, **fields: Any
) -> Receipt:
    """Tell something that a user did. `fields` and errors as for identify."""
    raw = {"type": "track", "userId": user_id, "event": event, "properties": dict(properties or {})}
    return _accept(app, raw, fields)


def group(
    app: App, user_id: str, group_id: str, traits: Mapping[str, Any] | None = None, **fields: Any
) -> Receipt:
    """Tell the company of a user, and the company's traits. `fields` and errors as for identify."""
    raw = {"type": "group", "userId": user_id, "groupId": group_id, "traits": dict(traits or {})}
    return _accept(app, raw, fields)


def accept(app: App, raw: Mapping[str, Any], *, received_at: dt.datetime | None = None) -> Receipt:
    """Take in a call in Segment's form: `{"type", "userId", "traits", "messageId", …}`.

    Raises:
        CallError: it is not valid; nothing was kept.

    """
    moment = received_at or app.clock.now()
    call = validation.parse(raw, received_at=moment, new_id=lambda: f"audience-sync-{uuid.uuid4()}")
    keys = {definition.key for definition in app.settings.definitions}
    destination = app.settings.destination
    outgoing, left_out = presets.deliveries_for(call, reserved_keys=keys)
    ignored = None
    if not destination.presets:
        outgoing, ignored = [], "no mapping matched: [destination] presets is false"
    with engines.write(app.engine) as connection:
        call_id = calls.add(
            connection,
            call,
            outgoing,
            received_at=moment,
            ignored=ignored,
            left_out=left_out,
            fingerprint=destination.fingerprint if destination.api_key else None,
        )
        if call_id is None:
            return Receipt(calls.id_of(connection, call.message_id), call.message_id, is_repeat=True)
        ignored = calls.ignored_because(connection, call_id)
    return Receipt(call_id, call.message_id, ignored, tuple(left_out))


_FIELDS = {"message_id": "messageId", "timestamp": "timestamp", "context": "context"}


def _accept(app: App, raw: dict[str, Any], fields: Mapping[str, Any]) -> Receipt:
    for name, value in fields.items():
        if name not in _FIELDS:
            raise CallError(f"{name} is no field of a call: there are {', '.join(_FIELDS)}.")
        raw[_FIELDS[name]] = value
    return accept(app, raw)
