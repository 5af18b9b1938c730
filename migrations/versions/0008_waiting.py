"""Indexes of what is held or dead, by definition and by user; the destinations that are one environment."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

HELD = sa.text("status = 'held'")
WAITING = sa.text("status IN ('held', 'dead')")


def upgrade() -> None:
    op.add_column("destination", sa.Column("environments", sa.JSON()))
    op.drop_index("ix_deliveries_held", "deliveries")
    _create_index("ix_deliveries_held", ["definition_id"], HELD)
    _create_index("ix_deliveries_waiting", ["subject_id", "action", "value_at", "delivery_id"], WAITING)


def downgrade() -> None:
    op.drop_index("ix_deliveries_waiting", "deliveries")
    op.drop_index("ix_deliveries_held", "deliveries")
    _create_index("ix_deliveries_held", ["run_id"], HELD)
    op.drop_column("destination", "environments")


def _create_index(name: str, columns: list[str], where: sa.TextClause) -> None:
    op.create_index(name, "deliveries", columns, sqlite_where=where, postgresql_where=where)
