"""Parse a query: the functions and their arguments. grammar.lark has the syntax, parts.py parses spans and paths.

The tree is built only if the syntax of the whole text is right, so every message shows the first wrong position.
"""

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NoReturn

from lark import Token, Tree

from audience_sync.audiences.query import tree
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
    Reducer,
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
_NO_QUERY = {"span", "parent_span", "parent_path", "cast"}  # rules of arguments


def parse_condition(text: str) -> tree.Condition:
    """Parse the query of an audience.

    Raises:
        QueryError: it cannot be read, or it is a value where a condition is needed.

    """
    query = parse_query(text)
    if isinstance(query, tree.Condition):
        return query
    reason = (
        "an audience needs a condition: compare this value with something, for example `>= 1` or `.exists()`"
    )
    raise QueryError(text, len(text.rstrip()), reason)


def parse_query(text: str) -> tree.Query:
    """Parse a query: a condition or a scalar.

    Raises:
        QueryError: it cannot be read.

    """
    form = parse_form(text)
    try:
        return _complete(_Builder().query(form, _Scope()))
    except Mistake as mistake:
        raise QueryError(text, min(mistake.position, len(text)), mistake.reason) from None


@dataclass(frozen=True, slots=True)
class _Scope:
    """The context of an expression: how many `where`s enclose it, and whether it is a reducer's argument."""

    depth: int = 0
    is_argument: bool = False


@dataclass(frozen=True, slots=True)
class _ParsedStream:
    """A stream that is not reduced yet; `end` is the position in the text where it ends."""

    stream: tree.Stream
    end: int


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument: a query, a stream, or what only some functions take, such as a span or a path of the parent.

    `rule`: the rule of the grammar. `cast`: the word after `as`.
    """

    rule: str
    value: Any
    position: int
    cast: Token | None = None


def _fail_unreduced(parsed: _ParsedStream) -> NoReturn:
    kind = parsed.stream.kind.value
    fail(
        parsed.end, f"{kind}(…) is a list of rows: add a reducer, such as .count() or .sum(property('total'))"
    )


def _complete(query: tree.Query | _ParsedStream) -> tree.Query:
    """Return the query, unless it is a stream without a reducer."""
    if isinstance(query, _ParsedStream):
        _fail_unreduced(query)
    return query


class _Builder:
    """Converts lark's tree to ours, and counts the extractors."""

    def __init__(self) -> None:
        self._extractor_count = 0

    def query(self, node: Tree[Token], scope: _Scope) -> tree.Query | _ParsedStream:
        match node.data:
            case "disjunction" | "conjunction":
                operands = tuple(self.condition(child, scope) for child in children_of(node))
                return (
                    tree.Disjunction(operands) if node.data == "disjunction" else tree.Conjunction(operands)
                )
            case "negated":
                return tree.Negation(self.condition(children_of(node)[-1], scope))
            case "group":
                return self.query(children_of(node)[0], scope)
            case "signed":
                return self._signed(node, scope)
            case "constant":
                return self._constant(node)
        return self._chain(node, scope)

    def condition(self, node: Tree[Token], scope: _Scope) -> tree.Condition:
        query = _complete(self.query(node, scope))
        if isinstance(query, tree.Condition):
            return query
        return fail(end_of(node), "a condition is needed here: compare this value with something")

    def scalar(self, node: Tree[Token], scope: _Scope) -> tree.Scalar:
        query = _complete(self.query(node, scope))
        if isinstance(query, tree.Condition):
            fail(begin_of(node), "a value is needed here, not a condition")
        return query

    def _signed(self, node: Tree[Token], scope: _Scope) -> tree.Compared:
        left, sign, right = node.children
        assert isinstance(left, Tree) and isinstance(sign, Token) and isinstance(right, Tree)  # noqa: S101, PT018
        value = self.scalar(left, scope)
        if isinstance(value, tree.Constant):
            fail(
                begin_of(left),
                "the left side is an extractor, such as trait(…): put the literal on the right",
            )
        return tree.Compared(value, SIGNS[str(sign)], (self.scalar(right, scope),))

    def _constant(self, node: Tree[Token]) -> tree.Constant:
        (token,) = node.children
        assert isinstance(token, Token)  # noqa: S101
        match token.type:
            case "STRING":
                return tree.Constant(unquoted(token))
            case "NUMBER":
                return tree.Constant(parsed_number(token))
        return tree.Constant(token.type == "TRUE")

    # Chains: an extractor, filters in any order, a reducer, a comparator.

    def _chain(self, node: Tree[Token], scope: _Scope) -> tree.Query | _ParsedStream:
        first, *rest = [parsed_call(child) for child in children_of(node)]
        value = self._extract(first, scope)
        for before, call in pairwise([first, *rest]):
            value = self._apply(value, before, call, scope)
        return value

    def _extract(self, call: ParsedCall, scope: _Scope) -> tree.Query | _ParsedStream:
        name = call.name
        if name not in EXTRACTORS:
            _fail_to_extract(call)
        if len(call.arguments) != 1:
            fail(call.start, f"{name}(…) takes one argument")
        argument = self._argument(call.arguments[0], scope)
        if name == "literal":
            if argument.rule != "query" or not isinstance(argument.value, tree.Constant):
                fail(call.start, "write literal('x')")
            return argument.value
        self._extractor_count += 1
        if self._extractor_count > MAX_EXTRACTORS:
            fail(call.start, f"a query has at most {MAX_EXTRACTORS} extractors")
        if name in {"property", "context"}:
            return self._property(call, argument, scope)
        text = _string(argument, call)
        if name == "trait":
            return tree.Trait(parsed_path(text, call))
        if not text:
            fail(call.start, f"{name}('') has no name")
        return _ParsedStream(tree.Stream(tree.StreamKind(name), text), call.end)

    def _property(self, call: ParsedCall, argument: _Argument, scope: _Scope) -> tree.Property | tree.Context:
        kind = tree.Property if call.name == "property" else tree.Context
        if argument.rule == "parent_path":
            if scope.is_argument:
                fail(call.start, f"a reducer takes {call.name}('…') of its own rows, not of the parent")
            if scope.depth < 2:
                fail(call.start, f"{call.name}(parent: …) needs another `where` around this one")
            return kind(parsed_path(argument.value, call), of_parent=True)
        text = _string(argument, call)
        if not scope.depth and not scope.is_argument:
            fail(call.start, f"{call.name}(…) belongs to an event: use it inside where(…) or a reducer")
        return kind(parsed_path(text, call))

    def _argument(self, node: Tree[Token], scope: _Scope) -> _Argument:
        rule, position = node.data, begin_of(node)
        match rule:
            case "span":
                return _Argument(rule, parsed_span(node), position)
            case "parent_span":
                check_parent(node)
                return _Argument(rule, parsed_span(children_of(node)[0]), position)
            case "parent_path":
                check_parent(node)
                return _Argument(rule, unquoted(tokens_of(node)[-1]), position)
            case "cast":
                cast = tokens_of(node)[-1]
                if cast.lower() not in {"string", "number"}:
                    fail(start_of(cast), _cast_reason(cast))
                return _Argument(rule, self.query(children_of(node)[0], scope), position, cast)
        return _Argument("query", self.query(node, scope), position)

    def _apply(
        self, value: tree.Query | _ParsedStream, before: ParsedCall, call: ParsedCall, scope: _Scope
    ) -> tree.Query | _ParsedStream:
        """Apply a filter, reducer or comparator to the value before it."""
        name = call.name
        if isinstance(value, _ParsedStream):
            return self._apply_to_stream(value, call, scope)
        if isinstance(value, tree.Condition):
            fail(call.start, f"nothing can follow {before.name}(…): it ends a condition")
        if name == "count" and isinstance(value, tree.Reduction) and value.reducer is Reducer.UNIQUE:
            if call.arguments:
                fail(call.start, "write unique(…).count()")
            return replace(value, reducer=Reducer.COUNT_UNIQUE)
        if name in FILTERS or name in REDUCERS:
            fail(call.start, f"{name}(…) belongs to event(…) or entity(…), before it is reduced")
        if name not in COMPARATORS:
            _fail_unknown(call, COMPARATORS)
        if isinstance(value, tree.Constant):
            fail(before.start, "the left side is an extractor, such as trait(…)")
        return self._compare(value, call, scope)

    def _apply_to_stream(
        self, value: _ParsedStream, call: ParsedCall, scope: _Scope
    ) -> tree.Reduction | _ParsedStream:
        if call.name in FILTERS:
            filters = (*value.stream.filters, self._filter(call, scope))
            return _ParsedStream(replace(value.stream, filters=filters), call.end)
        if call.name in REDUCERS:
            return self._reduce(value.stream, call, scope)
        if call.name in COMPARATORS:
            _fail_unreduced(value)
        return _fail_unknown(call, (*FILTERS, *REDUCERS))

    def _filter(self, call: ParsedCall, scope: _Scope) -> tree.Where | tree.Window:
        if call.name == "where":
            if len(call.arguments) != 1 or call.arguments[0].data in _NO_QUERY:
                fail(call.start, "write where( condition )")
            return tree.Where(self.condition(call.arguments[0], _Scope(scope.depth + 1)))
        arguments = [self._argument(node, scope) for node in call.arguments]
        rules = [argument.rule for argument in arguments]
        example = {"within": "within(7 days)", "between": "between(7 days, 10 days)"}[call.name]
        if len(rules) != example.count("days") or not {*rules} <= {"span", "parent_span"}:
            fail(call.start, f"write {example}: numbers with units, without quotes")
        of_parent = rules[0] == "parent_span"
        if of_parent and not scope.depth:
            fail(arguments[0].position, "`parent:` needs a where(…) of another event around it")
        if "parent_span" in rules[1:]:
            fail(arguments[1].position, "write `parent:` once, before the first span")
        lengths = [argument.value.length for argument in arguments]
        if lengths != sorted(lengths):
            fail(arguments[1].position, "the shorter span comes first")
        near, far = lengths if len(lengths) == 2 else (dt.timedelta(0), *lengths)
        return tree.Window(near, far, of_parent=True) if of_parent else tree.Window(far, near)

    def _reduce(self, stream: tree.Stream, call: ParsedCall, scope: _Scope) -> tree.Reduction:
        reducer = Reducer(call.name)
        if reducer is Reducer.COUNT:
            if call.arguments:
                fail(call.start, "count() takes no argument")
            return tree.Reduction(stream, reducer)
        most = 2 if reducer is Reducer.MODE else 1
        if not 1 <= len(call.arguments) <= most:
            fail(call.start, f"write {call.name}(property('…'))")
        argument = self._argument(call.arguments[0], _Scope(scope.depth, is_argument=True))
        if not isinstance(argument.value, tree.Property | tree.Context):
            fail(argument.position, f"write {call.name}(property('…'))")
        as_text = False
        if (cast := argument.cast) is not None and cast.lower() == "string":
            if reducer not in {Reducer.MIN, Reducer.MAX, Reducer.MODE}:
                fail(start_of(cast), f"{call.name}(…) is not of strings: leave `as string` out")
            as_text = reducer is not Reducer.MODE
        least = self._least_count(call, scope) if len(call.arguments) == most == 2 else 1
        return tree.Reduction(stream, reducer, argument.value, as_text, least)

    def _least_count(self, call: ParsedCall, scope: _Scope) -> int:
        least = self._argument(call.arguments[1], scope)
        value = least.value.value if isinstance(least.value, tree.Constant) and least.cast is None else None
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            fail(least.position, "the second argument of mode(…) is a whole number from 1 on")
        return value

    def _compare(self, value: tree.Scalar, call: ParsedCall, scope: _Scope) -> tree.Compared:
        comparator = Comparator(call.name)
        arguments = [self._argument(node, scope) for node in call.arguments]
        if comparator in WITH_SPAN:
            if [argument.rule for argument in arguments] != ["span"]:
                fail(call.start, f"write {call.name}(7 days): a number with a unit, without quotes")
            return tree.Compared(value, comparator, span=arguments[0].value)
        for argument in arguments:
            if isinstance(argument.value, _ParsedStream) and argument.cast is None:
                _fail_unreduced(argument.value)
            if argument.rule != "query" or not isinstance(argument.value, tree.Scalar):
                fail(argument.position, f"{call.name}(…) takes values, such as 'DE' or trait('country')")
            self._check_argument(comparator, argument.value, argument.position)
        if comparator in {Comparator.EXISTS, Comparator.ABSENT}:
            if arguments:
                fail(call.start, f"{call.name}() takes no argument")
        elif comparator in _WITH_ONE_ARGUMENT and len(arguments) != 1:
            fail(call.start, f"{call.name}(…) takes one argument")
        elif not arguments:
            fail(call.start, f"{call.name}(…) takes at least one argument")
        return tree.Compared(value, comparator, tuple(argument.value for argument in arguments))

    def _check_argument(self, comparator: Comparator, argument: tree.Scalar, position: int) -> None:
        if not isinstance(argument, tree.Constant):
            return
        if comparator in WITH_STRINGS and not isinstance(argument.value, str):
            fail(position, f"{comparator}(…) looks for a string: put it in quotes")
        is_date = isinstance(argument.value, str) and parse_moment(argument.value) is not None
        if comparator in WITH_DATE and not is_date:
            fail(position, "not a date: write '2026-01-31' or '2026-01-31T12:00:00Z'")


def _string(argument: _Argument, call: ParsedCall) -> str:
    is_plain = argument.rule == "query" and isinstance(argument.value, tree.Constant)
    if not is_plain or not isinstance(argument.value.value, str):
        fail(call.start, f"write {call.name}('…') with a string in quotes")
    return argument.value.value


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
