"""The tables of the configuration file: names, types and defaults, and the descriptions that messages show."""

import hashlib
import ipaddress
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

import msgspec

from audience_sync.audiences.query.configured import TableMapping
from audience_sync.errors import MissingVariable
from audience_sync.settings import passwords

# Messages show a description after "expected".
Span = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[1-9][0-9]{0,5} (second|minute|hour)s?\Z",
        description='a span, such as "30 seconds", "10 minutes" or "2 hours"',
    ),
]
KeepSpan = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([1-9][0-9]{0,5} (hour|day)s?|forever)\Z",
        description='a span, such as "90 days", or "forever"',
    ),
]
Ratio = Annotated[float, msgspec.Meta(ge=0, description="a number of at least 0, such as 0.5")]
Count = Annotated[int, msgspec.Meta(ge=0, description="a whole number of at least 0")]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")]
RowsPerJob = Annotated[
    int,
    msgspec.Meta(ge=1, le=10_000, description="a whole number from 1 to 10000, which is Userpilot's maximum"),
]
Concurrency = Annotated[int, msgspec.Meta(ge=1, le=32, description="a whole number from 1 to 32")]
SchemaName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z_][a-z0-9_]{0,62}\Z",
        description="at most 63 lower-case letters, digits and underscores, not starting with a digit",
    ),
]
Text = Annotated[str, msgspec.Meta(pattern=r"\S", description="a string that is not empty")]
ValueType = Annotated[
    Literal["boolean", "number", "string"], msgspec.Meta(description='"boolean", "number" or "string"')
]
Fields = Annotated[dict[str, Any], msgspec.Meta(description="a table of an action's fields")]


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A key that only some commands need: if its environment variable is missing, only `require` fails."""

    value: str | None
    problem: str = ""  # the message if the value is missing
    pattern: ClassVar[str] = r"[!-~]+"  # the characters that are allowed in a header

    def require(self) -> str:
        if self.value is None:
            raise MissingVariable(self.problem)
        return self.value


class WriteKey(Secret):
    pattern = r"[!-9;-~]+"  # no colon: Basic authentication splits there


class PasswordHash(Secret):
    pattern = passwords.PATTERN


Password = Annotated[
    PasswordHash,
    msgspec.Meta(description="the hash that `audience-sync password` prints, not the password itself"),
]
Role = Annotated[Literal["read", "operate"], msgspec.Meta(description='"read" or "operate"')]
Networks = Annotated[
    tuple[str, ...],
    msgspec.Meta(description='a list of addresses or networks, such as ["127.0.0.1", "10.0.0.0/8"]'),
]
ApiKey = Annotated[
    Secret, msgspec.Meta(description="printable ASCII without spaces or line ends, and not empty")
]
WriteKeys = Annotated[
    tuple[WriteKey, ...],
    msgspec.Meta(
        description='a list of keys in printable ASCII without spaces and colons, such as ["${WRITE_KEY}"]'
    ),
]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    def __repr__(self) -> str:  # fields contain secrets, and a repr may be logged or printed in a traceback
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(())


class DatabaseSettings(Table, frozen=True):
    url: str = "sqlite:///audience_sync.db"
    schema: SchemaName = "audience_sync"
    keep_calls: KeepSpan = "90 days"
    keep_deliveries: KeepSpan = "400 days"
    keep_requests: KeepSpan = "90 days"
    keep_past_members: KeepSpan = "forever"


class SourceSettings(Table, frozen=True):
    url: str
    experimental: bool = False


class LoggingSettings(Table, frozen=True):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class DestinationSettings(Table, frozen=True):
    api_key: ApiKey
    endpoint: str = "https://analytex.userpilot.io/"
    allow_custom_endpoint: bool = False
    ca_file: str = ""
    identify_per_minute: PerMinute = 600
    track_per_minute: PerMinute = 600
    company_per_minute: PerMinute = 600
    bulk: bool = True
    bulk_rows_per_minute: PerMinute = 1800
    bulk_rows_per_job: RowsPerJob = 10_000
    booleans: Literal["native", "string"] = "native"
    nested: Literal["flatten", "json"] = "flatten"
    track_policy: Literal["at_least_once", "at_most_once"] = "at_least_once"
    presets: bool = True

    @property
    def is_public(self) -> bool:
        """Return whether the endpoint is on Userpilot's own hosts, which have public addresses."""
        host = urlsplit(self.endpoint).hostname or ""
        return not self.allow_custom_endpoint and f".{host}".endswith(".userpilot.io")

    @property
    def rows_per_job(self) -> int:
        """Rows of a bulk job; 0 if bulk jobs are switched off."""
        return self.bulk_rows_per_job if self.bulk else 0

    @property
    def fingerprint(self) -> str:
        """A hash of endpoint and key; empty while the key is missing."""
        if self.api_key.value is None:
            return ""
        return hashlib.sha256(f"{self.endpoint}\n{self.api_key.value}".encode()).hexdigest()[:16]


class DaemonSettings(Table, frozen=True):
    concurrency: Concurrency = 4


class MappingSettings(Table, frozen=True):
    name: Text
    action: Literal["identifyUser", "identifyCompany", "trackEvent"]
    trigger: Text
    fields: Fields = {}


class TrackingSettings(Table, frozen=True):
    """The tracking API, which listens on this machine only if there are no write keys."""

    write_keys: WriteKeys = ()
    calls_per_second: PerMinute = 1000

    def require_write_keys(self) -> tuple[str, ...]:
        return tuple(key.require() for key in self.write_keys)


class WebUser(Table, frozen=True):
    name: Text
    password: Password
    role: Role


class WebSettings(Table, frozen=True):
    """The dashboard. Without users it is read-only, and only for this machine."""

    dashboard: bool = True
    trusted_proxies: Networks = ()
    users: tuple[WebUser, ...] = ()

    def require_users(self) -> dict[str, WebUser]:
        """Return the users by name. Raises MissingVariable if the variable with a user's hash is not set."""
        for user in self.users:
            user.password.require()
        return {user.name: user for user in self.users}

    @property
    def proxy_networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        return [ipaddress.ip_network(text, strict=False) for text in self.trusted_proxies]


class DefaultSettings(Table, frozen=True):
    timeout: Span = "10 minutes"
    schedule: str = "0 */2 * * *"
    full_schedule: str = ""
    timezone: str = "UTC"
    guard_above: Count = 100
    max_exit_ratio: Ratio = 0.5
    max_enter_ratio: Ratio = 1.0
    max_change_ratio: Ratio = 0.9
    eligible_sql: str = ""
    ready_sql: str = ""


# A table that queries read as events, as an entity or as a part of the profiles. Its name is that of the section.
TableSettings = cast(
    "type[Table]",
    msgspec.defstruct(
        "TableSettings",
        [(field.name, field.type, field.default) for field in fields(TableMapping) if field.name != "name"],
        bases=(Table,),
        frozen=True,
    ),
)


class DefinitionSettings(DefaultSettings, frozen=True, kw_only=True):
    name: Text
    sql: str = ""
    query: str = ""
    key: str | None = None
    source: str | None = None
    type: ValueType | None = None
    enabled: bool = True


def span_seconds(span: str) -> float:
    """Return the length of a span, which is infinite for "forever"."""
    if span == "forever":
        return math.inf
    count, unit = span.split(" ")
    return int(count) * _SECONDS[unit.removesuffix("s")]


_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}
