"""The commands for writing queries: preview, explain."""

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audience_sync.cli import lazy, output, session
from audience_sync.cli.session import Json
from audience_sync.clock import duration
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    from audience_sync.app import App
    from audience_sync.audiences.definition import Definition

MAX_BYTES = 100_000
UNQUOTED_NAME = re.compile(r"\b(event|entity|trait|property|context)\(\s*(?!parent\s*:)[^'\"\s)]")
SQL = re.compile(r"\s*(select|with)\s", re.IGNORECASE)
QUOTES_ADVICE = (
    "The shell may have removed quotes: put the whole query into single quotes and its strings into double quotes, or "
    "pass it on standard input, with - in its place."
)
DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}  # those that run queries

Query = Annotated[
    str,
    typer.Argument(
        metavar="QUERY", help="A query, a file that contains one, or - to read it from standard input."
    ),
]
KeyOrQuery = Annotated[
    str,
    typer.Argument(
        metavar="KEY_OR_QUERY",
        help="A definition's key, a query, a file that contains one, or - for standard input.",
    ),
]
Source = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The source to run it on. Default: the database of audience-sync."),
]
IsTrait = Annotated[bool, typer.Option("--trait", help="The query is a trait's: it gives each user a value.")]


def preview(
    context: typer.Context,
    query: Query,
    source: Source = None,
    as_of: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Compute as of this time (ISO 8601) instead of now."),
    ] = None,
    is_trait: IsTrait = False,
    as_json: Json = False,
) -> None:
    """Compute a query without configuring it.

    Prints the number of users, a sample of them, and warnings about names that were never seen. Stores and sends
    nothing.

        audience-sync preview "event('Order Completed').within(30 days).count() >= 1"
        audience-sync preview big_spenders.txt --source shop
    """
    _require_whole(context)
    with session.open_app(context) as app, session.stoppable(app):
        app.load_keys()
        if any(definition.key == query for definition in app.settings.definitions):
            raise ConfigError(
                f"{query} is the key of a definition, and preview takes a query: `audience-sync plan {query}` computes "
                f"the definition, `audience-sync explain {query}` shows it."
            )
        definition = _definition(app, query, source, is_trait=is_trait)
        now = app.clock.now()
        moment = session.parse_time(as_of) or now
        if moment > now:
            raise ConfigError(f"{as_of} is in the future: give a time that has passed.")
        started = time.monotonic()
        computed = lazy.plan.preview(app.engine, definition, moment, app.source(definition), now, app.stop)
        seconds = time.monotonic() - started
        warnings = _elsewhere(definition)
        warnings += lazy.compute.review(app.engine, definition, moment, app.source(definition))
    sample = {user: json.loads(value) if value else None for user, value in computed.sample}
    if as_json:
        output.document(
            {
                "member_count": computed.member_count,
                "sample": sample if is_trait else list(sample),
                "seconds": round(seconds, 3),
                "warnings": warnings,
            }
        )
        return
    output.line(f"{output.plural(computed.member_count, 'user')}, computed in {duration(seconds)}")
    for user, value in sample.items():
        output.line(f"  {user}\t{json.dumps(value, ensure_ascii=False)}" if is_trait else f"  {user}")
    if computed.member_count > len(sample):
        output.line("  …")
    for reason, count in computed.set_aside.items():
        output.line(f"Set aside: {output.plural(count, 'row')} ({reason.replace('_', ' ')})")
    for warning in warnings:
        output.line(f"Warning: {warning}{'' if warning.endswith('?') else '.'}")


def explain(
    context: typer.Context,
    key_or_query: KeyOrQuery,
    source: Source = None,
    is_trait: IsTrait = False,
    as_json: Json = False,
) -> None:
    """Show a query in plain English, laid out, and the SQL that runs.

    For a definition in SQL, shows the SQL that runs.

        audience-sync explain "event('Order Completed').count() >= 1"
        audience-sync explain ordered_recently
    """
    _require_whole(context)
    with session.open_app(context) as app, session.stoppable(app):
        app.load_keys()
        configured = {definition.key: definition for definition in app.settings.definitions}
        definition = configured.get(key_or_query)
        if definition is None:
            definition = _definition(app, key_or_query, source, is_trait=is_trait)
        sql = lazy.compute.sql_of(app.engine, definition, app.clock.now(), app.source(definition))
        dialect = (app.source(definition) or app.engine).dialect.name
    query, english = None, None
    if definition.query is not None:
        query = lazy.layout.query_text(definition.query.query)
        english = lazy.english.english_text(definition.query.query)
    if as_json:
        output.document({"query": query, "english": english, "sql": sql, "dialect": dialect})
        return
    if query is not None:
        for sentence in _elsewhere(definition):
            output.line(f"Note: {sentence}.\n")
        output.line(f"{english}\n\n{query}\n\nThe SQL that runs on {DATABASES[dialect]}:\n")
    output.line(sql)


def _elsewhere(definition: "Definition") -> list[str]:
    from audience_sync.settings import queries  # noqa: PLC0415  (it takes time to import)

    return queries.events_elsewhere(definition, "--source {source} reads it")


def _definition(app: "App", query: str, source: str | None, *, is_trait: bool) -> "Definition":
    kind: Any = lazy.definition.Kind
    text = _read(query)
    try:
        return app.query_definition(text, source, kind.TRAIT if is_trait else kind.AUDIENCE)
    except ConfigError as error:
        message = f"The query cannot be used: {error}"
        if not is_trait and _is_trait(app, text, source):
            message += "\nIt is a valid query of a trait: add --trait."
        if text is query and UNQUOTED_NAME.search(query):
            message += f"\n{QUOTES_ADVICE}"
        raise ConfigError(message) from error


def _require_whole(context: typer.Context) -> None:
    """Refuse a query that the shell split at its spaces."""
    if context.args:
        raise ConfigError(
            f"The shell split the query into {len(context.args) + 1} arguments; the second is {context.args[0]!r}. "
            f"{QUOTES_ADVICE}"
        )


def _is_trait(app: "App", text: str, source: str | None) -> bool:
    with contextlib.suppress(ConfigError):
        app.query_definition(text, source, lazy.definition.Kind.TRAIT)
        return True
    return False


def _read(query: str) -> str:
    """Return the query itself, or what a file or standard input contains."""
    if not query.strip():
        raise ConfigError("The query is empty.")
    if SQL.match(query):
        raise ConfigError(
            "This is SQL, not a query: put it into the configuration as `sql` of a definition, and run "
            "`audience-sync plan KEY`."
        )
    if query == "-":
        raw = sys.stdin.buffer.read(MAX_BYTES)
    elif len(query) < 1_000 and "\n" not in query and "(" not in query:
        path = Path(query)
        try:
            raw = path.read_bytes()[:MAX_BYTES]
        except OSError as error:
            raise ConfigError(
                f"{query} is neither a query nor the key of a definition, and no such file can be read: "
                f"{error.strerror}."
            ) from error
    else:
        return query
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("The query is not UTF-8: save it as UTF-8.") from error
