"""The configuration: `load` finds the file, reads it and checks all of it.

Every error is a ConfigError that names the file, the section, the name and what to do. No message repeats a value,
because it may be a secret. `schema` has the names, types and defaults; `sections` checks one table. Imports must be fast,
because every command loads the configuration.
"""

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.query.configured import TableMapping
from audience_sync.errors import ConfigError
from audience_sync.settings import definitions, queries
from audience_sync.settings.schema import (
    DaemonSettings,
    DatabaseSettings,
    DefaultSettings,
    DestinationSettings,
    LoggingSettings,
    Networks,
    SourceSettings,
    Table,
    TrackingSettings,
    WebSettings,
    WebUser,
)
from audience_sync.settings.sections import Section, absolute, expected, read_toml
from audience_sync.settings.urls import database_url, is_in_memory, is_supported, normalize_endpoint
from audience_sync.suggest import shown

if TYPE_CHECKING:
    from audience_sync.calls import mappings

VARIABLE = "AUDIENCE_SYNC_CONFIG"
PATHS = ("config/audience_sync.toml", "audience_sync.toml")
MAX_USER_NAME = 100
_LISTS = ("audiences", "traits", "mappings")  # also allowed in included files
_NAMES = (
    "include",
    "database",
    "sources",
    "tables",
    "destination",
    "logging",
    "tracking",
    "web",
    "daemon",
    "defaults",
    *_LISTS,
)


class Settings(Table, frozen=True):
    path: Path
    folder: Path  # the base of relative paths
    database: DatabaseSettings
    sources: dict[str, SourceSettings]
    destination: DestinationSettings
    logging: LoggingSettings
    tracking: TrackingSettings
    tables: tuple[TableMapping, ...]  # that queries read
    definitions: tuple[Definition, ...]  # audiences, then traits, each in the order of the files
    mappings: "tuple[mappings.Mapping, ...]"  # without the presets, in the order of the files
    daemon: DaemonSettings = DaemonSettings()
    web: WebSettings = WebSettings()
    include: tuple[str, ...] = ()  # patterns of more files
    versions: tuple[tuple[Path, int], ...] = ()  # of the files that were read

    def have_changed(self) -> bool:
        """Return whether a file of the configuration was changed, added or removed since it was read."""
        return self.versions != tuple(_versions(self.path, self.folder, self.include))


def find(path: Path | None, environ: Mapping[str, str], cwd: Path) -> Path:
    """Return the path: the given one, the one in the environment, or the first default path that exists."""
    if path is None and environ.get(VARIABLE):
        path = Path(environ[VARIABLE])
    if path is not None:
        return cwd / path
    for usual in PATHS:
        if os.path.lexists(cwd / usual):
            return cwd / usual
    raise ConfigError(
        f"no configuration: neither {' nor '.join(PATHS)} is in {cwd.resolve()}. "
        f"Run `audience-sync init` to write one, or name one with --config or {VARIABLE}"
    )


def load(
    path: Path | None = None, environ: Mapping[str, str] = os.environ, *, resolve_keys: bool = True
) -> Settings:
    """Return the checked settings; `environ` has the variables, and relative paths become absolute.

    `resolve_keys=False`: do not check keys; `with_stored_keys` does, because the database may have other ones.
    """
    path = absolute(Path(), find(path, environ, Path()))
    folder = path.parent.parent if path.parent.name == "config" else path.parent
    top = Section(path, "the file", environ)
    document = read_toml(path)
    top.check_names(document, _NAMES)
    sources = document.get("sources", {})
    if not isinstance(sources, dict):
        top.fail("sources: expected tables: [sources.NAME]")
    settings = Settings(
        path=path,
        folder=folder,
        database=_database(top.section("[database]"), document.get("database", {}), folder),
        sources={
            name: _source(top.section(f"[sources.{shown(name)}]"), table, folder)
            for name, table in sources.items()
        },
        destination=_destination(top.section("[destination]"), document.get("destination", {}), folder),
        logging=top.section("[logging]").convert(document.get("logging", {}), LoggingSettings),
        tracking=top.section("[tracking]").convert(document.get("tracking", {}), TrackingSettings),
        daemon=top.section("[daemon]").convert(document.get("daemon", {}), DaemonSettings),
        web=_web(top, document.get("web", {})),
        tables=(),
        definitions=(),
        mappings=(),
    )
    settings = msgspec.structs.replace(settings, tables=_mapped_tables(top, document, settings.sources))
    section = top.section("[defaults]")
    defaults = section.convert(document.get("defaults", {}), DefaultSettings)
    definitions.check_defaults(section, defaults)
    include = _patterns(top, document.get("include", []))
    versions = tuple(_versions(path, folder, include))
    settings = msgspec.structs.replace(settings, include=include, versions=versions)
    files = [(top, document), *_included(top, document.get("include", []), include, folder)]
    built = tuple(
        definitions.build_definition(section, table, kind, settings.sources, defaults)
        for kind in Kind
        for section, table in _tables(files, f"{kind}s")
    )
    with_presets = settings.destination.presets
    mapped = definitions.build_mappings(top, list(_tables(files, "mappings")), with_presets=with_presets)
    settings = msgspec.structs.replace(settings, definitions=built, mappings=mapped)
    if resolve_keys:
        return with_stored_keys(settings, {})
    definitions.check_unique(path, built, older=True)
    return settings


def _mapped_tables(
    top: Section, document: dict[str, Any], sources: Mapping[str, SourceSettings]
) -> tuple[TableMapping, ...]:
    tables = document.get("tables", {})
    if not isinstance(tables, dict):
        top.fail("tables: expected tables: [tables.NAME]")
    mapped = tuple(
        queries.build_table(top.section(f"[tables.{shown(name)}]"), name, table, sources, tables)
        for name, table in tables.items()
    )
    queries.check_tables(top, mapped)
    return mapped


def _patterns(top: Section, patterns: Any) -> tuple[str, ...]:
    """Return the patterns of included files with their variables replaced."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        top.fail('include: expected a list of strings, such as ["audiences/*.toml"]')
    return tuple(top.expand("include", pattern) for pattern in patterns)


def _matching(folder: Path, pattern: str) -> list[Path]:
    files = sorted(glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207  (it accepts absolute patterns)
    return [absolute(folder, file) for file in files]


def _versions(path: Path, folder: Path, include: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    """Yield the files of the configuration, each with the time of its last change; 0 if it cannot be read."""
    for file in dict.fromkeys([path, *(file for pattern in include for file in _matching(folder, pattern))]):
        try:
            yield file, file.stat().st_mtime_ns
        except OSError:
            yield file, 0


def _included(
    top: Section, patterns: list[str], expanded: tuple[str, ...], folder: Path
) -> Iterator[tuple[Section, dict[str, Any]]]:
    """Yield each included file once, with its document."""
    seen = {top.path}
    for pattern, include in zip(patterns, expanded, strict=True):
        files = _matching(folder, include)
        if not files and not glob.has_magic(include):
            top.fail(f"include: there is no file {shown(pattern)} in {folder}")
        for path in files:
            if path not in seen:
                seen.add(path)
                file, document = Section(path, "an included file", top.environ), read_toml(path)
                file.check_names(document, _LISTS)
                yield file, document


def _tables(files: list[tuple[Section, dict[str, Any]]], name: str) -> Iterator[tuple[Section, Any]]:
    """Yield the tables `[[name]]` of all files."""
    for file, document in files:
        yield from _sections(file, name, document.get(name, []))


def _sections(file: Section, name: str, tables: Any) -> Iterator[tuple[Section, Any]]:
    if not isinstance(tables, list):
        file.fail(f"{name}: expected [[{name}]], with two brackets")
    for number, table in enumerate(tables, 1):
        label = table.get("name") if isinstance(table, dict) else None
        shown_label = shown(label) if isinstance(label, str) and label else f"number {number}"
        yield file.section(f"[[{name}]] {shown_label}"), table


_T = TypeVar("_T", DatabaseSettings, SourceSettings)


def _with_url(section: Section, table: Any, shape: type[_T], folder: Path) -> _T:
    settings = section.convert(table, shape)
    return msgspec.structs.replace(settings, url=database_url(section, settings.url, folder))


def _source(section: Section, table: Any, folder: Path) -> SourceSettings:
    source = _with_url(section, table, SourceSettings, folder)
    if not (source.experimental or is_supported(source.url)):
        section.fail(
            "url: sources other than SQLite and PostgreSQL are experimental: add experimental = true to this section "
            "if you accept that time limits do not stop their statements, and that they are not opened for reading only"
        )
    if is_in_memory(source.url):
        section.fail("url: an in-memory database of SQLite has no tables: name a file: sqlite:///shop.db")
    return source


def _database(section: Section, table: Any, folder: Path) -> DatabaseSettings:
    database = _with_url(section, table, DatabaseSettings, folder)
    url = database.url
    if not url.startswith(("sqlite:", "postgresql+psycopg:")):
        section.fail("url: expected sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    if is_in_memory(url):
        section.fail(
            "url: an in-memory database loses its record of what was sent: name a file: sqlite:///audience_sync.db"
        )
    return database


def _destination(section: Section, table: Any, folder: Path) -> DestinationSettings:
    section.check_names(table, DestinationSettings.__struct_fields__)
    destination = section.convert({"api_key": "${USERPILOT_API_KEY}"} | table, DestinationSettings)
    return msgspec.structs.replace(
        destination,
        endpoint=normalize_endpoint(section, destination.endpoint, custom=destination.allow_custom_endpoint),
        ca_file=str(absolute(folder, destination.ca_file)) if destination.ca_file else "",
    )


def _web(top: Section, table: Any) -> WebSettings:
    section = top.section("[web]")
    section.check_names(table, WebSettings.__struct_fields__)
    web = section.convert({name: table[name] for name in table if name != "users"}, WebSettings)
    try:
        _ = web.proxy_networks
    except ValueError:
        section.fail(f"trusted_proxies: expected {expected(Networks)}")
    users: dict[str, WebUser] = {}
    for place, each in _sections(top, "web.users", table.get("users", [])):
        user = place.convert(each, WebUser)
        if not user.name.isprintable() or user.name != user.name.strip() or len(user.name) > MAX_USER_NAME:
            place.fail(
                f"name: expected at most {MAX_USER_NAME} characters on one line, without spaces around"
            )
        if user.name in users:
            place.fail("name: another user has the same name; give each user a different one")
        users[user.name] = user
    return msgspec.structs.replace(web, users=tuple(users.values()))


def with_stored_keys(settings: Settings, stored: Mapping[tuple[str, str], list[str]]) -> Settings:
    """Replace each derived key with the key that was stored when the definition was first used.

    `stored` has the keys by kind and name, in order of first use. Raises ConfigError if two definitions have the same key,
    or if no key can be derived from a name.
    """
    built = tuple(
        definitions.with_stored_key(definition, stored.get((definition.kind, definition.name), []))
        for definition in settings.definitions
    )
    definitions.check_unique(settings.path, built)
    configured = queries.configure_queries(settings.path, built, settings.tables)
    return msgspec.structs.replace(settings, definitions=configured)
