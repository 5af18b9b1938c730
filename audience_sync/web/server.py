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
HEAD_SECONDS = 10.0  # for a request's head to come
IDLE_SECONDS = 65  # longer than the usual load balancer's
ENDING_SECONDS = 30


class Protocol(H11Protocol):
    """Cuts a connection off on which a request's head takes too long: uvicorn would wait for ever."""

    _cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._cut = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_waiting = self.conn.their_state is h11.IDLE
        if not is_waiting and self._cut is not None:
            self._cut.cancel()
            self._cut = None
        elif is_waiting and self._cut is None and self.conn.trailing_data[0]:
            self._cut = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._cut is not None:
            self._cut.cancel()
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
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{host}, port {port}, cannot be used: {reason}. Choose others with --host and --port."
        ) from error
