"""The life of a delivery: every statement that writes `deliveries`, except that retention/ deletes rows.

| from                | to        | when                                                   | by                           |
| ------------------- | --------- | ------------------------------------------------------ | ---------------------------- |
| -                   | pending   | its call is saved                                      | enqueue_calls                |
| -                   | pending   | its run is committed                                   | enqueue                      |
| -                   | held      | its run is held                                        | enqueue                      |
| -                   | cancelled | the user left before anything was sent                 | enqueue                      |
| held                | pending   | its run is approved                                    | release_run                  |
| held                | pending   | its destination is the configured one again            | release_own                  |
| held                | cancelled | its run is rejected, or replaced by a newer one        | cancel_run                   |
| pending             | sending   | claimed for a request that is about to be sent         | claim, start_in_job          |
| pending             | held      | made for another destination                           | hold_definitions, hold_calls |
| pending             | cancelled | Userpilot has accepted a newer value                   | choose_next                  |
| pending             | cancelled | the user left before anything was sent                 | cancel_never_attempted       |
| sending             | accepted  | 2xx, or its bulk job completed                         | settle, settle_job           |
| sending             | cancelled | a newer value in the same request was accepted         | settle, settle_job           |
| sending             | pending   | no answer, a slow-down, a refused merge, a failed job  | settle, settle_job           |
| sending             | pending   | the process that was sending it is gone                | recover                      |
| sending             | dead      | refused for good, attempts exhausted, or a track that  | settle, recover              |
|                     |           | must not be repeated                                   |                              |
| dead                | pending   | retried, or a later run finds the value still current  | retry, revive                |
| held, pending, dead | cancelled | a full run sends everything to another destination     | cancel_foreign               |
| held, pending, dead | cancelled | discarded                                              | discard                      |

Each transition is guarded by the status that it comes from. `assign_destination` and `assign_calls` change no status.
What may be claimed is in due.py; what an answer means, in outcomes.py. Every function runs in its caller's transaction.
"""

import datetime as dt
import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from audience_sync.db import rows, tables
from audience_sync.db.dialects import chunks, is_sqlite, sql
from audience_sync.db.tables import DEAD, SENDING
from audience_sync.queue import due, outcomes
from audience_sync.queue.outcomes import SUPERSEDED, Delivery, Settlement, Status

NEVER_SENT = "left before anything was sent"
PROCESS_ENDED = "The process ended before the answer came"
_NOT_OF_HELD_RUN = "(run_id IS NULL OR run_id NOT IN (SELECT run_id FROM {our}runs WHERE status = 'held'))"
BY_SUBJECT_INDEX = (
    "d.status IN ('pending', 'sending')"  # a condition of ix_deliveries_unsettled, for SQLite to see it
)
_CALLS = "class = 'call' AND action IN ('identify', 'track', 'company')"  # as the index for claims begins


# Queueing


class CallDelivery(NamedTuple):
    """A delivery of a call, as `rows.insert` takes it: the body is JSON text, the time `rows.moment`."""

    action: str
    subject_id: str
    body: str
    call_id: int
    value_at: str


_CALL_COLUMNS = (*CallDelivery._fields, "class", "fingerprint", "status", "created_at", "next_attempt_at")


def enqueue_calls(
    connection: sa.Connection,
    deliveries: Sequence[CallDelivery],
    fingerprint: str | None,
    now: dt.datetime,
) -> None:
    """Queue the deliveries of calls, in this order."""
    at = rows.moment(now)
    queued = [(*delivery, "call", fingerprint, "pending", at, at) for delivery in deliveries]
    rows.insert(connection, tables.deliveries, _CALL_COLUMNS, queued)


@dataclass(frozen=True, slots=True)
class RunOrigin:
    """What all deliveries of a run have in common; `fingerprint` is its destination."""

    run_id: int
    definition_id: int
    delivery_class: str
    value_at: dt.datetime
    fingerprint: str | None


def enqueue(
    connection: sa.Connection,
    origin: RunOrigin,
    status: Status,
    body: str,
    source: str,
    now: dt.datetime,
    **parameters: Any,
) -> None:
    """Queue an identify for each row of a query; cancelled ones because the user left before anything was sent.

    `source` is the query from its FROM on, with a column `user_id`; `body` is an expression over its columns, of
    JSON text. Both are SQL, with these parameters.
    """
    is_cancelled = status is Status.CANCELLED
    json_body = f"({body})" if is_sqlite(connection) else f"CAST({body} AS json)"
    sql(
        connection,
        "INSERT INTO {our}deliveries (action, subject_id, body, class, run_id, definition_id, value_at, "
        f"fingerprint, status, created_at, next_attempt_at{', settled_at, error' if is_cancelled else ''}) "
        f"SELECT 'identify', user_id, {json_body}, :class, :run_id, :definition_id, :value_at, "
        f":fingerprint, :status, :now, :now{', :now, :error' if is_cancelled else ''} {source} ORDER BY user_id",
        **{"class": origin.delivery_class},
        run_id=origin.run_id,
        definition_id=origin.definition_id,
        value_at=origin.value_at,
        fingerprint=origin.fingerprint,
        status=status.value,
        now=now,
        **({"error": NEVER_SENT} if is_cancelled else {}),
        **parameters,
    )


# Claiming and settling requests


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """A request that is about to be sent: its row in `requests`, and its deliveries, oldest value first."""

    request_id: int
    action: str
    subject_id: str
    is_push: bool
    deliveries: list[Delivery]


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that was answered, or never will be, and what becomes of its deliveries."""

    request_id: int
    ended_at: dt.datetime
    status_code: int | None
    x_request_id: str | None
    error: str | None
    settlements: list[Settlement]


def choose_next(
    connection: sa.Connection, action: str, subjects: Sequence[str], now: dt.datetime, fingerprint: str | None
) -> list[list[Delivery]]:
    """Return the deliveries of each subject's next request, and cancel what accepted values have superseded."""
    pending = due.pending_of(connection, action, subjects, now, fingerprint)
    chosen = [outcomes.select_next(group, now) for group in pending]
    late = [delivery for delivery in itertools.chain(*chosen) if delivery.is_call or delivery.isolated]
    newer = due.superseded_traits(connection, late, [Status.ACCEPTED])
    if not newer:
        return [group for group in chosen if group]
    trimmed = [outcomes.without_superseded(group, newer) for group in chosen]
    if superseded := [delivery_id for group in trimmed for delivery_id in group.superseded]:
        _cancel_superseded(connection, superseded, now)
    return [group.left for group in trimmed if group.left]


def claim(
    connection: sa.Connection,
    lane: str,
    epoch: int,
    chosen: Sequence[list[Delivery]],
    now: dt.datetime,
    *,
    is_push: bool,
) -> list[ClaimedRequest]:
    """Record a request for each list, before it is sent, and mark its deliveries as sending."""
    inserted = connection.execute(
        _INSERT_REQUEST,
        [{"lane": lane, "epoch": epoch, "started_at": now, "delivery_count": len(group)} for group in chosen],
    )
    claims = [
        ClaimedRequest(request_id, lane, group[0].subject_id, is_push, group)
        for request_id, group in zip(inserted.scalars(), chosen, strict=True)
    ]
    connection.execute(
        _CLAIM,
        [
            {"id": delivery.delivery_id, "request": claimed.request_id, "first": delivery.first_attempt_at}
            for claimed in claims
            for delivery in claimed.deliveries
        ],
    )
    return claims


_INSERT_REQUEST = tables.requests.insert().returning(
    tables.requests.c.request_id, sort_by_parameter_order=True
)
_CLAIM = (
    tables.deliveries.update()
    .where(tables.deliveries.c.delivery_id == sa.bindparam("id"), tables.deliveries.c.status == "pending")
    .values(
        status="sending",
        request_id=sa.bindparam("request"),
        attempt_count=tables.deliveries.c.attempt_count + 1,
        first_attempt_at=sa.bindparam("first"),
        quiet_until=None,
    )
)


def settle(connection: sa.Connection, ended: Sequence[EndedRequest]) -> None:
    """Record how requests ended, and give their deliveries the state that follows."""
    connection.execute(
        _END_REQUEST,
        [
            {
                "id": request.request_id,
                "ended": request.ended_at,
                "code": request.status_code,
                "x_id": request.x_request_id,
                "message": request.error,
            }
            for request in ended
        ],
    )
    connection.execute(
        _SETTLE,
        [
            {
                "id": settlement.delivery_id,
                "request": request.request_id,
                "to": settlement.status.value,
                "message": settlement.error,
                "settled": request.ended_at if settlement.status is not Status.PENDING else None,
                "next": settlement.next_attempt_at,
                "grace": settlement.grace_until,
                "isolated": settlement.isolated,
                "no_attempt": 0 if settlement.was_attempt else 1,
            }
            for request in ended
            for settlement in request.settlements
        ],
    )


_END_REQUEST = (
    tables.requests.update()
    .where(tables.requests.c.request_id == sa.bindparam("id"))
    .values(
        ended_at=sa.bindparam("ended"),
        status_code=sa.bindparam("code"),
        x_request_id=sa.bindparam("x_id"),
        error=sa.bindparam("message"),
    )
)
_SETTLE = (
    tables.deliveries.update()
    .where(
        tables.deliveries.c.delivery_id == sa.bindparam("id"),
        tables.deliveries.c.status == "sending",
        tables.deliveries.c.request_id == sa.bindparam("request"),
    )
    .values(
        status=sa.bindparam("to"),
        error=sa.bindparam("message"),
        settled_at=sa.bindparam("settled"),
        next_attempt_at=sa.func.coalesce(
            sa.bindparam("next", type_=tables.deliveries.c.next_attempt_at.type),
            tables.deliveries.c.next_attempt_at,
        ),
        quiet_until=sa.bindparam("grace"),
        alone=sa.bindparam("isolated"),
        attempt_count=tables.deliveries.c.attempt_count - sa.bindparam("no_attempt", type_=sa.Integer),
    )
)


@dataclass(frozen=True, slots=True)
class Recovered:
    pending_count: int
    dead_count: int


def recover(
    connection: sa.Connection,
    now: dt.datetime,
    grace: dt.timedelta,
    *,
    tracks_at_most_once: bool,
    known_request_ids: Collection[int] = (),
) -> Recovered:
    """Queue again what a process that is gone was sending: Userpilot may or may not have applied it.

    Leaves alone the requests that are known to be under way, and the deliveries in bulk jobs.
    """
    in_jobs = sa.select(tables.bulk_jobs.c.request_id).where(tables.bulk_jobs.c.settled_at.is_(None))
    is_lost = sa.and_(
        SENDING,
        tables.deliveries.c.request_id.not_in(list(known_request_ids)),
        tables.deliveries.c.request_id.not_in(in_jobs),
    )
    connection.execute(
        tables.requests.update()
        .where(
            tables.requests.c.ended_at.is_(None),
            tables.requests.c.request_id.in_(sa.select(tables.deliveries.c.request_id).where(is_lost)),
        )
        .values(ended_at=now, error=PROCESS_ENDED)
    )
    dead_count = 0
    if tracks_at_most_once:
        error = f"{outcomes.NOT_REPEATED}: {PROCESS_ENDED}"
        dead_count = connection.execute(
            tables.deliveries.update()
            .where(is_lost, tables.deliveries.c.action == "track")
            .values(status="dead", settled_at=now, error=error)
        ).rowcount
    pending_count = connection.execute(
        tables.deliveries.update()
        .where(is_lost)
        .values(status="pending", next_attempt_at=now + grace, quiet_until=now + grace, error=PROCESS_ENDED)
    ).rowcount
    return Recovered(pending_count, dead_count)


# Bulk jobs


def start_in_job(
    connection: sa.Connection,
    request_id: int,
    ids: Collection[int],
    superseded_ids: Collection[int],
    now: dt.datetime,
) -> None:
    """Put pending deliveries into a bulk job.

    They are `sending` until the job is settled, so no other lane sends to their users. `error` marks those that a
    newer value in the same row supersedes.
    """
    id_lists = {"ids": json.dumps(list(ids)), "superseded_ids": json.dumps(list(superseded_ids))}
    chosen, superseded = (_ids(connection, name) for name in id_lists)
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'sending', request_id = :request_id, attempt_count = attempt_count + 1, "
        f"first_attempt_at = :now, quiet_until = NULL, error = CASE WHEN delivery_id IN {superseded} THEN :error END "
        f"WHERE status = 'pending' AND delivery_id IN {chosen}",
        request_id=request_id,
        error=SUPERSEDED,
        now=now,
        **id_lists,
    )


def _ids(connection: sa.Connection, name: str) -> str:
    """Return a query for the ids in a parameter, which is a JSON list."""
    if is_sqlite(connection):
        return f"(SELECT value FROM json_each(:{name}))"
    return f"(SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:{name} AS json)))"


def is_in_job(request_id: int) -> sa.ColumnElement[bool]:
    """Condition for the deliveries in a bulk job that is not settled, by the index of what is being sent."""
    return sa.and_(tables.deliveries.c.request_id == request_id, SENDING)


def settle_job(
    connection: sa.Connection,
    request_id: int,
    job_status: str,
    error: str | None,
    now: dt.datetime,
    grace: dt.timedelta,
    limit: int,
) -> Counter[str]:
    """Settle some deliveries of a bulk job that ended; count them by their new status, none when all are settled."""
    some = sa.select(tables.deliveries.c.delivery_id).where(is_in_job(request_id)).limit(limit)
    statement = (
        tables.deliveries.update()
        .where(tables.deliveries.c.delivery_id.in_(some), SENDING)
        .values(_after_job(job_status, error, now, grace))
        .returning(tables.deliveries.c.status)
    )
    return Counter(connection.execute(statement).scalars())


def _after_job(job_status: str, error: str | None, now: dt.datetime, grace: dt.timedelta) -> dict[str, Any]:
    is_superseded = tables.deliveries.c.error == SUPERSEDED
    match job_status:
        case "completed":
            return {
                "status": sa.case((is_superseded, "cancelled"), else_="accepted"),
                "error": sa.case((is_superseded, SUPERSEDED)),
                "settled_at": now,
            }
        case "dropped":  # no attempt, so it may go into a bulk job again
            return {
                "status": "pending",
                "error": error,
                "attempt_count": tables.deliveries.c.attempt_count - 1,
                "first_attempt_at": None,
            }
        case "failed":
            return {"status": "pending", "error": error, "next_attempt_at": now}
        case _:  # lost: Userpilot may still apply it
            return {
                "status": "pending",
                "error": error,
                "next_attempt_at": now + grace,
                "quiet_until": now + grace,
            }


# Runs, destinations and decisions of a person


def _move(
    connection: sa.Connection, before: str, after: str, also: str, where: str, **parameters: Any
) -> int:
    """Change the status of deliveries; return how many. `before` is a condition, `also` are further assignments."""
    statement = f"UPDATE {{our}}deliveries SET status = '{after}', {also} WHERE {before} AND {where}"
    return sql(connection, statement, **parameters).rowcount


_ENDED = "settled_at = :now, error = :error"
_DUE_NOW = "next_attempt_at = :now, error = NULL"
_ANEW = (
    "settled_at = NULL, next_attempt_at = :now, first_attempt_at = NULL, quiet_until = NULL, alone = false"
)


def release_run(connection: sa.Connection, run_id: int, now: dt.datetime) -> None:
    """Queue the held deliveries of a run that was approved."""
    _move(connection, "status = 'held'", "pending", _DUE_NOW, "run_id = :run_id", run_id=run_id, now=now)


def cancel_run(
    connection: sa.Connection, run_id: int, now: dt.datetime, reason: str, users: str | None = None
) -> None:
    """Cancel the held deliveries of a run: all of them, or those of `users`, a query for their ids."""
    where = "run_id = :run_id" + (f" AND subject_id IN ({users})" if users else "")
    _move(connection, "status = 'held'", "cancelled", _ENDED, where, run_id=run_id, now=now, error=reason)


def cancel_never_attempted(connection: sa.Connection, ids: str, now: dt.datetime) -> None:
    """Cancel pending deliveries of users who left before anything was sent; `ids` is a query."""
    where = f"delivery_id IN ({ids})"
    _move(connection, "status = 'pending'", "cancelled", _ENDED, where, now=now, error=NEVER_SENT)


def _cancel_superseded(connection: sa.Connection, ids: Sequence[int], now: dt.datetime) -> None:
    for chunk in chunks(ids):
        where, given = "delivery_id IN :ids", {"ids": list(chunk), "now": now, "error": SUPERSEDED}
        _move(connection, "status = 'pending'", "cancelled", _ENDED, where, **given)


def cancel_foreign(connection: sa.Connection, origin: RunOrigin, now: dt.datetime) -> None:
    """Cancel what older runs made for other destinations than this run's, which sends everything to its own."""
    _move(
        connection,
        "status IN ('held', 'pending', 'dead')",
        "cancelled",
        _ENDED,
        "definition_id = :definition_id AND fingerprint <> :fingerprint AND run_id <> :run_id",
        definition_id=origin.definition_id,
        fingerprint=origin.fingerprint,
        run_id=origin.run_id,
        now=now,
        error="made for another destination",
    )


def has_dead(connection: sa.Connection, definition_id: int) -> bool:
    where = sa.and_(DEAD, tables.deliveries.c.definition_id == definition_id)
    return (
        connection.execute(sa.select(tables.deliveries.c.delivery_id).where(where).limit(1)).first()
        is not None
    )


def revive(
    connection: sa.Connection, definition_id: int, ids: str, now: dt.datetime, **parameters: Any
) -> None:
    """Give a new attempt to dead deliveries of a definition; `ids` is a query with these parameters."""
    where = f"definition_id = :definition_id AND delivery_id IN ({ids})"
    parameters |= {"definition_id": definition_id, "now": now}
    _move(connection, "status = 'dead'", "pending", f"{_ANEW}, error = NULL", where, **parameters)


def hold_definitions(
    connection: sa.Connection, fingerprint: str, definition_ids: list[int], reason: str
) -> None:
    """Hold what these definitions have pending for other destinations than this."""
    where = "fingerprint <> :fingerprint AND definition_id IN :ids"
    given: dict[str, Any] = {"fingerprint": fingerprint, "ids": definition_ids, "error": reason}
    _move(connection, "status = 'pending'", "held", "error = :error", where, **given)


def hold_calls(connection: sa.Connection, other: str, reason: str) -> None:
    """Hold the pending deliveries of calls for another destination."""
    where = f"{_CALLS} AND fingerprint = :other"
    _move(connection, "status = 'pending'", "held", "error = :error", where, other=other, error=reason)


def release_own(connection: sa.Connection, fingerprint: str, now: dt.datetime) -> int:
    """Queue what was held and is for this destination; return how many stay held. Held runs keep theirs."""
    held = f"status = 'held' AND {_NOT_OF_HELD_RUN}"
    where = "fingerprint = :fingerprint"
    _move(connection, held, "pending", _DUE_NOW, where, fingerprint=fingerprint, now=now)
    return int(sql(connection, f"SELECT count(*) FROM {{our}}deliveries WHERE {held}").scalar_one())


def assign_destination(
    connection: sa.Connection, fingerprint: str, definition_ids: list[int] | None = None
) -> None:
    """Make this the destination of everything that is not settled, or of what these definitions have."""
    where, given = "status IN ('held', 'pending', 'sending', 'dead')", {}
    if definition_ids is not None:
        where, given = f"{where} AND definition_id IN :ids", {"ids": definition_ids}
    _assign(
        connection, fingerprint, f"{where} AND (fingerprint IS NULL OR fingerprint <> :fingerprint)", **given
    )


def assign_calls(connection: sa.Connection, fingerprint: str, other: str | None) -> None:
    """Make this the destination of the pending deliveries of calls that were made for another one, or for none."""
    same, given = ("fingerprint IS NULL", {}) if other is None else ("fingerprint = :other", {"other": other})
    _assign(connection, fingerprint, f"status = 'pending' AND {_CALLS} AND {same}", **given)


def _assign(connection: sa.Connection, fingerprint: str, where: str, **parameters: Any) -> None:
    statement = f"UPDATE {{our}}deliveries SET fingerprint = :fingerprint WHERE {where}"
    sql(connection, statement, fingerprint=fingerprint, **parameters)


def other_fingerprints_of_calls(connection: sa.Connection, fingerprint: str) -> list[str | None]:
    """Return the destinations, other than this, of calls' pending deliveries; None for calls without one."""
    rows = sql(
        connection,
        f"SELECT DISTINCT fingerprint FROM {{our}}deliveries WHERE status = 'pending' AND {_CALLS} "
        "AND (fingerprint IS NULL OR fingerprint <> :fingerprint)",
        fingerprint=fingerprint,
    )
    return list(rows.scalars())


@dataclass(frozen=True, slots=True)
class Retried:
    """How many deliveries got a new attempt, and why the others did not."""

    count: int
    refusals: list[str]


def retry(connection: sa.Connection, ids: Collection[int] | None, now: dt.datetime) -> Retried:
    """Give dead deliveries (None: all of them) a new attempt.

    A value stays dead if its subject has a newer one of the same trait, whatever the newer one's status: each change
    of a membership is a delivery, so the older value is no longer true.
    """
    if ids is None:
        dead = sa.select(tables.deliveries.c.delivery_id).where(DEAD)
        ids = connection.execute(dead.order_by(tables.deliveries.c.delivery_id)).scalars().all()
    count = 0
    refusals: list[str] = []
    for chunk in chunks(ids):
        reasons = _reasons_not_to_retry(connection, chunk)
        refusals += reasons.values()
        retried = [delivery_id for delivery_id in chunk if delivery_id not in reasons]
        # The error of the last attempt stays until the next one.
        count += _move(
            connection, "status = 'dead'", "pending", _ANEW, "delivery_id IN :ids", ids=retried, now=now
        )
    return Retried(count, refusals)


def _reasons_not_to_retry(connection: sa.Connection, ids: Sequence[int]) -> dict[int, str]:
    found = connection.execute(
        sa.select(tables.deliveries).where(tables.deliveries.c.delivery_id.in_(ids))
    ).all()
    by_id = {row.delivery_id: row for row in found}
    newer = due.superseded_traits(connection, [row for row in found if row.status == "dead"])
    reasons = {}
    for delivery_id in ids:
        row = by_id.get(delivery_id)
        if row is None:
            reasons[delivery_id] = f"There is no delivery {delivery_id}."
        elif row.status != "dead":
            reasons[delivery_id] = f"Delivery {delivery_id} is {row.status}, not dead."
        elif row.body and newer.get(delivery_id, set()).issuperset(row.body):
            reasons[delivery_id] = f"Delivery {delivery_id} is {SUPERSEDED}."
    return reasons


def discard(connection: sa.Connection, ids: Collection[int], now: dt.datetime) -> int:
    """Cancel dead and pending deliveries, and held ones unless their run is held; Userpilot is not informed."""
    before = f"(status IN ('dead', 'pending') OR (status = 'held' AND {_NOT_OF_HELD_RUN}))"
    also = "settled_at = :now, error = COALESCE(error || '; ', '') || :reason, quiet_until = NULL"
    given: dict[str, Any] = {"now": now, "reason": "discarded by hand"}
    return sum(
        _move(connection, before, "cancelled", also, "delivery_id IN :ids", ids=list(chunk), **given)
        for chunk in chunks(ids)
    )
