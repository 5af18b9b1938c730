"""Userpilot as our tables know it: is it stopped, is a lane slow, and what was made for which environment.

A fingerprint stands for an endpoint and a key. What was queued for another one is held, definition by
definition, until a person says what to do; a fingerprint that was not known yet is taken as the first that is.
"""

import datetime as dt
import json
from typing import Any

import sqlalchemy as sa

from audience_sync.db.dialects import sql
from audience_sync.db.tables import definitions, destination

OTHER_DESTINATION = "made for another destination than the one that is configured now"
_NOT_OF_HELD_RUN = "(run_id IS NULL OR run_id NOT IN (SELECT run_id FROM {our}runs WHERE status = 'held'))"


def is_foreign(connection: sa.Connection, known: str | None, wanted: str | None) -> bool:
    """Whether what is for a destination must not go to the one that is wanted."""
    return bool(known and wanted and known != wanted) and has_accepted(connection, known or "")


def has_accepted(connection: sa.Connection, fingerprint: str) -> bool:
    """False where the key was refused before anything was accepted: then any other may take its place."""
    if stopped(connection) is None:
        return True
    kept = (
        "SELECT 1 FROM {our}deliveries WHERE fingerprint = :fingerprint AND status IN ('accepted', 'sending')"
    )
    counted = (
        "SELECT 1 FROM {our}runs r JOIN {our}definitions d ON d.definition_id = r.definition_id "
        "WHERE d.fingerprint = :fingerprint AND r.accepted_count > 0"
    )
    return any(
        sql(connection, f"{query} LIMIT 1", fingerprint=fingerprint).first() is not None
        for query in (kept, counted)
    )


def adopt(connection: sa.Connection, definition_ids: list[int], fingerprint: str) -> None:
    """What these definitions have told, or have to tell, belongs to this destination."""
    if not definition_ids:
        return
    other = "(fingerprint IS NULL OR fingerprint <> :fingerprint) AND definition_id IN :ids"
    given: dict[str, Any] = {"fingerprint": fingerprint, "ids": definition_ids}
    sql(connection, f"UPDATE {{our}}definitions SET fingerprint = :fingerprint WHERE {other}", **given)
    sql(
        connection,
        "UPDATE {our}deliveries SET fingerprint = :fingerprint "
        f"WHERE status IN ('held', 'pending', 'sending', 'dead') AND {other}",
        **given,
    )


def hold_foreign(connection: sa.Connection, fingerprint: str, now: dt.datetime) -> int:
    """Hold what is pending for other destinations, release what was held and is for this one; how many are held.

    What a definition has pending is for the destination that its members were told to, so the queue is only
    looked through where that is another one.
    """
    rows = connection.execute(
        sa.select(definitions.c.definition_id, definitions.c.fingerprint).where(
            sa.or_(definitions.c.fingerprint.is_(None), definitions.c.fingerprint != fingerprint)
        )
    ).all()
    heard = {known: has_accepted(connection, known) for _, known in rows if known}
    adopt(connection, [each for each, known in rows if not heard.get(known)], fingerprint)
    if others := [each for each, known in rows if heard.get(known)]:
        _hold(connection, "definition_id IN :ids", fingerprint, ids=others)
    _sort_calls(connection, fingerprint, heard)
    held = f"status = 'held' AND {_NOT_OF_HELD_RUN}"
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'pending', error = NULL, next_attempt_at = :now "
        f"WHERE {held} AND fingerprint = :fingerprint",
        now=now,
        fingerprint=fingerprint,
    )
    return int(sql(connection, f"SELECT count(*) FROM {{our}}deliveries WHERE {held}").scalar_one())


def _sort_calls(connection: sa.Connection, fingerprint: str, heard: dict[str, bool]) -> None:
    of_calls = "status = 'pending' AND class = 'call' AND action IN ('identify', 'track', 'company')"
    known = sql(
        connection,
        f"SELECT DISTINCT fingerprint FROM {{our}}deliveries WHERE {of_calls} "
        "AND (fingerprint IS NULL OR fingerprint <> :fingerprint)",
        fingerprint=fingerprint,
    ).scalars()
    for other in known.all():
        if other and (heard[other] if other in heard else has_accepted(connection, other)):
            _hold(connection, f"{of_calls} AND fingerprint = :other", fingerprint, other=other)
        else:
            same = "fingerprint IS NULL" if other is None else "fingerprint = :other"
            given = {"fingerprint": fingerprint} | ({} if other is None else {"other": other})
            sql(
                connection,
                f"UPDATE {{our}}deliveries SET fingerprint = :fingerprint WHERE {of_calls} AND {same}",
                **given,
            )


def _hold(connection: sa.Connection, where: str, fingerprint: str, **given: Any) -> None:
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'held', error = :error "
        f"WHERE status = 'pending' AND fingerprint <> :fingerprint AND {where}",
        error=OTHER_DESTINATION,
        fingerprint=fingerprint,
        **given,
    )


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
        f"UPDATE {{our}}bulk_jobs SET fingerprint = :fingerprint WHERE settled_at IS NULL AND ({others})",
        fingerprint=fingerprint,
    )
    sql(
        connection,
        "UPDATE {our}deliveries SET fingerprint = :fingerprint "
        f"WHERE status IN ('held', 'pending', 'sending', 'dead') AND ({others})",
        fingerprint=fingerprint,
    )


def foreign_keys(connection: sa.Connection, fingerprint: str) -> list[str]:
    """The keys whose members were told to another destination."""
    query = sa.select(definitions.c.key, definitions.c.fingerprint).where(
        definitions.c.fingerprint != fingerprint, definitions.c.retired_at.is_(None)
    )
    rows = connection.execute(query.order_by(definitions.c.key)).all()
    return [key for key, known in rows if has_accepted(connection, known)]


def stopped(connection: sa.Connection) -> tuple[dt.datetime, str] | None:
    row = connection.execute(sa.select(destination)).one_or_none()
    return None if row is None or row.stopped_at is None else (row.stopped_at, row.stopped_reason)


def stop(connection: sa.Connection, now: dt.datetime, reason: str) -> None:
    _set_destination(connection, stopped_at=now, stopped_reason=reason)


def resume(connection: sa.Connection) -> None:
    _set_destination(connection, stopped_at=None, stopped_reason=None)


def slow_downs(connection: sa.Connection) -> dict[str, Any]:
    return connection.execute(sa.select(destination.c.slow_downs)).scalar_one_or_none() or {}


def set_slow_downs(connection: sa.Connection, lanes: dict[str, Any]) -> None:
    _set_destination(connection, slow_downs=json.loads(json.dumps(lanes)))


def record_heartbeat(connection: sa.Connection, now: dt.datetime) -> None:
    """The daemon's sign of life."""
    _set_destination(connection, heartbeat_at=now)


def last_heartbeat(connection: sa.Connection) -> dt.datetime | None:
    return connection.execute(sa.select(destination.c.heartbeat_at)).scalar_one_or_none()


def _set_destination(connection: sa.Connection, **values: Any) -> None:
    if connection.execute(destination.update().values(**values)).rowcount == 0:
        connection.execute(destination.insert().values(**({"destination_id": 1, "slow_downs": {}} | values)))
