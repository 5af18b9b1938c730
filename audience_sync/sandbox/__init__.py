"""A local Userpilot look-alike: the documented endpoints, limits and jobs, and faults on demand.

It shares no code with the rest of this project, so that a misreading of the API cannot agree with itself.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from audience_sync.sandbox.faults import Faults
from audience_sync.sandbox.server import Server
from audience_sync.sandbox.state import Limits, State

__all__ = ["Limits", "Sandbox", "State"]


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
        self._serving = False

    @property
    def url(self) -> str:
        """With the trailing slash. Binds the port when it is not bound yet."""
        if self._port == 0:
            self._bind()
        return f"http://{self._host}:{self._port}/"

    def start(self) -> Self:
        if self._thread is None:
            self._bind()
            self._serving = True
            self._thread = threading.Thread(target=self.serve_forever, name="sandbox", daemon=True)
            self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serves on the calling thread until it is interrupted, or stopped by another."""
        server = self._bind()
        self._serving = True
        try:
            server.serve_forever(poll_interval=0.02)
        finally:
            self._serving = False
            server.close_all()
            self._server = None

    def stop(self) -> None:
        """Returns when the port is closed and every connection is cut; requests that wait are not applied."""
        server = self._server
        if server is None:
            return
        if self._serving:
            server.shutdown()
        server.close_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._server = None

    def _bind(self) -> Server:
        if self._server is None:
            self._server = Server((self._host, self._port), self.state, self.faults)
            self._port = self._server.server_port
        return self._server

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
