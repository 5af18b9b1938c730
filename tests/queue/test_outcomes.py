import datetime as dt
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.queue import outcomes
from audience_sync.queue.outcomes import Delivery
from audience_sync.userpilot.answers import Answer, Outcome

NOW = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
TRAITS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3)


def delivery(
    number,
    body,
    *,
    seconds=0,
    attempts=1,
    first=NOW,
    isolated=False,
    due=NOW,
    action="identify",
    is_call=True,
):
    at = NOW + dt.timedelta(seconds=seconds)
    return Delivery(number, action, "u1", body, at, is_call, isolated, attempts, first, due)


def answer(outcome, error="words"):
    return Answer(outcome, None, None, error, None)


def settle(deliveries, outcome, **retries):
    policy = outcomes.Retries(random.Random(1), **retries)
    return outcomes.decide_settlements(deliveries, answer(outcome), NOW, policy)


def repeat(deliveries, status_code, outcome=Outcome.FAILED, **more):
    answered = Answer(outcome, status_code, None, "words", **({"retry_after_seconds": None} | more))
    policy = outcomes.Retries(random.Random(1))
    return outcomes.decide_settlements(deliveries, answered, NOW, policy)


def statuses(deliveries, outcome, **retries):
    return [(each.delivery_id, each.status.value) for each in settle(deliveries, outcome, **retries)]


@given(st.lists(st.tuples(st.integers(0, 5), TRAITS), min_size=1, max_size=8))
def test_the_merged_body_is_what_userpilot_would_hold_after_each_in_its_order(items):
    pending = [delivery(number, body, seconds=seconds) for number, (seconds, body) in enumerate(items)]
    expected = {}
    for seconds in range(6):
        for at, body in items:
            if at == seconds:
                expected.update(body)

    assert outcomes.body_of(outcomes.select_next(pending, NOW)) == expected


@given(st.lists(TRAITS, min_size=1, max_size=8))
def test_an_accepted_request_accepts_what_it_carried_and_cancels_what_was_superseded(bodies):
    chosen = outcomes.select_next([delivery(number, body) for number, body in enumerate(bodies)], NOW)
    settled = dict(statuses(chosen, Outcome.ACCEPTED))

    for number, body in enumerate(bodies):
        later = set().union(*bodies[number + 1 :])
        overwritten = bool(body) and set(body) <= later
        assert settled[number] == ("cancelled" if overwritten else "accepted")


def test_the_newest_is_the_timestamp_then_the_arrival():
    pending = [delivery(1, {"a": 1}, seconds=9), delivery(2, {"a": 2}), delivery(3, {"a": 3})]

    assert [each.delivery_id for each in outcomes.select_next(pending, NOW)] == [2, 3, 1]


def test_a_refused_request_of_several_is_sent_again_one_by_one():
    settled = settle([delivery(1, {"a": 1}), delivery(2, {"b": 2})], Outcome.REFUSED)

    assert [(each.status.value, each.isolated, each.next_attempt_at) for each in settled] == [
        ("pending", True, NOW),
        ("pending", True, NOW),
    ]


def test_a_refused_request_of_one_dies_with_userpilots_message():
    (settled,) = settle([delivery(1, {"a": 1})], Outcome.REFUSED)

    assert (settled.status.value, settled.error) == ("dead", "words")


def test_of_isolated_deliveries_the_newest_is_sent_first_and_older_ones_wait():
    later = NOW + dt.timedelta(minutes=5)
    older, newest = delivery(1, {"a": 1}, isolated=True), delivery(2, {"a": 2, "b": 2}, isolated=True)
    waiting = delivery(2, {"a": 2, "b": 2}, isolated=True, due=later)
    fresh = delivery(3, {"a": 3})

    assert outcomes.select_next([older, newest, fresh], NOW) == [newest]
    assert outcomes.select_next([older, waiting], NOW) == []
    assert outcomes.select_next([older, waiting, fresh], NOW) == [fresh]
    assert outcomes.select_next([older, fresh], NOW) == [older]


def test_of_isolated_deliveries_that_share_no_trait_the_one_that_has_been_due_for_longest_is_sent_first():
    earlier = NOW - dt.timedelta(seconds=1)
    older = delivery(1, {"a": 1}, isolated=True, due=earlier)
    failing, sharing = delivery(2, {"b": 2}, isolated=True), delivery(2, {"a": 2}, isolated=True)

    assert outcomes.select_next([older, failing], NOW) == [older]
    assert outcomes.select_next([older, sharing], NOW) == [sharing]


def test_isolated_deliveries_that_fail_do_not_keep_the_others_from_their_turn():
    earlier, earliest = NOW - dt.timedelta(seconds=1), NOW - dt.timedelta(seconds=2)
    failing = delivery(2, {"a": 1, "b": 1}, isolated=True, due=earlier)
    fresh, older = delivery(3, {"c": 1}, due=earliest), delivery(1, {"b": 2}, due=earliest)

    assert outcomes.select_next([failing, fresh], NOW) == [fresh]
    assert outcomes.select_next([failing, delivery(3, {"c": 1})], NOW) == [failing]
    assert outcomes.select_next([older, failing], NOW) == [failing]
    assert outcomes.select_next([older, failing, fresh], NOW) == [fresh]
    assert outcomes.blocked_until([older, failing]) == {1: earlier}


def test_an_isolated_delivery_waits_for_newer_ones_that_may_have_been_applied():
    later = NOW + dt.timedelta(minutes=5)
    older = delivery(1, {"a": 1}, isolated=True)
    tried, waiting = delivery(2, {"a": 2}, attempts=2), delivery(2, {"a": 2}, attempts=2, due=later)
    fresh = delivery(3, {"b": 3})

    assert outcomes.select_next([older, tried], NOW) == [tried]
    assert outcomes.select_next([older, waiting], NOW) == []
    assert outcomes.select_next([older, waiting, fresh], NOW) == [waiting, fresh]


def test_a_delivery_waits_only_for_newer_isolated_ones_that_share_a_trait():
    later, latest = NOW + dt.timedelta(minutes=5), NOW + dt.timedelta(minutes=9)
    first = delivery(1, {"c": 1}, isolated=True)
    second = delivery(2, {"a": 1, "c": 1}, isolated=True)
    apart = delivery(3, {"d": 1}, isolated=True)
    third = delivery(4, {"a": 2, "b": 1}, isolated=True, due=later)
    fourth = delivery(5, {"b": 2}, isolated=True, due=latest)
    pending = [first, second, apart, third, fourth]

    assert outcomes.blocked_until(pending) == {1: latest, 2: latest, 4: latest}
    assert outcomes.select_next(pending, NOW) == [apart]
    assert outcomes.select_next([first, apart], NOW) == [apart]


def test_an_isolated_delivery_is_not_sent_after_an_attempt_with_a_newer_value():
    soon, later = NOW + dt.timedelta(seconds=9), NOW + dt.timedelta(minutes=5)
    older = delivery(1, {"a": 1}, isolated=True)
    newer = delivery(2, {"a": 2}, attempts=2, due=soon)

    assert outcomes.select_next([older, newer], NOW) == []
    assert outcomes.blocked_until([older, newer]) == {1: soon}
    assert outcomes.select_next([older, newer], soon) == [newer]
    assert outcomes.select_next([older, delivery(2, {"a": 2}, due=later)], NOW) == [older]
    assert outcomes.select_next([older, delivery(2, {"b": 2}, attempts=2, due=later)], NOW) == [older]


def test_superseded_traits_are_removed_and_so_are_deliveries_without_any_other():
    trimmed = outcomes.without_superseded(
        [delivery(1, {"a": 1, "b": 1}), delivery(2, {"a": 2}), delivery(3, {})], {1: {"a"}, 2: {"a", "z"}}
    )

    assert [(each.delivery_id, each.body) for each in trimmed.left] == [(1, {"b": 1}), (3, {})]
    assert trimmed.superseded == [2]


@pytest.mark.parametrize("outcome", [Outcome.THROTTLED, Outcome.UNAUTHORISED])
def test_a_429_and_a_refused_key_do_not_count_as_attempts(outcome):
    due = NOW - dt.timedelta(seconds=5)
    (settled,) = settle(
        [delivery(1, {"a": 1}, attempts=20, first=NOW - dt.timedelta(days=2), due=due)], outcome
    )

    assert (settled.status.value, settled.was_attempt, settled.next_attempt_at) == ("pending", False, due)


@pytest.mark.parametrize(
    ("attempts", "hours", "status"),
    [(8, 4, "dead"), (7, 4, "pending"), (8, 3.99, "pending"), (200, 1, "pending"), (2, 100, "pending")],
)
def test_giving_up_takes_both_eight_attempts_and_four_hours(attempts, hours, status):
    first = NOW - dt.timedelta(hours=hours)
    (settled,) = settle([delivery(1, {}, attempts=attempts, first=first)], Outcome.FAILED)

    assert settled.status.value == status


@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_backoff_is_full_jitter_from_one_second_to_15_minutes(attempts, chance):
    assert 0 <= outcomes.backoff_seconds(attempts, chance) <= min(2 ** (attempts - 1), 900)


@pytest.mark.parametrize("status_code", [500, 503, 502, 408])
def test_a_merged_request_that_fails_for_the_third_time_is_sent_apart(status_code):
    call, change = delivery(1, {"bad": 1}, attempts=3), delivery(2, {"vip": True}, attempts=1)

    assert [(each.isolated, each.next_attempt_at) for each in repeat([call, change], status_code)] == [
        (True, NOW),
        (True, NOW),
    ]
    assert not any(each.isolated for each in repeat([delivery(1, {}, attempts=2), change], status_code))
    assert not any(each.isolated for each in repeat([call, change], None))  # there was no answer
    assert not repeat([call], status_code)[0].isolated


def test_an_inconclusive_answer_does_not_make_a_delivery_dead():
    worn = delivery(1, {"a": 1}, attempts=99, first=NOW - dt.timedelta(days=9))
    (settled,) = repeat([worn], 404, Outcome.UNKNOWN, is_evidence=False)

    assert (settled.status.value, settled.restarts_give_up_time) == ("pending", True)
    assert repeat([worn], 500)[0].status.value == "dead"


def test_a_doubtful_refusal_counts_as_an_attempt_and_its_message_is_stored_with_the_dead_delivery():
    fresh, worn = delivery(1, {"a": 1}), delivery(1, {"a": 1}, attempts=8, first=NOW - dt.timedelta(hours=4))

    assert repeat([fresh], 400, Outcome.DOUBTFUL)[0].status.value == "pending"
    (settled,) = repeat([worn], 400, Outcome.DOUBTFUL)
    assert (settled.status.value, settled.error) == ("dead", "words")


def test_the_next_attempt_is_not_before_retry_after():
    (settled,) = repeat([delivery(1, {"a": 1})], 500, retry_after_seconds=77.0)

    assert settled.next_attempt_at == NOW + dt.timedelta(seconds=77)


def test_the_backoff_uses_its_whole_range():
    drawn = [outcomes.backoff_seconds(30, random.Random(seed)) for seed in range(300)]

    assert min(drawn) < 30
    assert max(drawn) > 870


def test_after_an_unknown_outcome_the_user_waits():
    (settled,) = settle([delivery(1, {"a": 1})], Outcome.UNKNOWN, grace=dt.timedelta(seconds=3))

    assert settled.grace_until == NOW + dt.timedelta(seconds=3)
    assert settled.next_attempt_at >= settled.grace_until


def test_at_most_once_a_track_with_an_unknown_outcome_dies_and_a_failed_one_does_not():
    track = delivery(1, {"event_name": "x"}, action="track")

    assert statuses([track], Outcome.UNKNOWN, tracks_at_most_once=True) == [(1, "dead")]
    assert statuses([track], Outcome.FAILED, tracks_at_most_once=True) == [(1, "pending")]
    assert statuses([track], Outcome.UNKNOWN) == [(1, "pending")]
    assert statuses([delivery(1, {"a": 1})], Outcome.UNKNOWN, tracks_at_most_once=True) == [(1, "pending")]
