"""The pages of runs: the list, one run, and the users who changed in it."""

from typing import Any

from starlette.responses import Response

from audience_sync import history
from audience_sync.web import record
from audience_sync.web.view import PAGE_ROWS, NotFound, View

HELD_BY = {"guard": "the guard", "hold": "--hold", "fingerprint": "its destination, which had changed"}
STATUSES = ("running", "held", "rejected", "succeeded", "failed", "abandoned")
SHOWN_CHANGES = 10
COUNTED = 10_000  # deliveries; of a larger run, the time of the last settled one is not shown
MODES = {
    "first": "the first run, which sends every member",
    "changes": "sends only changes",
    "full": "sends every member and everyone who left",
    "canary": "a canary: single users only",
    "retire": "retires the key",
}


def runs(view: View) -> Response:
    key, status, before = view.text("key"), view.choice("status", STATUSES), view.number("before")
    known = history.definition_keys(view.connection).values()
    configured = (definition.key for definition in view.app.settings.definitions)
    rows = history.run_rows(view.connection, key=key, status=status, before=before, limit=PAGE_ROWS + 1)
    history.mark_gone(view.connection, rows)
    return view.html(
        "runs.html",
        live=any(run["status"] == "running" for run in rows),
        runs=rows[:PAGE_ROWS],
        is_more=len(rows) > PAGE_ROWS,
        is_later=before is not None,
        key=key,
        status=status,
        statuses=STATUSES,
        keys=sorted(filter(None, {key, *known, *configured})),
    )


def run(view: View) -> Response:
    run = _requested(view)
    changed = [what for what in history.CHANGES if run[f"{what}_count"]]
    member_count = run["member_count"]
    retry_at = None
    if run["status"] in {"failed", "abandoned"}:
        failed = history.schedule_state(view.connection, view.app.settings, view.now)["failed_runs"]
        retry_at = next((other["retry_at"] for other in failed if other["run_id"] == run["run_id"]), None)
    delivered = {name: run[f"{name}_count"] for name in ("accepted", "pending", "dead", "cancelled")}
    count = sum(delivered.values())
    return view.html(
        "run.html",
        live=run["status"] == "running" or (bool(run["pending_count"]) and run["status"] == "succeeded"),
        run=run,
        before=None if member_count is None else member_count - run["entered_count"] + run["exited_count"],
        seconds=run["finished_at"] and (run["finished_at"] - run["started_at"]).total_seconds(),
        mode=MODES[run["mode"]],
        held_by=HELD_BY.get(run["held_by"] or "", run["held_by"]),
        decision=record.find_decision(view.connection, run["run_id"]) if run["held_by"] else None,
        samples={what: _changes(view, run, what, limit=SHOWN_CHANGES) for what in changed},
        shown_changes=SHOWN_CHANGES,
        delivered=delivered.items(),
        delivery_count=count,
        settled_at=history.settled_at(view.connection, run["run_id"]) if 0 < count <= COUNTED else None,
        retry_at=retry_at,
    )


def changes(view: View) -> Response:
    run, what = _requested(view), view.choice("what", history.CHANGES) or "entered"
    after = view.text("after") or ""
    users = _changes(view, run, what, after=after, limit=PAGE_ROWS + 1)
    return view.html(
        "changes.html",
        run=run,
        what=what,
        users=users[:PAGE_ROWS],
        next_after=users[PAGE_ROWS - 1]["user_id"] if len(users) > PAGE_ROWS else None,
        is_first=not after,
    )


def _changes(
    view: View, run: dict[str, Any], what: str, *, after: str = "", limit: int
) -> list[dict[str, Any]]:
    """A page of the users who changed in a run, each with the delivery of the change."""
    users = history.change_rows(view.connection, run["run_id"], what, after=after, limit=limit)
    sent = history.deliveries_of(view.connection, run["run_id"], [user["user_id"] for user in users])
    return [user | {"delivery": sent.get(user["user_id"])} for user in users]


def _requested(view: View) -> dict[str, Any]:
    run_id = view.path_id("run_id")
    run = history.run_facts(view.connection, run_id)
    if run is None:
        raise NotFound(f"There is no run {run_id}.", ("/runs", "Show all runs"))
    history.mark_gone(view.connection, [run])
    return run
