"""Held runs, schedule slots, erased users, and the counts of pruned deliveries."""

import sqlalchemy as sa
from alembic import op

from audience_sync.db.alter import alter_table

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(26).with_variant(sa.DateTime(timezone=True), "postgresql")

HELD = sa.text("status = 'held'")
COUNTS = ("accepted_count", "dead_count", "cancelled_count")


def snapshots(kept: str) -> str:
    """The view's statement; `kept` is added to each count of deliveries: the run's count of pruned ones."""

    def count(name: str, statuses: str, memory: str) -> str:
        where = f"q.run_id = r.run_id AND q.status IN ({statuses})"
        return f"(SELECT count(*) FROM deliveries q WHERE {where}){memory} AS {name}"

    return f"""
CREATE VIEW snapshots AS
SELECT r.run_id, d.key, r.as_of, r.member_count AS size, r.entered_count AS entered, r.exited_count AS exited,
       r.changed_count AS changed,
       {count("accepted", "'accepted'", kept.format("accepted"))},
       {count("pending", "'held', 'pending', 'sending'", "")},
       {count("dead", "'dead'", kept.format("dead"))}
FROM runs r JOIN definitions d ON d.definition_id = r.definition_id
WHERE r.status = 'succeeded'
"""


MEMBERSHIP_HISTORY = """
CREATE VIEW membership_history AS
SELECT m.user_id, d.key, coalesce(m.value, 'true') AS value, r.as_of AS "from", NULL AS "to"
FROM members m
JOIN definitions d ON d.definition_id = m.definition_id
JOIN runs r ON r.run_id = m.entered_run_id
UNION ALL
SELECT p.user_id, d.key, coalesce(p.value, 'true'), r.as_of, x.as_of
FROM past_members p
JOIN definitions d ON d.definition_id = p.definition_id
JOIN runs r ON r.run_id = p.entered_run_id
JOIN runs x ON x.run_id = p.exited_run_id
"""


def upgrade() -> None:
    _drop_views()
    op.create_table(
        "schedule_slots",
        sa.Column("definition_id", SERIAL, autoincrement=False, nullable=False),
        sa.Column("slot_at", TIME, nullable=False),
        sa.Column("taken_at", TIME, nullable=False),
        sa.Column("run_id", SERIAL, nullable=True),
        sa.ForeignKeyConstraint(
            ["definition_id"], ["definitions.definition_id"], name="fk_schedule_slots_definition_id"
        ),
        sa.PrimaryKeyConstraint("definition_id", "slot_at", name="pk_schedule_slots"),
    )
    op.create_table(
        "forgotten",
        sa.Column("user_hash", sa.Text(), nullable=False),
        sa.Column("forgotten_at", TIME, nullable=False),
        sa.Column("returns_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("user_hash", name="pk_forgotten"),
    )
    op.add_column(
        "definitions", sa.Column("forgotten_count", sa.BigInteger(), server_default="0", nullable=False)
    )
    with alter_table(_runs()) as runs:
        runs.add_column(sa.Column("baseline_run_id", SERIAL, nullable=True))
        for name in COUNTS:
            runs.add_column(sa.Column(name, sa.BigInteger(), server_default="0", nullable=False))
        runs.create_check_constraint(op.f("ck_runs_held_by"), "held_by IN ('hold', 'guard', 'fingerprint')")
        runs.create_check_constraint(op.f("ck_runs_held"), "status <> 'held' OR held_by IS NOT NULL")
    op.create_index(
        "uq_runs_held", "runs", ["definition_id"], unique=True, sqlite_where=HELD, postgresql_where=HELD
    )
    op.create_index("ix_deliveries_held", "deliveries", ["run_id"], sqlite_where=HELD, postgresql_where=HELD)
    op.execute(snapshots(" + r.{}_count"))
    op.execute(MEMBERSHIP_HISTORY)


def downgrade() -> None:
    _drop_views()
    op.drop_index("ix_deliveries_held", "deliveries")
    op.drop_index("uq_runs_held", "runs")
    later = (
        sa.Column("baseline_run_id", SERIAL),
        *(sa.Column(name, sa.BigInteger(), server_default="0", nullable=False) for name in COUNTS),
        sa.CheckConstraint("held_by IN ('hold', 'guard', 'fingerprint')", name=op.f("ck_runs_held_by")),
        sa.CheckConstraint("status <> 'held' OR held_by IS NOT NULL", name=op.f("ck_runs_held")),
    )
    with alter_table(_runs(*later)) as runs:
        for name in ("held_by", "held"):
            runs.drop_constraint(op.f(f"ck_runs_{name}"), type_="check")
        for name in ("baseline_run_id", *COUNTS):
            runs.drop_column(name)
    with alter_table(_definitions()) as definitions:
        definitions.drop_column("forgotten_count")
    op.drop_table("forgotten")
    op.drop_table("schedule_slots")
    op.execute(snapshots(""))
    op.execute(MEMBERSHIP_HISTORY)


def _drop_views() -> None:
    """Drop the views of the tables that are rebuilt."""
    for view in ("membership_history", "snapshots"):
        op.execute(f"DROP VIEW {view}")


def _runs(*later: sa.schema.SchemaItem) -> sa.Table:
    """The table `runs`; `later` are the columns and constraints after the first migration."""
    return sa.Table(
        "runs",
        sa.MetaData(),
        sa.Column("run_id", SERIAL, nullable=False),
        sa.Column("definition_id", SERIAL, nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("mode", "trigger", "status")),
        sa.Column("held_by", sa.Text()),
        sa.Column("as_of", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("finished_at", TIME),
        *(sa.Column(f"{name}_count", sa.BigInteger()) for name in ("member", "entered", "exited", "changed")),
        sa.Column("set_aside", sa.JSON()),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint("(status = 'running') = (finished_at IS NULL)", name=op.f("ck_runs_finished")),
        sa.CheckConstraint(
            "mode IN ('first', 'changes', 'full', 'canary', 'retire')", name=op.f("ck_runs_mode")
        ),
        sa.CheckConstraint("status <> 'succeeded' OR member_count IS NOT NULL", name=op.f("ck_runs_counted")),
        sa.CheckConstraint(
            "status IN ('running', 'held', 'rejected', 'succeeded', 'failed', 'abandoned')",
            name=op.f("ck_runs_status"),
        ),
        sa.CheckConstraint("\"trigger\" IN ('schedule', 'manual')", name=op.f("ck_runs_trigger")),
        sa.ForeignKeyConstraint(
            ["definition_id"], ["definitions.definition_id"], name="fk_runs_definition_id"
        ),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        *later,
        sqlite_autoincrement=True,
    )


def _definitions() -> sa.Table:
    return sa.Table(
        "definitions",
        sa.MetaData(),
        sa.Column("definition_id", SERIAL, nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("key", "name", "kind")),
        sa.Column("fingerprint", sa.Text()),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("retired_at", TIME),
        sa.Column("forgotten_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("kind IN ('audience', 'trait')", name=op.f("ck_definitions_kind")),
        sa.PrimaryKeyConstraint("definition_id", name="pk_definitions"),
        sa.UniqueConstraint("key", name="uq_definitions_key"),
    )
