"""Warn about probable mistakes in a query: names that were never seen, and values of an unexpected kind."""

import contextlib
import datetime as dt
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.catalog import Catalog
from audience_sync.audiences.query.comparisons import SqlValue, chain
from audience_sync.audiences.query.compiler import Users, statement_text
from audience_sync.audiences.query.configured import ConfiguredQuery, TableMapping
from audience_sync.audiences.query.dialect import execute
from audience_sync.audiences.query.layout import path_text, query_text, quoted
from audience_sync.audiences.query.rows import Row
from audience_sync.audiences.query.tree import WITH_DATE, WITH_SPAN, WITH_STRINGS, Comparator, Reducer
from audience_sync.db.tables import profiles
from audience_sync.suggest import did_you_mean

SAMPLED_ROWS = 10_000
SAMPLED_NAMES = 1_000
_NAMES = {
    "number": "a number",
    "text": "a string",
    "boolean": "a boolean",
    "date": "a date",
    "list": "a list",
}
_PICKS_A_VALUE = {Reducer.FIRST, Reducer.LAST, Reducer.MODE}


@dataclass(frozen=True, slots=True)
class _Use:
    """A value that a query uses; `stream` is None for a trait and a reduction.

    `wanted`: the kinds that the value may have, the usual one first; none if any will do.
    """

    value: tree.Trait | tree.Property | tree.Context | tree.Reduction
    wanted: tuple[str, ...]
    stream: tree.Stream | None = None


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
            warnings += _review_use(connection, use, catalog, as_of, configured)
    return list(dict.fromkeys(warnings))


def hidden_profiles(connection: sa.Connection, mappings: Sequence[TableMapping]) -> str | None:
    """Return a warning if mapped tables of our own database take the place of the profiles that calls made."""
    hiding = [mapping for mapping in mappings if mapping.profile and mapping.source is None]
    ours = str(connection.get_execution_options()["our"]).replace('"', "") + "profiles"
    if not hiding or any(_reads(connection, mapping, ours) for mapping in hiding):
        return None
    if connection.execute(sa.select(profiles.c.user_id).limit(1)).first() is None:
        return None
    names = " and ".join(f"[tables.{mapping.name}]" for mapping in hiding)
    return (
        f"the profiles that calls made are hidden from queries by profile = true of {names}. To read them as well, map "
        f"a query on our table {ours} with profile = true"
    )


def _reads(connection: sa.Connection, mapping: TableMapping, name: str) -> bool:
    """Return whether a mapped table is the named one, or a query or view that names it."""
    sql = mapping.sql or mapping.table or ""
    if mapping.sql is None:
        schema, _, table = sql.rpartition(".")
        with contextlib.suppress(sa.exc.NoSuchTableError):  # it is not a view
            sql = sa.inspect(connection).get_view_definition(table, schema or None)
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", re.sub(r'["`\[\]]', "", sql)) is not None


def _uses(
    query: tree.Query, streams: tuple[tree.Stream, ...], wanted: tuple[str, ...] = ()
) -> Iterator[_Use]:
    """Yield each value that a query compares or reduces; `streams` are those of the enclosing `where`s."""
    match query:
        case tree.Conjunction() | tree.Disjunction() | tree.Negation():
            for operand in (query.operand,) if isinstance(query, tree.Negation) else query.operands:
                yield from _uses(operand, streams)
        case tree.Compared(left, comparator, arguments):
            yield from _uses(left, streams, _wanted(comparator, arguments))
            for argument in arguments:
                yield from _uses(argument, streams, _wanted(comparator, (left,)))
        case tree.Reduction():
            yield from _uses_of_reduction(query, streams, wanted)
        case tree.Trait():
            yield _Use(query, wanted)
        case tree.Property(_, of_parent) | tree.Context(_, of_parent):
            yield _Use(replace(query, of_parent=False), wanted, streams[-2 if of_parent else -1])


def _uses_of_reduction(
    reduction: tree.Reduction, streams: tuple[tree.Stream, ...], wanted: tuple[str, ...]
) -> Iterator[_Use]:
    inner = (*streams, reduction.stream)
    for condition in reduction.stream.conditions:
        yield from _uses(condition, inner)
    if reduction.value is not None:
        yield from _uses(reduction.value, inner, _wanted_of_item(reduction, wanted))
    if reduction.reducer not in _PICKS_A_VALUE:
        yield _Use(reduction, wanted)


def _wanted(comparator: Comparator, others: tuple[tree.Scalar, ...]) -> tuple[str, ...]:
    """Return the kinds that a value may have to be compared with these others."""
    if comparator in WITH_STRINGS:
        return ("text",)
    if comparator in WITH_DATE | WITH_SPAN:
        return ("date",)
    kinds = [_comparable(other) for other in others]
    return () if () in kinds else tuple(dict.fromkeys(kind for several in kinds for kind in several))


def _wanted_of_item(reduction: tree.Reduction, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kinds that the reduced values may have; `wanted` are those of the result."""
    match reduction.reducer:
        case reducer if reducer in _PICKS_A_VALUE:
            return wanted
        case Reducer.UNIQUE | Reducer.COUNT_UNIQUE:
            return ()
    return (_kind(reduction),)


def _kind(reduction: tree.Reduction) -> str:
    """Return the kind of the result of a reduction that does not pick one of the values."""
    if reduction.reducer is Reducer.UNIQUE:
        return "list"
    return "text" if reduction.as_text else "number"


def _comparable(scalar: tree.Scalar) -> tuple[str, ...]:
    """Return the kinds of the values that a scalar can be compared with; none if its own kind is not known."""
    match scalar:
        case tree.Constant(bool()):
            return ("boolean", "text")
        case tree.Constant("true" | "false"):
            return ("text", "boolean")
        case tree.Constant(str()):
            return ("text",)
        case tree.Constant():
            return ("number",)
        case tree.Reduction(reducer=reducer) if reducer not in {*_PICKS_A_VALUE, Reducer.UNIQUE}:
            return (_kind(scalar),)
    return ()


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
    connection: sa.Connection, use: _Use, catalog: Catalog, as_of: dt.datetime, configured: ConfiguredQuery
) -> Iterator[str]:
    """Yield warnings about a value."""
    if isinstance(use.value, tree.Reduction):
        yield from _review_reduction(use.value, use.wanted)
        return
    first, *rest = use.value.path.steps
    name = f"{type(use.value).__name__.lower()}({quoted(path_text(use.value.path))})"
    if use.stream is not None:
        name += f" of {use.stream.kind}({quoted(use.stream.name)})"
    elif not rest and first in catalog.definitions:
        yield from _review_definition(connection, use, name, catalog, as_of)
        return
    sample = _sample(connection, use, catalog, as_of)
    if sample is None and _is_hidden(connection, use, catalog, as_of):
        hiding = " and ".join(f"[tables.{table.name}]" for table in catalog.profile_tables())
        yield f"{name} was seen in calls, but their profiles are hidden by profile = true of {hiding}"
    elif sample is not None and sample.value_count:
        yield from _review_kinds(name, sample, use.wanted, _rows_name(use.stream))
    elif use.stream is None and first in configured.keys_elsewhere:
        yield f"{name} was never seen here: the definition {first} is computed on {configured.keys_elsewhere[first]}"
    elif sample is None:
        yield f"{name} was never seen: {_no_trait(first, catalog, configured.known_keys)}"
    else:
        known = _columns(use, catalog, configured.known_keys)
        hint = "" if first in known else did_you_mean(first, known, "")
        yield f"{name} was never seen: {hint}" if hint else f"{name} was never seen"


def _is_hidden(connection: sa.Connection, use: _Use, catalog: Catalog, as_of: dt.datetime) -> bool:
    """Return whether calls set a trait that no mapped table of profiles has."""
    if catalog.profiles is None:
        return False
    own = _sample(connection, use, replace(catalog, tables={}), as_of)
    return own is not None and own.value_count > 0


def _review_reduction(reduction: tree.Reduction, wanted: tuple[str, ...]) -> Iterator[str]:
    kind = _kind(reduction)
    if wanted and kind not in wanted:
        name = query_text(replace(reduction, stream=replace(reduction.stream, filters=())))
        yield f"{name} is {_NAMES[kind]}: the comparison needs {_NAMES[wanted[0]]}"


def _review_definition(
    connection: sa.Connection, use: _Use, name: str, catalog: Catalog, as_of: dt.datetime
) -> Iterator[str]:
    """Yield warnings about a trait that is another definition. Its own values are reviewed with that definition."""
    assert isinstance(use.value, tree.Trait)  # noqa: S101  (the caller checked)
    key, wanted = use.value.path.steps[0], use.wanted
    tables = [
        table.name for table in catalog.profile_tables() if key in table.columns and not table.properties
    ]
    if tables:
        yield f"{name} is the definition {key} here, not the column of [tables.{tables[0]}]"
    if not wanted:
        return
    if catalog.definitions[key].is_trait:
        sample = _sample(connection, use, catalog, as_of)
        if sample is not None:
            yield from _review_kinds(name, sample, wanted, "users")
    elif "boolean" not in wanted:
        yield f"{name} is an audience, so true or false: the comparison needs {_NAMES[wanted[0]]}"


@dataclass(frozen=True, slots=True)
class _Sample:
    """Counts of the sampled rows: those that have a value, and those that have one of each kind."""

    value_count: int
    kind_counts: dict[str, int]


def _sample(connection: sa.Connection, use: _Use, catalog: Catalog, as_of: dt.datetime) -> _Sample | None:
    """Count the kinds of a value; return None if no table has it."""
    assert not isinstance(use.value, tree.Reduction)  # noqa: S101
    users = Users(catalog, as_of)
    from_: sa.FromClause | None
    conditions: list[Any] = []
    if use.stream is not None:
        row = Row(users, replace(use.stream, filters=()), None)
        items, value = row.value(use.value)
        from_, conditions = row.from_, row.conditions
    else:
        items, value = users.trait_value(use.value.path)
        from_ = users.only_table()
        if from_ is None:
            return None
    parts = _parts(users, value)
    values: sa.Select[Any] = sa.select(
        value.exists.label("has_value"), *(part.label(kind) for kind, part in parts.items())
    )
    sample = (
        values.select_from(chain([from_, *items])).where(*conditions).limit(SAMPLED_ROWS).subquery("sample")
    )
    counts: list[Any] = [sa.func.sum(sa.case((sample.c.has_value, 1), else_=0))]
    counts += [sa.func.count(sample.c[kind]) for kind in parts]
    value_count, *kind_counts = list[Any](_run(connection, sa.select(*counts), catalog, as_of).one())
    return _Sample(value_count or 0, dict(zip(parts, kind_counts, strict=True)))


def _review_kinds(name: str, sample: _Sample, wanted: tuple[str, ...], rows_name: str) -> Iterator[str]:
    counts = sample.kind_counts
    wrong_count = sample.value_count - sum(counts.get(kind, 0) for kind in wanted)
    if wanted and wrong_count:
        others = [kind for kind, count in counts.items() if kind not in {*wanted, "date"} and count]
        is_one_kind = len(others) == 1 and counts[others[0]] == wrong_count and "date" not in wanted
        actual = _NAMES[others[0]] if is_one_kind else f"not {_NAMES[wanted[0]]}"
        where = f"{wrong_count:,} of {sample.value_count:,} {rows_name}"
        yield f"{name} is {actual} in {where}: the comparison needs {_NAMES[wanted[0]]}"


def _rows_name(stream: tree.Stream | None) -> str:
    if stream is None:
        return "profiles"
    return "events" if stream.kind is tree.StreamKind.EVENT else "rows"


def _no_trait(name: str, catalog: Catalog, keys: Sequence[str]) -> str:
    columns = [column for table in catalog.profile_tables() for column in table.columns]
    return did_you_mean(
        name,
        [*keys, *columns],
        "no table of profiles has this column, and no definition on this database this key",
    )


def _columns(use: _Use, catalog: Catalog, keys: Sequence[str]) -> list[str]:
    """Return the names that may have been meant, where they are known without reading rows."""
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
