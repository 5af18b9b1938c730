"""The life of a delivery: every statement that writes `deliveries`, except those of retention/ that delete rows.

| from                | to        | when                                                   | by                           |
| ------------------- | --------- | ------------------------------------------------------ | ---------------------------- |
| -                   | pending   | its call is saved                                      | enqueue_calls                |
| -                   | pending   | its run is committed                                   | enqueue                      |
| -                   | held      | its run is held                                        | enqueue                      |
| -                   | cancelled | the user left before anything was sent                 | enqueue                      |
| held                | pending   | its run is approved                                    | release_run                  |
| held                | pending   | its destination is the configured one again            | release_own                  |
| held                | pending   | its destination is accepted as the configured one      | release_all                  |
| held                | pending   | its definition commits a newer run                     | release_older                |
| held                | cancelled | its run is rejected                                    | cancel_run                   |
| held                | deleted   | its run is replaced by a newer one with another value  | replace_held, delete_held    |
| pending             | sending   | claimed for a request that is about to be sent         | claim, start_in_job          |
| pending             | held      | made for another destination                           | hold_definitions, hold_calls |
| pending             | cancelled | a newer value was accepted, or one of a run is dead    | choose_next                  |
| pending             | cancelled | the user left before anything was sent                 | cancel_never_attempted       |
| sending             | accepted  | 2xx, or its bulk job completed                         | settle, settle_job           |
| sending             | cancelled | a newer value in the same request was accepted         | settle, settle_job           |
| sending             | pending   | no answer, a slow-down, a refused merge, a failed job  | settle, settle_job           |
| sending             | pending   | the process that was sending it has ended              | recover                      |
| sending             | dead      | refused for good, attempts exhausted, or a track that  | settle, recover              |
|                     |           | must not be repeated                                   |                              |
| dead                | pending   | retried, or a later run finds the value still current  | retry, revive                |
| held, pending, dead | cancelled | a full run sends everything to another destination     | cancel_foreign               |
| held, pending, dead | cancelled | discarded                                              | discard                      |

Each transition requires its `from` status. `assign_destination`, `assign_calls`, `bring_forward` and `restart_graces`
change no status.

Releasing deliveries never sends an older value after a newer one: a definition's held deliveries are released at its
next commit at the latest, and only the newest of a user's pending values is sent.
Every function runs in its caller's transaction. Next: worker.py claims, sends and settles deliveries. due.py decides
which deliveries it may claim, and outcomes.py decides what an answer means.
"""

import datetime as dt
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sqlalchemy as sa

from audience_sync.db import rows
from audience_sync.db.dialects import (
    chunks,
    create_temp_table,
    drop_temp_table,
    is_among,
    is_sqlite,
    json_list,
    sql,
)
from audience_sync.db.tables import DEAD, SENDING, bulk_jobs, deliveries
from audience_sync.queue import backlog, due, outcomes, requests, superseded
from audience_sync.queue.conditions import exists
from audience_sync.queue.outcomes import SUPERSEDED, Delivery, Status
from audience_sync.queue.requests import ClaimedRequest, EndedRequest

NEVER_SENT = "left before anything was sent"
PROCESS_ENDED = "The process ended before the answer came"
# The condition of ix_deliveries_unsettled, so that SQLite uses that index for `d`.
BY_SUBJECT_INDEX = "d.status IN ('pending', 'sending')"
_PENDING_CALLS = "status = 'pending' AND class = 'call' AND action IN ('identify', 'track', 'company')"
_HELD_RUNS = "SELECT COALESCE(deliveries_run_id, run_id) FROM {our}runs WHERE status = 'held'"
_HELD_BUT_NOT_BY_RUN = f"status = 'held' AND (run_id IS NULL OR run_id NOT IN ({_HELD_RUNS}))"
_IS_OTHER = "(fingerprint IS NULL OR fingerprint <> :fingerprint)"


# Enqueueing


class CallDelivery(NamedTuple):
    """A delivery of a call in the form that `rows.insert` takes: the body as JSON text, the time by `rows.moment`."""

    action: str
    subject_id: str
    body: str
    call_id: int
    value_at: str


_CALL_COLUMNS = (*CallDelivery._fields, "class", "fingerprint", "status", "created_at", "next_attempt_at")


def enqueue_calls(
    connection: sa.Connection, new: Sequence[CallDelivery], fingerprint: str | None, now: dt.datetime
) -> None:
    """Queue the deliveries of calls, in this order."""
    at = rows.moment(now)
    queued = [(*delivery, "call", fingerprint, "pending", at, at) for delivery in new]
    rows.insert(connection, deliveries, _CALL_COLUMNS, queued)


def bring_forward(connection: sa.Connection, now: dt.datetime, latest: dt.datetime | None = None) -> int:
    """Make deliveries due that were queued while a clock was ahead; return their number.

    `latest`: the database's time if our own clock is behind it. Values from before that time keep their order. Later
    values of calls get this time, unless that would put them before a value that was sent. Values of runs keep their
    order, because no run is computed for an earlier moment than the run before it.
    """
    count = 0
    while ids := backlog.scheduled_ahead(connection, now):
        for chunk in chunks(ids):
            sql(
                connection,
                "UPDATE {our}deliveries AS d SET next_attempt_at = :now, value_at = CASE WHEN call_id IS NOT NULL "
                f"AND value_at > :latest AND NOT {_IS_LATER_SENT} THEN :latest ELSE value_at END "
                "WHERE status = 'pending' AND delivery_id IN :ids",
                now=now,
                latest=max(now, latest or now),
                ids=list(chunk),
            )
        count += len(ids)
    return count


_OF_SAME = "b.subject_id = d.subject_id AND b.action = d.action AND b.value_at > :latest"
_IS_LATER_ACCEPTED = exists(f"{_OF_SAME} AND b.status = 'accepted'", "value_at")
_IS_LATER_ATTEMPTED = exists(
    f"{_OF_SAME} AND b.status IN ('pending', 'sending') AND b.attempt_count > 0", "status"
)
_IS_LATER_SENT = f"({_IS_LATER_ACCEPTED} OR {_IS_LATER_ATTEMPTED})"


@dataclass(frozen=True, slots=True)
class RunOrigin:
    """The values that all deliveries of a run have in common. `fingerprint` identifies the destination."""

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
    """Queue an identify for each row of a query.

    `source` is the query from its FROM clause on, with a column `user_id`; `body` is an SQL expression over its columns
    that gives JSON text. Both may use the parameters. Status `cancelled`: users who left before anything was sent.
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


# Sending


@dataclass(frozen=True, slots=True)
class Chosen:
    """The deliveries of some subjects' next requests, and the subjects whose superseded deliveries were cancelled."""

    groups: list[list[Delivery]]
    cancelled_subjects: set[str]


def choose_next(
    connection: sa.Connection, action: str, subjects: Sequence[str], now: dt.datetime, fingerprint: str | None
) -> Chosen:
    """Choose the deliveries of each subject's next request; cancel those that accepted values have superseded.

    A run's value is also superseded by a dead value of a newer run: the older value is no longer true, and an attempt
    without an answer may have set the newer one.
    If all due deliveries of a subject wait for a newer one, they become due together with it.
    """
    pending = due.pending_of(connection, action, subjects, now, fingerprint)
    late = [each for group in pending for each in group if each.is_call or each.isolated]
    newer = superseded.superseded_traits(connection, late, [Status.ACCEPTED], fingerprint)
    isolated = [each for each in late if not each.is_call]
    newer |= superseded.superseded_traits(connection, isolated, [Status.DEAD], fingerprint, of_runs=True)
    trimmed = [outcomes.without_superseded(group, newer) for group in pending]
    for ids in chunks([delivery_id for group in trimmed for delivery_id in group.superseded]):
        values: dict[str, Any] = {"ids": list(ids), "now": now, "error": SUPERSEDED}
        _move(connection, "status = 'pending'", "cancelled", _SETTLED, "delivery_id IN :ids", **values)
    groups = [outcomes.select_next(group.left, now) for group in trimmed]
    for group, chosen in zip(trimmed, groups, strict=True):
        if not chosen:
            _postpone(connection, group.left, now)
    cancelled = {group[0].subject_id for group, left in zip(pending, trimmed, strict=True) if left.superseded}
    return Chosen([group for group in groups if group], cancelled)


def _postpone(connection: sa.Connection, group: Sequence[Delivery], now: dt.datetime) -> None:
    blocked = outcomes.blocked_until(group)
    updates = [
        {"id": each.delivery_id, "next": blocked[each.delivery_id]}
        for each in group
        if each.next_attempt_at <= now < blocked.get(each.delivery_id, now)
    ]
    if updates:
        connection.execute(_POSTPONE, updates)


_POSTPONE = (
    deliveries.update()
    .where(deliveries.c.delivery_id == sa.bindparam("id"), deliveries.c.status == "pending")
    .values(next_attempt_at=sa.bindparam("next"))
)


def claim(
    connection: sa.Connection,
    lane: str,
    epoch: int,
    chosen: Sequence[list[Delivery]],
    started_at: dt.datetime,
    delivery_class: str,
) -> list[ClaimedRequest]:
    """Record a request for each list of deliveries before it is sent, and mark them as sending."""
    ids = requests.record_requests(connection, lane, epoch, [len(group) for group in chosen], started_at)
    claimed = [
        ClaimedRequest(request_id, lane, group[0].subject_id, delivery_class, group)
        for request_id, group in zip(ids, chosen, strict=True)
    ]
    updates = [
        {"id": delivery.delivery_id, "request": request.request_id, "first": delivery.first_attempt_at}
        for request in claimed
        for delivery in request.deliveries
    ]
    connection.execute(_CLAIM, updates)
    return claimed


_CLAIM = (
    deliveries.update()
    .where(deliveries.c.delivery_id == sa.bindparam("id"), deliveries.c.status == "pending")
    .values(
        status="sending",
        request_id=sa.bindparam("request"),
        attempt_count=deliveries.c.attempt_count + 1,
        first_attempt_at=sa.bindparam("first"),
        quiet_until=None,
    )
)


def settle(connection: sa.Connection, ended: Sequence[EndedRequest]) -> None:
    """Record how requests ended, and the next states of their deliveries."""
    requests.end_requests(connection, ended)
    updates = [
        {
            "id": settlement.delivery_id,
            "request": request.request_id,
            "to": settlement.status.value,
            "message": settlement.error,
            "settled": request.settled_at if settlement.status is not Status.PENDING else None,
            "next": settlement.next_attempt_at,
            "grace": settlement.grace_until,
            "isolated": settlement.isolated,
            "no_attempt": 0 if settlement.was_attempt else 1,
            "restarts_give_up_time": settlement.restarts_give_up_time,
        }
        for request in ended
        for settlement in request.settlements
    ]
    connection.execute(_SETTLE, updates)


_NO_ATTEMPT = sa.bindparam("no_attempt", type_=sa.Integer)  # 1 if the request does not count as an attempt
_SETTLE = (
    deliveries.update()
    .where(
        deliveries.c.delivery_id == sa.bindparam("id"),
        deliveries.c.status == "sending",
        deliveries.c.request_id == sa.bindparam("request"),
    )
    .values(
        status=sa.bindparam("to"),
        error=sa.bindparam("message"),
        settled_at=sa.bindparam("settled"),
        next_attempt_at=sa.func.coalesce(
            sa.bindparam("next", type_=deliveries.c.next_attempt_at.type), deliveries.c.next_attempt_at
        ),
        quiet_until=sa.bindparam("grace"),
        alone=sa.bindparam("isolated"),
        attempt_count=deliveries.c.attempt_count - _NO_ATTEMPT,
        first_attempt_at=sa.case(
            (sa.bindparam("restarts_give_up_time", type_=sa.Boolean), sa.null()),
            (deliveries.c.attempt_count > _NO_ATTEMPT, deliveries.c.first_attempt_at),
        ),
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
    ended_at: dt.datetime,
    tracks_at_most_once: bool,
    known_request_ids: Collection[int] = (),
) -> Recovered:
    """Queue again the deliveries that a process was sending when it ended; Userpilot may or may not have applied them.

    Deliveries of known requests in flight and of bulk jobs are not touched.
    """
    in_jobs = sa.select(bulk_jobs.c.request_id).where(bulk_jobs.c.settled_at.is_(None))
    is_lost = sa.and_(
        SENDING,
        deliveries.c.request_id.not_in(list(known_request_ids)),
        deliveries.c.request_id.not_in(in_jobs),
    )
    lost_requests = sa.select(deliveries.c.request_id).where(is_lost)
    requests.end_lost_requests(connection, lost_requests, ended_at, PROCESS_ENDED)
    dead_count = 0
    if tracks_at_most_once:
        error = f"{outcomes.NOT_REPEATED}: {PROCESS_ENDED}"
        tracks = deliveries.update().where(is_lost, deliveries.c.action == "track")
        dead_count = connection.execute(tracks.values(status="dead", settled_at=now, error=error)).rowcount
    pending = (
        deliveries.update()
        .where(is_lost)
        .values(status="pending", next_attempt_at=now + grace, quiet_until=now + grace, error=PROCESS_ENDED)
    )
    return Recovered(connection.execute(pending).rowcount, dead_count)


def restart_graces(
    connection: sa.Connection, request_ids: Collection[int], now: dt.datetime, grace: dt.timedelta
) -> None:
    """Restart the grace after these requests by our own clock, because another process recorded it by its clock."""
    for chunk in chunks(request_ids):
        # With a condition on the status, SQLite would read all pending rows. Settled rows have no grace.
        of_requests = deliveries.update().where(deliveries.c.request_id.in_(chunk))
        connection.execute(
            of_requests.where(deliveries.c.quiet_until.is_not(None)).values(quiet_until=now + grace)
        )


# Bulk jobs


def start_in_job(
    connection: sa.Connection,
    request_id: int,
    ids: Collection[int],
    superseded_ids: Collection[int],
    now: dt.datetime,
) -> None:
    """Put pending deliveries into a bulk job.

    They are `sending` until the job is settled, so that no other lane sends to their users. Meanwhile an `error` marks
    deliveries that a newer value in the same row supersedes.
    """
    lists = {"ids": json.dumps(list(ids)), "superseded_ids": json.dumps(list(superseded_ids))}
    chosen, superseded = (
        f"(SELECT CAST(value AS bigint) FROM {json_list(connection, name)} l)" for name in lists
    )
    sql(
        connection,
        "UPDATE {our}deliveries SET status = 'sending', request_id = :request_id, attempt_count = attempt_count + 1, "
        f"first_attempt_at = :now, quiet_until = NULL, error = CASE WHEN delivery_id IN {superseded} THEN :error END "
        f"WHERE status = 'pending' AND delivery_id IN {chosen}",
        request_id=request_id,
        error=SUPERSEDED,
        now=now,
        **lists,
    )


def is_in_job(request_id: int) -> sa.ColumnElement[bool]:
    """Return the condition for the deliveries in a bulk job, in a form that can use the index of `sending` deliveries."""
    return sa.and_(deliveries.c.request_id == request_id, SENDING)


def settle_job(
    connection: sa.Connection,
    request_id: int,
    job_status: str,
    error: str | None,
    now: dt.datetime,
    grace: dt.timedelta,
    limit: int,
) -> Counter[str]:
    """Settle some deliveries of a bulk job that ended; return their number by new status, empty when none are left."""
    some = sa.select(deliveries.c.delivery_id).where(is_in_job(request_id)).limit(limit)
    ids = connection.execute(some).scalars().all()
    # A list, because PostgreSQL expects few rows of a subquery, and would read all of them again for each delivery.
    statement = (
        deliveries.update()
        .where(is_among(connection, deliveries.c.delivery_id, ids), SENDING)
        .values(_after_job(job_status, error, now, grace))
        .returning(deliveries.c.status)
    )
    return Counter(connection.execute(statement).scalars())


def _after_job(job_status: str, error: str | None, now: dt.datetime, grace: dt.timedelta) -> dict[str, Any]:
    if job_status == "completed":
        is_superseded = deliveries.c.error.is_not(None)  # older versions wrote other texts
        status = sa.case((is_superseded, "cancelled"), else_="accepted")
        return {"status": status, "error": sa.case((is_superseded, SUPERSEDED)), "settled_at": now}
    pending = {"status": "pending", "error": error}
    match job_status:
        case "dropped":  # not an attempt, so they may go into a bulk job again
            return pending | {"attempt_count": deliveries.c.attempt_count - 1, "first_attempt_at": None}
        case "failed":
            return pending | {"next_attempt_at": now}
        case _:  # lost: Userpilot may still apply it
            return pending | {"next_attempt_at": now + grace, "quiet_until": now + grace}


# Held runs and destinations


def replace_held(
    connection: sa.Connection,
    origin: RunOrigin,
    held_run_id: int,
    body: str,
    source: str,
    now: dt.datetime,
    **parameters: Any,
) -> None:
    """Change the held deliveries of a replaced run into those of a newer held run, as `enqueue` would write them.

    Equal rows are not written, so that a run which is held at every slot adds nothing. All rows keep the id of the
    replaced run; `take_over` gives them the newer run's id when the run is approved or rejected.
    """
    create_temp_table(connection, "held", "user_id {id}, body text", unique_ids=True)
    statement = f"INSERT INTO {{temp}}audience_sync_held SELECT user_id, {body} {source}"
    sql(connection, statement, definition_id=origin.definition_id, **parameters)
    if not is_sqlite(connection):
        sql(connection, "ANALYZE pg_temp.audience_sync_held")
    new = "{temp}audience_sync_held n"
    is_held = "d.run_id = :held_run_id AND d.status = 'held'"
    sql(
        connection,
        f"DELETE FROM {{our}}deliveries AS d WHERE {is_held} AND NOT EXISTS "
        f"(SELECT 1 FROM {new} WHERE n.user_id = d.subject_id AND n.body = CAST(d.body AS text))",
        held_run_id=held_run_id,
    )
    # + 0, because SQLite would search all users of the run for each user.
    of_run = "d.run_id + 0 = :held_run_id" if is_sqlite(connection) else "d.run_id = :held_run_id"
    missing = (
        f"NOT EXISTS (SELECT 1 FROM {{our}}deliveries d WHERE {of_run} AND d.status = 'held' "
        "AND d.subject_id = n.user_id)"
    )
    of_held_run = replace(origin, run_id=held_run_id)
    enqueue(
        connection,
        of_held_run,
        Status.HELD,
        "body",
        f"FROM {new} WHERE {missing}",
        now,
        held_run_id=held_run_id,
    )
    drop_temp_table(connection, "held")


def delete_held(connection: sa.Connection, run_id: int) -> None:
    """Delete the held deliveries of a run that a newer one replaced: they were never sent and never will be."""
    sql(connection, "DELETE FROM {our}deliveries WHERE run_id = :run_id AND status = 'held'", run_id=run_id)


def take_over(
    connection: sa.Connection, run_id: int, delivery_class: str, value_at: dt.datetime, held_run_id: int
) -> None:
    """Assign the held deliveries of a replaced run to the run that replaced it."""
    sql(
        connection,
        "UPDATE {our}deliveries SET run_id = :run_id, class = :class, value_at = :value_at "
        "WHERE run_id = :held_run_id AND status = 'held'",
        **{"class": delivery_class},
        run_id=run_id,
        value_at=value_at,
        held_run_id=held_run_id,
    )


def _move(
    connection: sa.Connection, before: str, after: str, assignments: str, where: str, **parameters: Any
) -> int:
    """Change the status of the deliveries for which both conditions hold; return how many."""
    statement = f"UPDATE {{our}}deliveries SET status = '{after}', {assignments} WHERE {before} AND {where}"
    return sql(connection, statement, **parameters).rowcount


_SETTLED = "settled_at = :now, error = :error"
_HELD = "error = :error"
_DUE_NOW = "next_attempt_at = :now, error = NULL"
_DUE_AGAIN = (
    "settled_at = NULL, next_attempt_at = :now, first_attempt_at = NULL, quiet_until = NULL, alone = false"
)


def release_run(
    connection: sa.Connection, run_id: int, now: dt.datetime, fingerprint: str | None = None
) -> None:
    """Queue the held deliveries of a run that was approved, for this destination if it is known."""
    where, values = "run_id = :run_id", {"run_id": run_id}
    _release(connection, "status = 'held'", where, now, fingerprint, **values)


def release_older(connection: sa.Connection, origin: RunOrigin, now: dt.datetime) -> None:
    """Queue the held deliveries of a definition's earlier runs, before a run commits newer values.

    Otherwise the newer value could be sent while the older one is held, and the older one after it.
    """
    where, values = "definition_id = :definition_id", {"definition_id": origin.definition_id}
    _release(connection, _HELD_BUT_NOT_BY_RUN, where, now, origin.fingerprint, **values)


def _release(
    connection: sa.Connection, before: str, where: str, now: dt.datetime, fingerprint: str | None, **ids: int
) -> None:
    assignments = f"{_DUE_NOW}, fingerprint = COALESCE(CAST(:fingerprint AS text), fingerprint)"
    _move(connection, before, "pending", assignments, where, now=now, fingerprint=fingerprint, **ids)


def cancel_run(
    connection: sa.Connection, run_id: int, now: dt.datetime, reason: str, users: str | None = None
) -> None:
    """Cancel the held deliveries of a run: all, or those of `users`, a query for user ids."""
    where = "run_id = :run_id" + (f" AND subject_id IN ({users})" if users else "")
    _move(connection, "status = 'held'", "cancelled", _SETTLED, where, run_id=run_id, now=now, error=reason)


def cancel_never_attempted(connection: sa.Connection, ids: str, now: dt.datetime) -> None:
    """Cancel pending deliveries of users who left before anything was sent; `ids` is a query for delivery ids."""
    where = f"delivery_id IN ({ids})"
    _move(connection, "status = 'pending'", "cancelled", _SETTLED, where, now=now, error=NEVER_SENT)


def has_dead(connection: sa.Connection, definition_id: int) -> bool:
    dead = sa.select(deliveries.c.delivery_id).where(DEAD, deliveries.c.definition_id == definition_id)
    return connection.execute(dead.limit(1)).first() is not None


def revive(
    connection: sa.Connection, definition_id: int, ids: str, now: dt.datetime, **parameters: Any
) -> None:
    """Give a new attempt to dead deliveries of a definition; `ids` is a query with these parameters."""
    where = f"definition_id = :definition_id AND delivery_id IN ({ids})"
    parameters |= {"definition_id": definition_id, "now": now}
    _move(connection, "status = 'dead'", "pending", f"{_DUE_AGAIN}, error = NULL", where, **parameters)


def cancel_foreign(connection: sa.Connection, origin: RunOrigin, now: dt.datetime) -> None:
    """Cancel older runs' deliveries for other destinations; this run sends everything to its own."""
    before = "status IN ('held', 'pending', 'dead')"
    where = "definition_id = :definition_id AND fingerprint <> :fingerprint AND run_id <> :run_id"
    values: dict[str, Any] = {"definition_id": origin.definition_id, "run_id": origin.run_id, "now": now}
    values |= {"fingerprint": origin.fingerprint, "error": "made for another destination"}
    _move(connection, before, "cancelled", _SETTLED, where, **values)


def hold_definitions(
    connection: sa.Connection, fingerprint: str, definition_ids: list[int], reason: str
) -> None:
    """Hold pending deliveries of these definitions if they are for another destination."""
    where = "fingerprint <> :fingerprint AND definition_id IN :ids"
    values: dict[str, Any] = {"fingerprint": fingerprint, "ids": definition_ids, "error": reason}
    _move(connection, "status = 'pending'", "held", _HELD, where, **values)


def hold_calls(connection: sa.Connection, other: str, reason: str) -> None:
    """Hold the pending deliveries of calls for another destination."""
    _move(connection, _PENDING_CALLS, "held", _HELD, "fingerprint = :other", other=other, error=reason)


def release_own(connection: sa.Connection, fingerprint: str, now: dt.datetime) -> int:
    """Queue held deliveries for this destination, except those of held runs; return how many others stay held."""
    where = "fingerprint = :fingerprint"
    _move(connection, _HELD_BUT_NOT_BY_RUN, "pending", _DUE_NOW, where, fingerprint=fingerprint, now=now)
    count = f"SELECT count(*) FROM {{our}}deliveries WHERE {_HELD_BUT_NOT_BY_RUN}"
    return int(sql(connection, count).scalar_one())


def release_all(connection: sa.Connection) -> None:
    """Queue everything that is held for another destination, after that was accepted as the configured one."""
    _move(connection, _HELD_BUT_NOT_BY_RUN, "pending", "error = NULL", "true")


def assign_destination(
    connection: sa.Connection, fingerprint: str, definition_ids: list[int] | None = None
) -> None:
    """Set the destination of unsettled and dead deliveries, of all definitions or these."""
    where, values = f"status IN ('held', 'pending', 'sending', 'dead') AND {_IS_OTHER}", {}
    if definition_ids is not None:
        where, values = f"{where} AND definition_id IN :ids", {"ids": definition_ids}
    _assign(connection, fingerprint, where, **values)


def assign_calls(connection: sa.Connection, fingerprint: str, other: str | None) -> None:
    """Set the destination of pending deliveries of calls that were made for another one, or for none."""
    same, values = (
        ("fingerprint IS NULL", {}) if other is None else ("fingerprint = :other", {"other": other})
    )
    _assign(connection, fingerprint, f"{_PENDING_CALLS} AND {same}", **values)


def _assign(connection: sa.Connection, fingerprint: str, where: str, **parameters: Any) -> None:
    statement = f"UPDATE {{our}}deliveries SET fingerprint = :fingerprint WHERE {where}"
    sql(connection, statement, fingerprint=fingerprint, **parameters)


def fingerprints(connection: sa.Connection) -> set[str]:
    """Return the destinations of all deliveries that may still be sent."""
    query = "SELECT DISTINCT fingerprint FROM {our}deliveries WHERE status IN ('held', 'pending', 'sending', 'dead')"
    return {name for name in sql(connection, query).scalars() if name is not None}


def other_fingerprints_of_calls(connection: sa.Connection, fingerprint: str) -> list[str | None]:
    """Return the other destinations of pending deliveries of calls; None stands for deliveries without one."""
    query = f"SELECT DISTINCT fingerprint FROM {{our}}deliveries WHERE {_PENDING_CALLS} AND {_IS_OTHER}"
    return list(sql(connection, query, fingerprint=fingerprint).scalars())


# Decisions about single deliveries


@dataclass(frozen=True, slots=True)
class Retried:
    """The number of deliveries that got a new attempt, and the reasons why the others did not."""

    count: int
    refusals: list[str]


def retry(connection: sa.Connection, ids: Collection[int] | None, now: dt.datetime) -> Retried:
    """Give dead deliveries (None: all of them) a new attempt."""
    if ids is None:
        dead = sa.select(deliveries.c.delivery_id).where(DEAD).order_by(deliveries.c.delivery_id)
        ids = connection.execute(dead).scalars().all()
    count = 0
    refusals: list[str] = []
    for chunk in chunks(ids):
        reasons = superseded.reasons_not_to_retry(connection, chunk)
        refusals += reasons.values()
        retried = [delivery_id for delivery_id in chunk if delivery_id not in reasons]
        if retried:
            where, values = "delivery_id IN :ids", {"ids": retried, "now": now}
            count += _move(connection, "status = 'dead'", "pending", _DUE_AGAIN, where, **values)
    return Retried(count, refusals)


def discard(connection: sa.Connection, ids: Collection[int], now: dt.datetime) -> int:
    """Cancel dead and pending deliveries, and held ones unless their run is held; return how many."""
    before = f"(status IN ('dead', 'pending') OR ({_HELD_BUT_NOT_BY_RUN}))"
    assignments = "settled_at = :now, error = COALESCE(error || '; ', '') || :reason, quiet_until = NULL"
    values: dict[str, Any] = {"now": now, "reason": "discarded by hand"}
    return sum(
        _move(connection, before, "cancelled", assignments, "delivery_id IN :ids", ids=list(chunk), **values)
        for chunk in chunks(ids)
    )
