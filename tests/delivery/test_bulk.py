"""Both lanes on a backlog, in a clock's time: whatever becomes of a job, no user is forgotten."""

from collections import Counter

import pytest
import sqlalchemy as sa

from audience_sync.delivery import bulk
from audience_sync.delivery.worker import Worker
from audience_sync.sandbox.state import JobFault
from audience_sync.store import engines
from audience_sync.store.tables import bulk_jobs, deliveries
from audience_sync.userpilot import payloads
from tests.delivery.conftest import settings_of
from tests.delivery.userpilot import LocalUserpilot

LIVE, ROWS = 600, 1800  # a minute


@pytest.fixture
def userpilot(clock):
    return LocalUserpilot(clock)


@pytest.fixture
def work(hand_queue, clock, userpilot):
    """Makes workers of both lanes; `per_job` 0 is the live lane alone."""

    def make(*, per_job=10_000, live=LIVE, rows=ROWS, on_progress=lambda _: None, **changes):
        settings = settings_of(
            per_minute={"identify": live, "track": 600, "company": 600},
            poll_seconds=1.0,
            jobs=bulk.Settings(row=row, rows_per_minute=rows, rows_per_job=per_job),
            **changes,
        )
        return Worker(hand_queue.engine, userpilot, settings, clock, on_progress=on_progress)

    return make


def row(user_id, body):
    return payloads.bulk_row(
        payloads.build("identify", user_id, body, booleans="native", nested="flatten")[1]
    )


def jobs(engine):
    with engines.read(engine) as connection:
        return list(connection.execute(sa.select(bulk_jobs).order_by(bulk_jobs.c.request_id)))


def assert_all_told_once(queue, userpilot, count):
    assert queue.counts() == {"accepted": count}
    assert len(userpilot.told("vip")) == count
    assert sum(len(lines) for lines in userpilot.state.history.values()) == count


def test_a_push_goes_by_both_lanes_which_end_together(hand_queue, clock, userpilot, work):
    hand_queue.fill(4_000, kind="push")

    report = work().deliver()

    assert_all_told_once(hand_queue, userpilot, 4_000)
    ((status, rows),) = userpilot.uploads()
    assert (status, rows) == (202, pytest.approx(3_000, abs=10))
    assert clock.seconds == pytest.approx(100, rel=0.03)
    assert userpilot.refusals(429) == userpilot.refusals(409) == 0
    assert (report.accepted_count, report.pending_count) == (4_000, 0)
    assert report.request_count == 4_000 - rows + 1
    (job,) = jobs(hand_queue.engine)
    assert (job.status, job.row_count, job.completed_count) == ("completed", rows, rows)
    assert job.job_id
    assert job.settled_at >= job.ended_at >= job.submitted_at


def test_a_long_push_takes_the_combined_limit(hand_queue, clock, userpilot, work):
    hand_queue.fill(12_000, kind="push")
    work(per_job=2_000).deliver()
    assert_all_told_once(hand_queue, userpilot, 12_000)
    assert 12_000 / clock.seconds >= 0.97 * (LIVE + ROWS) / 60
    assert userpilot.refusals(429) == userpilot.refusals(409) == 0
    assert max(rows for _, rows in userpilot.uploads()) == 2_000


@pytest.mark.parametrize("kind", ["call", "change", "push"])
def test_small_work_never_goes_by_bulk(hand_queue, userpilot, work, kind):
    hand_queue.fill(600, kind=kind)
    work().deliver()
    assert userpilot.uploads() == []
    assert_all_told_once(hand_queue, userpilot, 600)


def test_changes_burst_and_the_rest_goes_by_bulk(hand_queue, clock, userpilot, work):
    hand_queue.fill(1_000)
    work().deliver()
    assert userpilot.uploads() == [(202, 400)]
    assert clock.seconds < 20


def test_bulk_is_switched_off(hand_queue, userpilot, work):
    hand_queue.fill(700, kind="push")
    work(per_job=0).deliver()
    assert userpilot.uploads() == []
    assert_all_told_once(hand_queue, userpilot, 700)


def test_a_users_values_are_one_row_and_the_overwritten_ones_are_cancelled(hand_queue, userpilot, work):
    hand_queue.fill(1_000, kind="push")
    hand_queue.fill(1_000, kind="push")
    hand_queue.add("u999", {"active": True}, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 1_001, "cancelled": 1_000}
    assert [rows for _, rows in userpilot.uploads()] == [750]
    last = hand_queue.rows(deliveries.c.subject_id == "u999")
    assert [(each.status, each.error) for each in last] == [
        ("cancelled", "overtaken by a newer value"), ("accepted", None), ("accepted", None),
    ]  # fmt: skip
    assert userpilot.state.users["u999"]["properties"] == {"vip": True, "active": True}


def test_a_newer_value_waits_for_the_job_and_then_follows(hand_queue, userpilot, work):
    hand_queue.fill(4_000, kind="push")
    added = []

    def change(_report):
        if userpilot.uploads() and not added:
            added.append(hand_queue.add("u3999", {"vip": False}, kind="change"))

    work(on_progress=change).deliver()

    assert [(name, value) for name, value, _ in userpilot.state.history["u3999"]] == [
        ("vip", True),
        ("vip", False),
    ]
    (first, second) = hand_queue.rows(deliveries.c.subject_id == "u3999")
    assert second.settled_at > first.settled_at
    assert hand_queue.counts() == {"accepted": 4_001}


def test_a_change_of_another_user_does_not_wait_for_the_job(hand_queue, clock, userpilot, work):
    hand_queue.fill(100_000 // 5, kind="push")
    added = []

    def change(_report):
        if clock.seconds > 60 and not added:
            added.append(hand_queue.add("someone", {"vip": True}, kind="change"))

    work(on_progress=change).deliver()

    (mine,) = hand_queue.rows(deliveries.c.subject_id == "someone")
    assert (mine.settled_at - mine.created_at).total_seconds() < 15
    assert hand_queue.row(mine.delivery_id).request_id not in {
        job.request_id for job in jobs(hand_queue.engine)
    }


def test_the_real_pace_of_jobs_is_learned(hand_queue, clock, userpilot, work):
    userpilot.state.limits = userpilot.state.limits.__class__(bulk_rows_per_minute=600)
    hand_queue.fill(12_000, kind="push")
    work(per_job=1_000).deliver()
    assert_all_told_once(hand_queue, userpilot, 12_000)
    assert 12_000 / clock.seconds >= 0.9 * (LIVE + 600) / 60


# What may become of a job.


def test_what_a_failed_job_held_is_told_by_the_live_lane(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="failed", after_rows=500))
    hand_queue.fill(2_000, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 2_000}
    assert len(userpilot.told("vip")) == 2_000
    assert jobs(hand_queue.engine)[0].status == "failed"


def test_a_job_that_completed_with_rows_missing_forgets_nobody(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="short", after_rows=700))
    hand_queue.fill(2_000, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 2_000}
    assert len(userpilot.told("vip")) == 2_000
    first = jobs(hand_queue.engine)[0]
    assert (first.status, first.error) == ("failed", "Userpilot's bulk job completed 700 of 1500 rows")


def test_a_job_that_never_ends_is_given_up(hand_queue, clock, userpilot, work):
    userpilot.state.job_faults.append(JobFault(outcome="hangs", after_rows=10, state="mystery"))
    hand_queue.fill(2_000, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 2_000}
    assert len(userpilot.told("vip")) == 2_000
    (job,) = jobs(hand_queue.engine)
    assert (job.status, job.state) == ("lost", "mystery")
    assert bulk.PATIENCE_SECONDS < clock.seconds < 2 * bulk.PATIENCE_SECONDS + 600


def test_an_unknown_state_counts_as_running(hand_queue, userpilot, work):
    userpilot.state.job_faults.append(JobFault(state="mystery"))
    hand_queue.fill(2_000, kind="push")
    work().deliver()
    assert_all_told_once(hand_queue, userpilot, 2_000)


def test_a_job_that_userpilot_does_not_know_any_more(hand_queue, userpilot, work):
    hand_queue.fill(2_000, kind="push")
    forgotten = []

    def forget(_report):
        if userpilot.uploads() and not forgotten:
            forgotten.append(userpilot.state.forget_jobs())

    work(on_progress=forget).deliver()
    assert hand_queue.counts() == {"accepted": 2_000}
    assert len(userpilot.told("vip")) == 2_000
    assert jobs(hand_queue.engine)[0].status == "lost"


def test_while_somebody_elses_job_runs_the_live_lane_works_on(hand_queue, clock, userpilot, work):
    userpilot.state.start_other_job(3_000)  # 100 s
    hand_queue.fill(6_000, kind="push")
    work().deliver()
    assert_all_told_once(hand_queue, userpilot, 6_000)
    assert userpilot.refusals(409) == 1
    assert len(userpilot.uploads()) >= 2
    assert clock.seconds < 6_000 / 40 + 100


@pytest.mark.parametrize("status", [429, 500, 503, 404])
def test_an_upload_that_is_put_off_gives_its_users_back(hand_queue, userpilot, work, status):
    fault = {"path": "/v1/users/bulk_identify", "status": status, "times": 2}
    userpilot.faults.add(fault)
    hand_queue.fill(4_000, kind="push")
    work().deliver()
    assert_all_told_once(hand_queue, userpilot, 4_000)
    assert Counter(found for found, _ in userpilot.uploads())[status] == 2
    assert all(row.attempt_count == 1 for row in hand_queue.rows())


def test_too_large_an_upload_is_halved(hand_queue, userpilot, work):
    userpilot.state.limits = userpilot.state.limits.__class__(bulk_rows_per_request=800)
    hand_queue.fill(6_000, kind="push")
    work().deliver()
    assert_all_told_once(hand_queue, userpilot, 6_000)
    statuses = Counter(found for found, _ in userpilot.uploads())
    assert statuses[413] <= 4


@pytest.mark.parametrize("place", [160, 500, 999])
def test_a_refused_row_is_found_by_halving(hand_queue, userpilot, work, place):
    """400 for every job that holds the user, and for the user alone: the rest is delivered."""
    refuse_rows_of(userpilot, f"u{place}")
    hand_queue.fill(1_000, kind="push")
    work(live=60, rows=6_000).deliver()
    assert hand_queue.counts() == {"accepted": 999, "dead": 1}
    assert len(userpilot.told("vip")) == 999
    assert sum(status == 400 for status, _ in userpilot.uploads()) <= 11


def refuse_rows_of(userpilot, user_id):
    upload, send = userpilot.upload, userpilot.send

    def picky_upload(path, filename, content):
        if f'"{user_id}"'.encode() in content:
            userpilot.faults.add({"path": f"/{path}", "status": 400, "times": 1})
        return upload(path, filename, content)

    def picky_send(path, payload):
        if payload["user_id"] == user_id:
            userpilot.faults.add({"path": f"/{path}", "user_id": user_id, "status": 400, "times": 1})
        return send(path, payload)

    userpilot.upload, userpilot.send = picky_upload, picky_send


@pytest.mark.parametrize("drop", ["before", "after"])
@pytest.mark.parametrize("is_bare", [False, True])
def test_an_upload_whose_answer_never_came(hand_queue, userpilot, work, drop, is_bare):
    userpilot.state.limits = userpilot.state.limits.__class__(bare_jobs=is_bare)
    userpilot.faults.add({"path": "/v1/users/bulk_identify", "drop": drop, "times": 1})
    hand_queue.fill(2_000, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 2_000}
    assert len(userpilot.told("vip")) == 2_000
    if drop == "after" and not is_bare:  # found by its file's name, and followed
        assert_all_told_once(hand_queue, userpilot, 2_000)
        assert jobs(hand_queue.engine)[0].status == "completed"


def test_a_process_that_comes_after_follows_the_job(hand_queue, clock, userpilot, work):
    hand_queue.fill(2_000, kind="push")
    first = work(on_progress=lambda _: first.stop.set() if userpilot.uploads() else None)
    first.deliver()
    assert hand_queue.counts()["sending"] == 1_500
    clock.sleep(30)
    work().deliver()
    assert_all_told_once(hand_queue, userpilot, 2_000)
    (job,) = jobs(hand_queue.engine)
    assert job.status == "completed"


def test_a_refused_key_leaves_the_job_to_who_comes_after(hand_queue, userpilot, work):
    userpilot.faults.add({"path": "/v1/background_jobs/*", "status": 401, "times": 1})
    hand_queue.fill(2_000, kind="push")
    report = work().deliver()
    assert report.stopped
    assert hand_queue.counts()["sending"] == 1_500
    work().deliver()
    assert_all_told_once(hand_queue, userpilot, 2_000)


def test_rows_that_are_not_fit_go_live(hand_queue, userpilot, work):
    hand_queue.fill(2_000, kind="push")
    hand_queue.add("u1999", {"story": "x" * 70_000}, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 2_001}
    assert len(userpilot.state.users["u1999"]["properties"]["story"]) == 70_000


# Limits that are other than the settings say.


@pytest.mark.parametrize(
    "limits",
    [
        {"identify_per_minute": 300},
        {"others_per_minute": 300},
        {"uploads_count": True},
        {"polls_count": True},
        {"rows_count": True},
    ],
    ids=str,
)
def test_no_storm_of_refusals(hand_queue, clock, userpilot, work, limits):
    userpilot.state.limits = userpilot.state.limits.__class__(**limits)
    hand_queue.fill(20_000, kind="push")
    work().deliver()
    assert hand_queue.counts() == {"accepted": 20_000}
    minutes = clock.seconds / 60
    assert userpilot.refusals(429) <= 6 * minutes + 5
