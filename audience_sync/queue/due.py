"""Queries for deliveries: which may be claimed, which are superseded, which wait. deliveries.py changes them.

A subject is a user or a company. Its deliveries wait while one of them is being sent, and after an unknown outcome.
Every function runs in its caller's transaction.
"""

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.db.dialects import chunks, is_among, is_sqlite, sql
from audience_sync.db.tables import PENDING, SENDING, UNSETTLED, deliveries, destination, runs
from audience_sync.queue.outcomes import SUPERSEDED, Delivery, Status

LANES = ("track", "company", "identify")
CLASSES = ("call", "change", "push")  # in the order in which they are claimed
AHEAD_COUNT = 1_000
FIRST_IDENTIFY_WAIT = dt.timedelta(minutes=10)  # tracks wait no longer for the user's first identify

# The subject is busy, or another delivery that is due already stands for it: one is enough, however many there are.
_WAITS = """EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id AND b.action = d.action
  AND b.status IN ('pending', 'sending') AND (b.status = 'sending' OR b.quiet_until > :now
    OR (b.delivery_id < d.delivery_id AND b.class = d.class AND b.alone = d.alone
        AND b.next_attempt_at <= :now)))"""
# A user's tracks are sent in order, and after that user's first identify.
_TRACK_WAITS = """(EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
    AND b.action = 'track' AND b.status IN ('pending', 'sending')
    AND (b.status = 'sending' OR b.delivery_id < d.delivery_id))
  OR (d.created_at > :patience
    AND EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
      AND b.action = 'identify' AND b.status IN ('pending', 'sending'))
    AND NOT EXISTS (SELECT 1 FROM {our}deliveries b WHERE b.subject_id = d.subject_id
      AND b.action = 'identify' AND b.status = 'accepted')))"""
_WAS_ATTEMPTED = "(d.attempt_count > 0 OR d.alone)"


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


def not_by_index(column: sa.Column[str]) -> sa.ColumnElement[str]:
    """Return the column as an expression that no index matches."""
    return column.concat("")


def _pending_by_full_index() -> sa.ColumnElement[bool]:
    """Return the condition for pending in a form that matches a status column of an index, but no partial index."""
    return deliveries.c.status.in_(("pending", ""))


def _pending_by_claim_index(action: str, delivery_class: str) -> sa.ColumnElement[bool]:
    return sa.and_(deliveries.c.action == action, deliveries.c["class"] == delivery_class, PENDING)


def subjects_due(
    connection: sa.Connection,
    action: str,
    delivery_class: str,
    now: dt.datetime,
    limit: int,
    fingerprint: str | None = None,
) -> dict[str, bool]:
    """Return the subjects that may be sent to now, oldest first, each with whether it was attempted before.

    After an attempt, only the live lane sends to a user, because there an answer concerns one user. `fingerprint`:
    only deliveries for this destination, and those for none in particular.
    """
    waits = _TRACK_WAITS if action == "track" else _WAITS
    parameters: dict[str, Any] = {"patience": now - FIRST_IDENTIFY_WAIT} if action == "track" else {}
    ours = ""
    if fingerprint is not None:
        ours = "AND (d.fingerprint = :fingerprint OR d.fingerprint IS NULL) "
        parameters["fingerprint"] = fingerprint
    rows = sql(
        connection,
        f"SELECT d.subject_id, {_WAS_ATTEMPTED} AS was_attempted FROM {{our}}deliveries d "
        "WHERE d.action = :action AND d.class = :class "
        f"AND d.status = 'pending' AND d.next_attempt_at <= :now AND NOT {waits} {ours}"
        "ORDER BY d.next_attempt_at, d.delivery_id LIMIT :limit",
        **{"class": delivery_class},
        action=action,
        now=now,
        limit=limit,
        **parameters,
    )
    subjects: dict[str, bool] = {}
    for row in rows:
        subjects[row.subject_id] = subjects.get(row.subject_id, False) or bool(row.was_attempted)
    return subjects


def idle_users(connection: sa.Connection, users: list[str], now: dt.datetime) -> list[str]:
    """Return those of the users who have no request under way, no earlier attempt and no grace to wait for."""
    busy = sql(
        connection,
        "SELECT DISTINCT d.subject_id FROM {our}deliveries d WHERE d.subject_id IN :users AND d.action = 'identify' "
        f"AND d.status IN ('pending', 'sending') AND (d.status = 'sending' OR d.quiet_until > :now OR {_WAS_ATTEMPTED})",
        users=users,
        now=now,
    )
    busy_users = set(busy.scalars())
    return [user for user in users if user not in busy_users]


def pending_of(
    connection: sa.Connection,
    action: str,
    subjects: Sequence[str],
    now: dt.datetime,
    fingerprint: str | None = None,
) -> list[list[Delivery]]:
    """Return the pending deliveries of each subject, as they will be once claimed; for tracks, only the first.

    Leaves out a subject if another process is changing one of its deliveries.
    """
    statement = _PENDING_TRACKS if action == "track" else _PENDING
    if fingerprint is not None:
        statement = statement.where(
            sa.or_(deliveries.c.fingerprint == fingerprint, deliveries.c.fingerprint.is_(None))
        )
    by_subject: dict[str, list[Delivery]] = {subject: [] for subject in subjects}
    for row in connection.execute(statement, {"action": action, "subjects": subjects}):
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
    pending = [group for group in by_subject.values() if group]
    if is_sqlite(connection):
        return pending
    ids = [delivery.delivery_id for group in pending for delivery in group]
    locked = set(connection.execute(_LOCK, {"ids": ids}).scalars())
    return [group for group in pending if locked.issuperset(delivery.delivery_id for delivery in group)]


_ID = deliveries.c.delivery_id
_IS_PENDING = deliveries.c.status == "pending"
_OF_SUBJECTS = sa.and_(
    deliveries.c.subject_id.in_(sa.bindparam("subjects", expanding=True)),
    not_by_index(deliveries.c.action) == sa.bindparam("action"),
    UNSETTLED,  # for the index by subject
    PENDING,
)
_COLUMNS = sa.select(
    _ID,
    deliveries.c.subject_id,
    deliveries.c.body,
    deliveries.c.value_at,
    deliveries.c.call_id,
    deliveries.c.alone,
    deliveries.c.attempt_count,
    deliveries.c.first_attempt_at,
    deliveries.c.next_attempt_at,
)
_PENDING = _COLUMNS.where(_OF_SUBJECTS)
_PENDING_TRACKS = _COLUMNS.where(
    _ID.in_(sa.select(sa.func.min(_ID)).where(_OF_SUBJECTS).group_by(deliveries.c.subject_id)),
    _IS_PENDING,
)
_LOCK = (
    sa.select(_ID)
    .where(sa.any_(sa.bindparam("ids", type_=postgresql.ARRAY(sa.BigInteger))) == _ID, _IS_PENDING)
    .with_for_update(skip_locked=True)
)

_ALL_BUT_HELD = tuple(status for status in Status if status is not Status.HELD)


def superseded_traits(
    connection: sa.Connection,
    values: Sequence[Delivery | sa.Row[Any]],
    statuses: Collection[Status] = _ALL_BUT_HELD,
    fingerprint: str | None = None,
) -> dict[int, frozenset[str]]:
    """Return, by delivery, the traits for which the subject has a newer value in one of the statuses.

    `fingerprint`: count only newer values for this destination or another key or address of its environment.
    """
    by_subject: dict[tuple[str, str], list[Any]] = {}
    for value in values:
        if value.action != "track":
            by_subject.setdefault((value.action, value.subject_id), []).append(value)
    if not by_subject:
        return {}
    superseded: dict[int, frozenset[str]] = {}
    for subject, newer in _newer_values(connection, by_subject, statuses, fingerprint).items():
        names: frozenset[str] = frozenset()
        for value in sorted(by_subject.get(subject, ()), key=_age, reverse=True):
            while newer and _age(newer[-1]) > _age(value):
                names = names.union(newer.pop().body)
            if names:
                superseded[value.delivery_id] = names
    return superseded


def _newer_values(
    connection: sa.Connection,
    by_subject: dict[tuple[str, str], list[Any]],
    statuses: Collection[Status],
    fingerprint: str | None,
) -> dict[tuple[str, str], list[Any]]:
    """Return the deliveries of these subjects since the oldest of the values, by subject, oldest first."""
    is_ours: sa.ColumnElement[bool] = sa.true()
    if fingerprint is not None:
        ours = deliveries.c.fingerprint.in_(environment_of(connection, fingerprint))
        is_ours = sa.or_(deliveries.c.fingerprint.is_(None), ours)
    rejected = sa.select(runs.c.run_id).where(runs.c.status == "rejected")
    rows = connection.execute(
        sa.select(
            _ID,
            deliveries.c.action,
            deliveries.c.subject_id,
            deliveries.c.value_at,
            deliveries.c.body,
        ).where(
            deliveries.c.subject_id.in_({subject_id for _, subject_id in by_subject}),
            deliveries.c.value_at
            >= min(value.value_at for values in by_subject.values() for value in values),
            deliveries.c.status.in_(list(statuses)),
            is_ours,
            sa.or_(
                deliveries.c.status != "cancelled",
                deliveries.c.run_id.is_(None),
                deliveries.c.run_id.not_in(rejected),  # the values of a rejected run never held
            ),
        )
    )
    newer: dict[tuple[str, str], list[Any]] = {}
    for row in sorted(rows, key=_age):
        newer.setdefault((row.action, row.subject_id), []).append(row)
    return newer


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
        DueMoment(row.action, row.delivery_class, moment)
        for row in connection.execute(_NEXT_DUE, {"now": now})
        for moment in (row.due_at, row.grace_until)
        if moment is not None
    ]
    first_track = connection.execute(_FIRST_TRACK, {"now": now, "since": now - FIRST_IDENTIFY_WAIT}).scalar()
    if first_track is not None:
        moments.append(DueMoment("track", "call", first_track + FIRST_IDENTIFY_WAIT))
    return moments


_DUE_AT = deliveries.c.next_attempt_at
_NOW = sa.bindparam("now", type_=_DUE_AT.type)
_SINCE = sa.bindparam("since", type_=_DUE_AT.type)
_GRACE_UNTIL = sa.case(  # never after its _DUE_AT
    (deliveries.c.quiet_until > _NOW, deliveries.c.quiet_until)
)
_NEXT_DUE = sa.union_all(
    *(
        sa.select(
            sa.literal(action).label("action"),
            sa.literal(delivery_class).label("delivery_class"),
            sa.func.min(_DUE_AT, type_=_DUE_AT.type).label("due_at"),
            sa.func.min(_GRACE_UNTIL, type_=_DUE_AT.type).label("grace_until"),
        ).where(_pending_by_claim_index(action, delivery_class), _DUE_AT > _NOW)
        for action in LANES
        for delivery_class in CLASSES
    )
)
_FIRST_TRACK = sa.select(sa.func.min(_DUE_AT, type_=_DUE_AT.type)).where(
    _pending_by_claim_index("track", "call"), _DUE_AT > _SINCE, _DUE_AT <= _NOW
)


def is_due(connection: sa.Connection, now: dt.datetime) -> bool:
    """Return whether anything may be claimed, or is left `sending` by a process that is gone."""
    due: list[Any] = [
        sa.and_(_pending_by_claim_index(action, delivery_class), _DUE_AT <= _NOW)
        for action in LANES
        for delivery_class in CLASSES
    ]
    exist = [sa.exists(sa.select(_ID).where(condition)) for condition in (*due, SENDING)]
    return bool(connection.execute(sa.select(sa.or_(*exist)), {"now": now}).scalar_one())


def scheduled_ahead(connection: sa.Connection, now: dt.datetime) -> list[int]:
    """Return some deliveries of calls whose first attempt is to come: a clock was ahead when they were queued.

    A first attempt is due at once. Looks at the AHEAD_COUNT that are due last.
    """
    ids: list[int] = []
    for action in LANES:
        last = (
            sa.select(_ID, deliveries.c.attempt_count)
            .where(_pending_by_claim_index(action, "call"), _DUE_AT > _NOW)
            .order_by(_DUE_AT.desc(), _ID.desc())
            .limit(AHEAD_COUNT)
            .subquery()
        )
        query = sa.select(last.c.delivery_id).where(last.c.attempt_count == 0)
        ids += connection.execute(query, {"now": now}).scalars()
    return ids


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
