"""What a person does about deliveries that were refused, or that nobody should hear of."""

import datetime as dt
from collections.abc import Collection

import sqlalchemy as sa

from audience_sync.db import tables
from audience_sync.db.dialects import chunks
from audience_sync.db.tables import DEAD
from audience_sync.queue import deliveries


def retry(connection: sa.Connection, ids: Collection[int] | None, now: dt.datetime) -> tuple[int, list[str]]:
    """Give dead deliveries (None: all of them) a new attempt; how many, and why the others did not get one.

    A value that a newer delivery for the same subject and trait has overtaken stays dead, whatever became of
    the newer one: each change of a membership is a delivery, so the older value is not true any more.
    """
    if ids is None:
        dead = (
            sa.select(tables.deliveries.c.delivery_id).where(DEAD).order_by(tables.deliveries.c.delivery_id)
        )
        ids = connection.execute(dead).scalars().all()
    count, reasons = 0, []
    for chunk in chunks(ids):
        found = connection.execute(
            sa.select(tables.deliveries).where(tables.deliveries.c.delivery_id.in_(chunk))
        ).all()
        rows = {row.delivery_id: row for row in found}
        newer = deliveries.superseded_traits(connection, [row for row in found if row.status == "dead"])
        retried = []
        for delivery_id in chunk:
            row = rows.get(delivery_id)
            if row is None:
                reasons.append(f"There is no delivery {delivery_id}.")
            elif row.status != "dead":
                reasons.append(f"Delivery {delivery_id} is {row.status}, not dead.")
            elif row.body and newer.get(delivery_id, set()).issuperset(row.body):
                reasons.append(f"Delivery {delivery_id} is {deliveries.SUPERSEDED}.")
            else:
                retried.append(delivery_id)
        count += connection.execute(
            tables.deliveries.update()
            .where(tables.deliveries.c.delivery_id.in_(retried), tables.deliveries.c.status == "dead")
            .values(
                status="pending",
                settled_at=None,
                next_attempt_at=now,
                first_attempt_at=None,  # the four hours begin anew
                quiet_until=None,
                alone=False,
            )
        ).rowcount
    return count, reasons


def discard(connection: sa.Connection, ids: Collection[int], now: dt.datetime) -> int:
    """Cancel dead and pending deliveries, and held ones that no held run waits with; Userpilot is not told."""
    held_runs = sa.select(tables.runs.c.run_id).where(tables.runs.c.status == "held")
    is_free = sa.or_(tables.deliveries.c.run_id.is_(None), tables.deliveries.c.run_id.not_in(held_runs))
    may_go = sa.or_(
        tables.deliveries.c.status.in_(("dead", "pending")),
        sa.and_(tables.deliveries.c.status == "held", is_free),
    )
    return sum(
        connection.execute(
            tables.deliveries.update()
            .where(tables.deliveries.c.delivery_id.in_(chunk), may_go)
            .values(
                status="cancelled",
                settled_at=now,
                error=sa.func.coalesce(tables.deliveries.c.error.concat("; "), "").concat(
                    "discarded by hand"
                ),
                quiet_until=None,
            )
        ).rowcount
        for chunk in chunks(ids)
    )
