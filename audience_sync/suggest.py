"""Hints about unknown names in error messages."""

import difflib
from collections.abc import Iterable


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
