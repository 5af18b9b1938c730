"""The page of the schedule: the runs of the last 24 hours, and those due in the next 24."""

from starlette.responses import Response

from audience_sync import history
from audience_sync.web.view import View

SHOWN_LINES = 200  # of each day


def schedule_page(view: View) -> Response:
    past = history.past_day(view.connection, view.now)
    coming = history.next_day(view.connection, view.app.settings, view.now)
    return view.html(
        "schedule.html",
        live=any(line["status"] == "running" for line in past),
        past=past[:SHOWN_LINES],
        coming=coming[:SHOWN_LINES],
        more_past=len(past) - SHOWN_LINES,
        more_coming=len(coming) - SHOWN_LINES,
        daemon=history.daemon_state(view.connection, view.now),
    )
