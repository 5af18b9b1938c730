"""Where in the configuration we are, and how a value is taken from there: every message names the file and the place."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Never, TypeVar, get_args

import msgspec

from audience_sync.errors import ConfigError, MissingVariable
from audience_sync.settings.schema import LATER, Table

MAX_BYTES = 1_000_000

_T = TypeVar("_T", bound=Table)


class Place:
    """Where in the configuration we are: the messages name it."""

    def __init__(self, path: Path, where: str, environ: Mapping[str, str]) -> None:
        self.path, self.where, self.environ = path, where, environ

    def at(self, where: str) -> "Place":
        return Place(self.path, where, self.environ)

    def fail(self, message: str) -> Never:
        raise ConfigError(f"{self.path}: {self.where}: {message}")

    def check_names(self, table: Any, known: Iterable[str], section: str) -> None:
        if not isinstance(table, dict):
            self.fail("expected a table of names and values")
        for name in table:
            if name in LATER.get(section, ()):
                self.fail(f"not yet: {name} belongs to a later release; remove it")
            if name not in known:
                self.fail(f"unknown name {shown(name)}{nearest(name, known)}")

    def convert(self, table: Any, shape: type[_T], section: str) -> _T:
        self.check_names(table, shape.__struct_fields__, section)
        try:
            return msgspec.convert({name: self.expand(name, value) for name, value in table.items()}, shape)
        except msgspec.ValidationError as error:  # its message may repeat the value: take the name alone
            found = re.search(r"field `(\w+)`|`\$\.(\w+)", str(error))
            name = next(filter(None, found.groups()), "") if found else ""
            types = {field.name: field.type for field in msgspec.structs.fields(shape)}
            missing = "" if name in table else "missing: "
            self.fail(f"{name}: {missing}expected {expected(types[name])}")

    def expand(self, name: str, value: Any) -> Any:
        """A string with its `${NAME}` replaced; MissingVariable for one that is not set."""
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self.fail(f"{name}: holds a NUL character: remove it")
        if not name.endswith("sql") and re.search(r"\$\{(?![A-Za-z_][A-Za-z0-9_]*\})", value):
            self.fail(f"{name}: write an environment variable as ${{NAME}}: letters, digits and underscores")

        def variable(match: re.Match[str]) -> str:
            if match[1] not in self.environ:
                where = f"{self.path}: {self.where}: {name}"
                raise MissingVariable(f"{where}: set the environment variable {match[1]}, which is missing")
            return self.environ[match[1]]

        return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", variable, value)


def read(path: Path) -> dict[str, Any]:
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


def absolute(folder: Path, path: str | Path) -> Path:
    return Path(os.path.abspath(folder / path))  # noqa: PTH100  (a link stays where the person put it)


def expected(kind: Any) -> str:
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


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:60], list(known), n=1, cutoff=0.5)
    if near:
        return f": did you mean {shown(near[0])}?"
    return f": known are {', '.join(map(shown, known))}" if known else ": none is declared"


def shown(name: str) -> str:
    return name if len(name) <= 60 and name.isprintable() else ascii(name[:60])
