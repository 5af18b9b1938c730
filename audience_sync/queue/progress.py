"""The progress of a process that delivers: its work so far, and estimates of the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from audience_sync.queue import split

if TYPE_CHECKING:
    from audience_sync.queue.bulk import BulkLane
    from audience_sync.queue.pace import Lane

MEASURED_SECONDS = 20.0  # after this time the measured pace is a better estimate than the limits


@dataclass(slots=True)
class Report:
    """The work of one process.

    `is_handed_over`: another process delivers the rest. `stopped`: the reason why the destination is stopped.
    `held_count`: deliveries that are held because they were made for another destination.

    Until the end, `pending_count` (of the whole queue), `left` (by lane; rows for bulk) and `seconds_left` are
    estimates, which do not include deliveries that other processes add.
    """

    accepted_count: int = 0
    dead_count: int = 0
    request_count: int = 0
    pending_count: int = 0
    held_count: int = 0
    bulk_done_count: int = 0  # rows of a job under way
    left: dict[str, int] = field(default_factory=dict)
    seconds_left: float = 0.0
    is_handed_over: bool = False
    stopped: str | None = None


@dataclass(slots=True)
class Progress:
    """Estimates of one worker; `pending` are deliveries by action."""

    pending: dict[str, int] = field(default_factory=dict)
    began_at: float = 0.0
    settled_count: int = 0

    def settled(self, action: str, count: int) -> None:
        self.pending[action] = self.pending.get(action, 0) - count
        self.settled_count += count

    def update(self, report: Report, lanes: "Mapping[str, Lane]", bulk: "BulkLane", monotonic: float) -> None:
        """Write the estimates into the report."""
        pending = {action: max(0, count) for action, count in self.pending.items()}
        done, left = bulk.row_counts()
        in_job = min(done + left, pending.get("identify", 0))
        report.pending_count, report.bulk_done_count = sum(pending.values()), done
        report.left = pending | {"identify": pending.get("identify", 0) - in_job, "bulk": left}
        paused = max(lane.paused_until for lane in lanes.values()) - monotonic
        seconds = self._seconds_left(report, lanes, bulk, monotonic - self.began_at)
        report.seconds_left = max(0.0, seconds, paused if report.pending_count else 0.0)

    def _seconds_left(
        self, report: Report, lanes: "Mapping[str, Lane]", bulk: "BulkLane", elapsed: float
    ) -> float:
        """Estimate from the pace measured so far or, in the first seconds, from the limits."""
        done = self.settled_count + report.bulk_done_count
        if elapsed > MEASURED_SECONDS and done:
            return (report.pending_count - report.bulk_done_count) * elapsed / done
        live = {name: report.left.get(name, 0) / lane.per_second for name, lane in lanes.items()}
        live["identify"] = split.forecast(report.left["identify"], 0, bulk.rates()).seconds
        return max(*live.values(), bulk.seconds_left())
