"""Parse a query. grammar.lark has the syntax, parts.py reads spans and paths; here are the functions with their arguments.

The tree is built once the syntax of the whole text is right, so every message points at the first wrong position.
"""

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NoReturn

from lark import Token, Tree

from audience_sync.audiences.query.form import (
    NOT_HERE,
    QueryError,
    begin_of,
    children_of,
    end_of,
    parse_form,
    start_of,
    tokens_of,
)
from audience_sync.audiences.query.moments import parse_moment
from audience_sync.audiences.query.parts import (
    Mistake,
    ParsedCall,
    check_parent,
    fail,
    parsed_call,
    parsed_number,
    parsed_path,
    parsed_span,
    unquoted,
)
from audience_sync.audiences.query.tree import (
    SIGN_OF,
    WITH_DATE,
    WITH_SPAN,
    WITH_STRINGS,
    Comparator,
    Compared,
    Condition,
    Conjunction,
    Constant,
    Context,
    Disjunction,
    Negation,
    Property,
    Query,
    Reducer,
    Reduction,
    Scalar,
    Span,
    Stream,
    StreamKind,
    Trait,
    Where,
    Window,
)
from audience_sync.suggest import did_you_mean, shown

MAX_EXTRACTORS = 50
MAX_COUNT = 1_000_000_000

SIGNS = {"==": Comparator.EQUALS} | {sign: comparator for comparator, sign in SIGN_OF.items()}
EXTRACTORS = ("event", "entity", "trait", "property", "context", "literal")
FILTERS = ("where", "within", "between")
REDUCERS = ("count", "sum", "avg", "min", "max", "mode", "first", "last", "unique")
COMPARATORS = tuple(comparator.value for comparator in Comparator)
_WITH_ONE_ARGUMENT = {*SIGN_OF, *WITH_DATE}


def parse_condition(text: str) -> Condition:
    """Parse the query of an audience.

    Raises:
        QueryError: it cannot be read, or it is a value where a condition is needed.

    """
    query = parse_query(text)
    if isinstance(query, Condition):
        return query
    reason = (
        "an audience needs a condition: compare this value with something, for example `>= 1` or `.exists()`"
    )
    raise QueryError(text, len(text.rstrip()), reason)


def parse_query(text: str) -> Query:
    """Parse a query: a condition or a scalar.

    Raises:
        QueryError: it cannot be read.

    """
    tree = parse_form(text)
    try:
        return _complete(_Builder().query(tree, _Scope()))
    except Mistake as mistake:
        raise QueryError(text, min(mistake.position, len(text)), mistake.reason) from None


@dataclass(frozen=True, slots=True)
class _Scope:
    """The surroundings of an expression: how many `where`s it is in, and whether a reducer's argument is being read."""

    depth: int = 0
    is_argument: bool = False


@dataclass(frozen=True, slots=True)
class _ParsedStream:
    """A stream that is not reduced yet; `end` is its end in the text."""

    stream: Stream
    end: int


@dataclass(frozen=True, slots=True)
class _ParsedSpan:
    span: Span
    is_of_parent: bool
    position: int


@dataclass(frozen=True, slots=True)
class _ParsedCast:
    value: Any
    kind: str
    position: int


@dataclass(frozen=True, slots=True)
class _ParentPath:
    text: str
    position: int


def _fail_unreduced(parsed: _ParsedStream) -> NoReturn:
    kind = parsed.stream.kind.value
    fail(
        parsed.end, f"{kind}(…) is a list of rows: add a reducer, such as .count() or .sum(property('total'))"
    )


def _complete(query: Query | _ParsedStream) -> Query:
    """Return the query, unless it is a stream without a reducer."""
    if isinstance(query, _ParsedStream):
        _fail_unreduced(query)
    return query


class _Builder:
    """Turns lark's tree into ours, and counts the extractors."""

    def __init__(self) -> None:
        self._extractor_count = 0

    def query(self, node: Tree[Token], scope: _Scope) -> Query | _ParsedStream:
        match node.data:
            case "disjunction" | "conjunction":
                operands = tuple(self.condition(child, scope) for child in children_of(node))
                return Disjunction(operands) if node.data == "disjunction" else Conjunction(operands)
            case "negated":
                return Negation(self.condition(children_of(node)[-1], scope))
            case "group":
                return self.query(children_of(node)[0], scope)
            case "signed":
                return self._signed(node, scope)
            case "constant":
                return self._constant(node)
        return self._chain(node, scope)

    def condition(self, node: Tree[Token], scope: _Scope) -> Condition:
        query = _complete(self.query(node, scope))
        if isinstance(query, Condition):
            return query
        return fail(end_of(node), "a condition is needed here: compare this value with something")

    def scalar(self, node: Tree[Token], scope: _Scope) -> Scalar:
        query = _complete(self.query(node, scope))
        if isinstance(query, Condition):
            fail(begin_of(node), "a value is needed here, not a condition")
        return query

    def _signed(self, node: Tree[Token], scope: _Scope) -> Compared:
        left, sign, right = node.children
        assert isinstance(left, Tree) and isinstance(sign, Token) and isinstance(right, Tree)  # noqa: S101, PT018
        value = self.scalar(left, scope)
        if isinstance(value, Constant):
            fail(
                begin_of(left),
                "the left side is an extractor, such as trait(…): put the literal on the right",
            )
        return Compared(value, SIGNS[str(sign)], (self.scalar(right, scope),))

    def _constant(self, node: Tree[Token]) -> Constant:
        (token,) = node.children
        assert isinstance(token, Token)  # noqa: S101
        match token.type:
            case "STRING":
                return Constant(unquoted(token))
            case "NUMBER":
                return Constant(parsed_number(token))
        return Constant(token.type == "TRUE")

    # Chains: an extractor, filters in any order, a reducer, a comparator.

    def _chain(self, node: Tree[Token], scope: _Scope) -> Query | _ParsedStream:
        first, *rest = [parsed_call(child) for child in children_of(node)]
        value = self._extract(first, scope)
        for before, call in pairwise([first, *rest]):
            value = self._apply(value, before, call, scope)
        return value

    def _extract(self, call: ParsedCall, scope: _Scope) -> Query | _ParsedStream:
        name = call.name
        if name not in EXTRACTORS:
            _fail_to_extract(call)
        argument = self._only_argument(call, scope)
        if name == "literal":
            return argument if isinstance(argument, Constant) else fail(call.start, "write literal('x')")
        self._extractor_count += 1
        if self._extractor_count > MAX_EXTRACTORS:
            fail(call.start, f"a query has at most {MAX_EXTRACTORS} extractors")
        if name in {"property", "context"}:
            return self._property(call, argument, scope)
        text = _string(argument, call)
        if name == "trait":
            return Trait(parsed_path(text, call))
        if not text:
            fail(call.start, f"{name}('') has no name")
        return _ParsedStream(Stream(StreamKind(name), text), call.end)

    def _property(self, call: ParsedCall, argument: Any, scope: _Scope) -> Property | Context:
        kind = Property if call.name == "property" else Context
        if isinstance(argument, _ParentPath):
            if scope.is_argument:
                fail(call.start, f"a reducer takes {call.name}('…') of its own rows, not of the parent")
            if scope.depth < 2:
                fail(call.start, f"{call.name}(parent: …) needs another `where` around this one")
            return kind(parsed_path(argument.text, call), of_parent=True)
        text = _string(argument, call)
        if not scope.depth and not scope.is_argument:
            fail(call.start, f"{call.name}(…) belongs to an event: use it inside where(…) or a reducer")
        return kind(parsed_path(text, call))

    def _only_argument(self, call: ParsedCall, scope: _Scope) -> Any:
        if len(call.arguments) != 1:
            fail(call.start, f"{call.name}(…) takes one argument")
        return self._argument(call.arguments[0], scope)

    def _argument(self, node: Tree[Token], scope: _Scope) -> Any:
        match node.data:
            case "span":
                return _ParsedSpan(parsed_span(node), False, begin_of(node))
            case "parent_span":
                check_parent(node)
                return _ParsedSpan(parsed_span(children_of(node)[0]), True, begin_of(node))
            case "parent_path":
                check_parent(node)
                return _ParentPath(unquoted(tokens_of(node)[-1]), begin_of(node))
            case "cast":
                kind = tokens_of(node)[-1]
                if kind.lower() not in {"string", "number"}:
                    fail(start_of(kind), _cast_reason(kind))
                return _ParsedCast(self.query(children_of(node)[0], scope), kind.lower(), start_of(kind))
        return self.query(node, scope)

    def _apply(
        self, value: Query | _ParsedStream, before: ParsedCall, call: ParsedCall, scope: _Scope
    ) -> Query | _ParsedStream:
        """Apply a filter, reducer or comparator to the value before it."""
        name = call.name
        if isinstance(value, _ParsedStream):
            return self._apply_to_stream(value, call, scope)
        if isinstance(value, Condition):
            fail(call.start, f"nothing can follow {before.name}(…): it ends a condition")
        if name == "count" and isinstance(value, Reduction) and value.reducer is Reducer.UNIQUE:
            if call.arguments:
                fail(call.start, "write unique(…).count()")
            return replace(value, reducer=Reducer.COUNT_UNIQUE)
        if name in FILTERS or name in REDUCERS:
            fail(call.start, f"{name}(…) belongs to event(…) or entity(…), before it is reduced")
        if name not in COMPARATORS:
            _fail_unknown(call, COMPARATORS)
        if isinstance(value, Constant):
            fail(before.start, "the left side is an extractor, such as trait(…)")
        return self._compare(value, call, scope)

    def _apply_to_stream(
        self, value: _ParsedStream, call: ParsedCall, scope: _Scope
    ) -> Reduction | _ParsedStream:
        if call.name in FILTERS:
            filters = (*value.stream.filters, self._filter(call, scope))
            return _ParsedStream(replace(value.stream, filters=filters), call.end)
        if call.name in REDUCERS:
            return self._reduce(value.stream, call, scope)
        if call.name in COMPARATORS:
            _fail_unreduced(value)
        return _fail_unknown(call, (*FILTERS, *REDUCERS))

    def _filter(self, call: ParsedCall, scope: _Scope) -> Where | Window:
        if call.name == "where":
            if len(call.arguments) != 1 or call.arguments[0].data in {
                "span",
                "parent_span",
                "parent_path",
                "cast",
            }:
                fail(call.start, "write where( condition )")
            return Where(self.condition(call.arguments[0], _Scope(scope.depth + 1)))
        arguments = [self._argument(node, scope) for node in call.arguments]
        example = {"within": "within(7 days)", "between": "between(7 days, 10 days)"}[call.name]
        count = 1 if call.name == "within" else 2
        if len(arguments) != count or not all(isinstance(argument, _ParsedSpan) for argument in arguments):
            fail(call.start, f"write {example}")
        first, *more = arguments
        if first.is_of_parent and not scope.depth:
            fail(first.position, "`parent:` needs a where(…) of another event around it")
        if any(argument.is_of_parent for argument in more):
            fail(more[0].position, "write `parent:` once, before the first span")
        lengths = [argument.span.length for argument in arguments]
        if lengths != sorted(lengths):
            fail(more[0].position, "the shorter span comes first")
        near, far = lengths if more else (dt.timedelta(0), *lengths)
        return Window(near, far, of_parent=True) if first.is_of_parent else Window(far, near)

    def _reduce(self, stream: Stream, call: ParsedCall, scope: _Scope) -> Reduction:
        reducer = Reducer(call.name)
        if reducer is Reducer.COUNT:
            if call.arguments:
                fail(call.start, "count() takes no argument")
            return Reduction(stream, reducer)
        most = 2 if reducer is Reducer.MODE else 1
        if not 1 <= len(call.arguments) <= most:
            fail(call.start, f"write {call.name}(property('…'))")
        argument = self._argument(call.arguments[0], _Scope(scope.depth, is_argument=True))
        cast = argument.kind if isinstance(argument, _ParsedCast) else None
        value = argument.value if isinstance(argument, _ParsedCast) else argument
        if not isinstance(value, Property | Context):
            fail(begin_of(call.arguments[0]), f"write {call.name}(property('…'))")
        if cast == "string" and reducer not in {Reducer.MIN, Reducer.MAX, Reducer.MODE}:
            fail(argument.position, f"{call.name}(…) is not of strings: leave `as string` out")
        as_text = cast == "string" and reducer is not Reducer.MODE
        least = self._least_count(call, scope) if len(call.arguments) == most == 2 else 1
        return Reduction(stream, reducer, value, as_text, least)

    def _least_count(self, call: ParsedCall, scope: _Scope) -> int:
        least = self._argument(call.arguments[1], scope)
        value = least.value if isinstance(least, Constant) else None
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            fail(begin_of(call.arguments[1]), "the second argument of mode(…) is a whole number from 1 on")
        return value

    def _compare(self, value: Scalar, call: ParsedCall, scope: _Scope) -> Compared:
        comparator = Comparator(call.name)
        arguments = [self._argument(node, scope) for node in call.arguments]
        if comparator in WITH_SPAN:
            if len(arguments) != 1 or not isinstance(arguments[0], _ParsedSpan) or arguments[0].is_of_parent:
                fail(call.start, f"write {call.name}(7 days)")
            return Compared(value, comparator, span=arguments[0].span)
        for node, argument in zip(call.arguments, arguments, strict=True):
            if isinstance(argument, _ParsedStream):
                _fail_unreduced(argument)
            if not isinstance(argument, Constant | Trait | Property | Context | Reduction):
                fail(begin_of(node), f"{call.name}(…) takes values, such as 'DE' or trait('country')")
            self._check_argument(comparator, argument, begin_of(node))
        if comparator in {Comparator.EXISTS, Comparator.ABSENT} and arguments:
            fail(call.start, f"{call.name}() takes no argument")
        if comparator in _WITH_ONE_ARGUMENT and len(arguments) != 1:
            fail(call.start, f"{call.name}(…) takes one argument")
        if comparator not in {Comparator.EXISTS, Comparator.ABSENT} and not arguments:
            fail(call.start, f"{call.name}(…) takes at least one argument")
        return Compared(value, comparator, tuple(arguments))

    def _check_argument(self, comparator: Comparator, argument: Scalar, position: int) -> None:
        if not isinstance(argument, Constant):
            return
        if comparator in WITH_STRINGS and not isinstance(argument.value, str):
            fail(position, f"{comparator}(…) looks for a string: put it in quotes")
        is_date = isinstance(argument.value, str) and parse_moment(argument.value) is not None
        if comparator in WITH_DATE and not is_date:
            fail(position, "not a date: write '2026-01-31' or '2026-01-31T12:00:00Z'")


def _string(argument: Any, call: ParsedCall) -> str:
    if not isinstance(argument, Constant) or not isinstance(argument.value, str):
        fail(call.start, f"write {call.name}('…') with a string in quotes")
    return argument.value


def _fail_to_extract(call: ParsedCall) -> NoReturn:
    name = call.name
    if reason := NOT_HERE.get(name.lower()):
        fail(call.start, reason)
    if name in FILTERS or name in REDUCERS or name in COMPARATORS:
        fail(call.start, f"{name}(…) follows an extractor, such as event('Order Completed').{name}(…)")
    fail(call.start, f"unknown function {shown(name)}: {did_you_mean(name, EXTRACTORS)}")


def _fail_unknown(call: ParsedCall, known: Iterable[str]) -> NoReturn:
    if reason := NOT_HERE.get(call.name.lower()):
        fail(call.start, reason)
    if call.name in EXTRACTORS:
        fail(call.start, f"{call.name}(…) begins a value: it cannot follow a dot")
    fail(call.start, f"unknown function {shown(call.name)}: {did_you_mean(call.name, known)}")


def _cast_reason(kind: str) -> str:
    if kind.lower() == "array":
        return "`as array` is not supported"
    return f"unknown type {shown(kind)}: known are string, number"
