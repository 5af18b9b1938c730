"""A definition, as the rest of the package sees it."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    AUDIENCE = "audience"
    TRAIT = "trait"


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
