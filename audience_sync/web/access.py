"""Access to the dashboard. Without configured users, programs on this machine may read it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Viewer:
    """The person who asks: signed in with a role, or, without configured users, somebody on this machine."""

    name: str | None = None
    role: str = "read"
    csrf: str = ""

    @property
    def may_operate(self) -> bool:
        return self.role == "operate"
