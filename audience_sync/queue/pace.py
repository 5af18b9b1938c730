"""The pace of each lane: its limit in any 60 seconds, and how it slows down after refusals.

All times are arguments in monotonic seconds. Only slow-downs, which are stored in the database, use the wall clock (`now`).
"""

import datetime as dt
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

WINDOW_SECONDS = 60.0
THROTTLED_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # without Retry-After; Userpilot advises up to 8 s
LONGEST_PAUSE_SECONDS = 900.0
SHORTEST_PAUSE_SECONDS = 1.0  # of the bulk lane, whose uploads no limit slows down
FAILURES_BEFORE_PAUSE = 5
REFUSALS_BEFORE_PAUSE = 5
# After a pause more refusals are allowed, so that valid deliveries behind many invalid ones are reached.
REFUSALS_BETWEEN_PAUSES = 20
LONGEST_REFUSAL_PAUSE_SECONDS = 120.0
LONGEST_FOREIGN_JOB_SECONDS = 1800.0
MIN_SPEED_FACTOR = 0.05  # a share of the limit
MIN_JOB_SPEED_FACTOR = 0.25  # a share of the configured speed of jobs
PUSH_SECONDS = 1.0  # pushes may catch up on this much unused time
SLOW_DOWN_LASTS = dt.timedelta(hours=1)
CLOCKS_DIFFER = dt.timedelta(minutes=1)  # a pause that ends even later was stored by a clock that was ahead
SLOW_ANSWER_SECONDS = 2.0  # answers that take this long, with their settlement, do not slow a lane down
FEWEST_IN_FLIGHT = 8
PUSHES_AT_ONCE = 6
_ROUNDING = 1e-6


def requests_in_flight(per_second: float) -> int:
    """Return how many requests a lane with this limit needs in flight."""
    return max(FEWEST_IN_FLIGHT, math.ceil(per_second * SLOW_ANSWER_SECONDS))


@dataclass(slots=True)
class Lane:
    """The pace of a live lane.

    A request counts from its start until one window after its end. The server receives it between its start and end, so
    no window on the server contains more requests than the limit.
    """

    per_minute: int
    window_seconds: float = WINDOW_SECONDS  # tests shorten it; the limit then applies to the shorter window
    max_in_flight: int = 1_000_000
    in_flight: int = 0
    ended: deque[float] = field(default_factory=deque)
    factor: float = 1.0
    paused_until: float = -math.inf
    reason: str = ""
    throttle_streak: int = 0
    failure_streak: int = 0
    pause_level: int = 0
    refusal_streak: int = 0
    _credit: float = 1.0
    _credited_at: float = -math.inf

    @property
    def limit(self) -> int:
        return max(1, int(self.per_minute * self.factor))

    @property
    def per_second(self) -> float:
        return self.limit / self.window_seconds

    @property
    def is_refusing(self) -> bool:
        """Return whether too many requests in a row were refused for the deliveries to be the cause."""
        return self.refusal_streak >= REFUSALS_BEFORE_PAUSE

    @property
    def _is_trying(self) -> bool:
        """Return whether the lane sends one request at a time until one succeeds."""
        return bool(self.pause_level or self.throttle_streak or self.is_refusing)

    @property
    def trial(self) -> dict[str, int]:
        """The state to store for the next process, in case this one ends before a request succeeds."""
        if self.is_refusing:
            return {"refusal_streak": self.refusal_streak}
        return {"pause_level": self.pause_level} if self.pause_level else {}

    def room(self, now: float, *, push: bool = False) -> int:
        """Return how many requests the window allows now; pushes are spread evenly."""
        while self.ended and self.ended[0] + self.window_seconds + _ROUNDING <= now:
            self.ended.popleft()
        if now < self.paused_until:
            return 0
        free = self.limit - self.in_flight - len(self.ended)
        if self._is_trying:
            free = min(free, 1 - self.in_flight)
        if push:
            self._earn(now)
            free = min(free, int(self._credit + _ROUNDING))
        return max(0, free)

    def startable(self, now: float, *, push: bool = False) -> int:
        """Return how many requests may start now, in addition to those in flight.

        For pushes the number is small, so that a call that arrives a moment later does not wait for a second of pushes.
        """
        most = self.max_in_flight - self.in_flight
        if push:
            most = min(most, max(PUSHES_AT_ONCE, math.ceil(self.per_second / 10)))
        return max(0, min(self.room(now, push=push), most))

    def wait_seconds(self, now: float, *, push: bool = False) -> float:
        """Return the seconds until a request may start; infinite if that depends on a request in flight."""
        if self.startable(now, push=push):
            return 0.0
        wait = max(0.0, self.paused_until - now)
        excess = self.in_flight + len(self.ended) - self.limit
        is_trying = self._is_trying and self.in_flight
        if excess >= len(self.ended) or is_trying or self.in_flight >= self.max_in_flight:
            return math.inf
        if excess >= 0:
            wait = max(wait, self.ended[excess] + self.window_seconds + 2 * _ROUNDING - now)
        if push:
            wait = max(wait, (1.0 - self._credit) / self.per_second)
        return wait

    def start(self, *, push: bool) -> None:
        self.in_flight += 1
        if push:
            self._credit -= 1

    def withdraw(self) -> None:
        """Take back the start of a request that was not sent."""
        self.in_flight -= 1

    def end(self, now: float) -> None:
        self.in_flight -= 1
        self.ended.append(now)

    def succeeded(self) -> bool:
        """Return to the normal pace, step by step after a 429; return True if the lane was slowed down."""
        was_trying = self._is_trying
        self.refusal_streak = 0
        self._answered()
        return was_trying

    def refused(self, now: float, reason: str) -> bool:
        """Count a refusal; return True if the lane pauses because too many requests in a row were refused."""
        self.refusal_streak += 1
        if not self.is_refusing:
            self._answered()
            return False
        self.throttle_streak = self.failure_streak = self.pause_level = 0
        count, surplus = divmod(self.refusal_streak - REFUSALS_BEFORE_PAUSE, REFUSALS_BETWEEN_PAUSES)
        if surplus or now < self.paused_until:
            return False
        self.paused_until = now + min(2.0 ** min(count, 10), LONGEST_REFUSAL_PAUSE_SECONDS)
        self.reason = f"the last {self.refusal_streak} requests were refused: {reason}"
        return True

    def _answered(self) -> None:
        self.throttle_streak = self.failure_streak = self.pause_level = 0
        self.factor = min(1.0, self.factor + 0.5 / self.per_minute)
        if self.factor == 1.0:
            self.reason = ""

    def throttled(self, now: float, retry_after_seconds: float | None) -> bool:
        """Slow down after a 429; do nothing and return False for further ones of the same burst."""
        if now < self.paused_until:
            return False
        step = THROTTLED_SECONDS[min(self.throttle_streak, len(THROTTLED_SECONDS) - 1)]
        pause = retry_after_seconds or step  # 0, or a date in the past by our clock, shortens no pause
        self.throttle_streak += 1
        self.factor = max(MIN_SPEED_FACTOR, self.factor / 2)
        self.paused_until = now + min(pause, LONGEST_PAUSE_SECONDS)
        self.reason = "Userpilot answered 429: too many requests"
        return True

    def wait(self, until: float, reason: str) -> bool:
        """Start nothing before this moment; return False if the lane already pauses until then."""
        if until <= self.paused_until:
            return False
        self.paused_until, self.reason = until, reason
        return True

    def failed(self, now: float, reason: str, retry_after_seconds: float | None = None) -> bool:
        """Count a failure; return True if the lane pauses, because of Retry-After or too many failures in a row."""
        self.failure_streak += 1
        if retry_after_seconds:
            self.pause_level = max(1, self.pause_level)
            return self.wait(now + retry_after_seconds, reason)
        if self.failure_streak < FAILURES_BEFORE_PAUSE or now < self.paused_until:
            return False
        self.pause_level = min(self.pause_level + 1, 11)
        self.paused_until = now + min(2.0 ** (self.pause_level - 1), LONGEST_PAUSE_SECONDS)
        self.reason = reason
        return True

    def _earn(self, now: float) -> None:
        most = max(1.0, self.per_second * PUSH_SECONDS)
        earned = (now - self._credited_at) * self.per_second if math.isfinite(self._credited_at) else 0.0
        self._credit = min(most, self._credit + earned)
        self._credited_at = now


@dataclass(slots=True)
class BulkPace:
    """The pace of the bulk lane: how large the next job may be, when it may start, and the speed of jobs."""

    rows_per_minute: int
    rows_per_job: int  # 0: no new jobs
    factor: float = 1.0
    paused_until: float = -math.inf
    reason: str = ""
    is_foreign_job_running: bool = False
    foreign_job_since: float = -math.inf
    gather_at: float = -math.inf  # the earliest time to gather the next job
    rows_per_second: float = field(init=False)
    max_rows: int = field(init=False)  # of the next job; small while a refused row is being located
    _rows_cap: int = field(init=False)  # less than rows_per_job if jobs of that size were too large
    _pause_count: int = 0  # pauses since a job completed
    _refusal_count: int = 0  # refusals since an upload was accepted
    _consecutive_accepts: int = 0

    def __post_init__(self) -> None:
        self.rows_per_second = self.rows_per_minute / 60
        self.max_rows = self._rows_cap = self.rows_per_job

    def may_start(self, now: float) -> bool:
        return self.rows_per_job > 0 and not self.is_paused(now)

    def is_paused(self, now: float) -> bool:
        return self.is_foreign_job_running or self.paused_until > now

    def pause(self, now: float, reason: str, seconds: float | None = None) -> float:
        """Pause for `seconds`, or for twice as long as the last time if that is None or 0; return the seconds."""
        self._pause_count += 1
        longer = min(2.0 ** min(self._pause_count, 10), LONGEST_PAUSE_SECONDS)
        seconds = max(SHORTEST_PAUSE_SECONDS, seconds) if seconds else longer
        self.paused_until, self.reason = now + seconds, reason
        return seconds

    def wait_for_foreign_job(self, until: float, reason: str) -> None:
        """Start no job while another client's job is running; `until` is when to check again."""
        self.is_foreign_job_running, self.reason = True, reason
        self.paused_until = max(self.paused_until, until)

    def has_waited_for_long(self, now: float) -> bool:
        """Return whether another client's job has blocked this lane for so long that an upload should be tried."""
        return now - self.foreign_job_since >= LONGEST_FOREIGN_JOB_SECONDS

    def accepted(self) -> None:
        """Allow larger jobs again after two accepted uploads in a row: neither half contains the refused row."""
        self._refusal_count, self.reason = 0, ""
        self._consecutive_accepts += 1
        if self._consecutive_accepts >= 2:
            self.max_rows = min(self._rows_cap, 2 * self.max_rows)

    def refused(self, row_count: int, *, is_too_large: bool) -> bool:
        """Halve the next job, until the refused row is alone; return whether to pause."""
        self._refusal_count, self._consecutive_accepts = self._refusal_count + 1, 0
        self.gather_at = -math.inf
        self.max_rows = self._rows_cap if row_count == 1 else row_count // 2
        if is_too_large and row_count > 1:
            self._rows_cap = self.max_rows
        return self._refusal_count >= REFUSALS_BEFORE_PAUSE

    def completed(self) -> None:
        self._pause_count = 0

    def measured(self, rows_per_second: float) -> None:
        """Use a job's measured speed, but not less than a limit: its end may have been noticed very late."""
        self.rows_per_second = max(rows_per_second, self.rows_per_minute / 60 * MIN_JOB_SPEED_FACTOR)


def slow_down(
    lane: Lane | BulkPace, monotonic: float, now: dt.datetime, stored: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Describe a lane that is paused or slower than its limit, for `status` and for the next process.

    `stored`: the previous description of the lane, whose `since` is kept if it is recent enough.
    """
    trial = lane.trial if isinstance(lane, Lane) else {}
    if lane.factor == 1.0 and lane.paused_until <= monotonic and not trial:
        return None
    paused_until = now + dt.timedelta(seconds=max(-1.0, lane.paused_until - monotonic))
    since = stored.get("since") if stored and is_current(stored, now) else None
    return {
        "since": since or now.isoformat(),
        "factor": round(lane.factor, 3),
        "paused_until": paused_until.isoformat(),
        "reason": lane.reason,
        **trial,
    }


def restore(lane: Lane | BulkPace, stored: dict[str, Any], monotonic: float, now: dt.datetime) -> None:
    """Slow a lane down as an earlier process did, unless that was long ago or its clock was ahead."""
    if is_current(stored, now):
        lane.factor, lane.reason = stored["factor"], stored["reason"]
        paused_until = dt.datetime.fromisoformat(stored["paused_until"])
        lane.paused_until = monotonic + (paused_until - now).total_seconds()
        if isinstance(lane, Lane):
            lane.pause_level = stored.get("pause_level", 0)
            lane.refusal_streak = stored.get("refusal_streak", 0)


def is_current(stored: dict[str, Any], now: dt.datetime) -> bool:
    """Return whether a stored slow-down still applies: it is neither from long ago nor from a clock that was ahead."""
    latest = now + dt.timedelta(seconds=LONGEST_PAUSE_SECONDS) + CLOCKS_DIFFER
    return now - SLOW_DOWN_LASTS < dt.datetime.fromisoformat(stored["paused_until"]) <= latest
