"""Run by store/migrate.py, which hands in the connection; its transaction is the migration's."""

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
