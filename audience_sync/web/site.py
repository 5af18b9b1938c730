"""The dashboard as an ASGI application: its routes, and what every answer has in common."""

import datetime as dt
import logging
from functools import partial
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audience_sync.app import App
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, DatabaseError, unexpected
from audience_sync.web import render
from audience_sync.web.access import Viewer
from audience_sync.web.overview import overview
from audience_sync.web.view import BadRequest, NotFound, Page, View

log = logging.getLogger(__name__)

MAX_PAGES = 4  # that are made at a time, so that pages do not take the processor from the calls
PAGES: dict[str, Page] = {
    "/": overview,
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


def dashboard(app: App) -> Starlette:
    """Return the dashboard of an app."""
    limiter = anyio.CapacityLimiter(MAX_PAGES)

    async def answer(page: Page, request: Request) -> Response:
        return await anyio.to_thread.run_sync(partial(_answer, app, page, request), limiter=limiter)

    return Starlette(
        routes=[
            *(Route(path, partial(answer, page), methods=["GET"]) for path, page in PAGES.items()),
            Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
        ],
        middleware=[Middleware(SafeHeaders)],
        exception_handlers={404: _no_page, 405: _no_page},
    )


def _answer(app: App, page: Page, request: Request) -> Response:
    """Make a page in a read transaction of its own."""
    try:
        with engines.read(app.engine) as connection:
            return page(View(request, app, connection, Viewer()))
    except NotFound as error:
        return _error_page(404, "There is nothing here", str(error))
    except BadRequest as error:
        return _error_page(400, "This address cannot be used", str(error))
    except DatabaseError as error:
        return _error_page(503, "The database cannot be used", str(error))
    except AudienceSyncError as error:
        return _error_page(400, "This cannot be shown", str(error))
    except Exception as error:  # noqa: BLE001  (a bug: never a traceback)
        log.error("page failed path=%s error=%s", request.url.path, unexpected(error))  # noqa: TRY400
        return _error_page(500, "An unexpected error", f"{unexpected(error)}. Please report it.")


async def _no_page(_request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        return _error_page(405, "This address cannot be used so", "It only shows something.")
    return _error_page(404, "There is nothing here", "The address leads to no page.")


def _error_page(status: int, title: str, message: str) -> Response:
    page = render.environment().get_template("error.html")
    values = {"title": title, "message": message, "viewer": Viewer(), "live": False, "path": "/"}
    return HTMLResponse(page.render(**values, now=dt.datetime.now(dt.UTC)), status)
