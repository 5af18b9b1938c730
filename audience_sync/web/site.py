"""The dashboard as an ASGI application: its routes, limits, errors and headers."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
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
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audience_sync import logs
from audience_sync.app import App
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, DatabaseError, DatabaseLocked, unexpected
from audience_sync.web import actions, render, signin
from audience_sync.web.access import (
    STRANGER,
    Access,
    TrustedProxies,
    Viewer,
    comes_from_other_site,
    is_visit,
    local_path,
)
from audience_sync.web.definitions import definition, members, members_csv, sizes
from audience_sync.web.overview import overview
from audience_sync.web.query import query_page
from audience_sync.web.queue import calls_page, deliveries_page, request_page, requests_page
from audience_sync.web.render import link
from audience_sync.web.runs import changes, run, runs
from audience_sync.web.schedule import schedule_page
from audience_sync.web.users import user_page
from audience_sync.web.view import OVERVIEW, FormError, NotFound, Page, Refusal, View, here, html

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
    "/": overview,
    "/definitions/{key}": definition,
    "/definitions/{key}/members": members,
    "/definitions/{key}/members.csv": members_csv,
    "/definitions/{key}/sizes.json": sizes,
    "/runs": runs,
    "/runs/{run_id}": run,
    "/runs/{run_id}/changes": changes,
    "/actions": actions.actions,
    "/user": user_page,
    "/deliveries": deliveries_page,
    "/calls": calls_page,
    "/requests": requests_page,
    "/requests/{request_id}": request_page,
    "/schedule": schedule_page,
    "/query": query_page,
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

        app, request = self._app, Request(scope) if scope["type"] == "http" else None
        if request is not None and (refusal := self._site.access.refusal(request)):
            app = self._site.error(request, 403, "Not allowed", refusal)
        await app(scope, receive, send_with_headers)


class Site:
    """The pages and forms of an app."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.access = Access(app.settings.web.require_users())
        self.pages = anyio.CapacityLimiter(MAX_PAGES)
        self._in_progress = Counter[anyio.CapacityLimiter]()  # forms

    def routes(self) -> list[Route | Mount]:
        pages = PAGES | {"/login": signin.sign_in_page}
        sign_in = partial(signin.sign_in, self.access, signin.Throttle(self.app.clock))
        forms: dict[str, signin.FormHandler] = {
            path: partial(actions.act, action) for path, action in actions.ACTIONS.items()
        }
        acting = anyio.CapacityLimiter(MAX_ACTIONS)
        limiters = {"/login": anyio.CapacityLimiter(MAX_SIGN_INS)}
        forms |= {"/login": sign_in, "/logout": signin.sign_out}
        return [
            *(Route(path, partial(self._show, page), methods=["GET"]) for path, page in pages.items()),
            *(
                Route(path, partial(self._post, form, limiters.get(path, acting)), methods=["POST"])
                for path, form in forms.items()
            ),
            Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
        ]

    async def _show(self, page: Page, request: Request) -> Response:
        work = partial(self._guarded, request, partial(self._page, page, request))
        return await anyio.to_thread.run_sync(work, limiter=self.pages)

    def _page(self, page: Page, request: Request) -> Response:
        """Make a page in its own read transaction, which locks nothing until the page reads something."""
        viewer, is_use = signin.viewer(self.app, self.access, request)
        request.state.viewer = viewer
        if not viewer.may_read and page is not signin.sign_in_page:
            return self._ask_to_sign_in(request)
        with engines.read(self.app.engine, signin.WAIT_SECONDS) as connection:
            answer = page(View(request, self.app, connection, viewer))
        if is_use:
            signin.record_use(self.app, request)
        return answer

    def _ask_to_sign_in(self, request: Request) -> Response:
        if comes_from_other_site(request) and is_visit(request):
            # Our page asks again, and the browser then sends the session's cookie.
            path = local_path(here(request))
            return html("visit.html", request, STRANGER, self.app.clock.now(), path=path)
        return RedirectResponse(link("/login", next=here(request)), 303)

    async def _post(
        self, action: signin.FormHandler, limiter: anyio.CapacityLimiter, request: Request
    ) -> Response:
        try:
            async with asyncio.timeout(FORM_SECONDS):
                form = await _read_form(request)
        except ClientDisconnect:
            return Response(status_code=499)  # the sender is gone
        except TimeoutError:
            return self._unread(request, FormError(408, "It took too long to arrive. Send it again."))
        except FormError as error:
            return self._unread(request, error)
        if self._in_progress[limiter] >= limiter.total_tokens + MAX_WAITING:
            return self._unread(
                request, FormError(429, "Too many forms are waiting. Try again in 10 seconds.")
            )
        work = partial(self._guarded, request, partial(self._action, action, request, form))
        self._in_progress[limiter] += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=limiter)
        finally:
            self._in_progress[limiter] -= 1

    def _action(self, action: signin.FormHandler, request: Request, form: signin.Form) -> Response:
        request.state.viewer = viewer = signin.viewer(self.app, self.access, request)[0]
        if not viewer.may_read and request.url.path != "/login":
            return RedirectResponse("/login", 303)
        return action(self.app, viewer, request, form)

    def _unread(self, request: Request, error: FormError) -> Response:
        answer = self.error(request, error.status, error.title, str(error))
        answer.headers.update({"Connection": "close", "Retry-After": "10"})  # the rest is not read
        return answer

    def _guarded(self, request: Request, work: Callable[[], Response]) -> Response:
        """Do the work for a request, and turn any error into a page."""
        logged = None
        try:
            return work()
        except Refusal as error:
            return self.error(request, error.status, error.title, str(error), error.way_on)
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
        way_on = ("/actions", "See whether it was done") if is_action else ("/", OVERVIEW)
        return self.error(request, status, title, message, way_on)

    async def no_page(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException) or error.status_code == 404:
            return await self._show(_nothing, request)
        takes = (error.headers or {}).get("Allow", "other methods")
        request.state.viewer = STRANGER if self.access.users else Viewer()
        answer = self.error(request, 405, "Method not allowed", f"This address accepts {takes} only.")
        answer.headers["Allow"] = takes
        return answer

    def error(
        self,
        request: Request,
        status: int,
        title: str,
        message: str,
        way_on: tuple[str, str] = ("/", OVERVIEW),
    ) -> Response:
        values: dict[str, Any] = {"title": title, "message": message, "way_on": way_on}
        now = self.app.clock.now()
        return html("error.html", request, _viewer(request), now, path="", status_code=status, **values)


def _viewer(request: Request) -> Viewer:
    """Return the person who sent the request, as far as that is known."""
    viewer: Viewer = getattr(request.state, "viewer", STRANGER)
    return viewer


def dashboard(app: App, program: str = render.PROGRAM) -> Starlette:
    """Return the dashboard of an app; `program` is how commands on its pages begin."""
    site = Site(app)
    application = Starlette(
        routes=site.routes(),
        middleware=[
            Middleware(TrustedProxies, app.settings.web),
            Middleware(Gate, site),
        ],
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
        raise FormError(415, f"It must be sent as {FORM_TYPE}.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise FormError(413, f"It is larger than {MAX_FORM_BYTES // 1024} KB.")
    try:
        fields = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError as error:
        raise FormError(400, "It is not valid, or has too many fields.") from error
    if any("\0" in text for field in fields for text in field):
        raise FormError(400, "It contains a NUL character.")
    return signin.Form([*fields, *request.path_params.items()])
