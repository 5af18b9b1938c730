"""The tables that queries read, and which tables and definitions each query may name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.query import tree
from audience_sync.audiences.query.configured import ConfiguredQuery, QueryDefinition, TableMapping
from audience_sync.errors import ConfigError
from audience_sync.settings.schema import SourceSettings, TableSettings
from audience_sync.settings.sections import Section
from audience_sync.suggest import did_you_mean, shown

if TYPE_CHECKING:
    from audience_sync.settings import Settings

_SQL = re.compile(r"\s*(SELECT|WITH)\s", re.IGNORECASE)


def build_table(
    section: Section, name: str, table: Any, sources: Mapping[str, SourceSettings], names: Iterable[str]
) -> TableMapping:
    """Check a section [tables.NAME]; `names` has the names of all such sections."""
    settings = section.convert(table, TableSettings)
    mapping = TableMapping(name, **msgspec.structs.asdict(settings))
    if (mapping.table is None) == (mapping.sql is None):
        section.fail("expected either table or sql")
    if mapping.source is not None and mapping.source not in sources:
        section.fail(f"source: there is no such [sources.NAME]: {did_you_mean(mapping.source, sources)}")
    if mapping.parent is None:
        if mapping.user_id is None:
            section.fail("missing: user_id, or parent and parent_id of a nested table")
        if mapping.parent_id is not None:
            section.fail("parent_id: it needs parent")
    else:
        if mapping.parent not in names:
            section.fail(f"parent: there is no such [tables.NAME]: {did_you_mean(mapping.parent, names)}")
        if mapping.parent_id is None:
            section.fail("missing: parent_id, the column with the parent's id")
    if mapping.event is not None and mapping.timestamp is None:
        section.fail("event: it needs timestamp, the column of the moment of each event")
    if mapping.profile and mapping.user_id is None:
        section.fail("profile: it needs user_id")
    return mapping


def check_tables(top: Section, mappings: Sequence[TableMapping]) -> None:
    """Check the relations between mapped tables."""
    by_name = {mapping.name: mapping for mapping in mappings}
    events: dict[tuple[str | None, str], str] = {}
    for mapping in mappings:
        section = top.section(f"[tables.{shown(mapping.name)}]")
        if mapping.event is not None:
            other = events.setdefault((mapping.source, mapping.event), mapping.name)
            if other != mapping.name:
                section.fail(f"event: [tables.{shown(other)}] has the same event")
        if mapping.parent is None:
            continue
        parent = by_name[mapping.parent]
        if parent.source != mapping.source:
            section.fail(
                f"parent: [tables.{shown(parent.name)}] has another source: it is on {_database(parent.source)}, and "
                f"this table on {_database(mapping.source)}"
            )
        if parent.id is None:
            section.fail(
                f"parent: [tables.{shown(parent.name)}] needs id, the column that parent_id refers to"
            )
        outer, seen = parent, {mapping.name}
        while outer.user_id is None:
            if outer.name in seen or outer.parent is None:
                section.fail("parent: these tables are nested in each other")
            seen.add(outer.name)
            outer = by_name[outer.parent]


def configure_queries(
    path: Path, definitions: Sequence[Definition], mappings: Sequence[TableMapping]
) -> tuple[Definition, ...]:
    """Give each query the tables and definitions that it needs from its own database."""
    return tuple(
        replace(
            definition,
            query=_configured(
                f"{path}: {definition.name}: query: ", definition, definition.query, definitions, mappings
            ),
        )
        if definition.query is not None
        else definition
        for definition in definitions
    )


def unnamed_definition(settings: "Settings", text: str, source: str | None, kind: Kind) -> Definition:
    """Return a definition of a query that is not in the configuration.

    Raises ConfigError if the query cannot be parsed, or names an unknown table or definition.
    """
    if source is not None and source not in settings.sources:
        raise ConfigError(f"There is no [sources.{shown(source)}]: {did_you_mean(source, settings.sources)}")
    query = ConfiguredQuery(text, _parsed(text, kind))
    definition = Definition("query", "query", kind, source=source, is_preview=True)
    query = _configured("", definition, query, settings.definitions, settings.tables)
    return replace(definition, query=query)


def _parsed(text: str, kind: Kind) -> tree.Query:
    from audience_sync.audiences.query import parser  # noqa: PLC0415  (lark: only where there is a query)

    if _SQL.match(text):
        raise ConfigError(
            "This is SQL, but a query is expected here: put SQL into `sql =` of a definition in the configuration"
        )
    return parser.parse_query(text) if kind is Kind.TRAIT else parser.parse_condition(text)


def likely_source(settings: "Settings", text: str, kind: Kind) -> str | None:
    """Return the only source that has every table and definition in a query.

    None if no source or several sources have them, or if the database of audience-sync has them too. Raises ConfigError
    if the query cannot be parsed.
    """
    mappings: dict[str | None, list[TableMapping]] = {name: [] for name in (None, *settings.sources)}
    for mapping in settings.tables:
        mappings[mapping.source].append(mapping)
    keys = {other.key: other.source for other in settings.definitions}
    scalars = list(tree.scalars(_parsed(text, kind)))
    named = [
        keys[key]
        for scalar in scalars
        if isinstance(scalar, tree.Trait) and (key := scalar.path.steps[0]) in keys
    ]
    streams = [scalar.stream for scalar in scalars if isinstance(scalar, tree.Reduction)]
    sources = [
        source
        for source, tables in mappings.items()
        if all(other == source for other in named) and all(_mapped(stream, tables) for stream in streams)
    ]
    return sources[0] if len(sources) == 1 and (named or streams) else None


def events_elsewhere(definition: Definition, advice: str) -> list[str]:
    """Return a sentence about each event of a query that is read from calls although a table on a source has it too.

    The sentence ends with `advice`, in which {source} is the source's name.
    """
    query = definition.query
    if query is None or definition.source is not None:
        return []
    streams = [scalar.stream for scalar in tree.scalars(query.query) if isinstance(scalar, tree.Reduction)]
    names = [stream.name for stream in streams if stream.kind is tree.StreamKind.EVENT]
    return [
        f"event('{shown(name)}') is read from the calls in the database of audience-sync. The source "
        f"{query.events_elsewhere[name]} has a table of this event too: "
        + advice.replace("{source}", query.events_elsewhere[name])
        for name in dict.fromkeys(names)
        if name in query.events_elsewhere and name not in query.known_events
    ]


def _configured(
    place: str,
    definition: Definition,
    query: ConfiguredQuery,
    definitions: Sequence[Definition],
    mappings: Sequence[TableMapping],
) -> ConfiguredQuery:
    others = {
        other.key: QueryDefinition(
            other.kind is Kind.TRAIT,
            other.query.query if other.query else None,
            other.sql,
            other.value_type,
            other.timezone,
        )
        for other in definitions
        if other.source == definition.source
    }
    reached: dict[str, QueryDefinition] = {}
    scalars = _reach(place, [definition.key], query.query, others, reached)
    tables = {mapping.name: mapping for mapping in mappings if mapping.source == definition.source}
    elsewhere = [mapping for mapping in mappings if mapping.source != definition.source]
    needed = _needed(place, definition, scalars, tables, elsewhere)
    return replace(
        query,
        mappings=needed,
        definitions=reached,
        known_events=tuple(_events(tables)),
        known_keys=tuple(others),
        events_elsewhere={
            mapping.event: mapping.source
            for mapping in elsewhere
            if mapping.event is not None and mapping.source is not None
        },
        keys_elsewhere={
            other.key: _database(other.source) for other in definitions if other.source != definition.source
        },
    )


def _reach(
    place: str,
    keys: list[str],
    query: tree.Query,
    others: Mapping[str, QueryDefinition],
    reached: dict[str, QueryDefinition],
) -> list[tree.Scalar]:
    """Return the scalars of a query and of the definitions that it names; add these definitions to `reached`."""
    scalars = list(tree.scalars(query))
    for scalar in list(scalars):
        if not isinstance(scalar, tree.Trait) or len(scalar.path.steps) > 1:
            continue
        key = scalar.path.steps[0]
        if key in keys:
            circle = " → ".join([*keys[keys.index(key) :], key])
            raise ConfigError(
                f"{place}these definitions refer to each other: {circle}. Remove one of the references"
            )
        if key in others and key not in reached:
            reached[key] = other = others[key]
            if other.query is not None:
                scalars += _reach(place, [*keys, key], other.query, others, reached)
    return scalars


def _needed(
    place: str,
    definition: Definition,
    scalars: Iterable[tree.Scalar],
    tables: Mapping[str, TableMapping],
    elsewhere: Iterable[TableMapping],
) -> tuple[TableMapping, ...]:
    """Return the mapped tables that these scalars read, the tables in which those are nested, and the profiles.

    `tables` are the tables on the definition's database, `elsewhere` the others.
    """
    needed = {name for name, mapping in tables.items() if mapping.profile}
    for scalar in scalars:
        if not isinstance(scalar, tree.Reduction):
            continue
        names = _mapped(scalar.stream, tables.values())
        is_entity = scalar.stream.kind is tree.StreamKind.ENTITY
        if not names and (is_entity or definition.source is not None):
            others = [mapping for mapping in elsewhere if _mapped(scalar.stream, [mapping])]
            if others:
                there = f"[tables.{shown(others[0].name)}] is on {_database(others[0].source)}"
                reason = f"where this query runs: {there}. A query reads one database, which its source names"
            else:
                reason = did_you_mean(scalar.stream.name, tables if is_entity else _events(tables))
            raise ConfigError(
                f"{place}{scalar.stream.kind}('{shown(scalar.stream.name)}') is not mapped by any [tables.*] on "
                f"{_database(definition.source)}{', ' if others else ': '}{reason}"
            )
        needed.update(names)
    waiting = list(needed)
    while waiting:
        parent = tables[waiting.pop()].parent
        if parent is not None and parent not in needed:
            needed.add(parent)
            waiting.append(parent)
    return tuple(mapping for name, mapping in tables.items() if name in needed)


def _mapped(stream: tree.Stream, mappings: Iterable[TableMapping]) -> list[str]:
    """Return the names of the tables that a stream reads."""
    if stream.kind is tree.StreamKind.ENTITY:
        return [mapping.name for mapping in mappings if mapping.name == stream.name]
    return [mapping.name for mapping in mappings if mapping.event == stream.name]


def _database(source: str | None) -> str:
    return f"the source {source}" if source else "the database of audience-sync"


def _events(tables: Mapping[str, TableMapping]) -> list[str]:
    return [mapping.event for mapping in tables.values() if mapping.event is not None]
