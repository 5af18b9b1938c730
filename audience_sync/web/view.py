"""A request for a page, its parameters, and its answer."""

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from audience_sync.app import App
from audience_sync.web import render
from audience_sync.web.access import Viewer

PAGE_ROWS = 50  # of a table on a page


class NotFound(Exception):  # noqa: N818  (an answer, not an error)
    """There is nothing at this address. The message says what is missing."""


class BadRequest(Exception):  # noqa: N818
    """A parameter of the address or form cannot be used. The message says which, and what would be right."""


@dataclass(frozen=True, slots=True)
class View:
    """A request for a page, with the app, a read transaction, and the person who asks."""

    request: Request
    app: App
    connection: sa.Connection
    viewer: Viewer
    now: dt.datetime = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "now", self.app.clock.now())

    def text(self, name: str) -> str | None:
        """A parameter of the address; None if it is missing or empty."""
        return self.request.query_params.get(name) or None

    def number(self, name: str) -> int | None:
        """A parameter of the address that is an id.

        Raises BadRequest if it is no whole number that the database can hold.
        """
        text = self.text(name)
        return None if text is None else row_id(name, text)

    def html(self, template: str, *, live: bool = False, **values: Any) -> Response:
        """Render a template. A live page is asked for again every few seconds while it is open."""
        page = render.environment().get_template(template)
        parameters = self.request.url.query
        path = self.request.url.path + (f"?{parameters}" if parameters else "")
        return HTMLResponse(page.render(**values, viewer=self.viewer, live=live, path=path, now=self.now))


Page = Callable[[View], Response]


def row_id(name: str, text: str) -> int:
    """Return the id in a text.

    Raises BadRequest if the text is no whole number that the database can hold.
    """
    if not (text.isascii() and text.isdecimal() and int(text[:20]) < 2**63):
        raise BadRequest(f"{name} must be a whole number, not {text[:40]!r}")
    return int(text)
