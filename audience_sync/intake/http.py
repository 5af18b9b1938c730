"""The tracking API: Segment's HTTP API, so that its libraries need another host and nothing else.

A call is accepted when it is committed, and then only is it answered. Beside Segment's `success` an answer holds a
verdict for each call: accepted, ignored (kept, with the reason), repeated (its message id is known), refused.
"""

import asyncio
import base64
import binascii
import datetime as dt
import hmac
import ipaddress
import json
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from audience_sync import intake, logs
from audience_sync.app import App
from audience_sync.calls.model import Call, CallType
from audience_sync.calls.validation import MAX_CALL_BYTES, check_json, moment_in
from audience_sync.clock import Clock
from audience_sync.db import engines
from audience_sync.errors import CallError, DatabaseError
from audience_sync.intake import openapi
from audience_sync.intake.files import decoded
from audience_sync.intake.writer import Writer
from audience_sync.queue import destination

log = logging.getLogger(__name__)

MAX_BATCH_BYTES = 500 * 1024
MAX_BATCH_CALLS = 2_500
MAX_MERGED_BYTES = 4 * 1024 * 1024  # what a batch says for all its calls, for each of them
MOST_READ_BYTES = 4 * MAX_BATCH_BYTES  # of a body that is too large: most senders send all before they look
MOST_WAITING = 20_000  # calls: the writer is stuck, and their senders may have gone
BODY_SECONDS = 30.0  # for a whole body to come
RETRY_SECONDS = 5  # after the database could not be used
HEALTH_SECONDS = 5.0
_FROM_PAGES = {"origin", "sec-fetch-site"}  # headers that browsers send for a page
_MERGED = ("context", "integrations")  # of a batch, into each of its calls


class RefusalError(Exception):
    """A request that is answered with an error, whole."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


@dataclass(slots=True)
class Pace:
    """Lets so many calls a second through; a second's worth at once, and a batch whole once one call fits."""

    per_second: int
    clock: Clock
    _free_at: float = 0.0

    def take(self, count: int) -> float:
        """0 if the calls may come in, else after how many seconds to try again."""
        now = self.clock.monotonic()
        late = max(self._free_at, now) - now - 1.0
        if late > 0:
            return late
        self._free_at = max(self._free_at, now) + count / self.per_second
        return 0.0


@dataclass(slots=True)
class Tracking:
    """The API of an application; `writer` is running as long as it is served."""

    app: App
    writer: Writer
    pace: Pace = field(init=False)
    _keys: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._keys = self.app.settings.tracking.require_write_keys()
        self.pace = Pace(self.app.settings.tracking.calls_per_second, self.app.clock)

    def asgi(self) -> Starlette:
        routes = [
            Route(f"/v1/{each}", self._answering(self._single(each)), methods=["POST"]) for each in CallType
        ]
        application = Starlette(
            routes=[
                *routes,
                Route("/v1/batch", self._answering(self._batch), methods=["POST"]),
                Route("/healthz", self._health, methods=["GET"]),
                Route("/openapi.json", self._description, methods=["GET"]),
            ]
        )
        application.router.redirect_slashes = False  # to where the Host header says, and calls with it
        return application

    def _answering(
        self, act: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                self._check_sender(request)
                return await act(request)
            except RefusalError as refusal:
                return _refused(refusal.status, refusal.message, refusal.headers)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except DatabaseError as error:
                logs.event(log, logging.ERROR, "calls could not be kept", error=str(error))
                return _refused(
                    503, "the database cannot be used: try again", {"Retry-After": str(RETRY_SECONDS)}
                )

        return answer

    def _single(self, call_type: CallType) -> Callable[[Request], Awaitable[Response]]:
        async def single(request: Request) -> Response:
            document = await self._document(request, MAX_CALL_BYTES)
            verdicts = await self._take_in([{**document, "type": call_type.value}], {})
            if verdicts[0]["status"] == "refused":
                return JSONResponse(
                    {"success": False, "error": verdicts[0]["reason"], "calls": verdicts}, status_code=400
                )
            return JSONResponse({"success": True, "calls": verdicts})

        return single

    async def _batch(self, request: Request) -> Response:
        document = await self._document(request, MAX_BATCH_BYTES)
        batch = document.get("batch")
        if not isinstance(batch, list):
            raise RefusalError(400, "batch must be a list of calls")
        if len(batch) > MAX_BATCH_CALLS:
            raise RefusalError(413, f"a batch holds at most {MAX_BATCH_CALLS:,} calls: divide it")
        _check_shared(document, len(batch))
        return JSONResponse({"success": True, "calls": await self._take_in(batch, document)})

    # Who may come in, and with what.

    def _check_sender(self, request: Request) -> None:
        """Without write keys anybody on this machine may; a page in a browser, from wherever it came, may not."""
        if self._keys:
            if "Authorization" in request.headers and not self._is_known(_basic_user(request)):
                raise RefusalError(401, "the write key is not known", {"WWW-Authenticate": "Basic"})
        elif not (_FROM_PAGES.isdisjoint(request.headers.keys()) and is_loopback(_host(request))):
            raise RefusalError(403, "without [tracking] write_keys only programs on this machine may send")

    def _is_known(self, key: object) -> bool:
        """All keys are compared, each in constant time."""
        given = key.encode(errors="replace") if isinstance(key, str) else b""
        return sum(hmac.compare_digest(given, known.encode()) for known in self._keys) > 0

    async def _document(self, request: Request, most_bytes: int) -> dict[str, Any]:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(request, most_bytes)
        except TimeoutError as error:
            raise RefusalError(408, "the body took too long", {"Connection": "close"}) from error
        try:
            document = decoded(body)
        except CallError as error:
            raise RefusalError(400, "the body is not JSON") from error
        if not isinstance(document, dict):
            raise RefusalError(400, "the body must be an object")
        keyless = not self._keys or "Authorization" in request.headers
        if not keyless and not self._is_known(document.get("writeKey")):
            raise RefusalError(401, "the write key is missing or not known", {"WWW-Authenticate": "Basic"})
        return document

    # What becomes of calls.

    async def _take_in(self, raws: Sequence[Any], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A verdict for each call, in their order; `shared` is what the request says for all of them."""
        if self.writer.waiting_count >= MOST_WAITING:
            raise RefusalError(503, "the database is behind: try again", {"Retry-After": str(RETRY_SECONDS)})
        wait = self.pace.take(len(raws))
        if wait:
            raise RefusalError(
                429, "more calls than [tracking] calls_per_second", {"Retry-After": str(int(wait) + 1)}
            )
        received_at = self.app.clock.now()
        sent_at = _sent_at(shared)
        found = [_parse(raw, shared, received_at, sent_at) for raw in raws]
        valid = [each for each in found if isinstance(each, Call)]
        kept = await self._keep(valid) if valid else []
        receipts = iter(kept)
        refused = [str(each) for each in found if not isinstance(each, Call)]
        if refused:  # Segment's libraries do not read the verdicts
            logs.event(log, logging.WARNING, "calls refused", count=len(refused), first_reason=refused[0])
        return [
            _verdict(next(receipts)) if isinstance(each, Call) else _refusal(raw, str(each))
            for raw, each in zip(raws, found, strict=True)
        ]

    async def _keep(self, calls: Sequence[Call]) -> list[intake.Receipt]:
        return await asyncio.wrap_future(self.writer.accept(intake.prepare(self.app.settings, calls)))

    async def _health(self, _request: Request) -> Response:
        """200 while the database answers and the writer lives; what it could not keep was answered with 503."""
        try:
            heartbeat = await asyncio.wait_for(asyncio.to_thread(self._look), HEALTH_SECONDS)
        except (DatabaseError, TimeoutError):
            return JSONResponse(
                {"status": "failing", "reason": "the database cannot be used"}, status_code=503
            )
        if not self.writer.is_alive:
            return JSONResponse({"status": "failing", "reason": "the writer has ended"}, status_code=503)
        return JSONResponse({"status": "ok", "daemon_heartbeat_at": heartbeat})

    def _look(self) -> str | None:
        with engines.read(self.app.engine) as connection:
            at = destination.last_heartbeat(connection)
        return None if at is None else at.isoformat()

    async def _description(self, _request: Request) -> Response:
        return JSONResponse(openapi.DESCRIPTION)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(request: Request) -> str:
    """As the sender wrote it: starlette puts our own address in place of what it cannot read."""
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
    except ValueError:
        return ""


def _basic_user(request: Request) -> str | None:
    scheme, _, rest = request.headers["Authorization"].partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[0]
    except (binascii.Error, ValueError):
        return None


async def _body(request: Request, most_bytes: int) -> bytes:
    """The body, unpacked; whatever was sent, no more is held than is allowed."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in {"identity", "gzip", ""}:
        raise RefusalError(400, "Content-Encoding may be gzip, or none")
    packed = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MOST_READ_BYTES:
            break
        if size <= most_bytes:
            packed += chunk
    if size > most_bytes:
        raise _too_large(most_bytes)
    if encoding != "gzip":
        return bytes(packed)
    unpacking = zlib.decompressobj(wbits=31)
    try:
        body = unpacking.decompress(packed, most_bytes + 1)
    except zlib.error as error:
        raise RefusalError(400, "the body is not gzip") from error
    if len(body) > most_bytes:
        raise _too_large(most_bytes)
    if not unpacking.eof or unpacking.unused_data:
        raise RefusalError(400, "the body is not gzip: it ends early, or more follows")
    return body


def _too_large(most_bytes: int) -> RefusalError:
    return RefusalError(
        413, f"the body is larger than {most_bytes // 1024} KB", {"Connection": "close"}
    )  # what comes yet is not read


def _check_shared(document: Mapping[str, Any], count: int) -> None:
    shared = {name: document.get(name) for name in _MERGED}
    try:
        check_json(shared)
    except CallError as error:
        raise RefusalError(400, f"what is merged into each call: {error}") from error
    if len(json.dumps(shared)) * count > MAX_MERGED_BYTES:
        raise RefusalError(413, "what is merged into each call makes the batch too large: divide it")


def _sent_at(shared: Mapping[str, Any]) -> dt.datetime | None:
    try:
        return moment_in(shared, "sentAt")
    except CallError as error:
        raise RefusalError(400, str(error)) from error


def _parse(
    raw: Any, shared: Mapping[str, Any], received_at: dt.datetime, sent_at: dt.datetime | None
) -> Call | CallError:
    try:
        if isinstance(raw, dict):
            for name in _MERGED:
                mine, everybodys = raw.get(name), shared.get(name)
                if isinstance(everybodys, dict) and isinstance(mine, dict | None):
                    raw[name] = {**everybodys, **(mine or {})}
            sent_at = moment_in(raw, "sentAt") or sent_at
        return intake.parse(raw, received_at=received_at, sent_at=sent_at)
    except CallError as error:
        return error


def _verdict(receipt: intake.Receipt) -> dict[str, Any]:
    verdict: dict[str, Any] = {"messageId": receipt.message_id, "status": "accepted"}
    if receipt.is_repeat:
        verdict["status"] = "repeated"
    elif receipt.ignored:
        verdict["status"] = "ignored"
    if receipt.reason:
        verdict["reason"] = receipt.reason
    if receipt.left_out:
        verdict["leftOut"] = list(receipt.left_out)
    return verdict


def _refusal(raw: Any, reason: str) -> dict[str, Any]:
    message_id = raw.get("messageId") if isinstance(raw, dict) else None
    is_plain = isinstance(message_id, str) and message_id.isprintable() and len(message_id) <= 1000
    return {"messageId": message_id if is_plain else None, "status": "refused", "reason": reason}


def _refused(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"success": False, "error": message}, status_code=status, headers=headers)
