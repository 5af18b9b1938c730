"""Triggers: Segment's filter query language (FQL), read into a tree, printed, and compiled into a condition on calls.

As documented at https://segment.com/docs/api/public-api/fql/, where Segment's own engine does otherwise too.
What the page leaves open is decided here:
- Only `true` is true. Anything else as a condition (null, 1, "yes", an object) is not, and `!` makes it true.
- A missing field is null. An argument of a type that a function does not take counts as null.
- Quotes hold their text as it is: a backslash in them means something to `match` only.
- Lists and objects are equal when all their members are; 1 and 1.0 are the same JSON number; objects are of type "object".
"""

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, TypeAlias, assert_never, cast

from lark import Lark, Token, Transformer, UnexpectedInput, UnexpectedToken, v_args

from audience_sync.calls.operations import COMPARISONS, FUNCTIONS, MAX_GLOB_LENGTH, equal, glob
from audience_sync.errors import ConfigError

MAX_LENGTH = 10_000
MAX_LEVELS = 50
MAX_DIGITS = 300  # what fits a double, whatever the digits


@dataclass(frozen=True, slots=True)
class Or:
    operands: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class And:
    operands: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class Not:
    operand: "Expression"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`sign` is one of = != > >= < <= and `in`."""

    sign: str
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class Path:
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """Equal as JSON values are: Literal(1) is Literal(1.0), and not Literal(True)."""

    value: str | float | bool | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and equal(self.value, other.value)

    def __hash__(self) -> int:
        return hash(self.value)


@dataclass(frozen=True, slots=True)
class List:
    items: "tuple[Expression, ...]"


Expression: TypeAlias = Or | And | Not | Comparison | Call | Path | Literal | List
Document: TypeAlias = Mapping[str, Any]


def parse(text: str) -> Expression:
    """The tree of a trigger. Parentheses are kept as far as they group: `(a and b) and c` is not `a and b and c`.

    Raises ConfigError with the line, the column, an excerpt, and what was expected there.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"longer than {MAX_LENGTH} characters")
    try:
        expression = cast("Expression", _parser().parse(text))  # what _Builder made of lark's tree
    except _Mistake as mistake:
        raise ConfigError(_located(text, mistake.position, mistake.message)) from None
    except UnexpectedInput as error:
        raise ConfigError(_located(text, *_unexpected(text, error))) from None
    level: list[Expression] = [expression]
    for _ in range(MAX_LEVELS):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ConfigError(f"nested over {MAX_LEVELS} levels")
    return expression


def to_text(expression: Expression) -> str:
    """The expression in FQL, such that parse(to_text(e)) == e for every e that parse gives."""
    match expression:
        case Or(operands):
            return " or ".join(_grouped(operand, (Or, And)) for operand in operands)
        case And(operands):
            return " and ".join(_grouped(operand, (Or, And)) for operand in operands)
        case Not(operand):
            return f"!{_grouped(operand, (Or, And, Comparison))}"
        case Comparison(sign, left, right):
            return f"{to_text(left)} {sign} {to_text(right)}"
        case Call(name, arguments):
            return f"{name}({', '.join(map(to_text, arguments))})"
        case List(items):
            return f"[{', '.join(map(to_text, items))}]"
        case Path(names):
            return _path_text(names)
        case Literal(value):
            return _literal_text(value)
        case _:
            assert_never(expression)


def compile(expression: Expression) -> Callable[[Document], bool]:  # noqa: A001  (as in re.compile)
    """Whether a call's JSON document fulfils the expression; whatever the document holds, the answer is a bool.

    A document whose values are too deep or too large to be compared or converted fulfils nothing.
    """
    holds = _condition(expression)

    def fulfils(document: Document) -> bool:
        try:
            return holds(document)
        except (RecursionError, ValueError):  # thousands of levels, or of digits
            return False

    return fulfils


def _condition(expression: Expression) -> Callable[[Document], bool]:
    match expression:
        case Or(operands):
            alternatives = [_condition(operand) for operand in operands]
            return lambda document: any(holds(document) for holds in alternatives)
        case And(operands):
            demands = [_condition(operand) for operand in operands]
            return lambda document: all(holds(document) for holds in demands)
        case Not(operand):
            denied = _condition(operand)
            return lambda document: not denied(document)
        case Comparison(sign, left, right):
            compare, one, other = COMPARISONS[sign], _value(left), _value(right)
            return lambda document: compare(one(document), other(document))
        case Call() | Path() | Literal() | List():
            given = _value(expression)
            return lambda document: given(document) is True
        case _:
            assert_never(expression)


def _value(expression: Expression) -> Callable[[Document], Any]:
    match expression:
        case Path((first, *rest)):
            return lambda document: _walk(document.get(first), rest)
        case Literal(value):
            return lambda _: value
        case List(items):
            members = [_value(item) for item in items]
            return lambda document: [member(document) for member in members]
        case Call(name, arguments):
            apply, given = FUNCTIONS[name].apply, [_value(argument) for argument in arguments]
            return lambda document: apply(*[argument(document) for argument in given])
        case _:
            return _condition(expression)


def _walk(value: Any, names: list[str]) -> Any:
    for name in names:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


_KEYWORDS = {"and", "or", "in", "null", "true", "false", "not"}


def _reserved(name: str) -> str | None:
    """Why this is no name of a field, if so: Segment's keywords are in small letters, ours in any, lest AND be a field."""
    word = name.lower()
    if word not in _KEYWORDS or name in _KEYWORDS - {"not"}:
        return None
    return "there is no `not`: write !( … )" if word == "not" else f"write `{word}` in small letters"


class _Mistake(Exception):  # noqa: N818  (never seen outside: parse makes a ConfigError of it)
    def __init__(self, position: int | None, message: str) -> None:
        self.position, self.message = position or 0, message


@v_args(inline=True)
class _Builder(Transformer[Token, Expression]):
    """What becomes of each rule of the grammar, from the leaves up while the text is read."""

    def PATH(self, token: Token) -> Token:  # noqa: N802  (the grammar's name)
        if reserved := _reserved(token):
            raise _Mistake(token.start_pos, reserved)
        return token

    def expression(self, *operands: Expression) -> Or:
        return Or(operands)

    def conjunction(self, *operands: Expression) -> And:
        return And(operands)

    negation = Not

    def comparison(self, left: Expression, sign: Token, right: Expression) -> Comparison:
        return Comparison(str(sign), left, right)

    def list(self, *items: Expression) -> List:
        return List(items)

    def path(self, token: Token) -> Path:
        names = re.findall(r"(?:\\.|[^.\\])+", token, re.DOTALL)
        return Path(tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names))

    def constant(self, token: Token) -> Literal:
        return Literal(json.loads(token))

    def literal(self, token: Token) -> Literal:
        if token.type == "STRING":
            return Literal(token[1:-1])
        if len(token) > MAX_DIGITS:
            raise _Mistake(token.start_pos, f"a number has at most {MAX_DIGITS} digits")
        return Literal(float(token) if "." in token else int(token))

    def call(self, name: Token, *arguments: Expression) -> Call:
        function = FUNCTIONS.get(name)
        if function is None:
            near = difflib.get_close_matches(name[:60], FUNCTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(FUNCTIONS)}"
            raise _Mistake(name.start_pos, f"unknown function: {hint}")
        if len(arguments) != len(function.arguments):
            raise _Mistake(name.start_pos, f"write {name}({', '.join(function.arguments)})")
        match name, arguments:
            case "match", (_, Literal(str() as pattern)) if glob(pattern) is None:
                wanted = f"`[` needs its `]`, `\\` a character after it; at most {MAX_GLOB_LENGTH} characters"
                raise _Mistake(name.start_pos, f"not a pattern: {wanted}")
        return Call(str(name), arguments)

    def predicate(self, name: Token, *arguments: Expression) -> Call:
        call = self.call(name, *arguments)
        if FUNCTIONS[name].gives != "bool":
            raise _Mistake(
                name.start_pos, f"{name}( ) gives a {FUNCTIONS[name].gives}: compare it with something"
            )
        return call


@cache
def _parser() -> Lark:
    return Lark.open(
        "fql.lark",
        rel_to=__file__,
        parser="lalr",
        lexer="basic",
        transformer=_Builder(),
        maybe_placeholders=False,
    )


def _children(expression: Expression) -> Iterator[Expression]:
    match expression:
        case Or(children) | And(children) | Call(_, children) | List(children):
            yield from children
        case Comparison(_, left, right):
            yield from (left, right)
        case Not(operand):
            yield operand


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
    return f"\\{text}" if text[0] in "0123456789-" or text.lower() in _KEYWORDS else text


_EXPECTED = {
    "OPERATOR": "a comparison (= != > >= < <=)",
    "IN": "`in`",
    "AND": "`and`",
    "OR": "`or`",
    "COMMA": "a comma",
    "RPAR": "a closing parenthesis",
    "RSQB": "a closing bracket",
    "$END": "the end",
}
_WRONG_SIGNS = {"&&": "and", "||": "or", "==": "=", "<>": "!="}


def _unexpected(text: str, error: UnexpectedInput) -> tuple[int, str]:
    """Where the text stops being FQL, and what was expected there."""
    position = error.pos_in_stream or 0
    if isinstance(error, UnexpectedToken):
        if error.token.type == "$END":
            position = len(text.rstrip())
        elif reserved := _reserved(error.token):
            return position, reserved
    for sign in (text[position : position + 2], text[max(0, position - 1) : position + 1]):
        if sign in _WRONG_SIGNS:
            return position, f"write `{_WRONG_SIGNS[sign]}` for `{sign}`"
    if isinstance(error, UnexpectedToken):
        return position, f"expected {_expected(error.accepts)}"
    if text[position] in "\"'":
        return position, "the text that begins here has no closing quote"
    return position, "unexpected character (within a field's name, write \\ before it)"


def _expected(accepted: Collection[str]) -> str:
    if "BANG" in accepted:
        return 'a condition, such as event = "Order Completed"'
    if "STRING" in accepted:
        return "a value: a field, text in quotes, a number, true, false, null, a list, or a function"
    if "PATH" in accepted:
        return "a list or a field"
    *names, last = [name for terminal, name in _EXPECTED.items() if terminal in accepted]
    return f"{', '.join(names)} or {last}" if names else last


def _located(text: str, position: int, message: str) -> str:
    before, after = text[:position].rpartition("\n")[2], text[position:].partition("\n")[0]
    start = before[-30:]
    excerpt = "".join(letter if letter.isprintable() else " " for letter in start + after[:30])
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {len(before) + 1}: {message}\n    {excerpt}\n    {' ' * len(start)}^"
