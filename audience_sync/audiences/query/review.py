"""Warn about probable mistakes in a query: names that were never seen, and values of an unexpected kind."""

import contextlib
import datetime as dt
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.catalog import Catalog, ReadTable
from audience_sync.audiences.query.comparisons import chain
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

    `wanted`: the kinds that the value may have, the usual kind first; empty if any kind will do.
    """

    value: tree.Trait | tree.Property | tree.Context | tree.Reduction
    wanted: tuple[str, ...]
    stream: tree.Stream | None = None


def review_query(
    connection: sa.Connection, configured: ConfiguredQuery, catalog: Catalog, as_of: dt.datetime
) -> list[str]:
    """Return a sentence about each probable mistake, based on a sample of the rows."""
    return list(dict.fromkeys(_Review(connection, configured, catalog, as_of).warnings()))


def hidden_profiles(connection: sa.Connection, mappings: Sequence[TableMapping]) -> str | None:
    """Return a warning if mapped tables of our own database replace the profiles from calls."""
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
    """Return whether a mapped table is the named table, or a query or view that names it."""
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
    """Return the kinds that a value may have if it is compared with these others."""
    if comparator in WITH_STRINGS:
        return ("text",)
    if comparator in WITH_DATE | WITH_SPAN:
        return ("date",)
    kinds = [_comparable(other) for other in others]
    return () if () in kinds else tuple(dict.fromkeys(kind for several in kinds for kind in several))


def _wanted_of_item(reduction: tree.Reduction, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kinds that the reduced values may have; `wanted`: the kinds that the result may have."""
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


@dataclass(frozen=True, slots=True)
class _Sample:
    """Counts of the sampled rows that have a value: in total, and for each kind."""

    value_count: int
    kind_counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Review:
    """The warnings about a query on one database."""

    connection: sa.Connection
    configured: ConfiguredQuery
    catalog: Catalog
    as_of: dt.datetime

    def warnings(self) -> Iterator[str]:
        query = self.configured.query
        uses = list(dict.fromkeys(_uses(query, ())))
        streams = [use.stream for use in uses if use.stream is not None]
        streams += [scalar.stream for scalar in tree.scalars(query) if isinstance(scalar, tree.Reduction)]
        unfiltered = dict.fromkeys(replace(stream, filters=()) for stream in streams)
        empty = [stream for stream in unfiltered if not self._is_seen(stream)]
        yield from map(self._never_seen, empty)
        for use in uses:
            if use.stream is None or replace(use.stream, filters=()) not in empty:
                yield from self._of_use(use)

    def _run(self, select: sa.Select[Any]) -> sa.CursorResult[Any]:
        return execute(self.connection, statement_text(select, self.catalog), self.as_of)

    def _table(self, stream: tree.Stream) -> ReadTable | None:
        is_event = stream.kind is tree.StreamKind.EVENT
        return self.catalog.event(stream.name) if is_event else self.catalog.tables.get(stream.name)

    def _is_seen(self, stream: tree.Stream) -> bool:
        row = Row(Users(self.catalog, self.as_of), stream, None)
        select: sa.Select[Any] = (
            sa.select(sa.literal_column("1")).select_from(row.from_).where(*row.conditions)
        )
        return self._run(select.limit(1)).first() is not None

    def _never_seen(self, stream: tree.Stream) -> str:
        text = f"{stream.kind}({quoted(stream.name)})"
        table, elsewhere = self._table(stream), self.configured.events_elsewhere
        if table is None or table.event_name is None:
            has_time = table is not None and table.mapping.timestamp is not None
            return f"{text} has no row with a user{' and a time up to now' * has_time}"
        if stream.name in elsewhere:
            return f"{text} was never seen here: it is mapped on the source {elsewhere[stream.name]}"
        names = sa.select(table.from_clause("e").c[table.event_name]).distinct().limit(SAMPLED_NAMES)
        known = [*self.configured.known_events, *(name for (name,) in self._run(names))]
        otherwise = (
            "no event has a similar name; to read it from a table of yours, map that with [tables.NAME]"
        )
        return f"{text} was never seen: {did_you_mean(stream.name, known, otherwise)}"

    def _of_use(self, use: _Use) -> Iterator[str]:
        if isinstance(use.value, tree.Reduction):
            yield from _review_reduction(use.value, use.wanted)
            return
        first, *rest = use.value.path.steps
        name = f"{type(use.value).__name__.lower()}({quoted(path_text(use.value.path))})"
        if use.stream is not None:
            name += f" of {use.stream.kind}({quoted(use.stream.name)})"
        elif not rest and first in self.catalog.definitions:
            yield from self._of_definition(use, name, first)
            return
        sample = self._sample(use, self.catalog)
        if sample is None and self._is_hidden(use):
            hiding = " and ".join(f"[tables.{table.name}]" for table in self.catalog.profile_tables())
            yield f"{name} was seen in calls, but their profiles are hidden by profile = true of {hiding}"
        elif sample is not None and sample.value_count:
            yield from _review_kinds(name, sample, use.wanted, _rows_name(use.stream))
        elif use.stream is None and first in self.configured.keys_elsewhere:
            place = self.configured.keys_elsewhere[first]
            yield f"{name} was never seen here: the definition {first} is computed on {place}"
        else:
            hint = self._hint(use, first, is_column=sample is not None)
            yield f"{name} was never seen: {hint}" if hint else f"{name} was never seen"

    def _of_definition(self, use: _Use, name: str, key: str) -> Iterator[str]:
        """Yield warnings about a trait that is another definition, whose values are reviewed with that definition."""
        tables = [table for table in self.catalog.profile_tables() if not table.properties]
        hidden = next((table.name for table in tables if key in table.columns), None)
        if hidden is not None:
            yield f"{name} is the definition {key} here, not the column of [tables.{hidden}]"
        if not use.wanted:
            return
        if self.catalog.definitions[key].is_trait:
            sample = self._sample(use, self.catalog)
            if sample is not None:
                yield from _review_kinds(name, sample, use.wanted, "users")
        elif "boolean" not in use.wanted:
            yield f"{name} is an audience, so true or false: the comparison needs {_NAMES[use.wanted[0]]}"

    def _is_hidden(self, use: _Use) -> bool:
        """Return whether calls set a trait that is in no mapped table of profiles."""
        if self.catalog.profiles is None:
            return False
        own = self._sample(use, replace(self.catalog, tables={}))
        return own is not None and own.value_count > 0

    def _sample(self, use: _Use, catalog: Catalog) -> _Sample | None:
        """Count the kinds of a value; return None if no table has it."""
        assert not isinstance(use.value, tree.Reduction)  # noqa: S101
        users = Users(catalog, self.as_of)
        conditions: list[Any] = []
        from_: sa.FromClause | None
        if use.stream is not None:
            row = Row(users, replace(use.stream, filters=()), None)
            items, value = row.value(use.value)
            from_, conditions = row.from_, row.conditions
        else:
            items, value = users.trait_value(use.value.path)
            from_ = users.only_table()
            if from_ is None:
                return None
        moment = users.moment_of(value)
        parts = value.kinds() | ({} if moment is None else {"date": moment})
        columns = [value.exists.label("has_value"), *(part.label(kind) for kind, part in parts.items())]
        rows: sa.Select[Any] = sa.select(*columns).select_from(chain([from_, *items])).where(*conditions)
        sample = rows.limit(SAMPLED_ROWS).subquery("sample")
        counts: list[Any] = [sa.func.sum(sa.case((sample.c.has_value, 1), else_=0))]
        counts += [sa.func.count(sample.c[kind]) for kind in parts]
        value_count, *kind_counts = list[Any](self._run(sa.select(*counts)).one())
        return _Sample(value_count or 0, dict(zip(parts, kind_counts, strict=True)))

    def _hint(self, use: _Use, name: str, *, is_column: bool) -> str:
        """Suggest the nearest name among those that are known without reading rows; empty if there is none."""
        if use.stream is not None:
            table = None if isinstance(use.value, tree.Context) else self._table(use.stream)
            known = list(table.columns) if table is not None and not table.properties else []
        else:
            tables = [
                table for table in self.catalog.profile_tables() if not (is_column and table.properties)
            ]
            known = [*self.configured.known_keys, *(column for table in tables for column in table.columns)]
        if is_column:
            return "" if name in known else did_you_mean(name, known, "")
        nowhere = "no table of profiles has this column, and no definition on this database this key"
        return did_you_mean(name, known, nowhere)


def _review_reduction(reduction: tree.Reduction, wanted: tuple[str, ...]) -> Iterator[str]:
    kind = _kind(reduction)
    if wanted and kind not in wanted:
        name = query_text(replace(reduction, stream=replace(reduction.stream, filters=())))
        yield f"{name} is {_NAMES[kind]}: the comparison needs {_NAMES[wanted[0]]}"


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
