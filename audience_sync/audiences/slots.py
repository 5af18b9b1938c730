"""What is due: decided from the schedules and the slots that the database says were taken.

After downtime the newest missed slot is caught up, once, as a full run if a full slot was among the missed. A
definition that was never scheduled starts with the first slot after it was first seen. While a run waits that a
person asked to wait (`sync --hold`), its definition's slots wait too.
"""

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from audience_sync.audiences import records, slot_records
from audience_sync.audiences.definition import Definition
from audience_sync.db import engines, leases

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
    definition_id = records.register(connection, definition, now)
    row = records.find(connection, definition.key)
    if row is None or row.retired_at is not None or _waits(connection, definition_id):
        return None
    last = slot_records.last(connection, definition_id, now)
    after = last.slot_at if last else row.created_at
    found = _latest(definition, after, now)
    if found is not None:
        slot_at, full = found
        return Slot(definition, definition_id, slot_at, now, full)
    if last is None or not slot_records.is_cut_off(last, now):
        return None
    if leases.holder(connection, leases.of_definition(definition.key)):
        return None
    since = slot_records.before(connection, definition_id, last.slot_at) or row.created_at
    missed = _latest(definition, since, last.slot_at)
    return Slot(definition, definition_id, last.slot_at, now, full=missed is not None and missed[1])


def _take(connection: sa.Connection, slot: Slot, now: dt.datetime) -> bool:
    if slot_records.take(connection, slot.definition_id, slot.slot_at, now):
        return True
    last = slot_records.last(connection, slot.definition_id, now)
    is_same = last is not None and last.slot_at == slot.slot_at
    return bool(
        is_same
        and last
        and slot_records.is_cut_off(last, now)
        and slot_records.take_over(connection, last, now)
    )


def _latest(
    definition: Definition, after: dt.datetime, until: dt.datetime
) -> tuple[dt.datetime, bool] | None:
    """The newest slot after a moment, and whether a full one is among them."""
    ordinary = definition.schedule and definition.schedule.latest(after, until)
    full = definition.full_schedule and definition.full_schedule.latest(after, until)
    found = [each for each in (ordinary, full) if each]
    return (max(found), full is not None) if found else None


def _waits(connection: sa.Connection, definition_id: int) -> bool:
    held = records.held(connection, definition_id)
    return held is not None and held.held_by == "hold"


def outlook(connection: sa.Connection, definition: Definition, now: dt.datetime) -> Outlook:
    """What comes next for a definition, as `list` and `status` show it."""
    schedules = [each for each in (definition.schedule, definition.full_schedule) if each]
    row = records.find(connection, definition.key)
    if not schedules or not definition.enabled or (row is not None and row.retired_at is not None):
        return Outlook(None)
    next_at = min(each.next(now) for each in schedules)
    if row is None:
        return Outlook(next_at)
    last = slot_records.last(connection, row.definition_id, now)
    missed = _latest(definition, last.slot_at if last else row.created_at, now)
    return Outlook(
        next_at,
        is_late=last is not None and missed is not None and missed[0] < now - LATE_AFTER,
        waits=_waits(connection, row.definition_id),
    )
