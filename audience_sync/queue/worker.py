"""Work the queue: one process at a time claims, one thread decides, a few threads send.

Each cycle is one transaction: renew the lease, settle what was answered, claim what may start. What is claimed
is on record before it is sent, so that whoever comes after a crash knows what may have reached Userpilot.
"""

import contextlib
import datetime as dt
import itertools
import logging
import math
import random
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import sqlalchemy as sa

from audience_sync import crash, logs
from audience_sync.clock import Clock
from audience_sync.db import dialects, engines, leases
from audience_sync.errors import DatabaseError, LeaseLost
from audience_sync.queue import bulk, deliveries, destination, due, job_state, outcomes, requests, split
from audience_sync.queue.pace import WINDOW_SECONDS, Lane
from audience_sync.queue.senders import Senders
from audience_sync.userpilot.answers import Answer, Outcome

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 8
LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
MEASURED_SECONDS = 20.0  # of work, after which its pace tells how long the rest takes
IDLE_EXIT_SECONDS = 60.0  # what becomes due within it is waited for
POLL_SECONDS = 0.2  # how soon something new in the queue is noticed
MANY = 10_000
RECONNECT_SECONDS = (0.5, 2.0, 8.0)
SLOW_DOWN_LASTS = dt.timedelta(hours=1)


class Sender(job_state.JobSender, Protocol):
    def send(self, path: str, payload: dict[str, Any], /) -> Answer: ...


_NOT_SENT = Answer(
    Outcome.FAILED, None, None, "Not sent: this process stood still, and another may be in its place", None
)
_MAY_COME = "an event of which nobody knows whether it came may come yet"
Reply = tuple[requests.ClaimedRequest | job_state.JobRequest, Answer]


@dataclass(slots=True)
class Report:
    """The work of one process; `is_left` where another one does it, `stopped` why the destination is.

    `held_count` is what waits because it was made for another destination.

    While the work goes on, `pending_count` (of the whole queue), `left` (by lane; of bulk rows) and `seconds_left`
    are estimates: what other processes add is counted at the end.
    """

    accepted_count: int = 0
    dead_count: int = 0
    request_count: int = 0
    pending_count: int = 0
    held_count: int = 0
    bulk_done_count: int = 0  # rows of a job under way
    left: dict[str, int] = field(default_factory=dict)
    seconds_left: float = 0.0
    is_left: bool = False
    stopped: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What delivery needs of the configuration; tests shorten the grace, the window and the poll."""

    per_minute: dict[str, int]
    build: Callable[[str, str, dict[str, Any]], tuple[str, dict[str, Any]]]
    tracks_at_most_once: bool = False
    fingerprint: str | None = None  # of the destination; None takes whatever is pending
    grace: dt.timedelta = outcomes.GRACE
    window_seconds: float = WINDOW_SECONDS
    poll_seconds: float = POLL_SECONDS
    jobs: bulk.Settings = field(default_factory=bulk.Settings)


@dataclass(frozen=True, slots=True)
class _Cycle:
    """What a cycle's transaction decided."""

    claims: list[requests.ClaimedRequest]
    bulk: bulk.Step
    send_by: float  # monotonic seconds
    wait_seconds: float
    is_over: bool


@dataclass(slots=True)
class Worker:
    """Delivers what is due; `stop` asks it to finish what is in flight and end."""

    engine: sa.Engine
    sender: Sender
    settings: Settings
    clock: Clock
    stop: threading.Event = field(default_factory=threading.Event)
    chance: random.Random = field(default_factory=random.Random)
    on_progress: Callable[[Report], None] = lambda _: None
    is_gathering: Callable[[], bool] = lambda: False  # more changes of the same users are about to come
    report: Report = field(default_factory=Report)
    open_senders: Callable[[], Senders[Reply]] = lambda: Senders(MAX_IN_FLIGHT + 1)
    _lanes: dict[str, Lane] = field(default_factory=dict)
    _bulk: bulk.Bulk = field(init=False)
    _pending: dict[str, int] = field(default_factory=dict)
    _look_at: dict[tuple[str, str], float] = field(default_factory=dict)
    _slow_downs: dict[str, Any] = field(default_factory=dict)
    _paused: set[str] = field(default_factory=set)
    _in_flight: dict[int, requests.ClaimedRequest] = field(default_factory=dict)
    _turn: int = 0
    _began_at: float = 0.0
    _settled_count: int = 0

    def deliver(self, run_ids: Collection[int] = (), call_ids: Collection[int] = ()) -> Report:
        """Work until nothing is due and nothing becomes due within 60 s.

        While another process has the lease: wait until it has claimed the deliveries of these runs and calls,
        then leave them to it.
        """
        while not self._is_ending():
            lease = self._acquire()
            if lease is not None:
                if not self._work(lease):
                    break
            elif not self._wait_for_claim(run_ids, call_ids):
                self.report.is_left = True
                break
        if self._is_ending() or self.report.is_left:
            with engines.read(self.engine) as connection:
                self.report.pending_count = due.pending_count(connection)
        return self.report

    def _acquire(self) -> leases.Lease | None:
        with engines.read(self.engine) as connection:
            if leases.holder(connection, leases.QUEUE):
                return None
        # On SQLite another process's transaction may keep us from renewing it.
        seconds = LEASE_SECONDS + (engines.BUSY_SECONDS if dialects.is_sqlite(self.engine) else 0)
        with engines.write(self.engine) as connection:
            lease = leases.acquire(connection, leases.QUEUE, seconds)
            if isinstance(lease, leases.Holder):
                return None
            self._take_over(connection)
        return lease

    def _wait_for_claim(self, run_ids: Collection[int], call_ids: Collection[int]) -> bool:
        with engines.read(self.engine) as connection:
            waiting = due.are_waiting(connection, run_ids, call_ids, self.clock.now())
        if waiting:
            self.clock.sleep(self.settings.poll_seconds)
        return waiting

    def _take_over(self, connection: sa.Connection) -> None:
        now, monotonic = self.clock.now(), self.clock.monotonic()
        self._in_flight, self._look_at, self._began_at, self._settled_count = {}, {}, monotonic, 0
        window = self.settings.window_seconds
        self._lanes = {name: Lane(self.settings.per_minute[name], window) for name in due.LANES}
        self._recover(connection, ())
        for end in requests.recent_request_ends(connection, now - dt.timedelta(seconds=window)):
            self._lanes[end.lane].ended.append(monotonic - max(0.0, (now - end.ended_at).total_seconds()))
        self._slow_downs = destination.slow_downs(connection)
        for name, slow in self._slow_downs.items():
            paused_until = dt.datetime.fromisoformat(slow["paused_until"])
            if paused_until > now - SLOW_DOWN_LASTS and name in self._lanes:
                lane = self._lanes[name]
                lane.factor = slow["factor"]
                lane.wait(monotonic + (paused_until - now).total_seconds(), slow["reason"])
        self._bulk = bulk.Bulk(self.settings.jobs, self.clock, self._lanes["identify"])
        self._bulk.resume(connection, now)
        self._bulk.restore_pause(self._slow_downs.get("bulk"), now)
        self._pending = due.pending_counts(connection)
        if sum(self._pending.values()) > MANY:
            due.refresh_statistics(connection)
        stopped = destination.stopped(connection)
        self.report.stopped = stopped and stopped[1]

    def _recover(self, connection: sa.Connection, answered: Sequence[requests.EndedRequest]) -> None:
        known = [*self._in_flight, *(each.request_id for each in answered)]
        lost = deliveries.recover(
            connection,
            self.clock.now(),
            self.settings.grace,
            tracks_at_most_once=self.settings.tracks_at_most_once,
            known_request_ids=known,
        )
        if lost.pending_count:
            told = "%d deliveries were under way when their process ended: they are sent again"
            log.warning(told, lost.pending_count)
        if lost.dead_count:
            log.warning("%d events were under way when their process ended: not repeated", lost.dead_count)
            self._let_tracks_come()

    def _let_tracks_come(self) -> None:
        """An event that is not repeated may come within the grace: the events after it wait for that."""
        lane = self._lanes["track"]
        lane.wait(self.clock.monotonic() + self.settings.grace.total_seconds(), _MAY_COME)

    def _work(self, lease: leases.Lease) -> bool:
        """One tenure; True where more became due after it ended."""
        ended: list[requests.EndedRequest] = []
        try:
            with self.open_senders() as senders:
                while True:
                    cycle = self._cycle(lease, ended)
                    if ended or cycle.bulk.became:
                        crash.at("settled")
                        self._tell()
                    if cycle.claims:
                        crash.at("claimed")
                    for claimed in cycle.claims:
                        senders.start(partial(self._send, claimed, cycle.send_by))
                    if cycle.bulk.errand is not None:
                        senders.start(partial(self._ask, cycle.bulk.errand, cycle.send_by))
                    if cycle.is_over:
                        break
                    ended = self._take_in(self._collect(senders, cycle.wait_seconds))
        except LeaseLost as lost:
            log.warning("%s", lost)
            self.report.is_left = True
            return False
        except BaseException:
            with contextlib.suppress(DatabaseError), engines.write(self.engine) as connection:
                leases.release(connection, lease)
            raise
        crash.at("lease_released")
        if self._is_ending():
            return False
        with engines.read(self.engine) as connection:  # what came after this look is not our work any more
            self.report.pending_count = due.pending_count(connection)
            return self._idle_seconds(connection) < math.inf

    def _is_ending(self) -> bool:
        return self.stop.is_set() or self.report.stopped is not None

    def _cycle(self, lease: leases.Lease, ended: list[requests.EndedRequest]) -> _Cycle:
        """Run a cycle's transaction; where the server went away, once more when it is back."""
        pauses = list(RECONNECT_SECONDS)
        while True:
            try:
                with engines.write(self.engine) as connection:
                    leases.renew(connection, lease)
                    send_by = self.clock.monotonic() + lease.seconds / 2
                    if len(pauses) < len(RECONNECT_SECONDS):  # what was committed may not have been told
                        self._recover(connection, ended)
                        self._bulk.resume(connection, self.clock.now())
                    cycle = self._step(connection, lease, ended, send_by)
                break
            except DatabaseError as error:
                cause = error.__cause__
                if (
                    dialects.is_sqlite(self.engine)
                    or not isinstance(cause, sa.exc.OperationalError)
                    or not pauses
                ):
                    raise
                log.warning("%s", error)
                self.clock.sleep(pauses.pop(0))
        for claimed in cycle.claims:
            self._in_flight[claimed.request_id] = claimed
            self._lanes[claimed.action].start(push=claimed.is_push)
        self._bulk.committed(cycle.bulk)
        self.report.accepted_count += cycle.bulk.became["accepted"]
        self._count_settled("identify", cycle.bulk.became["accepted"] + cycle.bulk.became["cancelled"])
        return cycle

    def _count_settled(self, action: str, count: int) -> None:
        self._pending[action] = self._pending.get(action, 0) - count
        self._settled_count += count

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
        found = [] if is_ending else self._claim(connection, lease.epoch)
        job_step = self._bulk.step(
            connection,
            self.clock.now(),
            lease.epoch,
            live_count=sum(each.action == "identify" for each in found),
            may_start=not self.is_gathering(),
            is_ending=is_ending,
        )
        busy = bool(found or self._in_flight or job_step.errand) or self._bulk.is_busy(is_ending=is_ending)
        wait = self._next_look(len(found)) if busy else self._idle_seconds(connection)
        is_over = not busy and (wait == math.inf or is_ending)
        self._keep_slow_downs(connection, is_over=is_over)
        if is_over:
            leases.release(connection, lease)
        return _Cycle(found, job_step, send_by, wait, is_over)

    def _claim(self, connection: sa.Connection, epoch: int) -> list[requests.ClaimedRequest]:
        """What may start now: calls before changes before pushes, the lanes in turn, each within its limit."""
        found: list[requests.ClaimedRequest] = []
        now, monotonic = self.clock.now(), self.clock.monotonic()
        self._turn += 1
        due.prefer_index_scans(connection)
        classes: Sequence[str] = due.CLASSES
        if self.is_gathering():
            classes = ("call",)
            for later in itertools.product(due.LANES, ("change", "push")):
                self._look_at[later] = monotonic + self.settings.poll_seconds
        for delivery_class in classes:
            for turn in range(len(due.LANES)):
                name, push = (
                    due.LANES[(self._turn + turn) % len(due.LANES)],
                    delivery_class == "push",
                )
                room = min(
                    self._lanes[name].room(monotonic, push=push) - sum(each.action == name for each in found),
                    MAX_IN_FLIGHT - len(self._in_flight) - len(found),
                )
                if room <= 0 or self._look_at.get((name, delivery_class), -math.inf) > monotonic:
                    continue
                fingerprint = self.settings.fingerprint
                subjects = due.subjects_due(connection, name, delivery_class, now, room, fingerprint)
                chosen = (
                    deliveries.choose_next(connection, name, subjects, now, fingerprint) if subjects else []
                )
                if chosen:
                    found += deliveries.claim(connection, name, epoch, chosen, now, is_push=push)
                if len(chosen) < room:
                    self._look_at[name, delivery_class] = monotonic + self._patience(monotonic)
        return found

    def _patience(self, since: float) -> float:
        """How long to leave a queue alone that gave less than there was room for: longer where looking takes long."""
        return max(self.settings.poll_seconds, 5 * (self.clock.monotonic() - since))

    def _send(self, claimed: requests.ClaimedRequest, send_by: float) -> Reply:
        """Not when the lease may be another's: then the same users may have been told newer values."""
        return claimed, _NOT_SENT if self.clock.monotonic() > send_by else self._answer(claimed)

    def _answer(self, claimed: requests.ClaimedRequest) -> Answer:
        try:
            body = outcomes.body_of(claimed.deliveries)
            path, payload = self.settings.build(claimed.action, claimed.subject_id, body)
        except Exception as error:  # noqa: BLE001  (whatever it holds, only this delivery may suffer)
            return Answer(Outcome.REFUSED, None, None, f"It cannot be written ({type(error).__name__})", None)
        crash.at("before_send")
        try:
            answer = self.sender.send(path, payload)
        except Exception as error:  # noqa: BLE001  (the thread's last line: it becomes the request's error)
            return Answer(Outcome.UNKNOWN, None, None, f"{type(error).__name__} while sending", None)
        crash.at("after_send")
        return answer

    def _ask(self, errand: job_state.JobRequest, send_by: float) -> Reply:
        if self.clock.monotonic() > send_by:
            return errand, _NOT_SENT
        try:
            return errand, errand.run(self.sender)
        except Exception as error:  # noqa: BLE001  (as above)
            return errand, Answer(Outcome.UNKNOWN, None, None, f"{type(error).__name__} while sending", None)

    def _collect(self, senders: Senders[Reply], wait_seconds: float) -> list[Reply]:
        """What was answered; while nothing is, wait."""
        deadline = self.clock.monotonic() + min(RENEW_SECONDS, wait_seconds)
        while True:
            left = deadline - self.clock.monotonic()
            is_asking = bool(self._in_flight) or self._bulk.is_asking
            brought = senders.collect(left if is_asking else 0)
            if brought or left <= 0 or (self.stop.is_set() and not is_asking):
                return brought
            if not is_asking:
                self.clock.sleep(min(left, self.settings.poll_seconds))

    def _take_in(self, brought: list[Reply]) -> list[requests.EndedRequest]:
        ended = []
        for asked, answer in brought:
            if isinstance(asked, job_state.JobRequest):
                self._bulk.take_in(asked, answer)
                self._heed_refused_key(answer)
                self.report.request_count += asked.what == "upload"
            else:
                ended.append(self._end(asked, answer))
        return ended

    def _end(self, claimed: requests.ClaimedRequest, answer: Answer) -> requests.EndedRequest:
        """Take an answer in: all but the database learns of it here, so that the database may be asked again."""
        now = self.clock.now()
        del self._in_flight[claimed.request_id]
        self._lanes[claimed.action].end(self.clock.monotonic())
        self._learn(claimed.action, answer)
        settings = self.settings
        retries = outcomes.Retries(self.chance, settings.grace, settings.tracks_at_most_once)
        settlements = outcomes.decide_settlements(claimed.deliveries, answer, now, retries)
        final = [each.status for each in settlements if each.status is not outcomes.Status.PENDING]
        self.report.request_count += 1
        self.report.accepted_count += final.count(outcomes.Status.ACCEPTED)
        self.report.dead_count += final.count(outcomes.Status.DEAD)
        if claimed.action == "track" and answer.outcome is Outcome.UNKNOWN and settings.tracks_at_most_once:
            self._let_tracks_come()
        self._count_settled(claimed.action, len(final))
        if claimed.action == "track" or len(final) < len(
            settlements
        ):  # the subject's next may be due at once
            for delivery_class in due.CLASSES:
                self._look_at.pop((claimed.action, delivery_class), None)
        return requests.EndedRequest(
            claimed.request_id, now, answer.status_code, answer.x_request_id, answer.error, settlements
        )

    def _learn(self, name: str, answer: Answer) -> None:
        lane, monotonic = self._lanes[name], self.clock.monotonic()
        changed = False
        match answer.outcome:
            case Outcome.ACCEPTED | Outcome.REFUSED:
                changed = lane.pause_level > 0 or lane.throttle_streak > 0
                lane.succeeded()
            case Outcome.THROTTLED:
                changed = lane.throttled(monotonic, answer.retry_after_seconds)
            case Outcome.FAILED | Outcome.UNKNOWN:
                changed = lane.failed(monotonic, answer.error or "no answer")
            case Outcome.UNAUTHORISED:
                self._heed_refused_key(answer)
        if changed:  # the reason may quote what was sent: it is for `status`, not for the log
            what = "lane slows down" if lane.reason else "lane is at its pace again"
            logs.event(log, logging.WARNING, what, lane=name, status_code=answer.status_code or "none")

    def _heed_refused_key(self, answer: Answer) -> None:
        if answer.outcome is Outcome.UNAUTHORISED and self.report.stopped is None:
            self.report.stopped = (
                f"Userpilot refused the API key (HTTP {answer.status_code}: {answer.error}). Nothing is lost: put "
                "the right key into [destination] api_key, then run `audience-sync deliver`."
            )
            log.error("the destination is stopped: HTTP %s", answer.status_code)

    def _keep_slow_downs(self, connection: sa.Connection, *, is_over: bool) -> None:
        """Write each lane's slow-down where it matters to others: when a pause begins or ends, and at the end."""
        now, monotonic = self.clock.now(), self.clock.monotonic()
        slow = {
            name: {
                "factor": round(lane.factor, 3),
                "paused_until": (
                    now + dt.timedelta(seconds=max(-1.0, lane.paused_until - monotonic))
                ).isoformat(),
                "reason": lane.reason,
            }
            for name, lane in self._lanes.items()
            if lane.factor < 1.0 or lane.paused_until > monotonic
        }
        paused = {name for name, lane in self._lanes.items() if lane.paused_until > monotonic}
        if told := self._bulk.slow_down(now):
            slow["bulk"] = told
            paused.add(f"bulk: {self._bulk.reason}")
        if slow.keys() != self._slow_downs.keys() or paused != self._paused or (is_over and slow):
            destination.set_slow_downs(connection, slow)
            self._slow_downs, self._paused = slow, paused

    def _tell(self) -> None:
        pending = {name: max(0, count) for name, count in self._pending.items()}
        done, left = self._bulk.progress()
        self.report.pending_count, self.report.bulk_done_count = sum(pending.values()), done
        in_job = min(done + left, pending.get("identify", 0))
        self.report.left = pending | {"identify": pending.get("identify", 0) - in_job, "bulk": left}
        self.report.seconds_left = self._seconds_left()
        self.on_progress(self.report)

    def _seconds_left(self) -> float:
        """From the pace of this tenure, once it says something; before that, and for what pauses, from the limits."""
        monotonic, report = self.clock.monotonic(), self.report
        paused = max(lane.paused_until for lane in self._lanes.values()) - monotonic
        elapsed = monotonic - self._began_at
        done = self._settled_count + report.bulk_done_count
        if elapsed > MEASURED_SECONDS and done:
            seconds = (report.pending_count - report.bulk_done_count) * elapsed / done
        else:
            live = {name: report.left.get(name, 0) / lane.per_second for name, lane in self._lanes.items()}
            live["identify"] = split.forecast(report.left["identify"], 0, self._bulk.pace).seconds
            seconds = max(*live.values(), self._bulk.seconds_left())
        return max(0.0, seconds, paused if report.pending_count else 0.0)

    def _next_look(self, claimed_count: int) -> float:
        """While something is under way: when another request might start beside it."""
        if self._is_ending():
            return 0.0 if self._bulk.is_busy(is_ending=True) and not self._bulk.is_asking else math.inf
        waits = [self._bulk.wait_seconds()]
        if len(self._in_flight) + claimed_count < MAX_IN_FLIGHT:
            monotonic = self.clock.monotonic()
            waits += [
                max(0.01, self._wait(name, each, monotonic)) for name in due.LANES for each in due.CLASSES
            ]
        return min(waits)

    def _idle_seconds(self, connection: sa.Connection) -> float:
        """How long to wait while nothing is in flight; infinite where nothing comes within our patience."""
        monotonic, now = self.clock.monotonic(), self.clock.now()
        waits = [
            self._wait(name, each, monotonic)
            for name in due.LANES
            for each in due.CLASSES
            if due.subjects_due(connection, name, each, now, 1, self.settings.fingerprint)
        ]
        waits += [
            max(
                self._wait(moment.action, moment.delivery_class, monotonic),
                (moment.due_at - now).total_seconds(),
            )
            for moment in due.next_due(connection, now)
        ]
        shortest = min(waits, default=math.inf)
        # A window's wait is at most a minute and a request's time; a pause beyond that ends the work.
        if shortest > IDLE_EXIT_SECONDS + 1:
            return math.inf
        return max(0.01, min(shortest, self.settings.poll_seconds))

    def _wait(self, name: str, delivery_class: str, monotonic: float) -> float:
        looked = self._look_at.get((name, delivery_class), -math.inf) - monotonic
        return max(looked, self._lanes[name].wait_seconds(monotonic, push=delivery_class == "push"))
