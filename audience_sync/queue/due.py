"""Queries for deliveries: which may be claimed, which are superseded, which wait. deliveries.py changes them.

A subject is a user or a company. Its deliveries wait while one of them is being sent, and after an unknown outcome.
Every function runs in its caller's transaction.
"""

import datetime as dt
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db.dialects import chunks, is_among, is_sqlite, json_keys, json_list, sql
from audience_sync.db.engines import from_json, to_json
from audience_sync.db.tables import PENDING, SENDING, UNSETTLED, UtcDateTime, deliveries, destination
from audience_sync.queue.outcomes import SUPERSEDED, Delivery, Status
from audience_sync.userpilot.payloads import COMPANY

LANES = ("track", "company", "identify")
CLASSES = ("call", "change", "push")  # in the order in which they are claimed
AHEAD_COUNT = 1_000
FIRST_IDENTIFY_WAIT = dt.timedelta(minutes=10)  # tracks wait no longer for the user's first identify

START = (dt.datetime(1970, 1, 1, tzinfo=dt.UTC), 0)
MOST_MERGED = 500  # deliveries in a request, the oldest first
MOST_READ = 50_000  # rows of a queue that one search reads
STEP_ROWS = 10_000  # that one statement reads at most
FIRST_STEP_ROWS = 50  # that the first statement of a search reads; the following ones read more
Position = tuple[dt.datetime, int]  # next_attempt_at and delivery_id: the order of a queue

_OF_SUBJECT = "b.subject_id = {subject} AND b.action = :action"
# Conditions of partial indexes, in the form that SQLite matches. A subject may have any number of deliveries, so every
# question about one is answered by an index.


def _exists(condition: str, order: str) -> str:
    """Return whether a delivery exists, in a form that is tested subject by subject, by the index sorted by this column.

    PostgreSQL may turn EXISTS into a join of whole tables, and SQLite may choose another index for it.
    """
    return f"(SELECT 1 FROM {{our}}deliveries b WHERE {condition} ORDER BY b.{order} LIMIT 1) IS NOT NULL"


_ATTEMPTED = f"{_OF_SUBJECT} AND b.status IN ('pending', 'sending') AND b.attempt_count > 0"
_IS_SENDING = _exists(f"{_ATTEMPTED} AND b.status = 'sending'", "quiet_until")
_QUIET_UNTIL = (
    f"(SELECT max(b.quiet_until) FROM {{our}}deliveries b WHERE {_ATTEMPTED} AND b.status = 'pending' "
    "AND b.quiet_until > :now)"
)
_WAS_ATTEMPTED = _exists(_ATTEMPTED, "status")
_ISOLATED = f"{_OF_SUBJECT} AND b.status = 'pending' AND b.alone"
_HAS_ISOLATED = _exists(_ISOLATED, "value_at")
_UNSETTLED = f"{_OF_SUBJECT} AND b.status IN ('pending', 'sending')"


def _about(condition: str, subject: str) -> str:
    return condition.replace("{subject}", subject)


def prefer_index_scans(connection: sa.Connection) -> None:
    """Make PostgreSQL use the indexes in this transaction, even while its statistics describe an empty queue."""
    if not is_sqlite(connection):
        off = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "enable_hashjoin", "enable_mergejoin")
        connection.execute(sa.select(*(sa.func.set_config(name, "off", True) for name in off)))


def refresh_statistics(connection: sa.Connection) -> None:
    """Update PostgreSQL's statistics of a queue that has grown; from a small sample, because the lanes wait for it."""
    if not is_sqlite(connection):
        connection.execute(sa.select(sa.func.set_config("default_statistics_target", "10", True)))
        sql(connection, "ANALYZE {our}deliveries")


def _pending_by_full_index() -> sa.ColumnElement[bool]:
    """Return the condition for pending in a form that matches a status column of an index, but no partial index."""
    return deliveries.c.status.in_(("pending", ""))


def _pending_by_claim_index(action: str, delivery_class: str) -> sa.ColumnElement[bool]:
    return sa.and_(deliveries.c.action == action, deliveries.c["class"] == delivery_class, PENDING)


@dataclass(frozen=True, slots=True)
class DueSubject:
    """A subject in a stretch of a queue; `first` is a position at or before its first delivery there.

    `was_attempted`: one of these deliveries was attempted. `is_sending`: a request of the subject is in flight.
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


_STRETCH = f"""
WITH stretch AS (
  SELECT d.subject_id, d.next_attempt_at, d.delivery_id, d.attempt_count > 0 OR d.alone AS was_attempted, {{ours}} AS is_ours
  FROM {{our}}deliveries d
  WHERE d.action = :action AND d.class = :class AND d.status = 'pending' AND d.next_attempt_at <= :now
    AND (d.next_attempt_at, d.delivery_id) > (:after_at, :after_id)
  ORDER BY d.next_attempt_at, d.delivery_id LIMIT :limit),
subjects AS (
  SELECT subject_id, min(next_attempt_at) AS first_at, min(delivery_id) AS first_id, count(*) AS delivery_count,
    max(CASE WHEN was_attempted THEN 1 ELSE 0 END) AS was_attempted, max(CASE WHEN is_ours THEN 1 ELSE 0 END) AS is_ours
  FROM stretch GROUP BY subject_id)
SELECT s.subject_id, s.first_at, s.first_id, s.delivery_count, s.was_attempted, s.is_ours,
  {_about(_IS_SENDING, "s.subject_id")} AS is_sending, {_about(_QUIET_UNTIL, "s.subject_id")} AS quiet_until,
  (SELECT max(next_attempt_at) FROM stretch) AS last_at,
  (SELECT max(delivery_id) FROM stretch WHERE next_attempt_at = (SELECT max(next_attempt_at) FROM stretch)) AS last_id
FROM subjects s"""


def _moments(connection: sa.Connection) -> Callable[[Any], Any]:
    """Return the conversion of times in the results of `sql`."""
    return partial(UtcDateTime().process_result_value, dialect=connection.dialect)


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
    moment = _moments(connection)
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

    After an attempt, only the live lane sends to a user, because there an answer concerns one user. However few
    subjects there are, about `limit` rows are read, or MOST_READ.
    """
    subjects: dict[str, bool] = {}
    left, step = max(limit, MOST_READ), FIRST_STEP_ROWS
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
    """Return those of the users who have no request under way, no earlier attempt and no grace to wait for."""
    idle = _where(connection, users, f"NOT {_WAS_ATTEMPTED} AND NOT {_HAS_ISOLATED}", action="identify")
    return [user for user in users if user in idle]


def _where(
    connection: sa.Connection, subjects: Collection[str], condition: str, **parameters: Any
) -> set[str]:
    """Return the subjects for which a condition holds."""
    query = f"SELECT a.value FROM {json_list(connection, 'subjects')} a WHERE {_about(condition, 'a.value')}"
    return set(sql(connection, query, subjects=to_json(list(subjects)), **parameters).scalars())


def pending_of(
    connection: sa.Connection,
    action: str,
    subjects: Sequence[str],
    now: dt.datetime,
    fingerprint: str | None = None,
) -> list[list[Delivery]]:
    """Return what the next request of each subject may carry, as it will be once claimed: its oldest deliveries.

    For tracks that is the first one. Leaves out subjects that are busy or have nothing due, deliveries that wait for
    another subject, and a subject if another process is changing one of its deliveries.
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
    """Return the ids of the oldest pending deliveries of each subject that is not busy, and of its newest isolated ones."""
    parameters: dict[str, Any] = {"action": action, "most": 1 if action == "track" else MOST_MERGED}
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
SELECT a.value AS subject_id, {_about(_HAS_ISOLATED, "a.value")} AS has_isolated,
  (SELECT {{json_agg}}(o.delivery_id) FROM (
    SELECT d.delivery_id FROM {{our}}deliveries d WHERE {_about(_UNSETTLED, "a.value").replace("b.", "d.")}
      AND d.status = 'pending' {{ours}} ORDER BY d.delivery_id LIMIT :most) o) AS ids
FROM {{list}} a WHERE NOT {_about(_IS_SENDING, "a.value")} AND {_about(_QUIET_UNTIL, "a.value")} IS NULL"""
_NEWEST_ISOLATED = f"""
SELECT d.delivery_id FROM {{our}}deliveries d WHERE {_about(_ISOLATED, ":subject").replace("b.", "d.")} {{ours}}
ORDER BY d.value_at DESC, d.delivery_id DESC LIMIT :most"""


def _waiting_for_another(
    connection: sa.Connection, action: str, loaded: Sequence[sa.Row[*tuple[Any, ...]]], now: dt.datetime
) -> set[int]:
    """Return the deliveries that wait for the first identify of their user (tracks) or company, ten minutes at most."""
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
    unknown = _where(connection, set(others.values()), _IS_AWAITED, action=other_action)
    return {delivery_id for delivery_id, other in others.items() if other in unknown}


_HAS_ACCEPTED = _exists(f"{_OF_SUBJECT} AND b.status = 'accepted'", "value_at")
_IS_AWAITED = f"{_exists(_UNSETTLED, 'delivery_id')} AND NOT {_HAS_ACCEPTED}"

_ALL_BUT_HELD = tuple(status for status in Status if status is not Status.HELD)


def superseded_traits(
    connection: sa.Connection,
    values: Sequence[Delivery | sa.Row[Any]],
    statuses: Collection[Status] = _ALL_BUT_HELD,
    fingerprint: str | None = None,
) -> dict[int, frozenset[str]]:
    """Return, by delivery, those of its traits for which the subject has a newer value in one of the statuses.

    `fingerprint`: count only newer values for this destination or another key or address of its environment.
    """
    superseded: dict[int, frozenset[str]] = {}
    where = _newer_in(statuses)
    parameters: dict[str, Any] = {}
    if fingerprint is not None:
        where = f"{where} AND (b.fingerprint IS NULL OR b.fingerprint IN :environment)"
        parameters["environment"] = environment_of(connection, fingerprint)
    for action in ("identify", "company"):
        by_subject: dict[str, list[Any]] = {}
        for value in values:
            if value.action == action:
                by_subject.setdefault(value.subject_id, []).append(value)
        if not by_subject:
            continue
        parameters |= {
            "action": action,
            "since": min(value.value_at for value in itertools.chain(*by_subject.values())),
        }
        for subject in _where(connection, by_subject, _exists(where, "value_at"), **parameters):
            newest = _newest_values(connection, subject, by_subject[subject], where, parameters)
            for value in by_subject[subject]:
                names = frozenset(name for name in value.body if newest.get(name, _age(value)) > _age(value))
                if names:
                    superseded[value.delivery_id] = names
    return superseded


def _newest_values(
    connection: sa.Connection, subject: str, values: Sequence[Any], where: str, parameters: dict[str, Any]
) -> dict[str, tuple[dt.datetime, int]]:
    """Return the age of the subject's newest value of each trait in these values, among the deliveries `where`."""
    has_trait = f"EXISTS (SELECT 1 FROM {json_keys(connection, 'b.body')} k WHERE k.name = t.value)"
    newest = (
        f"SELECT t.value AS trait, d.value_at, d.delivery_id FROM {json_list(connection, 'names')} t "
        "JOIN {our}deliveries d ON d.delivery_id = (SELECT b.delivery_id FROM {our}deliveries b "
        f"WHERE {_about(where, ':subject')} AND {has_trait} ORDER BY b.value_at DESC, b.delivery_id DESC LIMIT 1)"
    )
    names = sorted({name for value in values for name in value.body})
    since = min(value.value_at for value in values)
    asked = parameters | {"names": to_json(names), "subject": subject, "since": since}
    moment = _moments(connection)
    return {row.trait: (moment(row.value_at), row.delivery_id) for row in sql(connection, newest, **asked)}


def _newer_in(statuses: Collection[Status]) -> str:
    names = ", ".join(f"'{Status(status).value}'" for status in statuses)
    status = f"= {names}" if len(statuses) == 1 else f"IN ({names})"  # = is what the partial index matches
    # The values of a rejected run were never true.
    rejected = (
        "b.status = 'cancelled' AND b.run_id IN (SELECT run_id FROM {our}runs WHERE status = 'rejected')"
    )
    condition = f"{_OF_SUBJECT} AND b.status {status} AND b.value_at >= :since"
    return f"{condition} AND NOT COALESCE({rejected}, false)" if "cancelled" in names else condition


def environment_of(connection: sa.Connection, fingerprint: str) -> list[str]:
    """Return the fingerprints of the environment's keys and addresses, as far as they were accepted as the same."""
    stored = connection.execute(sa.select(destination.c.environments)).scalar_one_or_none() or []
    return sorted({fingerprint}.union(*(names for names in stored if fingerprint in names)))


def reasons_not_to_retry(connection: sa.Connection, ids: Sequence[int]) -> dict[int, str]:
    """Return why some of these deliveries must not get a new attempt.

    A value is superseded if its subject has a newer one of the same trait, whatever the newer one's status: each
    change of a membership is a delivery, so the older value is no longer true.
    """
    rows = connection.execute(
        sa.select(deliveries).where(is_among(connection, deliveries.c.delivery_id, ids))
    ).all()
    by_id = {row.delivery_id: row for row in rows}
    dead = [row for row in rows if row.status == "dead"]
    newer: dict[int, frozenset[str]] = {}
    for fingerprint in {row.fingerprint for row in dead}:
        of_destination = [row for row in dead if row.fingerprint == fingerprint]
        newer |= superseded_traits(connection, of_destination, fingerprint=fingerprint)
    reasons = {}
    for delivery_id in ids:
        row = by_id.get(delivery_id)
        if row is None:
            reasons[delivery_id] = f"There is no delivery {delivery_id}."
        elif row.status != "dead":
            reasons[delivery_id] = f"Delivery {delivery_id} is {row.status}, not dead."
        elif row.body and newer.get(delivery_id, frozenset()).issuperset(row.body):
            reasons[delivery_id] = f"Delivery {delivery_id} is {SUPERSEDED}."
    return reasons


def _age(value: Any) -> tuple[dt.datetime, int]:
    return value.value_at, value.delivery_id


@dataclass(frozen=True, slots=True)
class DueMoment:
    """A future moment at which a delivery of this action and class may be due."""

    action: str
    delivery_class: str
    due_at: dt.datetime


def next_due(connection: sa.Connection, now: dt.datetime) -> list[DueMoment]:
    """Return the next moments at which pending deliveries may be due."""
    moments = [
        DueMoment(row.action, row.delivery_class, row.due_at)
        for row in connection.execute(_NEXT_DUE, {"now": now})
        if row.due_at is not None
    ]
    since = now - FIRST_IDENTIFY_WAIT
    return moments + [
        DueMoment(row.action, "call", row.due_at + FIRST_IDENTIFY_WAIT)
        for row in connection.execute(_FIRST_WAITING, {"now": now, "since": since})
        if row.due_at is not None
    ]


_DUE_AT = deliveries.c.next_attempt_at
_NOW = sa.bindparam("now", type_=_DUE_AT.type)
_SINCE = sa.bindparam("since", type_=_DUE_AT.type)


def _first_due(
    action: str, delivery_class: str, *where: sa.ColumnElement[bool]
) -> sa.Select[*tuple[Any, ...]]:
    return sa.select(
        sa.literal(action).label("action"),
        sa.literal(delivery_class).label("delivery_class"),
        sa.func.min(_DUE_AT, type_=_DUE_AT.type).label("due_at"),
    ).where(_pending_by_claim_index(action, delivery_class), *where)


_NEXT_DUE = sa.union_all(*(_first_due(action, name, _DUE_AT > _NOW) for action in LANES for name in CLASSES))
# Calls that may wait for another subject: users for their company, tracks for their user.
_FIRST_WAITING = sa.union_all(
    *(_first_due(action, "call", _DUE_AT > _SINCE, _DUE_AT <= _NOW) for action in ("track", "identify"))
)


def is_due(connection: sa.Connection, now: dt.datetime, since: dt.datetime | None = None) -> bool:
    """Return whether anything may be claimed, or was left `sending` by a process that is gone.

    `since`: whether anything has become due after this moment.
    """
    due: list[Any] = [
        sa.and_(_pending_by_claim_index(action, delivery_class), _DUE_AT <= _NOW, _DUE_AT > _SINCE)
        for action in LANES
        for delivery_class in CLASSES
    ]
    conditions = due if since else [*due, SENDING]
    exist = [sa.exists(sa.select(_ID).where(condition)) for condition in conditions]
    moments = {"now": now, "since": since or START[0]}
    return bool(connection.execute(sa.select(sa.or_(*exist)), moments).scalar_one())


def scheduled_ahead(connection: sa.Connection, now: dt.datetime) -> list[int]:
    """Return some deliveries whose first attempt is in the future: a clock was ahead when they were queued.

    A first attempt is due at once. Looks at the AHEAD_COUNT of each queue that are due last.
    """
    return list(connection.execute(_SCHEDULED_AHEAD, {"now": now}).scalars())


def _first_attempts_of_last(action: str, delivery_class: str) -> sa.Select[int]:
    last = (
        sa.select(_ID, deliveries.c.attempt_count)
        .where(_pending_by_claim_index(action, delivery_class), _DUE_AT > _NOW)
        .order_by(_DUE_AT.desc(), _ID.desc())
        .limit(AHEAD_COUNT)
        .subquery()
    )
    return sa.select(last.c.delivery_id).where(last.c.attempt_count == 0)


_SCHEDULED_AHEAD = sa.union_all(
    *(_first_attempts_of_last(action, name) for action in LANES for name in CLASSES)
)


def are_waiting(
    connection: sa.Connection, run_ids: Collection[int], call_ids: Collection[int], now: dt.datetime
) -> bool:
    """Return whether deliveries of these runs and calls wait to be claimed for the first time."""
    for origin, ids in ((deliveries.c.run_id, run_ids), (deliveries.c.call_id, call_ids)):
        for chunk in chunks(ids):
            statement = sa.select(deliveries.c.delivery_id).where(
                origin.in_(chunk),
                _pending_by_full_index(),
                deliveries.c.attempt_count == 0,
                deliveries.c.next_attempt_at <= now,
            )
            if connection.execute(statement.limit(1)).first() is not None:
                return True
    return False


def counts(connection: sa.Connection, *where: sa.ColumnElement[bool] | sa.TextClause) -> dict[str, int]:
    return _count_by(connection, deliveries.c.status, *where)


def pending_counts(connection: sa.Connection) -> dict[str, int]:
    """Count what is pending or being sent by action."""
    return _count_by(connection, deliveries.c.action, UNSETTLED)


def _count_by(
    connection: sa.Connection, column: sa.Column[str], *where: sa.ColumnElement[bool] | sa.TextClause
) -> dict[str, int]:
    rows = connection.execute(sa.select(column, sa.func.count()).where(*where).group_by(column))
    return {value: count for value, count in rows}  # noqa: C416  (a row is not a pair to mypy)


def pending_count(connection: sa.Connection) -> int:
    return sum(pending_counts(connection).values())


def is_anything_pending(connection: sa.Connection) -> bool:
    """Return whether `pending_count` is more than 0, in a time that does not depend on the queue's length."""
    one = sa.select(deliveries.c.delivery_id).where(UNSETTLED).limit(1)
    return connection.execute(one).first() is not None
