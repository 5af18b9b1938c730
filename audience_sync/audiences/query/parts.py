"""Parts of a query that are parsed without their context: function calls, spans, strings, numbers and paths."""

import math
import re
from dataclasses import dataclass
from typing import NoReturn

from lark import Token, Tree

from audience_sync.audiences.query.form import children_of, end_of, start_of, tokens_of
from audience_sync.audiences.query.tree import ANY_ITEM, Span, ValuePath
from audience_sync.suggest import shown

MAX_DAYS = 36_500
MAX_DIGITS = 300  # every number with this many digits fits into a double
MAX_STEPS = 32
_UNITS = {"hour": False, "hours": False, "day": True, "days": True}


class Mistake(Exception):  # noqa: N818  (parse_query turns it into a QueryError)
    def __init__(self, position: int, reason: str) -> None:
        self.position, self.reason = position, reason


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    start: int
    end: int  # the position after its closing parenthesis
    arguments: list[Tree[Token]]


def fail(position: int, reason: str) -> NoReturn:
    raise Mistake(position, reason)


def check_parent(node: Tree[Token]) -> None:
    name = tokens_of(node)[0]
    if name != "parent":
        fail(start_of(name), f"unknown word {shown(name)}: did you mean parent?")


def parsed_call(node: Tree[Token]) -> ParsedCall:
    name, *_ = node.children
    assert isinstance(name, Token)  # noqa: S101
    return ParsedCall(str(name), start_of(name), end_of(node), children_of(node))


def parsed_span(node: Tree[Token]) -> Span:
    number, unit = tokens_of(node)
    if unit.lower() not in _UNITS:
        fail(start_of(unit), f"unknown unit {shown(unit)}: known are hour, hours, day, days")
    is_days = _UNITS[unit.lower()]
    most = MAX_DAYS if is_days else MAX_DAYS * 24
    if not number.isdigit() or len(number) > len(str(most)) or int(number) > most:
        fail(start_of(number), f"a span is a whole number of hours or days, at most {MAX_DAYS:,} days")
    return Span(int(number), is_days)


def unquoted(token: Token) -> str:
    return re.sub(r"\\(['\"\\])", r"\1", token[1:-1])


def parsed_number(token: Token) -> int | float:
    if len(token) > MAX_DIGITS:
        fail(start_of(token), f"a number has at most {MAX_DIGITS} digits")
    number = int(token) if re.fullmatch(r"-?\d+", token) else float(token)
    if not math.isfinite(float(number)):
        fail(start_of(token), "this number is too large")
    return number


def parsed_path(text: str, call: ParsedCall) -> ValuePath:
    r"""Split a path at its dots. `\.` is a dot in a name, `\\` a backslash."""
    steps, step, is_escaped = [], "", False
    for letter in text:
        if is_escaped:
            step, is_escaped = step + (letter if letter in "\\." else f"\\{letter}"), False
        elif letter == "\\":
            is_escaped = True
        elif letter == ".":
            steps.append(step)
            step = ""
        else:
            step += letter
    steps.append(step + "\\" * is_escaped)
    if not all(steps):
        fail(call.start, f"{call.name}(…) has an empty name in its path")
    if steps[0] == ANY_ITEM:
        fail(call.start, f"{call.name}(…) begins with a name, not with $")
    if len(steps) > MAX_STEPS:
        fail(call.start, f"a path has at most {MAX_STEPS} steps")
    return ValuePath(tuple(steps))
