"""The configuration: found, read, checked in full, and refused with the file, the place and what to do.

Only ConfigError leaves this module, and no message repeats a value: it may be a secret. Imports stay light,
because every command starts here.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from audience_sync.audiences import schedule
from audience_sync.audiences.definition import Definition, Guard, Kind, check_key, key_from_name
from audience_sync.calls import mappings
from audience_sync.errors import ConfigError, MissingVariable
from audience_sync.settings import addresses
from audience_sync.settings.schema import (
    Database,
    Defaults,
    DefinitionTable,
    Destination,
    DestinationTable,
    Logging,
    MappingTable,
    Source,
    Table,
    Tracking,
    TrackingTable,
    seconds,
)
from audience_sync.settings.sections import Place, absolute, nearest, read, shown

VARIABLE = "AUDIENCE_SYNC_CONFIG"
_LISTS = ("audiences", "traits", "mappings")  # also in included files
PLACES = ("config/audience_sync.toml", "audience_sync.toml")

# Userpilot's own properties: an audience of that name would overwrite them with true and false.
_USERPILOT_OWN = {
    Kind.AUDIENCE: {"name", "email", "created_at", "signed_up_at", "first_seen_at", "last_seen_at"},
    Kind.TRAIT: {"first_seen_at", "last_seen_at"},
}


class Settings(Table, frozen=True):
    path: Path
    folder: Path  # what relative paths are relative to
    database: Database
    sources: dict[str, Source]
    destination: Destination
    logging: Logging
    tracking: Tracking
    definitions: tuple[Definition, ...]  # audiences, then traits, each in the order of the files
    mappings: tuple[mappings.Mapping, ...]  # beside the presets, in the order of the files


def find(path: Path | None, environ: Mapping[str, str], cwd: Path) -> Path:
    """The configuration file: the one asked for, the environment's, or the first of the usual places."""
    if path is None and environ.get(VARIABLE):
        path = Path(environ[VARIABLE])
    if path is not None:
        return cwd / path
    for place in PLACES:
        if os.path.lexists(cwd / place):
            return cwd / place
    raise ConfigError(
        f"no configuration: neither {' nor '.join(PLACES)} is in {cwd.resolve()}. "
        f"Run `audience-sync init` to write one, or name one with --config or {VARIABLE}"
    )


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The checked settings, with variables taken from `environ` and relative paths made absolute."""
    path = absolute(Path(), find(path, environ, Path()))
    folder = path.parent.parent if path.parent.name == "config" else path.parent
    top = Place(path, "the file", environ)
    document = read(path)
    top.check_names(
        document,
        ("include", "database", "sources", "destination", "logging", "tracking", "defaults", *_LISTS),
        "",
    )
    sources = document.get("sources", {})
    if not isinstance(sources, dict):
        top.fail("sources: expected tables: [sources.NAME]")
    settings = Settings(
        path=path,
        folder=folder,
        database=_database(top.at("[database]"), document.get("database", {}), folder),
        sources={
            name: _source(top.at(f"[sources.{shown(name)}]"), table, folder)
            for name, table in sources.items()
        },
        destination=_destination(top.at("[destination]"), document.get("destination", {}), folder),
        logging=top.at("[logging]").convert(document.get("logging", {}), Logging, "logging"),
        tracking=_tracking(top.at("[tracking]"), document.get("tracking", {})),
        definitions=(),
        mappings=(),
    )
    defaults = top.at("[defaults]").convert(document.get("defaults", {}), Defaults, "defaults")
    files = [(top, document), *_included(top, document.get("include", []), folder)]
    definitions = tuple(
        _definition(place, table, kind, settings.sources, defaults)
        for kind in Kind
        for file, content in files
        for place, table in _tables(file, content, f"{kind}s")
    )
    _check_unique(path, definitions)
    mapped = tuple(
        _mapping(place, table)
        for file, content in files
        for place, table in _tables(file, content, "mappings")
    )
    _check_mappings(top, mapped, with_presets=settings.destination.presets)
    return msgspec.structs.replace(settings, definitions=definitions, mappings=mapped)


def _included(top: Place, patterns: Any, folder: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        top.fail('include: expected a list of strings, such as ["audiences/*.toml"]')
    seen = {top.path}
    for pattern in patterns:
        expanded = top.expand("include", pattern)
        files = sorted(glob.glob(expanded, root_dir=folder, recursive=True))  # noqa: PTH207  (takes absolute ones)
        if not files and not glob.has_magic(expanded):
            top.fail(f"include: there is no file {shown(pattern)} in {folder}")
        for path in (absolute(folder, file) for file in files):
            if path not in seen:
                seen.add(path)
                place, document = Place(path, "an included file", top.environ), read(path)
                place.check_names(document, _LISTS, "")
                yield place, document


def _tables(file: Place, document: dict[str, Any], section: str) -> Iterator[tuple[Place, Any]]:
    tables = document.get(section, [])
    if not isinstance(tables, list):
        file.fail(f"{section}: expected [[{section}]], with two brackets")
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, dict) else None
        called = shown(name) if isinstance(name, str) and name else f"number {number}"
        yield file.at(f"[[{section}]] {called}"), table


def _database(place: Place, table: Any, folder: Path) -> Database:
    database = place.convert(table, Database, "database")
    url = addresses.url(place, database.url, folder)
    if not url.startswith(("sqlite:", "postgresql+psycopg:")):
        place.fail("url: expected sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE")
    if url in {"sqlite://", "sqlite:///"} or ":memory:" in url or "mode=memory" in url:
        place.fail("url: a database in memory forgets what was sent: name a file: sqlite:///audience_sync.db")
    return msgspec.structs.replace(database, url=url)


def _source(place: Place, table: Any, folder: Path) -> Source:
    return Source(url=addresses.url(place, place.convert(table, Source, "source").url, folder))


def _destination(place: Place, table: Any, folder: Path) -> Destination:
    place.check_names(table, DestinationTable.__struct_fields__, "destination")
    written = table.get("api_key", "${USERPILOT_API_KEY}")
    missing = ""
    try:
        api_key = place.expand("api_key", written)
    except MissingVariable as error:
        api_key, missing = None, str(error)
    if api_key == "" and written:
        api_key, missing = (
            None,
            f"{place.path}: {place.where}: api_key: its environment variable is empty: set it",
        )
    if api_key is not None and not (isinstance(api_key, str) and re.fullmatch(r"[!-~]+", api_key)):
        place.fail("api_key: expected printable ASCII without spaces or line ends, and not nothing")
    rest = {name: value for name, value in table.items() if name != "api_key"}
    found = place.convert(rest, DestinationTable, "destination")
    members = msgspec.structs.asdict(found)
    members["endpoint"] = addresses.endpoint(place, found.endpoint, custom=found.allow_custom_endpoint)
    members["ca_file"] = str(absolute(folder, found.ca_file)) if found.ca_file else ""
    return Destination(**{**members, "api_key": api_key}, missing=missing)


def _tracking(place: Place, table: Any) -> Tracking:
    place.check_names(table, TrackingTable.__struct_fields__, "tracking")
    written, missing = table.get("write_keys", []), ""
    if isinstance(written, list):
        try:
            written = [place.expand("write_keys", key) for key in written]
        except MissingVariable as error:
            written, missing = [], str(error)
    found = place.convert({**table, "write_keys": written}, TrackingTable, "tracking")
    return Tracking(**msgspec.structs.asdict(found), missing=missing)


def _mapping(place: Place, table: Any) -> mappings.Mapping:
    found = place.convert(table, MappingTable, "mapping")
    try:
        return mappings.compile_mapping(found.name, found.action, found.trigger, found.fields)
    except ConfigError as error:
        place.fail(str(error))


def _check_mappings(top: Place, found: Collection[mappings.Mapping], *, with_presets: bool) -> None:
    most = mappings.MOST_MAPPINGS - (len(mappings.PRESETS) if with_presets else 0)
    if len(found) > most:
        top.fail(
            f"mappings: there are {len(found)}, and a destination holds {mappings.MOST_MAPPINGS}"
            f"{', the presets counted' if with_presets else ''}: leave {len(found) - most} out"
        )
    names = Counter(each.name for each in found)
    for name, count in names.items():
        if count > 1:
            top.fail(f"mappings: {count} of them are called {shown(name)}: give each a name of its own")


def _definition(
    place: Place, table: Any, kind: Kind, sources: Mapping[str, Source], defaults: Defaults
) -> Definition:
    found = place.convert(table, DefinitionTable, "definition")
    name = found.name.strip()
    if not name.isprintable():
        place.fail("name: expected one line without control characters")
    if found.source is not None and found.source not in sources:
        place.fail(f"source: there is no such [sources.NAME]{nearest(found.source, sources)}")
    try:
        key = key_from_name(name) if found.key is None else check_key(found.key)
    except ConfigError as error:
        place.fail(str(error))
    if key in _USERPILOT_OWN[kind]:
        place.fail(f"{key} is a property of Userpilot's own: give the definition another key with `key = `")
    chosen = {
        each: value if (value := getattr(found, each)) is not None else getattr(defaults, each)
        for each in Defaults.__struct_fields__
    }
    return Definition(
        key=key,
        name=name,
        kind=kind,
        sql=found.sql,
        source=found.source,
        enabled=found.enabled,
        timeout_seconds=seconds(chosen["timeout"]),
        is_key_derived=found.key is None,
        schedule=_schedule(place, "schedule", chosen["schedule"], chosen["timezone"]),
        full_schedule=_schedule(place, "full_schedule", chosen["full_schedule"], chosen["timezone"]),
        guard=Guard(chosen["guard_above"], chosen["max_exit_ratio"], chosen["max_enter_ratio"]),
        eligible_sql=chosen["eligible_sql"].strip() or None,
        ready_sql=chosen["ready_sql"].strip() or None,
    )


def _schedule(place: Place, name: str, text: str, timezone: str) -> schedule.Schedule | None:
    """None where the text is empty: never by itself."""
    try:
        return schedule.parse_schedule(text, timezone) if text.strip() else None
    except ConfigError as error:
        place.fail(f"{name}: {error}")


def with_stored_keys(settings: Settings, stored: Mapping[tuple[str, str], list[str]]) -> Settings:
    """The settings with the keys that were stored at a definition's first use: they are never derived again.

    `stored` are the keys by kind and name, in the order of their first use.

    Raises:
        ConfigError: two definitions would have one key now.

    """
    definitions = tuple(
        _with_stored_key(each, stored.get((each.kind, each.name), [])) for each in settings.definitions
    )
    _check_unique(settings.path, definitions)
    return msgspec.structs.replace(settings, definitions=definitions)


def _with_stored_key(definition: Definition, known: list[str]) -> Definition:
    if not definition.is_key_derived or not known or definition.key in known:
        return definition
    return replace(definition, key=known[-1])


def _check_unique(path: Path, definitions: Iterable[Definition]) -> None:
    names: dict[str, str] = {}
    for each in definitions:
        if each.key in names:
            raise ConfigError(
                f"{path}: the file: {shown(names[each.key])} and {shown(each.name)} have one key, {each.key}: "
                "give one of them another with `key = `"
            )
        names[each.key] = each.name
