"""Commit a run: write the new baseline, and a delivery for each change in {temp}audience_sync_changes.

The caller's transaction commits both together. The path goes on in the queue, with queue/deliveries.py.
"""

import datetime as dt
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.definition import Kind
from audience_sync.audiences.records import ChangeCounts
from audience_sync.db.dialects import create_temp_table, is_sqlite, sql
from audience_sync.queue import deliveries
from audience_sync.queue.outcomes import Status

_CHANGES = "FROM {temp}audience_sync_changes"


@dataclass(frozen=True, slots=True)
class Commit:
    """A run whose changes are committed or held.

    `everyone`: send a value to all current and past members, not only to those who changed. `users`: if given, send
    to these only.
    """

    origin: deliveries.RunOrigin
    key: str
    kind: Kind
    now: dt.datetime
    everyone: bool = False
    users: tuple[str, ...] | None = None

    def body(self, *, left: str, value: str) -> str:
        """Return the SQL expression for a body; `left` is a condition that holds for users who left."""
        # Keys need no quoting.
        absent, present = ("false", "'true'") if self.kind is Kind.AUDIENCE else ("null", value)
        return f"'{{\"{self.key}\": ' || CASE WHEN {left} THEN '{absent}' ELSE {present} END || '}}'"

    @property
    def exit_body(self) -> str:
        """The body, as text, for a user who left."""
        return f'{{"{self.key}": {"false" if self.kind is Kind.AUDIENCE else "null"}}}'


def commit(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    """Write the new baseline and its deliveries."""
    has_never_sent = bool(counts.exited) and _cancel_never_sent(connection, run)
    if run.everyone:  # users whose pending deliveries were just cancelled get none
        _enqueue_everyone(connection, run, Status.PENDING)
    elif counts != ChangeCounts():
        _enqueue_changes(connection, run, has_never_sent=has_never_sent)
    _move_baseline(connection, run, counts)


def hold_changes(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    """Store the changes as held deliveries; the baseline stays."""
    if run.everyone:
        _enqueue_everyone(connection, run, Status.HELD)
    elif counts != ChangeCounts():
        _enqueue(connection, run, Status.HELD, _CHANGES)


def commit_held(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    """Commit a held run, whose deliveries the changes were loaded from: release these."""
    if counts.exited and _cancel_never_sent(connection, run):
        users = "SELECT user_id FROM {temp}audience_sync_never_sent"
        deliveries.cancel_run(connection, run.origin.run_id, run.now, deliveries.NEVER_SENT, users)
    deliveries.release_run(connection, run.origin.run_id, run.now)
    _move_baseline(connection, run, counts)


def _move_baseline(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    if counts.exited or counts.changed:
        _end_memberships(connection, run)
    if counts.entered or counts.changed:
        sql(
            connection,
            "INSERT INTO {our}members (definition_id, user_id, entered_run_id, value) "
            "SELECT :definition_id, user_id, :run_id, value "
            "FROM {temp}audience_sync_changes WHERE change <> 'exited' ORDER BY user_id",
            definition_id=run.origin.definition_id,
            run_id=run.origin.run_id,
        )
    _revive_current(connection, run)


def _end_memberships(connection: sa.Connection, run: Commit) -> None:
    sql(
        connection,
        "INSERT INTO {our}past_members (definition_id, user_id, entered_run_id, exited_run_id, value) "
        "SELECT :definition_id, user_id, entered_run_id, :run_id, old_value "
        "FROM {temp}audience_sync_changes WHERE change <> 'entered'",
        definition_id=run.origin.definition_id,
        run_id=run.origin.run_id,
    )
    sql(
        connection,
        "DELETE FROM {our}members WHERE definition_id = :definition_id AND user_id IN "
        "(SELECT user_id FROM {temp}audience_sync_changes WHERE change <> 'entered')",
        definition_id=run.origin.definition_id,
    )


# Older deliveries may be pruned. If the oldest pending one belongs to the run in which the user entered, and no value
# of the user ended in that run, then whatever was sent before had already been reversed.
_BEGINS_WITH_ENTRY = """
SELECT 1 FROM {our}deliveries o JOIN {temp}audience_sync_changes c ON c.user_id = o.subject_id
WHERE o.delivery_id = (SELECT min(u.delivery_id) FROM {temp}audience_sync_never_sent u
                       WHERE u.user_id = audience_sync_never_sent.user_id)
  AND (o.run_id = c.entered_run_id OR EXISTS (SELECT 1 FROM {our}past_members p
       WHERE p.definition_id = :definition_id AND p.user_id = o.subject_id AND p.entered_run_id = o.run_id))
  AND NOT EXISTS (SELECT 1 FROM {our}past_members p WHERE p.definition_id = :definition_id
                  AND p.user_id = o.subject_id AND p.exited_run_id = o.run_id)"""
# A pending exit implies that the entry was sent, even if its delivery was pruned.
_WAS_ATTEMPTED = """SELECT 1 FROM {our}deliveries d
WHERE d.subject_id = audience_sync_never_sent.user_id AND d.definition_id = :definition_id
  AND (d.attempt_count > 0 OR d.status IN ('sending', 'accepted', 'dead')
       OR (d.status = 'pending' AND CAST(d.body AS text) = :exit_body))"""


def _cancel_never_sent(connection: sa.Connection, run: Commit) -> bool:
    """Cancel the pending deliveries of users who leave before anything was attempted for them and the key.

    Returns whether there are any. {temp}audience_sync_never_sent then holds these users and their deliveries.
    """
    columns = "user_id {id}, delivery_id bigint, PRIMARY KEY (user_id, delivery_id)"
    create_temp_table(connection, "never_sent", columns)
    pending = (
        sql(  # locks them, so that no worker claims them; on SQLite this transaction has the only write lock
            connection,
            "INSERT INTO {temp}audience_sync_never_sent SELECT d.subject_id, d.delivery_id "
            f"{_CHANGES} c JOIN {{our}}deliveries d ON d.subject_id = c.user_id "
            f"WHERE c.change = 'exited' AND {deliveries.BY_SUBJECT_INDEX} AND d.status = 'pending' "
            "AND d.action = 'identify' AND d.definition_id = :definition_id"
            + ("" if is_sqlite(connection) else " FOR UPDATE OF d"),
            definition_id=run.origin.definition_id,
        ).rowcount
    )
    if not pending:
        return False
    sent = sql(
        connection,
        f"DELETE FROM {{temp}}audience_sync_never_sent WHERE EXISTS ({_WAS_ATTEMPTED}) "
        f"OR NOT EXISTS ({_BEGINS_WITH_ENTRY})",
        exit_body=run.exit_body,
        definition_id=run.origin.definition_id,
    ).rowcount
    if sent == pending:
        return False
    ids = "SELECT delivery_id FROM {temp}audience_sync_never_sent"
    deliveries.cancel_never_attempted(connection, ids, run.now)
    return True


def _enqueue_changes(connection: sa.Connection, run: Commit, *, has_never_sent: bool) -> None:
    if not has_never_sent:
        _enqueue(connection, run, Status.PENDING, _CHANGES)
        return
    was_never_sent = "change = 'exited' AND user_id IN (SELECT user_id FROM {temp}audience_sync_never_sent)"
    _enqueue(connection, run, Status.PENDING, f"{_CHANGES} WHERE NOT ({was_never_sent})")
    _enqueue(connection, run, Status.CANCELLED, f"{_CHANGES} WHERE {was_never_sent}")


def _enqueue_everyone(connection: sa.Connection, run: Commit, status: Status) -> None:
    """Queue the value of each member after this run, and of each past member who was ever sent one."""
    of_past_member = "d.subject_id = p.user_id AND d.definition_id = :definition_id AND d.status <> 'held'"
    changed = f"SELECT 1 {_CHANGES} c WHERE c.user_id ="
    of_definition = "WHERE definition_id = :definition_id"
    everyone = (
        f"FROM (SELECT user_id, change, value {_CHANGES} WHERE change <> 'exited' "
        "UNION ALL SELECT m.user_id, 'entered', m.value FROM {our}members m "
        f"{of_definition} AND NOT EXISTS ({changed} m.user_id) "
        "UNION ALL SELECT p.user_id, 'exited', NULL FROM (SELECT user_id FROM {our}past_members "
        f"{of_definition} UNION SELECT user_id {_CHANGES} WHERE change = 'exited') p "
        f"WHERE NOT EXISTS (SELECT 1 FROM {{our}}members m {of_definition} AND m.user_id = p.user_id "
        f"AND NOT EXISTS ({changed} m.user_id AND c.change = 'exited')) "
        f"AND NOT EXISTS ({changed} p.user_id AND c.change <> 'exited') "
        f"AND (NOT EXISTS (SELECT 1 FROM {{our}}deliveries d WHERE {of_past_member}) OR EXISTS (SELECT 1 FROM "
        f"{{our}}deliveries d WHERE {of_past_member} AND (d.status <> 'cancelled' OR d.attempt_count > 0)))) AS everyone"
    )
    _enqueue(connection, run, status, everyone + ("" if run.users is None else " WHERE user_id IN :users"))


def _enqueue(connection: sa.Connection, run: Commit, status: Status, source: str) -> None:
    body = run.body(left="change = 'exited'", value="value")
    parameters: dict[str, Any] = {}
    if ":users" in source:
        parameters["users"] = ["", *(run.users or ())]  # no user id is empty; an empty list has no type
    deliveries.enqueue(connection, run.origin, status, body, source, run.now, **parameters)


def _revive_current(connection: sa.Connection, run: Commit) -> None:
    """Give a new attempt to each dead delivery whose value is still current: no newer one was committed."""
    if not deliveries.has_dead(connection, run.origin.definition_id):
        return
    current = run.body(left="m.user_id IS NULL", value="m.value")
    parameters: dict[str, Any] = {} if run.users is None else {"users": list(run.users)}
    ids = (
        "SELECT d.delivery_id FROM {our}deliveries d "
        "LEFT JOIN {our}members m ON m.definition_id = d.definition_id AND m.user_id = d.subject_id "
        f"WHERE d.status = 'dead' AND d.definition_id = :definition_id AND CAST(d.body AS text) = {current} "
        + ("" if run.users is None else "AND d.subject_id IN :users ")
        + "AND NOT EXISTS (SELECT 1 FROM {our}deliveries n JOIN {our}runs r ON r.run_id = n.run_id "
        "WHERE n.subject_id = d.subject_id AND n.definition_id = d.definition_id "
        "AND n.delivery_id > d.delivery_id AND (r.status = 'succeeded' OR r.run_id = :run_id))"
    )
    deliveries.revive(
        connection, run.origin.definition_id, ids, run.now, run_id=run.origin.run_id, **parameters
    )
