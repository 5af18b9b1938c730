"""The HTTP client of Userpilot's API.

Every request returns an Answer, within the deadline once connected, and in bounded memory. No Answer contains the API
key. The client never repeats a request: queue/outcomes.py decides what happens next.
"""

import io
import json
import logging
import ssl
import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Self

import httpcore
import httpx

from audience_sync.errors import ConfigError
from audience_sync.userpilot.answers import MAX_ERROR_LENGTH, Answer, Outcome, judge, one_line
from audience_sync.userpilot.transport import Exchange, Transport

__all__ = ["Answer", "Client", "Outcome"]

API_VERSION = "2020-09-22"
MAX_BODY_BYTES = 64 * 1024
MAX_LIST_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The time that a request may take, and how many bytes of the answer's body are read."""

    seconds: float
    body_bytes: int


class Client:
    """Sends requests from any number of threads.

    `ca_file` adds certificate authorities to the system's. `deadline_seconds` limits a request from its start to the last
    byte of its answer, `upload_seconds` an upload. `connect_seconds` limits the attempt at each address of the host, and
    the TLS handshake. With `only_public`, nothing is sent to an address of a private network.
    Raises ConfigError if the endpoint, the key or the file cannot be used.
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
        self._bounds = _Bounds(deadline_seconds, MAX_BODY_BYTES)
        self._list_bounds = _Bounds(deadline_seconds, MAX_LIST_BYTES)
        self._upload_bounds = _Bounds(upload_seconds, MAX_BODY_BYTES)
        context = _ssl_context(ca_file, is_used=httpx.URL(endpoint).scheme == "https")
        self._http = httpx.Client(
            headers={
                "Authorization": f"Token {api_key}",
                "X-API-Version": API_VERSION,
                "Accept": "application/json, text/plain, */*",
                "Accept-Encoding": "identity",  # a small compressed answer may be a huge one
                "User-Agent": "audience-sync",
            },
            transport=Transport(context, connect_seconds=connect_seconds, only_public=only_public),
            follow_redirects=False,
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none are accepted or sent
        )
        self._lock = threading.Lock()
        self._active_count = 0
        self._closed = False
        for library in (httpx, httpcore):
            logging.getLogger(library.__name__).setLevel(logging.WARNING)  # INFO prints URLs, DEBUG headers

    def __repr__(self) -> str:
        return f"<Client {self._base}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, path: str, payload: dict[str, Any]) -> Answer:
        """POST the payload to the path below the endpoint, once.

        Every failure is returned as an answer; only a closed client raises (RuntimeError).
        """
        return self._write("POST", path, payload)

    def upload(self, path: str, filename: str, content: bytes) -> Answer:
        """POST the NDJSON as the part `file` of a form, once; every failure is returned as an answer."""
        # httpx sends a file in pieces. It would copy all of the bytes for each piece that the network takes.
        part = (filename, io.BytesIO(content), "application/x-ndjson")
        return self._request("POST", path, self._upload_bounds, files={"file": part})

    def get(self, path: str) -> Answer:
        """GET the path below the endpoint, quoted where necessary; an answer may have 4 MB."""
        return self._request("GET", path, self._list_bounds)

    def delete_user(self, user_id: str) -> Answer:
        """Request the deletion of a user, at 02:00 UTC; Userpilot allows one such request in 2 s."""
        return self._write("DELETE", "v1/users", {"users": [user_id]})

    def validate(self) -> Answer:
        """Check the key. The answer is accepted, unauthorised, or 404, which proves nothing about the key."""
        return self._request("GET", "v1/validate", self._bounds)

    def close(self) -> None:
        """Refuse further requests, and close the connections when the last request in flight has ended."""
        self._closed = True
        self._count_active(0)

    def _count_active(self, change: int) -> None:
        with self._lock:
            self._active_count += change
            if self._closed and not self._active_count:
                self._http.close()

    def _write(self, method: str, path: str, payload: dict[str, Any]) -> Answer:
        try:
            text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            content = text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            # The text of the exception would quote the payload.
            message = f"the payload cannot be written as JSON in UTF-8 ({type(error).__name__}): not sent"
            return Answer(Outcome.REFUSED, None, None, message, None)
        headers = {"Content-Type": "application/json"}
        return self._request(method, path, self._bounds, content=content, headers=headers)

    def _request(self, method: str, path: str, bounds: _Bounds, **parts: Any) -> Answer:
        if self._closed:
            raise RuntimeError("the client is closed")
        self._count_active(1)
        try:
            return self._exchange(method, self._base + path.lstrip("/"), bounds, parts)
        finally:
            self._count_active(-1)

    def _exchange(self, method: str, url: str, bounds: _Bounds, parts: dict[str, Any]) -> Answer:
        exchange = Exchange(bounds.seconds)
        response: httpx.Response | None = None
        body = bytearray()
        problem = None
        try:
            with self._http.stream(method, url, extensions={"exchange": exchange}, **parts) as response:
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > bounds.body_bytes:
                        break
                    exchange.seconds_left()  # one read may yield thousands of chunks of a byte
        except (httpcore.ProtocolError, OSError, ValueError) as error:
            text = _describe(error, exchange, bounds.seconds)
            problem = one_line(text, MAX_ERROR_LENGTH, self._api_key)
        if response is None:
            outcome = Outcome.UNKNOWN if exchange.sent else Outcome.FAILED
            return Answer(outcome, None, None, problem, None)
        return self._judge(response, bytes(body), bounds, problem)

    def _judge(self, response: httpx.Response, body: bytes, bounds: _Bounds, problem: str | None) -> Answer:
        answer = judge(
            response.status_code,
            response.headers,
            body,
            cut=len(body) > bounds.body_bytes,
            secret=self._api_key,
            now=datetime.now(UTC),
        )
        # A status other than 2xx is enough to decide, even if the body is incomplete.
        if problem and answer.outcome in {Outcome.ACCEPTED, Outcome.UNKNOWN}:
            return replace(answer, outcome=Outcome.UNKNOWN, error=problem, document=None)
        return answer


def _base(endpoint: str) -> str:
    try:
        url = httpx.URL(endpoint)
    except httpx.InvalidURL:
        raise ConfigError("the endpoint is not a URL") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError("the endpoint must be a URL that starts with https://")
    if url.userinfo or url.query or url.fragment:
        raise ConfigError("the endpoint must not contain a user name, password, query or fragment")
    return endpoint.rstrip("/") + "/"


def _checked_key(api_key: str) -> str:
    # The library's own error would quote the header, key and all.
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ConfigError("the API key is empty, or contains spaces or characters that a key cannot have")
    return api_key


def _ssl_context(ca_file: str, *, is_used: bool) -> ssl.SSLContext:
    # Reading the system's authorities takes longer than a hundred requests to a local endpoint without TLS.
    context = ssl.create_default_context() if is_used else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise ConfigError(f"ca_file {ca_file} cannot be read as PEM certificates: {error}") from error
    return context


def _describe(error: Exception, exchange: Exchange, seconds: float) -> str:
    if exchange.is_over or (exchange.sent and isinstance(error, TimeoutError)):
        return f"no complete answer within {seconds:g} s"
    if isinstance(error, TimeoutError):
        return "no connection in time"
    return f"the connection broke: {error}" if exchange.sent else f"cannot connect: {error}"
