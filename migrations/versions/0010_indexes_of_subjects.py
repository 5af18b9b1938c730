"""Indexes that answer the queue's questions about a user or company, however many deliveries it has."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_deliveries_attempted": (
        ["subject_id", "action", "status", "quiet_until"],
        "status IN ('pending', 'sending') AND attempt_count > 0",
    ),
    "ix_deliveries_isolated": (
        ["subject_id", "action", "value_at", "delivery_id"],
        "status = 'pending' AND alone",
    ),
    "ix_deliveries_accepted": (["subject_id", "action", "value_at", "delivery_id"], "status = 'accepted'"),
}


def upgrade() -> None:
    for name, (columns, condition) in INDEXES.items():
        where = sa.text(condition)
        op.create_index(name, "deliveries", columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "deliveries")
