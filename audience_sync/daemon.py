"""Runs by itself for months: takes slots when they are due, delivers, reloads, and stops when it is asked to.

APScheduler only ticks. What is due is decided from the database at each tick, so that missed ticks, clocks that
jump, restarts and other daemons change nothing. Each run has a thread of its own, and one thread delivers.
"""

import datetime as dt
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from audience_sync import logs
from audience_sync.app import App
from audience_sync.audiences import runs, slots
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, Busy, DatabaseError, Interrupted
from audience_sync.queue import destination, due

log = logging.getLogger(__name__)

TICK_SECONDS = 5.0
QUEUE_POLL_SECONDS = 1.0  # between two looks at the queue, at the clock and at what was asked of us
MOST_AT_ONCE = 4  # definitions; one that takes long gives its place to the next
LONG_SECONDS = 10.0
STOPPED_SECONDS = 300.0  # between two questions whether a refused key is good again
IDLE_SECONDS = 15.0  # after a look at the queue at which nothing could be sent
PRUNE_SECONDS = 3600.0
ENDING_SECONDS = 60.0  # a request may take half of it
CLOCK_SECONDS = 2.0  # more than that, and the wall clock was set


def in_thread(name: str, work: Callable[[], None]) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()


def _tell(error: AudienceSyncError, what: str = "failed") -> None:
    logs.event(log, logging.ERROR, what, error=str(error))


@dataclass(slots=True)
class Daemon:
    """`open_again` reads the configuration anew; `start` begins a run's work (a test may do it at once)."""

    app: App
    open_again: Callable[[App], App]
    start: Callable[[str, Callable[[], None]], None] = in_thread
    end_asked: bool = False  # plain, because a signal's handler sets them: a lock might be held under it
    reload_asked: bool = False
    _running: dict[str, float] = field(default_factory=dict)  # since when, monotonic
    _pause_delivery: threading.Event = field(default_factory=threading.Event)
    _deliver_at: float = 0.0
    _prune_at: float = 0.0

    def run(self) -> None:
        """Work until the application is asked to stop; then finish what is in flight."""
        ticker = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(1)},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
            timezone=dt.UTC,
        )
        interval = IntervalTrigger(seconds=int(TICK_SECONDS), timezone=dt.UTC)
        ticker.add_job(self.tick, interval, id="tick", next_run_time=dt.datetime.now(dt.UTC))
        delivering = threading.Thread(target=self._deliver_on, name="deliver", daemon=True)
        delivering.start()
        ticker.start()
        logs.event(log, logging.INFO, "daemon started", definitions=len(self.app.definitions()))
        offset = self._clock_offset()
        try:
            while not self.end_asked:
                self.app.clock.sleep(QUEUE_POLL_SECONDS)
                if self.reload_asked:
                    self.reload()
                if abs(self._clock_offset() - offset) > CLOCK_SECONDS:
                    offset = self._clock_offset()
                    # Where it was set back, the ticker's next moment is as far away as it was set.
                    ticker.reschedule_job("tick", trigger=interval)
                    logs.event(log, logging.WARNING, "the clock was set")
        finally:
            self.app.stop.set()
            self._pause_delivery.set()
            ticker.shutdown(wait=False)
            delivering.join(ENDING_SECONDS)
            self._await_runs()
            logs.event(log, logging.INFO, "daemon stopped")

    def _clock_offset(self) -> float:
        clock = self.app.clock
        return clock.now().timestamp() - clock.monotonic()

    def _await_runs(self) -> None:
        clock = self.app.clock
        end = clock.monotonic() + ENDING_SECONDS
        while self._running and clock.monotonic() < end:
            clock.sleep(0.05)

    def tick(self) -> None:
        """Show a sign of life, and start what is due."""
        app, clock = self.app, self.app.clock
        try:
            with engines.write(app.engine) as connection:
                destination.record_heartbeat(connection, clock.now())
            room = MOST_AT_ONCE - self._young_count()
            if room > 0 and not app.stop.is_set():
                for slot in slots.take_due(
                    app.engine, app.definitions(), clock.now(), limit=room, running=tuple(self._running)
                ):
                    self._running[slot.definition.key] = clock.monotonic()
                    self.start(slot.definition.key, partial(self._sync, app, slot))
            if clock.monotonic() >= self._prune_at:
                self._prune_at = clock.monotonic() + PRUNE_SECONDS
                app.prune()
        except DatabaseError as error:
            _tell(error)

    def _young_count(self) -> int:
        """How many runs began lately: one that takes long does not hold the others up."""
        since = self.app.clock.monotonic() - LONG_SECONDS
        return sum(started > since for started in list(self._running.values()))

    def _sync(self, app: App, slot: slots.Slot) -> None:
        key, is_done = slot.definition.key, False
        try:
            now = app.clock.now()
            as_of = runs.resolve_as_of(app.engine, [slot.definition], None, now)[key]
            app.sync(slot.definition, as_of, full=slot.full, trigger="schedule", slot_at=slot.slot_at)
            is_done = True
        except (Busy, Interrupted) as error:
            logs.event(log, logging.INFO, f"slot given back ({type(error).__name__})", key=key)
        except AudienceSyncError as error:
            _tell(error)
            is_done = not isinstance(error, DatabaseError)
        except Exception:  # the thread's last line: the daemon goes on
            log.exception("the run of a slot broke")
            is_done = True
        finally:
            if not is_done:
                self._give_back(app, slot)
            self._running.pop(key, None)

    @staticmethod
    def _give_back(app: App, slot: slots.Slot) -> None:
        try:
            with engines.write(app.engine) as connection:
                slots.give_back(connection, slot)
        except DatabaseError as error:  # then it is cut off, and taken over in a minute
            _tell(error)

    def _deliver_on(self) -> None:
        while not self.app.stop.wait(QUEUE_POLL_SECONDS):
            try:
                self.deliver()
            except AudienceSyncError as error:
                _tell(error)
                self.app.stop.wait(TICK_SECONDS)
            except Exception:  # the thread's last line: the daemon goes on
                log.exception("delivery broke")
                self.app.stop.wait(TICK_SECONDS)

    def deliver(self) -> None:
        """Deliver what is due, if anything is. Runs that began together are waited for: a user's changes travel together."""
        self._pause_delivery.clear()
        app = self.app
        if app.stop.is_set() or app.clock.monotonic() < self._deliver_at:
            return
        with engines.read(app.engine) as connection:
            if not due.is_due(connection, app.clock.now()):
                return
        report = app.deliver(stop=self._pause_delivery, is_gathering=lambda: self._young_count() > 0)
        if report.stopped:
            self._deliver_at = app.clock.monotonic() + STOPPED_SECONDS
        elif report.is_left or not report.request_count:  # another process delivers, or a lane pauses
            self._deliver_at = app.clock.monotonic() + IDLE_SECONDS

    def reload(self) -> None:
        """Take the configuration as it is now; one that is not right is refused, and the old one goes on."""
        self.reload_asked = False
        try:
            self.app = self.open_again(self.app)
        except AudienceSyncError as error:
            _tell(error, "the configuration is refused, and the one from before goes on")
            return
        self._deliver_at = 0.0
        self._pause_delivery.set()  # it goes on with the new key and limits
        logs.event(log, logging.INFO, "configuration reloaded", definitions=len(self.app.definitions()))
