"""Workers that deliver to the sandbox over its socket, on both databases."""

import datetime as dt
import threading

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import deliveries
from audience_sync.userpilot.answers import Answer, Outcome
from tests.queue.conftest import log, properties


def test_a_users_pending_identifies_are_one_request(queue, worker_of, sandbox):
    queue.add("u1", {"plan": "free", "city": "Ulm"})
    queue.add("u1", {"plan": "pro"})
    queue.add("u1", {"vip": True}, kind="push")
    queue.add("u2", {"plan": "free"})

    report = worker_of().deliver()

    assert sorted(log(sandbox)) == [
        ("u1", {"plan": "pro", "city": "Ulm", "vip": True}),
        ("u2", {"plan": "free"}),
    ]
    assert queue.statuses() == ["accepted"] * 4
    assert (report.accepted_count, report.request_count, report.pending_count) == (4, 2, 0)


def test_overwritten_values_are_cancelled_when_the_newer_one_is_accepted(queue, worker_of):
    queue.add("u1", {"plan": "free"})
    queue.add("u1", {"plan": "pro"})

    worker_of().deliver()

    first, second = queue.rows()
    assert (first.status, first.error) == ("cancelled", "superseded by a newer value")
    assert second.status == "accepted"
    (request,) = queue.requests()
    assert second.request_id == request.request_id
    assert (request.status_code, request.delivery_count) == (202, 2)
    assert request.x_request_id


def test_identifies_and_tracks_of_a_company_have_their_own_paths(queue, worker_of, sandbox):
    queue.add("acme", {"seats": 5}, action="company")
    queue.add("u1", {"event_name": "Signed Up", "metadata": {"n": 1}}, action="track")

    worker_of().deliver()

    assert sandbox.state.companies == {"acme": {"properties": {"seats": 5}}}
    (event,) = sandbox.state.events
    assert (event["user_id"], event["event_name"], event["metadata"]) == ("u1", "Signed Up", {"n": 1})


def test_calls_go_first_then_changes_then_pushes(queue, worker_of, sandbox):
    for kind in ("push", "change", "call"):
        for number in range(3):
            queue.add(f"{kind} {number}", {"a": 1}, kind=kind)
    sandbox.faults.add({"path": "/v1/identify", "delay_seconds": 0.01})

    worker_of(per_minute={"identify": 1, "track": 1, "company": 1}, window_seconds=0.05).deliver()

    kinds = [user.split()[0] for user, _ in log(sandbox)]
    assert kinds == ["call"] * 3 + ["change"] * 3 + ["push"] * 3


def test_a_call_is_sent_before_the_rest_of_a_long_push(queue, worker_of, sandbox):
    queue.fill(60, kind="push")
    added = []

    def add_call(report):
        if report.request_count >= 5 and not added:
            added.append(queue.add("caller", {"a": 1}))

    worker_of(
        per_minute={"identify": 60, "track": 1, "company": 1}, window_seconds=1, on_progress=add_call
    ).deliver()

    users = [user for user, _ in log(sandbox)]
    assert users.index("caller") < 25
    assert len(users) == 61


def test_a_user_with_hundreds_of_deliveries_does_not_starve_others(queue, worker_of, sandbox):
    for number in range(80):
        queue.track("busy", f"event {number}")
    for number in range(5):
        queue.track(f"other {number}", "event")

    worker_of(poll_seconds=0.2).deliver()

    order = [event["user_id"] for event in sandbox.state.events]
    assert len(order) == 85
    assert max(order.index(f"other {number}") for number in range(5)) < 30


@pytest.mark.parametrize(("per_minute", "most_in_flight"), [(60, 8), (600, 20), (1_000_000, 32)])
def test_a_lane_has_as_many_requests_in_flight_as_its_limit_needs(
    queue, worker_of, per_minute, most_in_flight
):
    count = 4 * most_in_flight
    queue.fill(count)
    gate, most = threading.Semaphore(0), []
    under_way, lock = set(), threading.Lock()

    class Slow:
        def send(self, _path, payload):
            with lock:
                under_way.add(payload["user_id"])
                most.append(len(under_way))
                if len(under_way) == most_in_flight or len(most) > count - most_in_flight:
                    gate.release(most_in_flight)
            gate.acquire(timeout=30)
            with lock:
                under_way.discard(payload["user_id"])
            return Answer(Outcome.ACCEPTED, 202, None, None, None)

    worker_of(sender=Slow(), per_minute=dict.fromkeys(("identify", "track", "company"), per_minute)).deliver()

    assert max(most) == most_in_flight
    assert queue.counts() == {"accepted": count}


def test_a_lane_whose_requests_take_long_does_not_hold_up_the_others(queue, worker_of):
    queue.fill(100)
    for number in range(100):
        queue.track(f"u{number}", "Signed Up", created_at=queue.clock.now() - dt.timedelta(hours=1))
    are_tracks_sent, tracks = threading.Event(), []

    class Slow:
        def send(self, path, payload):
            if path == "v1/identify":
                assert are_tracks_sent.wait(60)
            else:
                tracks.append(payload["user_id"])
                if len(tracks) == 100:
                    are_tracks_sent.set()
            return Answer(Outcome.ACCEPTED, 202, None, None, None)

    worker_of(sender=Slow()).deliver()

    assert queue.counts() == {"accepted": 200}


def test_a_call_that_comes_late_does_not_bring_back_an_older_value(queue, worker_of, sandbox):
    now = queue.clock.now()
    queue.add("u1", {"plan": "pro", "city": "Ulm"}, at=now)
    worker_of().deliver()
    queue.add("u1", {"plan": "free", "seats": 5}, at=now - dt.timedelta(minutes=1))
    queue.add("u1", {"city": "Bonn"}, at=now - dt.timedelta(minutes=1))

    worker_of().deliver()

    assert properties(sandbox) == {"u1": {"plan": "pro", "city": "Ulm", "seats": 5}}
    assert [(row.status, row.error) for row in queue.rows()] == [
        ("accepted", None),
        ("accepted", None),
        ("cancelled", "superseded by a newer value"),
    ]


def test_very_many_superseded_values_of_one_company_are_cancelled(hand_queue, clock, worker_of, sandbox):
    now, count = clock.now(), 70_000  # more than PostgreSQL takes as parameters
    hand_queue.add("acme", {"plan": "pro"}, action="company", at=now, status="accepted", request_id=1,
                   settled_at=now)  # fmt: skip
    hand_queue.add("acme", {"plan": "old"}, action="company", at=now - dt.timedelta(days=1))
    old = [column for column in deliveries.c if column is not deliveries.c.delivery_id]
    copied = sa.select(*old).where(deliveries.c.status == "pending")
    while left := count - hand_queue.counts()["pending"]:
        with engines.write(hand_queue.engine) as connection:
            connection.execute(deliveries.insert().from_select(old, copied.limit(left)))
    hand_queue.track("u1", "Paid")
    worker_of(clock=clock).deliver()
    assert hand_queue.counts() == {"accepted": 2, "cancelled": count}
    assert [event["event_name"] for event in sandbox.state.events] == ["Paid"]


def test_the_worker_waits_for_deliveries_that_become_due_within_a_minute(hand_queue, clock, worker_of):
    now = clock.now()
    hand_queue.add("u1", {"a": 1}, next_attempt_at=now + dt.timedelta(seconds=59))
    hand_queue.add("u2", {"a": 1}, next_attempt_at=now + dt.timedelta(seconds=200))

    report = worker_of(clock=clock, poll_seconds=10).deliver()

    assert hand_queue.statuses() == ["accepted", "pending"]
    assert 59 <= clock.seconds < 61
    assert report.pending_count == 1


@pytest.fixture
def commits(hand_queue):
    """A list with an entry for each transaction that was committed."""
    committed = []
    sa.event.listen(hand_queue.engine, "commit", committed.append)
    return committed


def test_the_worker_waits_for_a_full_window_without_spinning(hand_queue, clock, worker_of, commits):
    hand_queue.fill(6)
    commits.clear()
    worker_of(
        clock=clock, per_minute={"identify": 5, "track": 600, "company": 600}, poll_seconds=1000
    ).deliver()

    assert hand_queue.counts() == {"accepted": 6}
    assert len(commits) < 30


def test_an_answer_that_unblocks_nothing_starts_no_further_search(hand_queue, clock, worker_of, commits):
    hand_queue.fill(20, kind="push")
    commits.clear()
    worker_of(
        clock=clock, per_minute={"identify": 60, "track": 600, "company": 600}, poll_seconds=10
    ).deliver()

    assert hand_queue.counts() == {"accepted": 20}
    assert len(commits) <= 2 * 20 + 10  # one claims, one settles


def test_deliveries_committed_ahead_of_the_search_are_sent_before_the_work_ends(hand_queue, clock, worker_of):
    hand_queue.add("u1", {"a": 1})
    added = []

    def add(_report):
        if not added:
            earlier = clock.now() - dt.timedelta(minutes=5)  # by a clock that is behind
            added.append(hand_queue.add("u2", {"a": 1}, next_attempt_at=earlier))

    worker_of(clock=clock, on_progress=add).deliver()

    assert hand_queue.statuses() == ["accepted", "accepted"]


def test_the_progress_shows_what_is_left(queue, worker_of):
    queue.fill(50)
    reports = []

    worker_of(
        per_minute={"identify": 6_000, "track": 1, "company": 1},
        on_progress=lambda report: reports.append(
            (report.accepted_count, report.pending_count, report.seconds_left)
        ),
    ).deliver()

    assert all(accepted + pending == 50 for accepted, pending, _ in reports)
    assert reports[-1] == (50, 0, 0.0)
    _, pending, seconds = reports[0]
    assert seconds == pytest.approx(pending / 100)
