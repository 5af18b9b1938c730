"""What goes into a subject's next request, as the queue has it now."""

import datetime as dt
import itertools
from collections.abc import Sequence

import sqlalchemy as sa

from audience_sync.queue import deliveries, outcomes


def choose(
    connection: sa.Connection, action: str, subjects: Sequence[str], now: dt.datetime, fingerprint: str | None
) -> list[list[deliveries.Delivery]]:
    """The deliveries of each subject's next request, without what newer accepted values have overtaken."""
    pending = deliveries.pending_of(connection, action, subjects, now, fingerprint)
    chosen = [outcomes.select_next(each, now) for each in pending]
    late = [each for each in itertools.chain(*chosen) if each.is_call or each.alone]
    newer = deliveries.superseded_traits(connection, late, ["accepted"])
    if not newer:
        return [each for each in chosen if each]
    trimmed = [outcomes.without_superseded(each, newer) for each in chosen]
    gone = [delivery_id for each in trimmed for delivery_id in each.overtaken]
    if gone:
        deliveries.cancel_superseded(connection, gone, now)
    return [each.left for each in trimmed if each.left]
