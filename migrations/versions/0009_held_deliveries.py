"""The run whose held deliveries a newer held run took over."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "runs", sa.Column("deliveries_run_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"))
    )


def downgrade() -> None:
    op.execute(  # the older version looks for them under the id of the held run
        "UPDATE deliveries SET run_id = (SELECT r.run_id FROM runs r WHERE r.status = 'held' "
        "AND r.deliveries_run_id = deliveries.run_id) WHERE status = 'held' "
        "AND run_id IN (SELECT deliveries_run_id FROM runs WHERE status = 'held')"
    )
    op.drop_column("runs", "deliveries_run_id")
