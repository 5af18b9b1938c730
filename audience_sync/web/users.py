"""The page of a user: memberships, since when and why, and whether Userpilot accepted them."""

from starlette.responses import Response

from audience_sync import history
from audience_sync.audiences.definition import Definition
from audience_sync.audiences.query import english
from audience_sync.web.view import PAGE_ROWS, View

FEW_ROWS = 20  # of calls and deliveries; the pages of calls and deliveries have the rest


def user_page(view: View) -> Response:
    user_id = view.text("id")
    if user_id is None:
        return view.html("user_unknown.html", user_id="", similar=[], erasure=None)
    memberships = history.memberships_now(view.connection, user_id)
    before = view.number("before")
    line, older = history.time_line(view.connection, user_id, before=before, limit=PAGE_ROWS)
    profile = history.user_profile(view.connection, user_id)
    hits = history.find_deliveries(view.connection, user_id=user_id, limit=FEW_ROWS)
    calls = history.find_calls(view.connection, user_id=user_id, limit=FEW_ROWS)
    erasure = history.erased_at(view.connection, user_id)
    if not (memberships or line or profile or hits.ids or calls.ids):
        similar = [] if erasure else history.similar_ids(view.connection, user_id)
        return view.html("user_unknown.html", user_id=user_id, similar=similar, erasure=erasure)
    readings = {definition.key: _reading(definition) for definition in view.app.settings.definitions}
    present = {row["key"] for row in memberships}
    waiting = history.waiting_of_user(view.connection, user_id, FEW_ROWS)
    return view.html(
        "user.html",
        live=any(row["status"] == "sending" for row in waiting),
        before=before,
        user_id=user_id,
        memberships=memberships,
        readings=readings,
        absent=[key for key in readings if key not in present],
        line=line,
        older=older,
        profile=profile,
        deliveries=history.delivery_details(view.connection, hits.ids),
        more_deliveries=hits.older,
        calls=history.call_rows(view.connection, ids=calls.ids),
        more_calls=calls.older,
        waiting=waiting,
        erasure=erasure,
    )


def _reading(definition: Definition) -> str:
    """The meaning of a definition: its query in English, or its name if it is written in SQL."""
    if definition.query is None:
        return definition.name
    return english.english_text(definition.query.query)
