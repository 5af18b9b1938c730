"""The HTTP server of the tracking API: it limits connections and slow senders, and shuts down gracefully.

Idle connections cost little, so the limit on open ones is high. Beyond it, the connection that has been idle longest is
closed. Next: intake/http.py, which answers the requests, and limits how many are in progress.
"""

import asyncio
import contextlib
import json
import logging
import resource
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from audience_sync.errors import ConfigError
from audience_sync.stopping import Stop

MAX_CONNECTIONS = 5_000  # fewer if the system allows fewer open files
OTHER_FILES = 100  # files that the process needs besides connections
BACKLOG = 500  # connections that wait to be accepted
HEAD_SECONDS = 10.0  # the time to send the head of a request
# The time to send the rest, even if the API does not read it; longer than BODY_SECONDS.
REQUEST_SECONDS = 40.0
ANSWER_SECONDS = 30.0  # the time to read the answer
IDLE_SECONDS = 65  # longer than load balancers usually keep a connection
SHUTDOWN_SECONDS = 30


class TimedProtocol(H11Protocol):
    """Closes slow connections, for which uvicorn alone would wait forever."""

    def __init__(
        self,
        *arguments: Any,
        max_connections: int,
        on_refused: Callable[[int, str, str], None],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._max_connections, self._on_refused = max_connections, on_refused
        self.logger = _ERRORS_ONLY  # anybody can cause its warnings
        # The idle connections of this server, longest idle first.
        self._idle: dict[TimedProtocol, None] = vars(self.server_state).setdefault("idle", {})

    _receive_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _timed_state: Any = None  # h11's state of the request part that is timed now

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_receive_timer()
        if len(self.connections) > self._max_connections:
            surplus = next(iter(self._idle))
            del self._idle[surplus]
            surplus.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_receive_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_receive_timer()

    def _set_receive_timer(self) -> None:
        """Start the timer when a part of a request begins; more bytes of the same part do not extend it."""
        state: Any = self.conn.their_state
        if state is h11.IDLE:
            self._idle.setdefault(self)
        else:
            self._idle.pop(self, None)
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

    def send_400_response(self, msg: str) -> None:
        self._on_refused(400, "other", msg)
        body = json.dumps({"success": False, "error": msg}).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        for timer in (self._receive_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


_ERRORS_ONLY = logging.getLogger(f"{__name__}.errors")
_ERRORS_ONLY.setLevel(logging.ERROR)


class TrackingServer(uvicorn.Server):
    """A uvicorn server that ends when `stop` is set, after the requests in flight are answered."""

    def __init__(self, application: Starlette, stop: Stop) -> None:
        protocol: Any = partial(
            TimedProtocol,
            max_connections=_max_connections(),
            on_refused=application.state.refusals.request_refused,
        )
        super().__init__(
            uvicorn.Config(
                application,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # uvicorn would trust them from any proxy on this machine
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


def _max_connections() -> int:
    """Raise the process's limit of open files as far as allowed; return how many connections may be open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(1, min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES))


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ConfigError if the address cannot be used."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = addresses[0]
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Connections inherit TCP_NODELAY. asyncio sets it only if the socket names its protocol. Without it, the body of
        # an answer is delayed by 40 ms, until the client acknowledges the head.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, OverflowError) as error:
        text = str(getattr(error, "strerror", None) or error)
        reason = text.partition(" (while ")[0]  # the rest repeats the address
        raise ConfigError(
            f"{host}, port {port}, cannot be used: {reason}. Choose others with --host and --port."
        ) from error
    return listening
