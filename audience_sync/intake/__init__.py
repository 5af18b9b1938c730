"""The doors for calls. This is the Python one: Identify, Track and Group, each committed when its function returns.

    with open_app() as app:
        intake.identify(app, "u1", {"plan": "pro"})
        intake.track(app, "u1", "Order Completed", {"total": 12.5})
        app.deliver()

Delivery is `app.deliver()`, a `sync`, or any other process that works the queue. The other doors are `files` and,
beside the package, `web`; all of them `prepare` calls and `keep` them.
"""

import datetime as dt
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from audience_sync.app import App
from audience_sync.calls import mappings, records, validation
from audience_sync.calls.model import Call
from audience_sync.calls.records import PreparedCall
from audience_sync.db import engines
from audience_sync.errors import CallError
from audience_sync.settings import Settings


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a call: accepted for delivery, or ignored for a reason. A repeat changed nothing.

    `reason` is also there where one mapping of several failed.
    """

    call_id: int
    message_id: str
    ignored: str | None = None
    left_out: tuple[str, ...] = ()  # traits that are not sent
    is_repeat: bool = False
    reason: str | None = None


def identify(app: App, user_id: str, traits: Mapping[str, Any] | None = None, **fields: Any) -> Receipt:
    """Tell traits of a user. `fields`: message_id, timestamp (aware datetime), context, integrations.

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


def accept(app: App, raw: Mapping[str, Any]) -> Receipt:
    """Take in a call in Segment's form: `{"type", "userId", "traits", "messageId", …}`.

    Raises:
        CallError: it is not valid; nothing was kept.

    """
    return save(app, prepare(app.settings, [parse(raw, received_at=app.clock.now())]))[0]


def parse(raw: Mapping[str, Any], *, received_at: dt.datetime, sent_at: dt.datetime | None = None) -> Call:
    """Check a call as `validation.parse` does; one without a message id gets a new one."""
    return validation.parse(raw, received_at=received_at, sent_at=sent_at, new_id=_new_id)


def prepare(settings: Settings, found: Iterable[Call]) -> list[PreparedCall]:
    """Decide what each call asks for, and write it down as text: all but the database's part."""
    keys = {definition.key for definition in settings.definitions}
    every = (*(mappings.PRESETS if settings.destination.presets else ()), *settings.mappings)
    return [records.prepare(call, mappings.decide(call, every, reserved_keys=keys)) for call in found]


def save(app: App, prepared: Sequence[PreparedCall]) -> list[Receipt]:
    """Keep calls and queue what they ask for, in one transaction; a receipt for each, in their order."""
    with saving(app) as keep:
        kept = keep(prepared)
    return [_receipt(*each) for each in zip(prepared, kept, strict=True)]


@contextmanager
def saving(
    app: App, *, user_by_user: bool = False
) -> Iterator[Callable[[Sequence[PreparedCall]], list[records.SavedCall]]]:
    """A transaction in which calls may be kept several times; none of them is before it ends.

    `user_by_user`: of different users, those that are kept together are delivered in any order.
    """
    destination = app.settings.destination
    fingerprint = destination.fingerprint or None
    with engines.write(app.engine) as connection:
        yield lambda prepared: records.add(
            connection,
            prepared,
            received_at=app.clock.now(),
            fingerprint=fingerprint,
            user_by_user=user_by_user,
        )


def _receipt(call: PreparedCall, kept: records.SavedCall) -> Receipt:
    if kept.is_repeat:
        return Receipt(kept.call_id, call.message_id, is_repeat=True)
    return Receipt(kept.call_id, call.message_id, kept.ignored, call.names_left_out, reason=kept.reason)


def _new_id() -> str:
    return f"audience-sync-{uuid.uuid4()}"


_FIELDS = {
    "message_id": "messageId",
    "timestamp": "timestamp",
    "context": "context",
    "integrations": "integrations",
}


def _accept(app: App, raw: dict[str, Any], fields: Mapping[str, Any]) -> Receipt:
    for name, value in fields.items():
        if name not in _FIELDS:
            raise CallError(f"{name} is no field of a call: there are {', '.join(_FIELDS)}.")
        raw[_FIELDS[name]] = value
    return accept(app, raw)
