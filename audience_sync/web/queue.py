"""The pages of deliveries, requests and calls: filtered, newest first."""

from typing import Any

from starlette.responses import Response

from audience_sync import history
from audience_sync.web.actions import FILTER
from audience_sync.web.view import PAGE_ROWS, NotFound, View


def deliveries_page(view: View) -> Response:
    filters: dict[str, Any] = {
        "status": view.choice("status", history.STATUSES),
        "action": view.choice("action", history.ACTIONS),
        "key": view.text("key"),
        "run": view.number("run"),
        "user": view.text("user"),
        "error": view.text("error"),
    }
    before, wanted = view.number("before"), {FILTER.get(name, name): filters[name] for name in filters}
    hits = history.find_deliveries(view.connection, **wanted, before=before, limit=PAGE_ROWS)
    rows = history.delivery_details(view.connection, hits.ids)
    matching = None
    if view.viewer.may_operate and filters["status"] == "dead":
        counted = {name: wanted[name] for name in ("action", "key", "user_id", "error")}
        matching = history.count_dead(view.connection, **counted)
    return view.html(
        "deliveries.html",
        live=any(row["status"] == "sending" for row in rows),
        rows=rows,
        before=before,
        hits=hits,
        filters=filters,
        keys=list(history.definition_keys(view.connection).values()),
        statuses=history.STATUSES,
        known_actions=history.ACTIONS,
        matching=matching,
    )


def calls_page(view: View) -> Response:
    filters = {
        "status": view.choice("status", history.CALL_STATUSES),
        "type": view.choice("type", history.CALL_TYPES),
        "user": view.text("user"),
        "event": view.text("event"),
    }
    before = view.number("before")
    hits = history.find_calls(
        view.connection,
        status=filters["status"],
        call_type=filters["type"],
        user_id=filters["user"],
        event=filters["event"],
        before=before,
        limit=PAGE_ROWS,
    )
    rows = history.call_rows(view.connection, ids=hits.ids)
    return view.html(
        "calls.html",
        statuses=history.CALL_STATUSES,
        types=history.CALL_TYPES,
        rows=rows,
        before=before,
        hits=hits,
        filters=filters,
    )


def requests_page(view: View) -> Response:
    filters = {
        "lane": view.choice("lane", history.LANES),
        "outcome": view.choice("outcome", history.OUTCOMES),
        "x_request_id": view.text("x_request_id"),
    }
    before = view.number("before")
    hits = history.find_requests(view.connection, **filters, before=before, limit=PAGE_ROWS)
    rows = history.request_rows(view.connection, hits.ids)
    is_busy = any(row["outcome"] == "under way" for row in rows)
    return view.html(
        "requests.html",
        live=is_busy,
        lanes=history.LANES,
        outcomes=history.OUTCOMES,
        rows=rows,
        before=before,
        hits=hits,
        filters=filters,
    )


def request_page(view: View) -> Response:
    """One request, with its bulk job and those of its deliveries that no later request carried."""
    request_id = view.path_id("request_id")
    rows = history.request_rows(view.connection, [request_id])
    if not rows:
        raise NotFound(
            f"There is no request {request_id}. Old requests are deleted; see keep_requests in [database]."
        )
    before = view.number("before")
    hits = history.deliveries_of_request(view.connection, request_id, before, PAGE_ROWS)
    deliveries = history.delivery_details(view.connection, hits.ids)
    job = history.bulk_job(view.connection, request_id)
    is_busy = rows[0]["ended_at"] is None or bool(job and job["ended_at"] is None)
    return view.html(
        "request.html", live=is_busy, sent=rows[0], rows=deliveries, before=before, hits=hits, job=job
    )
