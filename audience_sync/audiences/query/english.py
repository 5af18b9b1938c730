"""Describe a query in plain English, for readers who do not know the language."""

from typing import TypeGuard, assert_never

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.layout import length_text, path_text, span_text
from audience_sync.audiences.query.tree import Comparator, Reducer
from audience_sync.suggest import one_of

OF_USER = "the user's "  # precedes a trait among properties
_COMPARISONS = {
    Comparator.EQUALS: "is {}",
    Comparator.DIFFERS: "is something other than {}",
    Comparator.GREATER_THAN: "is more than {}",
    Comparator.AT_LEAST: "is at least {}",
    Comparator.LESS_THAN: "is less than {}",
    Comparator.AT_MOST: "is at most {}",
    Comparator.EXISTS: "is known",
    Comparator.ABSENT: "is not known",
    Comparator.CONTAINS: "contains {}",
    Comparator.OMITS: "does not contain {}",
    Comparator.STARTS_WITH: "starts with {}",
    Comparator.ENDS_WITH: "ends with {}",
    Comparator.ONE_OF: "is one of {}",
    Comparator.NONE_OF: "is none of {}",
    Comparator.BEFORE_DATE: "is before {}",
    Comparator.AFTER_DATE: "is after {}",
    Comparator.WITHIN_LAST: "is within the last {}",
    Comparator.WITHIN_NEXT: "is within the next {}",
    Comparator.BEFORE_LAST: "is at least {} ago",
    Comparator.AFTER_NEXT: "is at least {} ahead",
}
_COUNTED = {
    Comparator.EQUALS: "exactly {}",
    Comparator.GREATER_THAN: "more than {}",
    Comparator.AT_LEAST: "at least {}",
    Comparator.LESS_THAN: "fewer than {}",
    Comparator.AT_MOST: "at most {}",
}
_REDUCED = {
    Reducer.COUNT: "the number of {rows}",
    Reducer.SUM: "the sum of {value} over all {rows}",
    Reducer.AVG: "the average of {value} over all {rows}",
    Reducer.MIN: "the smallest {value} of all {rows}",
    Reducer.MAX: "the largest {value} of all {rows}",
    Reducer.FIRST: "{value} of the first of the {rows}",
    Reducer.LAST: "{value} of the last of the {rows}",
    Reducer.UNIQUE: "the distinct values of {value} over all {rows}",
    Reducer.COUNT_UNIQUE: "the number of distinct values of {value} over all {rows}",
}


def english_text(query: tree.Query) -> str:
    """Return one sentence about the users of an audience, or the value of a trait."""
    if isinstance(query, tree.Condition):
        return f"Users where {_condition(query)}."
    return f"For each user: {_scalar(query)}."


def _condition(condition: tree.Condition, whose: str = "") -> str:
    match condition:
        case tree.Conjunction(operands) | tree.Disjunction(operands):
            word = "and" if isinstance(condition, tree.Conjunction) else "or"
            parts = [_part(operand, whose) for operand in operands]
            return (
                f" {word} ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])}, {word} {parts[-1]}"
            )
        case tree.Negation(
            tree.Compared(left, Comparator.AT_LEAST, (tree.Constant(1, is_boolean=False),))
        ) if _is_count(left):
            return f"there is no {_rows(left.stream, 'event', 'row')}"
        case tree.Negation(operand):
            return f"it is not true that {_part(operand, whose)}"
        case tree.Compared():
            return _compared(condition, whose)
        case _:
            assert_never(condition)


def _is_count(scalar: tree.Scalar) -> TypeGuard[tree.Reduction]:
    return isinstance(scalar, tree.Reduction) and scalar.reducer is Reducer.COUNT


def _part(condition: tree.Condition, whose: str) -> str:
    is_joined = isinstance(condition, tree.Conjunction | tree.Disjunction)
    return f"({_condition(condition, whose)})" if is_joined else _condition(condition, whose)


def _compared(compared: tree.Compared, whose: str) -> str:
    left, comparator = compared.left, compared.comparator
    if _is_count(left) and comparator in _COUNTED and isinstance(compared.arguments[0], tree.Constant):
        number = compared.arguments[0].value
        many = _COUNTED[comparator].format("one" if number == 1 else number)
        if number == 1 and comparator is not Comparator.LESS_THAN:
            return f"there is {many} {_rows(left.stream, 'event', 'row')}"
        return f"there are {many} {_rows(left.stream)}"
    if compared.span is not None:
        text = span_text(compared.span)
    else:
        values = [_scalar(argument, whose) for argument in compared.arguments]
        text = one_of(values) if values else ""
    return f"{_scalar(left, whose)} {_COMPARISONS[comparator].format(text)}"


def _scalar(scalar: tree.Scalar, whose: str = "") -> str:
    match scalar:
        case tree.Constant(value):
            return f"“{value}”" if isinstance(value, str) else str(value).lower()
        case tree.Trait(path):
            return f"{whose}{path_text(path)}"
        case tree.Property(path, of_parent) | tree.Context(path, of_parent):
            where = "context " if isinstance(scalar, tree.Context) else ""
            return f"{'the outer ' if of_parent else ''}{where}{path_text(path)}"
        case tree.Reduction(stream, reducer, value, _, least_count):
            if reducer is Reducer.MODE:
                often = f", if it occurs at least {least_count} times" if least_count > 1 else ""
                return f"the most frequent {_name(value)} of all {_rows(stream)}{often}"
            return _REDUCED[reducer].format(value=_name(value), rows=_rows(stream))
        case _:
            assert_never(scalar)


def _name(value: tree.Property | tree.Context | None) -> str:
    return path_text(value.path) if value is not None else ""


def _rows(stream: tree.Stream, event: str = "events", row: str = "rows") -> str:
    noun = event if stream.kind is tree.StreamKind.EVENT else row
    conditions = [f"for which {_part(condition, OF_USER)}" for condition in stream.conditions]
    return " ".join(
        [f"“{stream.name}” {noun}", *map(_window, stream.windows), " and ".join(conditions)]
    ).strip()


def _window(window: tree.Window) -> str:
    near, far = sorted((window.start, window.end))
    if not near:
        return (
            f"within {length_text(far)} after it" if window.of_parent else f"in the last {length_text(far)}"
        )
    after = "after it" if window.of_parent else "ago"
    return f"between {length_text(near)} and {length_text(far)} {after}"
