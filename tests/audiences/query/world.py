"""Profiles and events in our own tables, and the results of compiled queries on them."""

import datetime as dt
import json
from dataclasses import replace

from audience_sync.audiences.query.catalog import own_catalog
from audience_sync.audiences.query.compiler import compile_query
from audience_sync.audiences.query.configured import QueryDefinition
from audience_sync.db import dialects, tables
from tests.conftest import SCHEMA

MOMENT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def write(connection, traits, rows):
    """Replace the profiles and events."""
    for table in (tables.events, tables.profiles):
        connection.execute(table.delete())
    connection.execute(
        tables.profiles.insert(),
        [
            {
                "user_id": user,
                "traits": document,
                "trait_times": {},
                "first_seen_at": MOMENT,
                "last_seen_at": MOMENT,
            }
            for user, document in traits.items()
        ],
    )
    if rows:
        connection.execute(
            tables.events.insert(),
            [
                {
                    "event_id": row.number,
                    "call_id": row.number,
                    "user_id": row.user,
                    "name": row.name,
                    "properties": row.properties,
                    "context": row.context,
                    "timestamp": row.timestamp,
                    "received_at": MOMENT,
                }
                for row in rows
            ],
        )


def computed(connection, query, catalog, as_of, *, is_trait):
    """Run a compiled query; return the users, or the value of each."""
    compiled = compile_query(query, catalog, as_of, is_trait=is_trait)
    rows = connection.exec_driver_sql(compiled.sql, execution_options={"no_parameters": True}).all()
    assert len(rows) == len({row[0] for row in rows}), "a user is there twice"
    if not is_trait:
        return {user for (user,) in rows}
    if compiled.value_type == "json":
        rows = [(user, json.loads(value) if isinstance(value, str) else value) for user, value in rows]
    if compiled.value_type == "boolean":
        rows = [(user, bool(value)) for user, value in rows]
    return dict(map(tuple, rows))


def catalog_of(engine, definitions=None):
    """Return the catalog of our own database; `definitions`: key: (query, is_trait)."""
    catalog = own_catalog(engine.dialect.name, None if dialects.is_sqlite(engine) else SCHEMA)
    named = {key: QueryDefinition(is_trait, query) for key, (query, is_trait) in (definitions or {}).items()}
    return replace(catalog, definitions=named)
