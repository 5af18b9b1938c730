"""The clock, which is passed as an argument so that tests can set the time."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """The wall-clock time, aware, in UTC."""

    def monotonic(self) -> float:
        """The seconds of a clock that never goes back."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class DatabaseClock:
    """The database's clock, by which requests are recorded, because another machine's clock may be wrong.

    It showed `moment` when our own one showed `monotonic`.
    """

    clock: Clock
    moment: datetime
    monotonic: float

    def now(self) -> datetime:
        return self.moment + timedelta(seconds=self.clock.monotonic() - self.monotonic)

    def monotonic_of(self, moment: datetime) -> float:
        """Return a past moment by our own monotonic clock, which runs on while this process takes over."""
        seconds = (moment - self.moment).total_seconds()
        return min(self.monotonic + seconds, self.clock.monotonic())


def isoformat(moment: datetime) -> str:
    """Format a time as we always print it: 2011-06-01T00:00:00Z."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def duration(seconds: float) -> str:
    """Return a duration as text, rounded to its largest unit."""
    if seconds < 1:
        return "less than a second"
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{round(seconds / size)} {unit}s"
    return f"{round(seconds)} second{'' if round(seconds) == 1 else 's'}"
