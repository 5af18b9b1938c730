"""The HTTP client, and the only place that knows which library carries it.

It promises an Answer for every request, within the deadline once connected, in bounded memory, and with the
API key in none of it. It never repeats a request: that is delivery's decision.
"""

import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, Self

import httpx

from audience_sync.errors import ConfigError
from audience_sync.userpilot.answers import MAX_ERROR_LENGTH, Answer, Outcome, judge, one_line

__all__ = ["Answer", "Client", "Outcome"]

API_VERSION = "2020-09-22"
MAX_BODY_BYTES = 64 * 1024


class Client:
    """Sends requests from any number of threads; each request has a connection to itself.

    `ca_file` names certificate authorities beside the system's. `deadline_seconds` bounds a request from its
    start to the last byte of its answer, however slowly that drips; `connect_seconds` is for each address of
    the host, and for the TLS handshake. ConfigError if the endpoint, the key or the file cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        api_key: str,
        *,
        ca_file: str = "",
        deadline_seconds: float = 30.0,
        connect_seconds: float = 10.0,
    ) -> None:
        self._base = _base(endpoint)
        self._api_key = _checked_key(api_key)
        self._ssl_context = _ssl_context(ca_file)
        self._deadline_seconds = deadline_seconds
        self._timeout = httpx.Timeout(deadline_seconds, connect=min(connect_seconds, deadline_seconds))
        self._watchdog = _Watchdog()
        self._lock = threading.Lock()
        self._idle: list[_Line] = []
        self._closed = False
        for name in (httpx.__name__, "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)  # at INFO they print URLs, at DEBUG headers

    def __repr__(self) -> str:
        return f"<Client {self._base}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, path: str, payload: dict[str, Any]) -> Answer:
        """POST the payload to the path below the endpoint, once.

        Whatever goes wrong is in the answer; only a closed client raises (RuntimeError).
        """
        try:
            text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            content = text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            # The exception's own text would quote the payload.
            words = f"the payload cannot be written as JSON in UTF-8 ({type(error).__name__}): not sent"
            return Answer(Outcome.REFUSED, None, None, words, None)
        return self._request("POST", path, content)

    def validate(self) -> Answer:
        """Ask whether the key is good: accepted, unauthorised, or refused with 404, which tells nothing."""
        return self._request("GET", "v1/validate", None)

    def close(self) -> None:
        """Close the connections that no request uses; one in use is closed when its request ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for line in idle:
            line.close()
        self._watchdog.stop()

    def _request(self, method: str, path: str, content: bytes | None) -> Answer:
        line = self._take_line()
        reusable = False
        try:
            answer = self._exchange(line, method, self._base + path.lstrip("/"), content)
            reusable = True
        finally:
            self._put_back(line, reusable=reusable)
        return answer

    def _exchange(self, line: "_Line", method: str, url: str, content: bytes | None) -> Answer:
        response: httpx.Response | None = None
        body = b""
        trouble: Exception | None = None
        line.begin()
        self._watchdog.arm(line, time.monotonic() + self._deadline_seconds)
        try:
            with line.http.stream(method, url, content=content, extensions={"trace": line.trace}) as response:
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        break
        except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: a host that IDNA cannot write
            trouble = error
        finally:
            self._watchdog.disarm(line)
            line.end()
        return self._answer(line, response, body, trouble)

    def _answer(
        self, line: "_Line", response: httpx.Response | None, body: bytes, trouble: Exception | None
    ) -> Answer:
        broken = None
        if line.cut:
            broken = f"no complete answer within {self._deadline_seconds:g} s"
        elif trouble is not None:
            broken = one_line(_trouble_words(trouble), MAX_ERROR_LENGTH, self._api_key)
        if response is None:
            outcome = Outcome.UNKNOWN if line.sent else Outcome.FAILED
            return Answer(outcome, None, None, broken, None)
        answer = judge(
            response.status_code,
            response.headers,
            body,
            cut=len(body) > MAX_BODY_BYTES,
            secret=self._api_key,
            now=datetime.now(UTC),
        )
        # A status other than 2xx has said all that matters before its body broke off.
        if broken and answer.outcome in {Outcome.ACCEPTED, Outcome.UNKNOWN}:
            return Answer(Outcome.UNKNOWN, answer.status_code, answer.x_request_id, broken, None)
        return answer

    def _take_line(self) -> "_Line":
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._idle:
                return self._idle.pop()
        headers = {
            "Authorization": f"Token {self._api_key}",
            "X-API-Version": API_VERSION,
            "Content-Type": "application/json",
            "Accept": "application/json, text/plain, */*",
            "Accept-Encoding": "identity",  # a small compressed answer may be a huge one
            "User-Agent": "audience-sync",
        }
        return _Line(
            httpx.Client(
                headers=headers,
                verify=self._ssl_context,
                timeout=self._timeout,
                limits=httpx.Limits(max_connections=1),
                follow_redirects=False,
                trust_env=False,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # keep none, send none
            )
        )

    def _put_back(self, line: "_Line", *, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed:
                self._idle.append(line)
                return
        line.close()


class _Line:
    """One connection at most, used by one request at a time, which another thread can cut.

    What is cut is a duplicate of the socket's descriptor: shutting down an SSLSocket from another thread
    would turn it into a plain one under its user, and the original may be closed, its number given anew.
    """

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
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
                self._adopt(info["return_value"].get_extra_info("socket"))
            case "connection.start_tls.complete":
                self._socket = info["return_value"].get_extra_info("socket")
            case "http11.send_request_headers.started":
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
        self.http.close()
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


class _Watchdog:
    """One thread that cuts off the requests whose deadline has passed.

    The library's timeouts are for each read from the socket: an answer that drips would never end.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadlines: dict[_Line, float] = {}
        self._thread: threading.Thread | None = None
        self._waiting_for_work = False
        self._stopped = False

    def arm(self, line: _Line, deadline: float) -> None:
        """Deadlines never come before those armed earlier, so that a thread with work need not be woken."""
        with self._changed:
            self._deadlines[line] = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="userpilot-deadlines", daemon=True)
                self._thread.start()
            elif self._waiting_for_work:
                self._changed.notify()

    def disarm(self, line: _Line) -> None:
        """After this, the line is not cut any more."""
        with self._changed:
            self._deadlines.pop(line, None)
            if self._stopped:
                self._changed.notify()

    def stop(self) -> None:
        """End the thread, once no request is under way."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for line in [line for line, deadline in self._deadlines.items() if deadline <= now]:
                    del self._deadlines[line]
                    line.cut_off()
                if self._stopped and not self._deadlines:
                    self._thread = None
                    return
                self._waiting_for_work = not self._deadlines
                next_deadline = min(self._deadlines.values(), default=None)
                self._changed.wait(None if next_deadline is None else next_deadline - now)


def _base(endpoint: str) -> str:
    try:
        url = httpx.URL(endpoint)
    except httpx.InvalidURL:
        raise ConfigError("the endpoint is not a URL") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError("the endpoint must be a URL that starts with https://")
    if url.userinfo or url.query or url.fragment:
        raise ConfigError("the endpoint must hold no user name, password, query or fragment")
    return endpoint.rstrip("/") + "/"


def _checked_key(api_key: str) -> str:
    # The library would quote a header that it cannot send, key and all.
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ConfigError("the API key is empty, or holds spaces or characters that no key has")
    return api_key


def _ssl_context(ca_file: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise ConfigError(f"ca_file {ca_file} cannot be read as PEM certificates: {error}") from error
    return context


def _trouble_words(trouble: Exception) -> str:
    match trouble:
        case httpx.ConnectTimeout():
            return "no connection in time"
        case httpx.TimeoutException():
            return "no answer in time"
        case httpx.ConnectError():
            return f"cannot connect: {trouble}"
        case _:
            return f"the connection broke: {trouble}"
