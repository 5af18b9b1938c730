"""Hints in error messages: the nearest known name, the position in a text, and what is allowed there."""

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Suggest the nearest known name; if none is near, return `otherwise` or list the known names."""
    names = list(known)
    nearest = difflib.get_close_matches(name[:60], names, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean {shown(nearest[0])}?"
    if otherwise is not None:
        return otherwise
    return f"known are {', '.join(map(shown, names))}" if names else "none is declared"


def shown(name: str) -> str:
    """Return the name as messages show it: at most 60 characters, all printable."""
    return name if len(name) <= 60 and name.isprintable() else ascii(name[:60])


def located(text: str, position: int, message: str) -> str:
    """Return the message with the position's line and column, and with an excerpt that marks it."""
    before, after = text[:position].rpartition("\n")[2], text[position:].partition("\n")[0]
    start = before[-30:]
    excerpt = "".join(letter if letter.isprintable() else " " for letter in start + after[:30])
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {len(before) + 1}: {message}\n    {excerpt}\n    {' ' * len(start)}^"


def one_of(names: Sequence[str]) -> str:
    """Join names as in `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
