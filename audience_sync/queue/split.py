"""Pure decisions: how to divide a backlog of users between the live lane and bulk jobs, and how long it takes."""

from dataclasses import dataclass

SMALLEST_JOB = 100  # rows; the live lane sends fewer in less time than it takes to notice the end of a job
LAST_ROWS = 2_000  # of a backlog's last job: it corrects the division, and is settled quickly
BURST_PER_SECOND = 80.0  # eight requests at a time, each answered within 0.1 s


@dataclass(frozen=True, slots=True)
class Pace:
    """Limits of both lanes: `live_limit` users in any window, and the rows that jobs take.

    `rows_per_job` 0: there are no bulk jobs.
    """

    live_limit: int
    live_per_second: float
    rows_per_second: float = 0.0
    rows_per_job: int = 0


def job_rows(waiting: int, burst: int, pace: Pace, start_seconds: float = 0.0) -> int:
    """Return how many of the waiting users go into the next job, so that both lanes end together; 0: no job.

    The live lane can send `burst` users at once; these never go into a job. The job starts in `start_seconds`.
    """
    if waiting <= burst or not pace.rows_per_job:
        return 0
    then = waiting - start_seconds * pace.live_per_second
    fair = then * pace.rows_per_second / (pace.rows_per_second + pace.live_per_second)
    rows = int(min(fair, waiting - burst, pace.rows_per_job))
    if 2 * LAST_ROWS < rows < pace.rows_per_job:
        rows -= LAST_ROWS
    return rows if rows >= min(SMALLEST_JOB, pace.rows_per_job) else 0


def live_share(rows: int, burst: int, pace: Pace, start_seconds: float = 0.0) -> int:
    """Return how many users the live lane sends until a job with this many rows has ended."""
    return max(burst, int((start_seconds + rows / pace.rows_per_second) * pace.live_per_second))


@dataclass(frozen=True, slots=True)
class Forecast:
    """An estimate. `request_count` includes `job_count` uploads, which carry `row_count` users."""

    request_count: int
    row_count: int
    job_count: int
    seconds: float


def forecast(pushes: int, changes: int, pace: Pace) -> Forecast:
    """Estimate how idle lanes would send this many users; changes use the empty window at once."""
    waiting, burst = pushes + changes, min(changes, pace.live_limit)
    requests = rows_sent = jobs = 0
    seconds = 0.0
    while rows := job_rows(waiting, burst, pace):
        live = min(live_share(rows, burst, pace), waiting - rows)
        requests, rows_sent, jobs = requests + live + 1, rows_sent + rows, jobs + 1
        seconds += rows / pace.rows_per_second
        waiting, burst = waiting - rows - live, 0
    seconds += min(waiting, burst) / BURST_PER_SECOND + max(0, waiting - burst) / pace.live_per_second
    return Forecast(requests + waiting, rows_sent, jobs, seconds)
