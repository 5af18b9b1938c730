"""The worker: claims, sends and settles deliveries, in one process at a time.

Runs and calls commit the deliveries (deliveries.py) that are sent here. Each cycle of `Worker._work` is one transaction:
renew the lease, settle answered requests, claim deliveries (queues.py and due.py decide which, pace.py how many).
Requests are recorded (requests.py) before they are sent, so that after a crash the next process knows what may have
reached Userpilot. One thread decides; the threads of senders.py send (sending.py). outcomes.py decides what the answers
mean. Long backlogs of users are also sent by bulk jobs (bulk.py), in the same transactions.
"""

import contextlib
import datetime as dt
import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sqlalchemy as sa

from audience_sync import crash, logs
from audience_sync.clock import Clock, DatabaseClock
from audience_sync.db import dialects, engines, leases
from audience_sync.errors import DatabaseError, LeaseLost
from audience_sync.queue import backlog, deliveries, destination, due, outcomes, pace, requests
from audience_sync.queue.bulk import BulkLane, BulkSettings, Transaction
from audience_sync.queue.jobs import JobRequest
from audience_sync.queue.progress import Progress, Report
from audience_sync.queue.queues import Queues
from audience_sync.queue.senders import Senders
from audience_sync.queue.sending import Reply, RequestSender, Sender
from audience_sync.userpilot.answers import Answer, Outcome

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 32  # requests of a lane; few lanes need that many
LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
QUEUE_POLL_SECONDS = 0.2  # how soon new deliveries in the queue are noticed
LARGE_BACKLOG = 10_000  # deliveries, from which PostgreSQL's statistics are refreshed first
RECONNECT_SECONDS = (0.5, 2.0, 8.0)
SERVICE_UNAVAILABLE = 503  # its Retry-After delays the whole lane; that of other failures delays the delivery


_NOT_SENT = "Not sent: this process was suspended, and another may have taken over"
_TRACKS_WAIT = "an event whose outcome is unknown may still arrive"


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """Settings of the worker. Tests shorten the grace, the window and the poll.

    `build` returns a request's path and payload (userpilot/payloads.py) for its action, subject and body.
    """

    per_minute: dict[str, int]
    build: Callable[[str, str, dict[str, Any]], tuple[str, dict[str, Any]]]
    tracks_at_most_once: bool = False
    fingerprint: str | None = None  # of the destination; None takes whatever is pending
    grace: dt.timedelta = outcomes.GRACE
    window_seconds: float = pace.WINDOW_SECONDS
    poll_seconds: float = QUEUE_POLL_SECONDS
    jobs: BulkSettings = field(default_factory=BulkSettings)


@dataclass(frozen=True, slots=True)
class _Cycle:
    """The decisions of a cycle's transaction, which are carried out after its commit."""

    claims: list[requests.ClaimedRequest]
    settled_by_jobs: Counter[str]
    send_by: float  # monotonic seconds
    idle_seconds: float | None  # None: requests are in flight
    is_over: bool


@dataclass(slots=True)
class Worker:
    """Delivers what is due. If `stop` is set, the worker waits for the requests in flight and ends.

    While `is_gathering`, runs are about to commit more changes of the same users, so only calls are sent.
    """

    engine: sa.Engine
    sender: Sender
    settings: DeliverySettings
    clock: Clock
    stop: threading.Event = field(default_factory=threading.Event)
    rng: random.Random = field(default_factory=random.Random)
    on_progress: Callable[[Report], None] = lambda _: None
    is_gathering: Callable[[], bool] = lambda: False
    report: Report = field(default_factory=Report)
    open_senders: Callable[[], Senders[Reply]] = lambda: Senders(len(due.LANES) * MAX_IN_FLIGHT + 1)
    _lanes: dict[str, pace.Lane] = field(default_factory=dict)
    _bulk: BulkLane = field(init=False)
    _queues: Queues = field(init=False)
    _database_clock: DatabaseClock = field(init=False)
    _request_sender: RequestSender = field(init=False)
    _in_flight: dict[int, requests.ClaimedRequest] = field(default_factory=dict)
    _progress: Progress = field(default_factory=Progress)
    _slow_downs: set[tuple[str, bool, str]] = field(
        default_factory=set
    )  # (lane, is paused, reason), as stored
    _stored: dict[str, Any] = field(default_factory=dict)  # the stored slow-downs by lane

    def deliver(self, run_ids: Collection[int] = (), call_ids: Collection[int] = ()) -> Report:
        """Work until nothing is due and nothing becomes due within 60 s.

        If another process has the lease, wait until it has claimed the deliveries of these runs and calls, and leave
        the rest to it.
        """
        while not self._is_ending():
            lease = self._acquire()
            if lease is not None:
                if not self._work(lease):
                    break
            elif not self._wait_for_claim(run_ids, call_ids):
                self.report.is_handed_over = True
                break
        if self._is_ending() or self.report.is_handed_over:
            with engines.read(self.engine) as connection:
                self.report.pending_count = backlog.pending_count(connection)
        return self.report

    # The lease.

    def _acquire(self) -> leases.Lease | None:
        with engines.read(self.engine) as connection:
            if leases.holder(connection, leases.QUEUE):
                return None
        # On SQLite, transactions of other processes may delay its renewal.
        seconds = LEASE_SECONDS + (engines.BUSY_SECONDS if dialects.is_sqlite(self.engine) else 0)
        with engines.write(self.engine) as connection:
            lease = leases.acquire(connection, leases.QUEUE, seconds)
            if isinstance(lease, leases.Holder):
                return None
            self._take_over(connection)
        return lease

    def _wait_for_claim(self, run_ids: Collection[int], call_ids: Collection[int]) -> bool:
        with engines.read(self.engine) as connection:
            waiting = backlog.are_waiting(connection, run_ids, call_ids, self.clock.now())
        if waiting:
            self.clock.sleep(self.settings.poll_seconds)
        return waiting

    def _take_over(self, connection: sa.Connection) -> None:
        """Start from the state that earlier processes left in the database."""
        now, monotonic, window = self.clock.now(), self.clock.monotonic(), self.settings.window_seconds
        self._in_flight = {}
        self._request_sender = RequestSender(self.sender, self.settings.build, self.clock)
        self._lanes = {name: self._lane(name) for name in due.LANES}
        self._queues = Queues(
            self._lanes,
            self.clock,
            self.settings.poll_seconds,
            self.settings.fingerprint,
            self.is_gathering,
        )
        self._bulk = BulkLane(self.settings.jobs, self.clock, self._lanes["identify"])
        self._database_clock = DatabaseClock(self.clock, partial(dialects.time_of, self.engine))
        self._recover(connection, ())
        moment, grace = self._database_clock.now(), self.settings.grace
        span = max(dt.timedelta(seconds=window), grace)
        ends = requests.recent_request_ends(connection, moment - span)
        for end in ends:
            self._lanes[end.lane].ended.append(self._database_clock.monotonic_of(end.ended_at))
        in_grace = [end.request_id for end in ends if end.ended_at > moment - grace]
        deliveries.restart_graces(connection, in_grace, now, grace)
        slow_downs = destination.slow_downs(connection)
        for name, lane in self._paces():
            if name in slow_downs:
                pace.restore(lane, slow_downs[name], monotonic, now)
        self._slow_downs = {(name, False, stored["reason"]) for name, stored in slow_downs.items()}
        self._stored = slow_downs
        self._bulk.resume(connection, now)
        self._progress = Progress(backlog.pending_counts(connection), monotonic)
        if sum(self._progress.pending.values()) > LARGE_BACKLOG:
            due.refresh_statistics(connection)
        stopped = destination.stopped(connection)
        self.report.stopped = stopped and stopped.reason

    def _lane(self, name: str) -> pace.Lane:
        per_minute, window = self.settings.per_minute[name], self.settings.window_seconds
        most = min(MAX_IN_FLIGHT, pace.requests_in_flight(per_minute / window))
        return pace.Lane(per_minute, window, max_in_flight=most)

    def _paces(self) -> list[tuple[str, pace.Lane | pace.BulkPace]]:
        return [*self._lanes.items(), ("bulk", self._bulk.pace)]

    def _recover(self, connection: sa.Connection, ended: Sequence[requests.EndedRequest]) -> None:
        """Queue again the deliveries that ended processes were sending, except those of the `ended` requests."""
        known = [*self._in_flight, *(request.request_id for request in ended)]
        lost = deliveries.recover(
            connection,
            self.clock.now(),
            self.settings.grace,
            ended_at=self._database_clock.now(),
            tracks_at_most_once=self.settings.tracks_at_most_once,
            known_request_ids=known,
        )
        if lost.pending_count:
            log.warning(
                "%d deliveries were being sent when their process ended: they will be sent again",
                lost.pending_count,
            )
        if lost.dead_count:
            log.warning(
                "%d events were being sent when their process ended: they will not be repeated",
                lost.dead_count,
            )
            self._delay_tracks()

    def _delay_tracks(self) -> None:
        """Delay further events by the grace, because an event that is not repeated may still arrive."""
        self._lanes["track"].wait(self.clock.monotonic() + self.settings.grace.total_seconds(), _TRACKS_WAIT)

    def _work(self, lease: leases.Lease) -> bool:
        """Work while this process has the lease; return True if more became due after the lease was released."""
        ended: list[requests.EndedRequest] = []
        try:
            with self.open_senders() as senders:
                while True:
                    cycle = self._cycle(lease, ended)
                    job_request = self._committed(cycle)
                    if ended or cycle.settled_by_jobs:
                        crash.at("settled")
                        self._show_progress()
                    if cycle.claims:
                        crash.at("claimed")
                    for claimed in cycle.claims:
                        senders.start(partial(self._request_sender.send, claimed, cycle.send_by))
                    if job_request is not None:
                        senders.start(partial(self._request_sender.send, job_request, cycle.send_by))
                    if cycle.is_over:
                        break
                    wait = self._wait_seconds() if cycle.idle_seconds is None else cycle.idle_seconds
                    wait = min(wait, self._bulk.wait_seconds(), RENEW_SECONDS)
                    ended = self._evaluate(self._collect(senders, wait))
        except LeaseLost as lost:
            log.warning("%s", lost)
            self.report.is_handed_over = True
            return False
        except BaseException:
            with contextlib.suppress(DatabaseError), engines.write(self.engine) as connection:
                leases.release(connection, lease)
            raise
        crash.at("lease_released")
        if self._is_ending():
            return False
        with engines.read(self.engine) as connection:  # later deliveries are left to other processes
            self.report.pending_count = backlog.pending_count(connection)
            return self._queues.has_become_due(connection)

    def _is_ending(self) -> bool:
        return self.stop.is_set() or self.report.stopped is not None

    # A cycle.

    def _cycle(self, lease: leases.Lease, ended: list[requests.EndedRequest]) -> _Cycle:
        """Run a cycle's transaction; repeat it if the connection to the server broke."""
        pauses = list(RECONNECT_SECONDS)
        while True:
            try:
                with engines.write(self.engine) as connection:
                    leases.renew(connection, lease)
                    send_by = self.clock.monotonic() + lease.seconds / 2
                    if len(pauses) < len(RECONNECT_SECONDS):  # its commit may or may not have succeeded
                        self._recover(connection, ended)
                        self._bulk.resume(connection, self.clock.now())
                    return self._step(connection, lease, ended, send_by)
            except DatabaseError as error:
                is_broken = isinstance(error.__cause__, sa.exc.OperationalError)
                if dialects.is_sqlite(self.engine) or not is_broken or not pauses:
                    raise
                log.warning("%s", error)
                self.clock.sleep(pauses.pop(0))

    def _step(
        self,
        connection: sa.Connection,
        lease: leases.Lease,
        ended: list[requests.EndedRequest],
        send_by: float,
    ) -> _Cycle:
        if ended:
            deliveries.settle(connection, ended)
        if self.report.stopped and destination.stopped(connection) is None:
            destination.stop(connection, self.clock.now(), self.report.stopped)
        is_ending = self._is_ending()
        claimed: list[requests.ClaimedRequest] = []
        if not is_ending:
            under_way = self._in_flight.values()
            claimed = self._queues.claim(connection, lease.epoch, under_way, self._database_clock.now)
        settled_by_jobs = self._bulk.step(
            Transaction(
                connection,
                self.clock.now(),
                lease.epoch,
                live_count=sum(request.action == "identify" for request in claimed),
                fronts=self._queues.fronts("identify"),
                may_start=not self.is_gathering(),
                is_ending=is_ending,
            )
        )
        idle_seconds, is_over = None, False
        if not claimed and not self._in_flight and not self._bulk.is_busy:
            idle_seconds = self._queues.idle_seconds(connection)
            is_over = is_ending or idle_seconds == math.inf
        self._record_slow_downs(connection, is_over=is_over)
        if is_over:
            leases.release(connection, lease)
        return _Cycle(claimed, settled_by_jobs, send_by, idle_seconds, is_over)

    def _committed(self, cycle: _Cycle) -> JobRequest | None:
        """Update the worker's state after a commit; return the request about a bulk job to send next."""
        for claimed in cycle.claims:
            self._in_flight[claimed.request_id] = claimed
            self._lanes[claimed.action].start(push=claimed.delivery_class == "push")
        job_request = self._bulk.committed()
        settled = cycle.settled_by_jobs
        self.report.accepted_count += settled["accepted"]
        self._progress.settled("identify", settled["accepted"] + settled["cancelled"])
        return job_request

    def _wait_seconds(self) -> float:
        """Return the seconds until a request may start while others are in flight."""
        return math.inf if self._is_ending() else self._queues.busy_seconds()

    # Answers.

    def _collect(self, senders: Senders[Reply], wait_seconds: float) -> list[Reply]:
        """Return the replies that have arrived; wait while there are none."""
        deadline = self.clock.monotonic() + wait_seconds
        while True:
            left = deadline - self.clock.monotonic()
            is_awaiting_answer = bool(self._in_flight) or self._bulk.is_awaiting_answer
            replies = senders.collect(left if is_awaiting_answer else 0)
            if replies or left <= 0 or (self.stop.is_set() and not is_awaiting_answer):
                return replies
            if not is_awaiting_answer:
                self.clock.sleep(min(left, self.settings.poll_seconds))

    def _evaluate(self, replies: list[Reply]) -> list[requests.EndedRequest]:
        """Adapt to the answers; return the requests that the next transaction settles."""
        ended = []
        for reply in replies:
            if isinstance(reply.request, JobRequest):
                answer = reply.answer or Answer(Outcome.FAILED, None, None, _NOT_SENT, None)
                self._bulk.receive(answer)
                self._stop_if_unauthorised(answer)
                self.report.request_count += reply.request.kind == "upload"
            elif reply.answer is None:
                ended.append(self._not_sent(reply.request))
            else:
                ended.append(self._end(reply.request, reply.answer))
        return ended

    def _not_sent(self, claimed: requests.ClaimedRequest) -> requests.EndedRequest:
        """Return the deliveries of an unsent request to the queue: this is neither an attempt nor a failure of the lane."""
        self._forget(claimed)
        self._lanes[claimed.action].withdraw()
        logs.event(log, logging.WARNING, "request not sent", lane=claimed.action, reason=_NOT_SENT)
        settlements = [
            outcomes.Settlement(
                delivery.delivery_id,
                outcomes.Status.PENDING,
                _NOT_SENT,
                next_attempt_at=delivery.next_attempt_at,
                isolated=delivery.isolated,
                was_attempt=False,
            )
            for delivery in claimed.deliveries
        ]
        self._queues.search_again(claimed)
        return requests.EndedRequest(
            claimed.request_id,
            self._database_clock.now(),
            None,
            None,
            _NOT_SENT,
            settlements,
            settled_at=self.clock.now(),
        )

    def _forget(self, claimed: requests.ClaimedRequest) -> None:
        del self._in_flight[claimed.request_id]
        self._queues.request_ended()

    def _end(self, claimed: requests.ClaimedRequest, answer: Answer) -> requests.EndedRequest:
        """Decide what an answer means, before the transaction that settles it, because that may be repeated."""
        now, settings = self.clock.now(), self.settings
        self._forget(claimed)
        self._lanes[claimed.action].end(self.clock.monotonic())
        self._adjust_pace(claimed.action, answer)
        if answer.outcome is Outcome.REFUSED and self._lanes[claimed.action].is_refusing:
            answer = replace(answer, outcome=Outcome.DOUBTFUL)
        retries = outcomes.Retries(self.rng, settings.grace, settings.tracks_at_most_once)
        settlements = outcomes.decide_settlements(claimed.deliveries, answer, now, retries)
        final = [each.status for each in settlements if each.status is not outcomes.Status.PENDING]
        self.report.request_count += 1
        self.report.accepted_count += final.count(outcomes.Status.ACCEPTED)
        self.report.dead_count += final.count(outcomes.Status.DEAD)
        self._progress.settled(claimed.action, len(final))
        if claimed.action == "track" and answer.outcome is Outcome.UNKNOWN and settings.tracks_at_most_once:
            self._delay_tracks()
        if self._queues.is_passed(claimed) or len(final) < len(settlements):
            self._queues.search_again(claimed)
        return requests.EndedRequest(
            claimed.request_id,
            self._database_clock.now(),
            answer.status_code,
            answer.x_request_id,
            answer.error,
            settlements,
            settled_at=now,
        )

    def _adjust_pace(self, name: str, answer: Answer) -> None:
        """Slow the lane down or speed it up, depending on the answer."""
        lane, monotonic = self._lanes[name], self.clock.monotonic()
        error, changed = answer.error or "no answer", False
        match answer.outcome:
            case Outcome.ACCEPTED:
                changed = lane.succeeded()
            case Outcome.REFUSED:
                changed = lane.refused(monotonic, error)
            case Outcome.THROTTLED:
                changed = lane.throttled(monotonic, answer.retry_after_seconds)
            case Outcome.FAILED | Outcome.UNKNOWN:
                seconds = answer.retry_after_seconds if answer.status_code == SERVICE_UNAVAILABLE else None
                changed = lane.failed(monotonic, error, seconds)
            case Outcome.UNAUTHORISED:
                self._stop_if_unauthorised(answer)
        if changed:  # the reason may quote what was sent: it is for `status`, not for the log
            message = "lane slows down" if lane.reason else "lane is at its pace again"
            logs.event(log, logging.WARNING, message, lane=name, status_code=answer.status_code or "none")

    def _stop_if_unauthorised(self, answer: Answer) -> None:
        if answer.outcome is Outcome.UNAUTHORISED and self.report.stopped is None:
            reason = (answer.error or "").removeprefix(f"{answer.status_code}: ")
            self.report.stopped = (
                f"Userpilot refused the API key (HTTP {answer.status_code}: {reason}). Nothing is lost: put "
                "the right key into [destination] api_key, then run `audience-sync deliver`."
            )
            log.error("the destination is stopped: HTTP %s", answer.status_code)

    def _record_slow_downs(self, connection: sa.Connection, *, is_over: bool) -> None:
        """Store the lanes' slow-downs when a pause begins or ends, and at the end of the work."""
        now, monotonic = self.clock.now(), self.clock.monotonic()
        slow_downs = {
            name: slow_down
            for name, lane in self._paces()
            if (slow_down := pace.slow_down(lane, monotonic, now, self._stored.get(name))) is not None
        }
        state = {
            (name, lane.paused_until > monotonic, lane.reason)
            for name, lane in self._paces()
            if name in slow_downs
        }
        if state != self._slow_downs or (is_over and slow_downs):
            destination.set_slow_downs(connection, slow_downs)
            self._slow_downs, self._stored = state, slow_downs

    def _show_progress(self) -> None:
        self._progress.update(self.report, self._lanes, self._bulk, self.clock.monotonic())
        self.on_progress(self.report)
