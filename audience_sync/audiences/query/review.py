"""Warn about probable mistakes in a query: names that were never seen, and values of an unexpected kind."""

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.catalog import Catalog
from audience_sync.audiences.query.comparisons import SqlValue, chain
from audience_sync.audiences.query.compiler import Users, statement_text
from audience_sync.audiences.query.configured import ConfiguredQuery
from audience_sync.audiences.query.dialect import execute
from audience_sync.audiences.query.layout import path_text, quoted
from audience_sync.audiences.query.rows import Row
from audience_sync.audiences.query.tree import WITH_DATE, WITH_SPAN, WITH_STRINGS, Comparator, Reducer
from audience_sync.suggest import did_you_mean

SAMPLED_ROWS = 10_000
SAMPLED_NAMES = 1_000
_NAMES = {"number": "a number", "text": "a string", "boolean": "a boolean", "date": "a date"}


@dataclass(frozen=True, slots=True)
class _Use:
    """A value that a query uses; `wanted` is the kind it should have, None for any; `stream` is None for a trait."""

    value: tree.Trait | tree.Property | tree.Context
    wanted: str | None
    stream: tree.Stream | None


def review_query(
    connection: sa.Connection, configured: ConfiguredQuery, catalog: Catalog, as_of: dt.datetime
) -> list[str]:
    """Return a sentence about each probable mistake, from a sample of the rows."""
    query = configured.query
    uses = list(dict.fromkeys(_uses(query, ())))
    streams = [use.stream for use in uses if use.stream is not None]
    streams += [scalar.stream for scalar in tree.scalars(query) if isinstance(scalar, tree.Reduction)]
    unfiltered = dict.fromkeys(replace(stream, filters=()) for stream in streams)
    empty = {stream for stream in unfiltered if not _is_seen(connection, stream, catalog, as_of)}
    warnings = [
        _never_seen(connection, stream, catalog, configured, as_of)
        for stream in unfiltered
        if stream in empty
    ]
    for use in uses:
        if use.stream is None or replace(use.stream, filters=()) not in empty:
            warnings += _review_use(connection, use, catalog, as_of, configured.known_keys)
    return list(dict.fromkeys(warnings))


def _uses(query: tree.Query, streams: tuple[tree.Stream, ...]) -> Iterator[_Use]:
    """Yield each value that a query compares or reduces; `streams` are those of the enclosing `where`s."""
    match query:
        case tree.Negation() | tree.Conjunction() | tree.Disjunction():
            for operand in (query.operand,) if isinstance(query, tree.Negation) else query.operands:
                yield from _uses(operand, streams)
        case tree.Compared(left, comparator, arguments):
            for scalar in (left, *arguments):
                yield from _uses(scalar, streams)
            if isinstance(left, tree.Trait | tree.Property | tree.Context):
                yield _use(left, _wanted(comparator, arguments), streams)
        case tree.Reduction(stream, reducer, value, as_text):
            for condition in stream.conditions:
                yield from _uses(condition, (*streams, stream))
            if value is not None:
                is_number = reducer in {Reducer.SUM, Reducer.AVG, Reducer.MIN, Reducer.MAX} and not as_text
                wanted = "number" if is_number else "text" if as_text else None
                yield _use(value, wanted, (*streams, stream))


def _use(
    value: tree.Trait | tree.Property | tree.Context, wanted: str | None, streams: tuple[tree.Stream, ...]
) -> _Use:
    if isinstance(value, tree.Trait):
        return _Use(value, wanted, None)
    return _Use(replace(value, of_parent=False), wanted, streams[-2 if value.of_parent else -1])


def _wanted(comparator: Comparator, arguments: tuple[tree.Scalar, ...]) -> str | None:
    if comparator in WITH_STRINGS:
        return "text"
    if comparator in WITH_DATE | WITH_SPAN:
        return "date"
    kinds = {type(argument.value) for argument in arguments if isinstance(argument, tree.Constant)}
    if kinds == {str} and not any(
        getattr(argument, "value", None) in {"true", "false"} for argument in arguments
    ):
        return "text"
    return "number" if kinds and kinds <= {int, float} else None


def _is_seen(connection: sa.Connection, stream: tree.Stream, catalog: Catalog, as_of: dt.datetime) -> bool:
    row = Row(Users(catalog, as_of), stream, None)
    select: sa.Select[Any] = (
        sa.select(sa.literal_column("1")).select_from(row.from_).where(*row.conditions).limit(1)
    )
    return _run(connection, select, catalog, as_of).first() is not None


def _never_seen(
    connection: sa.Connection,
    stream: tree.Stream,
    catalog: Catalog,
    configured: ConfiguredQuery,
    as_of: dt.datetime,
) -> str:
    text = f"{stream.kind}({quoted(stream.name)})"
    table = catalog.event(stream.name) if stream.kind is tree.StreamKind.EVENT else None
    if table is None or table.event_name is None:
        rows = catalog.tables.get(stream.name) if table is None else table
        has_time = rows is not None and rows.mapping.timestamp is not None
        return f"{text} has no row with a user{' and a time up to now' * has_time}"
    if stream.name in configured.events_elsewhere:
        return f"{text} was never seen here: it is mapped on the source {configured.events_elsewhere[stream.name]}"
    events = table.from_clause("e")
    names = sa.select(events.c[table.event_name]).distinct().limit(SAMPLED_NAMES)
    known = [*configured.known_events, *(name for (name,) in _run(connection, names, catalog, as_of))]
    return f"{text} was never seen: {did_you_mean(stream.name, known, 'no event has a similar name')}"


def _review_use(
    connection: sa.Connection, use: _Use, catalog: Catalog, as_of: dt.datetime, keys: Sequence[str]
) -> list[str]:
    users = Users(catalog, as_of)
    text = f"{type(use.value).__name__.lower()}({quoted(path_text(use.value.path))})"
    from_: sa.FromClause | None
    if use.stream is not None:
        row = Row(users, replace(use.stream, filters=()), None)
        items, value = row.value(use.value)
        from_, conditions = row.from_, row.conditions
        text += f" of {use.stream.kind}({quoted(use.stream.name)})"
        rows_name = "events" if use.stream.kind is tree.StreamKind.EVENT else "rows"
    elif use.value.path.steps[0] in catalog.definitions:
        return list(_review_definition(use, catalog))
    else:
        items, value = users.trait_value(use.value.path)
        from_, conditions, rows_name = users.only_table(), [], "profiles"
        if from_ is None:
            return [f"{text} was never seen: {_no_trait(use.value.path.steps[0], catalog, keys)}"]
    parts = _parts(users, value)
    values: sa.Select[Any] = sa.select(
        value.exists.label("has_value"), *(part.label(kind) for kind, part in parts.items())
    )
    sample = (
        values.select_from(chain([from_, *items])).where(*conditions).limit(SAMPLED_ROWS).subquery("sample")
    )
    counts: list[Any] = [sa.func.sum(sa.case((sample.c.has_value, 1), else_=0))]
    counts += [sa.func.count(sample.c[kind]) for kind in parts]
    exist_count, *kind_counts = list[Any](_run(connection, sa.select(*counts), catalog, as_of).one())
    if not exist_count:
        first = use.value.path.steps[0]
        known = _columns(use, catalog, keys)
        hint = "" if first in known else did_you_mean(first, known, "")
        return [f"{text} was never seen: {hint}" if hint else f"{text} was never seen"]
    kinds = dict(zip(parts, kind_counts, strict=True))
    wrong_count = exist_count - kinds.get(use.wanted or "", 0)
    if use.wanted is None or not wrong_count:
        return []
    others = [kind for kind, count in kinds.items() if kind not in {use.wanted, "date"} and count]
    is_one_kind = len(others) == 1 and use.wanted != "date"
    actual = _NAMES[others[0]] if is_one_kind else f"not {_NAMES[use.wanted]}"
    needed = _NAMES[use.wanted]
    where = f"{wrong_count:,} of {exist_count:,} {rows_name}"
    return [f"{text} is {actual} in {where}: the comparison needs {needed}"]


def _review_definition(use: _Use, catalog: Catalog) -> Iterator[str]:
    """Yield what is odd about a trait that is another definition."""
    key = use.value.path.steps[0]
    tables = [
        table.name for table in catalog.profile_tables() if key in table.columns and not table.properties
    ]
    if tables:
        yield f"trait({quoted(key)}) is the definition {key} here, not the column of [tables.{tables[0]}]"
    if not catalog.definitions[key].is_trait and use.wanted is not None:
        yield f"trait({quoted(key)}) is an audience, so true or false: the comparison needs {_NAMES[use.wanted]}"


def _no_trait(name: str, catalog: Catalog, keys: Sequence[str]) -> str:
    columns = [column for table in catalog.profile_tables() for column in table.columns]
    return did_you_mean(
        name,
        [*keys, *columns],
        "no table of profiles has this column, and no definition on this database this key",
    )


def _columns(use: _Use, catalog: Catalog, keys: Sequence[str]) -> list[str]:
    """Return the names that may have been meant, where they are known without a look at the rows."""
    if use.stream is None:
        return [
            *keys,
            *(name for table in catalog.profile_tables() if not table.properties for name in table.columns),
        ]
    if isinstance(use.value, tree.Context):
        return []
    is_event = use.stream.kind is tree.StreamKind.EVENT
    table = catalog.event(use.stream.name) if is_event else catalog.tables.get(use.stream.name)
    return list(table.columns) if table is not None and not table.properties else []


def _parts(users: Users, value: SqlValue) -> dict[str, Any]:
    moment = users.moment_of(value)
    return value.kinds() | ({"date": moment} if moment is not None else {})


def _run(
    connection: sa.Connection, select: sa.Select[Any], catalog: Catalog, as_of: dt.datetime
) -> sa.CursorResult[Any]:
    return execute(connection, statement_text(select, catalog), as_of)
