"""Deadlines for whole requests: an HTTP library's timeouts are for each read, and an answer that drips would
never end. The socket is learned from the library's trace events and shut down from another thread.
"""

import contextlib
import ipaddress
import math
import socket
import threading
import time
from typing import Any


class Wire:
    """The connection of one request at a time, which another thread can cut.

    What is cut is a duplicate of the socket's descriptor: shutting down an SSLSocket from another thread
    would turn it into a plain one under its user, and the original may be closed, its number given anew.
    `only_public`: a name that leads to an address of some private network is not spoken to.
    """

    def __init__(self, *, only_public: bool = False) -> None:
        self._only_public = only_public
        self.sent = False  # whether any of the request may have left
        self.cut = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._twin: socket.socket | None = None

    def begin(self) -> None:
        self.sent = self.cut = False

    def trace(self, event: str, info: dict[str, Any]) -> None:
        match event:
            case "connection.connect_tcp.complete":
                connected = info["return_value"].get_extra_info("socket")
                if self._only_public:
                    _check_is_public(connected)
                self._adopt(connected)
            case "connection.start_tls.complete":
                self._socket = info["return_value"].get_extra_info("socket")
            case "http11.send_request_headers.started" if not self.cut:
                self.sent = True

    def _adopt(self, connected: socket.socket) -> None:
        with self._lock:
            self._drop_twin()
            self._socket = connected
            self._twin = connected.dup()
            if self.cut:
                self._shut_down()

    def cut_off(self) -> None:
        with self._lock:
            self.cut = True
            self._shut_down()

    def end(self) -> None:
        """Let go of the connection if the library closed it; TLS takes the first socket's descriptor away."""
        with self._lock:
            if self._socket is not None and self._socket.fileno() == -1:
                self._drop_twin()

    def close(self) -> None:
        with self._lock:
            self._drop_twin()

    def _shut_down(self) -> None:
        if self._twin is not None:
            with contextlib.suppress(OSError):  # the other side was faster
                self._twin.shutdown(socket.SHUT_RDWR)

    def _drop_twin(self) -> None:
        if self._twin is not None:
            self._twin.close()
        self._twin = self._socket = None


def _check_is_public(connected: socket.socket) -> None:
    address = ipaddress.ip_address(connected.getpeername()[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if not address.is_global:
        connected.close()
        raise OSError(f"its name leads to {address}, an address of a private network")


class Watchdog:
    """One thread that cuts off the requests whose deadline has passed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadlines: dict[Wire, float] = {}
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf
        self._stopped = False

    def arm(self, wire: Wire, deadline: float) -> None:
        """Wakes the thread only for a deadline before its next look, which most requests never have."""
        wire.begin()
        with self._changed:
            self._deadlines[wire] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="userpilot-deadlines", daemon=True)
                self._thread.start()
            elif deadline < self._wakes_at:
                self._changed.notify()

    def disarm(self, wire: Wire) -> None:
        """After this, the wire is not cut any more."""
        with self._changed:
            self._deadlines.pop(wire, None)
            if self._stopped:
                self._changed.notify()
        wire.end()

    def stop(self) -> None:
        """End the thread, once no request is under way."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for wire in [wire for wire, deadline in self._deadlines.items() if deadline <= now]:
                    del self._deadlines[wire]
                    wire.cut_off()
                if self._stopped and not self._deadlines:
                    self._thread = None
                    return
                self._wakes_at = min(self._deadlines.values(), default=math.inf)
                self._changed.wait(self._wakes_at - now if self._deadlines else None)
