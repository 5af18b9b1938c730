"""Workers that deliver to the sandbox over its socket, on both databases."""

import datetime as dt
import threading

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import deliveries
from audience_sync.queue import destination
from audience_sync.queue.worker import MAX_IN_FLIGHT
from audience_sync.sandbox import Limits
from audience_sync.userpilot.answers import Answer, Outcome
from tests.queue.conftest import START, HeldSenders


class Picky:
    """Refuses what holds the property `bad`."""

    def __init__(self, sender):
        self.sender = sender

    def send(self, path, payload):
        if "bad" in payload["metadata"]:
            return Answer(Outcome.REFUSED, 400, None, "bad is bad", None)
        return self.sender.send(path, payload)


def log(sandbox):
    return [(entry.user_id, entry.body.get("metadata")) for entry in sandbox.state.requests]


def properties(sandbox):
    return {user: state["properties"] for user, state in sandbox.state.users.items()}


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


def test_what_is_overwritten_is_cancelled_when_the_newer_value_is_accepted(queue, worker_of):
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


def test_a_companys_identifies_and_tracks_take_their_own_ways(queue, worker_of, sandbox):
    queue.add("acme", {"seats": 5}, action="company")
    queue.add("u1", {"event_name": "Signed Up", "metadata": {"n": 1}}, action="track")

    worker_of().deliver()

    assert sandbox.state.companies == {"acme": {"properties": {"seats": 5}}}
    (event,) = sandbox.state.events
    assert (event["user_id"], event["event_name"], event["metadata"]) == ("u1", "Signed Up", {"n": 1})


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


def test_no_window_holds_more_than_the_limit_even_across_workers(queue, worker_of, sandbox):
    sandbox.state.set_limits(Limits(identify_per_minute=10, window_seconds=0.4))
    queue.fill(35)
    pace = {"per_minute": {"identify": 10, "track": 1, "company": 1}, "window_seconds": 0.4}
    first = worker_of(**pace)

    def stop_at_15(report):
        if report.request_count >= 15:
            first.stop.set()

    first.on_progress = stop_at_15
    first.deliver()
    assert 15 <= len(sandbox.state.requests) < 35
    worker_of(**pace).deliver()

    assert [entry.status for entry in sandbox.state.requests] == [202] * 35


def test_a_429_slows_the_lane_and_is_no_attempt(queue, worker_of, sandbox):
    sandbox.faults.add({"path": "/v1/identify", "status": 429, "times": 1, "headers": {"Retry-After": "0.2"}})
    queue.fill(1)

    worker_of().deliver()

    (row,) = queue.rows()
    assert (row.status, row.attempt_count) == ("accepted", 1)
    first, second = (entry.monotonic for entry in sandbox.state.requests)
    assert second - first >= 0.2
    with engines.read(queue.engine) as connection:
        assert destination.slow_downs(connection)["identify"]["factor"] < 1


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

    assert (
        21 <= len(sandbox.state.requests) <= 20 + MAX_IN_FLIGHT + 1
    )  # one of them asks whether the key is valid
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


def test_another_refusal_makes_the_delivery_dead_in_the_words_of_the_api(queue, worker_of, sandbox):
    sandbox.faults.add({"user_id": "u1", "status": 422, "body": {"errors": [{"message": "plan is no plan"}]}})
    queue.add("u1", {"plan": "x"})
    queue.add("u2", {"plan": "x"})

    report = worker_of().deliver()

    assert queue.statuses() == ["dead", "accepted"]
    assert queue.rows()[0].error == "plan is no plan"
    assert (report.accepted_count, report.dead_count) == (1, 1)


def test_of_a_refused_merged_request_only_the_refused_delivery_dies(queue, worker_of, sandbox):
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
def test_what_fails_is_sent_again(hand_queue, clock, worker_of, sandbox, fault):
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


def test_a_slow_answer_is_waited_for(queue, worker_of, sandbox):
    sandbox.faults.add({"delay_after_seconds": 0.3, "times": 2})
    queue.fill(3)

    worker_of().deliver()

    assert [row.attempt_count for row in queue.rows()] == [1, 1, 1]


def test_an_outage_is_tried_ever_more_rarely_and_outlives_the_patience(hand_queue, clock, worker_of, sandbox):
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


def test_very_many_superseded_values_of_one_company_are_cancelled(hand_queue, clock, worker_of, sandbox):
    now, count = clock.now(), 70_000  # more than PostgreSQL takes as parameters
    hand_queue.add("acme", {"plan": "pro"}, action="company", at=now, status="accepted", request_id=1,
                   settled_at=now)  # fmt: skip
    old = [
        {"action": "company", "subject_id": "acme", "body": {"plan": "old"}, "class": "call", "call_id": number,
         "value_at": now - dt.timedelta(days=1), "status": "pending", "created_at": now, "next_attempt_at": now}
        for number in range(1_000, 1_000 + count)
    ]  # fmt: skip
    with engines.write(hand_queue.engine) as connection:
        connection.execute(deliveries.insert(), old)
    hand_queue.track("u1", "Paid")
    worker_of(clock=clock).deliver()
    assert hand_queue.counts() == {"accepted": 2, "cancelled": count}
    assert [event["event_name"] for event in sandbox.state.events] == ["Paid"]


def test_at_most_once_a_track_is_not_repeated_when_its_outcome_is_unknown(queue, worker_of, sandbox):
    sandbox.faults.add({"path": "/v1/track", "drop": "after", "times": 1})
    queue.track("u1", "Paid")

    worker_of(tracks_at_most_once=True).deliver()

    (row,) = queue.rows()
    assert row.status == "dead"
    assert row.error.startswith("Not repeated (track_policy at_most_once)")
    assert len(sandbox.state.events) == 1


@pytest.mark.parametrize("kind", ["unsure", "killed"])
def test_at_most_once_the_events_after_one_that_may_come_yet_wait_for_it(
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


def test_stop_finishes_what_is_in_flight_and_returns(queue, worker_of, sandbox):
    queue.fill(200)
    worker = worker_of()
    worker.on_progress = lambda report: report.request_count >= 30 and worker.stop.set()

    report = worker.deliver()

    counts = queue.counts()
    assert counts.keys() == {"accepted", "pending"}
    assert 30 <= counts["accepted"] <= 30 + 2 * MAX_IN_FLIGHT
    assert len(sandbox.state.requests) == counts["accepted"] == report.accepted_count
    assert report.pending_count == counts["pending"]
    assert worker_of().deliver().accepted_count == counts["pending"], "the lease was released"


def test_what_a_killed_process_was_sending_is_sent_again_after_a_grace(hand_queue, clock, worker_of, sandbox):
    killed = hand_queue.add("u1", {"plan": "free"})
    hand_queue.add("u1", {"plan": "pro"})
    hand_queue.crash(killed)

    worker_of(clock=clock, grace=dt.timedelta(seconds=3), poll_seconds=1).deliver()

    assert clock.seconds >= 3
    assert log(sandbox) == [("u1", {"plan": "pro"})]
    assert hand_queue.statuses() == ["cancelled", "accepted"]
    assert [row.error for row in hand_queue.requests()] == ["The process ended before the answer came", None]


def test_a_killed_process_s_track_is_not_repeated_at_most_once(queue, worker_of, sandbox):
    queue.crash(queue.track("u1", "Paid"))

    worker_of(tracks_at_most_once=True).deliver()

    assert queue.statuses() == ["dead"]
    assert sandbox.state.requests == []


def test_requests_of_a_killed_process_count_in_the_window(hand_queue, clock, worker_of):
    for number in range(5):
        hand_queue.crash(hand_queue.add(f"killed {number}", {"a": 1}))
    hand_queue.fill(1)

    pace = {"identify": 6, "track": 1, "company": 1}
    worker_of(clock=clock, per_minute=pace, poll_seconds=20).deliver()

    assert hand_queue.counts() == {"accepted": 6}
    assert 60 <= clock.seconds < 100


class Skewed:
    """A clock whose time of day is wrong."""

    def __init__(self, clock, minutes):
        self.now = lambda: clock.now() + dt.timedelta(minutes=minutes)
        self.monotonic, self.sleep = clock.monotonic, clock.sleep


@pytest.mark.parametrize("minutes", [(0, 30), (0, -30), (30, 0), (-30, 0)])
def test_the_window_holds_across_processes_whose_clocks_differ(hand_queue, clock, worker_of, minutes):
    pace = {"identify": 5, "track": 5, "company": 5}
    hand_queue.fill(5, next_attempt_at=clock.now() - dt.timedelta(hours=1))
    worker_of(clock=Skewed(clock, minutes[0]), per_minute=pace).deliver()
    clock.seconds += 10
    hand_queue.fill(5, prefix="v", next_attempt_at=clock.now() - dt.timedelta(hours=1))
    began_at = clock.seconds

    worker_of(clock=Skewed(clock, minutes[1]), per_minute=pace, poll_seconds=5).deliver()

    assert hand_queue.counts() == {"accepted": 10}
    assert clock.seconds - began_at >= 50
    started = [(row.started_at - START).total_seconds() for row in hand_queue.requests()]
    assert max(started[:5]) < 1
    assert min(started[5:]) >= 60


def test_the_window_holds_while_a_process_takes_long_to_take_over(hand_queue, clock, worker_of):
    pace = {"identify": 5, "track": 5, "company": 5}
    hand_queue.fill(5, next_attempt_at=clock.now() - dt.timedelta(hours=1))
    worker_of(clock=clock, per_minute=pace).deliver()
    last_end = max(row.ended_at for row in hand_queue.requests())
    hand_queue.fill(5, prefix="v", next_attempt_at=clock.now() - dt.timedelta(hours=1))
    clock.seconds += 10

    def slow(_connection, _cursor, statement, *_):
        clock.seconds += 5 * ("ended_at IS NULL" in statement)  # requests of a lost process are ended

    sa.event.listen(hand_queue.engine, "before_cursor_execute", slow)
    worker_of(clock=clock, per_minute=pace, poll_seconds=5).deliver()
    sa.event.remove(hand_queue.engine, "before_cursor_execute", slow)

    assert hand_queue.counts() == {"accepted": 10}
    assert min(row.started_at for row in hand_queue.requests()[5:]) >= last_end + dt.timedelta(seconds=60)


def test_a_worker_that_lost_its_lease_writes_nothing(queue, worker_of, sandbox):
    queue.fill(20)
    worker = worker_of()
    reached = []

    class Meanwhile:
        """While the first requests are on their way another process takes over."""

        def send(self, path, payload):
            if not reached:
                reached.append(payload)
                queue.lose_lease()
                before.update({row.delivery_id: tuple(row) for row in queue.rows()})
            return worker_client.send(path, payload)

    before, worker_client = {}, worker.sender
    worker.sender = Meanwhile()

    report = worker.deliver()

    assert report.is_left
    assert {row.delivery_id: tuple(row) for row in queue.rows()} == before
    assert all(row.ended_at is None for row in queue.requests())
    assert len(sandbox.state.requests) <= MAX_IN_FLIGHT


def test_two_workers_one_delivers_and_the_other_leaves_it_to_it(queue, worker_of, sandbox, url):
    queue.fill(150)
    sandbox.faults.add({"path": "/v1/identify", "delay_seconds": 0.05})  # so that the first is still at work
    other_engine = engines.open_own(url, "audience_sync")
    first, second = worker_of(), worker_of(on=other_engine)
    started = threading.Event()
    first.on_progress = lambda _: started.set()
    thread = threading.Thread(target=first.deliver)
    thread.start()
    assert started.wait(60)

    report = second.deliver()
    thread.join()
    other_engine.dispose()

    assert report.is_left
    assert report.request_count == 0
    assert first.report.accepted_count == 150
    assert len(sandbox.state.requests) == 150


def test_who_has_no_lease_waits_until_its_deliveries_are_claimed(queue, clock, worker_of):
    queue.hold_lease()
    mine = queue.add("u1", {"a": 1}, kind="change", run_id=77)
    waited = []

    class Waits:
        now, monotonic = queue.clock.now, clock.monotonic

        def sleep(self, _seconds):
            waited.append(mine)
            if len(waited) == 3:
                queue.update(mine, attempt_count=1)

    report = worker_of(clock=Waits()).deliver(run_ids=[77])

    assert (report.is_left, len(waited)) == (True, 3)


def test_who_waits_takes_over_when_the_holder_is_gone(queue, worker_of, clock):
    queue.hold_lease()
    call = queue.add("u1", {"a": 1}, call_id=5)
    assert call

    class Waits:
        now, monotonic = queue.clock.now, clock.monotonic

        def sleep(self, _seconds):
            queue.free_lease()

    report = worker_of(clock=Waits()).deliver(call_ids=[5])

    assert (report.is_left, report.accepted_count) == (False, 1)


def test_what_becomes_due_within_a_minute_is_waited_for(hand_queue, clock, worker_of):
    now = clock.now()
    hand_queue.add("u1", {"a": 1}, next_attempt_at=now + dt.timedelta(seconds=59))
    hand_queue.add("u2", {"a": 1}, next_attempt_at=now + dt.timedelta(seconds=200))

    report = worker_of(clock=clock, poll_seconds=10).deliver()

    assert hand_queue.statuses() == ["accepted", "pending"]
    assert 59 <= clock.seconds < 61
    assert report.pending_count == 1


def test_a_full_window_is_waited_for_without_spinning(hand_queue, clock, worker_of):
    hand_queue.fill(6)
    cycles = []

    @sa.event.listens_for(hand_queue.engine, "commit")
    def count(_connection):
        cycles.append(clock.seconds)

    worker_of(
        clock=clock, per_minute={"identify": 5, "track": 600, "company": 600}, poll_seconds=1000
    ).deliver()

    assert hand_queue.counts() == {"accepted": 6}
    assert len(cycles) < 30


def test_the_progress_tells_what_is_left(queue, worker_of):
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


def test_a_delivery_that_cannot_be_written_dies_alone(queue, worker_of):
    queue.add("u1", {}, action="track")  # no event_name
    queue.track("u2", "Paid")

    worker_of().deliver()

    assert queue.statuses() == ["dead", "accepted"]
    assert queue.rows()[0].error == "It cannot be written (KeyError)"


class Standstill(HeldSenders):
    """Senders of a process that stands still between its claims and its requests."""

    def collect(self, seconds):
        if self.sends:
            self.clock.sleep(400)
        return super().collect(seconds)


def test_a_process_that_stood_still_sends_nothing_that_it_claimed_before(
    hand_queue, worker_of, sandbox, clock
):
    delivery_id = hand_queue.add("u1", {"plan": "pro"})
    worker = worker_of(clock=clock)
    worker.open_senders = lambda: Standstill(clock)
    worker.on_progress = lambda _: worker.stop.set()
    worker.deliver()
    assert log(sandbox) == []
    row = hand_queue.row(delivery_id)
    assert (row.status, row.error) == (
        "pending",
        "Not sent: this process was suspended, and another may have taken over",
    )


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
