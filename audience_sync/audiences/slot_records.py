"""Due moments of definitions that were taken. Taking is an insert: of two daemons one gets the slot."""

import datetime as dt
from typing import Any

import sqlalchemy as sa

from audience_sync.db.dialects import sql
from audience_sync.db.tables import runs, schedule_slots

CUT_OFF_AFTER = dt.timedelta(minutes=1)  # a slot without a run by then lost its process


def last(connection: sa.Connection, definition_id: int, now: dt.datetime) -> sa.Row[Any] | None:
    """The newest slot that was taken, with its run's status. One beyond now was taken by a clock that was wrong."""
    return connection.execute(
        sa.select(schedule_slots, runs.c.status)
        .join(runs, runs.c.run_id == schedule_slots.c.run_id, isouter=True)
        .where(schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at <= now)
        .order_by(schedule_slots.c.slot_at.desc())
        .limit(1)
    ).one_or_none()


def take(connection: sa.Connection, definition_id: int, slot_at: dt.datetime, now: dt.datetime) -> bool:
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


def take_over(connection: sa.Connection, slot: sa.Row[Any], now: dt.datetime) -> bool:
    """Whether a slot, whose process is gone, is ours now."""
    taken = connection.execute(
        schedule_slots.update()
        .where(*_is(slot.definition_id, slot.slot_at), schedule_slots.c.taken_at == slot.taken_at)
        .values(taken_at=now, run_id=None)
    )
    return taken.rowcount == 1


def give_back(
    connection: sa.Connection, definition_id: int, slot_at: dt.datetime, taken_at: dt.datetime
) -> None:
    """It is due again, unless somebody else took it over meanwhile."""
    mine = schedule_slots.c.taken_at == taken_at
    connection.execute(schedule_slots.delete().where(*_is(definition_id, slot_at), mine))


def before(connection: sa.Connection, definition_id: int, slot_at: dt.datetime) -> dt.datetime | None:
    """The slot that was taken before one."""
    newest = sa.func.max(schedule_slots.c.slot_at, type_=schedule_slots.c.slot_at.type)
    earlier = (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at < slot_at)
    moment: dt.datetime | None = connection.execute(sa.select(newest).where(*earlier)).scalar()
    return moment


def note_run(connection: sa.Connection, definition_id: int, slot_at: dt.datetime, run_id: int) -> None:
    connection.execute(schedule_slots.update().where(*_is(definition_id, slot_at)).values(run_id=run_id))


def is_cut_off(slot: sa.Row[Any], now: dt.datetime) -> bool:
    """Whether the slot's run did not end, or never began; whether its process lives, the lease tells."""
    if slot.run_id is None:
        return bool(slot.taken_at < now - CUT_OFF_AFTER)
    return slot.status in {"running", "abandoned"}


def _is(definition_id: int, slot_at: dt.datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (schedule_slots.c.definition_id == definition_id, schedule_slots.c.slot_at == slot_at)
