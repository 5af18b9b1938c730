"""A definition: the query of an audience or a trait, its key, and the guard on its runs, which start in runs.py."""

import re
from dataclasses import dataclass
from enum import StrEnum

import inflection

from audience_sync.audiences.schedule import Schedule
from audience_sync.errors import ConfigError

MAX_KEY_LENGTH = 200
MIN_LOST = 10  # members of the last snapshot from which an empty one is held, whatever `above` is
# A capital letter followed by two lower-case letters starts a word: OrderCompleted, HTTPServer. VIPs stays whole.
_NEW_WORD = re.compile(r"(?<=[A-Za-z])(?=[A-Z][a-z]{2})")


class Kind(StrEnum):
    AUDIENCE = "audience"
    TRAIT = "trait"


@dataclass(frozen=True, slots=True)
class Guard:
    """Limits beyond which a run is held for approval, as shares of the last snapshot's size.

    `above`: the guard applies if the last snapshot had at least this many members. It also applies to an empty snapshot
    if the last one had at least MIN_LOST members.
    """

    above: int = 100
    max_exit_ratio: float = 0.5
    max_enter_ratio: float = 1.0
    max_change_ratio: float = 0.9

    def reason_to_hold(
        self,
        last_count: int,
        *,
        entered_count: int,
        exited_count: int,
        changed_count: int = 0,
        is_empty: bool,
    ) -> str | None:
        """Return a sentence about the limit that a run exceeds, or None. The caller lets first runs pass.

        `last_count` is the size of the last snapshot. `changed_count`: members whose trait gets another value.
        `is_empty`: the new snapshot has no usable rows. That counts as everyone exiting.
        """
        if last_count < (min(self.above, MIN_LOST) if is_empty else self.above):
            return None
        if is_empty:
            exited_count = last_count
        if exited_count > self.max_exit_ratio * last_count:
            exits = f"{exited_count:,} of {last_count:,} members would leave"
            return f"{'the snapshot is empty' if is_empty else exits}, and max_exit_ratio is {self.max_exit_ratio:g}"
        if entered_count > self.max_enter_ratio * last_count:
            return (
                f"{entered_count:,} users would enter beside {last_count:,} members, and max_enter_ratio is "
                f"{self.max_enter_ratio:g}"
            )
        if changed_count > self.max_change_ratio * last_count:
            return (
                f"{changed_count:,} of {last_count:,} members would get another value, and max_change_ratio is "
                f"{self.max_change_ratio:g}"
            )
        return None


@dataclass(frozen=True, slots=True)
class Definition:
    """An audience (its SQL returns `user_id`) or a computed trait (`user_id` and `value`).

    `source`: the name of a declared source; None is our own database. `is_key_derived`: the configuration sets no
    key, so the key stored at the name's first use applies, even if the rule that derives keys has changed since.
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
    eligible_sql: str | None = None  # returns the user_id of everyone who may enter
    ready_sql: str | None = None  # returns true once a run may compute


def key_from_name(name: str) -> str:
    """Return the snake_cased key of a name, the property that Userpilot sees.

    `Order Completed Last 30days` becomes `order_completed_last_30days`, as in Segment's examples.

    Raises:
        ConfigError: the name is too long, or has no letter or digit to make a key of.

    """
    if len(name) > MAX_KEY_LENGTH:  # checked first: inflection's expressions take quadratic time
        raise ConfigError(f"a name has at most {MAX_KEY_LENGTH} characters, this one {len(name)}: shorten it")
    separated = _NEW_WORD.sub("_", inflection.transliterate(name))
    key = re.sub(r"[-_]+", "_", inflection.parameterize(separated, "_")).strip("_")
    if not key:
        raise ConfigError(
            f'no key can be derived from the name {name!r}: set one, for example key = "my_audience"'
        )
    return check_key(key)


def check_key(key: str) -> str:
    """Return the key unchanged if it is valid, else raise ConfigError."""
    if len(key) > MAX_KEY_LENGTH or not re.fullmatch(r"[a-z0-9_]*[a-z0-9][a-z0-9_]*", key):
        raise ConfigError(
            "a key consists of lower-case letters (a to z), digits and underscores, with at least one letter or "
            f"digit and at most {MAX_KEY_LENGTH} characters: {key[:MAX_KEY_LENGTH]!r} is not valid"
        )
    return key
