"""The pages of deliveries, requests and calls: filtered, newest first."""

from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from audience_sync import history
from audience_sync.web.actions import FILTER
from audience_sync.web.view import PAGE_ROWS, NotFound, View

NAMES = FILTER | {"type": "call_type"}  # what `history` calls the fields of the forms


def deliveries_page(view: View) -> Response:
    filters = _filters(
        view, status=history.STATUSES, action=history.ACTIONS, key=str, run=int, user=str, error=str
    )
    matching = None
    if view.viewer.may_operate and filters["status"] == "dead":
        counted = {FILTER[name]: filters[name] for name in ("action", "key", "user", "error")}
        matching = history.count_dead(view.connection, **counted)
    finds = (history.find_deliveries, history.delivery_details)
    keys = list(history.definition_keys(view.connection).values())
    known = {"statuses": history.STATUSES, "known_actions": history.ACTIONS, "keys": keys}
    return _list(view, "deliveries.html", filters, finds, matching=matching, **known)


def calls_page(view: View) -> Response:
    filters = _filters(view, status=history.CALL_STATUSES, type=history.CALL_TYPES, user=str, event=str)
    finds = (history.find_calls, history.call_rows)
    return _list(view, "calls.html", filters, finds, statuses=history.CALL_STATUSES, types=history.CALL_TYPES)


def requests_page(view: View) -> Response:
    filters = _filters(view, lane=history.LANES, outcome=history.OUTCOMES, x_request_id=str)
    finds = (history.find_requests, history.request_rows)
    return _list(view, "requests.html", filters, finds, lanes=history.LANES, outcomes=history.OUTCOMES)


def _filters(view: View, **kinds: Any) -> dict[str, Any]:
    """The fields of a form, by name. A field is one of some words, an id (`int`), or any text (`str`)."""
    read = {int: view.number, str: view.text}
    return {
        name: read[kind](name) if kind in read else view.choice(name, kind) for name, kind in kinds.items()
    }


def _list(
    view: View,
    template: str,
    filters: dict[str, Any],
    finds: tuple[Callable[..., history.Found], Callable[..., list[dict[str, Any]]]],
    **values: Any,
) -> Response:
    """A page of a list. `finds`: the search with the filters, and the function that reads the rows that it found."""
    search, read = finds
    before, wanted = view.number("before"), {NAMES.get(name, name): filters[name] for name in filters}
    hits = search(view.connection, **wanted, before=before, limit=PAGE_ROWS)
    rows = read(view.connection, ids=hits.ids)
    is_busy = any(row.get("outcome", row.get("status")) in {"sending", "under way"} for row in rows)
    return view.html(template, live=is_busy, rows=rows, before=before, hits=hits, filters=filters, **values)


def request_page(view: View) -> Response:
    """A request, with its bulk job and the deliveries that no later request carried."""
    request_id = view.path_id("request_id")
    rows = history.request_rows(view.connection, [request_id])
    if not rows:
        old = "Old requests are deleted; see keep_requests in [database]."
        raise NotFound(f"There is no request {request_id}. {old}")
    before = view.number("before")
    hits = history.deliveries_of_request(view.connection, request_id, before, PAGE_ROWS)
    deliveries = history.delivery_details(view.connection, hits.ids)
    job = history.bulk_job(view.connection, request_id)
    values = {"sent": rows[0], "rows": deliveries, "before": before, "hits": hits, "job": job}
    is_busy = rows[0]["ended_at"] is None or bool(job and job["ended_at"] is None)
    return view.html("request.html", live=is_busy, **values)
