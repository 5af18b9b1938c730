"""A definition, as the rest of the package sees it."""

from dataclasses import dataclass
from enum import StrEnum

from audience_sync.audiences.schedule import Schedule


class Kind(StrEnum):
    AUDIENCE = "audience"
    TRAIT = "trait"


@dataclass(frozen=True, slots=True)
class Guard:
    """When a run is held for a person: more than these shares of a last snapshot of at least `above` members."""

    above: int = 100
    max_exit_ratio: float = 0.5
    max_enter_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class Definition:
    """An audience (its SQL gives `user_id`) or a computed trait (`user_id` and `value`).

    `source` is the name of a declared source; None is our own database. `is_key_derived`: the configuration
    gives no key, so the one that was stored with the name at its first use holds, whatever the rule is by now.
    """

    key: str
    name: str
    kind: Kind
    sql: str
    source: str | None = None
    enabled: bool = True
    timeout_seconds: float = 600.0
    is_key_derived: bool = False
    schedule: Schedule | None = None
    full_schedule: Schedule | None = None
    guard: Guard = Guard()
    eligible_sql: str | None = None  # gives user_id of those whom Userpilot knows
    ready_sql: str | None = None  # gives true once the source may be computed on
