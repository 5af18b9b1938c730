"""Many deliveries of one user become one request; what becomes of each when that is answered. Pure."""

import datetime as dt
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from audience_sync.queue.deliveries import SUPERSEDED, Delivery, Settlement, Status
from audience_sync.userpilot.answers import Answer, Outcome

GIVE_UP_ATTEMPTS = 8
GIVE_UP_AFTER = dt.timedelta(hours=4)
LONGEST_BACKOFF_SECONDS = 900.0
GRACE = dt.timedelta(seconds=3)  # after an unknown outcome: time for a late request to be applied


def select_next(pending: Sequence[Delivery], now: dt.datetime) -> list[Delivery]:
    """Of a subject's pending deliveries, those that go into its next request, oldest value first.

    After a merged request was refused its deliveries go one by one, so that only the refused one dies. The
    newest goes first, and while it waits the older ones do: an attempt before the refusal may have been applied,
    and what Userpilot holds since then must not go back. Those that it overtakes then need no request.
    """
    ordered = sorted(pending, key=lambda delivery: (delivery.value_at, delivery.delivery_id))
    waiting = [n for n, each in enumerate(ordered, 1) if each.alone and each.next_attempt_at > now]
    free = ordered[max(waiting, default=0) :]
    return next(([delivery] for delivery in reversed(free) if delivery.alone), free)


@dataclass(frozen=True, slots=True)
class Trimmed:
    """A subject's deliveries without overtaken traits, and those that have nothing left to say."""

    left: list[Delivery]
    overtaken: list[int]


def without_superseded(ordered: Sequence[Delivery], newer: Mapping[int, Collection[str]]) -> Trimmed:
    """Leave out the traits of which Userpilot has accepted newer values; `newer` names them by delivery."""
    left, overtaken = [], []
    for delivery in ordered:
        gone = newer.get(delivery.delivery_id, ())
        body = {trait: value for trait, value in delivery.body.items() if trait not in gone}
        if body or not delivery.body:
            left.append(replace(delivery, body=body))
        else:
            overtaken.append(delivery.delivery_id)
    return Trimmed(left, overtaken)


def body_of(ordered: Sequence[Delivery]) -> dict[str, Any]:
    """The newest value of each trait."""
    merged: dict[str, Any] = {}
    for delivery in ordered:
        merged |= delivery.body
    return merged


def carried(ordered: Sequence[Delivery]) -> set[int]:
    """Those of whose values at least one is in the merged body; one that says nothing is carried, too."""
    owners = {trait: delivery.delivery_id for delivery in ordered for trait in delivery.body}
    return set(owners.values()) | {delivery.delivery_id for delivery in ordered if not delivery.body}


@dataclass(frozen=True, slots=True)
class Retries:
    """How a failed attempt is repeated. `tracks_at_most_once`: not when its outcome is unknown."""

    chance: random.Random
    grace: dt.timedelta = GRACE
    tracks_at_most_once: bool = False


def settle(
    ordered: Sequence[Delivery], answer: Answer, now: dt.datetime, retries: Retries
) -> list[Settlement]:
    """Decide what an answer means for each delivery of its request."""
    match answer.outcome:
        case Outcome.ACCEPTED:
            told = carried(ordered)
            return [
                Settlement(delivery.delivery_id, Status.ACCEPTED)
                if delivery.delivery_id in told
                else Settlement(delivery.delivery_id, Status.CANCELLED, SUPERSEDED)
                for delivery in ordered
            ]
        case Outcome.THROTTLED | Outcome.UNAUTHORISED:
            return [
                Settlement(
                    delivery.delivery_id,
                    Status.PENDING,
                    answer.error,
                    next_attempt_at=delivery.next_attempt_at,
                    alone=delivery.alone,
                    was_attempt=False,
                )
                for delivery in ordered
            ]
        case Outcome.REFUSED if len(ordered) > 1:
            return [
                Settlement(
                    delivery.delivery_id, Status.PENDING, answer.error, next_attempt_at=now, alone=True
                )
                for delivery in ordered
            ]
        case Outcome.REFUSED:
            return [Settlement(ordered[0].delivery_id, Status.DEAD, answer.error or "refused")]
        case Outcome.FAILED | Outcome.UNKNOWN:
            return [_retry(delivery, answer, now, retries) for delivery in ordered]


def _retry(delivery: Delivery, answer: Answer, now: dt.datetime, retries: Retries) -> Settlement:
    error = answer.error or "no answer"
    is_unknown = answer.outcome is Outcome.UNKNOWN
    if is_unknown and delivery.action == "track" and retries.tracks_at_most_once:
        told = f"Not repeated (track_policy at_most_once): {error}"
        return Settlement(delivery.delivery_id, Status.DEAD, told)
    if delivery.attempt_count >= GIVE_UP_ATTEMPTS and now - delivery.first_attempt_at >= GIVE_UP_AFTER:
        told = f"Given up after {delivery.attempt_count} attempts: {error}"
        return Settlement(delivery.delivery_id, Status.DEAD, told)
    wait = dt.timedelta(seconds=backoff_seconds(delivery.attempt_count, retries.chance))
    quiet_until = now + retries.grace if is_unknown else None
    return Settlement(
        delivery.delivery_id,
        Status.PENDING,
        error,
        next_attempt_at=max(now + wait, quiet_until or now),
        quiet_until=quiet_until,
        alone=delivery.alone,
    )


def backoff_seconds(attempt_count: int, chance: random.Random) -> float:
    """Full jitter: anywhere up to 1 s, doubling with each attempt to 15 minutes."""
    return chance.uniform(0, min(LONGEST_BACKOFF_SECONDS, 2.0 ** min(attempt_count - 1, 20)))
