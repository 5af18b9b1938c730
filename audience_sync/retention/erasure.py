"""Users who were erased: their rows are gone, and the hash of the id keeps them from coming back by accident."""

import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import sqlalchemy as sa

from audience_sync.clock import Clock
from audience_sync.db import engines
from audience_sync.db.dialects import chunks, is_sqlite, sql
from audience_sync.db.tables import definitions, deliveries, forgotten, requests, runs
from audience_sync.errors import NotForgotten
from audience_sync.userpilot.answers import Answer, Outcome

_LOCK = 4_710_226_014  # any number that is ours: PostgreSQL's advisory lock between calls and erasures
DELETION_ATTEMPTS = 4
DELETION_PAUSE_SECONDS = 2.5  # Userpilot documents one request in 2 s
DELETIONS_HOUR = 2  # UTC: when Userpilot carries deletions out (its documentation of DELETE /v1/users)


def user_hash(user_id: str) -> str:
    """What is kept of a user who was erased: SHA-256 of the id, in hexadecimal."""
    return hashlib.sha256(user_id.encode()).hexdigest()


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
    """Erase a user; how many memberships that ended. Each counts as an exit of its definition's next run."""
    if not is_sqlite(connection):
        sql(connection, "SELECT pg_advisory_xact_lock(:lock)", lock=_LOCK)
    locked = (
        sa.select(definitions.c.definition_id)
        .order_by(definitions.c.definition_id)
        .with_for_update(key_share=True)
    )
    ids = connection.execute(locked).scalars().all()
    memberships = 0
    for definition_id in ids:
        key = {"definition_id": definition_id, "user_id": user_id}
        mine = "WHERE definition_id = :definition_id AND user_id = :user_id"
        ended = sql(connection, f"DELETE FROM {{our}}members {mine}", **key).rowcount
        sql(connection, f"DELETE FROM {{our}}past_members {mine}", **key)
        if ended:
            memberships += 1
            sql(
                connection,
                "UPDATE {our}definitions SET forgotten_count = forgotten_count + 1 "
                "WHERE definition_id = :definition_id",
                definition_id=definition_id,
            )
    _drop_deliveries(connection, user_id)
    for table in ("profiles", "events", "calls"):
        sql(connection, f"DELETE FROM {{our}}{table} WHERE user_id = :user_id", user_id=user_id)
    sql(connection, "DELETE FROM {our}calls WHERE anonymous_id = :id AND user_id IS NULL", id=user_id)
    sql(connection, "UPDATE {our}calls SET anonymous_id = NULL WHERE anonymous_id = :id", id=user_id)
    connection.execute(forgotten.delete().where(forgotten.c.user_hash == user_hash(user_id)))
    connection.execute(forgotten.insert().values(user_hash=user_hash(user_id), forgotten_at=now))
    return memberships


def _drop_deliveries(connection: sa.Connection, user_id: str) -> None:
    """Their counts stay with the runs; what was still to be sent counts as cancelled."""
    mine = sa.and_(deliveries.c.subject_id == user_id, deliveries.c.action != "company")
    of_mine = sa.select(deliveries.c.request_id).where(mine)
    connection.execute(  # the API's words may quote the id
        requests.update()
        .where(requests.c.request_id.in_(of_mine), requests.c.error.is_not(None))
        .values(error=None)
    )
    gone = connection.execute(
        deliveries.delete().where(mine).returning(deliveries.c.run_id, deliveries.c.status)
    ).all()
    counts = Counter(
        (run_id, status if status in {"accepted", "dead"} else "cancelled")
        for run_id, status in gone
        if run_id is not None
    )
    for (run_id, status), count in sorted(counts.items()):  # in one order, as others lock them
        column = runs.c[f"{status}_count"]
        connection.execute(runs.update().where(runs.c.run_id == run_id).values({column: column + count}))


def allow_return(connection: sa.Connection, user_id: str) -> dt.datetime | None:
    """Let an erased user come back once the deletion was carried out; from when on. None: was not erased."""
    mine = forgotten.c.user_hash == user_hash(user_id)
    row = connection.execute(sa.select(forgotten).where(mine)).one_or_none()
    if row is None:
        return None
    returns_at = next_deletions(row.forgotten_at)
    connection.execute(forgotten.update().where(mine).values(returns_at=returns_at))
    return returns_at


def keep_out_erasures(connection: sa.Connection) -> None:
    """Until this transaction ends nobody is erased: who was not by then is erased with what it keeps."""
    if not is_sqlite(connection):
        sql(connection, "SELECT pg_advisory_xact_lock_shared(:lock)", lock=_LOCK)


def forgotten_among(connection: sa.Connection, user_ids: Iterable[str], now: dt.datetime) -> set[str]:
    """Those of the users of whom nothing may be kept or sent; the ids are looked at only if there are any."""
    if not connection.execute(sa.select(sa.exists(sa.select(forgotten.c.user_hash)))).scalar_one():
        return set()
    hashes = {user_hash(each): each for each in user_ids}
    found: set[str] = set()
    for some in chunks(hashes):
        rows = connection.execute(
            sa.select(forgotten.c.user_hash).where(
                forgotten.c.user_hash.in_(some),
                sa.or_(forgotten.c.returns_at.is_(None), forgotten.c.returns_at > now),
            )
        )
        found.update(hashes[each] for each in rows.scalars())
    return found


def next_deletions(after: dt.datetime) -> dt.datetime:
    """When Userpilot carries out what was asked for at a moment."""
    same_day = after.astimezone(dt.UTC).replace(hour=DELETIONS_HOUR, minute=0, second=0, microsecond=0)
    return same_day if same_day > after else same_day + dt.timedelta(days=1)
