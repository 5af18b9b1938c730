"""How fast a lane may go: its limit over any 60 seconds, and what it learned from refusals. Pure but for time."""

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW_SECONDS = 60.0
THROTTLED_SECONDS = (1.0, 2.0, 4.0, 8.0)  # Userpilot's advice where it sends no Retry-After
LONGEST_PAUSE_SECONDS = 900.0
FAILURES_BEFORE_PAUSE = 5
SLOWEST = 0.05  # of the limit


@dataclass(slots=True)
class Lane:
    """One lane's pace; all times are monotonic seconds.

    A request counts from its start until 60 s after its end: however late within that span the server saw it,
    no 60-second window of the server's holds more than the limit.
    """

    per_minute: int
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

    def room(self, now: float) -> int:
        """How many requests may start now."""
        while self.ended and self.ended[0] <= now - WINDOW_SECONDS:
            self.ended.popleft()
        if now < self.paused_until:
            return 0
        free = self.limit - self.in_flight - len(self.ended)
        if self.pause_level:  # after failures one request tries whether all is well again
            free = min(free, 1 - self.in_flight)
        return max(0, free)

    def push_room(self, now: float, most: int) -> int:
        """How many of them may be pushes, which are spread evenly."""
        earned = (now - self._credited_at) * self.limit / WINDOW_SECONDS
        self._credit = min(float(max(1, most)), self._credit + earned) if math.isfinite(earned) else 1.0
        self._credited_at = now
        return min(self.room(now), int(self._credit))

    def start(self, *, push: bool) -> None:
        self.in_flight += 1
        if push:
            self._credit -= 1

    def end(self, now: float) -> None:
        self.in_flight -= 1
        self.ended.append(now)

    def wait_seconds(self, now: float) -> float:
        """How long until there may be room; 0 where there is."""
        if now < self.paused_until:
            return self.paused_until - now
        if self.room(now) > 0:
            return max(0.0, (1.0 - self._credit) * WINDOW_SECONDS / self.limit)
        if self.ended and self.in_flight + len(self.ended) >= self.limit:
            return max(0.0, self.ended[0] + WINDOW_SECONDS - now)
        return 0.1  # a request in flight decides

    def succeeded(self) -> None:
        self.throttle_streak = self.failure_streak = self.pause_level = 0
        self.reason = self.reason if self.factor < 1.0 else ""
        self.factor = min(1.0, self.factor + 0.5 / self.per_minute)

    def throttled(self, now: float, retry_after_seconds: float | None) -> bool:
        """Slow down; False for the further refusals of one burst."""
        if now < self.paused_until:
            return False
        step = THROTTLED_SECONDS[min(self.throttle_streak, len(THROTTLED_SECONDS) - 1)]
        pause = step if retry_after_seconds is None else retry_after_seconds
        self.throttle_streak += 1
        self.factor = max(SLOWEST, self.factor / 2)
        self.paused_until = now + min(pause, LONGEST_PAUSE_SECONDS)
        self.reason = "Userpilot answered 429: too many requests"
        return True

    def failed(self, now: float, reason: str) -> bool:
        """Count a failure; True where the lane pauses because nothing gets through."""
        self.failure_streak += 1
        if self.failure_streak < FAILURES_BEFORE_PAUSE or now < self.paused_until:
            return False
        self.pause_level += 1
        self.paused_until = now + min(2.0 ** (self.pause_level - 1), LONGEST_PAUSE_SECONDS)
        self.reason = reason
        return True
