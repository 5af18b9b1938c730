"""Userpilot as our tables know it: is it stopped, is a lane slow, and what was made for which environment.

A fingerprint stands for an endpoint and a key. What was queued for another one is held, definition by
definition, until a person says what to do; a fingerprint that was not known yet is taken as the first that is.
"""

import datetime as dt
import json
from typing import Any

import sqlalchemy as sa

from audience_sync.store.engines import sql
from audience_sync.store.tables import definitions, destination

ELSEWHERE = "made for another destination than the one that is configured now"
_NOT_OF_HELD_RUN = "(run_id IS NULL OR run_id NOT IN (SELECT run_id FROM {our}runs WHERE status = 'held'))"


def sort(connection: sa.Connection, fingerprint: str, now: dt.datetime) -> int:
    """Hold what is pending for other destinations, release what was held and is for this one; how many are held.

    What a definition has pending is for the destination that its members were told to, so the queue is only
    looked through where that is another one.
    """
    new = definitions.c.fingerprint.is_(None)
    other = definitions.c.fingerprint != fingerprint
    ids = {
        state: list(connection.execute(sa.select(definitions.c.definition_id).where(where)).scalars())
        for state, where in (("new", new), ("other", other))
    }
    connection.execute(definitions.update().where(new).values(fingerprint=fingerprint))
    of_calls = "definition_id IS NULL AND class = 'call' AND action IN ('identify', 'track', 'company')"
    for origin, state in (
        (of_calls, None),
        ("definition_id IN :ids", "new"),
        ("definition_id IN :ids", "other"),
    ):
        if state and not ids[state]:
            continue
        pending = f"WHERE status = 'pending' AND {origin} AND fingerprint"
        given: dict[str, Any] = {"fingerprint": fingerprint} | ({"ids": ids[state]} if state else {})
        sql(connection, f"UPDATE {{our}}deliveries SET fingerprint = :fingerprint {pending} IS NULL", **given)
        sql(
            connection,
            f"UPDATE {{our}}deliveries SET status = 'held', error = :error {pending} <> :fingerprint",
            error=ELSEWHERE,
            **given,
        )
    held = f"status = 'held' AND {_NOT_OF_HELD_RUN}"
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'pending', error = NULL, next_attempt_at = :now "
        f"WHERE {held} AND fingerprint = :fingerprint",
        now=now,
        fingerprint=fingerprint,
    )
    return int(sql(connection, f"SELECT count(*) FROM {{our}}deliveries WHERE {held}").scalar_one())


def accept(connection: sa.Connection, fingerprint: str) -> None:
    """All that belongs to other destinations belongs to this one: it is the same with a new key or address."""
    others = "fingerprint IS NULL OR fingerprint <> :fingerprint"
    sql(
        connection,
        f"UPDATE {{our}}definitions SET fingerprint = :fingerprint WHERE {others}",
        fingerprint=fingerprint,
    )
    sql(
        connection,
        "UPDATE {our}deliveries SET fingerprint = :fingerprint "
        f"WHERE status IN ('held', 'pending', 'dead') AND ({others})",
        fingerprint=fingerprint,
    )


def of_others(connection: sa.Connection, fingerprint: str) -> list[str]:
    """The keys whose members were told to another destination."""
    query = sa.select(definitions.c.key).where(
        definitions.c.fingerprint != fingerprint, definitions.c.retired_at.is_(None)
    )
    return list(connection.execute(query.order_by(definitions.c.key)).scalars())


def stopped(connection: sa.Connection) -> tuple[dt.datetime, str] | None:
    row = connection.execute(sa.select(destination)).one_or_none()
    return None if row is None or row.stopped_at is None else (row.stopped_at, row.stopped_reason)


def stop(connection: sa.Connection, now: dt.datetime, reason: str) -> None:
    _set_destination(connection, stopped_at=now, stopped_reason=reason)


def go(connection: sa.Connection) -> None:
    _set_destination(connection, stopped_at=None, stopped_reason=None)


def slow_downs(connection: sa.Connection) -> dict[str, Any]:
    return connection.execute(sa.select(destination.c.slow_downs)).scalar_one_or_none() or {}


def set_slow_downs(connection: sa.Connection, lanes: dict[str, Any]) -> None:
    _set_destination(connection, slow_downs=json.loads(json.dumps(lanes)))


def beat(connection: sa.Connection, now: dt.datetime) -> None:
    """The daemon's sign of life."""
    _set_destination(connection, heartbeat_at=now)


def last_beat(connection: sa.Connection) -> dt.datetime | None:
    return connection.execute(sa.select(destination.c.heartbeat_at)).scalar_one_or_none()


def _set_destination(connection: sa.Connection, **values: Any) -> None:
    if connection.execute(destination.update().values(**values)).rowcount == 0:
        connection.execute(destination.insert().values(**({"destination_id": 1, "slow_downs": {}} | values)))
