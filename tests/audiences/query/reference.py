"""The meaning of a query in plain Python over lists, slow and obvious. The compiled SQL must give the same result.

A row is a dictionary: the document of its properties, its timestamp, its user. A scalar is a list of values: of each item
where the path has a `$`, else of one value, ABSENT where there is none.
"""

import datetime as dt
import itertools
import math
from dataclasses import dataclass, field

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.moments import parse_moment
from audience_sync.audiences.query.tree import Comparator, Reducer

ABSENT = None


@dataclass
class Row:
    user: str
    name: str
    timestamp: dt.datetime
    number: int  # of arrival
    properties: dict
    context: dict = field(default_factory=dict)


@dataclass
class World:
    """Everything that a query can see. `definitions`: key: (query, is_trait)."""

    as_of: dt.datetime
    traits: dict  # user: document
    events: list
    definitions: dict = field(default_factory=dict)


def audience(world, query):
    return {user for user in world.traits if _holds(world, query, user, [])}


def trait(world, query):
    """Return the value of each user who has one."""
    values = {user: _trait_value(world, query, user) for user in world.traits}
    return {user: value for user, value in values.items() if value is not ABSENT}


def _trait_value(world, query, user):
    if isinstance(query, tree.Compared | tree.Negation | tree.Conjunction | tree.Disjunction):
        return True if _holds(world, query, user, []) else ABSENT
    (value,) = _values(world, query, user, [])
    if isinstance(query, tree.Reduction):
        if query.reducer in {Reducer.COUNT, Reducer.COUNT_UNIQUE} and value == 0:
            return ABSENT
        if query.reducer in {Reducer.SUM, Reducer.AVG} and value is not ABSENT:
            return float(f"{value:.15g}")
        if query.reducer is Reducer.UNIQUE and value is not ABSENT:
            return ", ".join(map(_shown, value))
    return value if _kind(value) in {"number", "string", "boolean"} else ABSENT


def _shown(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.15g}"


# Conditions. `rows`: the row at hand and those around it, the innermost last.


def _holds(world, query, user, rows):
    match query:
        case tree.Conjunction(operands):
            return all(_holds(world, each, user, rows) for each in operands)
        case tree.Disjunction(operands):
            return any(_holds(world, each, user, rows) for each in operands)
        case tree.Negation(operand):
            return not _holds(world, operand, user, rows)
        case tree.Compared(left, comparator, arguments, span):
            lefts = _values(world, left, user, rows)
            if comparator is Comparator.ABSENT:
                return all(value is ABSENT for value in lefts)
            rights = [_values(world, argument, user, rows) for argument in arguments]
            if _is_rounded(left) or any(map(_is_rounded, arguments)):
                lefts = [_rounded(value) for value in lefts]
                rights = [[_rounded(value) for value in values] for values in rights]
            return any(_compare(world, comparator, value, rights, span) for value in lefts)


def _is_rounded(scalar):
    return isinstance(scalar, tree.Reduction) and scalar.reducer in {Reducer.SUM, Reducer.AVG}


def _rounded(value):
    return float(f"{value:.15g}") if _kind(value) == "number" else value


def _compare(world, comparator, left, arguments, span):
    def any_argument(test):
        return any(test(left, right) for rights in arguments for right in rights)

    match comparator:
        case Comparator.EXISTS:
            return left is not ABSENT
        case Comparator.EQUALS | Comparator.ONE_OF:
            return any_argument(_equal)
        case Comparator.DIFFERS | Comparator.NONE_OF:
            return left is not ABSENT and not any_argument(_equal)
        case Comparator.GREATER_THAN:
            return any_argument(lambda a, b: _ordered(a, b) and a > b)
        case Comparator.AT_LEAST:
            return any_argument(lambda a, b: _ordered(a, b) and a >= b)
        case Comparator.LESS_THAN:
            return any_argument(lambda a, b: _ordered(a, b) and a < b)
        case Comparator.AT_MOST:
            return any_argument(lambda a, b: _ordered(a, b) and a <= b)
        case Comparator.CONTAINS:
            return any_argument(lambda a, b: _texts(a, b) and b in a)
        case Comparator.OMITS:
            return not any_argument(lambda a, b: _texts(a, b) and b in a)
        case Comparator.STARTS_WITH:
            return any_argument(lambda a, b: _texts(a, b) and a.startswith(b))
        case Comparator.ENDS_WITH:
            return any_argument(lambda a, b: _texts(a, b) and a.endswith(b))
        case Comparator.BEFORE_DATE:
            return any_argument(lambda a, b: bool(_moments(a, b)) and _moment(a) < _moment(b))
        case Comparator.AFTER_DATE:
            return any_argument(lambda a, b: bool(_moments(a, b)) and _moment(a) > _moment(b))
    return _in_span(world.as_of, comparator, _moment(left), span)


def _in_span(as_of, comparator, moment, span):
    if moment is None:
        return False
    if span.is_days:
        value, now, length = moment.date(), as_of.date(), dt.timedelta(days=span.count)
    else:
        value, now, length = moment, as_of, dt.timedelta(hours=span.count)
    return {
        Comparator.WITHIN_LAST: now - length <= value <= now,
        Comparator.WITHIN_NEXT: now <= value <= now + length,
        Comparator.BEFORE_LAST: value <= now - length,
        Comparator.AFTER_NEXT: value >= now + length,
    }[comparator]


def _kind(value):
    match value:
        case None:
            return "absent"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
    return "list or object"


def _equal(left, right):
    kinds = {_kind(left), _kind(right)}
    if kinds == {"boolean", "string"}:
        return _name(left) == _name(right)
    return len(kinds) == 1 and kinds <= {"number", "string", "boolean"} and left == right


def _name(value):
    return str(value).lower() if isinstance(value, bool) else value


def _ordered(left, right):
    return _kind(left) == _kind(right) and _kind(left) in {"number", "string"}


def _texts(left, right):
    return isinstance(left, str) and isinstance(right, str)


def _moment(value):
    return parse_moment(value) if isinstance(value, str) else None


def _moments(left, right):
    return _moment(left) is not None and _moment(right) is not None


# Scalars.


def _values(world, scalar, user, rows):
    match scalar:
        case tree.Constant(value):
            return [float(value) if _kind(value) == "number" else value]
        case tree.Trait(path):
            if len(path.steps) == 1 and path.steps[0] in world.definitions:
                query, is_trait = world.definitions[path.steps[0]]
                return [_trait_value(world, query, user) if is_trait else _holds(world, query, user, [])]
            return _walk(world.traits[user], path.steps)
        case tree.Property(path, of_parent):
            return _walk(rows[-2 if of_parent else -1].properties, path.steps)
        case tree.Context(path, of_parent):
            return _walk(rows[-2 if of_parent else -1].context, path.steps)
        case tree.Reduction():
            return [_reduce(world, scalar, user, rows)]


def _walk(value, steps):
    for index, step in enumerate(steps):
        if step == tree.ANY_ITEM:
            items = value if isinstance(value, list) else []
            return list(itertools.chain(*(_walk(item, steps[index + 1 :]) for item in items)))
        if isinstance(value, dict):
            value = value.get(step)
        elif (
            isinstance(value, list) and step.isdecimal() and step == str(int(step)) and int(step) < len(value)
        ):
            value = value[int(step)]
        else:
            value = ABSENT
    if _kind(value) == "number":
        value = float(value)
    return [value]


def _stream(world, stream, user, rows):
    found = [
        row
        for row in world.events
        if row.user == user and row.name == stream.name and row.timestamp <= world.as_of
    ]
    for each in stream.filters:
        if isinstance(each, tree.Where):
            found = [row for row in found if _holds(world, each.condition, user, [*rows, row])]
        elif each.of_parent:
            at = rows[-1].timestamp
            found = [row for row in found if at + each.start < row.timestamp <= at + each.end]
        else:
            start, end = world.as_of - each.start, world.as_of - each.end
            found = [row for row in found if start < row.timestamp <= end]
    return sorted(found, key=lambda row: (row.timestamp, row.number))


def _reduce(world, reduction, user, rows):
    found = _stream(world, reduction.stream, user, rows)
    if reduction.reducer is Reducer.COUNT:
        return len(found)
    values = [value for row in found for value in _values(world, reduction.value, user, [row])]
    scalars = [value for value in values if _kind(value) in {"number", "string", "boolean"}]
    wanted = "string" if reduction.as_text else "number"
    chosen = [value for value in scalars if _kind(value) == wanted]
    match reduction.reducer:
        case Reducer.SUM:
            return math.fsum(chosen) if chosen else ABSENT
        case Reducer.AVG:
            return math.fsum(chosen) / len(chosen) if chosen else ABSENT
        case Reducer.MIN:
            return min(chosen, default=ABSENT)
        case Reducer.MAX:
            return max(chosen, default=ABSENT)
        case Reducer.FIRST:
            return scalars[0] if scalars else ABSENT
        case Reducer.LAST:
            return scalars[-1] if scalars else ABSENT
    distinct = sorted({(_kind(value), value) for value in scalars}, key=_place)
    match reduction.reducer:
        case Reducer.MODE:
            times = [sum((_kind(other), other) == each for other in scalars) for each in distinct]
            most = max(times, default=0)
            return distinct[times.index(most)][1] if most >= reduction.least_count else ABSENT
        case Reducer.UNIQUE:
            return [value for _, value in distinct] or ABSENT
        case Reducer.COUNT_UNIQUE:
            return len(distinct)


def _place(each):
    kind, value = each
    return ["number", "string", "boolean"].index(kind), value
