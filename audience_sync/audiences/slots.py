"""Decide which slots are due, from the schedules and the slots taken so far, and take them.

After downtime only the newest missed slot runs. A new definition starts with the first slot after its row was inserted.
While a definition has a run held by `sync --hold`, none of its slots is due. The definition that has waited longest
comes first. Taking a slot is an insert, so only one of two daemons gets it. daemon.py runs the slots that it takes.

A slot whose run failed is due again after RETRY_AFTER, until the next slot is due. A slot whose process ended is due
again at once, and after RETRY_AFTER if that happens again. After a missed full slot, all runs are full until one has
succeeded.

Due slots are read with the same few statements for any number of definitions.
"""

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import records
from audience_sync.audiences.definition import Definition
from audience_sync.audiences.schedule import Schedule
from audience_sync.db import engines, leases
from audience_sync.db.dialects import sql
from audience_sync.db.tables import definitions, runs, schedule_slots
from audience_sync.queue import destination

CUT_OFF_AFTER = dt.timedelta(minutes=1)  # if a taken slot has no run by then, its process is gone
LATE_AFTER = dt.timedelta(minutes=2)
# The delays after the first, second and third failure.
RETRY_AFTER = tuple(dt.timedelta(minutes=minutes) for minutes in (1, 5, 15))


@dataclass(frozen=True, slots=True)
class Due:
    """A definition with a slot to take: the newest missed slot, or the last slot again.

    `due_at`: when it became due. `last_at`: its last slot, or when it was registered. `taken_at`: when that slot was
    taken, if it is due again. `is_running`: its last run has not ended, so the slot waits for that.
    """

    definition: Definition
    definition_id: int
    due_at: dt.datetime
    last_at: dt.datetime
    taken_at: dt.datetime | None
    is_running: bool


@dataclass(frozen=True, slots=True)
class Slot:
    definition: Definition
    definition_id: int
    slot_at: dt.datetime
    taken_at: dt.datetime
    full: bool


@dataclass(frozen=True, slots=True)
class Outlook:
    """A definition's next slot; `next_at` is None without a schedule.

    `late_since`: when the first missed slot was due, if that was more than LATE_AFTER ago. `waits`: no slot is due until
    somebody decides about a held run. `retry_at`: when the slot of a failed run is due again.
    """

    next_at: dt.datetime | None
    late_since: dt.datetime | None = None
    waits: bool = False
    retry_at: dt.datetime | None = None


def find_due(
    engine: sa.Engine,
    definitions: Sequence[Definition],
    now: dt.datetime,
    running: Collection[str] = (),
    wait_seconds: float | None = None,
) -> list[Due]:
    """Return the due slots of these definitions, longest due first; insert the rows of new definitions.

    If a clock was ahead when a definition was registered, it counts as registered now: otherwise it would have no slot
    until then.
    `running` are keys whose runs this process has started. `wait_seconds` is for locks.
    """
    scheduled = [definition for definition in definitions if _schedules(definition)]
    with engines.read(engine, wait_seconds) as connection:
        rows, waiting = _last_slots(connection, now), _waiting_ids(connection)
        leased = leases.held_names(connection)
    new = [definition for definition in scheduled if definition.key not in rows]
    if new or any(row.created_at > now for row in rows.values()):
        with engines.write(engine, wait_seconds) as connection:
            records.register_definitions(connection, new, now)
            records.correct_registrations(connection, now)
    due = []
    for definition in scheduled:
        row = rows.get(definition.key)
        if row is not None and row.retired_at is None and row.definition_id not in waiting:
            is_running = definition.key in running or leases.of_definition(definition.key) in leased
            if (slot := _due(definition, row, now, is_running=is_running)) is not None:
                due.append(slot)
    return sorted(due, key=lambda slot: slot.due_at)


def take(
    engine: sa.Engine, due: Sequence[Due], now: dt.datetime, *, limit: int, wait_seconds: float | None = None
) -> list[Slot]:
    """Take at most `limit` of the due slots, in order, except those that another process has taken."""
    taken: list[Slot] = []
    for slot in due:
        if len(taken) >= limit:
            break
        if not slot.is_running:
            slot_at = slot.last_at if slot.taken_at else _newest_missed(slot.definition, slot.last_at, now)
            with engines.write(engine, wait_seconds) as connection:
                if _take(connection, slot, slot_at, now):
                    full = _is_full(connection, slot, slot_at, now)
                    taken.append(Slot(slot.definition, slot.definition_id, slot_at, now, full))
    return taken


def _due(definition: Definition, row: sa.Row[Any], now: dt.datetime, *, is_running: bool) -> Due | None:
    last_at = row.slot_at or row.created_at
    missed_at = _first_after(definition, last_at)
    if missed_at is not None and missed_at <= now:
        return Due(definition, row.definition_id, missed_at, last_at, None, is_running)
    retry_at = None if is_running else _retry_at(row)
    if retry_at is None or retry_at > now:
        return None
    return Due(definition, row.definition_id, retry_at, last_at, row.taken_at, is_running=False)


def _schedules(definition: Definition) -> list[Schedule]:
    return [schedule for schedule in (definition.schedule, definition.full_schedule) if schedule]


def _first_after(definition: Definition, after: dt.datetime) -> dt.datetime | None:
    return min((schedule.next(after) for schedule in _schedules(definition)), default=None)


def _newest_missed(definition: Definition, after: dt.datetime, now: dt.datetime) -> dt.datetime:
    return max(filter(None, (schedule.latest(after, now) for schedule in _schedules(definition))))


def _retry_at(row: sa.Row[Any]) -> dt.datetime | None:
    """Return when the last slot is due again; None if its run did not fail, or failed too often.

    The caller makes sure that the run has ended: if its row still says running, its process has died.
    """
    if row.slot_at is None:
        return None
    if row.run_id is None:
        return row.taken_at + CUT_OFF_AFTER  # type: ignore[no-any-return]  # a column of time
    if row.status not in {"running", *_FAILED} or row.is_replaced:
        return None
    failure_count = max(row.failure_count, int(row.status != "running"))
    delays = (dt.timedelta(0), *RETRY_AFTER)
    if failure_count >= len(delays):
        return None
    return (row.finished_at or row.taken_at) + delays[failure_count]  # type: ignore[no-any-return]


_FAILED = ("failed", "abandoned")


def _last_slots(connection: sa.Connection, now: dt.datetime) -> dict[str, sa.Row[Any]]:
    """Return each definition with its last slot and the slot's last run, by key.

    `failure_count`: how many runs of the slot failed. `is_replaced`: a later run did the work of the last one. Slots
    after `now` come from a wrong clock and are ignored.
    """
    slot, other = schedule_slots.c, runs.alias("other").c

    def newest(column: sa.Column[Any]) -> sa.ScalarSelect[Any]:  # one index lookup for each definition
        is_past = (slot.definition_id == definitions.c.definition_id, slot.slot_at <= now)
        query = sa.select(column).where(*is_past).order_by(slot.slot_at.desc()).limit(1)
        return query.correlate(definitions).scalar_subquery()

    last = sa.select(
        *(definitions.c[name] for name in ("definition_id", "key", "created_at", "retired_at")),
        *(newest(slot[name]).label(name) for name in ("slot_at", "taken_at", "run_id")),
    ).subquery("last")
    previous_run_id = (
        sa.select(slot.run_id)
        .where(slot.definition_id == last.c.definition_id, slot.slot_at < last.c.slot_at, slot.run_id > 0)
        .order_by(slot.slot_at.desc())
        .limit(1)
        .correlate(last)
        .scalar_subquery()
    )
    is_of_slot = sa.and_(
        other.definition_id == last.c.definition_id,
        other.run_id > sa.func.coalesce(previous_run_id, 0),
        other.started_at >= last.c.slot_at,
        other.trigger == "schedule",
    )
    failure_count = sa.select(sa.func.count(other.run_id)).where(is_of_slot, other.status.in_(_FAILED))
    is_replaced = sa.exists().where(
        other.definition_id == last.c.definition_id,
        other.run_id > last.c.run_id,
        other.status.in_(("succeeded", "held")),
        other.mode != "canary",
        sa.or_(runs.c.mode != "full", other.mode.in_(_SENDS_EVERYONE)),
    )
    is_bad = runs.c.status.in_(("running", *_FAILED))
    rows = connection.execute(
        sa.select(
            last,
            runs.c.status,
            runs.c.finished_at,
            sa.case((is_bad, failure_count.correlate(last).scalar_subquery()), else_=0).label(
                "failure_count"
            ),
            sa.case((is_bad, is_replaced.correlate(last, runs)), else_=sa.false()).label("is_replaced"),
        ).select_from(last.outerjoin(runs, runs.c.run_id == last.c.run_id))
    )
    return {row.key: row for row in rows}


_SENDS_EVERYONE = ("full", "first")  # modes of runs


def _waiting_ids(connection: sa.Connection) -> set[int]:
    """Return the definitions that have a run held by `sync --hold`."""
    held = sa.select(runs.c.definition_id).where(runs.c.status == "held", runs.c.held_by == "hold")
    return set(connection.execute(held).scalars())


def _take(connection: sa.Connection, slot: Due, slot_at: dt.datetime, now: dt.datetime) -> bool:
    """Insert the slot, or take it again; return False if another process was faster."""
    if slot.taken_at is None:
        statement = (
            "INSERT INTO {our}schedule_slots (definition_id, slot_at, taken_at) "
            "VALUES (:definition_id, :slot_at, :now) ON CONFLICT DO NOTHING"
        )
        key = {"definition_id": slot.definition_id, "slot_at": slot_at}
        return sql(connection, statement, **key, now=now).rowcount == 1
    taken_again = (
        schedule_slots.update()
        .where(*_is_slot(slot.definition_id, slot_at), schedule_slots.c.taken_at == slot.taken_at)
        .values(taken_at=now, run_id=None)
    )
    return connection.execute(taken_again).rowcount == 1


def _is_full(connection: sa.Connection, slot: Due, slot_at: dt.datetime, now: dt.datetime) -> bool:
    """Return whether a full slot is due: none of the runs since then has succeeded."""
    if slot.definition.full_schedule is None:
        return False
    is_done = (
        runs.c.definition_id == slot.definition_id,
        runs.c.status == "succeeded",
        sa.or_(runs.c.trigger == "schedule", runs.c.mode.in_(_SENDS_EVERYONE)),
        runs.c.started_at <= now,
    )
    of_run = sa.and_(
        schedule_slots.c.definition_id == runs.c.definition_id, schedule_slots.c.run_id == runs.c.run_id
    )
    last_done = (
        sa.select(sa.func.coalesce(schedule_slots.c.slot_at, runs.c.started_at, type_=runs.c.started_at.type))
        .select_from(runs.outerjoin(schedule_slots, of_run))
        .where(*is_done)
        .order_by(runs.c.run_id.desc())
        .limit(1)
    )
    created = sa.select(definitions.c.created_at).where(definitions.c.definition_id == slot.definition_id)
    since: dt.datetime = connection.execute(last_done).scalar() or connection.execute(created).scalar_one()
    return slot.definition.full_schedule.latest(since, slot_at) is not None


def _is_slot(definition_id: int, slot_at: dt.datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at == slot_at)


def record_run(connection: sa.Connection, definition_id: int, slot_at: dt.datetime, run_id: int) -> None:
    connection.execute(schedule_slots.update().where(*_is_slot(definition_id, slot_at)).values(run_id=run_id))


def give_back(connection: sa.Connection, slot: Slot) -> None:
    """Make the slot due again, unless another process has taken it over."""
    is_ours = schedule_slots.c.taken_at == slot.taken_at
    connection.execute(schedule_slots.delete().where(*_is_slot(slot.definition_id, slot.slot_at), is_ours))


def outlooks(
    connection: sa.Connection, configured: Sequence[Definition], now: dt.datetime
) -> dict[str, Outlook]:
    """Return the definitions' schedules as `list` and `status` show them, by key."""
    rows, waiting = _last_slots(connection, now), _waiting_ids(connection)
    has_daemon = destination.last_heartbeat(connection) is not None
    leased = leases.held_names(connection)
    by_key = {}
    for definition in configured:
        row = rows.get(definition.key)
        is_running = leases.of_definition(definition.key) in leased
        by_key[definition.key] = _outlook(definition, row, now, has_daemon=has_daemon, is_running=is_running)
        if row is not None and row.definition_id in waiting:
            by_key[definition.key] = Outlook(by_key[definition.key].next_at, waits=True)
    return by_key


def _outlook(
    definition: Definition, row: sa.Row[Any] | None, now: dt.datetime, *, has_daemon: bool, is_running: bool
) -> Outlook:
    next_at = _first_after(definition, now)
    if not definition.enabled or next_at is None or (row is not None and row.retired_at is not None):
        return Outlook(None)
    if row is None:
        return Outlook(next_at)
    missed_at = _first_after(definition, row.slot_at or row.created_at)
    is_late = (
        missed_at is not None and missed_at < now - LATE_AFTER and (has_daemon or row.slot_at is not None)
    )
    retry_at = None if is_running else _retry_at(row)
    return Outlook(
        next_at,
        late_since=missed_at if is_late else None,
        retry_at=retry_at if retry_at is not None and retry_at < next_at else None,
    )
