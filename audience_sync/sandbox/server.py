"""The sandbox's HTTP server, with additional endpoints that show the state:

| endpoint | answers |
| --- | --- |
| GET /_sandbox/state | users, companies, events, jobs and deletions, as of now |
| GET /_sandbox/requests?after=N | the request log in the order of arrival, from request N + 1 |
| GET /_sandbox/history?user_id=U | the values written for each user, or for one: [property, value, request number] |
"""

import contextlib
import json
import socket
import socketserver
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import msgspec

from audience_sync.sandbox import api
from audience_sync.sandbox.state import Entry, RefusedError, State

FRAMING_BYTES = 65_536  # of a multipart upload, around its file


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], state: State, handler_type: "type[Handler]") -> None:
        self.state = state
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler_type)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name in DNS
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def close_all(self) -> None:
        """Close the port and all connections, so that a stopped server does not answer on a kept-alive one."""
        self.stopping.set()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may disconnect at any time
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)
        if self.server.stopping.is_set():  # this one was accepted while the others were being closed
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        """Print nothing: the request log is at /_sandbox/requests."""

    def do_POST(self) -> None:
        # The raw target: http.server turns //v1/identify into /v1/identify, Userpilot does not.
        path, _, query = self.requestline.split()[1].partition("?")
        body = self._read()
        if body is None:
            self.close_connection = True
            self.send(411, api.errors(411, "a Content-Length is needed"))
        elif path.startswith("/_sandbox/"):
            self._inspect(path.removeprefix("/_sandbox/"), query, body)
        else:
            self.serve(path, body)

    do_GET = do_DELETE = do_PUT = do_PATCH = do_POST  # noqa: N815

    def _read(self) -> api.Body | None:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            return None
        size = int(length)
        if size > self.server.state.limits.bulk_bytes_per_request + FRAMING_BYTES:
            for start in range(0, size, 1 << 20):  # an unread body might keep the answer from the client
                self.rfile.read(min(1 << 20, size - start))
            return api.Body(None, "the body is too large", size=size)
        return api.read_body(self.headers.get("Content-Type", ""), self.rfile.read(size))

    def serve(self, path: str, body: api.Body) -> None:
        """Log, apply and answer a request to one of Userpilot's endpoints."""
        entry = self.receive(path, body)
        entry.status, answer = self.apply(entry, body)
        self.send(entry.status, answer, {"x-request-id": entry.x_request_id})

    def receive(self, path: str, body: api.Body) -> Entry:
        with self.server.state.lock:
            return self.server.state.receive(self.command, path, body.value)

    def apply(self, entry: Entry, body: api.Body) -> tuple[int, Any]:
        state = self.server.state
        with state.lock:
            state.advance()
            status, answer = api.answer(state, entry, self.headers, body)
            entry.applied = self.command != "GET" and status < 300
        return status, answer

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send the body as JSON; bytes are sent unchanged, and None is an empty body."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} {api.REASONS.get(status, 'Unknown')}", f"content-length: {len(content)}"]
        if content:
            lines.append("content-type: application/json")
        headers = {"x-request-id": uuid.uuid4().hex} if headers is None else headers
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self.close_connection:
            lines.append("connection: close")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + content)

    def _inspect(self, name: str, query: str, body: api.Body) -> None:
        try:
            with self.server.state.lock:
                self.server.state.advance()
                content = self.inspect(f"{self.command} {name}", parse_qs(query), body.value)
                content = json.dumps(content, default=msgspec.structs.asdict).encode()
            self.send(200, content)
        except RefusedError as error:
            self.send(error.status, api.errors(error.status, str(error)))
        except ValueError as error:
            self.send(400, api.errors(400, str(error)))
        except LookupError as error:
            self.send(404, api.errors(404, str(error)))

    def inspect(self, call: str, query: dict[str, list[str]], body: Any) -> Any:  # noqa: ARG002 (for subclasses)
        """Answer a request below /_sandbox/. Raises LookupError if there is no such endpoint."""
        state = self.server.state
        match call:
            case "GET state":
                return state.snapshot()
            case "GET requests":
                return state.requests[int(query.get("after", ["0"])[0]) :]
            case "GET history":
                return state.history.get(query["user_id"][0], []) if "user_id" in query else state.history
        raise LookupError(f"no such endpoint: {call}")
