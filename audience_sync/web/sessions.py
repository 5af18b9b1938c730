"""Sessions of signed-in users: their table, how long they last, and what ends them.

The browser has a random token; the table has only its hash. A session ends when its user is removed from the
configuration, or gets another role or password.
"""

import datetime as dt
import hashlib
import hmac
import secrets
from collections.abc import Mapping

import sqlalchemy as sa

from audience_sync.db.tables import sessions
from audience_sync.settings.schema import WebUser

LIFE = dt.timedelta(hours=12)
IDLE = dt.timedelta(hours=2)
SEEN_EVERY = dt.timedelta(minutes=1)  # how often the last use is written, at most


def start_session(connection: sa.Connection, user: WebUser, now: dt.datetime) -> str:
    """Begin a session and return its token; delete the sessions that have ended."""
    token = secrets.token_urlsafe(32)
    has_ended = (sessions.c.created_at <= now - LIFE) | (sessions.c.last_seen_at <= now - IDLE)
    connection.execute(sessions.delete().where(has_ended))
    row = {"token_hash": _hashed(token), "user_name": user.name, "credential": _credential(user)}
    connection.execute(sessions.insert().values(**row, created_at=now, last_seen_at=now))
    return token


def find_session(
    connection: sa.Connection, token: str, users: Mapping[str, WebUser], now: dt.datetime
) -> tuple[WebUser, dt.datetime] | None:
    """Return the user of a session and when it was last used; None if there is none, or it has ended."""
    row = connection.execute(sa.select(sessions).where(sessions.c.token_hash == _hashed(token))).one_or_none()
    if row is None or now >= min(row.created_at + LIFE, row.last_seen_at + IDLE):
        return None
    user = users.get(row.user_name)
    if user is None or not hmac.compare_digest(row.credential, _credential(user)):
        return None
    return user, row.last_seen_at


def set_last_seen(connection: sa.Connection, token: str, now: dt.datetime) -> None:
    is_used = sessions.c.token_hash == _hashed(token)
    connection.execute(sessions.update().where(is_used).values(last_seen_at=now))


def end_session(connection: sa.Connection, token: str) -> None:
    connection.execute(sessions.delete().where(sessions.c.token_hash == _hashed(token)))


def csrf_token(token: str) -> str:
    """Return the token for the forms of a session, from which the session's own token cannot be computed."""
    return hmac.new(token.encode(), b"csrf", hashlib.sha256).hexdigest()


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _credential(user: WebUser) -> str:
    return hashlib.sha256(f"{user.role}\n{user.password.require()}".encode()).hexdigest()
