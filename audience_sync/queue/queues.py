"""The queues of a worker, one for each lane and class: claim deliveries, and compute when more may be claimed.

A walk (walk.py) searches each queue. If a search finds less than the lane has room for, the next search begins after
`poll_seconds`, or as soon as an answer may have made more deliveries due.
"""

import datetime as dt
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from audience_sync.clock import Clock
from audience_sync.queue import backlog, conditions, deliveries, due, pace, requests
from audience_sync.queue.walk import Walk

IDLE_EXIT_SECONDS = 60.0  # the worker ends if nothing becomes due within this time
SHORTEST_WAIT_SECONDS = 0.01
QUEUES = tuple(itertools.product(due.LANES, due.CLASSES))


@dataclass(slots=True)
class Queues:
    """The queues of one destination, by `fingerprint`; None takes all pending deliveries."""

    lanes: dict[str, pace.Lane]
    clock: Clock
    poll_seconds: float
    fingerprint: str | None
    is_gathering: Callable[[], bool]
    _walks: dict[tuple[str, str], Walk] = field(init=False)
    _poll_at: dict[tuple[str, str], float] = field(default_factory=dict)  # when to search a queue again
    _answer_count: int = 0
    _turn: int = 0

    def __post_init__(self) -> None:
        self._walks = {queue: Walk(*queue, self.fingerprint) for queue in QUEUES}

    def claim(
        self,
        connection: sa.Connection,
        epoch: int,
        under_way: Collection[requests.ClaimedRequest],
        started_at: Callable[[], dt.datetime],
    ) -> list[requests.ClaimedRequest]:
        """Claim deliveries within the limit of each lane: first calls, then changes, then pushes."""
        claimed: list[requests.ClaimedRequest] = []
        monotonic = self.clock.monotonic()
        self._turn += 1
        conditions.prefer_index_scans(connection)
        for queue in QUEUES:
            if not self._is_open(queue[1]):
                self._poll_at[queue] = monotonic + self.poll_seconds
        for delivery_class, turn in itertools.product(due.CLASSES, range(len(due.LANES))):
            name = due.LANES[(self._turn + turn) % len(due.LANES)]
            room = self.lanes[name].startable(monotonic, push=delivery_class == "push")
            room -= sum(request.action == name for request in claimed)
            if room > 0 and self._poll_at.get((name, delivery_class), -math.inf) <= monotonic:
                walk = self._walks[name, delivery_class]
                claimed += self._claim_from(connection, epoch, walk, room, [*under_way, *claimed], started_at)
        return claimed

    def _is_open(self, delivery_class: str) -> bool:
        """Return whether this class may be sent now: while `is_gathering`, only calls are sent."""
        return delivery_class == "call" or not self.is_gathering()

    def _claim_from(
        self,
        connection: sa.Connection,
        epoch: int,
        walk: Walk,
        room: int,
        under_way: Sequence[requests.ClaimedRequest],
        started_at: Callable[[], dt.datetime],
    ) -> list[requests.ClaimedRequest]:
        """Claim the next requests of a queue."""
        now, monotonic, name = self.clock.now(), self.clock.monotonic(), walk.action
        walk.begin(monotonic, self.poll_seconds, self._answer_count)
        in_flight = {request.subject_id for request in under_way if request.action == name}
        claimed: list[requests.ClaimedRequest] = []
        while left := room - len(claimed):
            subjects = walk.next_subjects(connection, now, left, in_flight)
            if not subjects:
                break
            counts = {subject.subject_id: subject.delivery_count for subject in subjects}
            chosen = deliveries.choose_next(connection, name, list(counts), now, self.fingerprint)
            for subject_id in chosen.cancelled_subjects:
                walk.put_back(subject_id)
            walk.has_skipped |= len(chosen.groups) < len(subjects)
            if not chosen.groups:
                continue
            claims = deliveries.claim(
                connection, name, epoch, chosen.groups, started_at(), walk.delivery_class
            )
            for request in claims:
                in_flight.add(request.subject_id)
                walk.has_skipped |= counts[request.subject_id] != len(request.deliveries)
                if counts[request.subject_id] > len(request.deliveries):
                    walk.put_back(request.subject_id)
            claimed += claims
        if walk.is_search_over(in_flight) and len(claimed) < room:
            self._poll_at[name, walk.delivery_class] = monotonic + self.poll_seconds
        return claimed

    def fronts(self, lane: str) -> dict[str, due.Position]:
        """Return the positions of the walks through a lane, by class."""
        return {name: self._walks[lane, name].front for name in due.CLASSES}

    def request_ended(self) -> None:
        """Count a request that has ended, which may have unblocked its subject."""
        self._answer_count += 1

    def is_passed(self, claimed: requests.ClaimedRequest) -> bool:
        """Return whether a walk has passed the request's subject because it was busy."""
        walks = (self._walks[claimed.action, delivery_class] for delivery_class in due.CLASSES)
        return any(claimed.subject_id in walk.passed for walk in walks)

    def search_again(self, claimed: requests.ClaimedRequest) -> None:
        """Search the queues of this lane at once: the subject's next request may be due."""
        self._walks[claimed.action, claimed.delivery_class].put_back(claimed.subject_id)
        for delivery_class in due.CLASSES:
            self._poll_at.pop((claimed.action, delivery_class), None)

    def _queue_seconds(self, name: str, delivery_class: str) -> float:
        """Return the seconds until a request of this queue may start."""
        monotonic = self.clock.monotonic()
        until_poll = self._poll_at.get((name, delivery_class), -math.inf) - monotonic
        until_room = self.lanes[name].wait_seconds(monotonic, push=delivery_class == "push")
        return max(until_poll, until_room, SHORTEST_WAIT_SECONDS)

    def busy_seconds(self) -> float:
        """Return the seconds until a request may start while others are in flight."""
        return min(self._queue_seconds(*queue) for queue in QUEUES)

    def idle_seconds(self, connection: sa.Connection) -> float:
        """Return the seconds to wait while nothing is in flight; infinite if nothing becomes due soon."""
        now, monotonic = self.clock.now(), self.clock.monotonic()
        waits, old = [], []
        for queue, walk in self._walks.items():
            if self._is_open(walk.delivery_class) and self.lanes[walk.action].room(monotonic):
                if not walk.is_over(self._answer_count):  # an answer may have unblocked a subject
                    waits.append(self._search_from_start(queue))
                    continue
                if walk.is_older_than(self._answer_count):
                    old.append(queue)
                if walk.quiet_until is not None:
                    waits.append(max(self._queue_seconds(*queue), (walk.quiet_until - now).total_seconds()))
            elif due.subjects_due(connection, *queue, now, 1, self.fingerprint):
                waits.append(self._queue_seconds(*queue))
        shortest = self._soon([*waits, *self._later(connection, now)])
        # Before the work ends, search once more: deliveries may have been committed ahead of the last search.
        if shortest == math.inf:
            shortest = self._soon([self._search_from_start(queue) for queue in old])
        if 0 < shortest < SHORTEST_WAIT_SECONDS:  # a wait shorter than a clock's tick would never end
            shortest = SHORTEST_WAIT_SECONDS
        return min(shortest, self.poll_seconds) if shortest < math.inf else math.inf

    def _search_from_start(self, queue: tuple[str, str]) -> float:
        """Make the next search begin a pass; return the seconds until it may start."""
        self._walks[queue].begin_pass()
        self._poll_at.pop(queue, None)
        return self.lanes[queue[0]].wait_seconds(self.clock.monotonic(), push=queue[1] == "push")

    def _later(self, connection: sa.Connection, now: dt.datetime) -> Iterator[float]:
        """Yield the seconds until pending deliveries that were not due at the last search may become due."""
        since = min(walk.searched_at for walk in self._walks.values())
        for moment in backlog.next_due(connection, min(since, now)):
            queue_seconds = self._queue_seconds(moment.action, moment.delivery_class)
            yield max(queue_seconds, (moment.due_at - now).total_seconds())

    @staticmethod
    def _soon(waits: Collection[float]) -> float:
        """Return the shortest of these waits; infinite if it is so long that the work ends."""
        shortest = min(waits, default=math.inf)
        # A full window has room again after a minute plus the time of a request; longer pauses end the work.
        return shortest if shortest <= IDLE_EXIT_SECONDS + 1 else math.inf

    def has_become_due(self, connection: sa.Connection) -> bool:
        """Return whether anything has become due, or will be soon, since the last search."""
        now = self.clock.now()
        waits = [
            self._queue_seconds(*queue)
            for queue, walk in self._walks.items()
            if due.read_stretch(connection, *queue, now, walk.tail, 1, self.fingerprint).subjects
        ]
        return self._soon([*waits, *self._later(connection, now)]) < math.inf
