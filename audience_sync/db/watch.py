"""Bound the time that a connection to PostgreSQL may take, also when the server stops answering in the middle."""

import contextlib
import socket
import threading
from typing import Any, Self

CANCEL_SECONDS = 5.0
CLOSE_SECONDS = 2.0  # how long the server has to end a statement after it was asked to


class Watch:
    """Ends what runs on a connection if the block is not left within these seconds, or when `wake` is called.

    The server is asked first. If it does not end the statement, the connection is closed under it. The server's own
    time limits, keepalives and tcp_user_timeout do not help where a proxy acknowledges what nobody answers.
    `keeps_idle`: leave the connection open while no statement runs, because our own process may be slow between two.
    """

    def __init__(self, raw: Any, seconds: float, *, keeps_idle: bool = False) -> None:
        self._raw, self._seconds, self._keeps_idle = raw, seconds, keeps_idle
        self._is_over, self._is_woken = threading.Event(), threading.Event()
        # Its own descriptor, so that it cannot become another connection's.
        self._socket = socket.fromfd(raw.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._is_woken.set()

    def end(self) -> None:
        """End the watch. A request to cancel that is under way is waited for, as it would meet the next statement."""
        self._is_over.set()
        self._is_woken.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._socket, contextlib.suppress(OSError):
            self._is_woken.wait(self._seconds)
            while not self._is_over.is_set():
                is_running = cancel(self._raw)
                if not self._is_over.wait(CLOSE_SECONDS) and (is_running or not self._keeps_idle):
                    self._socket.shutdown(socket.SHUT_RDWR)
                    return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def cancel(raw: Any) -> bool:
    """Ask PostgreSQL to end the connection's running statement, ignoring a failure; return False if none is running."""
    if raw.info.transaction_status.name != "ACTIVE":
        return False
    with contextlib.suppress(Exception):
        raw.cancel_safe(timeout=CANCEL_SECONDS)
    return True
