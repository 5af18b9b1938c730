"""The tables that a query may read (our own profiles and events, and [tables.*]), with the kinds of their columns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import statement
from audience_sync.audiences.query.configured import ConfiguredQuery, QueryDefinition, TableMapping
from audience_sync.audiences.query.dialect import Dialect, TypedColumn
from audience_sync.audiences.query.on_postgresql import POSTGRESQL
from audience_sync.audiences.query.on_sqlite import SQLITE
from audience_sync.db import engines
from audience_sync.errors import DefinitionError
from audience_sync.suggest import did_you_mean

DIALECTS: dict[str, Dialect] = {"sqlite": SQLITE, "postgresql": POSTGRESQL}


@dataclass(frozen=True, slots=True)
class ReadTable:
    """A table as the compiler reads it: `columns` has the kind of each column.

    Kinds: integer, number, real (of four bytes), money, text, uuid, bpchar, boolean, date, timestamp, timestamptz, json,
    jsonb and other; `moment` is the timestamp of our own events. SQLite also has `any`, for columns whose values may
    differ in type, and `document` for our own tables. PostgreSQL also has `text_c`, for text with the collation C, and
    `collated`, for text with a collation other than C and the default.

    Columns of our own tables: `properties` is the document that property(…) reads instead of the columns, `context` the
    document of context(…), `event_name` the name of the event. In any table, `arrival` orders rows of equal timestamps.
    """

    mapping: TableMapping
    columns: Mapping[str, str]
    properties: str | None = None
    context: str | None = None
    event_name: str | None = None
    arrival: str | None = None

    @property
    def name(self) -> str:
        return self.mapping.name

    @property
    def place(self) -> tuple[str, bool]:
        """Return the identity of the table, because a section may have the name of one of our tables."""
        return self.mapping.name, self.properties is not None

    def column(self, alias: sa.FromClause, name: str | None) -> TypedColumn:
        """Return a column of the table under an alias."""
        return TypedColumn(alias.c[name or ""], self.columns[name or ""])

    def from_clause(self, name: str) -> sa.FromClause:
        """Return the table, or the query that replaces it, under another name."""
        columns: list[Any] = [sa.column(column) for column in self.columns]
        if self.mapping.sql is not None:
            return sql_text(self.mapping.sql).columns(*columns).subquery(name)
        schema, _, table = (self.mapping.table or "").rpartition(".")
        return sa.table(table, *columns, schema=schema or None).alias(name)


def sql_text(sql: str) -> sa.TextClause:
    """Return SQL that SQLAlchemy does not change, because `:as_of` is bound later."""
    return sa.text(f"{sql}\n".replace(":", "\\:"))


@dataclass(frozen=True, slots=True)
class Catalog:
    """The tables and definitions that queries on one database may name.

    `profiles` and `events` are our own tables, on our own database only. `definition_columns` has the kinds of the columns
    of definitions in SQL.
    """

    dialect: str
    tables: Mapping[str, ReadTable] = field(default_factory=dict)
    profiles: ReadTable | None = None
    events: ReadTable | None = None
    definitions: Mapping[str, QueryDefinition] = field(default_factory=dict)
    definition_columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def db(self) -> Dialect:
        return DIALECTS[self.dialect]

    def event(self, name: str) -> ReadTable | None:
        return next((table for table in self.tables.values() if table.mapping.event == name), self.events)

    def event_names(self) -> list[str]:
        return [table.mapping.event for table in self.tables.values() if table.mapping.event is not None]

    def profile_tables(self) -> list[ReadTable]:
        mapped = [table for table in self.tables.values() if table.mapping.profile]
        return mapped or ([self.profiles] if self.profiles else [])


def own_catalog(dialect: str, schema: str | None = None) -> Catalog:
    """Return the catalog of our own database, without [tables.*]."""
    prefix = f"{schema}." if schema else ""
    is_sqlite = dialect == "sqlite"
    document, user_id = ("document", "text") if is_sqlite else ("jsonb", "text_c")
    profiles = ReadTable(
        TableMapping("profiles", f"{prefix}profiles", user_id="user_id", profile=True),
        {"user_id": user_id, "traits": document},
        properties="traits",
    )
    events = ReadTable(
        TableMapping("events", f"{prefix}events", user_id="user_id", timestamp="timestamp"),
        {
            "event_id": "integer",
            "user_id": user_id,
            "name": "text",
            "properties": document,
            "context": document,
            "timestamp": "moment",
        },
        properties="properties",
        context="context",
        event_name="name",
        arrival="event_id",
    )
    return Catalog(dialect, profiles=profiles, events=events)


def read_catalog(connection: sa.Connection, configured: ConfiguredQuery, *, is_own: bool) -> Catalog:
    """Look up the columns of the tables that a query may name, on the database where it runs.

    Raises:
        DefinitionError: a table or a column of [tables.*] does not exist, or the database is of another kind.

    """
    dialect = connection.dialect.name
    if dialect not in DIALECTS:
        raise DefinitionError(
            f"a query runs on SQLite and PostgreSQL, not on {dialect}: write the definition in SQL"
        )
    schema = str(connection.get_execution_options()["our"]).strip('."') if is_own else ""
    catalog = own_catalog(dialect, schema or None) if is_own else Catalog(dialect)
    tables = {mapping.name: _read_table(connection, mapping) for mapping in configured.mappings}
    definitions = {
        key: replace(definition, sql=statement.without_end(definition.sql, dialect))
        for key, definition in configured.definitions.items()
    }
    columns = {
        key: _read_definition(connection, key, definition)
        for key, definition in definitions.items()
        if definition.query is None
    }
    return replace(catalog, tables=tables, definitions=definitions, definition_columns=columns)


def _read_definition(connection: sa.Connection, key: str, definition: QueryDefinition) -> dict[str, str]:
    """Return the kinds of the columns of a definition in SQL."""
    columns = DIALECTS[connection.dialect.name].column_kinds(connection, None, definition.sql)
    names = {name.lower() for name in columns}
    for name in ("user_id", "value") if definition.is_trait else ("user_id",):
        if name not in names:
            raise DefinitionError(
                f"trait('{key}') cannot be read: the SQL of {key} returns no column {name}: {did_you_mean(name, names)}"
            )
    return columns


def _read_table(connection: sa.Connection, mapping: TableMapping) -> ReadTable:
    if mapping.sql is not None:
        mapping = replace(mapping, sql=statement.without_end(mapping.sql, connection.dialect.name))
    try:
        with connection.begin_nested():
            db = DIALECTS[connection.dialect.name]
            columns = db.column_kinds(connection, mapping.table, mapping.sql)
    except sa.exc.NoSuchTableError as error:
        raise DefinitionError(f"[tables.{mapping.name}] cannot be read: there is no table {error}") from error
    except sa.exc.DBAPIError as error:
        raise DefinitionError(f"[tables.{mapping.name}] cannot be read: {engines.reason(error)}") from error
    for setting, column in mapping.named_columns().items():
        if column not in columns:
            hint = did_you_mean(column, columns)
            raise DefinitionError(f"[tables.{mapping.name}] {setting}: it has no column {column}: {hint}")
    return ReadTable(mapping, columns, arrival=mapping.id)
