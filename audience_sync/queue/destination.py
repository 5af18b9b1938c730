"""The destination: which endpoint and key it is, and whether it is stopped or slowed down.

Deliveries and baselines belong to the destination that they were made for. Deliveries for another one are held until a
person decides; the messages below say how.
"""

import datetime as dt
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.dialects import sql
from audience_sync.db.tables import destination
from audience_sync.queue import deliveries, superseded
from audience_sync.userpilot.answers import Answer, Outcome

HEARTBEAT_TIMEOUT = dt.timedelta(seconds=60)  # a daemon whose last heartbeat is older is not running
MADE_FOR_ANOTHER = "made for another destination than the one that is configured now"


def other_destination(key: str = "KEY") -> str:
    """Return the end of a message about something that was made for another destination, including what to do."""
    return (
        f"{MADE_FOR_ANOTHER}. If the endpoint or the API key is wrong, correct it. For a new environment, run "
        f"`audience-sync sync {key} --full`, which sends everything there; for the same environment with a new API key "
        "or address, run `audience-sync check --accept-destination`"
    )


@dataclass(frozen=True, slots=True)
class Destination:
    """An endpoint and its API key. The fingerprint is a hash of both, or None while there is no key."""

    fingerprint: str | None = None

    def is_foreign(self, connection: sa.Connection, fingerprint: str | None) -> bool:
        """Return whether deliveries that were made for a fingerprint must not be sent here."""
        is_other = self.fingerprint and fingerprint and fingerprint != self.fingerprint
        return bool(is_other) and has_accepted(connection, fingerprint or "")

    def hold_foreign_calls(self, connection: sa.Connection) -> None:
        """Hold the pending deliveries of calls that were made for another destination."""
        if self.fingerprint is None:
            return
        for other in deliveries.other_fingerprints_of_calls(connection, self.fingerprint):
            if other is not None and self.is_foreign(connection, other):
                deliveries.hold_calls(connection, other, MADE_FOR_ANOTHER)
            else:
                deliveries.assign_calls(connection, self.fingerprint, other)


def has_accepted(connection: sa.Connection, fingerprint: str) -> bool:
    """Return whether this destination, or another key of its environment, may have accepted anything.

    If its key was refused before the first delivery, it accepted nothing, and any other destination may replace it.
    """
    if stopped(connection) is None:
        return True
    environment = superseded.environment_of(connection, fingerprint)
    accepted = "SELECT 1 FROM {our}deliveries WHERE fingerprint IN :environment AND status IN ('accepted', 'sending')"
    pruned = (
        "SELECT 1 FROM {our}runs r JOIN {our}definitions d ON d.definition_id = r.definition_id "
        "WHERE d.fingerprint IN :environment AND r.accepted_count > 0"
    )
    return any(
        sql(connection, f"{query} LIMIT 1", environment=environment).first() is not None
        for query in (accepted, pruned)
    )


def join_environments(connection: sa.Connection, fingerprints: set[str]) -> None:
    """Record that these keys and addresses belong to one environment: values for one of them are values for all."""
    stored = connection.execute(sa.select(destination.c.environments)).scalar_one_or_none() or []
    joined = fingerprints.union(*(names for names in stored if fingerprints & set(names)))
    others = [names for names in stored if not joined & set(names)]
    _set_destination(connection, environments=[*others, sorted(joined)])


class Stopped(NamedTuple):
    at: dt.datetime
    reason: str


def stopped(connection: sa.Connection) -> Stopped | None:
    """Return when and why delivery stopped; None if the destination is not stopped."""
    row = connection.execute(sa.select(destination)).one_or_none()
    return None if row is None or row.stopped_at is None else Stopped(row.stopped_at, row.stopped_reason)


def interpret_refusal(refusal: Answer, validation: Answer) -> Answer:
    """Interpret a 401 or 403 with the help of the answer to a later `GET /v1/validate`.

    If the key is valid, the refusal concerns the request alone. Without an answer, the refusal proves nothing.
    """
    match validation.outcome:
        case Outcome.ACCEPTED:
            return replace(refusal, outcome=Outcome.FAILED)
        case Outcome.UNAUTHORISED | Outcome.REFUSED:  # refused: the endpoint cannot validate keys
            return refusal
        case _:
            return replace(refusal, outcome=Outcome.FAILED, is_evidence=False)


class KeyValidator(Protocol):
    def validate(self) -> Answer: ...


def try_to_resume(engine: sa.Engine, validator: KeyValidator) -> str | None:
    """Resume a stopped destination if its key is valid now; otherwise return why it stays stopped."""
    with engines.read(engine) as connection:
        stop_now = stopped(connection)
    if stop_now is None:
        return None
    if validator.validate().outcome is Outcome.UNAUTHORISED:
        return stop_now.reason
    with engines.write(engine) as connection:
        resume(connection)
    return None


def stop(connection: sa.Connection, now: dt.datetime, reason: str) -> None:
    _set_destination(connection, stopped_at=now, stopped_reason=reason)


def resume(connection: sa.Connection) -> None:
    _set_destination(connection, stopped_at=None, stopped_reason=None)


def slow_downs(connection: sa.Connection) -> dict[str, Any]:
    return connection.execute(sa.select(destination.c.slow_downs)).scalar_one_or_none() or {}


def set_slow_downs(connection: sa.Connection, lanes: dict[str, Any]) -> None:
    _set_destination(connection, slow_downs=lanes)


def record_heartbeat(connection: sa.Connection, now: dt.datetime) -> None:
    _set_destination(connection, heartbeat_at=now)


def end_heartbeat(connection: sa.Connection, heartbeat_at: dt.datetime) -> None:
    """Record that the daemon with this heartbeat has stopped. A later heartbeat of another daemon stays valid."""
    _set_destination(connection, stopped_heartbeat_at=heartbeat_at)


def is_daemon_alive(connection: sa.Connection, now: dt.datetime) -> bool:
    """Return whether a daemon recorded a heartbeat within HEARTBEAT_TIMEOUT, and has not stopped since."""
    row = connection.execute(sa.select(destination)).one_or_none()
    if row is None or row.heartbeat_at is None or row.heartbeat_at == row.stopped_heartbeat_at:
        return False
    return bool(now - row.heartbeat_at < HEARTBEAT_TIMEOUT)


def last_heartbeat(connection: sa.Connection) -> dt.datetime | None:
    return connection.execute(sa.select(destination.c.heartbeat_at)).scalar_one_or_none()


def _set_destination(connection: sa.Connection, **values: Any) -> None:
    if connection.execute(destination.update().values(**values)).rowcount == 0:
        connection.execute(destination.insert().values(**({"destination_id": 1, "slow_downs": {}} | values)))
