"""What a run commits: the new baseline, and a delivery for each change in {temp}audience_sync_changes."""

import datetime as dt
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences.definition import Kind
from audience_sync.db.dialects import is_sqlite, sql

NEVER_SENT = "left before anything was sent"
UNSETTLED = "d.status IN ('pending', 'sending')"  # as ix_deliveries_unsettled has it, for SQLite to see it


@dataclass(frozen=True, slots=True)
class Commit:
    """What a run writes: its ids, the key's two bodies, and the moment that its values are of.

    `everyone`: deliveries for all who hold it or ever did, not for the changes alone; `users`, if given, are
    the only ones that it is about; `delivery_class` is their right of way.
    """

    run_id: int
    definition_id: int
    key: str
    kind: Kind
    as_of: dt.datetime
    now: dt.datetime
    fingerprint: str | None
    delivery_class: str = "change"
    everyone: bool = False
    users: tuple[str, ...] | None = None

    def body(self, *, left: str, value: str) -> str:
        """The expression of a delivery's body: `left` is a condition, keys need no quoting."""
        gone, held = ("false", "'true'") if self.kind is Kind.AUDIENCE else ("null", value)
        return f"'{{\"{self.key}\": ' || CASE WHEN {left} THEN '{gone}' ELSE {held} END || '}}'"

    @property
    def gone(self) -> str:
        """The body of one who left."""
        return f'{{"{self.key}": {"false" if self.kind is Kind.AUDIENCE else "null"}}}'


def commit(connection: sa.Connection, run: Commit, counts: dict[str, int]) -> None:
    """Write the new baseline and its deliveries; the caller's transaction makes them one."""
    unheard = bool(counts.get("exited")) and _cancel_unheard(connection, run)
    if run.everyone:  # whoever is unheard of is told nothing: what was pending is cancelled by now
        _deliver_everyone(connection, run, "pending")
    elif counts:
        _deliver_changes(connection, run, unheard=unheard)
    _move_baseline(connection, run, counts)


def hold(connection: sa.Connection, run: Commit, counts: dict[str, int]) -> None:
    """Keep the changes as deliveries that wait for a person; the baseline stays."""
    if run.everyone:
        _deliver_everyone(connection, run, "held")
    elif counts:
        _deliver(connection, run, "FROM {temp}audience_sync_changes", "held")


def approve(connection: sa.Connection, run: Commit, counts: dict[str, int]) -> None:
    """Commit a held run: its deliveries are there, and the changes were made of them."""
    mine = "run_id = :run_id AND status = 'held'"
    if counts.get("exited") and _cancel_unheard(connection, run):
        sql(
            connection,
            "UPDATE {our}deliveries SET status = 'cancelled', settled_at = :now, error = :error "
            f"WHERE {mine} AND subject_id IN (SELECT user_id FROM {{temp}}audience_sync_unheard)",
            run_id=run.run_id,
            now=run.now,
            error=NEVER_SENT,
        )
    sql(
        connection,
        f"UPDATE {{our}}deliveries SET status = 'pending', next_attempt_at = :now WHERE {mine}",
        run_id=run.run_id,
        now=run.now,
    )
    _move_baseline(connection, run, counts)


def drop_held(connection: sa.Connection, run_id: int, now: dt.datetime, reason: str) -> None:
    """The changes of a held run will not be sent."""
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'cancelled', settled_at = :now, error = :reason "
        "WHERE run_id = :run_id AND status = 'held'",
        run_id=run_id,
        now=now,
        reason=reason,
    )


def drop_of_other_destinations(connection: sa.Connection, run: Commit) -> None:
    """What waits for another destination than this run's is not told there: this run tells everything here."""
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'cancelled', settled_at = :now, error = :error "
        "WHERE definition_id = :definition_id AND status IN ('held', 'pending', 'dead') "
        "AND fingerprint <> :fingerprint AND run_id <> :run_id",
        now=run.now,
        error="made for another destination",
        run_id=run.run_id,
        fingerprint=run.fingerprint,
        **_id(run),
    )


def _move_baseline(connection: sa.Connection, run: Commit, counts: dict[str, int]) -> None:
    if counts.get("exited") or counts.get("changed"):
        _end_memberships(connection, run)
    if counts.get("entered") or counts.get("changed"):
        sql(
            connection,
            "INSERT INTO {our}members (definition_id, user_id, entered_run_id, value) "
            "SELECT :definition_id, user_id, :run_id, value "
            "FROM {temp}audience_sync_changes WHERE change <> 'exited' ORDER BY user_id",
            definition_id=run.definition_id,
            run_id=run.run_id,
        )
    _revive_dead(connection, run)


def _end_memberships(connection: sa.Connection, run: Commit) -> None:
    sql(
        connection,
        "INSERT INTO {our}past_members (definition_id, user_id, entered_run_id, exited_run_id, value) "
        "SELECT :definition_id, user_id, entered_run_id, :run_id, old_value "
        "FROM {temp}audience_sync_changes WHERE change <> 'entered'",
        definition_id=run.definition_id,
        run_id=run.run_id,
    )
    sql(
        connection,
        "DELETE FROM {our}members WHERE definition_id = :definition_id AND user_id IN "
        "(SELECT user_id FROM {temp}audience_sync_changes WHERE change <> 'entered')",
        definition_id=run.definition_id,
    )


# The oldest delivery that waits is of a run in which the user entered, and in which no value of his ended: what
# was told before, and is not kept any more, was taken back then.
_BEGINS_WITH_ENTRY = """
SELECT 1 FROM {our}deliveries o JOIN {temp}audience_sync_changes c ON c.user_id = o.subject_id
WHERE o.delivery_id = (SELECT min(u.delivery_id) FROM {temp}audience_sync_unheard u
                       WHERE u.user_id = audience_sync_unheard.user_id)
  AND (o.run_id = c.entered_run_id OR EXISTS (SELECT 1 FROM {our}past_members p
       WHERE p.definition_id = :definition_id AND p.user_id = o.subject_id AND p.entered_run_id = o.run_id))
  AND NOT EXISTS (SELECT 1 FROM {our}past_members p WHERE p.definition_id = :definition_id
                  AND p.user_id = o.subject_id AND p.exited_run_id = o.run_id)"""


def _cancel_unheard(connection: sa.Connection, run: Commit) -> bool:
    """An exit whose entry is pending, where nothing for the key and user was ever tried, cancels both.

    True where there are such exits: {temp}audience_sync_unheard has their users, and what was pending.
    """
    sql(connection, "DROP TABLE IF EXISTS {temp}audience_sync_unheard")
    collated = "text" if is_sqlite(connection) else 'text COLLATE "C"'
    sql(
        connection,
        f"CREATE TEMPORARY TABLE audience_sync_unheard (user_id {collated}, delivery_id bigint, "
        "PRIMARY KEY (user_id, delivery_id))",
    )
    waiting = sql(  # from here on no worker may claim them: on SQLite we hold the only lock there is
        connection,
        "INSERT INTO {temp}audience_sync_unheard SELECT d.subject_id, d.delivery_id "
        "FROM {temp}audience_sync_changes c JOIN {our}deliveries d ON d.subject_id = c.user_id "
        f"WHERE c.change = 'exited' AND {UNSETTLED} AND d.status = 'pending' AND d.action = 'identify' "
        "AND d.definition_id = :definition_id" + ("" if is_sqlite(connection) else " FOR UPDATE OF d"),
        **_id(run),
    ).rowcount
    if not waiting:
        return False
    heard = sql(
        connection,
        "DELETE FROM {temp}audience_sync_unheard WHERE EXISTS (SELECT 1 FROM {our}deliveries d "
        "WHERE d.subject_id = audience_sync_unheard.user_id AND d.definition_id = :definition_id "
        "AND (d.attempt_count > 0 OR d.status IN ('sending', 'accepted', 'dead') "
        # An exit that waits tells of an entry that was told, though it may not be kept any more.
        "OR (d.status = 'pending' AND CAST(d.body AS text) = :gone))) "
        f"OR NOT EXISTS ({_BEGINS_WITH_ENTRY})",
        gone=run.gone,
        **_id(run),
    ).rowcount
    if heard == waiting:
        return False
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'cancelled', settled_at = :now, error = :error "
        "WHERE delivery_id IN (SELECT delivery_id FROM {temp}audience_sync_unheard)",
        now=run.now,
        error=NEVER_SENT,
    )
    return True


def _deliver_changes(connection: sa.Connection, run: Commit, *, unheard: bool) -> None:
    changes = "FROM {temp}audience_sync_changes"
    if not unheard:
        _deliver(connection, run, changes, "pending")
        return
    these = "change = 'exited' AND user_id IN (SELECT user_id FROM {temp}audience_sync_unheard)"
    _deliver(connection, run, f"{changes} WHERE NOT ({these})", "pending")
    _deliver(connection, run, f"{changes} WHERE {these}", "cancelled")


def _deliver_everyone(connection: sa.Connection, run: Commit, status: str) -> None:
    """Members as they will be, and everyone who ever held it and left, but for whom Userpilot never knew."""
    of_left = "d.subject_id = p.user_id AND d.definition_id = :definition_id AND d.status <> 'held'"
    changed = "SELECT 1 FROM {temp}audience_sync_changes c WHERE c.user_id ="
    mine = "WHERE definition_id = :definition_id"
    everyone = (
        "FROM (SELECT user_id, change, value FROM {temp}audience_sync_changes WHERE change <> 'exited' "
        "UNION ALL SELECT m.user_id, 'entered', m.value FROM {our}members m "
        f"{mine} AND NOT EXISTS ({changed} m.user_id) "
        "UNION ALL SELECT p.user_id, 'exited', NULL FROM (SELECT user_id FROM {our}past_members "
        f"{mine} UNION SELECT user_id FROM {{temp}}audience_sync_changes WHERE change = 'exited') p "
        f"WHERE NOT EXISTS (SELECT 1 FROM {{our}}members m {mine} AND m.user_id = p.user_id "
        f"AND NOT EXISTS ({changed} m.user_id AND c.change = 'exited')) "
        f"AND NOT EXISTS ({changed} p.user_id AND c.change <> 'exited') "
        f"AND (NOT EXISTS (SELECT 1 FROM {{our}}deliveries d WHERE {of_left}) OR EXISTS (SELECT 1 FROM "
        f"{{our}}deliveries d WHERE {of_left} AND (d.status <> 'cancelled' OR d.attempt_count > 0)))) AS everyone"
    )
    where = "" if run.users is None else " WHERE user_id IN :users"
    _deliver(connection, run, everyone + where, status)


def _deliver(connection: sa.Connection, run: Commit, rows: str, status: str) -> None:
    cancelled = status == "cancelled"
    body = _json(connection, run.body(left="change = 'exited'", value="value"))
    parameters: dict[str, Any] = {"error": NEVER_SENT} if cancelled else {}
    if ":users" in rows:
        parameters["users"] = ["", *(run.users or ())]  # nobody is called ""; an empty list has no type
    sql(
        connection,
        "INSERT INTO {our}deliveries (action, subject_id, body, class, run_id, definition_id, value_at, "
        f"fingerprint, status, created_at, next_attempt_at{', settled_at, error' if cancelled else ''}) "
        f"SELECT 'identify', user_id, {body}, "
        ":class, :run_id, :definition_id, :as_of, :fingerprint, :status, :now, :now"
        f"{', :now, :error' if cancelled else ''} {rows} ORDER BY user_id",
        **{"class": run.delivery_class},
        status=status,
        run_id=run.run_id,
        as_of=run.as_of,
        fingerprint=run.fingerprint,
        now=run.now,
        **parameters,
        **_id(run),
    )


def _revive_dead(connection: sa.Connection, run: Commit) -> None:
    """One new attempt for each dead delivery whose value is still current: no newer one was committed."""
    dead = "status = 'dead' AND definition_id = :definition_id"
    if sql(connection, f"SELECT 1 FROM {{our}}deliveries WHERE {dead} LIMIT 1", **_id(run)).first() is None:
        return
    current = run.body(left="m.user_id IS NULL", value="m.value")
    mine: str = ""
    parameters: dict[str, Any] = {}
    if run.users is not None:
        mine, parameters = " AND subject_id IN :users", {"users": list(run.users)}
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'pending', settled_at = NULL, next_attempt_at = :now, "
        "first_attempt_at = NULL, quiet_until = NULL, alone = false, error = NULL "
        f"WHERE {dead}{mine} AND delivery_id IN (SELECT d.delivery_id FROM {{our}}deliveries d "
        "LEFT JOIN {our}members m ON m.definition_id = d.definition_id AND m.user_id = d.subject_id "
        f"WHERE d.status = 'dead' AND d.definition_id = :definition_id AND CAST(d.body AS text) = {current} "
        "AND NOT EXISTS (SELECT 1 FROM {our}deliveries n JOIN {our}runs r ON r.run_id = n.run_id "
        "WHERE n.subject_id = d.subject_id AND n.definition_id = d.definition_id "
        "AND n.delivery_id > d.delivery_id AND (r.status = 'succeeded' OR r.run_id = :run_id)))",
        now=run.now,
        run_id=run.run_id,
        **parameters,
        **_id(run),
    )


def _json(connection: sa.Connection, text: str) -> str:
    return f"({text})" if is_sqlite(connection) else f"CAST({text} AS json)"


def _id(run: Commit) -> dict[str, int]:
    return {"definition_id": run.definition_id}
