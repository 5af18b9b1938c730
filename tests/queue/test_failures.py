"""Answers other than an acceptance: refusals, failures, and unknown outcomes."""

import datetime as dt

import pytest

from audience_sync.db import engines
from audience_sync.queue import destination, pace
from audience_sync.queue.worker import MAX_IN_FLIGHT
from audience_sync.userpilot.answers import Answer, Outcome
from tests.queue.conftest import START, properties


class Picky:
    """Refuses requests with the property `bad`."""

    def __init__(self, sender):
        self.sender = sender

    def send(self, path, payload):
        if "bad" in payload["metadata"]:
            return Answer(Outcome.REFUSED, 400, None, "bad is bad", None)
        return self.sender.send(path, payload)


def test_a_429_slows_the_lane_and_does_not_count_as_an_attempt(queue, worker_of, sandbox):
    sandbox.faults.add({"path": "/v1/identify", "status": 429, "times": 1, "headers": {"Retry-After": "0.2"}})
    queue.fill(1)

    worker_of().deliver()

    (row,) = queue.rows()
    assert (row.status, row.attempt_count) == ("accepted", 1)
    first, second = (entry.monotonic for entry in sandbox.state.requests)
    assert second - first >= 0.2
    with engines.read(queue.engine) as connection:
        assert destination.slow_downs(connection)["identify"]["factor"] < 1


def test_a_lane_stays_slow_since_its_first_pause_until_that_is_long_ago():
    lane, now, hour = pace.Lane(600), START, pace.SLOW_DOWN_LASTS
    lane.throttled(0.0, 10.0)
    first = pace.slow_down(lane, 0.0, now)
    assert first["since"] == now.isoformat()
    lane.throttled(20.0, 10.0)
    second = pace.slow_down(lane, 20.0, now + dt.timedelta(seconds=20), first)
    assert second["since"] == now.isoformat()
    later = now + 2 * hour
    assert pace.slow_down(lane, 20.0, later, second)["since"] == later.isoformat()


def test_a_pause_that_was_stored_while_the_clock_was_ahead_is_over(hand_queue, clock, worker_of, sandbox):
    sandbox.faults.add({"status": 429, "times": 1, "headers": {"Retry-After": "600"}})
    hand_queue.fill(1)
    clock.seconds = 86_400
    assert worker_of(clock=clock).deliver().pending_count == 1

    clock.seconds = 60
    assert worker_of(clock=clock).deliver().accepted_count == 1


def test_a_long_retry_after_ends_the_work_and_the_next_process_keeps_to_it(
    hand_queue, clock, worker_of, sandbox
):
    sandbox.faults.add({"status": 429, "times": 1, "headers": {"Retry-After": "600"}})
    hand_queue.fill(1)

    report = worker_of(clock=clock).deliver()
    again = worker_of(clock=clock).deliver()

    assert (report.pending_count, again.pending_count, len(sandbox.state.requests)) == (1, 1, 1)
    clock.seconds = 601
    assert worker_of(clock=clock).deliver().accepted_count == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_stops_at_once_and_loses_nothing(queue, worker_of, sandbox, status):
    queue.fill(60)
    sandbox.faults.add({"status": status, "after": 20, "body": {"errors": [{"message": "no such key"}]}})

    report = worker_of().deliver()

    # One request asks whether the key is valid.
    assert 21 <= len(sandbox.state.requests) <= 20 + MAX_IN_FLIGHT + 1
    assert "no such key" in report.stopped
    assert str(status) in report.stopped
    assert queue.counts() == {"accepted": 20, "pending": 40}
    assert report.pending_count == 40
    with engines.read(queue.engine) as connection:
        assert destination.stopped(connection)[1] == report.stopped

    sandbox.faults.clear()
    assert worker_of().deliver().stopped == report.stopped, "it stays stopped until somebody says go"
    with engines.write(queue.engine) as connection:
        destination.resume(connection)
    worker_of().deliver()
    assert queue.counts() == {"accepted": 60}


def test_another_refusal_makes_the_delivery_dead_with_the_message_of_the_api(queue, worker_of, sandbox):
    sandbox.faults.add({"user_id": "u1", "status": 422, "body": {"errors": [{"message": "plan is no plan"}]}})
    queue.add("u1", {"plan": "x"})
    queue.add("u2", {"plan": "x"})

    report = worker_of().deliver()

    assert queue.statuses() == ["dead", "accepted"]
    assert queue.rows()[0].error == "plan is no plan"
    assert (report.accepted_count, report.dead_count) == (1, 1)


def test_only_the_refused_delivery_of_a_merged_request_is_dead(queue, worker_of, sandbox):
    queue.add("u1", {"a": 1})
    queue.add("u1", {"bad": 2})
    queue.add("u1", {"c": 3})

    worker = worker_of()
    worker.sender = Picky(worker.sender)
    worker.deliver()

    assert queue.statuses() == ["accepted", "dead", "accepted"]
    assert properties(sandbox) == {"u1": {"a": 1, "c": 3}}


def test_a_value_that_waits_alone_does_not_hold_up_newer_ones(queue, worker_of, sandbox):
    later = queue.clock.now() + dt.timedelta(minutes=10)
    queue.add("u1", {"a": 1}, alone=True, next_attempt_at=later)
    queue.add("u1", {"b": 2})

    worker_of().deliver()

    assert queue.statuses() == ["pending", "accepted"]
    assert properties(sandbox) == {"u1": {"b": 2}}


def test_an_isolated_value_waits_for_a_newer_one_that_may_have_been_applied(queue, worker_of, sandbox):
    later = queue.clock.now() + dt.timedelta(minutes=10)
    queue.add("u1", {"a": 1}, alone=True)
    queue.add("u1", {"a": 2}, attempt_count=1, next_attempt_at=later)
    queue.add("u2", {"a": 1}, alone=True)
    queue.add("u2", {"a": 2}, attempt_count=1)

    worker_of().deliver()

    assert queue.statuses() == ["pending", "pending", "cancelled", "accepted"]
    assert properties(sandbox) == {"u2": {"a": 2}}


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503},
        {"status": 408},
        {"status": 504, "apply": True},
        {"drop": "before"},
        {"drop": "after"},
        {"garbage": True},
        {"status": 200, "body": "<html>a login page</html>", "apply": True},
    ],
    ids=str,
)
def test_failed_requests_are_sent_again(hand_queue, clock, worker_of, sandbox, fault):
    sandbox.faults.add({"times": 3, **fault})
    hand_queue.add("u1", {"plan": "pro"})
    hand_queue.track("u2", "Signed Up")

    worker_of(clock=clock, poll_seconds=5).deliver()

    assert hand_queue.counts() == {"accepted": 2}
    assert sum(row.attempt_count for row in hand_queue.rows()) == 5
    assert properties(sandbox) == {"u1": {"plan": "pro"}}
    failed = [row for row in hand_queue.requests() if row.error]
    assert len(failed) == 3
    assert all(row.ended_at for row in hand_queue.requests())


def test_the_worker_waits_for_a_slow_answer(queue, worker_of, sandbox):
    sandbox.faults.add({"delay_after_seconds": 0.3, "times": 2})
    queue.fill(3)

    worker_of().deliver()

    assert [row.attempt_count for row in queue.rows()] == [1, 1, 1]


def test_an_outage_is_retried_less_and_less_often_and_no_delivery_is_lost(
    hand_queue, clock, worker_of, sandbox
):
    hand_queue.fill(30)
    sandbox.stop()

    report = worker_of(clock=clock, poll_seconds=30).deliver()

    assert report.pending_count == 30
    assert report.request_count < 60
    assert all("connect" in row.error for row in hand_queue.requests())
    sandbox.start()
    clock.seconds += 900
    worker_of(clock=clock, poll_seconds=30).deliver()
    assert hand_queue.counts() == {"accepted": 30}


def test_a_delivery_is_given_up_after_eight_attempts_and_four_hours(hand_queue, clock, worker_of, sandbox):
    sandbox.faults.add({"user_id": "u0", "status": 500})
    hand_queue.fill(1)
    while hand_queue.statuses() == ["pending"]:
        worker_of(clock=clock, poll_seconds=30).deliver()
        clock.seconds += 900

    (row,) = hand_queue.rows()
    assert row.status == "dead"
    assert row.error.startswith("Given up after ")
    assert row.attempt_count >= 8
    assert row.settled_at - row.first_attempt_at >= dt.timedelta(hours=4)


def test_at_most_once_a_track_is_not_repeated_when_its_outcome_is_unknown(queue, worker_of, sandbox):
    sandbox.faults.add({"path": "/v1/track", "drop": "after", "times": 1})
    queue.track("u1", "Paid")

    worker_of(tracks_at_most_once=True).deliver()

    (row,) = queue.rows()
    assert row.status == "dead"
    assert row.error.startswith("Not repeated (track_policy at_most_once)")
    assert len(sandbox.state.events) == 1


@pytest.mark.parametrize("kind", ["unsure", "killed"])
def test_at_most_once_events_wait_for_an_earlier_one_that_may_still_arrive(
    hand_queue, clock, worker_of, sandbox, kind
):
    first = hand_queue.track("u1", "Paid")
    if kind == "killed":
        hand_queue.crash(first)
    else:
        sandbox.faults.add({"path": "/v1/track", "drop": "before", "times": 1})
    hand_queue.track("u1", "Left")
    hand_queue.add("u2", {"plan": "free"})

    worker_of(clock=clock, grace=dt.timedelta(seconds=3), tracks_at_most_once=True, poll_seconds=1).deliver()

    began = {row.request_id: (row.started_at - START).total_seconds() for row in hand_queue.requests()}
    came = {row.body.get("event_name"): began[row.request_id] for row in hand_queue.rows()}
    assert hand_queue.statuses() == ["dead", "accepted", "accepted"]
    assert came["Left"] >= 3
    assert came[None] < 1
    assert [event["event_name"] for event in sandbox.state.events] == ["Left"]


def test_after_an_unknown_outcome_the_users_next_value_waits(queue, worker_of, sandbox):
    sandbox.faults.add({"drop": "after", "times": 1})
    queue.add("u1", {"plan": "free"})
    added = []

    def add_call(_report):
        if not added:
            added.append(queue.add("u1", {"plan": "pro"}))

    worker_of(grace=dt.timedelta(seconds=0.3), on_progress=add_call).deliver()

    first, second = sandbox.state.requests
    assert second.monotonic - first.monotonic >= 0.3
    assert second.body["metadata"] == {"plan": "pro"}
    assert queue.statuses() == ["cancelled", "accepted"]


def test_only_the_delivery_that_cannot_be_written_is_dead(queue, worker_of):
    queue.add("u1", {}, action="track")  # no event_name
    queue.track("u2", "Paid")

    worker_of().deliver()

    assert queue.statuses() == ["dead", "accepted"]
    assert queue.rows()[0].error == "It cannot be written (KeyError)"
