"""Check one section of the configuration: its variables, names and types. Errors name the file and the section."""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Never, TypeVar, get_args
from urllib.parse import quote

import msgspec

from audience_sync.errors import ConfigError, MissingVariable
from audience_sync.settings.schema import Secret, Table
from audience_sync.suggest import did_you_mean, shown

MAX_BYTES = 1_000_000
FILE_DATABASES = ("sqlite", "duckdb")  # their URLs have a path instead of a host
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

_T = TypeVar("_T", bound=Table)


class Section:
    def __init__(self, path: Path, name: str, environ: Mapping[str, str]) -> None:
        self.path, self.name, self.environ = path, name, environ

    def section(self, name: str) -> "Section":
        return Section(self.path, name, self.environ)

    def fail(self, message: str) -> Never:
        raise ConfigError(self.message(message))

    def message(self, problem: str) -> str:
        return f"{self.path}: {self.name}: {problem}"

    def check_names(self, table: Any, known: Iterable[str]) -> None:
        if not isinstance(table, dict):
            self.fail("expected a table of names and values")
        for name in table:
            if name not in known:
                self.fail(f"unknown name {shown(name)}: {did_you_mean(name, known)}")

    def convert(self, table: Any, shape: type[_T]) -> _T:
        """Replace the variables in a table, and check its names and types."""
        self.check_names(table, shape.__struct_fields__)
        types = {field.name: field.type for field in msgspec.structs.fields(shape)}
        try:
            values = {name: self._value(name, value, types[name]) for name, value in table.items()}
            return msgspec.convert(values, shape)
        except (
            msgspec.ValidationError
        ) as error:  # the message may repeat the value: take only the name from it
            match = re.search(r"field `(\w+)`|`\$\.(\w+)", str(error))
            name = next(filter(None, match.groups()), "") if match else ""
            missing = "" if name in table else "missing: "
            self.fail(f"{name}: {missing}expected {expected(types[name])}")

    def _value(self, name: str, value: Any, kind: Any) -> Any:
        secret = _secret_type(kind)
        if secret is None:
            return self.expand(name, value)
        if isinstance(value, list):
            return [self._secret(name, item, secret, kind) for item in value]
        return self._secret(name, value, secret, kind)

    def _secret(self, name: str, written: Any, secret: type[Secret], kind: Any) -> Secret:
        try:
            value = self.expand(name, written)
        except MissingVariable as error:
            return secret(None, str(error))
        if value == "" and written:
            return secret(
                None, f"{self.path}: {self.name}: {name}: its environment variable is empty: set it"
            )
        if not isinstance(value, str) or not re.fullmatch(secret.pattern, value):
            self.fail(f"{name}: expected {expected(kind)}")
        return secret(value)

    def expand(self, name: str, value: Any) -> Any:
        """Replace `${NAME}` in a string; return other values unchanged. Raises MissingVariable for an unset variable."""
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self.fail(f"{name}: contains a NUL character: remove it")
        if not name.endswith("sql") and "${" in _VARIABLE.sub(" ", value):
            self.fail(f"{name}: write an environment variable as ${{NAME}}: letters, digits and underscores")
        expanded, end = "", 0
        for match in _VARIABLE.finditer(value):
            expanded += value[end : match.start()]
            text = self._variable(name, match[1])
            if name == "url" and expanded:  # a part of a URL; at the beginning a variable is a whole URL
                is_path = expanded.startswith(FILE_DATABASES)
                text = quote(text, safe="/" if is_path else "", errors="surrogateescape")
            expanded += text
            end = match.end()
        return expanded + value[end:]

    def _variable(self, name: str, variable: str) -> str:
        if variable not in self.environ:
            raise MissingVariable(
                f"{self.path}: {self.name}: {name}: set the environment variable {variable}, which is missing"
            )
        return self.environ[variable]


def _secret_type(kind: Any) -> type[Secret] | None:
    """Return the type of secret in a field, alone or in a tuple; None if it contains none."""
    if isinstance(kind, type) and issubclass(kind, Secret):
        return kind
    return next(filter(None, map(_secret_type, get_args(kind))), None)


def expected(kind: Any) -> str:
    """Describe a field's type, for messages."""
    for part in (kind, *get_args(kind)):
        if isinstance(part, msgspec.Meta) and part.description:
            return part.description
        if part is str:
            return "a string"
        if part is bool:
            return "true or false"
        for meta in getattr(part, "__metadata__", ()):
            return str(meta.description)
    return " or ".join(str(part) for part in get_args(kind))


def read_toml(path: Path) -> dict[str, Any]:
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
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes: split it with `include`")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:  # its messages quote one character at most
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{path}: not valid TOML: nested too deeply, or a number too long") from None


def absolute(folder: Path, path: str | Path) -> Path:
    return Path(os.path.abspath(folder / path))  # noqa: PTH100  (does not follow links, as resolve() does)
