"""Keys: the snake_cased name of a definition, which is the property that Userpilot sees."""

import re

import inflection

from audience_sync.errors import ConfigError

MAX_LENGTH = 200

# OrderCompleted, HTTPServer: a capital with two lower-case letters after it starts a word. VIPs stays whole.
_NEW_WORD = re.compile(r"(?<=[A-Za-z])(?=[A-Z][a-z]{2})")


def from_name(name: str) -> str:
    """The key of a name, as Segment's examples have it: `Order Completed Last 30days` gives
    `order_completed_last_30days`. A name that is too long, or leaves nothing, is a ConfigError.
    """
    if len(name) > MAX_LENGTH:  # first: inflection's expressions are quadratic
        raise ConfigError(f"a name has at most {MAX_LENGTH} characters, this one {len(name)}: shorten it")
    words = _NEW_WORD.sub("_", inflection.transliterate(name))
    key = re.sub(r"[-_]+", "_", inflection.parameterize(words, "_")).strip("_")
    if not key:
        raise ConfigError(
            f'no key can be made of the name {name!r}: give it one by hand, for example key = "my_audience"'
        )
    return check(key)


def check(key: str) -> str:
    """The key itself, if it is one: a key that is set by hand goes to Userpilot as it is written."""
    if len(key) > MAX_LENGTH or not re.fullmatch(r"[a-z0-9_]*[a-z0-9][a-z0-9_]*", key):
        raise ConfigError(
            f"a key holds lower-case letters (a to z), digits and underscores, at least one letter or digit, "
            f"and at most {MAX_LENGTH} characters: this is not one: {key[:MAX_LENGTH]!r}"
        )
    return key
