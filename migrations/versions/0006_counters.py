"""Raise each counter of ids above every id in use, as earlier releases lost SQLite's counters in a migration.

An id in use is that of a row, or one that other rows still refer to, whose own row was pruned.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

USES = {
    "runs.run_id": (
        "runs.run_id", "runs.baseline_run_id", "deliveries.run_id", "members.entered_run_id",
        "past_members.entered_run_id", "past_members.exited_run_id", "schedule_slots.run_id",
    ),
    "calls.call_id": ("calls.call_id", "deliveries.call_id", "events.call_id"),
    "deliveries.delivery_id": ("deliveries.delivery_id",),
    "requests.request_id": ("requests.request_id", "deliveries.request_id", "bulk_jobs.request_id"),
}  # fmt: skip


def upgrade() -> None:
    raise_counter = _raise_on_sqlite if op.get_bind().dialect.name == "sqlite" else _raise_on_postgresql
    for counted, uses in USES.items():
        greatest = " UNION ALL ".join(
            f"SELECT max({column}) AS id FROM {table}" for table, column in map(_split, uses)
        )
        raise_counter(*_split(counted), f"(SELECT coalesce(max(id), 0) AS id FROM ({greatest}) AS uses)")


def downgrade() -> None:
    """Keep the counters: they suit every version."""


def _split(name: str) -> tuple[str, str]:
    table, _, column = name.partition(".")
    return table, column


def _raise_on_sqlite(table: str, _: str, greatest: str) -> None:
    op.execute(
        f"INSERT INTO sqlite_sequence (name, seq) SELECT '{table}', 0 "
        f"WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = '{table}')"
    )
    op.execute(f"UPDATE sqlite_sequence SET seq = max(seq, {greatest}) WHERE name = '{table}'")


def _raise_on_postgresql(table: str, column: str, greatest: str) -> None:
    sequence = f"CAST(pg_get_serial_sequence('{table}', '{column}') AS regclass)"
    op.execute(
        f"SELECT setval({sequence}, greatest.id) FROM {greatest} AS greatest "
        f"WHERE greatest.id > coalesce(pg_sequence_last_value({sequence}), 0)"
    )
