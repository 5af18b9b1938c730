"""Commit a run: write the new baseline, and a delivery for each change in {temp}audience_sync_changes.

Both are written in the caller's transaction. Next: queue/deliveries.py.
"""

import datetime as dt
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.definition import Kind
from audience_sync.audiences.records import ChangeCounts
from audience_sync.db.dialects import create_temp_table, is_sqlite, sql
from audience_sync.db.tables import MAY_HAVE_BEEN_SENT
from audience_sync.queue import deliveries
from audience_sync.queue.outcomes import Status

_CHANGES = "FROM {temp}audience_sync_changes"


@dataclass(frozen=True, slots=True)
class Commit:
    """A run whose changes are committed or held.

    `everyone`: send a value to all current and past members, not only to those who changed. `users`: if given, send
    only to these. `replaced_id`: the run whose held deliveries this run takes over.
    """

    origin: deliveries.RunOrigin
    key: str
    kind: Kind
    now: dt.datetime
    everyone: bool = False
    users: tuple[str, ...] | None = None
    replaced_id: int | None = None

    def body(self, *, left: str, value: str) -> str:
        """Return the SQL expression for a body; `left` is a condition that is true for users who left."""
        # Keys need no quoting.
        absent, present = ("false", "'true'") if self.kind is Kind.AUDIENCE else ("null", value)
        return f"'{{\"{self.key}\": ' || CASE WHEN {left} THEN '{absent}' ELSE {present} END || '}}'"


def commit(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    """Write the new baseline and its deliveries."""
    deliveries.release_older(connection, run.origin, run.now)
    has_never_sent = bool(counts.exited) and _cancel_never_sent(connection, run)
    if run.everyone:
        _enqueue_everyone(connection, run, Status.PENDING, has_never_sent=has_never_sent)
    elif counts != ChangeCounts():
        _enqueue_changes(connection, run, has_never_sent=has_never_sent)
    _move_baseline(connection, run, counts)


def hold_changes(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    """Store the changes as held deliveries; the baseline stays."""
    if run.everyone:
        _enqueue_everyone(connection, run, Status.HELD, has_never_sent=False)
    elif counts != ChangeCounts():
        _enqueue(connection, run, Status.HELD, _CHANGES)
    elif run.replaced_id is not None:
        deliveries.delete_held(connection, run.replaced_id)


def commit_held(connection: sa.Connection, run: Commit, counts: ChangeCounts) -> None:
    """Commit a held run, from whose deliveries the changes were loaded: release these deliveries."""
    if counts.exited and _cancel_never_sent(connection, run):
        users = "SELECT user_id FROM {temp}audience_sync_never_sent"
        deliveries.cancel_run(connection, run.origin.run_id, run.now, deliveries.NEVER_SENT, users)
    deliveries.release_run(connection, run.origin.run_id, run.now, run.origin.fingerprint)
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


def _was_attempted(user: str, runs_of_entries: str) -> str:
    """Return the condition that something may have been sent to a user for the key; `user` is an SQL expression.

    Old deliveries are pruned. Each membership began with a delivery, so if that one is missing, it may have been sent.
    If only a full run sent the value, the first delivery was never attempted; pruning deletes it no later than the full
    run's. `runs_of_entries` is a query for the runs (entered_run_id) in which the user's memberships began.
    """
    return (
        f"(EXISTS (SELECT 1 FROM {{our}}deliveries d WHERE d.subject_id = {user} AND d.definition_id = :definition_id "
        f"AND {MAY_HAVE_BEEN_SENT}) "
        f"OR EXISTS (SELECT 1 FROM ({runs_of_entries}) AS entry WHERE NOT EXISTS (SELECT 1 FROM {{our}}deliveries d "
        # + 0, because the index by run would find all users of a run.
        f"WHERE d.subject_id = {user} AND d.run_id + 0 = entry.entered_run_id)))"
    )


def _past_entries(user: str) -> str:
    return (
        "SELECT p.entered_run_id FROM {our}past_members p "
        f"WHERE p.definition_id = :definition_id AND p.user_id = {user}"
    )


def _cancel_never_sent(connection: sa.Connection, run: Commit) -> bool:
    """Cancel the pending deliveries of users who leave before anything was attempted for them and the key.

    Returns whether there are any. {temp}audience_sync_never_sent then contains these users and their deliveries.
    """
    columns = "user_id {id}, delivery_id bigint, entered_run_id bigint, PRIMARY KEY (user_id, delivery_id)"
    create_temp_table(connection, "never_sent", columns)
    # Locked, so that no worker claims them; on SQLite this transaction has the only write lock.
    pending = sql(
        connection,
        "INSERT INTO {temp}audience_sync_never_sent SELECT d.subject_id, d.delivery_id, c.entered_run_id "
        f"{_CHANGES} c JOIN {{our}}deliveries d ON d.subject_id = c.user_id "
        f"WHERE c.change = 'exited' AND {deliveries.BY_SUBJECT_INDEX} AND d.status = 'pending' "
        "AND d.action = 'identify' AND d.definition_id = :definition_id"
        + ("" if is_sqlite(connection) else " FOR UPDATE OF d"),
        definition_id=run.origin.definition_id,
    ).rowcount
    if not pending:
        return False
    user = "audience_sync_never_sent.user_id"
    entries = f"{_past_entries(user)} UNION ALL SELECT audience_sync_never_sent.entered_run_id"
    sent = sql(
        connection,
        f"DELETE FROM {{temp}}audience_sync_never_sent WHERE {_was_attempted(user, entries)}",
        definition_id=run.origin.definition_id,
    ).rowcount
    if sent == pending:
        return False
    ids = "SELECT delivery_id FROM {temp}audience_sync_never_sent"
    deliveries.cancel_never_attempted(connection, ids, run.now)
    return True


_NEVER_SENT = "change = 'exited' AND user_id IN (SELECT user_id FROM {temp}audience_sync_never_sent)"


def _enqueue_changes(connection: sa.Connection, run: Commit, *, has_never_sent: bool) -> None:
    if not has_never_sent:
        _enqueue(connection, run, Status.PENDING, _CHANGES)
        return
    _enqueue(connection, run, Status.PENDING, f"{_CHANGES} WHERE NOT ({_NEVER_SENT})")
    _enqueue(connection, run, Status.CANCELLED, f"{_CHANGES} WHERE {_NEVER_SENT}")


def _enqueue_everyone(
    connection: sa.Connection, run: Commit, status: Status, *, has_never_sent: bool
) -> None:
    """Queue the value of each member after this run, and of each past member who may ever have been sent one.

    Nothing is queued for users who leave in this run and were never sent anything.
    """
    of_definition = "definition_id = :definition_id"
    not_changed = f"NOT EXISTS (SELECT 1 {_CHANGES} c WHERE c.user_id ="
    sent = f"WHERE NOT ({_NEVER_SENT}) " if has_never_sent else ""
    everyone = (
        f"FROM (SELECT user_id, change, value {_CHANGES} {sent}"
        "UNION ALL SELECT m.user_id, 'entered', m.value FROM {our}members m "
        f"WHERE m.{of_definition} AND {not_changed} m.user_id) "
        "UNION ALL SELECT l.user_id, 'exited', NULL FROM "
        f"(SELECT DISTINCT user_id FROM {{our}}past_members WHERE {of_definition}) l "
        f"WHERE NOT EXISTS (SELECT 1 FROM {{our}}members m WHERE m.{of_definition} AND m.user_id = l.user_id) "
        f"AND {not_changed} l.user_id) AND {_was_attempted('l.user_id', _past_entries('l.user_id'))}) AS everyone"
    )
    _enqueue(connection, run, status, everyone + ("" if run.users is None else " WHERE user_id IN :users"))


def _enqueue(connection: sa.Connection, run: Commit, status: Status, source: str) -> None:
    body = run.body(left="change = 'exited'", value="value")
    parameters: dict[str, Any] = {}
    if ":users" in source:
        parameters["users"] = ["", *(run.users or ())]  # no user id is empty; an empty list has no type
    if status is Status.HELD and run.replaced_id is not None:
        deliveries.replace_held(connection, run.origin, run.replaced_id, body, source, run.now, **parameters)
        return
    deliveries.enqueue(connection, run.origin, status, body, source, run.now, **parameters)


def _revive_current(connection: sa.Connection, run: Commit) -> None:
    """Give a new attempt to each dead delivery whose value is still current, because no newer one was committed."""
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
