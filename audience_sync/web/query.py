"""The page for writing queries: errors while the user types, a preview, and the block for the configuration."""

import json
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.responses import Response

from audience_sync import history
from audience_sync.audiences import compute, plan
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.query import english, layout
from audience_sync.errors import AudienceSyncError, Interrupted
from audience_sync.web.view import View

MAX_PREVIEWS = 2  # at a time, because each runs a statement on the company's database
PREVIEW_SECONDS = 30.0  # for each statement of a preview
_previews = threading.BoundedSemaphore(MAX_PREVIEWS)


@dataclass(slots=True)
class QueryAnswer:
    """A query laid out, in English and as SQL, or its error. `preview` is None if the query was not computed."""

    error: str | None = None
    query: str | None = None
    english: str | None = None
    sql: str | None = None
    preview: dict[str, Any] | None = None
    configuration: str | None = None
    notes: list[str] = field(default_factory=list)


def query_page(view: View) -> Response:
    """Parse a query, and compute it unless the address has `check`: then the user is still typing."""
    kind = Kind(view.choice("kind", [kind.value for kind in Kind]) or Kind.AUDIENCE)
    text, source, name = (
        view.text("text"),
        view.choice("source", list(view.app.settings.sources)),
        view.text("name"),
    )
    answer = None
    if text is not None:
        answer = _read(view, text, source, kind, name or "My " + kind.value)
    is_checked_only = view.text("check") is not None  # the page then replaces its answer only
    return view.html(
        "query.html",
        text=text or "",
        kind=kind.value,
        source=source,
        name=name or "",
        answer=answer,
        settings=view.app.settings,
        quoted=layout.quoted,
        event_names=[] if is_checked_only else history.event_names(view.connection),
        trait_names=[] if is_checked_only else history.trait_names(view.connection),
    )


def _read(view: View, text: str, source: str | None, kind: Kind, name: str) -> QueryAnswer:
    try:
        definition = view.app.query_definition(text, source, kind)
    except AudienceSyncError as error:
        return QueryAnswer(error=str(error))
    assert definition.query is not None  # noqa: S101  (it was made from a query)
    answer = QueryAnswer(
        query=layout.query_text(definition.query.query),
        english=english.english_text(definition.query.query),
        configuration=_configuration(text, source, kind, name),
    )
    if view.text("check") is None:
        if view.request.headers.get("Sec-Fetch-Site", "none") in {"none", "same-origin"}:
            _compute(view, definition, answer)
        else:
            answer.notes.append("The link came from another site, so nothing was computed: press Preview.")
    return answer


def _compute(view: View, definition: Definition, answer: QueryAnswer) -> None:
    """Compute the query as `audience-sync preview` does, unless too many are being computed."""
    if not _previews.acquire(blocking=False):
        answer.notes.append(f"{MAX_PREVIEWS} previews are being computed: try again in a moment.")
        return
    app, now = view.app, view.now
    definition = replace(definition, timeout_seconds=min(definition.timeout_seconds, PREVIEW_SECONDS))
    try:
        source = app.source(definition)
        answer.sql = compute.sql_of(app.engine, definition, now, source)
        started = time.monotonic()
        computed = plan.preview(app.engine, definition, now, source, now, app.stop)
        answer.preview = {
            "member_count": computed.member_count,
            "sample": [
                (user_id, None if value is None else json.loads(value)) for user_id, value in computed.sample
            ],
            "seconds": round(time.monotonic() - started, 2),
            "set_aside": computed.set_aside,
            "warnings": compute.review(app.engine, definition, now, source),
        }
    except (AudienceSyncError, Interrupted) as error:
        answer.error = str(error)
    finally:
        _previews.release()


def _configuration(text: str, source: str | None, kind: Kind, name: str) -> str:
    """The query as a table of the configuration file."""
    lines = [f"[[{kind.value}s]]", f"name = {_toml(name)}"]
    if source is not None:
        lines.append(f"source = {_toml(source)}")
    query = text.replace("\r\n", "\n").strip()
    is_literal = (
        "'''" not in query
        and not query.endswith("'")
        and all(letter.isprintable() or letter in "\n\t" for letter in query)
    )
    lines.append(f"query = '''\n{query}\n'''" if is_literal and "\n" in query else f"query = {_toml(query)}")
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    """A text as a basic string of TOML, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
