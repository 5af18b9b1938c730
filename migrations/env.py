"""Run by db/migrate.py, which passes the connection; the migration runs in its transaction."""

from alembic import context

from audience_sync.db.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table="audience_sync_version",
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
