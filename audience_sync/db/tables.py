"""Our tables, as the newest migration leaves them.

The large ones (members, past_members, deliveries) have no foreign keys: PostgreSQL would call a trigger for each row.
They need none, because their rows are written in the transaction of the run or call that they belong to.
"""

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql


class UtcDateTime(sa.TypeDecorator[dt.datetime]):
    """Aware UTC in Python; timestamptz on PostgreSQL, sortable text on SQLite."""

    impl = sa.String(26)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.DateTime(timezone=True))
        return dialect.type_descriptor(sa.String(26))

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        return value.astimezone(dt.UTC) if dialect.name == "postgresql" else self.text(value)

    @staticmethod
    def text(value: dt.datetime) -> str:
        """UTC, as text that sorts by time."""
        return value.astimezone(dt.UTC).isoformat(" ", "microseconds")[:26]

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if dialect.name == "postgresql":
            return value.astimezone(dt.UTC)  # type: ignore[no-any-return]  # the driver gives a datetime
        return dt.datetime.fromisoformat(value).replace(tzinfo=dt.UTC)


# Ids are compared byte by byte on both databases, in any locale.
UserId = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Document = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")  # definitions read values in these
Json = sa.JSON(none_as_null=True)  # stored as it was written

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

definitions = sa.Table(
    "definitions",
    metadata,
    sa.Column("definition_id", Serial, primary_key=True),
    sa.Column("key", sa.Text, nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("retired_at", UtcDateTime),
    sa.Column("forgotten_count", sa.BigInteger, nullable=False, server_default="0"),  # exits of the next run
    sa.CheckConstraint("kind IN ('audience', 'trait')", name="kind"),
)


PENDING = sa.text("status = 'pending'")
DEAD = sa.text("status = 'dead'")
SENDING = sa.text("status = 'sending'")
HELD = sa.text("status = 'held'")
WAITING = sa.text("status IN ('held', 'dead')")  # until a person or a later run decides
MAY_HAVE_BEEN_SENT = sa.text("(attempt_count > 0 OR status IN ('sending', 'accepted', 'dead'))")
IGNORED = sa.text("status = 'ignored'")
UNSETTLED = sa.text("status IN ('pending', 'sending')")
ATTEMPTED = sa.text("status IN ('pending', 'sending') AND attempt_count > 0")
ISOLATED = sa.text("status = 'pending' AND alone")
ACCEPTED = sa.text("status = 'accepted'")
UNSUCCESSFUL = sa.text("status <> 'succeeded'")


def _partial_index(name: str, where: sa.TextClause, *columns: str, unique: bool = False) -> sa.Index:
    return sa.Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", Serial, primary_key=True),
    sa.Column("definition_id", Serial, sa.ForeignKey("definitions.definition_id"), nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("trigger", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("held_by", sa.Text),
    sa.Column("as_of", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("member_count", sa.BigInteger),
    sa.Column("entered_count", sa.BigInteger),
    sa.Column("exited_count", sa.BigInteger),
    sa.Column("changed_count", sa.BigInteger),
    sa.Column("set_aside", Json),  # {reason: count}
    sa.Column("error", sa.Text),
    sa.Column("baseline_run_id", Serial),  # the committed run that this one was compared with
    sa.Column(
        "deliveries_run_id", Serial
    ),  # while it is held: the replaced run whose held deliveries it took over
    # Counts of this run's deliveries that were deleted; exits of erased users, which have none, count as cancelled.
    sa.Column("accepted_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("dead_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("cancelled_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.CheckConstraint("mode IN ('first', 'changes', 'full', 'canary', 'retire')", name="mode"),
    sa.CheckConstraint("\"trigger\" IN ('schedule', 'manual')", name="trigger"),
    sa.CheckConstraint(
        "status IN ('running', 'held', 'rejected', 'succeeded', 'failed', 'abandoned')", name="status"
    ),
    sa.CheckConstraint("(status = 'running') = (finished_at IS NULL)", name="finished"),
    sa.CheckConstraint("status <> 'succeeded' OR member_count IS NOT NULL", name="counted"),
    sa.CheckConstraint("held_by IN ('hold', 'guard', 'fingerprint')", name="held_by"),
    sa.CheckConstraint("status <> 'held' OR held_by IS NOT NULL", name="held"),
    _partial_index("uq_runs_running", sa.text("status = 'running'"), "definition_id", unique=True),
    _partial_index("uq_runs_held", HELD, "definition_id", unique=True),
    sa.Index("ix_runs_definition_id", "definition_id", "run_id"),
    _partial_index("ix_runs_unsuccessful", UNSUCCESSFUL, "status", "run_id"),
    sqlite_autoincrement=True,
)

members = sa.Table(
    "members",
    metadata,
    sa.Column("definition_id", Serial, primary_key=True, autoincrement=False),
    sa.Column("user_id", UserId, primary_key=True),
    sa.Column("entered_run_id", Serial, nullable=False),
    sa.Column("value", sa.Text),  # a trait's, as JSON text
    sa.Index("ix_members_entered_run_id", "entered_run_id", "definition_id", "user_id"),
    sqlite_with_rowid=False,
)

past_members = sa.Table(
    "past_members",
    metadata,
    sa.Column("definition_id", Serial, primary_key=True, autoincrement=False),
    sa.Column("user_id", UserId, primary_key=True),
    sa.Column("entered_run_id", Serial, primary_key=True, autoincrement=False),
    sa.Column("exited_run_id", Serial, nullable=False),
    sa.Column("value", sa.Text),
    sa.Index("ix_past_members_exited_run_id", "exited_run_id", "definition_id", "user_id"),
    sa.Index("ix_past_members_entered_run_id", "entered_run_id", "definition_id", "user_id"),
    sqlite_with_rowid=False,
)

calls = sa.Table(
    "calls",
    metadata,
    sa.Column("call_id", Serial, primary_key=True),
    sa.Column("message_id", sa.Text, nullable=False, unique=True),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("user_id", UserId),
    sa.Column("anonymous_id", sa.Text),
    sa.Column("group_id", sa.Text),
    sa.Column("event", sa.Text),
    sa.Column("body", Json, nullable=False),  # traits or properties, and context
    sa.Column("timestamp", UtcDateTime, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column(
        "left_out", Json
    ),  # traits that are not sent: those with a definition's key, or beyond the limits
    sa.Column("corrected", Json),  # a list of texts, one for each correction
    sa.CheckConstraint("status IN ('accepted', 'ignored')", name="status"),
    sa.CheckConstraint("status <> 'ignored' OR reason IS NOT NULL", name="reason"),
    _partial_index("ix_calls_ignored", IGNORED, "call_id"),
    _partial_index("ix_calls_user_id", sa.text("user_id IS NOT NULL"), "user_id", "call_id"),
    _partial_index("ix_calls_anonymous_id", sa.text("anonymous_id IS NOT NULL"), "anonymous_id"),
    sqlite_autoincrement=True,
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("delivery_id", Serial, primary_key=True),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject_id", UserId, nullable=False),  # a company's id where the action is company
    sa.Column("body", Json, nullable=False),
    sa.Column("class", sa.Text, nullable=False),
    sa.Column("run_id", Serial),
    sa.Column("definition_id", Serial),
    sa.Column("call_id", Serial),
    sa.Column("value_at", UtcDateTime, nullable=False),  # newest wins: a call's timestamp, a run's as_of
    sa.Column("fingerprint", sa.Text),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("alone", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("attempt_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("first_attempt_at", UtcDateTime),
    sa.Column("next_attempt_at", UtcDateTime, nullable=False),
    sa.Column("quiet_until", UtcDateTime),  # the subject waits until then, after an unknown outcome
    sa.Column("settled_at", UtcDateTime),
    sa.Column("request_id", Serial),  # the last request that carried it
    sa.Column("error", sa.Text),
    sa.CheckConstraint("action IN ('identify', 'track', 'company')", name="action"),
    sa.CheckConstraint("class IN ('call', 'change', 'push')", name="class"),
    sa.CheckConstraint(
        "status IN ('held', 'pending', 'sending', 'accepted', 'dead', 'cancelled')", name="status"
    ),
    sa.CheckConstraint("(run_id IS NULL) <> (call_id IS NULL)", name="origin"),
    sa.CheckConstraint("(run_id IS NULL) = (definition_id IS NULL)", name="definition"),
    sa.CheckConstraint(
        "(status IN ('accepted', 'dead', 'cancelled')) = (settled_at IS NOT NULL)", name="settled"
    ),
    sa.CheckConstraint("status NOT IN ('sending', 'accepted') OR request_id IS NOT NULL", name="requested"),
    sa.CheckConstraint("status <> 'dead' OR error IS NOT NULL", name="reason"),
    _partial_index("ix_deliveries_claim", PENDING, "action", "class", "next_attempt_at", "delivery_id"),
    _partial_index("ix_deliveries_sending", SENDING, "request_id"),
    _partial_index("ix_deliveries_unsettled", UNSETTLED, "subject_id", "action", "delivery_id"),
    _partial_index("ix_deliveries_attempted", ATTEMPTED, "subject_id", "action", "status", "quiet_until"),
    _partial_index("ix_deliveries_isolated", ISOLATED, "subject_id", "action", "value_at", "delivery_id"),
    _partial_index("ix_deliveries_accepted", ACCEPTED, "subject_id", "action", "value_at", "delivery_id"),
    _partial_index("ix_deliveries_held", HELD, "definition_id"),
    _partial_index("ix_deliveries_waiting", WAITING, "subject_id", "action", "value_at", "delivery_id"),
    _partial_index("ix_deliveries_dead", DEAD, "definition_id"),
    _partial_index("ix_deliveries_call_id", sa.text("call_id IS NOT NULL"), "call_id"),
    sa.Index("ix_deliveries_subject_id", "subject_id", "delivery_id"),
    sa.Index("ix_deliveries_status", "status", "delivery_id"),
    _partial_index("ix_deliveries_run_id", sa.text("run_id IS NOT NULL"), "run_id", "status", "delivery_id"),
    _partial_index(
        "ix_deliveries_request_id", sa.text("request_id IS NOT NULL"), "request_id", "delivery_id"
    ),
    sqlite_autoincrement=True,
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("request_id", Serial, primary_key=True),
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime),
    sa.Column("status_code", sa.Integer),
    sa.Column("x_request_id", sa.Text),
    sa.Column("delivery_count", sa.Integer, nullable=False),
    sa.Column("error", sa.Text),
    sa.CheckConstraint("lane IN ('identify', 'track', 'company', 'bulk')", name="lane"),
    sa.Index("ix_requests_lane_started_at", "lane", "started_at"),
    sqlite_autoincrement=True,
)

bulk_jobs = sa.Table(
    "bulk_jobs",
    metadata,
    sa.Column("request_id", Serial, primary_key=True, autoincrement=False),  # the request of its upload
    sa.Column("filename", sa.Text, nullable=False),  # unique: identifies a job whose id was lost
    sa.Column("job_id", sa.Text),
    sa.Column("fingerprint", sa.Text),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("state", sa.Text),  # as Userpilot reports it
    sa.Column("row_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("completed_count", sa.Integer),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("submitted_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
    sa.Column("settled_at", UtcDateTime),  # when its last delivery was settled
    sa.Column("error", sa.Text),
    # gathering: its users are being chosen; uploading: sent, not answered yet; completed, failed: as Userpilot reported;
    # dropped: Userpilot never received it; lost: its outcome is unknown.
    sa.CheckConstraint(
        "status IN ('gathering', 'uploading', 'running', 'completed', 'failed', 'dropped', 'lost')",
        name="status",
    ),
    sa.CheckConstraint("status <> 'running' OR job_id IS NOT NULL", name="running"),
    sa.CheckConstraint(
        "(status IN ('completed', 'failed', 'dropped', 'lost')) = (ended_at IS NOT NULL)", name="ended"
    ),
)

profiles = sa.Table(
    "profiles",
    metadata,
    sa.Column("user_id", UserId, primary_key=True),
    sa.Column("traits", Document, nullable=False),
    sa.Column("trait_times", Document, nullable=False),  # {trait: the timestamp that set it}
    sa.Column("sent_names", Json),  # {property of an object or list: [trait, when it vanished]}
    sa.Column("company_id", sa.Text),
    sa.Column("company_at", UtcDateTime),
    sa.Column("first_seen_at", UtcDateTime, nullable=False),
    sa.Column("last_seen_at", UtcDateTime, nullable=False),
)

companies = sa.Table(
    "companies",
    metadata,
    sa.Column("company_id", UserId, primary_key=True),
    sa.Column("traits", Document, nullable=False),
    sa.Column("trait_times", Document, nullable=False),
    sa.Column("sent_names", Json),
    sa.Column("first_seen_at", UtcDateTime, nullable=False),
    sa.Column("last_seen_at", UtcDateTime, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("event_id", Serial, primary_key=True),
    sa.Column("call_id", Serial, nullable=False, unique=True),
    sa.Column("user_id", UserId, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("properties", Document, nullable=False),
    sa.Column("context", Document, nullable=False),
    sa.Column("timestamp", UtcDateTime, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
    # The last columns answer most queries from the index alone.
    sa.Index("ix_events_name_timestamp", "name", "timestamp", "user_id"),
    sa.Index("ix_events_user_id_timestamp", "user_id", "timestamp", "name"),
)

destination = sa.Table(
    "destination",
    metadata,
    sa.Column("destination_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("stopped_at", UtcDateTime),
    sa.Column("stopped_reason", sa.Text),
    sa.Column("slow_downs", Json, nullable=False),  # {lane: {since, factor, paused_until, reason}}
    sa.Column("heartbeat_at", UtcDateTime),
    sa.Column("environments", Json),  # lists of fingerprints: keys and addresses of the same environment
    sa.Column("stopped_heartbeat_at", UtcDateTime),  # the last heartbeat of a daemon that has stopped
    sa.CheckConstraint("destination_id = 1", name="one_row"),
    sa.CheckConstraint("(stopped_at IS NULL) = (stopped_reason IS NULL)", name="stopped"),
)

forgotten = sa.Table(
    "forgotten",
    metadata,
    sa.Column("user_hash", sa.Text, primary_key=True),  # SHA-256 of the user id, in hexadecimal
    sa.Column("forgotten_at", UtcDateTime, nullable=False),
    sa.Column("returns_at", UtcDateTime),  # from this time the user may be sent again
)

schedule_slots = sa.Table(
    "schedule_slots",
    metadata,
    sa.Column(
        "definition_id", Serial, sa.ForeignKey("definitions.definition_id"), primary_key=True,
        autoincrement=False,
    ),
    sa.Column("slot_at", UtcDateTime, primary_key=True),
    sa.Column("taken_at", UtcDateTime, nullable=False),
    sa.Column("run_id", Serial),
)  # fmt: skip

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text),  # null: free
    sa.Column("host", sa.Text),
    sa.Column("pid", sa.Integer),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.CheckConstraint("(owner IS NULL) = (expires_at IS NULL)", name="held"),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("token_hash", sa.Text, primary_key=True),  # SHA-256 of the cookie's token, in hexadecimal
    sa.Column("user_name", sa.Text, nullable=False),
    sa.Column("credential", sa.Text, nullable=False),  # a hash of the user's role and password hash
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_seen_at", UtcDateTime, nullable=False),
)

actions = sa.Table(
    "actions",
    metadata,
    sa.Column("action_id", Serial, primary_key=True),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("user_name", sa.Text, nullable=False),
    sa.Column("address", sa.Text, nullable=False),  # of the browser
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("ended_at", UtcDateTime),
    sa.CheckConstraint("status IN ('running', 'done', 'refused', 'failed')", name="status"),
    sa.CheckConstraint("(status = 'running') = (ended_at IS NULL)", name="ended"),
    sqlite_autoincrement=True,
)
