"""Definitions, runs, members, calls, deliveries, requests, and what calls say about users, companies and events."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
USER_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
TIME = sa.String(26).with_variant(sa.DateTime(timezone=True), "postgresql")
DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

SNAPSHOTS = """
CREATE VIEW snapshots AS
SELECT r.run_id, d.key, r.as_of, r.member_count AS size, r.entered_count AS entered, r.exited_count AS exited,
       r.changed_count AS changed,
       (SELECT count(*) FROM deliveries q WHERE q.run_id = r.run_id AND q.status = 'accepted') AS accepted,
       (SELECT count(*) FROM deliveries q
        WHERE q.run_id = r.run_id AND q.status IN ('held', 'pending', 'sending')) AS pending,
       (SELECT count(*) FROM deliveries q WHERE q.run_id = r.run_id AND q.status = 'dead') AS dead
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

USER_DELIVERIES = """
CREATE VIEW user_deliveries AS
SELECT q.subject_id AS user_id, q.delivery_id, q.action, q.body, q.status, q.run_id, q.call_id, q.created_at,
       h.started_at AS sent_at, q.settled_at, h.status_code, h.x_request_id, q.error
FROM deliveries q LEFT JOIN requests h ON h.request_id = q.request_id
WHERE q.action <> 'company'
"""


def upgrade() -> None:
    op.create_table(
        "calls",
        sa.Column("call_id", SERIAL, nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("user_id", USER_ID, nullable=True),
        sa.Column("anonymous_id", sa.Text(), nullable=True),
        sa.Column("group_id", sa.Text(), nullable=True),
        sa.Column("event", sa.Text(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("timestamp", TIME, nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("left_out", sa.JSON(), nullable=True),
        sa.CheckConstraint("(status = 'ignored') = (reason IS NOT NULL)", name=op.f("ck_calls_reason")),
        sa.CheckConstraint("status IN ('accepted', 'ignored')", name=op.f("ck_calls_status")),
        sa.PrimaryKeyConstraint("call_id", name="pk_calls"),
        sa.UniqueConstraint("message_id", name="uq_calls_message_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "companies",
        sa.Column("company_id", USER_ID, nullable=False),
        sa.Column("traits", DOCUMENT, nullable=False),
        sa.Column("trait_times", DOCUMENT, nullable=False),
        sa.Column("first_seen_at", TIME, nullable=False),
        sa.Column("last_seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("company_id", name="pk_companies"),
    )
    op.create_table(
        "definitions",
        sa.Column("definition_id", SERIAL, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("retired_at", TIME, nullable=True),
        sa.CheckConstraint("kind IN ('audience', 'trait')", name=op.f("ck_definitions_kind")),
        sa.PrimaryKeyConstraint("definition_id", name="pk_definitions"),
        sa.UniqueConstraint("key", name="uq_definitions_key"),
    )
    op.create_table(
        "deliveries",
        sa.Column("delivery_id", SERIAL, nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject_id", USER_ID, nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("run_id", SERIAL, nullable=True),
        sa.Column("definition_id", SERIAL, nullable=True),
        sa.Column("call_id", SERIAL, nullable=True),
        sa.Column("value_at", TIME, nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("alone", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("attempt_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("first_attempt_at", TIME, nullable=True),
        sa.Column("next_attempt_at", TIME, nullable=False),
        sa.Column("quiet_until", TIME, nullable=True),
        sa.Column("settled_at", TIME, nullable=True),
        sa.Column("request_id", SERIAL, nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(status IN ('accepted', 'dead', 'cancelled')) = (settled_at IS NOT NULL)",
            name=op.f("ck_deliveries_settled"),
        ),
        sa.CheckConstraint("action IN ('identify', 'track', 'company')", name=op.f("ck_deliveries_action")),
        sa.CheckConstraint("class IN ('call', 'change', 'push')", name=op.f("ck_deliveries_class")),
        sa.CheckConstraint("status <> 'dead' OR error IS NOT NULL", name=op.f("ck_deliveries_reason")),
        sa.CheckConstraint(
            "status IN ('held', 'pending', 'sending', 'accepted', 'dead', 'cancelled')",
            name=op.f("ck_deliveries_status"),
        ),
        sa.CheckConstraint(
            "status NOT IN ('sending', 'accepted') OR request_id IS NOT NULL",
            name=op.f("ck_deliveries_requested"),
        ),
        sa.CheckConstraint("(run_id IS NULL) <> (call_id IS NULL)", name=op.f("ck_deliveries_origin")),
        sa.CheckConstraint(
            "(run_id IS NULL) = (definition_id IS NULL)", name=op.f("ck_deliveries_definition")
        ),
        sa.PrimaryKeyConstraint("delivery_id", name="pk_deliveries"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_deliveries_claim",
        "deliveries",
        ["action", "class", "next_attempt_at", "delivery_id"],
        unique=False,
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "ix_deliveries_unsettled",
        "deliveries",
        ["subject_id", "action", "delivery_id"],
        unique=False,
        sqlite_where=sa.text("status IN ('pending', 'sending')"),
        postgresql_where=sa.text("status IN ('pending', 'sending')"),
    )
    op.create_index(
        "ix_deliveries_call_id",
        "deliveries",
        ["call_id"],
        unique=False,
        sqlite_where=sa.text("call_id IS NOT NULL"),
        postgresql_where=sa.text("call_id IS NOT NULL"),
    )
    op.create_index(
        "ix_deliveries_dead",
        "deliveries",
        ["definition_id"],
        unique=False,
        sqlite_where=sa.text("status = 'dead'"),
        postgresql_where=sa.text("status = 'dead'"),
    )
    op.create_index("ix_deliveries_run_id", "deliveries", ["run_id", "status"], unique=False)
    op.create_index(
        "ix_deliveries_sending",
        "deliveries",
        ["request_id"],
        unique=False,
        sqlite_where=sa.text("status = 'sending'"),
        postgresql_where=sa.text("status = 'sending'"),
    )
    op.create_index("ix_deliveries_subject_id", "deliveries", ["subject_id", "delivery_id"], unique=False)
    op.create_table(
        "destination",
        sa.Column("destination_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stopped_at", TIME, nullable=True),
        sa.Column("stopped_reason", sa.Text(), nullable=True),
        sa.Column("slow_downs", sa.JSON(), nullable=False),
        sa.Column("heartbeat_at", TIME, nullable=True),
        sa.CheckConstraint(
            "(stopped_at IS NULL) = (stopped_reason IS NULL)", name=op.f("ck_destination_stopped")
        ),
        sa.CheckConstraint("destination_id = 1", name=op.f("ck_destination_one_row")),
        sa.PrimaryKeyConstraint("destination_id", name="pk_destination"),
    )
    op.create_table(
        "events",
        sa.Column("event_id", SERIAL, nullable=False),
        sa.Column("call_id", SERIAL, nullable=False),
        sa.Column("user_id", USER_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("properties", DOCUMENT, nullable=False),
        sa.Column("context", DOCUMENT, nullable=False),
        sa.Column("timestamp", TIME, nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_events"),
        sa.UniqueConstraint("call_id", name="uq_events_call_id"),
    )
    op.create_index("ix_events_name_timestamp", "events", ["name", "timestamp"], unique=False)
    op.create_index("ix_events_user_id_timestamp", "events", ["user_id", "timestamp"], unique=False)
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", TIME, nullable=True),
        sa.CheckConstraint("(owner IS NULL) = (expires_at IS NULL)", name=op.f("ck_leases_held")),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "members",
        sa.Column("definition_id", SERIAL, autoincrement=False, nullable=False),
        sa.Column("user_id", USER_ID, nullable=False),
        sa.Column("entered_run_id", SERIAL, nullable=False),
        sa.Column("value", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("definition_id", "user_id", name="pk_members"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "past_members",
        sa.Column("definition_id", SERIAL, autoincrement=False, nullable=False),
        sa.Column("user_id", USER_ID, nullable=False),
        sa.Column("entered_run_id", SERIAL, autoincrement=False, nullable=False),
        sa.Column("exited_run_id", SERIAL, nullable=False),
        sa.Column("value", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("definition_id", "user_id", "entered_run_id", name="pk_past_members"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "profiles",
        sa.Column("user_id", USER_ID, nullable=False),
        sa.Column("traits", DOCUMENT, nullable=False),
        sa.Column("trait_times", DOCUMENT, nullable=False),
        sa.Column("company_id", sa.Text(), nullable=True),
        sa.Column("company_at", TIME, nullable=True),
        sa.Column("first_seen_at", TIME, nullable=False),
        sa.Column("last_seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_profiles"),
    )
    op.create_table(
        "requests",
        sa.Column("request_id", SERIAL, nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, nullable=True),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("x_request_id", sa.Text(), nullable=True),
        sa.Column("delivery_count", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint("lane IN ('identify', 'track', 'company', 'bulk')", name=op.f("ck_requests_lane")),
        sa.PrimaryKeyConstraint("request_id", name="pk_requests"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_requests_lane_started_at", "requests", ["lane", "started_at"], unique=False)
    op.create_table(
        "runs",
        sa.Column("run_id", SERIAL, nullable=False),
        sa.Column("definition_id", SERIAL, nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("held_by", sa.Text(), nullable=True),
        sa.Column("as_of", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("member_count", sa.BigInteger(), nullable=True),
        sa.Column("entered_count", sa.BigInteger(), nullable=True),
        sa.Column("exited_count", sa.BigInteger(), nullable=True),
        sa.Column("changed_count", sa.BigInteger(), nullable=True),
        sa.Column("set_aside", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
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
        sqlite_autoincrement=True,
    )
    op.create_index("ix_runs_definition_id", "runs", ["definition_id", "run_id"], unique=False)
    op.create_index(
        "uq_runs_running",
        "runs",
        ["definition_id"],
        unique=True,
        sqlite_where=sa.text("status = 'running'"),
        postgresql_where=sa.text("status = 'running'"),
    )
    for view in (SNAPSHOTS, MEMBERSHIP_HISTORY, USER_DELIVERIES):
        op.execute(view)


def downgrade() -> None:
    for view in ("user_deliveries", "membership_history", "snapshots"):
        op.execute(f"DROP VIEW {view}")
    for table in (
        "runs",
        "requests",
        "profiles",
        "past_members",
        "members",
        "leases",
        "events",
        "destination",
        "deliveries",
        "companies",
        "calls",
        "definitions",
    ):
        op.drop_table(table)
