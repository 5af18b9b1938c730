"""Answers that are not Userpilot's own, or concern only one delivery: no other delivery waits or becomes dead."""

import datetime as dt
import gzip
import random

import pytest

from audience_sync.db import engines
from audience_sync.queue import destination
from audience_sync.queue.worker import Worker
from audience_sync.userpilot.answers import Answer, Outcome
from tests.queue.conftest import settings_of
from tests.queue.userpilot import LocalUserpilot

PAGE = {"body": "<html><title>Not here</title></html>", "headers": {"content-type": "text/html"}}
JSON_ERROR = {"errors": [{"message": "no such path"}]}


@pytest.fixture
def userpilot(clock):
    return LocalUserpilot(clock)


@pytest.fixture
def deliver(hand_queue, clock, userpilot):
    """Deliver for this many hours, with a new process after each pause."""

    chance = random.Random(1)

    def work(*, hours=0.0, sender=None, **changes):
        end = clock.seconds + hours * 3600
        settings = settings_of(grace=dt.timedelta(seconds=3), **({"poll_seconds": 30.0} | changes))
        while True:
            worker = Worker(hand_queue.engine, sender or userpilot, settings, clock, rng=chance)
            report = worker.deliver()
            if clock.seconds >= end:
                return report
            clock.sleep(900)

    return work


def stopped(queue):
    with engines.read(queue.engine) as connection:
        return destination.stopped(connection)


def fill_all_lanes(queue, count):
    for number in range(count):
        queue.add(f"u{number}", {"plan": "pro"})
        queue.track(f"v{number}", "Signed Up")
        queue.add(f"c{number}", {"size": 1}, action="company")


# Pages in place of Userpilot's answer


@pytest.mark.parametrize("status", [200, 302, 403, 404, 413, 502])
def test_a_gateways_page_makes_no_delivery_dead_and_delivery_continues_afterwards(
    hand_queue, userpilot, deliver, status
):
    fill_all_lanes(hand_queue, 4)
    userpilot.faults.add({"status": status, **PAGE})

    report = deliver(hours=6)

    assert hand_queue.counts() == {"pending": 12}
    assert (report.dead_count, report.stopped, stopped(hand_queue)) == (0, None, None)
    assert len(userpilot.state.requests) < 400  # the lanes pause
    userpilot.faults.clear()
    deliver(hours=1)
    assert hand_queue.counts() == {"accepted": 12}
    assert len(userpilot.state.events) == 4


def test_a_delivery_is_not_given_up_because_of_pages(hand_queue, userpilot, deliver):
    delivery_id = hand_queue.add("u1", {"plan": "pro"})
    userpilot.faults.add({"status": 404, **PAGE})
    deliver(hours=6)
    userpilot.faults.clear()
    userpilot.faults.add({"status": 500})

    deliver(hours=2)

    assert hand_queue.row(delivery_id).status == "pending"
    deliver(hours=4)
    assert hand_queue.row(delivery_id).status == "dead"


def test_a_page_for_one_users_content_does_not_hold_up_the_others(hand_queue, userpilot, deliver):
    userpilot.faults.add({"user_id": "u1", "status": 403, **PAGE})
    hand_queue.add("u1", {"bio": "<script>"})
    hand_queue.fill(100, prefix="v")

    deliver()

    assert hand_queue.counts() == {"accepted": 100, "pending": 1}
    assert sum(entry.user_id == "u1" for entry in userpilot.state.requests) < 10


# A refusal although the key is valid


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("action", ["identify", "track"])
def test_a_refusal_of_one_user_while_the_key_is_valid_concerns_that_user(
    hand_queue, userpilot, deliver, status, action
):
    message = {"errors": [{"message": "not this user"}]}
    userpilot.faults.add({"user_id": "u1", "status": status, "body": message})
    body = {"event_name": "e"} if action == "track" else {"plan": "pro"}
    for number in range(20):
        hand_queue.add(f"u{number}", body, action=action)

    report = deliver()

    assert (report.stopped, stopped(hand_queue)) == (None, None)
    assert hand_queue.counts() == {"accepted": 19, "pending": 1}
    deliver(hours=6)
    assert hand_queue.counts() == {"accepted": 19, "dead": 1}
    assert hand_queue.rows()[1].error.endswith("not this user")


def test_a_call_that_is_refused_with_403_leaves_the_audience_change_alone(hand_queue, userpilot, deliver):
    hand_queue.add("u1", {"vip": True}, kind="change")
    hand_queue.add("u1", {"bad": 1})

    deliver(sender=Choosy(userpilot, 403))

    assert hand_queue.statuses() == ["accepted", "pending"]


def test_the_key_is_checked_once_for_many_refusals(hand_queue, userpilot, deliver):
    userpilot.faults.add({"path": "/v1/identify", "status": 403})
    hand_queue.fill(100)

    deliver()

    checks = [entry for entry in userpilot.state.requests if entry.path == "/v1/validate"]
    assert len(checks) <= len(userpilot.state.requests) / 3
    assert hand_queue.counts() == {"pending": 100}


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 403, **PAGE}, {"status": 429}, {"drop": "before"}], ids=str
)
def test_while_the_key_cannot_be_checked_a_refusal_pauses_and_does_not_stop(
    hand_queue, userpilot, deliver, fault
):
    userpilot.faults.add({"path": "/v1/validate", **fault})
    userpilot.faults.add({"status": 401})
    hand_queue.fill(50)

    report = deliver(hours=6)

    assert (report.stopped, hand_queue.counts()) == (None, {"pending": 50})
    assert len(userpilot.state.requests) < 300
    userpilot.faults.clear()
    deliver(hours=1)
    assert hand_queue.counts() == {"accepted": 50}


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_stops_even_if_userpilot_cannot_validate_keys(hand_queue, userpilot, deliver, status):
    userpilot.faults.add({"path": "/v1/validate", "status": status, "body": JSON_ERROR})
    userpilot.faults.add({"status": 401})
    hand_queue.fill(50)

    assert "HTTP 401" in deliver().stopped

    assert hand_queue.counts() == {"pending": 50}


# A merged request that fails for its content


class Choosy:
    """A sender whose requests with the trait `bad` fail."""

    def __init__(self, userpilot, status):
        self._userpilot, self._status = userpilot, status
        self.get, self.upload = userpilot.get, userpilot.upload

    def send(self, path, payload):
        if "bad" in payload.get("metadata", {}):
            user_id = payload["user_id"]
            self._userpilot.faults.add({"user_id": user_id, "status": self._status, "times": 1})
        return self._userpilot.send(path, payload)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("is_call_newer", [True, False])
def test_a_call_that_fails_again_and_again_is_sent_apart_from_the_audience_change(
    hand_queue, userpilot, deliver, status, is_call_newer
):
    before, after = hand_queue.clock.now() - dt.timedelta(seconds=9), hand_queue.clock.now()
    change = hand_queue.add("u1", {"vip": True}, kind="change", at=before if is_call_newer else after)
    call = hand_queue.add("u1", {"bad": 1, "plan": "pro"}, at=after if is_call_newer else before)
    sender = Choosy(userpilot, status)

    deliver(sender=sender)

    assert (hand_queue.row(change).status, hand_queue.row(call).status) == ("accepted", "pending")
    later = hand_queue.add("u1", {"vip": False}, kind="change")
    deliver(sender=sender)
    assert (hand_queue.row(later).status, hand_queue.row(call).status) == ("accepted", "pending")
    assert userpilot.state.users["u1"]["properties"] == {"vip": False}
    deliver(hours=6, sender=sender)
    assert hand_queue.row(call).status == "dead"


def test_an_older_value_waits_for_a_newer_one_that_is_tried_alone(hand_queue, userpilot, deliver):
    older = hand_queue.add("u1", {"plan": "free"})
    hand_queue.add("u1", {"plan": "pro", "bad": 1})
    apart = hand_queue.add("u1", {"city": "Ulm"})
    sender = Choosy(userpilot, 500)

    deliver(sender=sender)

    assert hand_queue.statuses() == ["pending", "pending", "accepted"]
    deliver(hours=6, sender=sender)
    assert hand_queue.statuses() == ["accepted", "dead", "accepted"]
    assert hand_queue.row(older).attempt_count <= hand_queue.row(apart).attempt_count + 1


def test_an_older_value_of_a_run_does_not_follow_a_newer_one_that_was_applied_before_it_died(
    hand_queue, userpilot, deliver
):
    for value in (False, True):
        hand_queue.add("u1", {"vip": value}, kind="change")
    userpilot.faults.add({"user_id": "u1", "drop": "after", "times": 1})
    userpilot.faults.add({"user_id": "u1", "status": 400, "times": 2})  # of both, then of the newer one

    deliver(hours=1)

    assert [value for _, value, _ in userpilot.state.history["u1"]] == [True]
    assert hand_queue.statuses() == ["cancelled", "dead"]


def test_the_value_of_a_run_is_sent_although_userpilot_refused_a_newer_call_with_the_same_trait(
    hand_queue, userpilot, deliver
):
    hand_queue.add("u1", {"vip": True}, kind="change")
    hand_queue.add("u1", {"vip": False, "bad": 1})

    deliver(hours=1, sender=Choosy(userpilot, 400))

    assert hand_queue.statuses() == ["accepted", "dead"]
    assert userpilot.state.users["u1"]["properties"] == {"vip": True}


# 2xx


@pytest.mark.parametrize(
    "fault",
    [
        {"body": "OK", "headers": {"content-type": "text/plain"}},
        {"body": "OK"},
        {"body": gzip.compress(b'{"status":"ok"}', mtime=0), "headers": {"content-encoding": "gzip"}},
        {"body": b"\x8b\x01\x80ok", "headers": {"content-encoding": "br"}},
        {"body": None},
        {"body": None, "headers": {"content-type": "text/html"}},
        {"body": {"status": "ok"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("status", [200, 202, 204])
def test_an_event_that_is_accepted_in_any_form_is_sent_once(hand_queue, userpilot, deliver, fault, status):
    userpilot.faults.add({"status": status, "apply": True, **fault})
    hand_queue.track("u1", "Signed Up")

    deliver()

    assert hand_queue.counts() == {"accepted": 1}
    assert len(userpilot.state.events) == 1


# Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("40", 40),
        ("Thu, 01 Jan 2026 00:00:40 GMT", 40),
        ("86400", 900),
        ("Wed, 01 Jan 2025 00:00:00 GMT", 0),
        ("soon", 0),
    ],
)
@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_retry_after_is_obeyed(hand_queue, userpilot, deliver, status, value, seconds):
    userpilot.faults.add({"status": status, "headers": {"retry-after": value}, "times": 1})
    hand_queue.add("u1", {"plan": "pro"})

    deliver(hours=0.5, poll_seconds=1.0)

    first, second = (entry.monotonic for entry in userpilot.state.requests)
    assert seconds <= second - first <= seconds + 910
    assert hand_queue.counts() == {"accepted": 1}


def test_a_503_with_retry_after_pauses_its_lane_and_no_other(hand_queue, clock, userpilot, deliver):
    headers = {"retry-after": "600"}
    userpilot.faults.add({"path": "/v1/identify", "status": 503, "headers": headers, "times": 1})
    hand_queue.fill(20)
    hand_queue.track("v1", "Signed Up")

    report = deliver(per_minute={"identify": 5, "track": 5, "company": 5})

    assert report.pending_count == 20 - 4  # those that were in flight with the first
    assert len(userpilot.state.events) == 1
    assert clock.seconds < 60
    before = len(userpilot.state.requests)
    deliver()
    assert len(userpilot.state.requests) == before  # the next process keeps to it


# Many refusals in a row


@pytest.mark.parametrize("status", [400, 404])
def test_many_refusals_in_a_row_pause_the_lane_and_the_others_stay_pending(
    hand_queue, userpilot, deliver, status
):
    hand_queue.fill(60)
    userpilot.faults.add({"status": status, "body": JSON_ERROR})

    deliver(hours=1)

    assert hand_queue.counts() == {"dead": 4, "pending": 56}
    with engines.read(hand_queue.engine) as connection:
        reason = destination.slow_downs(connection)["identify"]["reason"]
    assert reason.endswith("requests were refused: no such path")
    userpilot.faults.clear()
    deliver(hours=0.5)
    assert hand_queue.counts() == {"dead": 4, "accepted": 56}


def test_a_new_process_continues_the_pause_after_many_refusals(hand_queue, userpilot, deliver):
    hand_queue.fill(100)
    userpilot.faults.add({"status": 404, "body": JSON_ERROR})

    for _ in range(5):
        deliver()

    assert hand_queue.counts()["dead"] == 4


def test_many_bad_calls_do_not_hold_up_the_others_for_long(hand_queue, userpilot, deliver):
    for number in range(30):
        hand_queue.add(f"bad{number}", {"bad": 1})
    hand_queue.fill(20, kind="call")

    deliver(hours=0.0, sender=Choosy(userpilot, 400))

    assert [row.status for row in hand_queue.rows()[30:]] == ["accepted"] * 20
    deliver(hours=6, sender=Choosy(userpilot, 400))
    assert hand_queue.counts() == {"dead": 30, "accepted": 20}
    assert {row.error for row in hand_queue.rows()[:30]} == {"HTTP 400 without a message"}


def test_refusals_among_acceptances_do_not_slow_the_lane(hand_queue, clock, userpilot, deliver):
    for number in range(100):
        hand_queue.add(f"u{number}", {"bad": 1} if number % 3 else {"plan": "pro"})

    deliver(sender=Choosy(userpilot, 422))

    assert hand_queue.counts() == {"dead": 66, "accepted": 34}
    assert clock.seconds < 60


def test_a_missing_answer_counts_as_an_attempt(hand_queue, userpilot, deliver):
    hand_queue.fill(1)
    silent = Silent(userpilot)

    deliver(hours=6, sender=silent)

    assert hand_queue.counts() == {"dead": 1}


class Silent:
    def __init__(self, userpilot):
        self.get, self.upload = userpilot.get, userpilot.upload

    def send(self, _path, _payload):
        return Answer(Outcome.FAILED, None, None, "cannot connect", None)
