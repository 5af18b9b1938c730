"""How a backlog of users is divided between the live lane and bulk jobs, and how long that takes. Pure."""

from dataclasses import dataclass

SMALLEST_JOB = 100  # rows: fewer are not worth the wait for a job's end
LAST_ROWS = 2_000  # of a backlog's last job: it corrects the division, and is soon written down
BURST_PER_SECOND = 80.0  # eight requests at a time, each answered within 0.1 s


@dataclass(frozen=True, slots=True)
class Pace:
    """What each lane takes: the live one so many users in any window, bulk jobs so many rows a second.

    `rows_per_job` 0: there are no bulk jobs.
    """

    live_limit: int
    live_per_second: float
    rows_per_second: float = 0.0
    rows_per_job: int = 0


def job_rows(waiting: int, at_once: int, pace: Pace, start_seconds: float = 0.0) -> int:
    """How many of the users that wait go into the next job, so that both lanes end together; 0: none is worth it.

    What the live lane takes at once never goes by bulk: `at_once` is how many it may burst now. `start_seconds`:
    until the job before has ended.
    """
    if waiting <= at_once or not pace.rows_per_job:
        return 0
    then = waiting - start_seconds * pace.live_per_second
    fair = then * pace.rows_per_second / (pace.rows_per_second + pace.live_per_second)
    rows = int(min(fair, waiting - at_once, pace.rows_per_job))
    if 2 * LAST_ROWS < rows < pace.rows_per_job:
        rows -= LAST_ROWS
    return rows if rows >= min(SMALLEST_JOB, pace.rows_per_job) else 0


def live_share(rows: int, at_once: int, pace: Pace, start_seconds: float = 0.0) -> int:
    """How many users the live lane takes until a job of so many rows, begun after so long, is worked off."""
    return max(at_once, int((start_seconds + rows / pace.rows_per_second) * pace.live_per_second))


@dataclass(frozen=True, slots=True)
class Forecast:
    """`request_count` holds the `job_count` uploads, which hold `row_count` users."""

    request_count: int
    row_count: int
    job_count: int
    seconds: float


def forecast(pushes: int, changes: int, pace: Pace) -> Forecast:
    """How so many users would be sent, by lanes that stood still: changes burst into the empty window."""
    waiting, at_once = pushes + changes, min(changes, pace.live_limit)
    requests = rows_sent = jobs = 0
    seconds = 0.0
    while rows := job_rows(waiting, at_once, pace):
        live = min(live_share(rows, at_once, pace), waiting - rows)
        requests, rows_sent, jobs = requests + live + 1, rows_sent + rows, jobs + 1
        seconds += rows / pace.rows_per_second
        waiting, at_once = waiting - rows - live, 0
    seconds += min(waiting, at_once) / BURST_PER_SECOND + max(0, waiting - at_once) / pace.live_per_second
    return Forecast(requests + waiting, rows_sent, jobs, seconds)
