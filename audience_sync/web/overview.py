"""The overview: problems that need a person, the state of each definition, and the pace of each lane."""

import datetime as dt
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

from audience_sync import history
from audience_sync.app import App
from audience_sync.clock import duration
from audience_sync.queue import split
from audience_sync.queue.destination import other_destination
from audience_sync.web.view import View


def overview(view: View) -> Response:
    settings = view.app.settings
    status = history.attention(view.connection, settings, view.now)
    problems = history.problems(view.connection, settings, status, view.now)
    definitions = history.definitions(view.connection, settings, view.now, counted=False)
    backlogs, recent = history.backlogs(view.connection), history.recent_runs(view.connection)
    history.mark_gone(view.connection, [row["last_run"] for row in definitions if row["last_run"]])
    failing = {facts["lane"]: facts for kind, facts in problems if kind == "lane"}
    for row in definitions:
        row.update(recent.get(row["key"], {"sizes": [], "pending_count": 0, "held_count": 0}))
        row["state"] = definition_state(row, status)
    is_busy = bool(status["deliverer"] or status["bulk_job"]) or any(
        row["state"] == "running" for row in definitions
    )
    return view.html(
        "overview.html",
        live=is_busy,
        status=status,
        problems=problems,
        definitions=definitions,
        lanes=list(_lanes(view.app, status, backlogs, failing)),
        held_count=backlogs["held"],
        recent=recent,
        other_destination=other_destination,
        settings_path=settings.path,
        most=history.MAX_COUNTED,
        most_of_lane=history.MAX_COUNTED_OF_LANE,
    )


def definition_state(row: dict[str, Any], status: dict[str, Any]) -> str:
    """The state of a definition on pages, where failed and late take precedence over running and enabled."""
    if row["state"] != "enabled":
        return str(row["state"])
    failed = {run["key"]: str(run["status"]) for run in status["failed_runs"]}
    if row["key"] in failed:
        return failed[row["key"]]
    if row["key"] in status["late_since"]:
        return "late"
    return "running" if row["last_run"] and row["last_run"]["status"] == "running" else "enabled"


def _lanes(
    app: App, status: dict[str, Any], backlogs: dict[str, int], failing: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The lanes, each with the number of its pending deliveries and the time to send them at its limit."""
    job = status["bulk_job"]
    in_job = max(0, job["row_count"] - (job["completed_count"] or 0)) if job else 0
    for name, lane in status["lanes"].items():
        pending = in_job if name == "bulk" else backlogs[name]
        if name == "identify":
            seconds = split.forecast(pending, 0, app.pace).seconds
        else:
            seconds = pending / lane["per_minute"] * 60 if lane["per_minute"] else 0.0
        about = "more than" if pending >= history.MAX_COUNTED_OF_LANE else "about"
        left = f"{about} {duration(seconds)}" if seconds >= 1 else "less than a second"
        if status["stopped"]:
            left = "stopped"
        elif name in failing:
            left = "not known while it sends nothing"
        elif not status["deliverer"]:
            left += " after sending starts"
        until = failing[name]["until"] if name in failing else None
        since = lane["since"] and dt.datetime.fromisoformat(lane["since"])
        more = {"left": left if pending else "", "since": since, "until": until}
        yield lane | {"name": name, "pending": pending} | more
