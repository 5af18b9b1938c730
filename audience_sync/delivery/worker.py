"""Work the queue: one process at a time claims, one thread decides, a few threads send.

Each cycle is one transaction: renew the lease, settle what was answered, claim what may start. What is claimed
is on record before it is sent, so that whoever comes after a crash knows what may have reached Userpilot.
"""

import datetime as dt
import logging
import queue
import random
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import sqlalchemy as sa

from audience_sync import crash
from audience_sync.clock import Clock
from audience_sync.delivery import merge
from audience_sync.delivery.pace import WINDOW_SECONDS, Lane
from audience_sync.errors import LeaseLost
from audience_sync.store import deliveries as store
from audience_sync.store import engines, leases
from audience_sync.userpilot.answers import Answer, Outcome

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 8
LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
PATIENCE_SECONDS = 60.0  # what becomes due within it is waited for
WAIT_FOR_CLAIM_SECONDS = 0.2
CLASSES = ("call", "change", "push")  # in the order of their right of way
LANES = ("track", "company", "identify")


class Sender(Protocol):
    def send(self, path: str, payload: dict[str, Any], /) -> Answer: ...


@dataclass(slots=True)
class Report:
    """The work of one process; `is_left` where another one does it, `stopped` why the destination is."""

    accepted_count: int = 0
    dead_count: int = 0
    request_count: int = 0
    pending_count: int = 0
    is_left: bool = False
    stopped: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What delivery needs of the configuration."""

    per_minute: dict[str, int]
    build: Callable[[str, str, dict[str, Any]], tuple[str, dict[str, Any]]]
    tracks_at_most_once: bool = False
    grace: dt.timedelta = merge.GRACE


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
    report: Report = field(default_factory=Report)
    _lanes: dict[str, Lane] = field(default_factory=dict)
    _answers: "queue.SimpleQueue[tuple[store.Claimed, Answer]]" = field(default_factory=queue.SimpleQueue)
    _in_flight: int = 0

    def deliver(self, run_ids: Collection[int] = (), call_ids: Collection[int] = ()) -> Report:
        """Work until nothing is due and nothing becomes due within 60 s.

        While another process has the lease: wait until it has claimed the deliveries of these runs and calls,
        then leave them to it.
        """
        while not self.stop.is_set():
            with engines.write(self.engine) as connection:
                lease = leases.acquire(connection, leases.QUEUE, LEASE_SECONDS)
                if isinstance(lease, leases.Lease):
                    self._take_over(connection)
            if isinstance(lease, leases.Lease):
                if not self._work(lease):
                    break
            elif not self._wait_for_claim(run_ids, call_ids):
                self.report.is_left = True
                break
        with engines.read(self.engine) as connection:
            self.report.pending_count = store.pending_count(connection)
        return self.report

    def _wait_for_claim(self, run_ids: Collection[int], call_ids: Collection[int]) -> bool:
        with engines.read(self.engine) as connection:
            waiting = store.are_waiting(connection, run_ids, call_ids, self.clock.now())
        if waiting:
            self.clock.sleep(WAIT_FOR_CLAIM_SECONDS)
        return waiting

    def _take_over(self, connection: sa.Connection) -> None:
        now = self.clock.now()
        lost = store.recover(
            connection, now, self.settings.grace, at_most_once=self.settings.tracks_at_most_once
        )
        if lost:
            log.warning("%d deliveries were under way in a process that is gone: they are sent again", lost)
        self._lanes = {lane: Lane(per_minute) for lane, per_minute in self.settings.per_minute.items()}
        started = self.clock.monotonic()
        for lane, ended_at in store.recent_request_ends(
            connection, now - dt.timedelta(seconds=WINDOW_SECONDS)
        ):
            if lane in self._lanes:
                self._lanes[lane].ended.append(started - max(0.0, (now - ended_at).total_seconds()))
        for lane, slow in store.slow_downs(connection).items():
            if lane in self._lanes:
                until = dt.datetime.fromisoformat(slow["paused_until"])
                self._lanes[lane].factor = slow["factor"]
                self._lanes[lane].paused_until = started + (until - now).total_seconds()
                self._lanes[lane].reason = slow["reason"]

    def _work(self, lease: leases.Lease) -> bool:
        """One tenure; True where more became due after it ended."""
        answered: list[tuple[store.Claimed, Answer]] = []
        try:
            with ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="send") as pool:
                while True:
                    with engines.write(self.engine) as connection:
                        leases.renew(connection, lease)
                        for claimed, answer in answered:
                            self._settle(connection, claimed, answer)
                        claims = [] if self._is_ending() else self._claim(connection, lease.epoch)
                        wait = None if claims or self._in_flight else self._idle_seconds(connection)
                        is_over = not claims and not self._in_flight and (wait is None or self._is_ending())
                        if is_over:
                            leases.release(connection, lease)
                    if answered:
                        crash.at("settled")
                        self.on_progress(self.report)
                    if claims:
                        crash.at("claimed")
                    for claimed in claims:
                        pool.submit(self._send, claimed)
                    if is_over:
                        break
                    answered = list(self._collect(wait))
        except LeaseLost as lost:
            log.warning("%s", lost)
            self._in_flight = 0
            self.report.is_left = True
            return False
        crash.at("lease_released")
        if self.stop.is_set() or self.report.stopped:
            return False
        with engines.read(self.engine) as connection:
            return self._has_due(connection)

    def _is_ending(self) -> bool:
        return self.stop.is_set() or self.report.stopped is not None

    def _send(self, claimed: store.Claimed) -> None:
        body = merge.body_of(claimed.deliveries)
        try:
            path, payload = self.settings.build(claimed.action, claimed.subject_id, body)
            crash.at("before_send")
            answer = self.sender.send(path, payload)
            crash.at("after_send")
        except Exception as error:  # noqa: BLE001  (the thread's last line: it becomes the request's error)
            answer = Answer(Outcome.UNKNOWN, None, None, f"{type(error).__name__} while sending", None)
        self._answers.put((claimed, answer))

    def _collect(self, wait_seconds: float | None) -> Iterator[tuple[store.Claimed, Answer]]:
        """The answers that are there; while nothing is there, wait."""
        if self._in_flight:
            timeout = min(RENEW_SECONDS, max(0.01, self._room_seconds()))
        else:
            timeout = min(RENEW_SECONDS, wait_seconds or 0.01)
        deadline = self.clock.monotonic() + timeout
        while self._answers.empty() and not (self.stop.is_set() and not self._in_flight):
            left = deadline - self.clock.monotonic()
            if left <= 0:
                return
            try:
                yield self._answers.get(timeout=min(left, 0.2))  # short, so that a signal is seen
                break
            except queue.Empty:
                continue
        while not self._answers.empty():
            yield self._answers.get()

    def _settle(self, connection: sa.Connection, claimed: store.Claimed, answer: Answer) -> None:
        self._in_flight -= 1
        self.report.request_count += 1
        now, monotonic = self.clock.now(), self.clock.monotonic()
        lane = self._lanes[claimed.action]
        lane.end(monotonic)
        settlements = merge.settle(
            claimed.deliveries,
            answer,
            now,
            self.chance,
            at_most_once=claimed.action == "track" and self.settings.tracks_at_most_once,
        )
        store.settle(
            connection,
            claimed.request_id,
            settlements,
            now,
            status_code=answer.status_code,
            x_request_id=answer.x_request_id,
            error=answer.error,
        )
        for settlement in settlements:
            self.report.accepted_count += settlement.status is store.Status.ACCEPTED
            self.report.dead_count += settlement.status is store.Status.DEAD
        self._learn(connection, claimed.action, lane, answer)

    def _learn(self, connection: sa.Connection, name: str, lane: Lane, answer: Answer) -> None:
        now, monotonic = self.clock.now(), self.clock.monotonic()
        changed = False
        match answer.outcome:
            case Outcome.ACCEPTED | Outcome.REFUSED:
                changed = lane.pause_level > 0 or lane.throttle_streak > 0
                lane.succeeded()
            case Outcome.THROTTLED:
                changed = lane.throttled(monotonic, answer.retry_after_seconds)
            case Outcome.FAILED | Outcome.UNKNOWN:
                changed = lane.failed(monotonic, answer.error or "no answer")
            case Outcome.UNAUTHORISED if self.report.stopped is None:
                self.report.stopped = (
                    f"Userpilot refused the API key (HTTP {answer.status_code}: {answer.error}). Nothing is lost: put "
                    "the right key into [destination] api_key, then run `audience-sync deliver`."
                )
                store.stop(connection, now, self.report.stopped)
                log.error("the destination is stopped: HTTP %s", answer.status_code)
        if changed:
            log.warning("the %s lane: %s", name, lane.reason or "at its pace again")
            store.set_slow_downs(
                connection,
                {
                    each: {
                        "factor": round(state.factor, 3),
                        "paused_until": (
                            now + dt.timedelta(seconds=max(0.0, state.paused_until - monotonic))
                        ).isoformat(),
                        "reason": state.reason,
                    }
                    for each, state in self._lanes.items()
                    if state.factor < 1.0 or state.paused_until > monotonic
                },
            )

    def _claim(self, connection: sa.Connection, epoch: int) -> list[store.Claimed]:
        """What may start now: calls before changes before pushes, each lane within its limit."""
        claims: list[store.Claimed] = []
        for name in LANES:
            lane = self._lanes[name]
            for delivery_class in CLASSES:
                monotonic = self.clock.monotonic()
                room = min(MAX_IN_FLIGHT - self._in_flight, lane.room(monotonic))
                is_push = delivery_class == "push"
                if is_push:
                    room = min(room, lane.push_room(monotonic, MAX_IN_FLIGHT))
                if room <= 0:
                    continue
                now = self.clock.now()
                subjects = store.subjects_due(connection, name, delivery_class, now, room)
                if not subjects:
                    continue
                for pending in store.pending_of(connection, name, subjects, now).values():
                    chosen = pending[:1] if name == "track" else merge.choose(pending)
                    claims.append(store.claim(connection, name, epoch, chosen, now, is_push=is_push))
                    lane.start(push=is_push)
                    self._in_flight += 1
        return claims

    def _has_due(self, connection: sa.Connection) -> bool:
        now = self.clock.now()
        return any(
            store.subjects_due(connection, name, delivery_class, now, 1)
            for name in LANES
            for delivery_class in CLASSES
        )

    def _idle_seconds(self, connection: sa.Connection) -> float | None:
        """How long to wait while nothing is in flight; None where nothing comes within our patience."""
        monotonic, now = self.clock.monotonic(), self.clock.now()
        waits = []
        for name in LANES:
            if any(store.subjects_due(connection, name, each, now, 1) for each in CLASSES):
                waits.append(max(0.01, self._lanes[name].wait_seconds(monotonic)))
        due_at = store.next_due_at(connection, now)
        if due_at is not None:
            waits.append(max(0.01, (due_at - now).total_seconds()))
        shortest = min(waits, default=None)
        # A window's wait is at most a minute and a request's time; a pause beyond that ends the work.
        return None if shortest is None or shortest > PATIENCE_SECONDS + 1 else shortest

    def _room_seconds(self) -> float:
        """While requests are in flight: when another one might start beside them."""
        if self._in_flight >= MAX_IN_FLIGHT or self._is_ending():
            return RENEW_SECONDS
        monotonic = self.clock.monotonic()
        return min(lane.wait_seconds(monotonic) or 0.05 for lane in self._lanes.values())
