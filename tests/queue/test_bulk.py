"""Both lanes deliver a backlog, by a clock that tests set: however a job ends, no user is forgotten."""

import datetime as dt
import random
from collections import Counter

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.tables import bulk_jobs, deliveries
from audience_sync.queue import bulk, destination
from audience_sync.queue import jobs as store
from audience_sync.queue.job_answers import STALLED_JOB_SECONDS
from audience_sync.queue.worker import Worker
from audience_sync.userpilot import payloads
from audience_sync.userpilot.answers import Answer, Outcome
from tests.faulty_sandbox import JobFault
from tests.queue.conftest import HeldSenders, settings_of
from tests.queue.userpilot import LocalUserpilot

LIVE, ROWS = 120, 360  # a minute: a fifth of Userpilot's, for a fifth of the work


@pytest.fixture
def userpilot(clock):
    return LocalUserpilot(clock, identify_per_minute=LIVE, bulk_rows_per_minute=ROWS)


@pytest.fixture
def work(hand_queue, clock, userpilot):
    """Makes workers with both lanes; with `per_job` 0, only the live lane."""

    def make(*, per_job=10_000, live=LIVE, rows=ROWS, on_progress=lambda _: None, **changes):
        settings = settings_of(
            per_minute={"identify": live, "track": LIVE, "company": LIVE},
            jobs=bulk.BulkSettings(row=row, rows_per_minute=rows, rows_per_job=per_job),
            **({"poll_seconds": 1.0} | changes),
        )
        return Worker(
            hand_queue.engine, userpilot, settings, clock, rng=random.Random(1), on_progress=on_progress
        )

    return make


def row(user_id, body):
    return payloads.bulk_row(
        payloads.build("identify", user_id, body, booleans="native", nested="flatten")[1]
    )


def jobs(engine):
    with engines.read(engine) as connection:
        return list(connection.execute(sa.select(bulk_jobs).order_by(bulk_jobs.c.request_id)))


def assert_all_accepted_once(queue, userpilot, count):
    assert queue.counts() == {"accepted": count}
    assert len(userpilot.values_of("vip")) == count
    assert sum(len(lines) for lines in userpilot.state.history.values()) == count


def test_a_push_goes_by_both_lanes_which_end_together(hand_queue, clock, userpilot, work):
    hand_queue.fill(800, kind="push")

    report = work().deliver()

    assert_all_accepted_once(hand_queue, userpilot, 800)
    ((status, rows),) = userpilot.uploads()
    assert (status, rows) == (202, pytest.approx(600, abs=10))
    assert clock.seconds == pytest.approx(100, rel=0.03)
    assert userpilot.refusals(429) == userpilot.refusals(409) == 0
    assert (report.accepted_count, report.pending_count) == (800, 0)
    assert report.request_count == 800 - rows + 1
    (job,) = jobs(hand_queue.engine)
    assert (job.status, job.row_count, job.completed_count) == ("completed", rows, rows)
    assert job.job_id
    assert job.settled_at >= job.ended_at >= job.submitted_at


def test_a_long_push_takes_the_combined_limit(hand_queue, clock, userpilot, work):
    hand_queue.fill(1_600, kind="push")
    work(per_job=400).deliver()
    assert_all_accepted_once(hand_queue, userpilot, 1_600)
    assert 1_600 / clock.seconds >= 0.97 * (LIVE + ROWS) / 60
    assert userpilot.refusals(429) == userpilot.refusals(409) == 0
    assert max(rows for _, rows in userpilot.uploads()) == 400


@pytest.mark.parametrize(("kind", "count"), [("call", LIVE), ("change", LIVE), ("push", 130)])
def test_small_work_never_goes_by_bulk(hand_queue, userpilot, work, kind, count):
    hand_queue.fill(count, kind=kind)
    work().deliver()
    assert userpilot.uploads() == []
    assert_all_accepted_once(hand_queue, userpilot, count)


def test_changes_burst_and_the_rest_goes_by_bulk(hand_queue, clock, userpilot, work):
    hand_queue.fill(300)
    work().deliver()
    assert userpilot.uploads() == [(202, 300 - LIVE)]
    assert clock.seconds == pytest.approx((300 - LIVE) / ROWS * 60, rel=0.03)


def test_bulk_is_switched_off(hand_queue, userpilot, work):
    hand_queue.fill(140, kind="push")
    work(per_job=0).deliver()
    assert userpilot.uploads() == []
    assert_all_accepted_once(hand_queue, userpilot, 140)


def test_a_users_values_are_one_row_and_the_overwritten_ones_are_cancelled(hand_queue, userpilot, work):
    hand_queue.fill(200, kind="push")
    hand_queue.fill(200, kind="push")
    hand_queue.add("u199", {"active": True}, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 201, "cancelled": 200}
    assert [rows for _, rows in userpilot.uploads()] == [149]  # one was in flight when the job began
    last = hand_queue.rows(deliveries.c.subject_id == "u199")
    assert [(each.status, each.error) for each in last] == [
        ("cancelled", "superseded by a newer value"), ("accepted", None), ("accepted", None),
    ]  # fmt: skip
    assert userpilot.state.users["u199"]["properties"] == {"vip": True, "active": True}


def test_a_newer_value_waits_for_the_job_and_then_follows(hand_queue, userpilot, work):
    hand_queue.fill(800, kind="push")
    added = []

    def change(_report):
        if userpilot.uploads() and not added:
            added.append(hand_queue.add("u400", {"vip": False}, kind="change"))

    work(on_progress=change).deliver()

    assert [(name, value) for name, value, _ in userpilot.state.history["u400"]] == [
        ("vip", True),
        ("vip", False),
    ]
    (first, second) = hand_queue.rows(deliveries.c.subject_id == "u400")
    assert second.settled_at > first.settled_at
    assert hand_queue.counts() == {"accepted": 801}


def test_a_change_of_another_user_does_not_wait_for_the_job(hand_queue, clock, work):
    hand_queue.fill(4_000, kind="push")
    added = []

    def change(_report):
        if clock.seconds > 60 and not added:
            added.append(hand_queue.add("someone", {"vip": True}, kind="change"))
        elif added and hand_queue.row(added[0]).status == "accepted":
            worker.stop.set()

    worker = work(on_progress=change)
    worker.deliver()

    (mine,) = hand_queue.rows(deliveries.c.subject_id == "someone")
    assert (mine.settled_at - mine.created_at).total_seconds() < 15
    assert hand_queue.row(mine.delivery_id).request_id not in {
        job.request_id for job in jobs(hand_queue.engine)
    }


def test_the_real_pace_of_jobs_is_learned(hand_queue, clock, userpilot, work):
    userpilot.limit(bulk_rows_per_minute=120)
    hand_queue.fill(1_200, kind="push")
    work(per_job=200).deliver()
    assert_all_accepted_once(hand_queue, userpilot, 1_200)
    assert 1_200 / clock.seconds >= 0.9 * (LIVE + 120) / 60


# How a job may end.


def test_users_of_a_failed_job_are_sent_by_the_live_lane(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="failed", after_rows=100))
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 400}
    assert len(userpilot.values_of("vip")) == 400
    assert jobs(hand_queue.engine)[0].status == "failed"


def test_a_job_that_completed_with_rows_missing_forgets_nobody(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="short", after_rows=150))
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 400}
    assert len(userpilot.values_of("vip")) == 400
    first = jobs(hand_queue.engine)[0]
    assert (first.status, first.error) == ("failed", "Userpilot's bulk job completed 150 of 299 rows")


def test_a_job_that_never_ends_is_given_up(hand_queue, clock, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="hangs", after_rows=10, state="mystery"))
    hand_queue.fill(400, kind="push")
    work(poll_seconds=10.0).deliver()
    assert hand_queue.counts() == {"accepted": 400}
    assert len(userpilot.values_of("vip")) == 400
    (job,) = jobs(hand_queue.engine)
    assert (job.status, job.state) == ("lost", "mystery")
    assert STALLED_JOB_SECONDS < clock.seconds < 2 * STALLED_JOB_SECONDS + 600


def test_an_unknown_state_counts_as_running(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(state="mystery"))
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 400)


def test_a_job_that_userpilot_no_longer_knows(hand_queue, userpilot, work):
    hand_queue.fill(400, kind="push")
    forgotten = []

    def forget(_report):
        if userpilot.uploads() and not forgotten:
            forgotten.append(userpilot.state.forget_jobs())

    work(on_progress=forget, poll_seconds=10.0).deliver()
    assert hand_queue.counts() == {"accepted": 400}
    assert len(userpilot.values_of("vip")) == 400
    assert jobs(hand_queue.engine)[0].status == "lost"


def test_an_unknown_job_that_still_runs_overwrites_no_newer_value(hand_queue, userpilot, work):
    userpilot.limit(bulk_rows_per_minute=60)
    hand_queue.fill(400, kind="push")
    done = []

    def forget(_report):
        if userpilot.uploads() and not done:
            done.append(userpilot.state.forget_jobs())
            hand_queue.add("u399", {"vip": False}, kind="change")

    work(on_progress=forget, poll_seconds=10.0).deliver()

    assert hand_queue.counts() == {"accepted": 400, "cancelled": 1}
    assert [value for _, value, _ in userpilot.state.history["u399"]][-1] is False
    assert userpilot.values_of("vip") == {f"u{number}": number != 399 for number in range(400)}


def test_a_job_whose_polls_find_nothing_is_followed_in_the_list(hand_queue, userpilot, work):
    errors = {"errors": [{"message": "no such job"}]}
    userpilot.faults.add({"path": "/v1/background_jobs/*", "status": 404, "body": errors})
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 400)
    assert jobs(hand_queue.engine)[0].status == "completed"


def test_a_gateways_page_says_nothing_about_a_job(hand_queue, userpilot, work):
    page = {"status": 404, "body": "<html>", "headers": {"content-type": "text/html"}}
    for path in ("/v1/background_jobs*", "/v1/users/bulk_identify"):
        userpilot.faults.add({"path": path, "times": 6, "apply": True, **page})
    hand_queue.fill(800, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 800)
    assert {job.status for job in jobs(hand_queue.engine)} == {"completed"}


@pytest.mark.parametrize("state", ["cancelled", "paused", "processing"])
def test_another_clients_job_that_does_not_end_holds_up_bulk_for_half_an_hour_only(
    hand_queue, userpilot, work, state
):
    other = userpilot.state.start_other_job(10)
    other.fault = JobFault(outcome="hangs", state=state)
    hand_queue.fill(300, kind="push")

    def release(_report):  # the list shows the job for ever, but it is over
        if userpilot.refusals(409):
            userpilot.state._running = None

    work(on_progress=release, poll_seconds=30.0, live=6).deliver()

    assert hand_queue.counts() == {"accepted": 300}
    assert [status for status, _ in userpilot.uploads()][:2] == [409, 202]
    first, second, *_ = [
        entry.monotonic for entry in userpilot.state.requests if entry.path == "/v1/users/bulk_identify"
    ]
    assert STALLED_JOB_SECONDS <= second - first < STALLED_JOB_SECONDS + 120


def test_a_job_of_ours_in_an_unknown_state_holds_up_bulk_until_a_deadline(hand_queue, clock, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="hangs", after_rows=10, state="cancelled"))
    hand_queue.fill(150, kind="push")

    def release(_report):
        if clock.seconds > STALLED_JOB_SECONDS / 2:
            userpilot.state._running = None

    work(on_progress=release, poll_seconds=30.0, live=6).deliver()
    assert hand_queue.counts() == {"accepted": 150}
    assert jobs(hand_queue.engine)[0].status == "lost"
    hand_queue.fill(300, kind="push", prefix="v")
    work(poll_seconds=30.0, live=6).deliver()
    assert hand_queue.counts() == {"accepted": 450}
    assert jobs(hand_queue.engine)[-1].status == "completed"


def test_an_upload_that_is_refused_although_the_key_is_valid_is_split_until_only_the_refused_row_is_left(
    hand_queue, userpilot, work
):
    refuse_rows_of(userpilot, "u100", status=403)
    hand_queue.fill(200, kind="push")
    work(live=12).deliver()
    assert hand_queue.counts() == {"accepted": 199, "pending": 1}


def test_the_live_lane_continues_while_another_clients_job_runs(hand_queue, clock, userpilot, work):
    userpilot.state.start_other_job(600)  # 100 s
    hand_queue.fill(1_200, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 1_200)
    assert userpilot.refusals(409) == 1
    assert len(userpilot.uploads()) >= 2
    assert clock.seconds < 1_200 / 8 + 110


@pytest.mark.parametrize("status", [429, 500, 503, 404])
def test_the_users_of_an_upload_that_must_be_repeated_are_queued_again(hand_queue, userpilot, work, status):
    fault = {"path": "/v1/users/bulk_identify", "status": status, "times": 2}
    userpilot.faults.add(fault)
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 400)
    assert Counter(status for status, _ in userpilot.uploads())[status] == 2
    assert all(row.attempt_count == 1 for row in hand_queue.rows())


def test_too_large_an_upload_is_halved(hand_queue, userpilot, work):
    userpilot.limit(bulk_rows_per_request=160)
    hand_queue.fill(1_200, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 1_200)
    statuses = Counter(status for status, _ in userpilot.uploads())
    assert statuses[413] <= 4


@pytest.mark.parametrize("place", [40, 100, 199])
def test_a_refused_row_is_found_by_halving(hand_queue, userpilot, work, place):
    """Userpilot answers 400 to every request with this user; all others are delivered."""
    refuse_rows_of(userpilot, f"u{place}")
    hand_queue.fill(200, kind="push")
    work(live=12).deliver()
    assert hand_queue.counts() == {"accepted": 199, "dead": 1}
    assert len(userpilot.values_of("vip")) == 199
    assert sum(status == 400 for status, _ in userpilot.uploads()) <= 9


def refuse_rows_of(userpilot, user_id, status=400):
    upload, send = userpilot.upload, userpilot.send

    def picky_upload(path, filename, content):
        if f'"{user_id}"'.encode() in content:
            userpilot.faults.add({"path": f"/{path}", "status": status, "times": 1})
        return upload(path, filename, content)

    def picky_send(path, payload):
        if payload["user_id"] == user_id:
            userpilot.faults.add({"path": f"/{path}", "user_id": user_id, "status": status, "times": 1})
        return send(path, payload)

    userpilot.upload, userpilot.send = picky_upload, picky_send


@pytest.mark.parametrize("drop", ["before", "after"])
@pytest.mark.parametrize("is_bare", [False, True])
def test_an_upload_without_an_answer(hand_queue, userpilot, work, drop, is_bare):
    userpilot.limit(bare_jobs=is_bare)
    userpilot.faults.add({"path": "/v1/users/bulk_identify", "drop": drop, "times": 1})
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 400}
    assert len(userpilot.values_of("vip")) == 400
    if drop == "after" and not is_bare:  # found by its file name, and followed
        assert_all_accepted_once(hand_queue, userpilot, 400)
        assert jobs(hand_queue.engine)[0].status == "completed"


def test_a_job_found_by_its_file_name_is_asked_how_many_rows_it_completed(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="short", after_rows=10))  # over before we look for it
    userpilot.faults.add({"path": "/v1/users/bulk_identify", "drop": "after", "times": 1})
    hand_queue.fill(400, kind="push")
    work().deliver()
    assert len(userpilot.values_of("vip")) == 400
    first = jobs(hand_queue.engine)[0]
    assert (first.status, first.error) == ("failed", "Userpilot's bulk job completed 10 of 299 rows")


def test_an_upload_that_arrives_after_its_time_out_is_looked_for_later(hand_queue, clock, userpilot, work):
    upload, late = userpilot.upload, []

    def late_upload(*request):
        if late:
            return upload(*request)
        late.append((clock.seconds + 2.5, request))
        return Answer(Outcome.UNKNOWN, None, None, "no answer in time", None)

    def sleep(seconds):
        clock.seconds += seconds
        if len(late) == 1 and clock.seconds >= late[0][0]:
            late.append(upload(*late[0][1]))

    userpilot.upload = late_upload
    clock.sleep = sleep
    hand_queue.fill(400, kind="push")
    work(poll_seconds=0.2).deliver()
    assert_all_accepted_once(hand_queue, userpilot, 400)
    assert [job.status for job in jobs(hand_queue.engine)] == ["completed"]


def test_the_next_process_follows_the_job(hand_queue, clock, userpilot, work):
    hand_queue.fill(400, kind="push")
    first = work(on_progress=lambda _: first.stop.set() if userpilot.uploads() else None)
    first.deliver()
    assert hand_queue.counts()["sending"] == 299
    clock.sleep(30)
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 400)
    (job,) = jobs(hand_queue.engine)
    assert job.status == "completed"


def test_a_refused_key_leaves_the_job_to_the_next_process(hand_queue, userpilot, work):
    userpilot.faults.add({"path": "/v1/background_jobs/*", "status": 401, "times": 1})
    userpilot.faults.add({"path": "/v1/validate", "status": 401, "times": 1})
    hand_queue.fill(400, kind="push")
    report = work().deliver()
    assert report.stopped
    assert hand_queue.counts()["sending"] == 299
    with engines.write(hand_queue.engine) as connection:
        destination.resume(connection)
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 400)


def test_rows_that_cannot_be_written_go_live(hand_queue, userpilot, work):
    hand_queue.fill(400, kind="push")
    hand_queue.add("u399", {"story": "x" * 70_000}, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 401}
    assert len(userpilot.state.users["u399"]["properties"]["story"]) == 70_000


@pytest.mark.parametrize(
    "answer",
    [
        {"job_id": "a\0b", "status": "queued"},
        {"job_id": 7},
        {"job_id": "../..\ud800"},
        [],
        "x",
        {"status": "completed"},
    ],
    ids=str,
)
def test_an_answer_without_a_job_is_not_a_job(hand_queue, userpilot, work, answer):
    fault = {"path": "/v1/users/bulk_identify", "status": 202, "body": answer, "apply": True, "times": 1}
    userpilot.faults.add(fault)
    hand_queue.fill(200, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 200)


@pytest.mark.parametrize(
    "answer",
    [{"status": "\0", "completed_rows": 2**70}, {"status": None}, {"status": ["completed"]}, [], {}, 3],
    ids=str,
)
def test_a_poll_that_makes_no_sense_is_asked_again(hand_queue, userpilot, work, answer):
    userpilot.faults.add({"path": "/v1/background_jobs/*", "status": 200, "body": answer, "times": 3})
    hand_queue.fill(200, kind="push")
    work().deliver()
    assert_all_accepted_once(hand_queue, userpilot, 200)


# Limits that differ from the settings.


@pytest.mark.parametrize(
    "limits",
    [
        {"identify_per_minute": LIVE // 2},
        {"others_per_minute": LIVE // 2},
        {"uploads_count": True},
        {"polls_count": True},
        {"rows_count": True},
    ],
    ids=str,
)
def test_no_storm_of_refusals(hand_queue, clock, userpilot, work, limits):
    userpilot.limit(**limits)
    hand_queue.fill(2_000, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 2_000}
    minutes = clock.seconds / 60
    assert userpilot.refusals(429) <= 6 * minutes + 5


def test_users_who_wait_for_another_attempt_are_not_gathered_over_and_over(
    hand_queue, clock, work, monkeypatch
):
    later = clock.now() + dt.timedelta(seconds=30)
    for number in range(400):
        hand_queue.add(f"u{number}", {"plan": "pro"}, attempt_count=1, next_attempt_at=later)
    hand_queue.fill(400, kind="push")
    begin, begun = store.create_job, []

    def count(*given):
        begun.append(clock.seconds)
        assert len(begun) <= clock.seconds + 10
        return begin(*given)

    monkeypatch.setattr(store, "create_job", count)
    work().deliver()
    assert hand_queue.counts() == {"accepted": 800}


class Slow(HeldSenders):
    """Replies come at once; once `stop` is set, at the fourth attempt to collect them."""

    def __init__(self, clock, stop):
        super().__init__(clock)
        self.stop, self.waits = stop, []

    def collect(self, seconds):
        if self.stop.is_set() and len(self.waits) < 3:
            self.waits.append(seconds)
            self.clock.sleep(seconds)
            return []
        replies = super().collect(seconds)
        self.clock.sleep(0.05)
        return replies


def test_a_process_that_ends_waits_for_its_last_answer_and_not_for_its_job(
    hand_queue, clock, userpilot, work
):
    hand_queue.fill(400)
    worker = work()
    slow = Slow(clock, worker.stop)
    worker.open_senders = lambda: slow

    def stop(_):
        if userpilot.uploads() and worker._bulk.under_way and worker._in_flight:
            worker.stop.set()

    worker.on_progress = stop
    worker.deliver()
    assert max(slow.waits) > 1


def test_users_come_after_their_company_in_a_job_too(hand_queue, clock, work):
    hand_queue.add(
        "acme", {"seats": 5}, action="company", next_attempt_at=clock.now() + dt.timedelta(seconds=45)
    )
    for number in range(300):
        hand_queue.add(f"u{number}", {"@company": "acme"} if number % 10 == 0 else {"vip": True})

    work().deliver()

    assert hand_queue.counts() == {"accepted": 301}
    requests = {row.request_id: row for row in hand_queue.requests()}
    rows = hand_queue.rows()
    (company,) = (row for row in rows if row.action == "company")
    accepted_at = requests[company.request_id].ended_at
    assert all(requests[row.request_id].started_at >= accepted_at for row in rows if "@company" in row.body)
