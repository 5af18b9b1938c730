"""A configured query: its text, and the tables and definitions that it may name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from audience_sync.audiences.query.tree import Query


@dataclass(frozen=True, slots=True)
class TableMapping:
    """A section of [tables.*]: a `table`, optionally with its schema, or an `sql` query. The reference explains it."""

    name: str
    table: str | None = None
    sql: str | None = None
    source: str | None = None
    user_id: str | None = None
    timestamp: str | None = None
    event: str | None = None
    parent: str | None = None
    parent_id: str | None = None
    id: str | None = None
    profile: bool = False

    def named_columns(self) -> dict[str, str]:
        """Return the columns that the section names, by the name of the setting."""
        settings = ("user_id", "timestamp", "parent_id", "id")
        return {setting: column for setting in settings if (column := getattr(self, setting)) is not None}


@dataclass(frozen=True, slots=True)
class QueryDefinition:
    """A definition that queries may name as a trait: a query, or SQL.

    `value_type`: the type to which a trait's values are converted; `timezone`: the time zone of `:today` in the SQL.
    """

    is_trait: bool
    query: Query | None = None
    sql: str = ""
    value_type: str | None = None
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True)
class ConfiguredQuery:
    """A definition's query, with the mapped tables and the definitions that it needs.

    The others are for hints. `known_events` and `known_keys`: all mapped events and all definitions on the same database.
    `events_elsewhere` and `keys_elsewhere`: the source of each event that is mapped, and the database of each definition
    that is computed, on another database.
    """

    text: str
    query: Query
    mappings: tuple[TableMapping, ...] = ()
    definitions: Mapping[str, QueryDefinition] = field(default_factory=dict)
    known_events: tuple[str, ...] = ()
    known_keys: tuple[str, ...] = ()
    events_elsewhere: Mapping[str, str] = field(default_factory=dict)
    keys_elsewhere: Mapping[str, str] = field(default_factory=dict)

    def sql_texts(self) -> list[str]:
        """Return the SQL of the configuration that the query's statement will contain."""
        texts = [mapping.sql for mapping in self.mappings if mapping.sql is not None]
        return texts + [
            definition.sql for definition in self.definitions.values() if definition.query is None
        ]
