"""Read-only queries about runs, members, users, deliveries and the queue.

Results are dicts with the names of the JSON output.
"""

from audience_sync.history.audiences import (
    definition_id,
    definition_keys,
    definitions,
    recent_runs,
    size_rows,
)
from audience_sync.history.changes import CHANGES, change_rows, deliveries_of, run_in_full
from audience_sync.history.members import member_page, member_rows
from audience_sync.history.names import event_names, number_property, trait_names
from audience_sync.history.overview import (
    LANES,
    MAX_COUNTED_OF_LANE,
    attention,
    backlogs,
    daemon_state,
    problems,
    schedule_state,
    status,
)
from audience_sync.history.paging import MAX_COUNTED, Found, pages
from audience_sync.history.queue import (
    ACTIONS,
    CALL_STATUSES,
    CALL_TYPES,
    OUTCOMES,
    STATUSES,
    bulk_job,
    call_rows,
    count_dead,
    deliveries_of_request,
    delivery_details,
    delivery_rows,
    find_calls,
    find_deliveries,
    find_requests,
    request_rows,
)
from audience_sync.history.runs import mark_gone, run_facts, run_rows, settled_at, unusable_counts
from audience_sync.history.schedule import next_day, past_day
from audience_sync.history.users import (
    erased_at,
    memberships_now,
    similar_ids,
    time_line,
    user,
    user_profile,
    waiting_of_user,
)

__all__ = [
    "ACTIONS",
    "CALL_STATUSES",
    "CALL_TYPES",
    "CHANGES",
    "LANES",
    "MAX_COUNTED",
    "MAX_COUNTED_OF_LANE",
    "OUTCOMES",
    "STATUSES",
    "Found",
    "attention",
    "backlogs",
    "bulk_job",
    "call_rows",
    "change_rows",
    "count_dead",
    "daemon_state",
    "definition_id",
    "definition_keys",
    "definitions",
    "deliveries_of",
    "deliveries_of_request",
    "delivery_details",
    "delivery_rows",
    "erased_at",
    "event_names",
    "find_calls",
    "find_deliveries",
    "find_requests",
    "mark_gone",
    "member_page",
    "member_rows",
    "memberships_now",
    "next_day",
    "number_property",
    "pages",
    "past_day",
    "problems",
    "recent_runs",
    "request_rows",
    "run_facts",
    "run_in_full",
    "run_rows",
    "schedule_state",
    "settled_at",
    "similar_ids",
    "size_rows",
    "status",
    "time_line",
    "trait_names",
    "unusable_counts",
    "user",
    "user_profile",
    "waiting_of_user",
]
