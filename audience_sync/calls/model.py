"""The types of a call: `Call` (validated), `PreparedCall` (ready to be stored) and `Receipt` (its outcome)."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple


class CallType(StrEnum):
    IDENTIFY = "identify"
    TRACK = "track"
    GROUP = "group"
    PAGE = "page"
    SCREEN = "screen"
    ALIAS = "alias"


@dataclass(frozen=True, slots=True)
class Call:
    """A valid call; `timestamp` is aware, in UTC.

    `document` is the call in Segment's fields, which triggers and mappings read; its ids are strings. `corrections` say
    which values were corrected, `left_out` has the traits beyond the limits.
    """

    type: CallType
    message_id: str
    user_id: str | None
    anonymous_id: str | None
    group_id: str | None
    event: str | None
    timestamp: datetime
    document: dict[str, Any] = field(default_factory=dict)
    corrections: tuple[str, ...] = ()
    left_out: dict[str, Any] = field(default_factory=dict)

    @property
    def subject_id(self) -> str | None:
        """The user's id: userId, else anonymousId."""
        return self.user_id if self.user_id is not None else self.anonymous_id

    @property
    def traits(self) -> dict[str, Any]:
        return self.document.get("traits") or {}

    @property
    def properties(self) -> dict[str, Any]:
        return self.document.get("properties") or {}

    @property
    def context(self) -> dict[str, Any]:
        return self.document.get("context") or {}


class PreparedDelivery(NamedTuple):
    """A delivery of a call; `body` is JSON text.

    `names` has the properties of its flattened traits, each with its trait; None if each trait is one property.
    """

    action: str
    subject_id: str
    body: str
    has_traits: bool = False
    is_flattened: bool = False
    names: dict[str, str] | None = None


class PreparedCall(NamedTuple):
    """A call with its deliveries, as text that can be stored."""

    message_id: str
    type: str
    user_id: str | None
    anonymous_id: str | None
    group_id: str | None
    event: str | None
    body: str
    timestamp: str
    reason: str | None
    left_out: str | None
    corrected: str | None  # a list of texts
    deliveries: tuple[PreparedDelivery, ...]
    properties: str
    context: str
    traits: str  # of an identify or group call that has any
    left_out_names: tuple[str, ...]
    corrections: tuple[str, ...]

    @property
    def subject_id(self) -> str | None:
        return self.user_id if self.user_id is not None else self.anonymous_id

    @property
    def ignored(self) -> str | None:
        return None if self.deliveries else self.reason


@dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome of a call: accepted for delivery, ignored for a reason, or a repeat, which changed nothing.

    `reason` says why the call, or a part of it, is not delivered; `left_out` names traits that are not sent;
    `corrected` says which values were corrected.
    """

    call_id: int
    message_id: str
    ignored: str | None = None
    left_out: tuple[str, ...] = ()
    is_repeat: bool = False
    reason: str | None = None
    corrected: tuple[str, ...] = ()
