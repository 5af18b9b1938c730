"""The clock, which is passed as an argument so that tests can set the time."""

import time
from datetime import UTC, datetime
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


def isoformat(moment: datetime) -> str:
    """Format a time as we always print it: 2011-06-01T00:00:00Z."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
