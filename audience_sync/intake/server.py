"""The HTTP server of the tracking API: it limits connections and slow senders, and shuts down gracefully.

Next: intake/http.py, which answers the requests.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from audience_sync.errors import ConfigError
from audience_sync.stopping import Stop

MAX_CONNECTIONS = 500  # each may hold a batch in memory; further ones are answered 503
MAX_REFUSED = 100  # connections beyond those, answered 503 at a time; further ones are cut off
HEAD_SECONDS = 10.0  # for the head of a request
REQUEST_SECONDS = 40.0  # for the rest, even if the API does not read it; longer than the API's BODY_SECONDS
ANSWER_SECONDS = 30.0  # for the sender to read its answer
IDLE_SECONDS = 65  # longer than load balancers usually keep a connection
SHUTDOWN_SECONDS = 30


class TimedProtocol(H11Protocol):
    """Cuts off slow connections; uvicorn alone would wait for them forever."""

    _receive_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _timed_state: Any = None  # h11's state of the request part that is timed now

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS + MAX_REFUSED:
            transport.abort()
        self._set_receive_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_receive_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_receive_timer()

    def _set_receive_timer(self) -> None:
        """Start the timer when a part of a request begins; further bytes of the same part do not extend it."""
        state: Any = self.conn.their_state
        if state is h11.IDLE and self.timeout_keep_alive_task is not None:
            state = None  # uvicorn limits the time between two requests
        if state is self._timed_state:
            return
        self._timed_state = state
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: REQUEST_SECONDS}.get(state)
        if seconds is not None:
            self._receive_timer = self.loop.call_later(seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait until the sender has read everything

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receive_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class TrackingServer(uvicorn.Server):
    """Ends when `stop` is set, after the requests in flight are answered."""

    def __init__(self, application: Starlette, stop: Stop) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._stop = stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        return self._stop.is_set() or await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ConfigError if the address cannot be used."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = addresses[0]
        return socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        text = str(getattr(error, "strerror", None) or error)
        reason = text.partition(" (while ")[0]  # the rest repeats the address
        raise ConfigError(
            f"{host}, port {port}, cannot be used: {reason}. Choose others with --host and --port."
        ) from error
