"""Write a tree as the text of a query: on one line if it fits, otherwise with one operand a line."""

import datetime as dt
import json
from typing import assert_never

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.tree import SIGN_OF, Reducer

WIDTH = 100


def query_text(query: tree.Query) -> str:
    """Return a text that parses to the same tree."""
    return _laid_out(query, 0)


def _laid_out(query: tree.Query, indent: int) -> str:
    line = _line(query)
    if len(line) + indent <= WIDTH:
        return line
    inner = " " * (indent + 4)
    match query:
        case tree.Conjunction(operands) | tree.Disjunction(operands):
            word = "AND" if isinstance(query, tree.Conjunction) else "OR"
            parts = [_operand(query, operand, indent) for operand in operands]
            return f"\n{' ' * indent}{word} ".join(parts)
        case tree.Negation(operand):
            if _needs_parentheses(query, operand):
                return f"NOT {_in_parentheses(operand, indent)}"
            return f"NOT {_laid_out(operand, indent)}"  # parentheses would be another level
        case tree.Compared(tree.Reduction() as left):
            return _laid_out(left, indent) + line[len(_line(left)) :]
        case tree.Reduction(stream):
            start = f"{stream.kind}({quoted(stream.name)})"
            filters = [f"\n{inner}{_filter_laid_out(clause, indent + 4)}" for clause in stream.filters]
            return start + "".join(filters) + f"\n{inner}.{_reducer(query)}"
    return line


def _filter_laid_out(clause: tree.Where | tree.Window, indent: int) -> str:
    line = _filter(clause)
    if isinstance(clause, tree.Window) or len(line) + indent <= WIDTH:
        return line
    return f".where{_in_parentheses(clause.condition, indent)}"


def _operand(parent: tree.Query, operand: tree.Condition, indent: int) -> str:
    if not _needs_parentheses(parent, operand):
        return _laid_out(operand, indent + 4)
    line = _line(operand)
    return f"({line})" if len(line) + indent + 6 <= WIDTH else _in_parentheses(operand, indent)


def _in_parentheses(condition: tree.Condition, indent: int) -> str:
    return f"(\n{' ' * (indent + 4)}{_laid_out(condition, indent + 4)}\n{' ' * indent})"


def _needs_parentheses(parent: tree.Query, operand: tree.Condition) -> bool:
    """Return whether the operand would be parsed differently without them; a group of the same kind keeps its own."""
    match parent:
        case tree.Disjunction():
            return isinstance(operand, tree.Disjunction)
        case tree.Conjunction() | tree.Negation():
            return isinstance(operand, tree.Conjunction | tree.Disjunction)
    return False


def _line(query: tree.Query) -> str:
    match query:
        case tree.Conjunction(operands) | tree.Disjunction(operands):
            word = " AND " if isinstance(query, tree.Conjunction) else " OR "
            return word.join(_grouped(query, operand) for operand in operands)
        case tree.Negation(operand):
            return f"NOT {_grouped(query, operand)}"
        case tree.Compared(left, comparator, arguments, span):
            if comparator in SIGN_OF:
                return f"{_line(left)} {SIGN_OF[comparator]} {_line(arguments[0])}"
            texts = [span_text(span)] if span is not None else [_line(argument) for argument in arguments]
            return f"{_line(left)}.{comparator}({', '.join(texts)})"
        case tree.Constant(value):
            return quoted(value) if isinstance(value, str) else json.dumps(value)
        case tree.Trait(path):
            return f"trait({quoted(path_text(path))})"
        case tree.Property(path, of_parent) | tree.Context(path, of_parent):
            name = "property" if isinstance(query, tree.Property) else "context"
            return f"{name}({'parent: ' * of_parent}{quoted(path_text(path))})"
        case tree.Reduction(stream):
            filters = "".join(map(_filter, stream.filters))
            return f"{stream.kind}({quoted(stream.name)}){filters}.{_reducer(query)}"
        case _:
            assert_never(query)


def _grouped(parent: tree.Query, operand: tree.Condition) -> str:
    return f"({_line(operand)})" if _needs_parentheses(parent, operand) else _line(operand)


def _filter(clause: tree.Where | tree.Window) -> str:
    match clause:
        case tree.Where(condition):
            return f".where({_line(condition)})"
        case tree.Window(start, end, of_parent):
            near, far = sorted((start, end))
            parent = "parent: " * of_parent
            if not near:
                return f".within({parent}{length_text(far)})"
            return f".between({parent}{length_text(near)}, {length_text(far)})"


def _reducer(reduction: tree.Reduction) -> str:
    match reduction.reducer:
        case Reducer.COUNT:
            return "count()"
        case Reducer.COUNT_UNIQUE:
            return f"unique({_value(reduction)}).count()"
        case Reducer.MODE if reduction.least_count != 1:
            return f"mode({_value(reduction)}, {reduction.least_count})"
        case reducer:
            return f"{reducer}({_value(reduction)})"


def _value(reduction: tree.Reduction) -> str:
    assert reduction.value is not None  # noqa: S101  (all but COUNT have one)
    return _line(reduction.value) + " as string" * reduction.as_text


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def path_text(path: tree.ValuePath) -> str:
    return ".".join(step.replace("\\", "\\\\").replace(".", "\\.") for step in path.steps)


def span_text(span: tree.Span) -> str:
    unit = "day" if span.is_days else "hour"
    return f"{span.count} {unit}{'' if span.count == 1 else 's'}"


def length_text(length: dt.timedelta) -> str:
    hours = length // dt.timedelta(hours=1)
    return span_text(tree.Span(hours // 24, True) if hours % 24 == 0 else tree.Span(hours, False))
