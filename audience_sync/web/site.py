"""The dashboard as an ASGI application: its routes, and what every answer has in common."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audience_sync.app import App
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, DatabaseError, unexpected
from audience_sync.web import actions, signin
from audience_sync.web.access import (
    STRANGER,
    Access,
    TrustedProxies,
    Viewer,
    comes_by_link,
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
from audience_sync.web.view import BadRequest, Forbidden, NotFound, Page, View, here, html

log = logging.getLogger(__name__)

MAX_PAGES = 4  # that are made at a time, so that pages do not take the processor from the calls
MAX_SIGN_INS = 2  # at a time; each takes 32 MB
MAX_WAITING = 20  # sign-ins that wait for others
MAX_FORM_BYTES = 64 * 1024
MAX_FIELDS = 5_000
FORM_SECONDS = 20.0  # to receive a form
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


class Refused(Exception):  # noqa: N818  (an answer, not an error)
    """A form that is not read."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SafeHeaders:
    """Adds HEADERS to every answer; pages are not stored by browsers or proxies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                is_static = scope["path"].startswith("/static/")
                headers = HEADERS | {"Cache-Control": "max-age=86400" if is_static else "no-store"}
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in headers.items()),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Gate:
    """Refuses requests that are not for this dashboard, or come from other sites."""

    def __init__(self, app: ASGIApp, site: "Site") -> None:
        self._app, self._site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._site.access.refusal(Request(scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await self._site.error(STRANGER, 403, "This is refused", refusal)(scope, receive, send)


class Site:
    """The pages and forms of an app."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.access = Access.configured(app.settings.web)
        self._throttle = signin.Throttle(app.clock)
        self._pages = anyio.CapacityLimiter(MAX_PAGES)
        self._sign_ins = anyio.CapacityLimiter(MAX_SIGN_INS)

    def routes(self) -> list[Route | Mount]:
        pages = PAGES | {"/login": signin.sign_in_page}
        return [
            *(Route(path, partial(self._show, page), methods=["GET"]) for path, page in pages.items()),
            Route("/login", self._sign_in, methods=["POST"]),
            Route("/logout", partial(self._post, signin.sign_out), methods=["POST"]),
            *(
                Route(path, partial(self._post, partial(actions.act, action)), methods=["POST"])
                for path, action in actions.ACTIONS.items()
            ),
            Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
        ]

    async def _show(self, page: Page, request: Request) -> Response:
        return await anyio.to_thread.run_sync(self._guarded, self._page, page, request, limiter=self._pages)

    def _page(self, page: Page, request: Request) -> Response:
        """Make a page in a read transaction of its own."""
        with engines.read(self.app.engine) as connection:
            viewer, is_use = signin.viewer(self.app, self.access, connection, request)
            request.state.viewer = viewer
            if not viewer.may_read and page is not signin.sign_in_page:
                return self._ask_to_sign_in(request)
            answer = page(View(request, self.app, connection, viewer))
        if is_use:
            signin.record_use(self.app, request)
        return answer

    def _ask_to_sign_in(self, request: Request) -> Response:
        if comes_by_link(request) and is_visit(
            request
        ):  # the next request, from our own page, has the session
            return html("visit.html", STRANGER, local_path(here(request)), self.app.clock.now())
        return RedirectResponse(link("/login", next=here(request)), 303)

    async def _post(self, action: Callable[..., Response], request: Request) -> Response:
        form = await self._form(request)
        if isinstance(form, Response):
            return form
        work = partial(self._guarded, self._action, action, request, form)
        return await anyio.to_thread.run_sync(work, limiter=self._pages)

    def _action(self, action: Callable[..., Response], request: Request, form: signin.Form) -> Response:
        with engines.read(self.app.engine) as connection:
            viewer, _ = signin.viewer(self.app, self.access, connection, request)
        request.state.viewer = viewer
        if not viewer.may_read:
            return RedirectResponse("/login", 303)
        return action(self.app, viewer, request, form)

    async def _sign_in(self, request: Request) -> Response:
        form = await self._form(request)
        if isinstance(form, Response):
            return form
        if self._sign_ins.statistics().tasks_waiting >= MAX_WAITING:
            answer = self.error(STRANGER, 429, "Too many people sign in at once", "Try again in 10 seconds.")
            answer.headers["Retry-After"] = "10"
            return answer
        request.state.viewer = STRANGER
        work = partial(signin.sign_in, self.app, self.access, self._throttle)
        return await anyio.to_thread.run_sync(self._guarded, work, request, form, limiter=self._sign_ins)

    async def _form(self, request: Request) -> signin.Form | Response:
        try:
            async with asyncio.timeout(FORM_SECONDS):
                return await _read_form(request)
        except TimeoutError:
            answer = self.error(STRANGER, 408, "The form took too long", "Send it again.")
        except Refused as refused:
            answer = self.error(STRANGER, refused.status, "The form cannot be read", str(refused))
        except ClientDisconnect:
            return Response(status_code=499)  # the sender is gone
        answer.headers["Connection"] = "close"  # the rest is not read
        return answer

    def _guarded(self, work: Callable[..., Response], *arguments: object) -> Response:
        """Do the work for a request, which is among the arguments; answer with a page whatever happens."""
        request = next(each for each in arguments if isinstance(each, Request))
        try:
            return work(*arguments)
        except NotFound as error:
            status, title, message = 404, "There is nothing here", str(error)
        except BadRequest as error:
            status, title, message = 400, "This address cannot be used", str(error)
        except Forbidden as error:
            status, title, message = 403, "This is refused", str(error)
        except DatabaseError as error:
            status, title, message = 503, "The database cannot be used", str(error)
        except AudienceSyncError as error:
            status, title, message = 400, "This cannot be shown", str(error)
        except Exception as error:  # noqa: BLE001  (a bug: never a traceback)
            what = unexpected(error)
            log.error("page failed path=%s error=%s", request.url.path, what)  # noqa: TRY400
            status, title, message = 500, "An unexpected error", f"{what}. Please report it."
        return self.error(getattr(request.state, "viewer", STRANGER), status, title, message)

    async def no_page(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException) or error.status_code == 404:
            return await self._show(_nothing, request)
        takes = (error.headers or {}).get("Allow", "other methods")
        viewer = STRANGER if self.access.users else Viewer()
        answer = self.error(viewer, 405, "This address cannot be used so", f"It takes {takes} only.")
        answer.headers["Allow"] = takes
        return answer

    def error(self, viewer: Viewer, status: int, title: str, message: str) -> Response:
        return html(
            "error.html", viewer, "/", self.app.clock.now(), status_code=status, title=title, message=message
        )


def dashboard(app: App) -> Starlette:
    """Return the dashboard of an app."""
    site = Site(app)
    application = Starlette(
        routes=site.routes(),
        middleware=[
            Middleware(SafeHeaders),
            Middleware(TrustedProxies, app.settings.web),
            Middleware(Gate, site),
        ],
        exception_handlers={404: site.no_page, 405: site.no_page},
    )
    application.router.redirect_slashes = False  # it would redirect to the host that the request names
    return application


def _nothing(_view: View) -> Response:
    raise NotFound("The address leads to no page.")


async def _read_form(request: Request) -> signin.Form:
    """Read a form together with the parameters of its address. Never hold more than MAX_FORM_BYTES in memory."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != (
        "application/x-www-form-urlencoded"
    ):
        raise Refused(415, "It must be sent as application/x-www-form-urlencoded.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise Refused(413, f"It is larger than {MAX_FORM_BYTES // 1024} KB.")
    try:
        fields = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError as error:
        raise Refused(400, "It is not valid, or has too many fields.") from error
    if any("\0" in text for field in fields for text in field):
        raise Refused(400, "It holds a NUL character.")
    return signin.Form([*fields, *request.path_params.items()])
