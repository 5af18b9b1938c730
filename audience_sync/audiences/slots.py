"""Decide which slots are due, from the schedules and the slots taken so far, and take them.

After downtime only the newest missed slot runs, as a full run if any missed slot was a full one. A new definition
starts with the first slot after its row was inserted. While a definition has a run held by `sync --hold`, none of its
slots is due. Taking a slot is an insert, so only one of two daemons gets it. daemon.py runs the slots that it takes.
"""

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from audience_sync.audiences import records
from audience_sync.audiences.definition import Definition
from audience_sync.db import engines, leases
from audience_sync.db.dialects import sql
from audience_sync.db.tables import runs, schedule_slots

CUT_OFF_AFTER = dt.timedelta(minutes=1)  # if a taken slot has no run by then, its process is gone
LATE_AFTER = dt.timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class Slot:
    definition: Definition
    definition_id: int
    slot_at: dt.datetime
    taken_at: dt.datetime
    full: bool


@dataclass(frozen=True, slots=True)
class Outlook:
    """A definition's next slot; None without a schedule.

    `is_late`: an earlier slot was not taken. `waits`: no slot is due until somebody decides about a held run.
    """

    next_at: dt.datetime | None
    is_late: bool = False
    waits: bool = False


@dataclass(frozen=True, slots=True)
class _Missed:
    """The newest missed slot; `full`: a full one is among the missed."""

    slot_at: dt.datetime
    full: bool


def take_due(
    engine: sa.Engine,
    definitions: Sequence[Definition],
    now: dt.datetime,
    *,
    limit: int,
    running: Collection[str] = (),
) -> list[Slot]:
    """Take at most `limit` due slots of these definitions; `running` are keys to skip."""
    taken: list[Slot] = []
    with engines.write(engine) as connection:
        for definition in definitions:
            if len(taken) >= limit:
                break
            if definition.key in running or not (definition.schedule or definition.full_schedule):
                continue
            slot = _due(connection, definition, now)
            if slot and _take(connection, slot, now):
                taken.append(slot)
    return taken


def _due(connection: sa.Connection, definition: Definition, now: dt.datetime) -> Slot | None:
    """Return the newest missed slot, or the last one if its run was cut off and its lease is free."""
    definition_id = records.register_definition(connection, definition, now)
    row = records.find_definition(connection, definition.key)
    if row is None or row.retired_at is not None or _waits(connection, definition_id):
        return None
    last = _last(connection, definition_id, now)
    missed = _missed(definition, last.slot_at if last else row.created_at, now)
    if missed is not None:
        return Slot(definition, definition_id, missed.slot_at, now, missed.full)
    if last is None or not _is_cut_off(last, now):
        return None
    if leases.holder(connection, leases.of_definition(definition.key)):
        return None
    since = _last_before(connection, definition_id, last.slot_at) or row.created_at
    again = _missed(definition, since, last.slot_at)
    return Slot(definition, definition_id, last.slot_at, now, full=again is not None and again.full)


def _take(connection: sa.Connection, slot: Slot, now: dt.datetime) -> bool:
    """Insert the slot, or take it over from a process that is gone; return False if another process has it."""
    inserted = sql(
        connection,
        "INSERT INTO {our}schedule_slots (definition_id, slot_at, taken_at) "
        "VALUES (:definition_id, :slot_at, :now) ON CONFLICT DO NOTHING",
        definition_id=slot.definition_id,
        slot_at=slot.slot_at,
        now=now,
    )
    if inserted.rowcount == 1:
        return True
    last = _last(connection, slot.definition_id, now)
    if last is None or last.slot_at != slot.slot_at or not _is_cut_off(last, now):
        return False
    taken_over = connection.execute(
        schedule_slots.update()
        .where(*_is_slot(slot.definition_id, slot.slot_at), schedule_slots.c.taken_at == last.taken_at)
        .values(taken_at=now, run_id=None)
    )
    return taken_over.rowcount == 1


def _missed(definition: Definition, after: dt.datetime, until: dt.datetime) -> _Missed | None:
    incremental = definition.schedule and definition.schedule.latest(after, until)
    full = definition.full_schedule and definition.full_schedule.latest(after, until)
    moments = [moment for moment in (incremental, full) if moment]
    return _Missed(max(moments), full is not None) if moments else None


def _waits(connection: sa.Connection, definition_id: int) -> bool:
    held = records.find_held_run(connection, definition_id)
    return held is not None and held.held_by == "hold"


def _last(connection: sa.Connection, definition_id: int, now: dt.datetime) -> sa.Row[Any] | None:
    """Return the newest taken slot with its run's status. Slots after `now` come from a clock that was wrong."""
    return connection.execute(
        sa.select(schedule_slots, runs.c.status)
        .join(runs, runs.c.run_id == schedule_slots.c.run_id, isouter=True)
        .where(schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at <= now)
        .order_by(schedule_slots.c.slot_at.desc())
        .limit(1)
    ).one_or_none()


def _last_before(connection: sa.Connection, definition_id: int, slot_at: dt.datetime) -> dt.datetime | None:
    newest = sa.func.max(schedule_slots.c.slot_at, type_=schedule_slots.c.slot_at.type)
    earlier = (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at < slot_at)
    moment: dt.datetime | None = connection.execute(sa.select(newest).where(*earlier)).scalar()
    return moment


def _is_cut_off(slot: sa.Row[Any], now: dt.datetime) -> bool:
    """Return whether the slot's run did not start or did not end; the lease shows whether its process is alive."""
    if slot.run_id is None:
        return bool(slot.taken_at < now - CUT_OFF_AFTER)
    return slot.status in {"running", "abandoned"}


def _is_slot(definition_id: int, slot_at: dt.datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at == slot_at)


def record_run(connection: sa.Connection, definition_id: int, slot_at: dt.datetime, run_id: int) -> None:
    connection.execute(schedule_slots.update().where(*_is_slot(definition_id, slot_at)).values(run_id=run_id))


def give_back(connection: sa.Connection, slot: Slot) -> None:
    """Make the slot due again, unless another process has taken it over."""
    is_ours = schedule_slots.c.taken_at == slot.taken_at
    connection.execute(schedule_slots.delete().where(*_is_slot(slot.definition_id, slot.slot_at), is_ours))


def outlook(connection: sa.Connection, definition: Definition, now: dt.datetime) -> Outlook:
    """Return what `list` and `status` show of a definition's schedule."""
    schedules = [schedule for schedule in (definition.schedule, definition.full_schedule) if schedule]
    row = records.find_definition(connection, definition.key)
    if not schedules or not definition.enabled or (row is not None and row.retired_at is not None):
        return Outlook(None)
    next_at = min(schedule.next(now) for schedule in schedules)
    if row is None:
        return Outlook(next_at)
    last = _last(connection, row.definition_id, now)
    missed = _missed(definition, last.slot_at if last else row.created_at, now)
    return Outlook(
        next_at,
        is_late=last is not None and missed is not None and missed.slot_at < now - LATE_AFTER,
        waits=_waits(connection, row.definition_id),
    )
