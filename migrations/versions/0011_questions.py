"""Indexes for questions about statuses, calls of a user and past members, and for pruning past members."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_calls_anonymous_id": ("calls", ["anonymous_id"], "anonymous_id IS NOT NULL"),
    "ix_calls_ignored": ("calls", ["call_id"], "status = 'ignored'"),
    "ix_calls_user_id": ("calls", ["user_id"], "user_id IS NOT NULL"),
    "ix_deliveries_status": ("deliveries", ["status", "delivery_id"], None),
    "ix_past_members_entered_run_id": ("past_members", ["entered_run_id"], None),
    "ix_past_members_exited_run_id": ("past_members", ["exited_run_id", "definition_id", "user_id"], None),
}


def upgrade() -> None:
    for name, (table, columns, condition) in INDEXES.items():
        where = None if condition is None else sa.text(condition)
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name, (table, _, _) in INDEXES.items():
        op.drop_index(name, table)
