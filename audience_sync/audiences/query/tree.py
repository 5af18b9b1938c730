"""The tree of a query, which parser.py builds, and layout.py, english.py and compiler.py walk.

A query is a condition (an audience) or a scalar (a trait). Positions in the text are not part of the tree, so that two
texts with the same meaning have equal trees.
"""

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

ANY_ITEM = "$"  # in a path: each item of a list


@dataclass(frozen=True, slots=True)
class ValuePath:
    """The steps from a document to a value: names of objects, indexes of lists (digits) and ANY_ITEM."""

    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal. Its kind is stored too, because in Python `1 == True`."""

    value: str | int | float | bool
    is_boolean: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_boolean", isinstance(self.value, bool))


@dataclass(frozen=True, slots=True)
class Trait:
    """A trait of the user, from the profile or from another definition, whose key is then the first step."""

    path: ValuePath


@dataclass(frozen=True, slots=True)
class Property:
    """A property of the current row; with `of_parent`, of the row of the enclosing `where`."""

    path: ValuePath
    of_parent: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """Like Property, in the context of an event."""

    path: ValuePath
    of_parent: bool = False


class StreamKind(StrEnum):
    EVENT = "event"
    ENTITY = "entity"


@dataclass(frozen=True, slots=True)
class Where:
    condition: "Condition"


@dataclass(frozen=True, slots=True)
class Window:
    """Rows whose timestamp is after `start` and not after `end`, counted back from the run's moment.

    `within(7 days)` is 7 days to 0, `between(7 days, 10 days)` is 10 days to 7. `of_parent`: counted forward from the
    parent's timestamp, so `between(parent: 1 day, 5 days)` is 1 day to 5.
    """

    start: dt.timedelta
    end: dt.timedelta
    of_parent: bool = False


@dataclass(frozen=True, slots=True)
class Stream:
    """The events of one name, or the rows of a mapped table, that belong to the user or to the current row."""

    kind: StreamKind
    name: str
    filters: "tuple[Where | Window, ...]" = ()

    @property
    def windows(self) -> list[Window]:
        return [window for window in self.filters if isinstance(window, Window)]

    @property
    def conditions(self) -> "list[Condition]":
        return [where.condition for where in self.filters if isinstance(where, Where)]


class Reducer(StrEnum):
    COUNT = "count"
    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    MODE = "mode"
    FIRST = "first"
    LAST = "last"
    UNIQUE = "unique"
    COUNT_UNIQUE = "count_unique"  # unique(…).count()


@dataclass(frozen=True, slots=True)
class Reduction:
    """A stream reduced to one value. `value` is None for COUNT only; `as_text` is for MIN and MAX of strings.

    `least_count` is the second argument of MODE.
    """

    stream: Stream
    reducer: Reducer
    value: Property | Context | None = None
    as_text: bool = False
    least_count: int = 1


class Comparator(StrEnum):
    """Comparators, named as in a query. The first six are written as signs."""

    EQUALS = "equals"
    DIFFERS = "differs"
    GREATER_THAN = "greater_than"
    AT_LEAST = "at_least"
    LESS_THAN = "less_than"
    AT_MOST = "at_most"
    EXISTS = "exists"
    ABSENT = "absent"
    CONTAINS = "contains"
    OMITS = "omits"
    STARTS_WITH = "starts_with"
    ENDS_WITH = "ends_with"
    ONE_OF = "one_of"
    NONE_OF = "none_of"
    BEFORE_DATE = "before_date"
    AFTER_DATE = "after_date"
    WITHIN_LAST = "within_last"
    WITHIN_NEXT = "within_next"
    BEFORE_LAST = "before_last"
    AFTER_NEXT = "after_next"


SIGN_OF = {
    Comparator.EQUALS: "=",
    Comparator.DIFFERS: "!=",
    Comparator.GREATER_THAN: ">",
    Comparator.AT_LEAST: ">=",
    Comparator.LESS_THAN: "<",
    Comparator.AT_MOST: "<=",
}
# Comparators by the kind of their arguments.
WITH_STRINGS = {Comparator.CONTAINS, Comparator.OMITS, Comparator.STARTS_WITH, Comparator.ENDS_WITH}
WITH_DATE = {Comparator.BEFORE_DATE, Comparator.AFTER_DATE}
WITH_SPAN = {Comparator.WITHIN_LAST, Comparator.WITHIN_NEXT, Comparator.BEFORE_LAST, Comparator.AFTER_NEXT}


@dataclass(frozen=True, slots=True)
class Span:
    """A number of hours or days. Comparators of dates count whole days by the calendar, hours by moments."""

    count: int
    is_days: bool

    @property
    def length(self) -> dt.timedelta:
        return dt.timedelta(days=self.count) if self.is_days else dt.timedelta(hours=self.count)


@dataclass(frozen=True, slots=True)
class Compared:
    """A scalar compared with others (most comparators) or with a span (such as WITHIN_LAST)."""

    left: "Scalar"
    comparator: Comparator
    arguments: "tuple[Scalar, ...]" = ()
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Negation:
    operand: "Condition"


@dataclass(frozen=True, slots=True)
class Conjunction:
    operands: "tuple[Condition, ...]"


@dataclass(frozen=True, slots=True)
class Disjunction:
    operands: "tuple[Condition, ...]"


Scalar: TypeAlias = Constant | Trait | Property | Context | Reduction
Condition: TypeAlias = Compared | Negation | Conjunction | Disjunction
Query: TypeAlias = Condition | Scalar


def scalars(query: Query) -> Iterator[Scalar]:
    """Yield every scalar of a query, outer ones before the ones inside them."""
    match query:
        case Negation(operand):
            yield from scalars(operand)
        case Conjunction(operands) | Disjunction(operands):
            for operand in operands:
                yield from scalars(operand)
        case Compared(left, _, arguments):
            for scalar in (left, *arguments):
                yield from scalars(scalar)
        case Reduction(stream, _, value):
            yield query
            for condition in stream.conditions:
                yield from scalars(condition)
            if value is not None:
                yield value
        case _:
            yield query
