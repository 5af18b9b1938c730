"""The tracking API: Segment's HTTP API, which Segment's libraries can use when their host is set to this server.

A request is answered after its calls are committed. Besides Segment's `success`, the answer has a verdict for each
call: accepted, ignored (stored, with the reason), repeated (a known message id) or refused. Next: intake/writer.py.
"""

import asyncio
import base64
import binascii
import contextlib
import datetime as dt
import hmac
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from audience_sync import __version__, intake, logs, remote
from audience_sync.app import App
from audience_sync.calls.model import CallType, PreparedCall, Receipt
from audience_sync.calls.validation import MAX_CALL_BYTES, check_json, decode_json, read_optional_time
from audience_sync.db import engines
from audience_sync.errors import CallError, DatabaseError
from audience_sync.intake.bodies import MAX_BATCH_BYTES, read_body
from audience_sync.intake.refusals import CallRate, RefusalError, RefusalLog
from audience_sync.intake.writer import Writer
from audience_sync.queue import destination

log = logging.getLogger(__name__)

MAX_BATCH_CALLS = 2_500
MAX_MERGED_BYTES = 4 * 1024 * 1024  # of the fields that a batch shares, counted once for each of its calls
MAX_REQUESTS = 500  # in progress at a time; each may have a batch in memory
MAX_UNKNOWN_REQUESTS = 100  # of these, requests with the key in the body, which anybody may send
MAX_WAITING_CALLS = 20_000  # more wait only if the writer is stuck, when their senders may have given up
BODY_SECONDS = 30.0  # the time to receive a whole body
RETRY_SECONDS = 5  # Retry-After when the database failed
HEALTH_SECONDS = 5.0
_BROWSER_HEADERS = {"origin", "sec-fetch-site"}
_MERGED = ("context", "integrations")  # fields of a batch that are merged into each of its calls
# The last part of each path that Segment's libraries for servers, phones and browsers use.
_KINDS = {
    **{kind.value: kind.value for kind in CallType},
    **{kind.value[0]: kind.value for kind in CallType},
    **dict.fromkeys(("batch", "import", "b"), "batch"),
}


# The content types of requests from the dashboard's pages. Libraries send calls as JSON, text or bytes.
_OF_PAGES = {"", "application/x-www-form-urlencoded", "multipart/form-data"}
_API_PATH = re.compile("/v1(/.*)?|/healthz|/openapi.json", re.DOTALL)


class CanonicalPath:
    """Removes repeated and trailing slashes from the path of a request, in which libraries differ.

    A redirect instead would send the calls to the host in the Host header, which may be any host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": re.sub("/+", "/", scope["path"]).rstrip("/") or "/"}
        await self._app(scope, receive, send)


class _Dashboard(Mount):
    """All paths except those of the API. A request with content other than a form is meant for the API."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        content_type = Headers(scope=scope).get("Content-Type", "").partition(";")[0].strip().lower()
        if _API_PATH.fullmatch(scope["path"]) or content_type not in _OF_PAGES:
            return Match.NONE, {}
        return super().matches(scope)


@dataclass(slots=True)
class TrackingApi:
    """The tracking API of an app; `writer` must run while the API is served."""

    app: App
    writer: Writer
    rate: CallRate = field(init=False)
    refusals: RefusalLog = field(init=False)
    _in_progress: Counter[bool] = field(default_factory=Counter)  # requests, by whether their sender is known
    _preparer: intake.Preparer = field(init=False)
    _write_keys: tuple[str, ...] = field(init=False)
    _description: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        tracking = self.app.settings.tracking
        self._write_keys = tracking.require_write_keys()
        self.rate = CallRate(tracking.calls_per_second, self.app.clock)
        self.refusals = RefusalLog(self.app.clock)
        self._preparer = intake.Preparer(self.app.settings)
        self._description = json.loads(Path(__file__).with_name("openapi.json").read_bytes())
        self._description["info"]["version"] = __version__

    def asgi(self, dashboard: ASGIApp | None = None) -> Starlette:
        """Return the ASGI application; a dashboard answers all paths outside /v1 that the API does not have."""
        routes: list[BaseRoute] = [
            *(Route(f"/v1/{name}", self._post, methods=["POST"]) for name in _KINDS),
            Route("/healthz", self._health, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
        ]
        if dashboard is not None:
            routes.append(_Dashboard("/", dashboard))
        application = Starlette(
            routes=routes,
            middleware=[Middleware(CanonicalPath)],
            exception_handlers={404: self._refuse_path, 405: self._refuse_path},
        )
        application.router.redirect_slashes = False
        application.state.refusals = self.refusals
        return application

    async def _refuse_path(self, request: Request, error: Exception) -> Response:
        """Answer a request with a path or a method that the API does not have."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        headers = error.headers if isinstance(error, HTTPException) else None
        message = "there is no such path: calls go to /v1/batch, and /openapi.json describes the API"
        if status == 405:
            message = f"this path takes {', '.join(sorted((headers or {}).get('Allow', 'other methods').split(', ')))} only"
        return self._refused(request, RefusalError(status, message, headers))

    def _refused(self, request: Request, refusal: RefusalError) -> Response:
        path: str = request.scope["path"]
        known = path if path.removeprefix("/v1/") in _KINDS else "other"  # another path may contain anything
        self.refusals.request_refused(refusal.status, known, refusal.message)
        return refusal.response()

    async def _post(self, request: Request) -> Response:
        """Answer a request with one call, or with a batch of calls."""
        try:
            self._check_sender(request)
            kind = _KINDS[request.scope["path"].removeprefix("/v1/")]
            with self._counted(is_known=not self._write_keys or "Authorization" in request.headers):
                if kind == "batch":
                    return await self._batch(await self._document(request, MAX_BATCH_BYTES))
                return await self._single(await self._document(request, MAX_CALL_BYTES), kind)
        except RefusalError as refusal:
            return self._refused(request, refusal)
        except ClientDisconnect:
            return Response(status_code=499)  # the sender is gone
        except DatabaseError as error:
            logs.event(log, logging.ERROR, "calls could not be stored", error=str(error))
            message = "the database cannot be used: try again"
            return RefusalError(503, message, {"Retry-After": str(RETRY_SECONDS)}).response()

    @contextlib.contextmanager
    def _counted(self, *, is_known: bool) -> Iterator[None]:
        """Count the request as in progress; refuse it if there are too many."""
        if self._in_progress[is_known] >= (MAX_REQUESTS if is_known else MAX_UNKNOWN_REQUESTS):
            message = "too many requests at a time: try again"
            raise RefusalError(503, message, {"Retry-After": str(RETRY_SECONDS), "Connection": "close"})
        self._in_progress[is_known] += 1
        try:
            yield
        finally:
            self._in_progress[is_known] -= 1

    async def _single(self, document: dict[str, Any], kind: str) -> Response:
        verdicts = await self._accept([{**document, "type": kind}], {})
        if verdicts[0]["status"] == "refused":
            content = {"success": False, "error": verdicts[0]["reason"], "calls": verdicts}
            return JSONResponse(content, status_code=400)
        return JSONResponse({"success": True, "calls": verdicts})

    async def _batch(self, document: dict[str, Any]) -> Response:
        batch = document.get("batch")
        if not isinstance(batch, list):
            raise RefusalError(400, "batch must be a list of calls")
        if len(batch) > MAX_BATCH_CALLS:
            raise RefusalError(413, f"a batch has at most {MAX_BATCH_CALLS:,} calls: divide it")
        _check_shared(document, len(batch))
        return JSONResponse({"success": True, "calls": await self._accept(batch, document)})

    async def _accept(self, raws: Sequence[Any], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Store the valid calls; return a verdict for each call, in order. `shared` is a batch's document, or empty."""
        if self.writer.waiting_count >= MAX_WAITING_CALLS:
            raise RefusalError(
                503, "the database cannot keep up: try again", {"Retry-After": str(RETRY_SECONDS)}
            )
        if wait := self.rate.take(len(raws)):
            message = "more calls than [tracking] calls_per_second"
            raise RefusalError(429, message, {"Retry-After": str(int(wait) + 1)})
        received_at = self.app.clock.now()
        prepared = [self._prepare(raw, shared, received_at) for raw in raws]
        valid = [call for call in prepared if isinstance(call, PreparedCall)]
        receipts = await asyncio.wrap_future(self.writer.submit(valid)) if valid else []
        errors = [call for call in prepared if isinstance(call, CallError)]
        if errors:  # Segment's libraries do not read the verdicts
            self.refusals.calls_refused(len(errors), str(errors[0]))
        stored = iter(receipts)
        return [
            _refusal(raw, str(call)) if isinstance(call, CallError) else _verdict(next(stored))
            for raw, call in zip(raws, prepared, strict=True)
        ]

    def _prepare(
        self, raw: Any, shared: Mapping[str, Any], received_at: dt.datetime
    ) -> PreparedCall | CallError:
        corrections: list[str] = []
        try:
            sent_at = None
            if isinstance(raw, dict):
                _merge_shared(raw, shared)
                for document in (raw, shared):
                    sent_at = sent_at or read_optional_time(document, "sentAt", corrections)
            return self._preparer.prepare(
                raw, received_at=received_at, sent_at=sent_at, corrections=corrections
            )
        except CallError as error:
            return error

    def _check_sender(self, request: Request) -> None:
        """Check the Authorization header; without write keys, admit only local programs other than browsers."""
        if self._write_keys:
            if "Authorization" in request.headers and not self._is_write_key(_basic_user(request)):
                raise RefusalError(401, "the write key is not known", {"WWW-Authenticate": "Basic"})
        elif not (_BROWSER_HEADERS.isdisjoint(request.headers.keys()) and remote.is_local(request.scope)):
            raise RefusalError(403, "without [tracking] write_keys only programs on this machine may send")

    def _is_write_key(self, value: object) -> bool:
        """Compare the value with every write key, in constant time."""
        given = value.encode(errors="replace") if isinstance(value, str) else b""
        return sum(hmac.compare_digest(given, key.encode()) for key in self._write_keys) > 0

    async def _document(self, request: Request, max_bytes: int) -> dict[str, Any]:
        """Read the body; without an Authorization header it must contain the write key."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await read_body(request, max_bytes)
        except TimeoutError as error:
            raise RefusalError(408, "the body took too long", {"Connection": "close"}) from error
        try:
            document = decode_json(body)
        except CallError as error:
            raise RefusalError(400, "the body is not valid JSON") from error
        if not isinstance(document, dict):
            raise RefusalError(400, "the body must be a JSON object")
        needs_key = self._write_keys and "Authorization" not in request.headers
        if needs_key and not self._is_write_key(document.get("writeKey")):
            raise RefusalError(401, "the write key is missing or not known", {"WWW-Authenticate": "Basic"})
        return document

    async def _health(self, _request: Request) -> Response:
        """Answer 200 while the database and the writer work, else 503."""
        try:
            heartbeat = await asyncio.wait_for(asyncio.to_thread(self._last_heartbeat), HEALTH_SECONDS)
        except (DatabaseError, TimeoutError):
            return _failing("the database cannot be used")
        if not self.writer.is_alive:
            return _failing("the writer has ended")
        return JSONResponse({"status": "ok", "daemon_heartbeat_at": heartbeat})

    def _last_heartbeat(self) -> str | None:
        with engines.read(self.app.engine) as connection:
            at = destination.last_heartbeat(connection)
        return None if at is None else at.isoformat()

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(self._description)


def _failing(reason: str) -> Response:
    return JSONResponse({"status": "failing", "reason": reason}, status_code=503)


def _basic_user(request: Request) -> str | None:
    scheme, _, credentials = request.headers["Authorization"].partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[0]
    except (binascii.Error, ValueError):
        return None


def _check_shared(document: Mapping[str, Any], count: int) -> None:
    shared = {name: document.get(name) for name in _MERGED}
    try:
        check_json(shared)
    except CallError as error:
        raise RefusalError(400, f"the batch's context and integrations: {error}") from error
    if len(json.dumps(shared)) * count > MAX_MERGED_BYTES:
        raise RefusalError(
            413, "the batch's context and integrations are too large for this many calls: divide it"
        )


def _merge_shared(raw: dict[str, Any], shared: Mapping[str, Any]) -> None:
    """Add the shared fields to a call; its own members take precedence."""
    for name in _MERGED:
        own, common = raw.get(name), shared.get(name)
        if isinstance(common, dict) and (isinstance(own, dict) or own in (None, [], "")):
            raw[name] = {**common, **(own or {})}


def _verdict(receipt: Receipt) -> dict[str, Any]:
    verdict: dict[str, Any] = {"messageId": receipt.message_id, "status": "accepted"}
    if receipt.is_repeat:
        verdict["status"] = "repeated"
    elif receipt.ignored:
        verdict["status"] = "ignored"
    if receipt.reason:
        verdict["reason"] = receipt.reason
    if receipt.left_out:
        verdict["leftOut"] = list(receipt.left_out)
    if receipt.corrected:
        verdict["corrected"] = list(receipt.corrected)
    return verdict


def _refusal(raw: Any, reason: str) -> dict[str, Any]:
    message_id = raw.get("messageId") if isinstance(raw, dict) else None
    is_plain = isinstance(message_id, str) and message_id.isprintable() and len(message_id) <= 1000
    return {"messageId": message_id if is_plain else None, "status": "refused", "reason": reason}
