"""A printer for FQL expressions, for tests of the parser."""

import json
import re
from decimal import Decimal
from typing import assert_never

from audience_sync.calls.fql import (
    And,
    Comparison,
    Expression,
    FieldPath,
    FunctionCall,
    List,
    Literal,
    Not,
    Or,
)

KEYWORDS = {"and", "or", "in", "null", "true", "false", "not"}


def to_text(expression: Expression) -> str:
    """Print an expression as FQL; parsing the text gives the same expression."""
    match expression:
        case Or(operands):
            return " or ".join(_grouped(operand, (Or, And)) for operand in operands)
        case And(operands):
            return " and ".join(_grouped(operand, (Or, And)) for operand in operands)
        case Not(operand):
            return f"!{_grouped(operand, (Or, And, Comparison))}"
        case Comparison(sign, left, right):
            return f"{to_text(left)} {sign} {to_text(right)}"
        case FunctionCall(name, arguments):
            return f"{name}({', '.join(map(to_text, arguments))})"
        case List(items):
            return f"[{', '.join(map(to_text, items))}]"
        case FieldPath(names):
            return _path_text(names)
        case Literal(value):
            return _literal_text(value)
        case _:
            assert_never(expression)


def _grouped(operand: Expression, kinds: tuple[type, ...]) -> str:
    return f"({to_text(operand)})" if isinstance(operand, kinds) else to_text(operand)


def _literal_text(value: str | float | bool | None) -> str:
    match value:
        case str():
            return f"'{value}'" if '"' in value else f'"{value}"'
        case float():
            digits = format(Decimal(repr(value)), "f")
            return digits if "." in digits else f"{digits}.0"
        case _:
            return json.dumps(value)


def _path_text(names: tuple[str, ...]) -> str:
    text = ".".join(re.sub(r"([^A-Za-z0-9_-])", r"\\\1", name) for name in names)
    return f"\\{text}" if text[0] in "0123456789-" or text.lower() in KEYWORDS else text
