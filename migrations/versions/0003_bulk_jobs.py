"""Bulk jobs: uploads of many users, whose rows Userpilot processes over minutes."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(26).with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "bulk_jobs",
        sa.Column("request_id", SERIAL, autoincrement=False, nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text()),
        sa.Column("fingerprint", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("state", sa.Text()),
        sa.Column("row_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("completed_count", sa.Integer()),
        sa.Column("created_at", TIME, nullable=False),
        *(sa.Column(name, TIME) for name in ("submitted_at", "ended_at", "settled_at")),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint(
            "status IN ('gathering', 'uploading', 'running', 'completed', 'failed', 'dropped', 'lost')",
            name=op.f("ck_bulk_jobs_status"),
        ),
        sa.CheckConstraint("status <> 'running' OR job_id IS NOT NULL", name=op.f("ck_bulk_jobs_running")),
        sa.CheckConstraint(
            "(status IN ('completed', 'failed', 'dropped', 'lost')) = (ended_at IS NOT NULL)",
            name=op.f("ck_bulk_jobs_ended"),
        ),
        sa.PrimaryKeyConstraint("request_id", name="pk_bulk_jobs"),
    )


def downgrade() -> None:
    """Deliveries of a running job are sent again: the previous version treats its upload as an interrupted request."""
    op.drop_table("bulk_jobs")
