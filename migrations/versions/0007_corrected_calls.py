"""What was corrected in a call; the properties that flattened traits had at Userpilot."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

ADDED = (("calls", "corrected"), ("profiles", "sent_names"), ("companies", "sent_names"))


def upgrade() -> None:
    for table, column in ADDED:
        op.add_column(table, sa.Column(column, sa.JSON()))


def downgrade() -> None:
    for table, column in ADDED:
        op.drop_column(table, column)
