"""A local Userpilot with the documented endpoints, limits and bulk jobs.

It shares no code with the rest of the project, so that a misunderstanding of the API cannot affect both.
"""

import threading
import time
from collections.abc import Callable
from typing import ClassVar, Self

from audience_sync.sandbox.server import Handler, Server
from audience_sync.sandbox.state import Limits, State

__all__ = ["Limits", "Sandbox", "State"]


class Sandbox:
    """A server on loopback. `stop` and a later `start` simulate an outage, after which port, state and log are the same.

    `monotonic` and `wall` (Unix seconds) are its clocks. Subclasses may replace the state and the handler.
    """

    state_type: ClassVar[type[State]] = State
    handler_type: ClassVar[type[Handler]] = Handler

    def __init__(
        self,
        port: int = 0,
        api_key: str = "sandbox",
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.state = self.state_type(api_key, limits, monotonic, wall)
        self._port = port
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The URL, with a trailing slash; the port is bound if necessary."""
        if self._port == 0:
            self._bind()
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> Self:
        if self._thread is None:
            serve = self._bind().serve_forever
            self._thread = threading.Thread(target=serve, args=(0.02,), name="sandbox", daemon=True)
            self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serve until interrupted, or stopped by another thread."""
        self.start()
        try:
            if self._thread is not None:
                self._thread.join()
        finally:
            self.stop()

    def stop(self) -> None:
        """Close the port and every connection; waiting requests are not applied."""
        (server, thread), self._server, self._thread = (self._server, self._thread), None, None
        if server is not None:
            if thread is not None:
                server.shutdown()
            server.close_all()
        if thread is not None:
            thread.join()

    def _bind(self) -> Server:
        if self._server is None:
            self._server = Server(("127.0.0.1", self._port), self.state, self.handler_type)
            self._port = self._server.server_port
        return self._server

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
