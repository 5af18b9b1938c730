"""The index by run leaves out the deliveries of calls, which belong to no run."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

NAME, COLUMNS = "ix_deliveries_run_id", ["run_id", "status"]


def upgrade() -> None:
    computed = sa.text("run_id IS NOT NULL")
    op.drop_index(NAME, "deliveries")
    op.create_index(NAME, "deliveries", COLUMNS, sqlite_where=computed, postgresql_where=computed)


def downgrade() -> None:
    op.drop_index(NAME, "deliveries")
    op.create_index(NAME, "deliveries", COLUMNS)
