"""A local Userpilot look-alike: the documented endpoints, limits and jobs, and faults on demand.

It shares no code with the rest of this project, so that a misreading of the API cannot agree with itself.
"""

import threading
import time
from collections.abc import Callable
from typing import Self

from audience_sync.sandbox.faults import Faults
from audience_sync.sandbox.server import Server
from audience_sync.sandbox.state import JobFault, Limits, State

__all__ = ["JobFault", "Limits", "Sandbox", "State"]


class Sandbox:
    """A server on loopback. `stop` and `start` again is an outage: port, state, log and faults stay.

    `monotonic` and `wall` (unix seconds) may be set by hand; a fault's delay is always real time.
    """

    def __init__(
        self,
        port: int = 0,
        api_key: str = "sandbox",
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        host: str = "127.0.0.1",
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.state = State(api_key, limits, monotonic, wall)
        self.faults = Faults()
        self._host, self._port = host, port
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """With the trailing slash. Binds the port when it is not bound yet."""
        if self._port == 0:
            self._bind()
        return f"http://{self._host}:{self._port}/"

    def start(self) -> Self:
        if self._thread is None:
            serve = self._bind().serve_forever
            self._thread = threading.Thread(target=serve, args=(0.02,), name="sandbox", daemon=True)
            self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serves until it is interrupted, or stopped by another thread."""
        self.start()
        try:
            if self._thread is not None:
                self._thread.join()
        finally:
            self.stop()

    def stop(self) -> None:
        """Returns when the port is closed and every connection is cut; requests that wait are not applied."""
        (server, thread), self._server, self._thread = (self._server, self._thread), None, None
        if server is not None:
            if thread is not None:
                server.shutdown()
            server.close_all()
        if thread is not None:
            thread.join()

    def _bind(self) -> Server:
        if self._server is None:
            self._server = Server((self._host, self._port), self.state, self.faults)
            self._port = self._server.server_port
        return self._server

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
