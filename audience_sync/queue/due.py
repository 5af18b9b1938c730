"""Queries for the deliveries that may be claimed now. deliveries.py claims them.

A subject is a user or a company. Its deliveries wait while one of them is being sent, and for a grace after an unknown
outcome.
Every function runs in its caller's transaction.
"""

import datetime as dt
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db.dialects import chunks, is_sqlite, json_list, sql
from audience_sync.db.engines import from_json, to_json
from audience_sync.db.tables import deliveries
from audience_sync.queue.conditions import OF_SUBJECT, exists, for_subject, moments_of, subjects_where
from audience_sync.queue.outcomes import Delivery
from audience_sync.userpilot.payloads import COMPANY

LANES = ("track", "company", "identify")
CLASSES = ("call", "change", "push")  # in the order in which they are claimed
FIRST_IDENTIFY_WAIT = dt.timedelta(minutes=10)  # the longest that tracks wait for the user's first identify

START = (dt.datetime(1970, 1, 1, tzinfo=dt.UTC), 0)
MAX_MERGED = 500  # deliveries in a request, the oldest first
MAX_ROWS_READ = 50_000  # by one search of a queue
STEP_ROWS = 10_000  # the most that one statement reads
FIRST_STEP_ROWS = 50  # the most that the first statement of a search reads
Position = tuple[dt.datetime, int]  # next_attempt_at and delivery_id: the order of a queue

_ATTEMPTED = f"{OF_SUBJECT} AND b.status IN ('pending', 'sending') AND b.attempt_count > 0"
_IS_SENDING = exists(f"{_ATTEMPTED} AND b.status = 'sending'", "quiet_until")
_QUIET_UNTIL = (
    f"(SELECT max(b.quiet_until) FROM {{our}}deliveries b WHERE {_ATTEMPTED} AND b.status = 'pending' "
    "AND b.quiet_until > :now)"
)
_WAS_ATTEMPTED = exists(_ATTEMPTED, "status")
_ISOLATED = f"{OF_SUBJECT} AND b.status = 'pending' AND b.alone"
_HAS_ISOLATED = exists(_ISOLATED, "value_at")
_UNSETTLED = f"{OF_SUBJECT} AND b.status IN ('pending', 'sending')"


def refresh_statistics(connection: sa.Connection) -> None:
    """Update PostgreSQL's statistics of a queue that has grown, from a small sample because the lanes wait meanwhile."""
    if not is_sqlite(connection):
        connection.execute(sa.select(sa.func.set_config("default_statistics_target", "10", True)))
        sql(connection, "ANALYZE {our}deliveries")


@dataclass(frozen=True, slots=True)
class DueSubject:
    """A subject in a stretch of a queue; `first` is a position at or before its first delivery there.

    `was_attempted`: a delivery of the subject in this stretch was attempted. `is_sending`: a request is in flight.
    """

    subject_id: str
    first: Position
    delivery_count: int
    was_attempted: bool
    is_sending: bool
    quiet_until: dt.datetime | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """The subjects in a stretch of a queue, oldest first, and where it ends."""

    subjects: list[DueSubject]
    end: Position
    row_count: int
    is_last: bool


# Two ranges, because SQLite cannot use an index for a comparison of pairs whose second member is the row's id: after a
# position among many deliveries of the same moment, it would read all of them again.
_ROWS = """
  SELECT d.subject_id, d.next_attempt_at, d.delivery_id, d.attempt_count > 0 OR d.alone AS was_attempted, {ours} AS is_ours
  FROM {our}deliveries d
  WHERE d.action = :action AND d.class = :class AND d.status = 'pending' AND d.next_attempt_at <= :now"""
_STRETCH = f"""
WITH of_this_moment AS ({_ROWS} AND d.next_attempt_at = :after_at AND d.delivery_id > :after_id
  ORDER BY d.delivery_id LIMIT :limit),
later AS ({_ROWS} AND d.next_attempt_at > :after_at
  ORDER BY d.next_attempt_at, d.delivery_id LIMIT :limit - (SELECT count(*) FROM of_this_moment)),
stretch AS (SELECT * FROM of_this_moment UNION ALL SELECT * FROM later),
subjects AS (
  SELECT subject_id, min(next_attempt_at) AS first_at, min(delivery_id) AS first_id, count(*) AS delivery_count,
    max(CASE WHEN was_attempted THEN 1 ELSE 0 END) AS was_attempted, max(CASE WHEN is_ours THEN 1 ELSE 0 END) AS is_ours
  FROM stretch GROUP BY subject_id)
SELECT s.subject_id, s.first_at, s.first_id, s.delivery_count, s.was_attempted, s.is_ours,
  {for_subject(_IS_SENDING, "s.subject_id")} AS is_sending, {for_subject(_QUIET_UNTIL, "s.subject_id")} AS quiet_until,
  (SELECT max(next_attempt_at) FROM stretch) AS last_at,
  (SELECT max(delivery_id) FROM stretch WHERE next_attempt_at = (SELECT max(next_attempt_at) FROM stretch)) AS last_id
FROM subjects s"""


def read_stretch(
    connection: sa.Connection,
    action: str,
    delivery_class: str,
    now: dt.datetime,
    after: Position,
    limit: int,
    fingerprint: str | None = None,
) -> Stretch:
    """Read the next rows of a queue that are due.

    `fingerprint`: only subjects with deliveries for this destination, or for none in particular.
    """
    ours, parameters = "true", {}
    if fingerprint is not None:
        ours, parameters = (
            "d.fingerprint IS NULL OR d.fingerprint = :fingerprint",
            {"fingerprint": fingerprint},
        )
    result = sql(
        connection,
        _STRETCH.replace("{ours}", ours),
        **{"class": delivery_class},
        action=action,
        now=now,
        after_at=after[0],
        after_id=after[1],
        limit=limit,
        **parameters,
    )
    rows = result.all()
    moment = moments_of(connection)
    count = sum(row.delivery_count for row in rows)
    subjects = [
        DueSubject(
            row.subject_id,
            (moment(row.first_at), row.first_id - 1),
            row.delivery_count,
            bool(row.was_attempted),
            bool(row.is_sending),
            moment(row.quiet_until),
        )
        for row in rows
        if row.is_ours
    ]
    subjects.sort(key=lambda subject: subject.first)
    end = (moment(rows[0].last_at), rows[0].last_id) if rows else after
    return Stretch(subjects, end, count, count < limit)


def subjects_due(
    connection: sa.Connection,
    action: str,
    delivery_class: str,
    now: dt.datetime,
    limit: int,
    fingerprint: str | None = None,
    after: Position = START,
) -> dict[str, bool]:
    """Return subjects that are due and not busy, oldest first, each with whether it was attempted before.

    After an attempt, only the live lane sends to a user, because its answers concern a single user. At most about
    `limit` rows are read, or MAX_ROWS_READ if that is more.
    """
    subjects: dict[str, bool] = {}
    left, step = max(limit, MAX_ROWS_READ), FIRST_STEP_ROWS
    while len(subjects) < limit and left > 0:
        size = min(left, max(limit, step))
        stretch = read_stretch(connection, action, delivery_class, now, after, size, fingerprint)
        for subject in stretch.subjects:
            if not subject.is_sending and subject.quiet_until is None:
                was_attempted = subjects.get(subject.subject_id, False)
                subjects[subject.subject_id] = was_attempted or subject.was_attempted
        after, left, step = stretch.end, left - stretch.row_count, min(4 * step, STEP_ROWS)
        if stretch.is_last:
            break
    return dict(itertools.islice(subjects.items(), limit))


def idle_users(connection: sa.Connection, users: Sequence[str]) -> list[str]:
    """Return the users who have no request in flight, no earlier attempt and no grace to wait for."""
    idle = subjects_where(
        connection, users, f"NOT {_WAS_ATTEMPTED} AND NOT {_HAS_ISOLATED}", action="identify"
    )
    return [user for user in users if user in idle]


def pending_of(
    connection: sa.Connection,
    action: str,
    subjects: Sequence[str],
    now: dt.datetime,
    fingerprint: str | None = None,
) -> list[list[Delivery]]:
    """Return the oldest deliveries of each subject, which its next request may carry, as they will be once claimed.

    For tracks, that is only the first one. Left out are subjects that are busy or have nothing due, deliveries that wait
    for another subject, and subjects of which another process is changing a delivery.
    """
    ids = _oldest_of(connection, action, subjects, now, fingerprint)
    loaded = [row for chunk in chunks(ids) for row in connection.execute(_PENDING, {"ids": list(chunk)})]
    waiting = _waiting_for_another(connection, action, loaded, now)
    by_subject: dict[str, list[Delivery]] = {subject: [] for subject in subjects}
    for row in loaded:
        if row.delivery_id in waiting:
            continue
        by_subject[row.subject_id].append(
            Delivery(
                delivery_id=row.delivery_id,
                action=action,
                subject_id=row.subject_id,
                body=row.body,
                value_at=row.value_at,
                is_call=row.call_id is not None,
                isolated=row.alone,
                attempt_count=row.attempt_count + 1,
                first_attempt_at=row.first_attempt_at or now,
                next_attempt_at=row.next_attempt_at,
            )
        )
    groups = [group for group in by_subject.values() if any(each.next_attempt_at <= now for each in group)]
    if is_sqlite(connection):
        return groups
    ids = [delivery.delivery_id for group in groups for delivery in group]
    locked = set(connection.execute(_LOCK, {"ids": ids}).scalars())
    return [group for group in groups if locked.issuperset(delivery.delivery_id for delivery in group)]


_ID = deliveries.c.delivery_id
_IS_PENDING = deliveries.c.status == "pending"
_PENDING = sa.select(
    _ID,
    deliveries.c.subject_id,
    deliveries.c.body,
    deliveries.c.value_at,
    deliveries.c.call_id,
    deliveries.c.alone,
    deliveries.c.attempt_count,
    deliveries.c.created_at,
    deliveries.c.first_attempt_at,
    deliveries.c.next_attempt_at,
).where(_ID.in_(sa.bindparam("ids", expanding=True)), _IS_PENDING)
_LOCK = (
    sa.select(_ID)
    .where(sa.any_(sa.bindparam("ids", type_=postgresql.ARRAY(sa.BigInteger))) == _ID, _IS_PENDING)
    .with_for_update(skip_locked=True)
)


def _oldest_of(
    connection: sa.Connection,
    action: str,
    subjects: Sequence[str],
    now: dt.datetime,
    fingerprint: str | None,
) -> list[int]:
    """Return the ids of the oldest pending and the newest isolated deliveries of each subject that is not busy."""
    parameters: dict[str, Any] = {"action": action, "most": 1 if action == "track" else MAX_MERGED}
    ours = ""
    if fingerprint is not None:
        ours = "AND (d.fingerprint = :fingerprint OR d.fingerprint IS NULL)"
        parameters["fingerprint"] = fingerprint
    query = _OLDEST.replace("{ours}", ours).replace("{list}", json_list(connection, "subjects"))
    query = query.replace("{json_agg}", "json_group_array" if is_sqlite(connection) else "json_agg")
    ids: set[int] = set()
    for row in sql(connection, query, subjects=to_json(list(subjects)), now=now, **parameters).all():
        ids.update(from_json(row.ids) if isinstance(row.ids, str) else row.ids or ())
        if row.has_isolated:
            isolated = _NEWEST_ISOLATED.replace("{ours}", ours)
            ids.update(sql(connection, isolated, subject=row.subject_id, **parameters).scalars())
    return sorted(ids)


_OLDEST = f"""
SELECT a.value AS subject_id, {for_subject(_HAS_ISOLATED, "a.value")} AS has_isolated,
  (SELECT {{json_agg}}(o.delivery_id) FROM (
    SELECT d.delivery_id FROM {{our}}deliveries d WHERE {for_subject(_UNSETTLED, "a.value").replace("b.", "d.")}
      AND d.status = 'pending' {{ours}} ORDER BY d.delivery_id LIMIT :most) o) AS ids
FROM {{list}} a WHERE NOT {for_subject(_IS_SENDING, "a.value")} AND {for_subject(_QUIET_UNTIL, "a.value")} IS NULL"""
_NEWEST_ISOLATED = f"""
SELECT d.delivery_id FROM {{our}}deliveries d WHERE {for_subject(_ISOLATED, ":subject").replace("b.", "d.")} {{ours}}
ORDER BY d.value_at DESC, d.delivery_id DESC LIMIT :most"""


def _waiting_for_another(
    connection: sa.Connection, action: str, loaded: Sequence[sa.Row[*tuple[Any, ...]]], now: dt.datetime
) -> set[int]:
    """Return the deliveries that wait for the first identify of their user (tracks) or company, for ten minutes at most."""
    others: dict[int, str] = {}
    for row in loaded:
        other = (
            row.subject_id if action == "track" else row.body.get(COMPANY) if action == "identify" else None
        )
        if isinstance(other, str) and row.created_at > now - FIRST_IDENTIFY_WAIT:
            others[row.delivery_id] = other
    if not others:
        return set()
    other_action = "identify" if action == "track" else "company"
    unknown = subjects_where(connection, set(others.values()), _IS_AWAITED, action=other_action)
    return {delivery_id for delivery_id, other in others.items() if other in unknown}


_HAS_ACCEPTED = exists(f"{OF_SUBJECT} AND b.status = 'accepted'", "value_at")
_IS_AWAITED = f"{exists(_UNSETTLED, 'delivery_id')} AND NOT {_HAS_ACCEPTED}"
