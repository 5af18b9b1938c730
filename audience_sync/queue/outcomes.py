"""Pure decisions: which deliveries of a user form the next request, and what its answer means for each of them.

Many deliveries of one user or company are merged into one request. The worker stores the decisions with
`deliveries.settle`.
"""

import datetime as dt
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from audience_sync.userpilot.answers import Answer, Outcome

SUPERSEDED = "superseded by a newer value"
NOT_REPEATED = "Not repeated (track_policy at_most_once)"

ATTEMPTS_BEFORE_SPLIT = 3  # then the deliveries of a merged request are sent one by one
GIVE_UP_ATTEMPTS = 8
GIVE_UP_AFTER = dt.timedelta(hours=4)
LONGEST_BACKOFF_SECONDS = 900.0
GRACE = dt.timedelta(seconds=3)  # after an unknown outcome: Userpilot may apply the request late


class Status(StrEnum):
    HELD = "held"
    PENDING = "pending"
    SENDING = "sending"
    ACCEPTED = "accepted"
    DEAD = "dead"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as it will be once claimed: `attempt_count` includes the next attempt."""

    delivery_id: int
    action: str
    subject_id: str
    body: dict[str, Any]
    value_at: dt.datetime
    is_call: bool
    isolated: bool
    attempt_count: int
    first_attempt_at: dt.datetime
    next_attempt_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Settlement:
    """The state of a delivery after a request.

    `isolated` deliveries are sent one by one. `grace_until` delays the subject's next request after an unknown
    outcome. `was_attempt` is false after a 429 or a refused key. `restarts_give_up_time`: the answer proves nothing
    about the delivery, so the time after which it is given up starts again.
    """

    delivery_id: int
    status: Status
    error: str | None = None
    next_attempt_at: dt.datetime | None = None
    grace_until: dt.datetime | None = None
    isolated: bool = False
    was_attempt: bool = True
    restarts_give_up_time: bool = False


def select_next(pending: Sequence[Delivery], now: dt.datetime) -> list[Delivery]:
    """Select the pending deliveries of a subject for its next request, oldest value first.

    After a merged request was refused or failed repeatedly, its deliveries are isolated: sent one by one, so that only
    the delivery at fault waits or becomes dead. The others stay merged. What has been due longest is sent first; of
    several isolated ones, the newest. An older delivery waits for a newer one that shares a trait with it: an earlier
    attempt may have set the newer value, which an older one must not replace. Values that the newest supersedes need no
    request.
    """
    blocked = blocked_until(pending)
    free = [
        delivery
        for delivery in sorted(pending, key=_age)
        if delivery.delivery_id not in blocked and not (delivery.isolated and delivery.next_attempt_at > now)
    ]
    groups = [[delivery] for delivery in reversed(free) if delivery.isolated]
    merged = [delivery for delivery in free if not delivery.isolated]
    if any(delivery.next_attempt_at <= now for delivery in merged):
        groups.append(merged)
    return min(groups, key=lambda group: min(each.next_attempt_at for each in group), default=[])


def blocked_until(pending: Sequence[Delivery]) -> dict[int, dt.datetime]:
    """Return, by id, until when deliveries wait for a newer one that shares a trait with them.

    Every delivery waits for newer isolated ones, and for what those wait for. Isolated deliveries also wait for any newer
    one that was attempted.
    """
    waiting: dict[str, dt.datetime] = {}  # traits of newer deliveries
    attempted: dict[str, dt.datetime] = {}
    blocked = {}
    for delivery in sorted(pending, key=_age, reverse=True):
        newer = (waiting, attempted) if delivery.isolated else (waiting,)
        moments = [until[trait] for until in newer for trait in delivery.body if trait in until]
        if moments:
            blocked[delivery.delivery_id] = max(moments)
        if delivery.isolated:
            moments.append(delivery.next_attempt_at)
        if moments:
            waiting |= dict.fromkeys(delivery.body, max(moments))
        elif delivery.attempt_count > 1:
            attempted |= dict.fromkeys(delivery.body, delivery.next_attempt_at)
    return blocked


def _age(delivery: Delivery) -> tuple[dt.datetime, int]:
    return delivery.value_at, delivery.delivery_id


@dataclass(frozen=True, slots=True)
class Trimmed:
    """A subject's deliveries without their superseded traits, and the ids of deliveries without any trait left."""

    left: list[Delivery]
    superseded: list[int]


def without_superseded(ordered: Sequence[Delivery], newer: Mapping[int, Collection[str]]) -> Trimmed:
    """Remove superseded traits from deliveries; `newer` has the names of these traits by delivery id."""
    left, superseded = [], []
    for delivery in ordered:
        removed = newer.get(delivery.delivery_id, ())
        body = {trait: value for trait, value in delivery.body.items() if trait not in removed}
        if body or not delivery.body:
            left.append(replace(delivery, body=body))
        else:
            superseded.append(delivery.delivery_id)
    return Trimmed(left, superseded)


def body_of(ordered: Sequence[Delivery]) -> dict[str, Any]:
    """Merge the bodies of deliveries, with the newest value of each trait."""
    merged: dict[str, Any] = {}
    for delivery in ordered:
        merged |= delivery.body
    return merged


def carried(ordered: Sequence[Delivery]) -> set[int]:
    """Return the ids of the deliveries that have a value in the merged body, or an empty body."""
    owners = {trait: delivery.delivery_id for delivery in ordered for trait in delivery.body}
    return set(owners.values()) | {delivery.delivery_id for delivery in ordered if not delivery.body}


@dataclass(frozen=True, slots=True)
class Retries:
    """Rules for retries. `tracks_at_most_once`: no track is repeated after an unknown outcome."""

    rng: random.Random
    grace: dt.timedelta = GRACE
    tracks_at_most_once: bool = False


def decide_settlements(
    ordered: Sequence[Delivery], answer: Answer, now: dt.datetime, retries: Retries
) -> list[Settlement]:
    """Decide the next state of each delivery of an answered request."""
    match answer.outcome:
        case Outcome.ACCEPTED:
            carried_ids = carried(ordered)
            return [
                Settlement(delivery.delivery_id, Status.ACCEPTED)
                if delivery.delivery_id in carried_ids
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
                    isolated=delivery.isolated,
                    was_attempt=False,
                    restarts_give_up_time=delivery.attempt_count == 1,
                )
                for delivery in ordered
            ]
        case Outcome.REFUSED if len(ordered) > 1:
            return [
                Settlement(
                    delivery.delivery_id, Status.PENDING, answer.error, next_attempt_at=now, isolated=True
                )
                for delivery in ordered
            ]
        case Outcome.REFUSED:
            return [Settlement(ordered[0].delivery_id, Status.DEAD, answer.error or "refused")]
        case Outcome.FAILED | Outcome.UNKNOWN | Outcome.DOUBTFUL:
            attempt_count = max(delivery.attempt_count for delivery in ordered)
            may_lie_in_content = len(ordered) > 1 and answer.status_code is not None
            is_split = may_lie_in_content and attempt_count >= ATTEMPTS_BEFORE_SPLIT
            return [_retry(delivery, answer, now, retries, is_split=is_split) for delivery in ordered]


def _retry(
    delivery: Delivery, answer: Answer, now: dt.datetime, retries: Retries, *, is_split: bool
) -> Settlement:
    error = answer.error or "no answer"
    is_unknown = answer.outcome is Outcome.UNKNOWN
    if is_unknown and delivery.action == "track" and retries.tracks_at_most_once:
        return Settlement(delivery.delivery_id, Status.DEAD, f"{NOT_REPEATED}: {error}")
    has_failed_for_long = now - delivery.first_attempt_at >= GIVE_UP_AFTER
    if answer.is_evidence and delivery.attempt_count >= GIVE_UP_ATTEMPTS and has_failed_for_long:
        is_refusal = answer.outcome is Outcome.DOUBTFUL
        message = error if is_refusal else f"Given up after {delivery.attempt_count} attempts: {error}"
        return Settlement(delivery.delivery_id, Status.DEAD, message)
    seconds = 0.0 if is_split else backoff_seconds(delivery.attempt_count, retries.rng)
    seconds = max(seconds, answer.retry_after_seconds or 0.0)
    grace_until = now + retries.grace if is_unknown else None
    return Settlement(
        delivery.delivery_id,
        Status.PENDING,
        error,
        next_attempt_at=max(now + dt.timedelta(seconds=seconds), grace_until or now),
        grace_until=grace_until,
        isolated=delivery.isolated or is_split,
        restarts_give_up_time=not answer.is_evidence,
    )


def backoff_seconds(attempt_count: int, rng: random.Random) -> float:
    """Return a random wait (full jitter). Its limit is 1 s and doubles with each attempt, up to 15 minutes."""
    return rng.uniform(0, min(LONGEST_BACKOFF_SECONDS, 2.0 ** min(attempt_count - 1, 20)))
