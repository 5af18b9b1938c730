"""The transitions of a delivery that the worker's tests do not cover."""

import datetime as dt

import pytest

from audience_sync.db import engines
from audience_sync.queue import deliveries
from audience_sync.queue.outcomes import SUPERSEDED

GRACE = dt.timedelta(seconds=3)


def in_job(queue, **columns):
    """Add a delivery that is in the bulk job with the id 1."""
    row = {"status": "sending", "request_id": 1, "attempt_count": 1, "first_attempt_at": queue.clock.now()}
    return queue.add("ann", {"vip": True}, **(row | columns))


def settle_job(queue, job_status):
    with engines.write(queue.engine) as connection:
        return deliveries.settle_job(connection, 1, job_status, "why", queue.clock.now(), GRACE, limit=10)


@pytest.mark.parametrize("error", [SUPERSEDED, "overtaken by a newer value"])  # as older versions called it
def test_a_completed_job_cancels_what_was_superseded_when_it_began(hand_queue, error):
    superseded, accepted = in_job(hand_queue, error=error), in_job(hand_queue)
    assert settle_job(hand_queue, "completed") == {"cancelled": 1, "accepted": 1}
    assert (hand_queue.row(superseded).status, hand_queue.row(superseded).error) == ("cancelled", SUPERSEDED)
    assert (hand_queue.row(accepted).status, hand_queue.row(accepted).error) == ("accepted", None)
    assert settle_job(hand_queue, "completed") == {}


@pytest.mark.parametrize(
    ("job_status", "attempts", "next_seconds", "grace_seconds"),
    [("dropped", 0, 60, None), ("failed", 1, 100, None), ("lost", 1, 103, 103)],
)
def test_the_deliveries_of_a_job_that_did_not_complete_are_queued_again(
    hand_queue, clock, job_status, attempts, next_seconds, grace_seconds
):
    clock.sleep(60)
    delivery_id = in_job(hand_queue)
    clock.sleep(40)
    start = clock.now() - dt.timedelta(seconds=100)
    assert settle_job(hand_queue, job_status) == {"pending": 1}
    row = hand_queue.row(delivery_id)
    assert (row.attempt_count, row.error) == (attempts, "why")
    assert row.next_attempt_at == start + dt.timedelta(seconds=next_seconds)
    assert row.quiet_until == (grace_seconds and start + dt.timedelta(seconds=grace_seconds))
    assert (row.first_attempt_at is None) == (job_status == "dropped")


def test_nothing_settled_is_moved(hand_queue, clock):
    """Each transition out of a status leaves the others alone."""
    settled = {"status": "accepted", "settled_at": clock.now(), "request_id": 1}
    accepted = hand_queue.add("ann", {"vip": True}, kind="change", **settled)
    before = hand_queue.row(accepted)
    now = clock.now()
    with engines.write(hand_queue.engine) as connection:
        origin = deliveries.RunOrigin(99, before.definition_id, "push", now, "here")
        deliveries.release_run(connection, before.run_id, now)
        deliveries.cancel_run(connection, before.run_id, now, "rejected")
        deliveries.cancel_never_attempted(connection, f"SELECT {accepted}", now)
        deliveries.cancel_foreign(connection, origin, now)
        deliveries.revive(connection, before.definition_id, f"SELECT {accepted}", now)
        deliveries.hold_definitions(connection, "here", [before.definition_id], "elsewhere")
        deliveries.assign_destination(connection, "here")
        deliveries.start_in_job(connection, 1, [accepted], [], now)
        assert deliveries.retry(connection, [accepted], now).refusals == [
            f"Delivery {accepted} is accepted, not dead."
        ]
        assert deliveries.discard(connection, [accepted], now) == 0
    assert hand_queue.row(accepted) == before
