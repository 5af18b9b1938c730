"""The first page: what needs a person, how each definition stands, and how fast each lane sends."""

from starlette.responses import Response

from audience_sync import history
from audience_sync.web.view import View


def overview(view: View) -> Response:
    status = history.status(view.connection, view.app.settings, view.now)
    definitions = history.definitions(view.connection, view.app.settings, view.now)
    sizes = history.recent_sizes(view.connection)
    is_busy = bool(status["deliverer"] or status["bulk_job"]) or any(
        row["last_run"] and row["last_run"]["status"] == "running" for row in definitions
    )
    return view.html("overview.html", live=is_busy, status=status, definitions=definitions, sizes=sizes)
