"""A valid call."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class CallType(StrEnum):
    IDENTIFY = "identify"
    TRACK = "track"
    GROUP = "group"
    PAGE = "page"
    SCREEN = "screen"
    ALIAS = "alias"


@dataclass(frozen=True, slots=True)
class Call:
    """A call that passed validation; `timestamp` is aware, in UTC.

    `document` is the call in Segment's fields, as triggers and mappings read it: ids are strings.
    """

    type: CallType
    message_id: str
    user_id: str | None
    anonymous_id: str | None
    group_id: str | None
    event: str | None
    timestamp: datetime
    document: dict[str, Any] = field(default_factory=dict)

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
