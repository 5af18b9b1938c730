import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audience_sync.queue.pace import PUSH_SECONDS, BulkPace, Lane

SECONDS = st.floats(0, 20, allow_nan=False)


def simulate(lane, steps, *, push=False, now=0.0):
    """Start all requests that may start after each step's pause; return when the server sees them.

    A step is (pause, latency, where within the latency the server sees it).
    """
    under_way, seen = [], []
    for pause, latency, share in steps:
        target = now + pause
        for end in sorted(end for end in under_way if end <= target):
            under_way.remove(end)
            lane.end(end)
        now = target
        for _ in range(lane.room(now, push=push)):
            lane.start(push=push)
            seen.append(now + latency * share)
            under_way.append(now + latency)
    return sorted(seen), under_way, now


def most_in_a_window(seen, seconds):
    window, most = deque(), 0
    for moment in seen:
        window.append(moment)
        while window[0] <= moment - seconds:
            window.popleft()
        most = max(most, len(window))
    return most


STEPS = st.lists(st.tuples(SECONDS, SECONDS, st.floats(0, 1)), max_size=200)


@given(STEPS, st.integers(1, 20), st.booleans())
def test_no_window_of_the_server_holds_more_than_the_limit(steps, limit, push):
    seen, _, _ = simulate(Lane(limit), steps, push=push)

    assert most_in_a_window(seen, 60) <= limit


@given(STEPS, STEPS, st.integers(1, 20))
def test_no_window_holds_more_than_the_limit_across_a_crash(before, after, limit):
    seen, under_way, now = simulate(first := Lane(limit), before)
    # The next process records that the requests under way end now; the server has seen them by then.
    second = Lane(limit, ended=deque([*first.ended, *(now for _ in under_way)]))
    more, _, _ = simulate(second, after, now=now)

    assert most_in_a_window(sorted([*(min(moment, now) for moment in seen), *more]), 60) <= limit


@given(st.lists(st.tuples(st.floats(0, 0.5), SECONDS, st.floats(0, 1)), max_size=300), st.integers(1, 6000))
def test_pushes_never_come_in_bursts(steps, limit):
    lane = Lane(limit)
    now, started = 0.0, []
    for pause, *_ in steps:
        now += pause
        for _ in range(lane.room(now, push=True)):
            lane.start(push=True)
            started.append(now)

    per_second = limit / 60
    for i, first in enumerate(started):
        for count, moment in enumerate(started[i:], 1):
            assert count <= 1 + per_second * (moment - first + PUSH_SECONDS) + 1e-3


def test_calls_may_burst_into_an_empty_window_and_pushes_not():
    assert Lane(600).room(0.0) == 600
    assert Lane(600).room(0.0, push=True) == 1


@given(STEPS, st.integers(1, 20), st.booleans())
def test_after_its_wait_a_lane_has_room(steps, limit, push):
    lane = Lane(limit)
    _, _, now = simulate(lane, steps, push=push)
    wait = lane.wait_seconds(now, push=push)

    assert (wait == 0) == (lane.room(now, push=push) > 0)
    if wait == math.inf:
        assert lane.in_flight
    else:
        assert lane.room(now + wait + 1e-6, push=push) > 0


@given(st.lists(st.sampled_from(["ok", "429", "500", "pause"]), max_size=60), st.integers(1, 600))
@settings(max_examples=200)
def test_a_lane_always_recovers_by_itself(events, limit):
    lane, now = Lane(limit), 0.0
    for event in events:
        now += 0.5
        if event == "ok":
            lane.succeeded()
        elif event == "429":
            lane.throttled(now, None)
        elif event == "500":
            lane.failed(now, "500")
        else:
            now += 30

    assert lane.wait_seconds(now) <= 900
    assert lane.room(now + lane.wait_seconds(now) + 1e-6) > 0


def test_a_throttled_lane_waits_for_retry_after_and_continues_at_half_its_pace():
    lane = Lane(600)

    assert lane.throttled(10.0, 30.0)
    assert not lane.throttled(10.1, 30.0), "the rest of the burst says nothing new"
    assert lane.wait_seconds(10.1) == 29.9
    assert lane.room(40.0) == 1, "one request tries"
    lane.succeeded()
    assert lane.room(40.0) == 300
    for _ in range(600):
        lane.succeeded()
    assert lane.room(40.0) == 600


@pytest.mark.parametrize("retry_after_seconds", [None, 0.0])
def test_without_a_retry_after_in_the_future_pauses_follow_userpilots_advice_and_then_grow(
    retry_after_seconds,
):
    lane, now, pauses = Lane(600), 0.0, []
    for _ in range(7):
        lane.throttled(now, retry_after_seconds)
        pauses.append(lane.wait_seconds(now))
        now += pauses[-1]

    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_the_bulk_lane_pauses_longer_each_time_unless_a_retry_after_is_in_the_future():
    pace = BulkPace(1800, 10_000)
    assert [pace.pause(0.0, "429", seconds) for seconds in (None, 0.0, 0.001, 30.0, 0.0)] == [2, 4, 1, 30, 32]


def test_a_pause_is_never_longer_than_15_minutes():
    lane = Lane(600)
    lane.throttled(0.0, 86_400.0)

    assert lane.wait_seconds(0.0) == 900


def test_after_five_failures_one_request_tries_at_a_time():
    lane = Lane(600)
    assert [lane.failed(0.0, "500") for _ in range(5)] == [False, False, False, False, True]
    assert lane.room(0.9) == 0
    assert lane.room(1.0) == 1
    lane.start(push=False)
    assert lane.room(1.0) == 0
    assert lane.wait_seconds(1.0) == math.inf
    lane.end(1.0)
    lane.succeeded()
    assert lane.room(1.0) == 599
