"""Actions in the dashboard: decide about held runs and deliveries, and accept the destination.

Each action needs the role `operate` and is recorded before it is done. Its result is recorded afterwards, even if the
action is refused or fails.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from audience_sync import history
from audience_sync.app import App
from audience_sync.audiences import decisions, foreign
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, Busy, ConfigError, NotApproved, unexpected
from audience_sync.queue import deliveries
from audience_sync.web import record
from audience_sync.web.access import HOW_TO_ADD_USERS, Viewer, form_refusal, local_path
from audience_sync.web.render import link
from audience_sync.web.signin import WAIT_SECONDS, Form, client_address
from audience_sync.web.view import PAGE_ROWS, BadRequest, Forbidden, View, row_id

CHUNK = 1_000  # deliveries that one transaction changes
_TARGET_ID = re.compile(r"(run|deliveries) ([0-9]{1,18})(?![0-9])", re.ASCII)
MAX_TARGET = 300  # characters of a target, or of a filter in it
# Fields of a filter, and what `history` calls them.
FILTER = {"key": "key", "action": "action", "error": "error", "user": "user_id", "run": "run_id"}


@dataclass(frozen=True, slots=True)
class FormAction:
    """An action: its recorded name, the target of a form, and the function that does it and returns the result."""

    name: str
    target: Callable[[Form], str]
    perform: Callable[[App, Form], str]


def act(action: FormAction, app: App, viewer: Viewer, request: Request, form: Form) -> Response:
    """Do the action of a form, then redirect to the form's page, which shows the result."""
    if viewer.name is None:
        raise Forbidden(
            f"Without users, the dashboard is read-only. To use its buttons, configure {HOW_TO_ADD_USERS}."
        )
    refusal = form_refusal(request, viewer, form.get("csrf", ""))
    if refusal is None and not viewer.may_operate:
        refusal = "Your role is read. This needs the role operate, which is set in [[web.users]]."
    with engines.write(app.engine, WAIT_SECONDS) as connection:
        who = (viewer.name, client_address(request))
        action_id = record.start_action(connection, *who, action.name, action.target(form), app.clock.now())
    status, result = ("refused", refusal) if refusal else _outcome(action, app, form)
    with engines.write(app.engine) as connection:
        record.end_action(connection, action_id, status, result, app.clock.now())
    if refusal:
        raise Forbidden(refusal)
    back = URL(local_path(form.get("back"))).include_query_params(notice=action_id)
    return RedirectResponse(str(back), 303)


def _outcome(action: FormAction, app: App, form: Form) -> tuple[str, str]:
    try:
        return "done", action.perform(app, form)
    except (ConfigError, NotApproved, Busy, BadRequest) as error:
        return "refused", str(error)
    except AudienceSyncError as error:
        return "failed", str(error)
    except Exception as error:  # noqa: BLE001  (a bug: never a traceback)
        return "failed", f"An unexpected error: {unexpected(error)}. Please report it."


def _run(form: Form) -> str:
    return f"run {form['run_id']}"[:MAX_TARGET]


def _approve(app: App, form: Form) -> str:
    run_id = row_id("The run id", form["run_id"])
    decisions.approve(app.engine, run_id, app.clock, app.destination)
    with engines.read(app.engine) as connection:
        [run] = history.run_rows(connection, ids=[run_id])
    counts = ", ".join(f"{run[f'{name}_count']:,} {name}" for name in ("entered", "exited", "changed"))
    sender = "The daemon" if _has_daemon(app) else "`audience-sync deliver`"
    return f"Run {run_id} of {run['key']} is committed: {counts}. {sender} sends its changes."


def _has_daemon(app: App) -> bool:
    """Return whether a daemon is running, which sends what is in the queue."""
    with engines.read(app.engine) as connection:
        return bool(history.daemon_state(connection, app.clock.now())["is_alive"])


def _reject(app: App, form: Form) -> str:
    run_id = row_id("The run id", form["run_id"])
    decisions.reject(app.engine, run_id, app.clock, WAIT_SECONDS)
    return f"Run {run_id} is rejected. None of its changes are sent, and the next run computes again."


def _deliveries(form: Form) -> str:
    if form.get("all"):
        filters = "".join(f", {name} {value}" for name, value in _filter(form).items())
        return f"all dead deliveries{filters}"[:MAX_TARGET]
    return f"deliveries {', '.join(form.getlist('id'))}"[:MAX_TARGET]


def _retry(app: App, form: Form) -> str:
    count = refused_count = 0
    reason = ""
    for ids in _chosen(app, form):
        with engines.write(app.engine, WAIT_SECONDS) as connection:
            retried = deliveries.retry(connection, ids, app.clock.now())
        count += retried.count
        refused_count += len(retried.refusals)
        reason = reason or next(iter(retried.refusals), "")
    others = f" {refused_count:,} more cannot be queued: {reason}" if refused_count else ""
    by_daemon = f" The daemon sends {'it' if count == 1 else 'them'}."
    sender = by_daemon if _has_daemon(app) else " To send now: `audience-sync deliver`."
    return f"{_number(count)} queued again.{sender if count else ''}{others}"


def _discard(app: App, form: Form) -> str:
    count = total = 0
    for ids in _chosen(app, form):
        with engines.write(app.engine, WAIT_SECONDS) as connection:
            count += deliveries.discard(connection, ids, app.clock.now())
        total += len(ids)
    others = "" if count == total else " The others are settled already, or belong to a held run."
    lack = " Userpilot lacks discarded values of audiences and traits until the next full sync."
    return f"{_number(count)} cancelled.{lack if count else ''}{others}"


def _chosen(app: App, form: Form) -> Iterator[list[int]]:
    """Yield the ids in a form, or the ids of all dead deliveries that match its filter."""
    if not form.get("all"):
        ids = [row_id("A delivery id", text) for text in dict.fromkeys(form.getlist("id"))]
        if not ids:
            raise BadRequest("No delivery is selected. Select at least one.")
        yield ids
        return
    if form["all"] != "dead":
        raise BadRequest("all must be `dead`.")
    filters: dict[str, Any] = {FILTER[name]: value for name, value in _filter(form).items()}
    if "run_id" in filters:
        filters["run_id"] = row_id("The run id", filters["run_id"])
    before: int | None = None
    while not app.stop.is_set():
        with engines.read(app.engine) as connection:
            hits = history.find_deliveries(connection, status="dead", before=before, limit=CHUNK, **filters)
        if hits.ids:
            yield hits.ids
        if hits.older is None:
            return
        before = hits.older


def _filter(form: Form) -> dict[str, Any]:
    return {name: form[name] for name in FILTER if form.get(name)}


def _number(count: int) -> str:
    return f"{count:,} delivery is" if count == 1 else f"{count:,} deliveries are"


def _accept_destination(app: App, _form: Form) -> str:
    app.check_key()
    with engines.write(app.engine, WAIT_SECONDS) as connection:
        keys = foreign.accept_destination(connection, app.destination)
    return f"The destination is accepted for {', '.join(keys) or 'everything'}."


ACTIONS = {
    "/runs/{run_id}/approve": FormAction("approve", _run, _approve),
    "/runs/{run_id}/reject": FormAction("reject", _run, _reject),
    "/deliveries/retry": FormAction("retry", _deliveries, _retry),
    "/deliveries/discard": FormAction("discard", _deliveries, _discard),
    "/destination/accept": FormAction("accept", lambda _: "the destination", _accept_destination),
}


def actions(view: View) -> Response:
    """The page with the record of actions."""
    rows = record.action_rows(view.connection, before=view.number("before"), limit=PAGE_ROWS + 1)
    is_more = len(rows) > PAGE_ROWS
    for row in rows:
        row["address_of_target"] = _address(row["target"])
    return view.html("actions.html", actions=rows[:PAGE_ROWS], is_more=is_more)


def _address(target: str) -> str:
    """Return the address of a target's page: its run, or the deliveries from its first one on."""
    number = _TARGET_ID.match(target)
    if number is None:
        return "/deliveries" if target.startswith("all dead") else ""
    if number[1] == "run":
        return link(f"/runs/{number[2]}")
    return link("/deliveries", before=int(number[2]) + 1)
