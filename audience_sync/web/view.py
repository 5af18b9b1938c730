"""A request for a page, its parameters, and its answer."""

import datetime as dt
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from audience_sync.app import App
from audience_sync.web import record, render
from audience_sync.web.access import Viewer

OVERVIEW = ("/", "Go to the overview")  # an address, and the text of its link
PAGE_ROWS = 50  # of a table on a page


class Refusal(Exception):  # noqa: N818  (an answer, not an error)
    """Refuses a request. The message says why, and what to do; `way_on` is where to go instead."""

    status, title = 400, "This address cannot be used"

    def __init__(
        self, message: str, way_on: tuple[str, str] = OVERVIEW, *, status: int = 0, title: str = ""
    ) -> None:
        super().__init__(message)
        self.way_on, self.status, self.title = way_on, status or self.status, title or self.title


class BadRequest(Refusal):
    """A parameter of the address or form is not valid. The message says which, and what is expected."""


class NotFound(Refusal):
    """The address has no page, or its run or definition does not exist. The message says which."""

    status, title = 404, "Not found"


class Forbidden(Refusal):
    """The person who sent the request may not do this."""

    status, title = 403, "Not allowed"


class FormError(Refusal):
    """A form that cannot be read."""

    title = "The form cannot be read"


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
        """A parameter of the address; None if it is missing or empty.

        Raises BadRequest if it has a NUL character, which PostgreSQL cannot compare.
        """
        text = self.request.query_params.get(name) or None
        if text and "\0" in text:
            raise BadRequest(f"{name} contains a NUL character, which no text in the database has.")
        return text

    def choice(self, name: str, known: Collection[str]) -> str | None:
        """A parameter of the address that is one of the known words.

        Raises BadRequest if it is another word.
        """
        text = self.text(name)
        if text is not None and text not in known:
            raise BadRequest(f"{name} must be one of {', '.join(known)}, not {text[:40]!r}.")
        return text

    def number(self, name: str) -> int | None:
        """A parameter of the address that is an id.

        Raises BadRequest if it is not a whole number that the database can store.
        """
        text = self.text(name)
        return None if text is None else row_id(name, text)

    def path_id(self, name: str) -> int:
        """An id in the path. Raises BadRequest as `number` does."""
        return row_id(name, self.request.path_params[name])

    def moment(self, name: str) -> dt.datetime | None:
        """A parameter of the address that is a date or a time, in UTC unless it has an offset.

        Raises BadRequest if it is neither.
        """
        text = self.text(name)
        if text is None:
            return None
        try:
            given = dt.datetime.fromisoformat(text.strip())
            return (given if given.tzinfo else given.replace(tzinfo=dt.UTC)).astimezone(dt.UTC)
        except (ValueError, OverflowError):
            raise BadRequest(
                f"{name} must be a date or a time, such as 2026-05-01 or 2026-05-01T12:00Z, not {text[:40]!r}"
            ) from None

    def html(self, template: str, *, live: bool = False, **values: Any) -> Response:
        """Render a template. An open page reloads its content every few seconds if it is `live`."""
        notice = self.number("notice")
        if notice is not None:
            values["notice"] = record.find_action(self.connection, notice, self.viewer.name or "")
        values["is_outdated"] = self.viewer.may_read and self.app.settings.have_changed()
        return html(template, self.request, self.viewer, self.now, live=live, **values)


Page = Callable[[View], Response]


def html(
    template: str,
    request: Request,
    viewer: Viewer,
    now: dt.datetime,
    *,
    path: str | None = None,
    status_code: int = 200,
    **values: Any,
) -> Response:
    """Render a template for a person. `path`: the page's address, if that is not the request's."""
    program = request.app.state.program if "app" in request.scope else render.PROGRAM
    path = here(request) if path is None else path
    common = {"viewer": viewer, "now": now, "program": program, "path": path}
    page = render.environment().get_template(template)
    return HTMLResponse(page.render(common | values), status_code)


def here(request: Request) -> str:
    """Return the path and query of a request, without the notice that was shown there."""
    url = request.url.remove_query_params("notice")
    return f"{url.path}?{url.query}" if url.query else url.path


def row_id(name: str, text: str) -> int:
    """Return the id in a text.

    Raises BadRequest if the text is not a whole number that the database can store.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise BadRequest(f"{name} must be a whole number, not {text[:40]!r}")
    return int(text)
