"""What is due: decided from the schedules and the slots that the database says were taken.

After downtime the newest missed slot is caught up, once, as a full run if a full slot was among the missed. A
definition that was never scheduled starts with the first slot after it was first seen. While a run waits that a
person asked to wait (`sync --hold`), its definition's slots wait too.
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

CUT_OFF_AFTER = dt.timedelta(minutes=1)  # a slot without a run by then lost its process
LATE_AFTER = dt.timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class Slot:
    """A due moment of a definition."""

    definition: Definition
    definition_id: int
    slot_at: dt.datetime
    taken_at: dt.datetime
    full: bool


@dataclass(frozen=True, slots=True)
class Outlook:
    """A definition's next slot, None without a schedule; whether it is past and not taken, or waits for a person."""

    next_at: dt.datetime | None
    is_late: bool = False
    waits: bool = False


def take_due(
    engine: sa.Engine,
    definitions: Sequence[Definition],
    now: dt.datetime,
    *,
    limit: int,
    but: Collection[str] = (),
) -> list[Slot]:
    """Take what is due of these definitions, at most `limit`; `but`: keys that run already."""
    taken: list[Slot] = []
    with engines.write(engine) as connection:
        for definition in definitions:
            if len(taken) >= limit:
                break
            if definition.key in but or not (definition.schedule or definition.full_schedule):
                continue
            slot = _due(connection, definition, now)
            if slot and _take(connection, slot, now):
                taken.append(slot)
    return taken


def _due(connection: sa.Connection, definition: Definition, now: dt.datetime) -> Slot | None:
    definition_id = records.register_definition(connection, definition, now)
    row = records.find_definition(connection, definition.key)
    if row is None or row.retired_at is not None or _waits(connection, definition_id):
        return None
    last = last_slot(connection, definition_id, now)
    after = last.slot_at if last else row.created_at
    found = _latest(definition, after, now)
    if found is not None:
        slot_at, full = found
        return Slot(definition, definition_id, slot_at, now, full)
    if last is None or not is_cut_off(last, now):
        return None
    if leases.holder(connection, leases.of_definition(definition.key)):
        return None
    since = slot_before(connection, definition_id, last.slot_at) or row.created_at
    missed = _latest(definition, since, last.slot_at)
    return Slot(definition, definition_id, last.slot_at, now, full=missed is not None and missed[1])


def _take(connection: sa.Connection, slot: Slot, now: dt.datetime) -> bool:
    if take_slot(connection, slot.definition_id, slot.slot_at, now):
        return True
    last = last_slot(connection, slot.definition_id, now)
    is_same = last is not None and last.slot_at == slot.slot_at
    return bool(is_same and last and is_cut_off(last, now) and take_over_slot(connection, last, now))


def _latest(
    definition: Definition, after: dt.datetime, until: dt.datetime
) -> tuple[dt.datetime, bool] | None:
    """The newest slot after a moment, and whether a full one is among them."""
    ordinary = definition.schedule and definition.schedule.latest(after, until)
    full = definition.full_schedule and definition.full_schedule.latest(after, until)
    found = [each for each in (ordinary, full) if each]
    return (max(found), full is not None) if found else None


def _waits(connection: sa.Connection, definition_id: int) -> bool:
    held = records.find_held_run(connection, definition_id)
    return held is not None and held.held_by == "hold"


def outlook(connection: sa.Connection, definition: Definition, now: dt.datetime) -> Outlook:
    """What comes next for a definition, as `list` and `status` show it."""
    schedules = [each for each in (definition.schedule, definition.full_schedule) if each]
    row = records.find_definition(connection, definition.key)
    if not schedules or not definition.enabled or (row is not None and row.retired_at is not None):
        return Outlook(None)
    next_at = min(each.next(now) for each in schedules)
    if row is None:
        return Outlook(next_at)
    last = last_slot(connection, row.definition_id, now)
    missed = _latest(definition, last.slot_at if last else row.created_at, now)
    return Outlook(
        next_at,
        is_late=last is not None and missed is not None and missed[0] < now - LATE_AFTER,
        waits=_waits(connection, row.definition_id),
    )


def last_slot(connection: sa.Connection, definition_id: int, now: dt.datetime) -> sa.Row[Any] | None:
    """The newest slot that was taken, with its run's status. One beyond now was taken by a clock that was wrong."""
    return connection.execute(
        sa.select(schedule_slots, runs.c.status)
        .join(runs, runs.c.run_id == schedule_slots.c.run_id, isouter=True)
        .where(schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at <= now)
        .order_by(schedule_slots.c.slot_at.desc())
        .limit(1)
    ).one_or_none()


def take_slot(connection: sa.Connection, definition_id: int, slot_at: dt.datetime, now: dt.datetime) -> bool:
    """Whether the slot is ours."""
    taken = sql(
        connection,
        "INSERT INTO {our}schedule_slots (definition_id, slot_at, taken_at) "
        "VALUES (:definition_id, :slot_at, :now) ON CONFLICT DO NOTHING",
        definition_id=definition_id,
        slot_at=slot_at,
        now=now,
    )
    return taken.rowcount == 1


def take_over_slot(connection: sa.Connection, slot: sa.Row[Any], now: dt.datetime) -> bool:
    """Whether a slot, whose process is gone, is ours now."""
    taken = connection.execute(
        schedule_slots.update()
        .where(*_is(slot.definition_id, slot.slot_at), schedule_slots.c.taken_at == slot.taken_at)
        .values(taken_at=now, run_id=None)
    )
    return taken.rowcount == 1


def give_back_slot(
    connection: sa.Connection, definition_id: int, slot_at: dt.datetime, taken_at: dt.datetime
) -> None:
    """It is due again, unless somebody else took it over meanwhile."""
    mine = schedule_slots.c.taken_at == taken_at
    connection.execute(schedule_slots.delete().where(*_is(definition_id, slot_at), mine))


def slot_before(connection: sa.Connection, definition_id: int, slot_at: dt.datetime) -> dt.datetime | None:
    """The slot that was taken before one."""
    newest = sa.func.max(schedule_slots.c.slot_at, type_=schedule_slots.c.slot_at.type)
    earlier = (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at < slot_at)
    moment: dt.datetime | None = connection.execute(sa.select(newest).where(*earlier)).scalar()
    return moment


def record_slot_run(connection: sa.Connection, definition_id: int, slot_at: dt.datetime, run_id: int) -> None:
    connection.execute(schedule_slots.update().where(*_is(definition_id, slot_at)).values(run_id=run_id))


def is_cut_off(slot: sa.Row[Any], now: dt.datetime) -> bool:
    """Whether the slot's run did not end, or never began; whether its process lives, the lease tells."""
    if slot.run_id is None:
        return bool(slot.taken_at < now - CUT_OFF_AFTER)
    return slot.status in {"running", "abandoned"}


def _is(definition_id: int, slot_at: dt.datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at == slot_at)
