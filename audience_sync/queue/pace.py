"""How fast a lane may go: its limit over any 60 seconds, and what it learned from refusals. Pure but for time."""

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW_SECONDS = 60.0
THROTTLED_SECONDS = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    30.0,
)  # Userpilot's advice, where it sends no Retry-After, is up to 8
LONGEST_PAUSE_SECONDS = 900.0
FAILURES_BEFORE_PAUSE = 5
MIN_SPEED_FACTOR = 0.05  # of the limit
PUSH_SECONDS = 1.0  # what a lane that stood still may catch up on pushes
_ROUNDING = 1e-6


@dataclass(slots=True)
class Lane:
    """One lane's pace; all times are monotonic seconds.

    A request counts from its start until a window after its end: however late within that span the server saw
    it, no window of the server's holds more than the limit.
    """

    per_minute: int
    window_seconds: float = WINDOW_SECONDS  # tests shorten it; the limit is then for this window
    in_flight: int = 0
    ended: deque[float] = field(default_factory=deque)
    factor: float = 1.0
    paused_until: float = -math.inf
    reason: str = ""
    throttle_streak: int = 0
    failure_streak: int = 0
    pause_level: int = 0
    _credit: float = 1.0
    _credited_at: float = -math.inf

    @property
    def limit(self) -> int:
        return max(1, int(self.per_minute * self.factor))

    @property
    def per_second(self) -> float:
        return self.limit / self.window_seconds

    def room(self, now: float, *, push: bool = False) -> int:
        """How many requests may start now; pushes are spread evenly."""
        while self.ended and self.ended[0] + self.window_seconds + _ROUNDING <= now:
            self.ended.popleft()
        if now < self.paused_until:
            return 0
        free = self.limit - self.in_flight - len(self.ended)
        if self.pause_level or self.throttle_streak:  # one request tries whether all is well again
            free = min(free, 1 - self.in_flight)
        if push:
            self._earn(now)
            free = min(free, int(self._credit + _ROUNDING))
        return max(0, free)

    def wait_seconds(self, now: float, *, push: bool = False) -> float:
        """How long until there is room; infinite where that is for a request in flight to decide."""
        if self.room(now, push=push):
            return 0.0
        wait = max(0.0, self.paused_until - now)
        excess = self.in_flight + len(self.ended) - self.limit
        is_trying = bool((self.pause_level or self.throttle_streak) and self.in_flight)
        if excess >= len(self.ended) or is_trying:
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

    def end(self, now: float) -> None:
        self.in_flight -= 1
        self.ended.append(now)

    def succeeded(self) -> None:
        self.throttle_streak = self.failure_streak = self.pause_level = 0
        self.factor = min(1.0, self.factor + 0.5 / self.per_minute)
        if self.factor == 1.0:
            self.reason = ""

    def throttled(self, now: float, retry_after_seconds: float | None) -> bool:
        """Slow down; False for the further refusals of one burst."""
        if now < self.paused_until:
            return False
        step = THROTTLED_SECONDS[min(self.throttle_streak, len(THROTTLED_SECONDS) - 1)]
        pause = step if retry_after_seconds is None else retry_after_seconds
        self.throttle_streak += 1
        self.factor = max(MIN_SPEED_FACTOR, self.factor / 2)
        self.paused_until = now + min(pause, LONGEST_PAUSE_SECONDS)
        self.reason = "Userpilot answered 429: too many requests"
        return True

    def wait(self, until: float, reason: str) -> None:
        """Start nothing until then."""
        if until > self.paused_until:
            self.paused_until, self.reason = until, reason

    def failed(self, now: float, reason: str) -> bool:
        """Count a failure; True where the lane pauses because nothing gets through."""
        self.failure_streak += 1
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
