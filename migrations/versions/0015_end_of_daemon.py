"""The last heartbeat of a daemon that has stopped."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

TIME = sa.String(26).with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    op.add_column("destination", sa.Column("stopped_heartbeat_at", TIME))


def downgrade() -> None:
    op.drop_column("destination", "stopped_heartbeat_at")
