"""No user or company slows down the others, however many deliveries it has: the work of a cycle is bounded."""

import datetime as dt
from collections import Counter

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import deliveries
from audience_sync.queue import due
from audience_sync.queue.worker import Worker
from audience_sync.userpilot.answers import Answer, Outcome
from tests.queue.conftest import HeldSenders, settings_of

HOT, OTHERS = 12_000, 300
LONG_AGO = dt.timedelta(days=1)
ACTIONS = ("identify", "track", "company")


def fill(queue, count, subject, *, action="identify", kind="call", body=None, **columns):
    """Queue many deliveries at once; `subject` and `body` are functions of a number."""
    now = queue.clock.now()
    origin = {"call_id": 1} if kind == "call" else {"run_id": 1, "definition_id": 1}
    rows = [
        {
            "action": action,
            "subject_id": subject(number),
            "body": body(number) if body else {"event_name": "Seen"} if action == "track" else {"n": number},
            "class": kind,
            "value_at": now,
            "status": "pending",
            "created_at": now - LONG_AGO,
            "next_attempt_at": now,
        }
        | origin
        | columns
        for number in range(count)
    ]
    with engines.write(queue.engine) as connection:
        connection.execute(deliveries.insert(), rows)


def is_hot(_number):
    return "hot"


def other(number):
    return f"u{number}"


class Recorder:
    """A sender that accepts, and records the subjects that it sent to."""

    def __init__(self, answer=lambda _payload: None):
        self.subjects, self.payloads, self.answer = [], [], answer

    def send(self, _path, payload):
        self.subjects.append(payload.get("user_id") or payload["company_id"])
        self.payloads.append(payload)
        return self.answer(payload) or Answer(Outcome.ACCEPTED, 202, None, None, None)


@pytest.fixture
def work(hand_queue, clock):
    def make(sender, **changes):
        changes = {"poll_seconds": 1.0, "grace": dt.timedelta(seconds=3)} | changes
        return Worker(
            hand_queue.engine,
            sender,
            settings_of(**changes),
            clock,
            open_senders=lambda: HeldSenders(clock),
        )

    return make


def stop_after(worker, is_enough):
    worker.on_progress = lambda _: is_enough() and worker.stop.set()
    worker.deliver()


@pytest.mark.parametrize("kind", ["call", "change", "push"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_hot_subject_does_not_slow_the_others(hand_queue, work, action, kind):
    fill(hand_queue, HOT, is_hot, action=action, kind=kind)
    fill(hand_queue, OTHERS, other, action=action, kind=kind)
    sender = Recorder()

    worker = work(sender)
    stop_after(worker, lambda: len(set(sender.subjects)) > OTHERS)

    counts = Counter(sender.subjects)
    assert len(counts) == OTHERS + 1
    first, last = sender.subjects.index("u0"), len(sender.subjects)
    assert sender.subjects[first:].count("hot") <= 0.1 * (last - first)


@pytest.mark.parametrize("action", ["identify", "company"])
def test_a_hot_subject_ends_with_its_newest_value(hand_queue, work, action):
    fill(hand_queue, 2_600, is_hot, action=action)
    sender = Recorder()

    work(sender).deliver()

    assert [payload["metadata"]["n"] for payload in sender.payloads] == [499, 999, 1499, 1999, 2499, 2599]
    assert hand_queue.counts() == {"accepted": 6, "cancelled": 2_594}


def test_a_hot_users_tracks_are_all_sent_in_their_order(hand_queue, work):
    fill(hand_queue, 300, is_hot, action="track", body=lambda number: {"event_name": f"e{number}"})
    fill(hand_queue, 5, other, action="track")
    sender = Recorder()

    work(sender).deliver()

    sent = [payload["event_name"] for payload in sender.payloads if payload["user_id"] == "hot"]
    assert sent == [f"e{number}" for number in range(300)]
    assert hand_queue.counts() == {"accepted": 305}


def test_a_transaction_of_the_worker_reads_and_writes_a_limited_number_of_rows(hand_queue, work):
    fill(hand_queue, HOT, is_hot)
    fill(hand_queue, HOT, is_hot, action="track")
    fill(hand_queue, HOT, is_hot, action="company")
    written = []

    @sa.event.listens_for(hand_queue.engine, "after_cursor_execute")
    def count(_connection, cursor, statement, *_):
        if statement.startswith("UPDATE") and "deliveries" in statement:
            written[-1] += max(0, cursor.rowcount)

    @sa.event.listens_for(hand_queue.engine, "begin")
    def begin(_connection):
        written.append(0)

    sender = Recorder()
    stop_after(work(sender), lambda: len(sender.subjects) > 40)

    assert max(written) <= 3 * 2 * due.MAX_MERGED


def test_the_deliveries_of_a_refused_merge_are_sent_one_by_one_while_the_others_continue(hand_queue, work):
    fill(hand_queue, 20_000, is_hot, body=lambda number: {f"t{number}": 1}, alone=True)
    fill(hand_queue, OTHERS, other)
    sender = Recorder()

    stop_after(work(sender), lambda: len(set(sender.subjects)) > OTHERS)

    hot = [payload for payload in sender.payloads if payload["user_id"] == "hot"]
    assert len(hot) <= 0.1 * len(sender.payloads) + 32
    assert [list(payload["metadata"]) for payload in hot[:2]] == [["t19999"], ["t19998"]]


def test_only_the_refused_delivery_of_a_hot_users_merge_becomes_dead(hand_queue, work):
    fill(hand_queue, 1_200, is_hot, body=lambda number: {"bad": 1} if number == 700 else {"n": number})
    refusal = Answer(Outcome.REFUSED, 400, None, "bad is bad", None)
    sender = Recorder(lambda payload: refusal if "bad" in payload["metadata"] else None)

    work(sender).deliver()

    counts = hand_queue.counts()
    assert counts["dead"] == 1
    assert counts.keys() == {"accepted", "cancelled", "dead"}
    assert [payload["metadata"] for payload in sender.payloads][-1] == {"n": 1199}
    assert len(sender.payloads) < 20


def test_a_late_value_of_a_user_with_a_long_history_is_compared_with_the_accepted_ones(
    hand_queue, work, clock
):
    accepted = {"status": "accepted", "settled_at": clock.now(), "request_id": 1}
    fill(hand_queue, HOT, is_hot, **accepted)
    hand_queue.add("hot", {"n": "old", "city": "Ulm"}, at=clock.now() - LONG_AGO)
    sender = Recorder()

    work(sender).deliver()

    assert [payload["metadata"] for payload in sender.payloads] == [{"city": "Ulm"}]


class Suspended:
    """Senders of a process that is suspended before it sends, the first few times."""

    def __init__(self, clock, times):
        self.clock, self.times, self.sends = clock, times, []
        self.when_suspended = lambda: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, send):
        self.sends.append(send)

    def collect(self, _seconds):
        if self.sends and self.times:
            self.times -= 1
            self.clock.seconds += 1_000
            self.when_suspended()
        replies, self.sends = [send() for send in self.sends], []
        return replies


@pytest.mark.parametrize("action", ACTIONS)
def test_a_request_that_was_never_sent_does_not_count_as_an_attempt(hand_queue, clock, action):
    fill(hand_queue, 3, other, action=action)
    sender = Recorder()
    senders = Suspended(clock, times=30)
    worker = Worker(
        hand_queue.engine, sender, settings_of(poll_seconds=1.0), clock, open_senders=lambda: senders
    )

    worker.deliver()

    assert len(sender.subjects) == 3
    assert hand_queue.counts() == {"accepted": 3}
    assert {row.attempt_count for row in hand_queue.rows()} == {1}
    not_sent = [row for row in hand_queue.requests() if row.error]
    assert {row.error for row in not_sent} == {
        "Not sent: this process was suspended, and another may have taken over"
    }


def test_a_delivery_that_was_never_sent_counts_as_never_attempted(hand_queue, clock):
    hand_queue.add("ann", {"vip": True}, kind="change")
    senders = Suspended(clock, times=1)
    worker = Worker(
        hand_queue.engine, Recorder(), settings_of(poll_seconds=1.0), clock, open_senders=lambda: senders
    )
    senders.when_suspended = worker.stop.set

    worker.deliver()

    (row,) = hand_queue.rows()
    assert (row.status, row.attempt_count, row.first_attempt_at) == ("pending", 0, None)
