"""Division of a backlog: both lanes end together, and small work stays with the live lane."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from audience_sync.queue.split import LAST_ROWS, Pace, forecast, job_rows, live_share

USERPILOT = Pace(live_limit=600, live_per_second=10.0, rows_per_second=30.0, rows_per_job=10_000)


@pytest.mark.parametrize(
    ("waiting", "burst", "rows"),
    [
        (0, 0, 0),
        (600, 600, 0),  # the live lane sends them in a burst
        (130, 0, 0),  # fewer than a hundred rows are not worth a job
        (600, 0, 450),
        (650, 600, 0),
        (1_000, 600, 400),
        (1_000, 0, 750),
        (4_000, 600, 3_000),
        (13_332, 0, 7_999),  # and 2,000 in the last one
        (5_333, 0, 3_999),
        (100_000, 600, 10_000),
    ],
)
def test_the_next_job(waiting, burst, rows):
    assert job_rows(waiting, burst, USERPILOT) == rows


def test_without_bulk_jobs_the_live_lane_sends_everything():
    assert job_rows(100_000, 0, Pace(600, 10.0, 30.0, 0)) == 0
    assert forecast(6_000, 0, Pace(600, 10.0)).seconds == 600


@given(
    waiting=st.integers(0, 50_000),
    burst=st.integers(0, 600),
    rows_per_second=st.floats(1, 100),
    rows_per_job=st.integers(1, 10_000),
)
def test_both_lanes_end_together(waiting, burst, rows_per_second, rows_per_job):
    pace = Pace(600, 10.0, rows_per_second, rows_per_job)
    rows = job_rows(waiting, burst, pace)
    assert 0 <= rows <= min(waiting, rows_per_job)
    if rows and rows < rows_per_job:
        shortened = rows + LAST_ROWS if rows > LAST_ROWS else rows  # the rest is for the last job
        assert any(ends_with_the_live_lane(waiting, job, burst, pace) for job in {rows, shortened})
        assert waiting - rows >= burst
        assert waiting - rows + 1 >= rows / rows_per_second * pace.live_per_second


def ends_with_the_live_lane(waiting, rows, burst, pace):
    """Check that nothing is left when the job ends, and that the live lane was not idle before."""
    rest = waiting - rows
    a_row_more = 2 + pace.live_per_second / pace.rows_per_second  # a job has whole rows
    is_busy = rest >= burst and rest + 1 >= rows / pace.rows_per_second * pace.live_per_second
    return is_busy and rest - live_share(rows, burst, pace) <= a_row_more


def test_a_forecast_uses_both_lanes():
    plan = forecast(100_000, 0, USERPILOT)
    assert plan.row_count == pytest.approx(75_000, rel=0.01)
    assert plan.row_count + plan.request_count - plan.job_count == 100_000
    assert plan.seconds == pytest.approx(100_000 / 40, rel=0.01)
    assert forecast(100_000, 0, Pace(600, 10.0)).seconds == 10_000


def test_a_forecast_of_changes_counts_the_burst():
    assert forecast(0, 600, USERPILOT).seconds < 10
    assert forecast(0, 1_000, USERPILOT).seconds == pytest.approx(400 / 30)
    assert forecast(0, 601, Pace(600, 10.0)).seconds < 10


@given(waiting=st.integers(1_000, 50_000), start_seconds=st.floats(0, 100))
def test_a_job_that_starts_later_leaves_more_to_the_live_lane(waiting, start_seconds):
    rows = job_rows(waiting, 0, USERPILOT, start_seconds)
    live = live_share(rows, 0, USERPILOT, start_seconds)
    left = waiting - rows - live
    if not rows:
        assert left <= 0 or waiting - start_seconds * USERPILOT.live_per_second < 150
    elif rows < USERPILOT.rows_per_job:
        assert any(left == pytest.approx(last, abs=4) for last in (0, LAST_ROWS * 4 / 3))
    else:
        assert left >= -4
