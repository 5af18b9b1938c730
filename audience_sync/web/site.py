"""The dashboard as an ASGI application: its routes, limits, errors and headers."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import anyio
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audience_sync import logs
from audience_sync.app import App
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, DatabaseError, DatabaseLocked, unexpected
from audience_sync.web import (
    actions,
    definitions,
    overview,
    query,
    queue,
    render,
    runs,
    schedule,
    signin,
    users,
)
from audience_sync.web.access import STRANGER, TrustedProxies, Viewer, refusal
from audience_sync.web.view import OVERVIEW, Forbidden, FormError, NotFound, Page, Refusal, View, html

log = logging.getLogger(__name__)

MAX_PAGES = 4  # that are made at a time, so that the API for calls stays fast
MAX_ACTIONS = 2  # at a time; one may take minutes, without blocking the pages
MAX_SIGN_INS = 2  # at a time; each takes 32 MB
MAX_WAITING = 20  # forms, or sign-ins, that wait for others
FORM_TYPE = "application/x-www-form-urlencoded"
MAX_FORM_BYTES = 64 * 1024
MAX_FIELDS = 5_000
FORM_SECONDS = 20.0  # to receive a form
BUSY = "A large sync is being stored, or another program holds a lock. Try again in a moment."
PAGES: dict[str, Page] = {
    "/": overview.overview,
    "/definitions/{key}": definitions.definition,
    "/definitions/{key}/members": definitions.members,
    "/definitions/{key}/members.csv": definitions.members_csv,
    "/definitions/{key}/sizes.json": definitions.sizes,
    "/runs": runs.runs,
    "/runs/{run_id}": runs.run,
    "/runs/{run_id}/changes": runs.changes,
    "/actions": actions.actions,
    "/user": users.user_page,
    "/deliveries": queue.deliveries_page,
    "/calls": queue.calls_page,
    "/requests": queue.requests_page,
    "/requests/{request_id}": queue.request_page,
    "/schedule": schedule.schedule_page,
    "/query": query.query_page,
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """Refuses requests that are not for this dashboard or come from other sites; adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, site: "Site") -> None:
        self._app, self._site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                is_static = scope["path"].startswith("/static/")
                cache = {"Cache-Control": "max-age=86400" if is_static else "no-store"}
                MutableHeaders(scope=message).update(HEADERS | cache)
            await send(message)

        app = self._app
        if scope["type"] == "http":
            request = Request(scope)
            if reason := refusal(request, has_users=bool(self._site.users)):
                app = self._site.error(request, Forbidden(reason))
        await app(scope, receive, send_with_headers)


class Site:
    """The pages and forms of an app."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.users = app.settings.web.require_users()
        self.pages = anyio.CapacityLimiter(MAX_PAGES)
        self._in_progress = Counter[anyio.CapacityLimiter]()  # forms

    def routes(self) -> Iterator[BaseRoute]:
        for path, page in (PAGES | {"/login": signin.sign_in_page}).items():
            yield Route(path, partial(self._show, page), methods=["GET"])
        acting, signing_in = anyio.CapacityLimiter(MAX_ACTIONS), anyio.CapacityLimiter(MAX_SIGN_INS)
        sign_in = partial(signin.sign_in, self.users, signin.Throttle(self.app.clock))
        yield Route("/login", partial(self._post, sign_in, signing_in), methods=["POST"])
        yield Route("/logout", partial(self._post, signin.sign_out, acting), methods=["POST"])
        for path, action in actions.ACTIONS.items():
            yield Route(path, partial(self._post, partial(actions.act, action), acting), methods=["POST"])
        yield Mount("/static", StaticFiles(directory=Path(__file__).with_name("static")))

    async def _show(self, page: Page, request: Request) -> Response:
        work = partial(self._guarded, request, partial(self._page, page, request))
        return await anyio.to_thread.run_sync(work, limiter=self.pages)

    def _page(self, page: Page, request: Request) -> Response:
        """Make a page in its own read transaction, which locks nothing until the page reads something."""
        viewer, is_use = signin.viewer(self.app, self.users, request)
        request.state.viewer = viewer
        if not viewer.may_read and page is not signin.sign_in_page:
            return signin.ask_to_sign_in(self.app, request)
        with engines.read(self.app.engine, signin.WAIT_SECONDS) as connection:
            answer = page(View(request, self.app, connection, viewer))
        if is_use:
            signin.record_use(self.app, request)
        return answer

    async def _post(
        self, action: signin.FormHandler, limiter: anyio.CapacityLimiter, request: Request
    ) -> Response:
        try:
            async with asyncio.timeout(FORM_SECONDS):
                form = await _read_form(request)
            if self._in_progress[limiter] >= limiter.total_tokens + MAX_WAITING:
                raise FormError("Too many forms are waiting. Try again in 10 seconds.", status=429)  # noqa: TRY301
        except ClientDisconnect:
            return Response(status_code=499)  # the sender is gone
        except TimeoutError:
            return self._unread(request, FormError("It took too long to arrive. Send it again.", status=408))
        except FormError as error:
            return self._unread(request, error)
        work = partial(self._guarded, request, partial(self._action, action, request, form))
        self._in_progress[limiter] += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=limiter)
        finally:
            self._in_progress[limiter] -= 1

    def _action(self, action: signin.FormHandler, request: Request, form: signin.Form) -> Response:
        request.state.viewer = viewer = signin.viewer(self.app, self.users, request)[0]
        if not viewer.may_read and request.url.path != "/login":
            return RedirectResponse("/login", 303)
        return action(self.app, viewer, request, form)

    def _unread(self, request: Request, error: FormError) -> Response:
        answer = self.error(request, error)
        answer.headers.update({"Connection": "close", "Retry-After": "10"})  # the rest is not read
        return answer

    def _guarded(self, request: Request, work: Callable[[], Response]) -> Response:
        """Do the work for a request, and turn any error into a page."""
        logged = None
        try:
            return work()
        except Refusal as error:
            return self.error(request, error)
        except DatabaseLocked:
            status, title, message = 503, "The database is busy", BUSY
        except DatabaseError as error:
            status, title, message = 503, "The database cannot be used", str(error)
            logged = message
        except AudienceSyncError as error:
            status, title, message = 400, "This cannot be shown", str(error)
        except Exception as error:  # noqa: BLE001  (a bug: never a traceback)
            logged = unexpected(error)
            status, title, message = 500, "An unexpected error", f"{logged}. Please report it."
        if logged:
            logs.event(log, logging.ERROR, "page failed", path=request.url.path[:200], error=logged)
            if not _viewer(request).may_read:  # only readers may learn where the database is
                message = "The log of audience-sync serve says why. Try again later."
        is_action = request.method == "POST" and _viewer(request).may_operate
        way_on = ("/actions", "See whether it was done") if is_action else OVERVIEW
        return self.error(request, Refusal(message, way_on, status=status, title=title))

    async def no_page(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException) or error.status_code == 404:
            return await self._show(_nothing, request)
        takes = (error.headers or {}).get("Allow", "other methods")
        request.state.viewer = STRANGER if self.users else Viewer()
        wrong = Refusal(f"This address accepts {takes} only.", status=405, title="Method not allowed")
        answer = self.error(request, wrong)
        answer.headers["Allow"] = takes
        return answer

    def error(self, request: Request, refusal: Refusal) -> Response:
        values: dict[str, Any] = {"title": refusal.title, "message": str(refusal), "way_on": refusal.way_on}
        viewer, now = _viewer(request), self.app.clock.now()
        return html("error.html", request, viewer, now, path="", status_code=refusal.status, **values)


def _viewer(request: Request) -> Viewer:
    """Return the person who sent the request, as far as that is known."""
    viewer: Viewer = getattr(request.state, "viewer", STRANGER)
    return viewer


def dashboard(app: App, program: str = render.PROGRAM) -> Starlette:
    """Return the dashboard of an app; `program` is how commands on its pages begin."""
    site = Site(app)
    application = Starlette(
        routes=list(site.routes()),
        middleware=[Middleware(TrustedProxies, app.settings.web), Middleware(Gate, site)],
        exception_handlers={404: site.no_page, 405: site.no_page},
    )
    application.state.pages, application.state.program = site.pages, program
    application.router.redirect_slashes = False  # it would redirect to the host in the request's header
    return application


def _nothing(_view: View) -> Response:
    raise NotFound("There is no page at this address.")


async def _read_form(request: Request) -> signin.Form:
    """Read a form together with the parameters in its path. Never hold more than MAX_FORM_BYTES in memory."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != FORM_TYPE:
        raise FormError(f"It must be sent as {FORM_TYPE}.", status=415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise FormError(f"It is larger than {MAX_FORM_BYTES // 1024} KB.", status=413)
    try:
        text = body.decode("ascii")
        fields = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise FormError("It is not valid, or has too many fields.") from error
    if any("\0" in text for field in fields for text in field):
        raise FormError("It contains a NUL character.")
    return signin.Form([*fields, *request.path_params.items()])
