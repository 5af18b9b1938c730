"""Identify, track and group calls from Python; a call is committed when its function returns.

    with open_app() as app:
        intake.identify(app, "u1", {"plan": "pro"})
        intake.track(app, "u1", "Order Completed", {"total": 12.5})
        app.deliver()

`app.deliver()` sends what is due; so do the commands `sync`, `deliver` and `daemon`, in any process. Calls also come
from files (`files`) and over HTTP (`server`, `http`, `writer`), by the same functions. Next: calls/records.py.
"""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from audience_sync.app import App
from audience_sync.calls import mappings, records, validation
from audience_sync.calls.model import PreparedCall, Receipt
from audience_sync.db import dialects, engines
from audience_sync.errors import CallError
from audience_sync.settings import Settings

__all__ = ["Receipt", "group", "identify", "submit", "track"]

HISTORY = "history: stored, not sent"  # the reason of a call that is only stored
_FIELDS = {
    "message_id": "messageId",
    "timestamp": "timestamp",
    "context": "context",
    "integrations": "integrations",
}


def identify(app: App, user_id: str, traits: Mapping[str, Any] | None = None, **fields: Any) -> Receipt:
    """Set traits of a user. `fields`: message_id, timestamp (aware datetime), context, integrations.

    Raises CallError if the call is not valid; nothing was stored.
    """
    raw = {"type": "identify", "userId": user_id, "traits": dict(traits or {})}
    return submit(app, raw | _in_camel_case(fields))


def track(
    app: App, user_id: str, event: str, properties: Mapping[str, Any] | None = None, **fields: Any
) -> Receipt:
    """Record an event of a user. `fields` and errors as for identify."""
    raw = {"type": "track", "userId": user_id, "event": event, "properties": dict(properties or {})}
    return submit(app, raw | _in_camel_case(fields))


def group(
    app: App, user_id: str, group_id: str, traits: Mapping[str, Any] | None = None, **fields: Any
) -> Receipt:
    """Set the company of a user, and traits of the company. `fields` and errors as for identify."""
    raw = {"type": "group", "userId": user_id, "groupId": group_id, "traits": dict(traits or {})}
    return submit(app, raw | _in_camel_case(fields))


def submit(app: App, raw: Mapping[str, Any]) -> Receipt:
    """Store a call in Segment's form, `{"type", "userId", "traits", "messageId", …}`, and queue its deliveries.

    Raises CallError if the call is not valid; nothing was stored.
    """
    call = Preparer(app.settings).prepare(raw, received_at=app.clock.now())
    return save(app, [call])[0]


class Preparer:
    """Validates calls and applies the mappings of a configuration."""

    def __init__(self, settings: Settings) -> None:
        presets = mappings.PRESETS if settings.destination.presets else ()
        self._mappings = (*presets, *settings.mappings)
        self._reserved_keys = {definition.key for definition in settings.definitions}
        self._flatten = settings.destination.nested == "flatten"

    def prepare(
        self,
        raw: Mapping[str, Any],
        *,
        received_at: dt.datetime,
        sent_at: dt.datetime | None = None,
        corrections: Sequence[str] = (),
    ) -> PreparedCall:
        """Prepare a call without the database; give it a message id if it has none. Raises CallError as parse_call does."""
        call = validation.parse_call(
            raw, received_at=received_at, new_id=_new_id, sent_at=sent_at, corrections=corrections
        )
        decision = mappings.decide(call, self._mappings, reserved_keys=self._reserved_keys)
        return records.prepare_call(call, decision, flatten=self._flatten)


def as_history(call: PreparedCall) -> PreparedCall:
    """Return the call without its deliveries, so that it is only stored."""
    return call._replace(deliveries=(), reason=HISTORY)


def save(app: App, calls: Sequence[PreparedCall]) -> list[Receipt]:
    """Store calls and queue their deliveries in one transaction; return receipts in the order of the calls."""
    with engines.write(app.engine) as connection:
        return save_within(connection, app, calls)


def save_within(
    connection: sa.Connection, app: App, calls: Sequence[PreparedCall], *, user_by_user: bool = False
) -> list[Receipt]:
    """Store calls as `save` does, in the caller's transaction; `user_by_user` as for records.save_calls.

    If this machine's clock is ahead of the database's, the database's is used.
    """
    received_at = min(app.clock.now(), dialects.now(connection))
    return records.save_calls(
        connection,
        [records.not_after(call, received_at) for call in calls],
        received_at=received_at,
        fingerprint=app.destination.fingerprint,
        user_by_user=user_by_user,
    )


def _new_id() -> str:
    return f"audience-sync-{uuid.uuid4()}"


def _in_camel_case(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in fields:
        if name not in _FIELDS:
            raise CallError(f"a call has no field {name}: known are {', '.join(_FIELDS)}.")
    return {_FIELDS[name]: value for name, value in fields.items()}
