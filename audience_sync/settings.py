"""The configuration: found, read, checked in full, and refused with the file, the place and what to do.

Only ConfigError leaves this module, and no message repeats a value: it may be a secret. Imports stay light,
because every command starts here.
"""

import difflib
import glob
import hashlib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Never, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec

from audience_sync.definitions import keys
from audience_sync.definitions.model import Definition, Kind
from audience_sync.errors import ConfigError, MissingVariable

VARIABLE = "AUDIENCE_SYNC_CONFIG"
PLACES = ("config/audience_sync.toml", "audience_sync.toml")
MAX_BYTES = 1_000_000

# Names of the contract that a later release brings; that release deletes them here.
_RUNS_LATER = (
    "schedule", "full_schedule", "timezone", "guard_above", "max_exit_ratio", "max_enter_ratio",
    "eligible_sql", "ready_sql",
)  # fmt: skip
LATER: dict[str, tuple[str, ...]] = {
    "": ("mappings", "tracking"),
    "database": ("keep_calls", "keep_deliveries", "keep_requests", "keep_past_members"),
    "destination": ("bulk = true", "bulk_rows_per_minute", "bulk_rows_per_job"),
    "defaults": _RUNS_LATER,
    "definition": ("query", *_RUNS_LATER),
}

# Userpilot's own properties: an audience of that name would overwrite them with true and false.
_USERPILOT_OWN = {
    Kind.AUDIENCE: {"name", "email", "created_at", "signed_up_at", "first_seen_at", "last_seen_at"},
    Kind.TRAIT: {"first_seen_at", "last_seen_at"},
}

# A description is what a message says was expected.
_Span = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[1-9][0-9]{0,5} (second|minute|hour)s?\Z",
        description='a span, such as "30 seconds", "10 minutes" or "2 hours"',
    ),
]
_PerMinute = Annotated[int, msgspec.Meta(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")]
_Schema = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z_][a-z0-9_]{0,62}\Z",
        description="lower-case letters, digits and underscores, no digit first, at most 63",
    ),
]
_Text = Annotated[str, msgspec.Meta(pattern=r"\S", description="a string that is not empty")]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    def __repr__(self) -> str:  # the fields hold secrets, and a repr ends in logs and tracebacks
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(())


class Database(_Table, frozen=True):
    url: str = "sqlite:///audience_sync.db"
    schema: _Schema = "audience_sync"


class Source(_Table, frozen=True):
    url: str


class Logging(_Table, frozen=True):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class _DestinationTable(_Table, frozen=True):
    api_key: str | None = None
    endpoint: str = "https://analytex.userpilot.io/"
    allow_custom_endpoint: bool = False
    ca_file: str = ""
    identify_per_minute: _PerMinute = 600
    track_per_minute: _PerMinute = 600
    company_per_minute: _PerMinute = 600
    bulk: bool = False
    booleans: Literal["native", "string"] = "native"
    nested: Literal["flatten", "json"] = "flatten"
    track_policy: Literal["at_least_once", "at_most_once"] = "at_least_once"
    presets: bool = True


class Destination(_DestinationTable, frozen=True):
    missing: str = "the API key is not set"  # what is said when it is needed

    def require_api_key(self) -> str:
        if self.api_key is None:
            raise MissingVariable(self.missing)
        return self.api_key

    @property
    def fingerprint(self) -> str:
        """Tells one destination from another without telling the key; empty while the key is not known."""
        if self.api_key is None:
            return ""
        return hashlib.sha256(f"{self.endpoint}\n{self.api_key}".encode()).hexdigest()[:16]


class _Defaults(_Table, frozen=True):
    timeout: _Span = "10 minutes"


class _DefinitionTable(_Table, frozen=True):
    name: _Text
    sql: _Text
    key: str | None = None
    source: str | None = None
    enabled: bool = True
    timeout: _Span | None = None


class Settings(_Table, frozen=True):
    path: Path
    folder: Path  # what relative paths are relative to
    database: Database
    sources: dict[str, Source]
    destination: Destination
    logging: Logging
    definitions: tuple[Definition, ...]  # audiences, then traits, each in the order of the files


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
        f"no configuration: neither {' nor '.join(PLACES)} is in {cwd}. "
        f"Run `audience-sync init` to write one, or name one with --config or {VARIABLE}"
    )


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The checked settings, with variables taken from `environ` and relative paths made absolute."""
    path = _absolute(Path(), find(path, environ, Path()))
    folder = path.parent.parent if path.parent.name == "config" else path.parent
    top = _Place(path, "the file", environ)
    document = _read(path)
    top.check_names(
        document,
        ("include", "database", "sources", "destination", "logging", "defaults", "audiences", "traits"),
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
            name: _source(top.at(f"[sources.{_shown(name)}]"), table, folder)
            for name, table in sources.items()
        },
        destination=_destination(top.at("[destination]"), document.get("destination", {}), folder),
        logging=top.at("[logging]").convert(document.get("logging", {}), Logging, "logging"),
        definitions=(),
    )
    defaults = top.at("[defaults]").convert(document.get("defaults", {}), _Defaults, "defaults")
    files = [(top, document), *_included(top, document.get("include", []), folder)]
    definitions = tuple(
        _definition(place, table, kind, settings.sources, defaults)
        for kind in Kind
        for file, content in files
        for place, table in _tables(file, content, f"{kind}s")
    )
    _check_unique(path, definitions)
    return msgspec.structs.replace(settings, definitions=definitions)


_T = TypeVar("_T", bound=_Table)


class _Place:
    """Where in the configuration we are: the messages name it."""

    def __init__(self, path: Path, where: str, environ: Mapping[str, str]) -> None:
        self.path, self.where, self.environ = path, where, environ

    def at(self, where: str) -> "_Place":
        return _Place(self.path, where, self.environ)

    def fail(self, message: str) -> Never:
        raise ConfigError(f"{self.path}: {self.where}: {message}")

    def check_names(self, table: Any, known: Iterable[str], section: str) -> None:
        if not isinstance(table, dict):
            self.fail("expected a table of names and values")
        for name, value in table.items():
            later = {name, f"{name} = true"} if value is True else {name}
            for each in later.intersection(LATER.get(section, ())):
                self.fail(f"not yet: {each} belongs to a later release; remove it")
            if name not in known:
                self.fail(f"unknown name {_shown(name)}{_nearest(name, known)}")

    def convert(self, table: Any, shape: type[_T], section: str) -> _T:
        self.check_names(table, shape.__struct_fields__, section)
        try:
            return msgspec.convert({name: self.expand(name, value) for name, value in table.items()}, shape)
        except msgspec.ValidationError as error:  # its message may repeat the value: take the name alone
            found = re.search(r"field `(\w+)`|`\$\.(\w+)`", str(error))
            name = next(filter(None, found.groups()), "") if found else ""
            types = {field.name: field.type for field in msgspec.structs.fields(shape)}
            missing = "" if name in table else "missing: "
            self.fail(f"{name}: {missing}expected {_expected(types[name])}")

    def expand(self, name: str, value: Any) -> Any:
        """A string with its `${NAME}` replaced; MissingVariable for one that is not set."""
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self.fail(f"{name}: holds a NUL character: remove it")
        if name != "sql" and re.search(r"\$\{(?![A-Za-z_][A-Za-z0-9_]*\})", value):
            self.fail(f"{name}: write an environment variable as ${{NAME}}: letters, digits and underscores")

        def variable(match: re.Match[str]) -> str:
            if match[1] not in self.environ:
                where = f"{self.path}: {self.where}: {name}"
                raise MissingVariable(f"{where}: set the environment variable {match[1]}, which is missing")
            return self.environ[match[1]]

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", variable, value)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file: `audience-sync init` writes one") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder: name the configuration file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes: divide it with `include`")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:  # its messages quote one character at most
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{path}: not valid TOML: nested too deeply, or a number too long") from None


def _included(top: _Place, patterns: Any, folder: Path) -> Iterator[tuple[_Place, dict[str, Any]]]:
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        top.fail('include: expected a list of strings, such as ["audiences/*.toml"]')
    seen = {top.path}
    for pattern in patterns:
        expanded = top.expand("include", pattern)
        files = sorted(glob.glob(expanded, root_dir=folder, recursive=True))  # noqa: PTH207  (takes absolute ones)
        if not files and not glob.has_magic(expanded):
            top.fail(f"include: there is no file {_shown(pattern)} in {folder}")
        for path in (_absolute(folder, file) for file in files):
            if path not in seen:
                seen.add(path)
                place, document = _Place(path, "an included file", top.environ), _read(path)
                place.check_names(document, ("audiences", "traits"), "")
                yield place, document


def _tables(file: _Place, document: dict[str, Any], section: str) -> Iterator[tuple[_Place, Any]]:
    tables = document.get(section, [])
    if not isinstance(tables, list):
        file.fail(f"{section}: expected [[{section}]], with two brackets")
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, dict) else None
        shown = _shown(name) if isinstance(name, str) and name else f"number {number}"
        yield file.at(f"[[{section}]] {shown}"), table


def _database(place: _Place, table: Any, folder: Path) -> Database:
    database = place.convert(table, Database, "database")
    url = _url(place, database.url, folder)
    if not url.startswith(("sqlite:", "postgresql+psycopg:")):
        place.fail("url: expected sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE")
    if url in {"sqlite://", "sqlite:///"} or ":memory:" in url or "mode=memory" in url:
        place.fail("url: a database in memory forgets what was sent: name a file: sqlite:///audience_sync.db")
    return Database(url=url, schema=database.schema)


def _source(place: _Place, table: Any, folder: Path) -> Source:
    return Source(url=_url(place, place.convert(table, Source, "source").url, folder))


def _url(place: _Place, url: str, folder: Path) -> str:
    """The URL, with an SQLite file made absolute. Not parsed further: SQLAlchemy has rules of its own."""
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?", scheme):
        place.fail("url: expected a database URL, such as sqlite:///FILE")
    if scheme in {"postgresql", "postgres"}:
        place.fail("url: write postgresql+psycopg:// (the bare form means another driver)")
    if scheme.partition("+")[0] != "sqlite" or not rest:
        return url
    if not rest.startswith("/"):
        place.fail("url: an SQLite file takes three slashes: sqlite:///FILE (four before an absolute path)")
    file, question, options = rest[1:].partition("?")
    prefix = "file:" if file.startswith("file:") else ""
    if file and ":memory:" not in file:
        file = f"{prefix}{_absolute(folder, file.removeprefix(prefix))}"
    return f"{scheme}:///{file}{question}{options}"


def _destination(place: _Place, table: Any, folder: Path) -> Destination:
    place.check_names(table, _DestinationTable.__struct_fields__, "destination")
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
    found = place.convert(rest, _DestinationTable, "destination")
    members = msgspec.structs.asdict(found)
    members["endpoint"] = _endpoint(place, found.endpoint, custom=found.allow_custom_endpoint)
    members["ca_file"] = str(_absolute(folder, found.ca_file)) if found.ca_file else ""
    return Destination(**{**members, "api_key": api_key}, missing=missing)


def _endpoint(place: _Place, endpoint: str, *, custom: bool) -> str:
    """The endpoint in its one form: lower-case host, no default port, one slash at the end."""
    expected = "endpoint: expected https://HOST/, without credentials, query or fragment"
    if not re.fullmatch(r"[!-~]+", endpoint) or any(each in endpoint for each in "@?#\\"):
        place.fail(expected)
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in {"https", "http"}:
        place.fail(expected)
    userpilot = parts.scheme == "https" and re.fullmatch(r"([a-z0-9-]+\.)*userpilot\.io", host)
    if not (userpilot or _is_loopback(host) or custom):
        place.fail(
            "endpoint: expected https and a host under userpilot.io, or loopback (localhost, 127.0.0.1, "
            "[::1]); for another one set allow_custom_endpoint = true"
        )
    shown = f"[{host}]" if ":" in host else host
    at = "" if port in {None, {"https": 443, "http": 80}[parts.scheme]} else f":{port}"
    return f"{parts.scheme}://{shown}{at}{parts.path.rstrip('/')}/"


def _is_loopback(host: str) -> bool:
    """Written plainly only: 127.1 and 2130706433 mean loopback too, and hide it."""
    try:
        return host in {"localhost", "::1"} or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def _definition(
    place: _Place, table: Any, kind: Kind, sources: Mapping[str, Source], defaults: _Defaults
) -> Definition:
    found = place.convert(table, _DefinitionTable, "definition")
    name = found.name.strip()
    if not name.isprintable():
        place.fail("name: expected one line without control characters")
    if found.source is not None and found.source not in sources:
        place.fail(f"source: there is no such [sources.NAME]{_nearest(found.source, sources)}")
    try:
        key = keys.from_name(name) if found.key is None else keys.check(found.key)
    except ConfigError as error:
        place.fail(str(error))
    if key in _USERPILOT_OWN[kind]:
        place.fail(f"{key} is a property of Userpilot's own: give the definition another key with `key = `")
    return Definition(
        key=key,
        name=name,
        kind=kind,
        sql=found.sql,
        source=found.source,
        enabled=found.enabled,
        timeout_seconds=_seconds(found.timeout or defaults.timeout),
        is_key_derived=found.key is None,
    )


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
                f"{path}: the file: {_shown(names[each.key])} and {_shown(each.name)} have one key, {each.key}: "
                "give one of them another with `key = `"
            )
        names[each.key] = each.name


def _seconds(span: str) -> float:
    count, unit = span.split(" ")
    return int(count) * {"second": 1.0, "minute": 60.0, "hour": 3600.0}[unit.removesuffix("s")]


def _absolute(folder: Path, path: str | Path) -> Path:
    return Path(os.path.abspath(folder / path))  # noqa: PTH100  (a link stays where the person put it)


def _expected(kind: Any) -> str:
    for each in (kind, *get_args(kind)):
        if isinstance(each, msgspec.Meta) and each.description:
            return each.description
        if each is str:
            return "a string"
        if each is bool:
            return "true or false"
        for meta in getattr(each, "__metadata__", ()):
            return str(meta.description)
    return " or ".join(str(each) for each in get_args(kind))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:60], list(known), n=1, cutoff=0.5)
    if near:
        return f": did you mean {_shown(near[0])}?"
    return f": known are {', '.join(map(_shown, known))}" if known else ": none is declared"


def _shown(name: str) -> str:
    return name if len(name) <= 60 and name.isprintable() else ascii(name[:60])
