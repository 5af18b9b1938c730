"""The transport of the HTTP client: one deadline for a whole request, and no connection to a private network.

The timeouts of HTTP libraries apply to each read and write, so an answer that is sent a byte at a time could take forever.
Here every connect, TLS handshake, read and write gets the time that is left until its request's deadline. httpcore passes
a request's timeouts to the connection's stream unchanged; we pass the request's Exchange instead.
"""

import ipaddress
import select
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore
import httpx

KEEPALIVE_SECONDS = 5.0  # the life of an idle connection; gateways may drop older ones silently


class Exchange:
    """A request and its answer, which must be complete `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.sent = False  # whether a part of the request may have been sent
        self._ends_at = time.monotonic() + seconds
        self._has_read_late = False

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._ends_at

    def seconds_left(self) -> float:
        """Return the seconds until the deadline. Raises TimeoutError if it has passed."""
        seconds = self._ends_at - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def seconds_to_read(self) -> float:
        """Return `seconds_left`, but 0 the first time after the deadline: an answer may have arrived during a long write."""
        if self.is_over and not self._has_read_late:
            self._has_read_late = True
            return 0.0
        return self.seconds_left()


class Transport(httpx.BaseTransport):
    """A pool of connections, one for each concurrent request; requests carry their Exchange as an extension.

    `connect_seconds` limits the attempt at each address of a host, and the TLS handshake. `only_public` refuses
    addresses of private networks. Raises OSError, ValueError (for a host name that IDNA cannot encode) and
    httpcore.ProtocolError.
    """

    def __init__(self, ssl_context: ssl.SSLContext, *, connect_seconds: float, only_public: bool) -> None:
        network = _Network(connect_seconds, only_public=only_public)
        self._pool = httpcore.ConnectionPool(
            ssl_context, max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS, network_backend=network
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        exchange = request.extensions["exchange"]
        response = self._pool.handle_request(
            httpcore.Request(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions={"timeout": {"connect": exchange, "read": exchange, "write": exchange}},
            )
        )
        return httpx.Response(response.status, headers=response.headers, stream=_Body(response.stream))

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class _Network(httpcore.NetworkBackend):
    def __init__(self, connect_seconds: float, *, only_public: bool) -> None:
        self._connect_seconds = connect_seconds
        self._only_public = only_public

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: Any = None,
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        seconds = min(self._connect_seconds, timeout.seconds_left())
        connected = socket.create_connection((host, port), seconds)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._only_public:
                _check_is_public(connected)
        except OSError:
            connected.close()
            raise
        return _Stream(connected, self._connect_seconds)


def _check_is_public(connected: socket.socket) -> None:
    address = ipaddress.ip_address(connected.getpeername()[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if not address.is_global:
        raise OSError(f"the host resolves to {address}, an address of a private network")


class _Stream(httpcore.NetworkStream):
    """A connection; each `timeout` is an Exchange."""

    def __init__(self, connected: socket.socket, connect_seconds: float) -> None:
        self._socket = connected
        self._connect_seconds = connect_seconds

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: Any = None
    ) -> httpcore.NetworkStream:
        try:
            self._socket.settimeout(min(self._connect_seconds, timeout.seconds_left()))
            encrypted = ssl_context.wrap_socket(self._socket, server_hostname=server_hostname)
        except BaseException:
            self._socket.close()
            raise
        return _Stream(encrypted, self._connect_seconds)

    def write(self, buffer: bytes, timeout: Any = None) -> None:
        rest = memoryview(buffer)
        try:
            while rest:
                self._socket.settimeout(timeout.seconds_left())
                timeout.sent = True
                rest = rest[self._socket.send(rest) :]
        except OSError as error:
            if not timeout.sent:
                raise
            # After a WriteError httpcore still reads, because a server may refuse an upload before it has read all of it.
            raise httpcore.WriteError(error) from error

    def read(self, max_bytes: int, timeout: Any = None) -> bytes:
        self._socket.settimeout(timeout.seconds_to_read())
        return self._socket.recv(max_bytes)

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """Return whether an idle connection is readable: the server closed it, or sent data without a request."""
        if info != "is_readable":
            return None
        descriptor = self._socket.fileno()
        if descriptor < 0:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
