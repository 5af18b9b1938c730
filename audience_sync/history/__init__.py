"""Read-only questions about runs, members, users, deliveries and the queue.

Answers are dicts with the names of the JSON output.
"""

from audience_sync.history.audiences import definition_id, definitions, recent_sizes
from audience_sync.history.members import member_rows
from audience_sync.history.overview import daemon_state, status
from audience_sync.history.paging import pages
from audience_sync.history.queue import call_rows, delivery_rows
from audience_sync.history.runs import run_in_full, run_rows, unusable_counts
from audience_sync.history.users import user

__all__ = [
    "call_rows",
    "daemon_state",
    "definition_id",
    "definitions",
    "delivery_rows",
    "member_rows",
    "pages",
    "recent_sizes",
    "run_in_full",
    "run_rows",
    "status",
    "unusable_counts",
    "user",
]
