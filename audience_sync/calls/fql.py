"""Triggers in Segment's filter query language (FQL): parsed into a tree, then compiled into a condition on calls.

The language follows https://segment.com/docs/api/public-api/fql/, even where Segment's engine differs from it. Where
that page leaves a question open, the answer here is:
- Only `true` is true. Any other condition (null, 1, "yes", an object) is false, and `!` makes it true.
- A missing field is null. An argument of the wrong type counts as null.
- Text in quotes is literal: a backslash has a meaning for `match` only.
- Lists and objects are equal when all their members are. 1 and 1.0 are the same number. Objects have the type "object".
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, assert_never, cast

from lark import Lark, Token, Transformer, UnexpectedInput, UnexpectedToken, v_args

from audience_sync.calls.operations import COMPARISONS, FUNCTIONS, MAX_GLOB_LENGTH, glob
from audience_sync.errors import ConfigError
from audience_sync.suggest import did_you_mean, located, one_of

MAX_LENGTH = 10_000
MAX_LEVELS = 50
MAX_DIGITS = 300  # every number with this many digits fits into a double


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
    """A comparison; `sign` is one of = != > >= < <= and `in`."""

    sign: str
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True, slots=True)
class FunctionCall:
    name: str
    arguments: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class FieldPath:
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Literal:
    value: str | float | bool | None


@dataclass(frozen=True, slots=True)
class List:
    items: "tuple[Expression, ...]"


Expression: TypeAlias = Or | And | Not | Comparison | FunctionCall | FieldPath | Literal | List
Document: TypeAlias = Mapping[str, Any]


def parse_trigger(text: str) -> Expression:
    """Parse a trigger into a tree that preserves its grouping: `(a and b) and c` differs from `a and b and c`.

    Raises ConfigError with the line, the column, an excerpt, and what was expected there.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"longer than {MAX_LENGTH} characters")
    try:
        expression = cast("Expression", _parser().parse(text))  # _Builder's result
    except _Mistake as mistake:
        raise ConfigError(located(text, mistake.position, mistake.message)) from None
    except UnexpectedInput as error:
        raise ConfigError(located(text, *_unexpected(text, error))) from None
    level: list[Expression] = [expression]
    for _ in range(MAX_LEVELS):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ConfigError(f"nested more than {MAX_LEVELS} levels deep")
    return expression


def compile_trigger(expression: Expression) -> Callable[[Document], bool]:
    """Compile an expression into a condition on a call's JSON document.

    The condition never raises. It is false if a value is nested too deeply or is too large to compare or convert.
    """
    condition = _condition(expression)

    def matches(document: Document) -> bool:
        try:
            return condition(document)
        except (RecursionError, ValueError):  # thousands of levels, or of digits
            return False

    return matches


def _condition(expression: Expression) -> Callable[[Document], bool]:
    match expression:
        case Or(operands):
            conditions = [_condition(operand) for operand in operands]
            return lambda document: any(condition(document) for condition in conditions)
        case And(operands):
            conditions = [_condition(operand) for operand in operands]
            return lambda document: all(condition(document) for condition in conditions)
        case Not(operand):
            negated = _condition(operand)
            return lambda document: not negated(document)
        case Comparison(sign, left, right):
            compare, left_value, right_value = COMPARISONS[sign], _value(left), _value(right)
            return lambda document: compare(left_value(document), right_value(document))
        case FunctionCall() | FieldPath() | Literal() | List():
            value = _value(expression)
            return lambda document: value(document) is True
        case _:
            assert_never(expression)


def _value(expression: Expression) -> Callable[[Document], Any]:
    match expression:
        case FieldPath((first, *rest)):
            return lambda document: _walk(document.get(first), rest)
        case Literal(value):
            return lambda _: value
        case List(items):
            members = [_value(item) for item in items]
            return lambda document: [member(document) for member in members]
        case FunctionCall(name, arguments):
            apply, values = FUNCTIONS[name].apply, [_value(argument) for argument in arguments]
            return lambda document: apply(*[value(document) for value in values])
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
    """Return why a name cannot be a field, or None. Keywords are also reserved in upper case, such as AND."""
    word = name.lower()
    if word not in _KEYWORDS or name in _KEYWORDS - {"not"}:
        return None
    return "there is no `not`: write !( … )" if word == "not" else f"write `{word}` in small letters"


class _Mistake(Exception):  # noqa: N818  (parse_trigger turns it into a ConfigError)
    def __init__(self, position: int | None, message: str) -> None:
        self.position, self.message = position or 0, message


@v_args(inline=True)
class _Builder(Transformer[Token, Expression]):
    """Builds the tree while lark parses, with a method for each rule of the grammar, leaves first."""

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

    def path(self, token: Token) -> FieldPath:
        names = re.findall(r"(?:\\.|[^.\\])+", token, re.DOTALL)
        return FieldPath(tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names))

    def constant(self, token: Token) -> Literal:
        return Literal(json.loads(token))

    def literal(self, token: Token) -> Literal:
        if token.type == "STRING":
            return Literal(token[1:-1])
        if len(token) > MAX_DIGITS:
            raise _Mistake(token.start_pos, f"a number has at most {MAX_DIGITS} digits")
        return Literal(float(token) if "." in token else int(token))

    def call(self, name: Token, *arguments: Expression) -> FunctionCall:
        function = FUNCTIONS.get(name)
        if function is None:
            raise _Mistake(name.start_pos, f"unknown function: {did_you_mean(name, FUNCTIONS)}")
        if len(arguments) != len(function.arguments):
            raise _Mistake(name.start_pos, f"write {name}({', '.join(function.arguments)})")
        match name, arguments:
            case "match", (_, Literal(str() as pattern)) if glob(pattern) is None:
                rule = f"`[` needs its `]`, `\\` a character after it; at most {MAX_GLOB_LENGTH} characters"
                raise _Mistake(name.start_pos, f"not a pattern: {rule}")
        return FunctionCall(str(name), arguments)

    def predicate(self, name: Token, *arguments: Expression) -> FunctionCall:
        call = self.call(name, *arguments)
        if (kind := FUNCTIONS[name].returns) != "bool":
            raise _Mistake(name.start_pos, f"{name}( ) returns a {kind}: compare it with something")
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
        case Or(children) | And(children) | FunctionCall(_, children) | List(children):
            yield from children
        case Comparison(_, left, right):
            yield from (left, right)
        case Not(operand):
            yield operand


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
    """Return the position at which parsing failed, and a message."""
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
        return position, "this text has no closing quote"
    return position, "unexpected character (in a field's name, write \\ before it)"


def _expected(accepted: Collection[str]) -> str:
    if "BANG" in accepted:
        return 'a condition, such as event = "Order Completed"'
    if "STRING" in accepted:
        return "a value: a field, text in quotes, a number, true, false, null, a list, or a function"
    if "PATH" in accepted:
        return "a list or a field"
    return one_of([name for terminal, name in _EXPECTED.items() if terminal in accepted])
