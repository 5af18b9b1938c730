"""Definitions and mappings, built from their tables in the configuration."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from audience_sync.audiences import schedule
from audience_sync.audiences.definition import (
    Definition,
    Guard,
    Kind,
    check_key,
    key_from_name,
    older_key_from_name,
)
from audience_sync.audiences.query.configured import ConfiguredQuery
from audience_sync.errors import ConfigError
from audience_sync.settings.schema import (
    DefaultSettings,
    DefinitionSettings,
    MappingSettings,
    SourceSettings,
    span_seconds,
)
from audience_sync.settings.sections import Section
from audience_sync.suggest import did_you_mean, shown

if TYPE_CHECKING:
    from audience_sync.calls import mappings

# Userpilot's own properties: an audience with such a key would overwrite them with true and false.
_USERPILOT_OWN = {
    Kind.AUDIENCE: {"name", "email", "created_at", "signed_up_at", "first_seen_at", "last_seen_at"},
    Kind.TRAIT: {"first_seen_at", "last_seen_at"},
}


def check_defaults(section: Section, defaults: DefaultSettings) -> None:
    """Report a wrong schedule or time zone in [defaults] there, not in the first definition that inherits it."""
    _check_zone(section, defaults.timezone)
    _schedule(section, "schedule", defaults.schedule, defaults.timezone)
    _schedule(section, "full_schedule", defaults.full_schedule, defaults.timezone)


def build_definition(
    section: Section,
    table: Any,
    kind: Kind,
    sources: Mapping[str, SourceSettings],
    defaults: DefaultSettings,
) -> Definition:
    settings = section.convert(table, DefinitionSettings)
    inherited = {name for name in DefaultSettings.__struct_fields__ if name not in table}
    settings = msgspec.structs.replace(settings, **{name: getattr(defaults, name) for name in inherited})
    name = settings.name.strip()
    if not name.isprintable():
        section.fail("name: expected one line without control characters")
    if settings.source is not None and settings.source not in sources:
        section.fail(f"source: there is no such [sources.NAME]: {did_you_mean(settings.source, sources)}")
    if settings.type is not None and kind is not Kind.TRAIT:
        section.fail("type: only a trait has values: remove it, or make this one of [[traits]]")
    _check_zone(section, settings.timezone)
    key, key_error = _key(section, settings, name, kind)
    return Definition(
        key=key,
        name=name,
        kind=kind,
        sql=settings.sql,
        query=_query(section, settings, kind),
        source=settings.source,
        enabled=settings.enabled,
        timeout_seconds=span_seconds(settings.timeout),
        timezone=settings.timezone,
        value_type=settings.type,
        is_key_derived=settings.key is None,
        key_error=key_error,
        schedule=_schedule(section, "schedule", settings.schedule, settings.timezone),
        full_schedule=_schedule(section, "full_schedule", settings.full_schedule, settings.timezone),
        guard=Guard(
            settings.guard_above,
            settings.max_exit_ratio,
            settings.max_enter_ratio,
            settings.max_change_ratio,
        ),
        eligible_sql=settings.eligible_sql.strip() or None,
        ready_sql=settings.ready_sql.strip() or None,
    )


def _query(section: Section, settings: DefinitionSettings, kind: Kind) -> ConfiguredQuery | None:
    """Parse the query; None for a definition in SQL."""
    if bool(settings.sql.strip()) == bool(settings.query.strip()):
        section.fail("expected either sql or query" if settings.sql else "missing: sql or query")
    if not settings.query:
        return None
    from audience_sync.audiences.query import parser  # noqa: PLC0415  (lark: only where there is a query)

    parse = parser.parse_query if kind is Kind.TRAIT else parser.parse_condition
    try:
        return ConfiguredQuery(settings.query, parse(settings.query))
    except ConfigError as error:
        section.fail(f"query: {error}")


def _key(section: Section, settings: DefinitionSettings, name: str, kind: Kind) -> tuple[str, str | None]:
    """Return the key and, if it is valid only where an older version has stored it, the error otherwise."""
    reserved = _USERPILOT_OWN[kind]
    try:
        key = key_from_name(name) if settings.key is None else check_key(settings.key)
    except ConfigError as error:
        older = older_key_from_name(name) if settings.key is None else ""
        if not older or older in reserved:
            section.fail(str(error))
        return older, section.message(str(error))
    if key in reserved:
        section.fail(
            f"{key} is one of Userpilot's own properties: give the definition another key with `key = `"
        )
    return key, None


def _check_zone(section: Section, timezone: str) -> None:
    try:
        schedule.load_zone(timezone)
    except ConfigError as error:
        section.fail(f"timezone: {error}")


def _schedule(section: Section, name: str, text: str, timezone: str) -> schedule.Schedule | None:
    """Parse a schedule; return None for an empty text."""
    try:
        return schedule.parse_schedule(text, timezone) if text.strip() else None
    except ConfigError as error:
        section.fail(f"{name}: {error}")


def with_stored_key(definition: Definition, stored: list[str]) -> Definition:
    """Give a definition the newest stored key for its name, unless the file sets a key."""
    if not definition.is_key_derived:
        return definition
    if not stored:
        if definition.key_error:
            raise ConfigError(definition.key_error)
        return definition
    key = definition.key if definition.key in stored else stored[-1]
    return replace(definition, key=key, key_error=None)


def check_unique(path: Path, definitions: Iterable[Definition], *, older: bool = False) -> None:
    """Refuse two definitions with the same key. `older`: only if older versions gave them the same key too."""
    names: dict[tuple[str, str], str] = {}
    for definition in definitions:
        key, name = definition.key, definition.name
        stored = older_key_from_name(name) if older and definition.is_key_derived else key
        if (key, stored) in names:
            raise ConfigError(
                f"{path}: the file: {shown(names[key, stored])} and {shown(name)} have the same key, {key}: "
                "give one of them another with `key = `"
            )
        names[key, stored] = name


def build_mappings(
    file: Section, tables: Sequence[tuple[Section, Any]], *, with_presets: bool
) -> "tuple[mappings.Mapping, ...]":
    if not tables:
        return ()
    from audience_sync.calls import mappings  # noqa: PLC0415  (only where there are some)

    built = []
    for section, table in tables:
        settings = section.convert(table, MappingSettings)
        try:
            mapping = mappings.compile_mapping(
                settings.name, settings.action, settings.trigger, settings.fields
            )
        except ConfigError as error:
            section.fail(str(error))
        built.append(mapping)
    limit = mappings.MAX_MAPPINGS - (len(mappings.PRESETS) if with_presets else 0)
    if len(built) > limit:
        file.fail(
            f"mappings: there are {len(built)}, but a destination takes {mappings.MAX_MAPPINGS}"
            f"{', including the presets' if with_presets else ''}: remove {len(built) - limit}"
        )
    for name, count in Counter(mapping.name for mapping in built).items():
        if count > 1:
            file.fail(f"mappings: {count} of them are called {shown(name)}: give each its own name")
    return tuple(built)
