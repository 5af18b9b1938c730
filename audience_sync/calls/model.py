"""The words of the general path: a call that an application handed in, and what it may ask of Userpilot."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


class CallType(StrEnum):
    IDENTIFY = "identify"
    TRACK = "track"
    GROUP = "group"


class Action(StrEnum):
    IDENTIFY = "identify"
    TRACK = "track"
    COMPANY = "company"


@dataclass(frozen=True, slots=True)
class Call:
    """A call that passed validation; `timestamp` is aware, in UTC."""

    type: CallType
    message_id: str
    user_id: str | None
    anonymous_id: str | None
    group_id: str | None
    event: str | None
    traits: dict[str, Any]
    properties: dict[str, Any]
    context: dict[str, Any]
    timestamp: datetime

    @property
    def subject_id(self) -> str | None:
        """The user that the call is about: userId, else anonymousId."""
        return self.user_id if self.user_id is not None else self.anonymous_id

    def anonymous(self) -> "Call":
        """That there was such a call, and nothing about whom or what."""
        return Call(self.type, self.message_id, None, None, None, None, {}, {}, {}, self.timestamp)
