"""The HTTP client, and the only place that knows which library carries it.

It promises an Answer for every request, within the deadline once connected, in bounded memory, and with the
API key in none of it. It never repeats a request: that is delivery's decision.
"""

import io
import json
import logging
import ssl
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Self

import httpx

from audience_sync.errors import ConfigError
from audience_sync.userpilot.answers import MAX_ERROR_LENGTH, Answer, Outcome, judge, one_line
from audience_sync.userpilot.deadlines import Watchdog, Wire

__all__ = ["Answer", "Client", "Outcome"]

API_VERSION = "2020-09-22"
MAX_BODY_BYTES = 64 * 1024
MAX_LIST_BYTES = 4 * 1024 * 1024


class Client:
    """Sends requests from any number of threads; each request has a connection to itself.

    `ca_file` names certificate authorities beside the system's. `deadline_seconds` bounds a request from its
    start to the last byte of its answer, however slowly that drips, and `upload_seconds` does so for uploads;
    `connect_seconds` is for each address of the host, and for the TLS handshake. `only_public`: nothing is sent
    to an address of a private network. ConfigError if the endpoint, the key or the file cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        api_key: str,
        *,
        ca_file: str = "",
        only_public: bool = False,
        deadline_seconds: float = 30.0,
        upload_seconds: float = 300.0,
        connect_seconds: float = 10.0,
    ) -> None:
        self._base = _base(endpoint)
        self._api_key = _checked_key(api_key)
        self._ssl_context = _ssl_context(ca_file)
        self._only_public = only_public
        self._usual = _Bounds(deadline_seconds, connect_seconds, MAX_BODY_BYTES)
        self._of_list = _Bounds(deadline_seconds, connect_seconds, MAX_LIST_BYTES)
        self._of_upload = _Bounds(upload_seconds, connect_seconds, MAX_BODY_BYTES)
        self._watchdog = Watchdog()
        self._lock = threading.Lock()
        self._idle: list[_Line] = []
        self._closed = False
        for name in (httpx.__name__, httpx.__name__.replace("httpx", "httpcore")):
            logging.getLogger(name).setLevel(logging.WARNING)  # at INFO they print URLs, at DEBUG headers

    def __repr__(self) -> str:
        return f"<Client {self._base}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, path: str, payload: dict[str, Any]) -> Answer:
        """POST the payload to the path below the endpoint, once.

        Whatever goes wrong is in the answer; only a closed client raises (RuntimeError).
        """
        return self._write("POST", path, payload)

    def upload(self, path: str, filename: str, content: bytes) -> Answer:
        """POST the NDJSON as the part `file` of a form, once; whatever goes wrong is in the answer."""
        # A file is sent in pieces; bytes would be copied whole for each piece that the network takes.
        part = (filename, io.BytesIO(content), "application/x-ndjson")
        return self._request("POST", path, self._of_upload, files={"file": part})

    def get(self, path: str) -> Answer:
        """GET the path below the endpoint, quoted where need be; up to 4 MB become the answer's document."""
        return self._request("GET", path, self._of_list)

    def delete_user(self, user_id: str) -> Answer:
        """Ask for the deletion of a user, which Userpilot carries out at 02:00 UTC; one request in 2 s at most."""
        return self._write("DELETE", "v1/users", {"users": [user_id]})

    def validate(self) -> Answer:
        """Ask whether the key is good: accepted, unauthorised, or refused with 404, which tells nothing."""
        return self._request("GET", "v1/validate", self._usual)

    def close(self) -> None:
        """Close the connections that no request uses; one in use is closed when its request ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for line in idle:
            line.http.close()
            line.wire.close()
        self._watchdog.stop()

    def _write(self, method: str, path: str, payload: dict[str, Any]) -> Answer:
        try:
            text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            content = text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            # The exception's own text would quote the payload.
            words = f"the payload cannot be written as JSON in UTF-8 ({type(error).__name__}): not sent"
            return Answer(Outcome.REFUSED, None, None, words, None)
        headers = {"Content-Type": "application/json"}
        return self._request(method, path, self._usual, content=content, headers=headers)

    def _request(self, method: str, path: str, bounds: "_Bounds", **parts: Any) -> Answer:
        line = self._take_line()
        try:
            return self._exchange(line, method, self._base + path.lstrip("/"), bounds, parts)
        finally:
            self._put_back(line)

    def _exchange(
        self, line: "_Line", method: str, url: str, bounds: "_Bounds", parts: dict[str, Any]
    ) -> Answer:
        response: httpx.Response | None = None
        body = bytearray()
        trouble: Exception | None = None
        options = parts | {"timeout": bounds.timeout, "extensions": {"trace": line.wire.trace}}
        self._watchdog.arm(line.wire, time.monotonic() + bounds.seconds)
        try:
            with line.http.stream(method, url, **options) as response:
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > bounds.body_bytes or line.wire.cut:
                        break
        except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: a host that IDNA cannot write
            trouble = error
        finally:
            self._watchdog.disarm(line.wire)
        return self._answer(line.wire, response, bytes(body), bounds, trouble)

    def _answer(
        self,
        wire: Wire,
        response: httpx.Response | None,
        body: bytes,
        bounds: "_Bounds",
        trouble: Exception | None,
    ) -> Answer:
        broken = None
        if wire.cut:
            broken = f"no complete answer within {bounds.seconds:g} s"
        elif trouble is not None:
            broken = one_line(_trouble_words(trouble), MAX_ERROR_LENGTH, self._api_key)
        if response is None:
            outcome = Outcome.UNKNOWN if wire.sent else Outcome.FAILED
            return Answer(outcome, None, None, broken, None)
        answer = judge(
            response.status_code,
            response.headers,
            body,
            cut=len(body) > bounds.body_bytes,
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
        http = httpx.Client(
            headers={
                "Authorization": f"Token {self._api_key}",
                "X-API-Version": API_VERSION,
                "Accept": "application/json, text/plain, */*",
                "Accept-Encoding": "identity",  # a small compressed answer may be a huge one
                "User-Agent": "audience-sync",
            },
            verify=self._ssl_context,
            limits=httpx.Limits(max_connections=1),
            follow_redirects=False,
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # keep none, send none
        )
        return _Line(http, Wire(only_public=self._only_public))

    def _put_back(self, line: "_Line") -> None:
        with self._lock:
            self._idle.append(line)
        if self._closed:
            self.close()


class _Bounds:
    """What a request may take: the time, and the size of its answer's body."""

    def __init__(self, seconds: float, connect_seconds: float, body_bytes: int) -> None:
        self.seconds = seconds
        # The watchdog ends a request; where it comes late, the library's own time-outs must not say so in other words.
        self.timeout = httpx.Timeout(seconds + 1, connect=min(connect_seconds, seconds))
        self.body_bytes = body_bytes


@dataclass(frozen=True, slots=True)
class _Line:
    """A connection at most, for one request at a time."""

    http: httpx.Client
    wire: Wire


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
        case httpx.ConnectError() | OSError():
            return f"cannot connect: {trouble}"
        case _:
            return f"the connection broke: {trouble}"
