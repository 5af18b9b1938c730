"""Indexes that give the deliveries of a run or request, and the calls of a user, newest first."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

INDEXES = {  # table, condition, columns before and after
    "ix_calls_user_id": ("calls", "user_id IS NOT NULL", ["user_id"], ["user_id", "call_id"]),
    "ix_deliveries_run_id": (
        "deliveries",
        "run_id IS NOT NULL",
        ["run_id", "status"],
        ["run_id", "status", "delivery_id"],
    ),
    "ix_deliveries_request_id": (
        "deliveries",
        "request_id IS NOT NULL",
        None,
        ["request_id", "delivery_id"],
    ),
}


def upgrade() -> None:
    for name, (table, condition, before, after) in INDEXES.items():
        _replace(name, table, condition, before, after)


def downgrade() -> None:
    for name, (table, condition, before, after) in INDEXES.items():
        _replace(name, table, condition, after, before)


def _replace(name: str, table: str, condition: str, old: list[str] | None, new: list[str] | None) -> None:
    where = sa.text(condition)
    if old is not None:
        op.drop_index(name, table)
    if new is not None:
        op.create_index(name, table, new, sqlite_where=where, postgresql_where=where)
