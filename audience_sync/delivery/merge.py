"""Many deliveries of one user become one request; what becomes of each when that is answered. Pure."""

import datetime as dt
import random
from collections.abc import Sequence
from typing import Any

from audience_sync.store.deliveries import Delivery, Settlement, Status
from audience_sync.userpilot.answers import Answer, Outcome

GIVE_UP_ATTEMPTS = 8
GIVE_UP_AFTER = dt.timedelta(hours=4)
LONGEST_BACKOFF_SECONDS = 900.0
GRACE = dt.timedelta(seconds=3)  # after an unknown outcome: time for a late request to be applied


def choose(pending: Sequence[Delivery]) -> list[Delivery]:
    """Of a subject's pending deliveries, those that go into its next request, oldest value first.

    After a merged request was refused its deliveries go one by one, so that only the refused one dies.
    """
    ordered = sorted(pending, key=lambda delivery: (delivery.value_at, delivery.delivery_id))
    return next(([delivery] for delivery in ordered if delivery.alone), ordered)


def body_of(ordered: Sequence[Delivery]) -> dict[str, Any]:
    """The newest value of each trait."""
    merged: dict[str, Any] = {}
    for delivery in ordered:
        merged |= delivery.body
    return merged


def _carried(ordered: Sequence[Delivery]) -> set[int]:
    """Those of whose values at least one is in the merged body; one that says nothing is carried, too."""
    owners = {trait: delivery.delivery_id for delivery in ordered for trait in delivery.body}
    return set(owners.values()) | {delivery.delivery_id for delivery in ordered if not delivery.body}


def settle(
    ordered: Sequence[Delivery],
    answer: Answer,
    now: dt.datetime,
    chance: random.Random,
    *,
    at_most_once: bool = False,
) -> list[Settlement]:
    """Decide what an answer means for each delivery of its request.

    `at_most_once` is the policy for tracks: an unknown outcome is not repeated.
    """
    match answer.outcome:
        case Outcome.ACCEPTED:
            carried = _carried(ordered)
            return [
                Settlement(delivery.delivery_id, Status.ACCEPTED)
                if delivery.delivery_id in carried
                else Settlement(delivery.delivery_id, Status.CANCELLED, "overtaken by a newer value")
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
            unknown = answer.outcome is Outcome.UNKNOWN
            return [_retry(delivery, answer, now, chance, unknown, at_most_once) for delivery in ordered]


def _retry(
    delivery: Delivery,
    answer: Answer,
    now: dt.datetime,
    chance: random.Random,
    unknown: bool,
    at_most_once: bool,
) -> Settlement:
    error = answer.error or "no answer"
    if unknown and at_most_once:
        return Settlement(
            delivery.delivery_id, Status.DEAD, f"Not repeated (track_policy at_most_once): {error}"
        )
    if delivery.attempt_count >= GIVE_UP_ATTEMPTS and now - delivery.first_attempt_at >= GIVE_UP_AFTER:
        return Settlement(
            delivery.delivery_id, Status.DEAD, f"Given up after {delivery.attempt_count} attempts: {error}"
        )
    return Settlement(
        delivery.delivery_id,
        Status.PENDING,
        error,
        next_attempt_at=now + dt.timedelta(seconds=backoff_seconds(delivery.attempt_count, chance)),
        quiet_until=now + GRACE if unknown else None,
        alone=delivery.alone,
    )


def backoff_seconds(attempt_count: int, chance: random.Random) -> float:
    """Full jitter: anywhere up to 1 s, doubling with each attempt to 15 minutes."""
    return chance.uniform(0, min(LONGEST_BACKOFF_SECONDS, 2.0 ** min(attempt_count - 1, 20)))
