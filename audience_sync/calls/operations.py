"""FQL's operators and functions on JSON values.

They take arguments of any type, and raise only at Python's limits: RecursionError for thousands of levels, ValueError
for thousands of digits.
"""

import json
import math
import operator
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

MAX_GLOB_LENGTH = 500


def compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_text(value: Any) -> str:
    """Return text unchanged, anything else as compact JSON; whole numbers without a fraction."""
    return value if isinstance(value, str) else compact_json(value).removesuffix(".0")


def json_or_text(text: str) -> Any:
    """Decode the text if it is JSON, else return it unchanged; NaN and infinite numbers are text."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return text


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(digits)
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):  # to Python, True is 1
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    return bool(left == right)


def _contained(value: Any, options: Any) -> bool:
    return isinstance(options, list) and any(equal(value, option) for option in options)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda left, right: _is_number(left) and _is_number(right) and compare(left, right)


def _on_text(change: Callable[[str], str]) -> Callable[[Any], str | None]:
    return lambda value: change(value) if isinstance(value, str) else None


def _title(text: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))


def _contains(text: Any, part: Any) -> bool:
    return isinstance(text, str) and isinstance(part, str) and part in text


def _matches(text: Any, pattern: Any) -> bool:
    expression = glob(pattern) if isinstance(text, str) and isinstance(pattern, str) else None
    return expression is not None and expression.fullmatch(text) is not None


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))  # Segment counts bytes
    return len(value) if isinstance(value, list) else 0


def _type(value: Any) -> str:
    names = {str: "string", bool: "bool", list: "list", dict: "object", int: "number", float: "number"}
    return names.get(type(value), "null")


def _bool(value: Any) -> bool:
    """Return false for null, zero, empty values, and the texts "false" and "0"; otherwise true."""
    return bool(value) and value not in ("false", "0")


def _string(value: Any) -> str | None:
    return None if value is None or isinstance(value, dict) else json_text(value)


def _number(value: Any) -> float | None:
    """Return a number unchanged, the text of a JSON number as that number, otherwise null."""
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", value):
        value = json.loads(value)
    return value if _is_number(value) and abs(value) < math.inf else None


@lru_cache(maxsize=1024)
def glob(pattern: str) -> re.Pattern[str] | None:
    """Compile a glob into a regular expression; None if the pattern is not valid.

    Each `*` is an atomic group: it stops at the first match of the text between it and the next `*`, and never
    backtracks. The cost is at most the length of the text times the length of the pattern.
    """
    parts = [""]
    position = 0
    while position < len(pattern):
        token = _GLOB_TOKEN.match(pattern, position)
        if token is None or len(pattern) > MAX_GLOB_LENGTH:
            return None
        position = token.end()
        if token[0] == "*":
            parts.append("")
        elif token["members"]:
            parts[-1] += _one_of(token["members"])
        else:
            parts[-1] += "." if token[0] == "?" else re.escape(token[0][-1])
    first, *middle = parts
    last = f".*{middle.pop()}" if middle else ""
    return re.compile(first + "".join(f"(?>.*?{part})" for part in middle) + last, re.DOTALL)


_GLOB_TOKEN = re.compile(r"\\.|\[(?P<members>(\\.|[^\\\]])+)\]|[^\\\[]", re.DOTALL)
_GLOB_MEMBER = re.compile(r"\\?(?P<first>.)(-\\?(?P<last>.))?", re.DOTALL)


def _one_of(members: str) -> str:
    ends = [(member["first"], member["last"] or member["first"]) for member in _GLOB_MEMBER.finditer(members)]
    ranges = [f"{re.escape(first)}-{re.escape(last)}" for first, last in ends if first <= last]
    return f"[{''.join(ranges)}]" if ranges else "(?!)"


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": equal,
    "!=": lambda left, right: not equal(left, right),
    ">": _ordered(operator.gt),
    ">=": _ordered(operator.ge),
    "<": _ordered(operator.lt),
    "<=": _ordered(operator.le),
    "in": _contained,
}


class Function(NamedTuple):
    arguments: tuple[str, ...]
    returns: str
    apply: Callable[..., Any]


FUNCTIONS = {
    "contains": Function(("text", "part"), "bool", _contains),
    "match": Function(("text", "pattern"), "bool", _matches),
    "length": Function(("value",), "number", _length),
    "lowercase": Function(("text",), "string", _on_text(str.lower)),
    "uppercase": Function(("text",), "string", _on_text(str.upper)),
    "snakecase": Function(("text",), "string", _on_text(lambda text: text.replace(" ", "_"))),
    "kebabcase": Function(("text",), "string", _on_text(lambda text: text.replace(" ", "-"))),
    "titlecase": Function(("text",), "string", _on_text(_title)),
    "typeof": Function(("value",), "string", _type),
    "bool": Function(("value",), "bool", _bool),
    "string": Function(("value",), "string", _string),
    "number": Function(("value",), "number", _number),
}
