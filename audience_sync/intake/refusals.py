"""Refusals of the tracking API: the error for a request, the rate limit of calls, and the log of both."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from audience_sync import logs
from audience_sync.clock import Clock

log = logging.getLogger(__name__)

LOGGED_PER_SECOND = 10  # refusals


class RefusalError(Exception):
    """The request is refused as a whole."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def response(self) -> Response:
        content = {"success": False, "error": self.message}
        return JSONResponse(content, status_code=self.status, headers=self.headers)


@dataclass(slots=True)
class CallRate:
    """Limits calls per second. The calls of a second may arrive at once; a batch passes if its first call does."""

    per_second: int
    clock: Clock
    _free_at: float = 0.0

    def take(self, count: int) -> float:
        """Count the calls and return 0 if they may pass, else the seconds to wait before another attempt."""
        now = self.clock.monotonic()
        wait = max(self._free_at, now) - now - 1.0
        if wait > 0:
            return wait
        self._free_at = max(self._free_at, now) + count / self.per_second
        return 0.0


@dataclass(slots=True)
class RefusalLog:
    """Logs at most LOGGED_PER_SECOND refusals a second; `unlogged` in an event counts those skipped before it."""

    clock: Clock
    _since: float = float("-inf")
    _count: int = 0
    _unlogged: int = 0

    def request_refused(self, status: int, path: str, reason: str) -> None:
        if self._has_room():
            logs.event(
                log,
                logging.WARNING,
                "request refused",
                status=status,
                path=path,
                reason=reason,
                unlogged=self._take_unlogged(),
            )

    def calls_refused(self, count: int, first_reason: str) -> None:
        if self._has_room():
            logs.event(
                log,
                logging.WARNING,
                "calls refused",
                count=count,
                first_reason=first_reason,
                unlogged=self._take_unlogged(),
            )

    def _has_room(self) -> bool:
        now = self.clock.monotonic()
        if now - self._since >= 1.0:
            self._since, self._count = now, 0
        self._count += 1
        has_room = self._count <= LOGGED_PER_SECOND
        self._unlogged += not has_room
        return has_room

    def _take_unlogged(self) -> int:
        unlogged, self._unlogged = self._unlogged, 0
        return unlogged
