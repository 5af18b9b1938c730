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
from pathlib import Path
from typing import Annotated, Any, Never, TypeVar
from urllib.parse import urlsplit

import msgspec

from audience_sync.definitions import keys
from audience_sync.definitions.model import Definition, Kind
from audience_sync.errors import ConfigError, MissingVariable

VARIABLE = "AUDIENCE_SYNC_CONFIG"
PLACES = ("config/audience_sync.toml", "audience_sync.toml")
MAX_BYTES = 1_000_000

# Names of the contract that a later release brings. That release deletes them here.
_DEFINITION_LATER = (
    "schedule", "full_schedule", "timezone", "guard_above", "max_exit_ratio", "max_enter_ratio",
    "eligible_sql", "ready_sql",
)  # fmt: skip
LATER: dict[str, tuple[str, ...]] = {
    "top": ("mappings", "tracking"),
    "database": ("keep_calls", "keep_deliveries", "keep_requests", "keep_past_members"),
    "destination": ("bulk = true", "bulk_rows_per_minute", "bulk_rows_per_job"),
    "defaults": _DEFINITION_LATER,
    "definition": ("query", *_DEFINITION_LATER),
}

# Userpilot's own properties: an audience of that name would overwrite them with true and false.
_USERPILOT_OWN = {
    Kind.AUDIENCE: {
        "name",
        "email",
        "created_at",
        "signed_up_at",
        "first_seen_at",
        "last_seen_at",
        "user_id",
    },
    Kind.TRAIT: {"first_seen_at", "last_seen_at", "user_id"},
}

_PerMinute = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    def __repr__(self) -> str:  # the fields hold secrets, and a repr ends in logs and tracebacks
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(())


class Database(_Section, frozen=True):
    url: str = "sqlite:///audience_sync.db"
    schema: str = "audience_sync"


class Source(_Section, frozen=True):
    url: str


class Logging(_Section, frozen=True):
    format: str = "text"
    level: str = "info"


class _DestinationTable(_Section, frozen=True):
    api_key: str | None = None
    endpoint: str = "https://analytex.userpilot.io/"
    allow_custom_endpoint: bool = False
    ca_file: str = ""
    identify_per_minute: _PerMinute = 600
    track_per_minute: _PerMinute = 600
    company_per_minute: _PerMinute = 600
    bulk: bool = False
    booleans: str = "native"
    nested: str = "flatten"
    track_policy: str = "at_least_once"
    presets: bool = True


class Destination(_DestinationTable, frozen=True):
    missing: str = "the API key is not set"  # what to say when it is needed

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


class _Defaults(_Section, frozen=True):
    timeout: str = "10 minutes"


class _DefinitionTable(_Section, frozen=True):
    name: str
    sql: str
    key: str | None = None
    source: str | None = None
    enabled: bool = True
    timeout: str | None = None


class Settings(_Section, frozen=True):
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
        if (cwd / place).is_file():
            return cwd / place
    raise ConfigError(
        f"no configuration: neither {' nor '.join(PLACES)} is in {cwd}. "
        f"Run `audience-sync init` to write one, or name one with --config or {VARIABLE}"
    )


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The checked settings, with variables taken from `environ` and relative paths made absolute."""
    path = _absolute(Path.cwd(), find(path, environ, Path.cwd()))
    folder = path.parent.parent if path.parent.name == "config" else path.parent
    document = _read(path)
    known = ("include", "database", "sources", "destination", "logging", "defaults", "audiences", "traits")
    top = _Place(path, "the file", environ)
    top.check_names(document, known, "top")

    database = _database(_Place(path, "[database]", environ), document.get("database", {}), folder)
    sources = {
        name: _source(_Place(path, f"[sources.{name}]", environ), table, folder)
        for name, table in top.table(document, "sources").items()
    }
    destination = _destination(
        _Place(path, "[destination]", environ), document.get("destination", {}), folder
    )
    logging = _logging(_Place(path, "[logging]", environ), document.get("logging", {}))
    defaults_place = _Place(path, "[defaults]", environ)
    defaults = defaults_place.convert(document.get("defaults", {}), _Defaults, "defaults")
    timeout_seconds = _seconds(defaults_place, defaults.timeout)

    files = [(path, document), *_included(top, document.get("include", []), folder)]
    definitions = tuple(
        _definition(place, table, kind, sources, timeout_seconds)
        for kind, section in ((Kind.AUDIENCE, "audiences"), (Kind.TRAIT, "traits"))
        for file, content in files
        for place, table in _tables(file, content.get(section, []), section, environ)
    )
    _check_unique(path, definitions)
    return Settings(
        path=path,
        folder=folder,
        database=database,
        sources=sources,
        destination=destination,
        logging=logging,
        definitions=definitions,
    )


_T = TypeVar("_T", bound=_Section)


class _Place:
    """Where in the configuration we are, for the messages."""

    def __init__(self, path: Path, where: str, environ: Mapping[str, str]) -> None:
        self.path, self.where, self.environ = path, where, environ

    def fail(self, message: str) -> Never:
        raise ConfigError(f"{self.path}: {self.where}: {message}")

    def check_names(self, table: Any, known: Iterable[str], later: str) -> None:
        if not isinstance(table, dict):
            self.fail(f"expected a table, not {_toml_type(table)}")
        known = tuple(known)
        for name, value in table.items():
            if (written := f"{name} = true" if value is True else name) in LATER[later] or name in LATER[
                later
            ]:
                self.fail(f"not yet: {written} belongs to a later release; remove it")
            if name not in known:
                self.fail(f"unknown name {_shown(name)}{_nearest(name, known)}")

    def table(self, document: dict[str, Any], name: str) -> dict[str, Any]:
        value = document.get(name, {})
        if not isinstance(value, dict):
            self.fail(f"{name}: expected a table, not {_toml_type(value)}")
        return value

    def convert(self, table: Any, shape: type[_T], later: str = "") -> _T:
        self.check_names(table, shape.__struct_fields__, later)
        filled = {name: self.expand(name, value) for name, value in table.items()}
        try:
            return msgspec.convert(filled, shape)
        except msgspec.ValidationError as error:
            self.fail(_explained(str(error)))

    def expand(self, name: str, value: Any) -> Any:
        """A string with its `${NAME}` replaced; MissingVariable for one that is not set."""
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self.fail(f"{name}: holds a NUL character; remove it")

        def variable(match: re.Match[str]) -> str:
            found = self.environ.get(match[1])
            if found is None:
                raise MissingVariable(
                    f"{self.path}: {self.where}: {name}: the environment variable {match[1]} is not set"
                )
            return found

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", variable, value)

    def choice(self, name: str, value: str, *choices: str) -> None:
        if value not in choices:
            self.fail(f"{name}: expected {' or '.join(choices)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder: name the configuration file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ConfigError(f"{path}: the configuration cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes: divide it with `include`")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at [^()]*\)\Z", str(error))
        raise ConfigError(
            f"{path}: not valid TOML {place[0] if place else ''}: {_syntax(str(error))}"
        ) from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{path}: not valid TOML: nested too deeply, or a number too long") from None


def _included(top: _Place, patterns: Any, folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        top.fail('include: expected a list of strings, such as ["audiences/*.toml"]')
    seen = {top.path}
    for pattern in patterns:
        expanded = top.expand("include", pattern)
        files = sorted(glob.glob(expanded, root_dir=folder, recursive=True))  # noqa: PTH207  (Path's refuses absolute ones)
        if not files and not glob.has_magic(expanded):
            top.fail(f"include: no file {_shown(pattern)} in {folder}")
        for file in files:
            path = _absolute(folder, file)
            if path in seen:
                continue
            seen.add(path)
            document = _read(path)
            place = _Place(path, "an included file", top.environ)
            for name in ("include", "database", "sources", "destination", "logging", "defaults"):
                if name in document:
                    place.fail(f"{name} belongs in {top.path}: here stand audiences and traits only")
            place.check_names(document, ("audiences", "traits"), "top")
            yield path, document


def _tables(
    path: Path, tables: Any, section: str, environ: Mapping[str, str]
) -> Iterator[tuple[_Place, dict[str, Any]]]:
    if not isinstance(tables, list):
        _Place(path, section, environ).fail(f"expected [[{section}]], with two brackets")
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, dict) else None
        label = _shown(name) if isinstance(name, str) and name else f"number {number}"
        yield _Place(path, f"[[{section}]] {label}", environ), table


def _database(place: _Place, table: Any, folder: Path) -> Database:
    database = place.convert(table, Database, "database")
    url = _url(place, database.url, folder)
    if not url.startswith(("sqlite:", "postgresql+psycopg:")):
        place.fail("url: expected sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE")
    if url in {"sqlite://", "sqlite:///"} or ":memory:" in url:
        place.fail(
            "url: a database in memory forgets what was sent: name a file, as in sqlite:///audience_sync.db"
        )
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", database.schema):
        place.fail("schema: expected lower-case letters, digits and underscores, no digit first, at most 63")
    return Database(url=url, schema=database.schema)


def _source(place: _Place, table: Any, folder: Path) -> Source:
    return Source(url=_url(place, place.convert(table, Source, "source").url, folder))


def _url(place: _Place, url: str, folder: Path) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?", scheme):
        place.fail("url: expected a database URL, such as sqlite:///FILE")
    if scheme in {"postgresql", "postgres"}:
        place.fail("url: write postgresql+psycopg:// (the bare form means another driver)")
    if scheme != "sqlite" or not rest:
        return url
    if not rest.startswith("/"):
        place.fail("url: an SQLite file takes three slashes: sqlite:///FILE (four before an absolute path)")
    file, question, options = rest[1:].partition("?")
    prefix = "file:" if file.startswith("file:") else ""
    if file and file != ":memory:":
        file = f"{prefix}{_absolute(folder, file.removeprefix(prefix))}"
    return f"sqlite:///{file}{question}{options}"


def _destination(place: _Place, table: Any, folder: Path) -> Destination:
    place.check_names(table, _DestinationTable.__struct_fields__, "destination")
    table = {"api_key": "${USERPILOT_API_KEY}", **table}
    missing = ""
    try:
        place.expand("api_key", table["api_key"])
    except MissingVariable as error:
        del table["api_key"]
        missing = str(error)
    found = place.convert(table, _DestinationTable, "destination")
    if found.api_key is not None and not re.fullmatch(r"[!-~]+", found.api_key):
        place.fail("api_key: expected printable ASCII without spaces or line ends, and not nothing")
    place.choice("booleans", found.booleans, "native", "string")
    place.choice("nested", found.nested, "flatten", "json")
    place.choice("track_policy", found.track_policy, "at_least_once", "at_most_once")
    members = msgspec.structs.asdict(found)
    members["endpoint"] = _endpoint(place, found.endpoint, custom=found.allow_custom_endpoint)
    members["ca_file"] = str(_absolute(folder, found.ca_file)) if found.ca_file else ""
    return Destination(**members, missing=missing)


def _endpoint(place: _Place, endpoint: str, *, custom: bool) -> str:
    """The endpoint in its one form: lower-case host, no default port, one slash at the end."""
    expected = "endpoint: expected https://HOST/, without credentials, query or fragment"
    if not re.fullmatch(r"[!-~]+", endpoint) or any(each in endpoint for each in "@?#\\"):
        place.fail(expected)
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        place.fail(expected)
    if parts.scheme not in {"https", "http"} or not host:
        place.fail(expected)
    userpilot = parts.scheme == "https" and re.fullmatch(r"([a-z0-9-]+\.)*userpilot\.io", host)
    if not (userpilot or _is_loopback(host) or custom):
        place.fail(
            "endpoint: expected https and a host under userpilot.io, or loopback (localhost, 127.0.0.1, "
            "[::1]); for another one set allow_custom_endpoint = true"
        )
    shown = f"[{host}]" if ":" in host else host
    default = {"https": 443, "http": 80}[parts.scheme]
    at = "" if port in {None, default} else f":{port}"
    return f"{parts.scheme}://{shown}{at}{parts.path.rstrip('/')}/"


def _is_loopback(host: str) -> bool:
    """Written plainly only: 127.1 and 2130706433 mean loopback too, and hide it."""
    try:
        return host in {"localhost", "::1"} or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def _logging(place: _Place, table: Any) -> Logging:
    logging = place.convert(table, Logging, "logging")
    place.choice("format", logging.format, "text", "json")
    place.choice("level", logging.level, "debug", "info", "warning", "error")
    return logging


def _definition(
    place: _Place, table: Any, kind: Kind, sources: Mapping[str, Source], timeout_seconds: float
) -> Definition:
    found = place.convert(table, _DefinitionTable, "definition")
    if not found.name.strip() or not found.name.isprintable():
        place.fail("name: expected a text of one line")
    if not found.sql.strip():
        place.fail("sql: is empty: write one SELECT")
    if found.source is not None and found.source not in sources:
        place.fail(f"source: there is no [sources.{_shown(found.source)}]{_nearest(found.source, sources)}")
    try:
        key = keys.from_name(found.name) if found.key is None else keys.check(found.key)
    except ConfigError as error:
        place.fail(str(error))
    if key in _USERPILOT_OWN[kind]:
        place.fail(f"the key {key} is a property of Userpilot's own: give it another with key = ")
    if found.timeout is not None:
        timeout_seconds = _seconds(place, found.timeout)
    return Definition(
        key=key,
        name=found.name.strip(),
        kind=kind,
        sql=found.sql,
        source=found.source,
        enabled=found.enabled,
        timeout_seconds=timeout_seconds,
    )


def _check_unique(path: Path, definitions: Iterable[Definition]) -> None:
    names: dict[str, str] = {}
    for each in definitions:
        if each.key in names:
            raise ConfigError(
                f"{path}: {_shown(names[each.key])} and {_shown(each.name)} have one key, {each.key}: "
                f'give one of them another with `key = "…"`'
            )
        names[each.key] = each.name


def _absolute(folder: Path, path: str | Path) -> Path:
    return Path(os.path.abspath(folder / path))  # noqa: PTH100  (a link stays where the person put it)


def _seconds(place: _Place, text: str) -> float:
    match = re.fullmatch(r"(\d{1,6}) (second|minute|hour)s?", text)
    if match is None or int(match[1]) == 0:
        place.fail('timeout: expected a span, such as "30 seconds", "10 minutes" or "2 hours"')
    return int(match[1]) * {"second": 1.0, "minute": 60.0, "hour": 3600.0}[match[2]]


_TOML_TYPES: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list",
    dict: "a table",
}  # fmt: skip


def _toml_type(value: Any) -> str:
    return _TOML_TYPES.get(type(value), "a date or time")


def _explained(message: str) -> str:
    """The message of msgspec in TOML's words; none of those that repeat a value can come up in our shapes."""
    missing = re.match(r"Object missing required field `(\w+)`", message)
    if missing:
        return f"{missing[1]} is missing: it is required"
    name = re.search(r"`\$\.(\w+)`", message)
    words = {"str": "a string", "int": "a whole number", "bool": "true or false", "null": "nothing"}
    expected = re.match(r"Expected `([\w |]+)`", message)
    wanted = words.get(expected[1].split(" | ")[0], "another type") if expected else "a whole number"
    if wanted == "a whole number":
        wanted += " from 1 to 1000000"
    return f"{name[1] if name else 'a value'}: expected {wanted}"


def _syntax(message: str) -> str:
    return "look there for a missing quote or bracket, or a name that is set twice" if message else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    near = difflib.get_close_matches(name[:60], known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]}?"
    return f": known are {', '.join(known)}" if known else ": none is declared"


def _shown(name: str) -> str:
    return name if len(name) <= 60 and name.isprintable() else ascii(name[:60])
