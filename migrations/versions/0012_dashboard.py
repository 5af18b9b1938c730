"""Sessions of the dashboard's users, and the record of their actions."""

import sqlalchemy as sa
from alembic import op

from audience_sync.errors import DatabaseError

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(26).with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    _refuse_foreign("sessions", "actions")
    op.create_table(
        "sessions",
        sa.Column("token_hash", sa.Text(), nullable=False),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("credential", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("last_seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("token_hash", name="pk_sessions"),
    )
    op.create_table(
        "actions",
        sa.Column("action_id", SERIAL, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("result", sa.Text()),
        sa.Column("ended_at", TIME),
        sa.CheckConstraint("status IN ('running', 'done', 'refused', 'failed')", name="status"),
        sa.CheckConstraint("(status = 'running') = (ended_at IS NULL)", name="ended"),
        sa.PrimaryKeyConstraint("action_id", name="pk_actions"),
        sqlite_autoincrement=True,
    )


def _refuse_foreign(*names: str) -> None:
    """Stop where a table of somebody else, in the same SQLite file, has one of our new names."""
    for name in names:
        if sa.inspect(op.get_bind()).has_table(name):
            raise DatabaseError(
                f"The database has a table {name} that audience-sync did not make, and needs this name for a table of "
                "its own: rename yours, or move it to another file and name that under [sources]. Nothing was changed."
            )


def downgrade() -> None:
    op.drop_table("actions")
    op.drop_table("sessions")
