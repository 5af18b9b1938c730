"""The pages of a definition: its size over time, its query, its runs and its members."""

import csv
import datetime as dt
import io
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import anyio
import msgspec
from starlette.responses import Response, StreamingResponse

from audience_sync import history
from audience_sync.audiences.definition import Definition
from audience_sync.audiences.query import english, layout
from audience_sync.clock import duration
from audience_sync.web.overview import definition_state
from audience_sync.web.view import PAGE_ROWS, BadRequest, NotFound, View

MAX_POINTS = 20_000  # in a chart: two years of hourly runs
DRAWN_RUNS = 1_000  # in the chart for browsers without JavaScript, and for the sentence about the trend
SHOWN_RUNS, SHOWN_MEMBERS = 20, 10
TREND = dt.timedelta(days=30)
CSV_ROWS = 1_000  # in a piece of a download
# Spreadsheets read a cell that begins like this as a formula, unless it is a number.
_FORMULA = re.compile(r"(?!-?\d+(?:\.\d+)?\Z)[=+\-@\t\r\n]")


def definition(view: View) -> Response:
    row, configured, definition_id = _requested(view)
    status = history.schedule_state(view.connection, view.app.settings, view.now)
    row["state"] = definition_state(row, status)
    key, points, members = row["key"], [], None
    if definition_id is not None:
        points = history.size_rows(view.connection, definition_id, DRAWN_RUNS)
        members = history.member_page(view.connection, definition_id, limit=SHOWN_MEMBERS)
    query = configured.query if configured else None
    runs = history.run_rows(view.connection, key=key, limit=SHOWN_RUNS + 1)
    history.mark_gone(view.connection, runs)
    return view.html(
        "definition.html",
        live=row["state"] == "running",
        row=row,
        definition=configured,
        text=layout.query_text(query.query) if query else configured and configured.sql,
        english=query and english.english_text(query.query),
        runs=runs[:SHOWN_RUNS],
        is_more=len(runs) > SHOWN_RUNS,
        points=[(point["as_of"], point["member_count"]) for point in points],
        trend=trend(points),
        members=members,
        settings_path=view.app.settings.path,
        failed_run=next((run for run in status["failed_runs"] if run["key"] == key), None),
        late_since=status["late_since"].get(key),
    )


def sizes(view: View) -> Response:
    """The points of the chart, in columns; times in seconds since 1970."""
    definition_id = _requested(view)[2]
    rows = [] if definition_id is None else history.size_rows(view.connection, definition_id, MAX_POINTS)
    columns = {
        "times": [int(row["as_of"].timestamp()) for row in rows],
        "members": [row["member_count"] for row in rows],
        # In the first run everyone enters, so all other changes would be too small to see.
        "entered": [None if row["mode"] == "first" else row["entered_count"] for row in rows],
        "exited": [None if row["mode"] == "first" else row["exited_count"] for row in rows],
    }
    return Response(msgspec.json.encode(columns), media_type="application/json")


def members(view: View) -> Response:
    row, _, definition_id = _requested(view)
    prefix, at, problem, page = view.text("prefix") or "", None, None, None
    try:
        at = view.moment("at")
    except BadRequest as error:
        problem = str(error)
    if definition_id is not None and problem is None:
        after = view.text("after") or ""
        page = history.member_page(
            view.connection, definition_id, at, prefix=prefix, after=after, limit=PAGE_ROWS
        )
    return view.html(
        "members.html",
        row=row,
        members=page,
        prefix=prefix,
        at=at,
        after=view.text("after"),
        given=view.text("at") or "",
        problem=problem,
        status_code=400 if problem else 200,
    )


def members_csv(view: View) -> Response:
    """All members, now or at a past time, as CSV. Each piece is read in its own transaction while the answer is sent."""
    row, _, definition_id = _requested(view)
    at = view.moment("at")
    rows: Iterator[tuple[str, str | None]] = iter(())
    if definition_id is not None and view.request.method != "HEAD":
        rows = history.member_rows(view.app.engine, definition_id, at)
    name = f"{row['key']}-{(at or view.now).astimezone(dt.UTC):%Y-%m-%dT%H%MZ}.csv"
    return StreamingResponse(
        _in_turn(_csv(rows, has_values=row["kind"] == "trait"), view.request.app.state.pages),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


async def _in_turn(pieces: Iterator[str], limiter: anyio.CapacityLimiter) -> AsyncIterator[str]:
    """Make the pieces within the limit of pages, so that many downloads do not take the processor from the calls."""
    while piece := await anyio.to_thread.run_sync(next, pieces, "", limiter=limiter):
        yield piece


def _csv(rows: Iterator[tuple[str, str | None]], *, has_values: bool) -> Iterator[str]:
    yield "user_id,value\r\n" if has_values else "user_id\r\n"
    while piece := list(itertools.islice(rows, CSV_ROWS)):
        text = io.StringIO()
        csv.writer(text).writerows(
            (cell(user_id), cell(_plain(value))) if has_values else (cell(user_id),)
            for user_id, value in piece
        )
        yield text.getvalue()


def _plain(value: str | None) -> str:
    """A trait's value as text: a string without quotes, anything else as JSON."""
    parsed = None if value is None else json.loads(value)
    return parsed if isinstance(parsed, str) else value or ""


def cell(text: str) -> str:
    """The text of a cell. An apostrophe before a formula keeps a spreadsheet from running it."""
    return f"'{text}" if _FORMULA.match(text) else text


def trend(points: Sequence[dict[str, Any]]) -> str:
    """A sentence that compares the size after the last run with the size up to 30 days, or one run, before."""
    if len(points) < 2:
        return ""
    last = points[-1]
    first = next(point for point in points if point["as_of"] >= last["as_of"] - TREND)
    if first is last:
        first = points[-2]
    before, after = first["member_count"], last["member_count"]
    span = duration((last["as_of"] - first["as_of"]).total_seconds())
    if before == after:
        return f"The same size as {span} before: {after:,} members."
    word = "Grew" if after > before else "Shrank"
    return f"{word} from {before:,} to {after:,} members in {span}."


def _requested(view: View) -> tuple[dict[str, Any], Definition | None, int | None]:
    """The requested definition from `history` and from the configuration, and its id; None if it was never synced."""
    key = view.request.path_params["key"]
    asked = (view.app.settings, view.now, key)
    rows = [] if "\0" in key else history.definitions(view.connection, *asked, counted=False)
    if not rows:
        raise NotFound(f"There is no definition with the key {key[:200]}. The overview lists all of them.")
    configured = next((one for one in view.app.settings.definitions if one.key == key), None)
    return rows[0], configured, history.definition_id(view.connection, key)
