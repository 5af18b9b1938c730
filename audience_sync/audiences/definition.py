"""A definition: the query of an audience or a trait, its key, and the guard on its runs, which start in runs.py."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

import inflection

from audience_sync.audiences.query.configured import ConfiguredQuery
from audience_sync.audiences.schedule import Schedule
from audience_sync.errors import ConfigError

MAX_KEY_LENGTH = 200
MIN_LOST = 10  # an empty snapshot is held if the last one had this many members, whatever `above` is
# A capital letter followed by two lower-case letters starts a word: OrderCompleted, HTTPServer. VIPs stays whole.
_NEW_WORD = re.compile(r"(?<=[A-Za-z])(?=[A-Z][a-z]{2})")
# Unicode's names show how to write a Latin letter that has no decomposition, such as ø, ł and æ.
_LETTERS = {"ENG": "NG", "ETH": "D", "SCHWA": "E", "SHARP S": "SS", "THORN": "TH"}
_LATIN = re.compile(
    r"LATIN (?P<case>CAPITAL|SMALL) (?:LETTER|LIGATURE) (?:AFRICAN |BARRED |DOTLESS |OPEN |SCRIPT )?"
    rf"(?P<letters>[A-Z]{{1,2}}|{'|'.join(_LETTERS)})(?: WITH .+)?"
)
_MARKS = {"Mn", "Mc", "Me", "Cf"}


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
        """Return a sentence about the limit that a run exceeds, or None. It is not called for first runs.

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
                f"{entered_count:,} users would enter an audience of {last_count:,} members, and max_enter_ratio is "
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
    """An audience (its SQL returns `user_id`) or a computed trait (`user_id` and `value`), as `sql` or `query`.

    `source`: the name of a configured source; None is our own database. `is_key_derived`: the configuration sets no
    key, so the key that was stored when the name was first used applies, even if newer rules derive another one.
    `key_error`: why no key can be derived now; only a stored one can be used.
    """

    key: str
    name: str
    kind: Kind
    sql: str = ""
    query: ConfiguredQuery | None = None
    source: str | None = None
    enabled: bool = True
    timeout_seconds: float = 600.0
    timezone: str = "UTC"  # of :today
    value_type: str | None = None  # a trait's values are converted to boolean, number or string
    is_key_derived: bool = False
    key_error: str | None = None
    schedule: Schedule | None = None
    full_schedule: Schedule | None = None
    guard: Guard = Guard()
    eligible_sql: str | None = None  # returns the user_id of everyone who may enter
    ready_sql: str | None = None  # returns true once a run may compute
    is_preview: bool = False  # a query that is not in the configuration; a user waits for its result


def key_from_name(name: str) -> str:
    """Return the snake_cased key of a name, the property that Userpilot sees.

    `Order Completed Last 30days` becomes `order_completed_last_30days`, as in Segment's examples, and `Straße` becomes
    `strasse`. Letters of other alphabets are refused: their transliteration depends on the language, and a key is
    permanent.

    Raises:
        ConfigError: the name is too long, has a letter that is refused, or has no letter or digit at all.

    """
    if len(name) > MAX_KEY_LENGTH:  # checked first: inflection's expressions take quadratic time
        raise ConfigError(f"a name has at most {MAX_KEY_LENGTH} characters, this one {len(name)}: shorten it")
    key = _snake_case("".join(_transliterate(name)))
    if not key:
        raise ConfigError(
            f'no key can be derived from the name {name!r}: set one, for example key = "my_audience"'
        )
    return check_key(key)


def older_key_from_name(name: str) -> str:
    """Return the key that older versions derived, without letters such as ß and ł. Empty if they refused the name."""
    key = _snake_case(inflection.transliterate(name)) if len(name) <= MAX_KEY_LENGTH else ""
    return key if len(key) <= MAX_KEY_LENGTH else ""


def _snake_case(name: str) -> str:
    separated = _NEW_WORD.sub("_", name)
    return re.sub(r"[-_]+", "_", inflection.parameterize(separated, "_")).strip("_")


def _transliterate(name: str) -> Iterator[str]:
    """Yield ASCII for each character of a name."""
    for character, following in zip_longest(name, name[1:], fillvalue=""):
        parts = [_to_ascii(part) for part in unicodedata.normalize("NFKD", character)]
        if None in parts:
            raise ConfigError(
                f"no key can be derived from the name {name!r}: {character} cannot be written with a to z. "
                'Set a key, for example key = "my_audience"'
            )
        text = "".join(filter(None, parts))
        is_title = len(text) > 1 and text.isupper() and following.islower()
        yield text.capitalize() if is_title else text  # Æther is Aether, one word


def _to_ascii(character: str) -> str | None:
    """Return ASCII for a decomposed character: nothing for a mark, a space for a symbol, None for another alphabet."""
    if character.isascii():
        return character
    category, unicode_name = unicodedata.category(character), unicodedata.name(character, "")
    if category in _MARKS or unicode_name.startswith("MODIFIER LETTER"):
        return ""
    if category[0] not in "LN":
        return " "
    if (digit := unicodedata.digit(character, None)) is not None:
        return str(digit)
    latin = _LATIN.fullmatch(unicode_name)
    if latin is None:
        return None
    letters = _LETTERS.get(latin["letters"], latin["letters"])
    return letters if latin["case"] == "CAPITAL" else letters.lower()


def check_key(key: str) -> str:
    """Return the key unchanged if it is valid, else raise ConfigError."""
    if len(key) > MAX_KEY_LENGTH or not re.fullmatch(r"[a-z0-9_]*[a-z0-9][a-z0-9_]*", key):
        raise ConfigError(
            "a key consists of lower-case letters (a to z), digits and underscores, with at least one letter or "
            f"digit and at most {MAX_KEY_LENGTH} characters: {key[:MAX_KEY_LENGTH]!r} is not valid"
        )
    return key
