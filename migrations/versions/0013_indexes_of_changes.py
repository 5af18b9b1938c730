"""Indexes that list who entered, exited or changed in a run, and the runs that did not succeed."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

OF_CHANGES = ["entered_run_id", "definition_id", "user_id"]


def upgrade() -> None:
    op.drop_index("ix_past_members_entered_run_id", "past_members")
    op.create_index("ix_past_members_entered_run_id", "past_members", OF_CHANGES)
    op.create_index("ix_members_entered_run_id", "members", OF_CHANGES)
    others = sa.text("status <> 'succeeded'")
    op.create_index(
        "ix_runs_unsuccessful", "runs", ["status", "run_id"], sqlite_where=others, postgresql_where=others
    )


def downgrade() -> None:
    op.drop_index("ix_runs_unsuccessful", "runs")
    op.drop_index("ix_members_entered_run_id", "members")
    op.drop_index("ix_past_members_entered_run_id", "past_members")
    op.create_index("ix_past_members_entered_run_id", "past_members", ["entered_run_id"])
