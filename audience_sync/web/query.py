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
from audience_sync.settings.queries import events_elsewhere
from audience_sync.web.view import View

OWN = "(own)"  # in the form, the database of audience-sync
NAMES = ("event_names", "trait_names", "examples")
MAX_PREVIEWS = 2  # at a time, because each runs a statement on the company's database
PREVIEW_SECONDS = 30.0  # for each statement of a preview
_previews = threading.BoundedSemaphore(MAX_PREVIEWS)


@dataclass(slots=True)
class QueryAnswer:
    """A query laid out, in English and as SQL, or its error. `preview` is None if it was not computed."""

    error: str | None = None
    query: str | None = None
    english: str | None = None
    sql: str | None = None
    preview: dict[str, Any] | None = None
    configuration: str | None = None
    notes: list[str] = field(default_factory=list)


def query_page(view: View) -> Response:
    """Parse a query, and compute it unless the address has `check`, because then the user is still typing."""
    kind = Kind(view.choice("kind", [kind.value for kind in Kind]) or Kind.AUDIENCE)
    source = view.choice("source", [*view.app.settings.sources, OWN])
    text, name = view.text("text"), view.text("name")
    answer = None if text is None else _read(view, text, source, kind, name or "My " + kind.value)
    is_checked_only = view.text("check") is not None  # the page then replaces its answer only
    return view.html(
        "query.html",
        text=text or "",
        kind=kind.value,
        source=source,
        own=OWN,
        name=name or "",
        answer=answer,
        settings=view.app.settings,
        quoted=layout.quoted,
        **(dict.fromkeys(NAMES, ()) if is_checked_only else _names(view)),
    )


def _names(view: View) -> dict[str, Any]:
    """The names that a query can use, and examples of queries with them."""
    quoted, settings = layout.quoted, view.app.settings
    events, traits = history.event_names(view.connection), history.trait_names(view.connection)
    examples = [
        (definition.query.text.strip(), definition.source or OWN)
        for definition in settings.definitions
        if definition.kind is Kind.AUDIENCE and definition.query
    ][:3]
    mapped = [(table.event, table.source or OWN) for table in settings.tables if table.event]
    for event, source in [*mapped[:1], *[(event, OWN) for event in events[:1]]]:
        examples.append((f"event({quoted(event)}).within(30 days).count() >= 1", source))
    if number := history.number_property(view.connection):
        event, name = map(quoted, number)
        examples.append((f"event({event}).within(30 days).sum(property({name})) > 100", OWN))
    examples += [(f"trait({quoted(trait)}).exists()", OWN) for trait in traits[:1]]
    return dict(zip(NAMES, (events, traits, list(dict.fromkeys(examples))), strict=True))


def _read(view: View, text: str, source: str | None, kind: Kind, name: str) -> QueryAnswer:
    notes = []
    try:
        if source is None and (source := view.app.likely_source(text, kind)):
            notes = [f"It runs on {source}, the only database that has these tables or definitions."]
        source = None if source == OWN else source
        definition = view.app.query_definition(text, source, kind)
    except AudienceSyncError as error:
        return QueryAnswer(error=str(error))
    assert definition.query is not None  # noqa: S101  (it was made from a query)
    answer = QueryAnswer(
        query=layout.query_text(definition.query.query),
        english=english.english_text(definition.query.query),
        configuration=_configuration(text, source, kind, name),
        notes=notes + events_elsewhere(definition, "choose {source} above to read it."),
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
            "sample": [(user_id, json.loads(value or "null")) for user_id, value in computed.sample],
            "seconds": round(time.monotonic() - started, 2),
            "set_aside": computed.set_aside,
            "warnings": compute.review(app.engine, definition, now, source),
        }
    except (AudienceSyncError, Interrupted) as error:
        answer.error, answer.configuration = str(error), None
    finally:
        _previews.release()


def _configuration(text: str, source: str | None, kind: Kind, name: str) -> str:
    """The query as a table of the configuration file."""
    lines = [f"[[{kind.value}s]]", f"name = {_toml(name)}"]
    if source is not None:
        lines.append(f"source = {_toml(source)}")
    query = text.replace("\r\n", "\n").strip()
    is_readable = all(letter.isprintable() or letter in "\n\t" for letter in query)
    is_literal = is_readable and "'''" not in query and not query.endswith("'")
    lines.append(f"query = '''\n{query}\n'''" if is_literal and "\n" in query else f"query = {_toml(query)}")
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    """A text as a basic string of TOML, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
