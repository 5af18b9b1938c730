"""The HTTP server around the tracking API: what it listens on, what it bears, and how it ends."""

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

MOST_CONNECTIONS = 500  # each may hold a batch in memory; more are answered 503
MOST_REFUSED = 100  # connections at a time that get that answer; what is beyond is cut off, or files ran out
HEAD_SECONDS = 10.0  # for a request's head to come
REQUEST_SECONDS = 40.0  # for the rest of it, also where nobody reads it: longer than the API waits for a body
ANSWER_SECONDS = 30.0  # for a sender to take what it was answered
IDLE_SECONDS = 65  # longer than the usual load balancer's
ENDING_SECONDS = 30


class Protocol(H11Protocol):
    """Cuts a connection off that is too slow, which uvicorn would wait for, for ever."""

    _cut: asyncio.TimerHandle | None = None
    _slow: asyncio.TimerHandle | None = None
    _awaited: Any = None  # the part of a request that is timed now

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS + MOST_REFUSED:
            transport.abort()
        self._time_what_comes()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_what_comes()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_what_comes()

    def _time_what_comes(self) -> None:
        """A part of a request has its time from where it begins, however often a little of it comes."""
        awaited: Any = self.conn.their_state
        if awaited is h11.IDLE and self.timeout_keep_alive_task is not None:
            awaited = None  # between two requests, and that is timed
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: REQUEST_SECONDS}.get(awaited)
        if seconds is not None:
            self._cut = self.loop.call_later(seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait until all that was written is taken

    def pause_writing(self) -> None:
        super().pause_writing()
        self._slow = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._slow is not None:
            self._slow.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._cut, self._slow):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Ends when it is asked by `stop`: what is being answered is answered first."""

    def __init__(self, application: Starlette, stop: Stop) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=ENDING_SECONDS,
            )
        )
        self._stop = stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        return self._stop.is_set() or await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be used.

    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]  # the address again
        raise ConfigError(
            f"{host}, port {port}, cannot be used: {reason}. Choose others with --host and --port."
        ) from error
