"""An accepted call may have a reason: one of its mappings failed, the others were sent."""

import sqlalchemy as sa
from alembic import op

from audience_sync.db.alter import alter_table

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(26).with_variant(sa.DateTime(timezone=True), "postgresql")
USER_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
BEFORE = "(status = 'ignored') = (reason IS NOT NULL)"
AFTER = "status <> 'ignored' OR reason IS NOT NULL"


def upgrade() -> None:
    _replace(BEFORE, AFTER)


def downgrade() -> None:
    """Delete the reasons of accepted calls: the previous version allows none."""
    op.execute("UPDATE calls SET reason = NULL WHERE status = 'accepted'")
    _replace(AFTER, BEFORE)


def _replace(present: str, future: str) -> None:
    name = op.f("ck_calls_reason")
    table = sa.Table(
        "calls",
        sa.MetaData(),
        sa.Column("call_id", SERIAL, nullable=False),
        *(sa.Column(each, sa.Text(), nullable=False) for each in ("message_id", "type")),
        sa.Column("user_id", USER_ID),
        *(sa.Column(each, sa.Text()) for each in ("anonymous_id", "group_id", "event")),
        sa.Column("body", sa.JSON(), nullable=False),
        *(sa.Column(each, TIME, nullable=False) for each in ("timestamp", "received_at")),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("left_out", sa.JSON()),
        sa.CheckConstraint(present, name=name),
        sa.CheckConstraint("status IN ('accepted', 'ignored')", name=op.f("ck_calls_status")),
        sa.PrimaryKeyConstraint("call_id", name="pk_calls"),
        sa.UniqueConstraint("message_id", name="uq_calls_message_id"),
        sqlite_autoincrement=True,
    )
    with alter_table(table) as calls:
        calls.drop_constraint(name, type_="check")
        calls.create_check_constraint(name, future)
