"""Tracks wait for the first identify of their user, and users for that of their company."""

import datetime as dt

from tests.queue.conftest import log


def test_tracks_go_in_their_order_after_the_users_first_identify(queue, worker_of, sandbox):
    for number in range(12):
        queue.track("u1", f"event {number}")
    queue.add("u1", {"plan": "pro"})

    worker_of().deliver()

    assert [event["event_name"] for event in sandbox.state.events] == [f"event {n}" for n in range(12)]
    assert all(event["user_known"] for event in sandbox.state.events)


def test_tracks_do_not_wait_for_a_later_identify_of_a_known_user(queue, worker_of, sandbox):
    queue.add("u1", {"plan": "free"})
    worker_of().deliver()
    later = queue.clock.now() + dt.timedelta(hours=1)
    queue.add("u1", {"plan": "pro"}, next_attempt_at=later)
    queue.track("u1", "Signed Up")

    worker_of().deliver()

    assert len(sandbox.state.events) == 1


def test_a_track_waits_ten_minutes_for_an_identify_and_no_longer(hand_queue, clock, worker_of, sandbox):
    sandbox.faults.add({"path": "/v1/identify", "status": 500})
    hand_queue.add("u1", {"plan": "pro"}, next_attempt_at=clock.now() + dt.timedelta(hours=1))
    hand_queue.track("u1", "Signed Up")

    clock.seconds = 599
    worker_of(clock=clock, poll_seconds=30).deliver()

    assert len(sandbox.state.events) == 1
    assert clock.seconds >= 600


def test_a_user_who_is_put_into_a_company_waits_for_that_companys_identify(queue, worker_of, sandbox):
    sandbox.faults.add({"path": "/v1/companies/identify", "delay_seconds": 0.3})
    queue.add("u1", {"@company": "acme"})
    queue.add("u2", {"plan": "pro"})
    queue.add("acme", {"seats": 5}, action="company")

    worker_of().deliver()

    paths = [(entry.path, entry.user_id) for entry in sandbox.state.requests]
    company = next(n for n, (path, _) in enumerate(paths) if path == "/v1/companies/identify")
    assert [user for path, user in paths if path == "/v1/identify"] == ["u2", "u1"]
    assert paths.index(("/v1/identify", "u1")) > company
    assert queue.counts() == {"accepted": 3}


def test_a_user_waits_ten_minutes_for_a_company_and_no_longer(hand_queue, clock, worker_of, sandbox):
    hand_queue.add(
        "acme", {"seats": 5}, action="company", next_attempt_at=clock.now() + dt.timedelta(hours=1)
    )
    hand_queue.add("u1", {"@company": "acme"})
    hand_queue.add("u1", {"plan": "pro"})

    clock.seconds = 590
    worker_of(clock=clock, poll_seconds=5).deliver()

    assert [(user, body) for user, body in log(sandbox)] == [("u1", {"plan": "pro"}), ("u1", {})]
    assert clock.seconds >= 600


def test_a_user_does_not_wait_for_a_later_identify_of_a_known_company(queue, worker_of, sandbox):
    queue.add("acme", {"seats": 5}, action="company")
    worker_of().deliver()
    queue.add(
        "acme", {"seats": 6}, action="company", next_attempt_at=queue.clock.now() + dt.timedelta(hours=1)
    )
    queue.add("u1", {"@company": "acme"})

    worker_of().deliver()

    assert ("u1", {}) in log(sandbox)
