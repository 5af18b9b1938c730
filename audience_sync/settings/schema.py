"""The tables of the configuration file: their names, types and defaults, and how each is described when it is wrong."""

import hashlib
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from audience_sync.errors import MissingVariable

# Names of the contract that a later release brings; that release deletes them here.
LATER: dict[str, tuple[str, ...]] = {
    "definition": ("query",),
}

# A description is what a message says was expected.
Span = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[1-9][0-9]{0,5} (second|minute|hour)s?\Z",
        description='a span, such as "30 seconds", "10 minutes" or "2 hours"',
    ),
]
Keep = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([1-9][0-9]{0,5} (hour|day)s?|forever)\Z",
        description='a span, such as "90 days", or "forever"',
    ),
]
Ratio = Annotated[float, msgspec.Meta(ge=0, description="a number from 0 on, such as 0.5")]
Count = Annotated[int, msgspec.Meta(ge=0, description="a whole number from 0 on")]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")]
RowsPerJob = Annotated[
    int,
    msgspec.Meta(
        ge=1, le=10_000, description="a whole number from 1 to 10000, the most that Userpilot takes"
    ),
]
Schema = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z_][a-z0-9_]{0,62}\Z",
        description="lower-case letters, digits and underscores, no digit first, at most 63",
    ),
]
Text = Annotated[str, msgspec.Meta(pattern=r"\S", description="a string that is not empty")]

WriteKeys = Annotated[
    tuple[Annotated[str, msgspec.Meta(pattern=r"^[!-9;-~]+\Z")], ...],  # a colon would end one in Basic
    msgspec.Meta(
        description='a list of keys in printable ASCII without spaces and colons, such as ["${WRITE_KEY}"]'
    ),
]
Fields = Annotated[dict[str, Any], msgspec.Meta(description="a table of an action's fields")]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    def __repr__(self) -> str:  # the fields hold secrets, and a repr ends in logs and tracebacks
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(())


class Database(Table, frozen=True):
    url: str = "sqlite:///audience_sync.db"
    schema: Schema = "audience_sync"
    keep_calls: Keep = "90 days"
    keep_deliveries: Keep = "400 days"
    keep_requests: Keep = "90 days"
    keep_past_members: Keep = "forever"


class Source(Table, frozen=True):
    url: str


class Logging(Table, frozen=True):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class DestinationTable(Table, frozen=True):
    api_key: str | None = None
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


class Destination(DestinationTable, frozen=True):
    missing: str = "the API key is not set"  # what is said when it is needed

    def require_api_key(self) -> str:
        if self.api_key is None:
            raise MissingVariable(self.missing)
        return self.api_key

    @property
    def is_public(self) -> bool:
        """Whether it must be found at an address of the Internet: Userpilot itself is."""
        host = urlsplit(self.endpoint).hostname or ""
        return not self.allow_custom_endpoint and f".{host}".endswith(".userpilot.io")

    @property
    def rows_per_job(self) -> int:
        """0: no bulk jobs."""
        return self.bulk_rows_per_job if self.bulk else 0

    @property
    def fingerprint(self) -> str:
        """Tells one destination from another without telling the key; empty while the key is not known."""
        if self.api_key is None:
            return ""
        return hashlib.sha256(f"{self.endpoint}\n{self.api_key}".encode()).hexdigest()[:16]


class MappingTable(Table, frozen=True):
    name: Text
    action: Literal["identifyUser", "identifyCompany", "trackEvent"]
    trigger: Text
    fields: Fields = {}


class TrackingTable(Table, frozen=True):
    """The HTTP door. No write keys: it stays on this machine."""

    write_keys: WriteKeys = ()
    calls_per_second: PerMinute = 1000


class Tracking(TrackingTable, frozen=True):
    missing: str = ""  # what is said when the keys are needed, where one of them is not known

    def require_write_keys(self) -> tuple[str, ...]:
        if self.missing:
            raise MissingVariable(self.missing)
        return self.write_keys


class Defaults(Table, frozen=True):
    timeout: Span = "10 minutes"
    schedule: str = "0 */2 * * *"
    full_schedule: str = ""
    timezone: str = "UTC"
    guard_above: Count = 100
    max_exit_ratio: Ratio = 0.5
    max_enter_ratio: Ratio = 1.0
    eligible_sql: str = ""
    ready_sql: str = ""


class DefinitionTable(Table, frozen=True):
    name: Text
    sql: Text
    key: str | None = None
    source: str | None = None
    enabled: bool = True
    timeout: Span | None = None
    schedule: str | None = None
    full_schedule: str | None = None
    timezone: str | None = None
    guard_above: Count | None = None
    max_exit_ratio: Ratio | None = None
    max_enter_ratio: Ratio | None = None
    eligible_sql: str | None = None
    ready_sql: str | None = None


def seconds(span: str) -> float:
    """The length of a span; infinite for "forever"."""
    if span == "forever":
        return math.inf
    count, unit = span.split(" ")
    return int(count) * _SECONDS[unit.removesuffix("s")]


_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}
