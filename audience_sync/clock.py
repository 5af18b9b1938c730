"""The clock, which is passed as an argument so that tests can set the time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

JUMP_SECONDS = 1.0  # if this machine's clock is corrected by more, the database's is read again


class Clock(Protocol):
    def now(self) -> datetime:
        """The wall-clock time, aware, in UTC."""

    def monotonic(self) -> float:
        """The seconds of a clock that never goes backwards."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(slots=True)
class DatabaseClock:
    """The database's clock, which all machines follow, because the clock of a machine may be wrong.

    It is `read` at first, and again after this machine's clock was set or suspended. If `read` returns None, it continues.
    """

    clock: Clock
    read: Callable[[], datetime | None]
    # The time that was read, our monotonic time at that moment, and the difference between our two clocks then.
    _reading: tuple[datetime, float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._reading = self._read(self.clock.now())

    def now(self) -> datetime:
        moment, monotonic, offset = self._reading
        if abs(self._offset() - offset) > JUMP_SECONDS:
            moment, monotonic, _ = self._reading = self._read(moment + self._since(monotonic))
        return moment + self._since(monotonic)

    def monotonic(self) -> float:
        return self.clock.monotonic()

    def sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    def monotonic_of(self, moment: datetime) -> float:
        """Return a past moment as a time of our monotonic clock."""
        read_at, monotonic, _ = self._reading
        return min(monotonic + (moment - read_at).total_seconds(), self.monotonic())

    def _read(self, otherwise: datetime) -> tuple[datetime, float, float]:
        return self.read() or otherwise, self.monotonic(), self._offset()

    def _since(self, monotonic: float) -> timedelta:
        return timedelta(seconds=self.monotonic() - monotonic)

    def _offset(self) -> float:
        return self.clock.now().timestamp() - self.monotonic()


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
