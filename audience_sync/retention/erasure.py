"""Erase users: delete their rows, and store the hash of the id, so that later runs and calls leave them out."""

import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import sqlalchemy as sa

from audience_sync.clock import Clock
from audience_sync.db import engines
from audience_sync.db.dialects import chunks, is_sqlite, sql
from audience_sync.db.tables import definitions, deliveries, forgotten, requests
from audience_sync.errors import NotForgotten
from audience_sync.retention.pruning import delete_deliveries
from audience_sync.userpilot.answers import Answer, Outcome

DELETION_ATTEMPTS = 4
DELETION_PAUSE_SECONDS = 2.5  # Userpilot documents one deletion in 2 s
DELETIONS_HOUR = 2  # UTC; the hour of Userpilot's deletions, by its documentation of DELETE /v1/users
_LOCK = 4_710_226_014  # an arbitrary number: PostgreSQL's advisory lock between calls and erasures


class UserDeleter(Protocol):
    def delete_user(self, user_id: str, /) -> Answer: ...


def forget_everywhere(engine: sa.Engine, deleter: UserDeleter, user_id: str, clock: Clock) -> Counter[str]:
    """Have Userpilot delete a user, then erase the user here; return the number of erased rows by table.

    Raises:
        NotForgotten: Userpilot did not accept the deletion; nothing was changed.

    """
    answer = deleter.delete_user(user_id)
    for _ in range(DELETION_ATTEMPTS - 1):
        if answer.outcome in {Outcome.ACCEPTED, Outcome.REFUSED, Outcome.UNAUTHORISED}:
            break
        clock.sleep(answer.retry_after_seconds or DELETION_PAUSE_SECONDS)
        answer = deleter.delete_user(user_id)
    if answer.outcome is not Outcome.ACCEPTED:
        raise NotForgotten(
            f"Userpilot did not accept the deletion ({answer.error}), so nothing was changed: run the command again."
        )
    with engines.write(engine) as connection:
        _exclude(connection, user_id, clock.now())
        definition_ids = _definition_ids(connection)
    erased = Counter[str]()
    for definition_id in definition_ids:
        with engines.write(
            engine
        ) as connection:  # so that it waits for one run's commit at a time and delays no other
            erased += _end_membership(connection, definition_id, user_id)
    with engines.write(engine) as connection:
        erased += _erase_calls(connection, user_id)
    return erased


def forget(connection: sa.Connection, user_id: str, now: dt.datetime) -> int:
    """Erase a user here, in the caller's transaction; return how many memberships this ended.

    Each of them counts as an exit in the next run of its definition.
    """
    ended = [_end_membership(connection, number, user_id) for number in _definition_ids(connection)]
    _exclude(connection, user_id, now)
    _erase_calls(connection, user_id)
    return sum(erased["members"] for erased in ended)


def _exclude(connection: sa.Connection, user_id: str, now: dt.datetime) -> None:
    """Make later runs and calls leave the user out; wait for the calls that are being stored."""
    if not is_sqlite(connection):
        sql(connection, "SELECT pg_advisory_xact_lock(:lock)", lock=_LOCK)
    connection.execute(forgotten.delete().where(forgotten.c.user_hash == user_hash(user_id)))
    connection.execute(forgotten.insert().values(user_hash=user_hash(user_id), forgotten_at=now))


def _definition_ids(connection: sa.Connection) -> Sequence[int]:
    query = sa.select(definitions.c.definition_id).order_by(definitions.c.definition_id)
    return connection.execute(query).scalars().all()


def _end_membership(connection: sa.Connection, definition_id: int, user_id: str) -> Counter[str]:
    """Erase the user from a definition and its deliveries; return the number of erased rows by table.

    The lock waits for a run that is committing, because its changes may concern the user.
    """
    is_definition = definitions.c.definition_id == definition_id
    connection.execute(sa.select(definitions).where(is_definition).with_for_update(key_share=True))
    key = {"definition_id": definition_id, "user_id": user_id}
    where = "WHERE definition_id = :definition_id AND user_id = :user_id"
    erased = Counter(
        {
            table: sql(connection, f"DELETE FROM {{our}}{table} {where}", **key).rowcount
            for table in ("members", "past_members")
        }
    )
    if erased["members"]:
        forgotten_count = definitions.c.forgotten_count + 1
        connection.execute(definitions.update().where(is_definition).values(forgotten_count=forgotten_count))
    erased["deliveries"] = _delete_deliveries(
        connection, user_id, deliveries.c.definition_id == definition_id
    )
    return erased


def _erase_calls(connection: sa.Connection, user_id: str) -> Counter[str]:
    """Erase the user's calls, profile, events and remaining deliveries; return the number of rows by table."""
    erased = Counter(deliveries=_delete_deliveries(connection, user_id))
    for table in ("profiles", "events", "calls"):
        where = "WHERE user_id = :user_id"
        erased[table] = sql(connection, f"DELETE FROM {{our}}{table} {where}", user_id=user_id).rowcount
    for change in (
        "DELETE FROM {our}calls WHERE anonymous_id = :id AND user_id IS NULL",
        "UPDATE {our}calls SET anonymous_id = NULL WHERE anonymous_id = :id",
    ):
        erased["calls"] += sql(connection, change, id=user_id).rowcount
    return erased


def _delete_deliveries(connection: sa.Connection, user_id: str, *where: sa.ColumnElement[bool]) -> int:
    is_of_user = sa.and_(deliveries.c.subject_id == user_id, deliveries.c.action != "company", *where)
    request_ids = sa.select(deliveries.c.request_id).where(is_of_user)
    connection.execute(  # Userpilot's error messages may quote the id
        requests.update()
        .where(requests.c.request_id.in_(request_ids), requests.c.error.is_not(None))
        .values(error=None)
    )
    return delete_deliveries(connection, deliveries.delete().where(is_of_user))


def find_erasure(connection: sa.Connection, user_id: str) -> sa.Row[Any] | None:
    """Return when a user was erased (`forgotten_at`) and may be sent again (`returns_at`); None if never erased."""
    query = sa.select(forgotten).where(forgotten.c.user_hash == user_hash(user_id))
    return connection.execute(query).one_or_none()


def allow_return(connection: sa.Connection, user_id: str) -> dt.datetime | None:
    """Allow an erased user to be sent again after Userpilot has carried out the deletion.

    Returns the moment from which that is allowed, or None if the user was not erased.
    """
    row = find_erasure(connection, user_id)
    if row is None:
        return None
    returns_at = next_deletions(row.forgotten_at)
    is_user = forgotten.c.user_hash == row.user_hash
    connection.execute(forgotten.update().where(is_user).values(returns_at=returns_at))
    return returns_at


def block_erasures(connection: sa.Connection) -> None:
    """Make erasures by other processes wait until this transaction ends, so that they see the rows that it writes.

    An erasure that holds this lock waits for nothing else, so a run's commit does not delay calls.
    """
    if not is_sqlite(connection):
        sql(connection, "SELECT pg_advisory_xact_lock_shared(:lock)", lock=_LOCK)


def forgotten_among(connection: sa.Connection, user_ids: Iterable[str], now: dt.datetime) -> set[str]:
    """Return the erased users among these; `user_ids` is not read if no user was ever erased."""
    if not connection.execute(sa.select(sa.exists(sa.select(forgotten.c.user_hash)))).scalar_one():
        return set()
    by_hash = {user_hash(user_id): user_id for user_id in user_ids}
    erased: set[str] = set()
    for chunk in chunks(by_hash):
        hashes = connection.execute(
            sa.select(forgotten.c.user_hash).where(
                forgotten.c.user_hash.in_(chunk),
                sa.or_(forgotten.c.returns_at.is_(None), forgotten.c.returns_at > now),
            )
        )
        erased.update(by_hash[row.user_hash] for row in hashes)
    return erased


def user_hash(user_id: str) -> str:
    """SHA-256 of the id, in hexadecimal: the only thing that is stored about an erased user."""
    return hashlib.sha256(user_id.encode()).hexdigest()


def next_deletions(after: dt.datetime) -> dt.datetime:
    """Return when Userpilot carries out a deletion that it accepted at this moment."""
    same_day = after.astimezone(dt.UTC).replace(hour=DELETIONS_HOUR, minute=0, second=0, microsecond=0)
    return same_day if same_day > after else same_day + dt.timedelta(days=1)
