"""Erase users: delete their rows, and store the hash of the id, so that later runs and calls leave them out."""

import datetime as dt
import hashlib
from collections.abc import Iterable
from typing import Protocol

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
DELETIONS_HOUR = 2  # UTC, when Userpilot carries deletions out (its documentation of DELETE /v1/users)
_LOCK = 4_710_226_014  # an arbitrary number: PostgreSQL's advisory lock between calls and erasures


class UserDeleter(Protocol):
    def delete_user(self, user_id: str, /) -> Answer: ...


def forget_everywhere(engine: sa.Engine, deleter: UserDeleter, user_id: str, clock: Clock) -> int:
    """Have Userpilot delete a user, then erase the user here; return how many memberships that ended.

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
            f"Userpilot did not accept the deletion ({answer.error}), so nothing was changed: run it again."
        )
    with engines.write(engine) as connection:
        return forget(connection, user_id, clock.now())


def forget(connection: sa.Connection, user_id: str, now: dt.datetime) -> int:
    """Erase a user here; return how many memberships that ended.

    Each of these counts as an exit in its definition's next run.
    """
    if not is_sqlite(connection):
        sql(connection, "SELECT pg_advisory_xact_lock(:lock)", lock=_LOCK)
    memberships = _end_memberships(connection, user_id)
    _delete_deliveries(connection, user_id)
    for table in ("profiles", "events", "calls"):
        sql(connection, f"DELETE FROM {{our}}{table} WHERE user_id = :user_id", user_id=user_id)
    sql(connection, "DELETE FROM {our}calls WHERE anonymous_id = :id AND user_id IS NULL", id=user_id)
    sql(connection, "UPDATE {our}calls SET anonymous_id = NULL WHERE anonymous_id = :id", id=user_id)
    connection.execute(forgotten.delete().where(forgotten.c.user_hash == user_hash(user_id)))
    connection.execute(forgotten.insert().values(user_hash=user_hash(user_id), forgotten_at=now))
    return memberships


def _end_memberships(connection: sa.Connection, user_id: str) -> int:
    locked = (
        sa.select(definitions.c.definition_id)
        .order_by(definitions.c.definition_id)
        .with_for_update(key_share=True)
    )
    count = 0
    for definition_id in connection.execute(locked).scalars().all():
        key = {"definition_id": definition_id, "user_id": user_id}
        where = "WHERE definition_id = :definition_id AND user_id = :user_id"
        ended = sql(connection, f"DELETE FROM {{our}}members {where}", **key).rowcount
        sql(connection, f"DELETE FROM {{our}}past_members {where}", **key)
        if ended:
            count += 1
            forgotten_count = definitions.c.forgotten_count + 1
            definition = definitions.update().where(definitions.c.definition_id == definition_id)
            connection.execute(definition.values(forgotten_count=forgotten_count))
    return count


def _delete_deliveries(connection: sa.Connection, user_id: str) -> None:
    is_of_user = sa.and_(deliveries.c.subject_id == user_id, deliveries.c.action != "company")
    request_ids = sa.select(deliveries.c.request_id).where(is_of_user)
    connection.execute(  # Userpilot's error messages may quote the id
        requests.update()
        .where(requests.c.request_id.in_(request_ids), requests.c.error.is_not(None))
        .values(error=None)
    )
    delete_deliveries(connection, deliveries.delete().where(is_of_user))


def allow_return(connection: sa.Connection, user_id: str) -> dt.datetime | None:
    """Allow an erased user to be sent again, once Userpilot has carried out the deletion.

    Returns the moment of that, or None if the user was not erased.
    """
    is_user = forgotten.c.user_hash == user_hash(user_id)
    row = connection.execute(sa.select(forgotten).where(is_user)).one_or_none()
    if row is None:
        return None
    returns_at = next_deletions(row.forgotten_at)
    connection.execute(forgotten.update().where(is_user).values(returns_at=returns_at))
    return returns_at


def block_erasures(connection: sa.Connection) -> None:
    """Delay erasures by other processes until this transaction ends, so that they see the rows it writes."""
    if not is_sqlite(connection):
        sql(connection, "SELECT pg_advisory_xact_lock_shared(:lock)", lock=_LOCK)


def forgotten_among(connection: sa.Connection, user_ids: Iterable[str], now: dt.datetime) -> set[str]:
    """Return those of the users who are erased; `user_ids` is not read if nobody is."""
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
    """SHA-256 of the id, in hexadecimal: all that is stored of an erased user."""
    return hashlib.sha256(user_id.encode()).hexdigest()


def next_deletions(after: dt.datetime) -> dt.datetime:
    """Return when Userpilot carries out a deletion that it accepted at a moment."""
    same_day = after.astimezone(dt.UTC).replace(hour=DELETIONS_HOUR, minute=0, second=0, microsecond=0)
    return same_day if same_day > after else same_day + dt.timedelta(days=1)
