"""Indexes of events that hold what most queries ask: a window then reads no events, only the index."""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_events_name_timestamp": "user_id",
    "ix_events_user_id_timestamp": "name",
}  # with its new last column


def upgrade() -> None:
    _replace(with_last=True)


def downgrade() -> None:
    _replace(with_last=False)


def _replace(*, with_last: bool) -> None:
    for name, last in INDEXES.items():
        first = "name" if last == "user_id" else "user_id"
        op.drop_index(name, "events")
        op.create_index(name, "events", [first, "timestamp", *([last] if with_last else [])])
