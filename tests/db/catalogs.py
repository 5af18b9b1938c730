"""Our tables as described by the catalog of a database."""

from audience_sync.db import dialects, engines, migrate


def catalog(engine):
    with engines.read(engine) as connection:
        if dialects.is_sqlite(engine):
            return _sqlite_catalog(connection)
        return _postgresql_catalog(connection)


def _sqlite_catalog(connection):
    catalog = {}
    for name, sql in dialects.sql(
        connection, "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'index') AND sql IS NOT NULL"
    ):
        if name.startswith(("sqlite_", migrate.VERSION_TABLE)):
            continue
        # A table's columns and constraints one by one, because their order does not matter.
        head, _, rest = " ".join(sql.split()).partition("(")
        body, _, options = rest.rpartition(")")
        catalog[name] = (
            head.replace('"', ""),
            sorted(part.strip() for part in body.split(", ")),
            options.strip(),
        )
    return catalog


def _postgresql_catalog(connection):
    columns = """
      SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
             pg_get_expr(d.adbin, d.adrelid), l.collname
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
      LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
      LEFT JOIN pg_collation l ON l.oid = a.attcollation
      WHERE n.nspname = 'audience_sync' AND c.relkind = 'r'"""
    constraints = """
      SELECT c.conname, pg_get_constraintdef(c.oid) FROM pg_constraint c
      JOIN pg_namespace n ON n.oid = c.connamespace WHERE n.nspname = 'audience_sync'"""
    indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'audience_sync'"
    catalog = set()
    for query in (columns, constraints, indexes):
        catalog |= {
            tuple(row) for row in dialects.sql(connection, query) if migrate.VERSION_TABLE not in row[0]
        }
    return catalog
