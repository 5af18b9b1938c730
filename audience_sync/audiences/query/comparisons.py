"""Conditions and comparisons in SQL. A scalar is compiled to one expression for each kind of value that it may have.

A condition may be null instead of false; only NOT has to distinguish them. A subquery refers to the tables of all
enclosing queries (`correlate_except()`); by default, SQLAlchemy would correlate it only with the nearest one.
"""

import datetime as dt
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, assert_never

import sqlalchemy as sa
from sqlalchemy.sql import operators as sql_operators

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.catalog import Catalog
from audience_sync.audiences.query.dialect import Expression, JsonValue, is_one_of
from audience_sync.audiences.query.moments import moved, parse_moment
from audience_sync.audiences.query.tree import Comparator

# The kinds of scalars, in the order in which values of different kinds are sorted.
KINDS = ("number", "text", "boolean")
ORDERS: dict[Comparator, Callable[[Any, Any], Any]] = {
    Comparator.GREATER_THAN: operator.gt,
    Comparator.AT_LEAST: operator.ge,
    Comparator.LESS_THAN: operator.lt,
    Comparator.AT_MOST: operator.le,
}
NUMBER_TESTS = {**ORDERS, Comparator.EQUALS: operator.eq, Comparator.DIFFERS: operator.ne}
_NULL_TESTS = {sql_operators.is_, sql_operators.is_not}
_DAY = dt.timedelta(days=1)
_FEW = 10  # up to this many tests, each evaluates the value again
_MAX_IN_A_ROW = 50


@dataclass(frozen=True, slots=True)
class SqlValue:
    """A scalar in SQL: for each kind of value that it may have, an expression that is null for the other kinds."""

    exists: Expression
    number: Expression | None = None
    text: Expression | None = None
    boolean: Expression | None = None
    moment: Expression | None = None  # of a column; the moment of a text is derived from it
    constant: str | float | bool | None = None
    document: JsonValue | None = None
    is_rounded: bool = False  # a sum or an average, which is compared at 15 digits

    def kinds(self) -> dict[str, Any]:
        """Return the expressions by kind."""
        parts = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: part for kind, part in parts.items() if part is not None}


ABSENT = SqlValue(sa.false())


def by_kind(columns: Any) -> dict[str, Any]:
    """Return the columns of a SELECT that are named for a kind, by that kind."""
    return {kind: columns[kind] for kind in KINDS if kind in columns}


def _negated(condition: Expression) -> Expression:
    is_never_null = isinstance(condition, sa.Exists) or getattr(condition, "operator", None) in _NULL_TESTS
    return ~condition if is_never_null else sa.not_(sa.func.coalesce(condition, sa.false()))


def any_of(conditions: Iterable[Expression]) -> Expression:
    return sa.or_(sa.false(), *conditions)


class Scope(ABC):
    """Compiles conditions and comparisons. The subclasses `Users` and `Row` compile the scalars."""

    def __init__(self, catalog: Catalog, as_of: dt.datetime) -> None:
        self.db, self.catalog, self.as_of = catalog.db, catalog, as_of

    def condition(self, condition: tree.Condition) -> Expression:
        match condition:
            case tree.Conjunction(operands):
                return sa.and_(*map(self.condition, operands))
            case tree.Disjunction(operands):
                return sa.or_(*map(self.condition, operands))
            case tree.Negation(operand):
                return _negated(self.condition(operand))
            case tree.Compared():
                return self.compared(condition)
            case _:
                assert_never(condition)

    def compared(self, compared: tree.Compared) -> Expression:
        items, left = self.value(compared.left)
        if compared.comparator is Comparator.ABSENT:
            return _negated(_with_items(items, left.exists))
        return _with_items(items, self._test(compared, left))

    def value(self, scalar: tree.Scalar) -> tuple[list[sa.FromClause], SqlValue]:
        """Return the tables of list items in the scalar's path, and the scalar's value for a single item."""
        match scalar:
            case tree.Constant(value):
                return [], self._constant(value)
            case tree.Reduction():
                return [], self.reduction(scalar)
            case tree.Trait(path):
                return self.trait_value(path)
            case tree.Property() | tree.Context():
                return self.property_value(scalar)
            case _:
                assert_never(scalar)

    @abstractmethod
    def property_value(self, scalar: tree.Property | tree.Context) -> tuple[list[sa.FromClause], SqlValue]:
        """Return a value of the current row or of the enclosing one."""

    @abstractmethod
    def trait_value(self, path: tree.ValuePath) -> tuple[list[sa.FromClause], SqlValue]: ...

    @abstractmethod
    def reduction(self, reduction: tree.Reduction) -> SqlValue: ...

    def _constant(self, value: str | float | bool) -> SqlValue:
        match value:
            case bool():
                return SqlValue(sa.true(), boolean=sa.true() if value else sa.false(), constant=value)
            case str():
                return SqlValue(sa.true(), text=sa.literal(value, sa.Text), constant=value)
        is_exact = isinstance(value, int) and abs(value) <= 2**53
        return SqlValue(sa.true(), number=sa.literal(value if is_exact else float(value)), constant=value)

    def _test(self, compared: tree.Compared, left: SqlValue) -> Expression:  # noqa: C901  (one case for each comparator)
        comparator = compared.comparator
        if compared.span is not None:
            return self._is_in_span(left, comparator, compared.span)

        def any_argument(test: Callable[[SqlValue, SqlValue], Expression]) -> Expression:
            if len(compared.arguments) > _FEW and left.text is not None:
                return _evaluated_once(left, partial(any_of_arguments, test))
            return any_of_arguments(test, left)

        def any_of_arguments(test: Callable[[SqlValue, SqlValue], Expression], left: SqlValue) -> Expression:
            tests = []
            for argument in compared.arguments:
                items, right = self.value(argument)
                tests.append(_with_items(items, test(left, right)))
            while len(tests) > _MAX_IN_A_ROW:  # SQLite's expressions are at most 1,000 levels deep
                starts = range(0, len(tests), _MAX_IN_A_ROW)
                chunks = [tests[start : start + _MAX_IN_A_ROW] for start in starts]
                tests = [sa.func.coalesce(sa.or_(*chunk), sa.false()) for chunk in chunks]
            return tests[0] if len(tests) == 1 else sa.or_(*tests)

        match comparator:
            case Comparator.EXISTS:
                return left.exists
            case Comparator.EQUALS | Comparator.ONE_OF:
                return self._equals_any(left, compared.arguments)
            case Comparator.DIFFERS | Comparator.NONE_OF:
                return sa.and_(left.exists, _negated(self._equals_any(left, compared.arguments)))
            case Comparator.CONTAINS:
                return any_argument(partial(_of_texts, self._contains))
            case Comparator.OMITS:
                return _negated(any_argument(partial(_of_texts, self._contains)))
            case Comparator.STARTS_WITH:
                return any_argument(partial(_of_texts, _starts_with))
            case Comparator.ENDS_WITH:
                return any_argument(partial(_of_texts, _ends_with))
            case Comparator.BEFORE_DATE:
                return any_argument(partial(self._ordered_moments, operator.lt))
            case Comparator.AFTER_DATE:
                return any_argument(partial(self._ordered_moments, operator.gt))
        return any_argument(partial(self._ordered, ORDERS[comparator]))

    def _contains(self, text: Expression, part: Expression) -> Expression:
        is_in: Expression = self.db.position(text, part) > 0
        return is_in

    def _equals_any(self, left: SqlValue, arguments: Iterable[tree.Scalar]) -> Expression:
        """Return whether the left side equals one of the arguments. Literals form one list, which a database hashes."""
        tests, literals = [], list[SqlValue]()
        for argument in arguments:
            items, right = self.value(argument)
            if right.constant is None:
                tests.append(_with_items(items, self._equal(left, right)))
            else:
                literals.append(right)
        numbers = [each for each in literals if each.number is not None]
        names = [  # a boolean equals its name
            str(each.constant).lower() if isinstance(each.constant, bool) else str(each.constant)
            for each in literals
            if each.number is None
        ]
        booleans = [
            sa.true() if name == "true" else sa.false() for name in names if name in {"true", "false"}
        ]
        if left.number is not None and numbers:
            tests.append(is_one_of(self._numbers(left, numbers[0])[0], [each.number for each in numbers]))
        if left.text is not None and names:
            tests.append(left.document.is_text(names) if left.document else is_one_of(left.text, names))
        if left.boolean is not None and booleans:
            tests.append(is_one_of(left.boolean, booleans))
        return tests[0] if len(tests) == 1 else any_of(tests)

    def _equal(self, left: SqlValue, right: SqlValue) -> Expression:
        tests = []
        if left.number is not None and right.number is not None:
            tests.append(operator.eq(*self._numbers(left, right)))
        if left.text is not None and right.text is not None:
            tests.append(left.text == right.text)
        if left.boolean is not None and right.boolean is not None:
            tests.append(left.boolean == right.boolean)
        for one, other in ((left, right), (right, left)):  # a boolean equals its name
            if one.boolean is not None and other.text is not None:
                tests.append(_is_named(one, other))
        return any_of(tests)

    def _numbers(self, left: SqlValue, right: SqlValue) -> tuple[Any, Any]:
        is_rounded = left.is_rounded or right.is_rounded

        def number(value: SqlValue) -> Any:
            is_exact = value.constant is not None or not is_rounded
            return value.number if is_exact or value.number is None else self.db.at_15_digits(value.number)

        return number(left), number(right)

    def _ordered(self, order: Callable[[Any, Any], Any], left: SqlValue, right: SqlValue) -> Expression:
        tests = []
        if left.number is not None and right.number is not None:
            tests.append(order(*self._numbers(left, right)))
        if left.text is not None and right.text is not None:
            tests.append(order(self.db.by_code_points(left.text), right.text))
        return any_of(tests)

    def moment_of(self, value: SqlValue) -> Expression | None:
        if isinstance(value.constant, str):
            moment = parse_moment(value.constant)
            return None if moment is None else self.db.moment_literal(moment)
        if value.moment is not None or value.text is None:
            return value.moment
        moment_of_text: Expression = self.db.moment_of_text(value.text)
        return moment_of_text

    def _ordered_moments(
        self, order: Callable[[Any, Any], Any], left: SqlValue, right: SqlValue
    ) -> Expression:
        first, second = self.moment_of(left), self.moment_of(right)
        return sa.false() if first is None or second is None else order(first, second)

    def _is_in_span(self, value: SqlValue, comparator: Comparator, span: tree.Span) -> Expression:
        """Compare with the days around today or, for hours, with moments around now."""
        moment = self.moment_of(value)
        if moment is None:
            return sa.false()
        unit = dt.timedelta(0)
        now = self.as_of
        if span.is_days:
            now = now.replace(hour=0, minute=0, second=0, microsecond=0)
            unit = _DAY - dt.timedelta(microseconds=1)  # to the end of the day
        first, last = {
            Comparator.WITHIN_LAST: (moved(now, -span.length), now + unit),
            Comparator.WITHIN_NEXT: (now, moved(now, span.length + unit)),
            Comparator.BEFORE_LAST: (None, moved(now, unit - span.length)),
            Comparator.AFTER_NEXT: (moved(now, span.length), None),
        }[comparator]
        lowest = first and self.db.moment_literal(first)
        highest = last and self.db.moment_literal(last)
        if lowest is None or highest is None:
            return moment >= lowest if highest is None else moment <= highest
        return moment.between(lowest, highest)


def _with_items(items: list[sa.FromClause], test: Expression) -> Expression:
    """Return whether the test is true for one item."""
    if not items:
        return test
    one: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(chain(items))
    return sa.exists(one.where(test).correlate_except())


def chain(tables: list[sa.FromClause]) -> sa.FromClause:
    first, *rest = tables
    for table in rest:
        first = first.join(table, sa.true())
    return first


def _evaluated_once(value: SqlValue, test: Callable[[SqlValue], Expression]) -> Expression:
    """Test a text many times, but evaluate its expression once: LIMIT keeps the database from inlining it."""
    assert value.text is not None  # noqa: S101  (the caller checked)
    given = sa.select(value.text.label("t")).correlate_except().limit(1).subquery("given")
    tested = test(replace(value, text=given.c.t))
    return sa.select(tested).select_from(given).correlate_except().scalar_subquery()


def _of_texts(
    test: Callable[[Expression, Expression], Expression], left: SqlValue, right: SqlValue
) -> Expression:
    return sa.false() if left.text is None or right.text is None else test(left.text, right.text)


def _starts_with(text: Expression, part: Expression) -> Expression:
    return sa.func.substr(text, 1, sa.func.length(part)) == part


def _ends_with(text: Expression, part: Expression) -> Expression:
    return sa.func.substr(text, sa.func.length(text) - sa.func.length(part) + 1) == part


def _is_named(boolean: SqlValue, text: SqlValue) -> Expression:
    """Return whether a boolean's name is the text."""
    assert boolean.boolean is not None and text.text is not None  # noqa: S101, PT018
    return text.text == sa.case((boolean.boolean, "true"), (~boolean.boolean, "false"))
