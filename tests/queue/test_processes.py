"""Processes that deliver one after another: they stop, are killed, lose the lease or wait for it."""

import datetime as dt
import threading

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.queue.worker import MAX_IN_FLIGHT
from audience_sync.sandbox import Limits
from tests.queue.conftest import START, HeldSenders, log
from tests.queue.userpilot import LocalUserpilot


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


def test_deliveries_of_a_killed_process_are_sent_again_after_a_grace(hand_queue, clock, worker_of, sandbox):
    killed = hand_queue.add("u1", {"plan": "free"})
    hand_queue.add("u1", {"plan": "pro"})
    hand_queue.crash(killed)

    worker_of(clock=clock, grace=dt.timedelta(seconds=3), poll_seconds=1).deliver()

    assert clock.seconds >= 3
    assert log(sandbox) == [("u1", {"plan": "pro"})]
    assert hand_queue.statuses() == ["cancelled", "accepted"]
    assert [row.error for row in hand_queue.requests()] == ["The process ended before the answer came", None]


def test_with_at_most_once_a_track_of_a_killed_process_is_not_repeated(queue, worker_of, sandbox):
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


@pytest.mark.parametrize("minutes", [(0, 5), (-5, 0), (0, 0)])
def test_a_grace_holds_across_processes_whose_clocks_differ(hand_queue, clock, worker_of, minutes):
    userpilot = LocalUserpilot(clock)
    userpilot.faults.add({"drop": "before", "times": 1})
    rules = {"sender": userpilot, "grace": dt.timedelta(seconds=3), "poll_seconds": 1}
    hand_queue.add("u1", {"plan": "free"}, next_attempt_at=clock.now() - dt.timedelta(hours=1))
    first = worker_of(clock=Skewed(clock, minutes[0]), **rules)
    first.on_progress = lambda _: first.stop.set()
    first.deliver()
    hand_queue.add("u1", {"plan": "pro"}, next_attempt_at=clock.now() - dt.timedelta(hours=1))
    clock.seconds += 1
    assert hand_queue.counts() == {"pending": 2}

    worker_of(clock=Skewed(clock, minutes[1]), **rules).deliver()

    assert userpilot.values_of("plan") == {"u1": "pro"}
    assert [entry.monotonic >= 3 for entry in userpilot.state.requests] == [False, True]


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
        """Another process takes over while the first requests are in flight."""

        def send(self, path, payload):
            if not reached:
                reached.append(payload)
                queue.lose_lease()
                before.update({row.delivery_id: tuple(row) for row in queue.rows()})
            return worker_client.send(path, payload)

    before, worker_client = {}, worker.sender
    worker.sender = Meanwhile()

    report = worker.deliver()

    assert report.is_handed_over
    assert {row.delivery_id: tuple(row) for row in queue.rows()} == before
    assert all(row.ended_at is None for row in queue.requests())
    assert len(sandbox.state.requests) <= MAX_IN_FLIGHT


def test_only_one_of_two_workers_delivers(queue, worker_of, sandbox, url):
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

    assert report.is_handed_over
    assert report.request_count == 0
    assert first.report.accepted_count == 150
    assert len(sandbox.state.requests) == 150


def test_a_process_without_the_lease_waits_until_its_deliveries_are_claimed(queue, clock, worker_of):
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

    assert (report.is_handed_over, len(waited)) == (True, 3)


def test_a_waiting_process_takes_over_when_the_holder_is_gone(queue, worker_of, clock):
    queue.hold_lease()
    call = queue.add("u1", {"a": 1}, call_id=5)
    assert call

    class Waits:
        now, monotonic = queue.clock.now, clock.monotonic

        def sleep(self, _seconds):
            queue.free_lease()

    report = worker_of(clock=Waits()).deliver(call_ids=[5])

    assert (report.is_handed_over, report.accepted_count) == (False, 1)


class Standstill(HeldSenders):
    """Senders of a process that is suspended between its claims and its requests."""

    def collect(self, seconds):
        if self.sends:
            self.clock.sleep(400)
        return super().collect(seconds)


def test_a_suspended_process_sends_nothing_that_it_claimed_before(hand_queue, worker_of, sandbox, clock):
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
