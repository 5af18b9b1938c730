"""HTTP over the state: connections, faults, and the control endpoints under /_sandbox/.

| control | does |
| --- | --- |
| GET state | users, companies, events, jobs, deletions, as of now |
| GET requests?after=N | the log: every request but the control ones, in the order of arrival |
| GET counts | how many requests of the log got which status: {"<method> <path>": {"<status>": n}} |
| GET history?user_id=U | what was written for each user: [property, value, request number], in order |
| GET, POST, DELETE faults | list, add one (the members are faults.Fault's), clear |
| POST, DELETE job_faults | adds one (the members are state.JobFault's), for a job to come; clears |
| POST other_job | {"rows": n}: a job of somebody else starts |
| POST forget_jobs | no job is known by its id any more |
| POST deletions | carries out what is asked for, without waiting for the hour |
| POST limits | changes some of them |
| POST key | {"api_key": ...}: the old one is revoked |
| POST reset | forgets state, log and windows; faults, limits and key stay |
"""

import contextlib
import json
import socket
import socketserver
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

import msgspec

from audience_sync.sandbox import api
from audience_sync.sandbox.faults import Fault, Faults
from audience_sync.sandbox.state import JobFault, Limits, RefusalError, State

GARBAGE = b"\x16\x03\x01\x00\x00 this is not HTTP\r\n\r\n"
FRAMING_BYTES = 65_536  # of a multipart upload, around its file


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], state: State, faults: Faults) -> None:
        self.state, self.faults = state, faults
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks DNS for the host's name
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def close_all(self) -> None:
        """Kept-alive connections too: a server that stopped must not answer on them."""
        self.stopping.set()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients are expected to go away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)
        if self.server.stopping.is_set():  # accepted while the others were being cut
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        """Quiet: the request log is at /_sandbox/requests."""

    def do_POST(self) -> None:
        # The raw target: http.server turns //v1/identify into /v1/identify, Userpilot does not.
        path, _, query = self.requestline.split()[1].partition("?")
        body = self._read()
        if body is None:
            self.close_connection = True
            self._send(411, api.errors(411, "a Content-Length is needed"))
        elif path.startswith("/_sandbox/"):
            self._control(path.removeprefix("/_sandbox/"), query, body)
        else:
            self._serve(path, body)

    do_GET = do_DELETE = do_PUT = do_PATCH = do_POST  # noqa: N815

    def _read(self) -> api.Body | None:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            return None
        size = int(length)
        if size > self.server.state.limits.bulk_bytes_per_request + FRAMING_BYTES:
            for start in range(0, size, 1 << 20):  # read, so that the client gets to see the answer
                self.rfile.read(min(1 << 20, size - start))
            return api.Body(None, "the body is too large", size=size)
        return api.read_body(self.headers.get("Content-Type", ""), self.rfile.read(size))

    def _serve(self, path: str, body: api.Body) -> None:
        state = self.server.state
        with state.lock:
            entry = state.receive(self.command, path, body.value)
        fault = self.server.faults.take(path, entry.user_id) or Fault("")
        entry.fault = fault.name or None
        if self._stopped_within(fault.delay_seconds):
            return
        status, answer = 0, None
        if fault.applies:
            with state.lock:
                state.advance()
                status, answer = api.answer(state, entry, self.headers, body)
                entry.applied = self.command != "GET" and status < 300
        if fault.status is not None:
            status, answer = fault.status, fault.body
            if answer is None and status >= 400:
                answer = api.errors(status, "a fault was asked for")
        if fault.drop is None and not fault.garbage:
            with state.lock:
                state.answered(entry, status)
        if self._stopped_within(fault.delay_after_seconds):
            return
        if fault.drop is not None or fault.garbage:
            self.close_connection = True
            self.wfile.write(GARBAGE if fault.garbage else b"")
            return
        self._send(status, answer, {"x-request-id": entry.x_request_id} | fault.headers)

    def _stopped_within(self, seconds: float) -> bool:
        if seconds and self.server.stopping.wait(seconds):
            self.close_connection = True
            return True
        return False

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        lines = [f"HTTP/1.1 {status} {api.REASONS.get(status, 'Fault')}", f"content-length: {len(content)}"]
        if content:
            lines.append("content-type: application/json")
        headers = {"x-request-id": uuid.uuid4().hex} if headers is None else headers
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self.close_connection:
            lines.append("connection: close")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + content)

    def _control(self, name: str, query: str, body: api.Body) -> None:
        try:
            with self.server.state.lock:
                self.server.state.advance()
                content = self._controlled(f"{self.command} {name}", parse_qs(query), body.value)
                content = json.dumps(content, default=msgspec.structs.asdict)
            self._send(200, content)
        except RefusalError as error:
            self._send(error.status, api.errors(error.status, str(error)))
        except ValueError as error:
            self._send(400, api.errors(400, str(error)))
        except LookupError as error:
            self._send(404, api.errors(404, str(error)))

    def _controlled(self, call: str, query: dict[str, list[str]], body: Any) -> Any:  # noqa: C901, PLR0912 (a table)
        state, faults = self.server.state, self.server.faults
        match call:
            case "GET state":
                return state.snapshot()
            case "GET requests":
                return state.requests[int(query.get("after", ["0"])[0]) :]
            case "GET counts":
                return state.counts()
            case "GET history":
                return state.history.get(query["user_id"][0], []) if "user_id" in query else state.history
            case "GET faults":
                return faults.list()
            case "POST faults":
                return faults.add(msgspec.convert(body, dict[str, Any]))
            case "DELETE faults":
                return faults.clear()
            case "POST job_faults":
                state.job_faults.append(msgspec.convert(body, JobFault))
                return state.job_faults[-1]
            case "DELETE job_faults":
                return state.job_faults.clear()
            case "POST other_job":
                return state.start_other_job(msgspec.convert(body, _Rows)["rows"]).fields()
            case "POST forget_jobs":
                return state.forget_jobs()
            case "POST reset":
                return state.reset()
            case "POST deletions":
                return state.advance(delete_now=True)
            case "POST limits":
                changes = msgspec.convert(body, dict[str, Any])
                state.limits = msgspec.convert(msgspec.structs.asdict(state.limits) | changes, Limits)
                return state.limits
            case "POST key":
                state.api_key = msgspec.convert(body, _Key)["api_key"]
                return None
        raise LookupError(f"no such control: {call}")


_Rows = Annotated[dict[Literal["rows"], Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
_Key = Annotated[dict[Literal["api_key"], str], msgspec.Meta(min_length=1)]
