"""The daemon runs definitions when their slots are due, delivers, reloads the configuration, and stops on request.

APScheduler only ticks. Each tick reads from the database what is due, so missed ticks, clock changes, restarts and
other daemons do no harm. Each run has its own thread, and one thread delivers. Next: audiences/slots.py, which
decides what is due; app.py, which runs and delivers.
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
QUEUE_POLL_SECONDS = 1.0  # also how often requests to stop or reload, and the clock, are checked
MAX_RECENT_RUNS = 4  # started within LONG_RUN_SECONDS: longer runs do not hold up other definitions
LONG_RUN_SECONDS = 10.0
STOPPED_SECONDS = 300.0  # between two checks whether a refused key works again
IDLE_SECONDS = 15.0  # after a poll at which nothing could be sent
PRUNE_SECONDS = 3600.0
ENDING_SECONDS = 60.0  # a request may take half of it
CLOCK_SECONDS = 2.0  # the wall clock was set if it moves further than this against the monotonic clock


def in_thread(name: str, work: Callable[[], None]) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()


def _log_error(error: AudienceSyncError, event: str = "failed") -> None:
    logs.event(log, logging.ERROR, event, error=str(error))


@dataclass(slots=True)
class Daemon:
    """`open_again` reads the configuration again; `start` starts a run in a thread (tests run it at once)."""

    app: App
    open_again: Callable[[App], App]
    start: Callable[[str, Callable[[], None]], None] = in_thread
    # Signal handlers set these. They are not events, because a handler may interrupt code that holds an event's lock.
    stop_requested: bool = False
    reload_requested: bool = False
    _running: dict[str, float] = field(default_factory=dict)  # key: monotonic start
    _pause_delivery: threading.Event = field(default_factory=threading.Event)
    _deliver_at: float = 0.0
    _prune_at: float = 0.0

    def run(self) -> None:
        """Work until a stop is requested; then finish the requests in flight."""
        ticker = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(1)},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
            timezone=dt.UTC,
        )
        interval = IntervalTrigger(seconds=int(TICK_SECONDS), timezone=dt.UTC)
        ticker.add_job(self.tick, interval, id="tick", next_run_time=dt.datetime.now(dt.UTC))
        delivering = threading.Thread(target=self._deliver_repeatedly, name="deliver", daemon=True)
        delivering.start()
        ticker.start()
        logs.event(log, logging.INFO, "daemon started", definitions=len(self.app.definitions()))
        offset = self._clock_offset()
        try:
            while not self.stop_requested:
                self.app.clock.sleep(QUEUE_POLL_SECONDS)
                if self.reload_requested:
                    self.reload()
                if abs(self._clock_offset() - offset) > CLOCK_SECONDS:
                    offset = self._clock_offset()
                    # If the clock was set back an hour, the next tick would be an hour away.
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
        """Record a heartbeat, start what is due, and prune from time to time."""
        app, clock = self.app, self.app.clock
        try:
            with engines.write(app.engine) as connection:
                destination.record_heartbeat(connection, clock.now())
            limit = MAX_RECENT_RUNS - self._recent_count()
            if limit > 0 and not app.stop.is_set():
                running, now = tuple(self._running), clock.now()
                for slot in slots.take_due(app.engine, app.definitions(), now, limit=limit, running=running):
                    self._running[slot.definition.key] = clock.monotonic()
                    self.start(slot.definition.key, partial(self._sync, app, slot))
            if clock.monotonic() >= self._prune_at:
                self._prune_at = clock.monotonic() + PRUNE_SECONDS
                app.prune()
        except DatabaseError as error:
            _log_error(error)

    def _recent_count(self) -> int:
        """The number of runs that started in the last LONG_RUN_SECONDS and have not ended."""
        since = self.app.clock.monotonic() - LONG_RUN_SECONDS
        return sum(started > since for started in list(self._running.values()))

    def _sync(self, app: App, slot: slots.Slot) -> None:
        key, is_done = slot.definition.key, False
        try:
            now = app.clock.now()
            as_of = runs.resolve_as_of(app.engine, [slot.definition], None, now)[key]
            options = runs.RunOptions(full=slot.full, trigger="schedule", slot_at=slot.slot_at)
            app.sync(slot.definition, as_of, options)
            is_done = True
        except (Busy, Interrupted) as error:
            logs.event(log, logging.INFO, f"slot given back ({type(error).__name__})", key=key)
        except AudienceSyncError as error:
            _log_error(error)
            is_done = not isinstance(error, DatabaseError)
        except Exception:  # a bug ends this run only
            log.exception("run crashed")
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
        except DatabaseError as error:  # a slot without a run is taken again after a minute
            _log_error(error)

    def _deliver_repeatedly(self) -> None:
        while not self.app.stop.wait(QUEUE_POLL_SECONDS):
            try:
                self.deliver()
            except AudienceSyncError as error:
                _log_error(error)
                self.app.stop.wait(TICK_SECONDS)
            except Exception:  # a bug ends this attempt only
                log.exception("delivery crashed")
                self.app.stop.wait(TICK_SECONDS)

    def deliver(self) -> None:
        """Deliver what is due; wait for runs that started together, so that one request carries a user's changes."""
        self._pause_delivery.clear()
        app = self.app
        if app.stop.is_set() or app.clock.monotonic() < self._deliver_at:
            return
        with engines.read(app.engine) as connection:
            if not due.is_due(connection, app.clock.now()):
                return
        report = app.deliver(stop=self._pause_delivery, is_gathering=lambda: self._recent_count() > 0)
        if report.stopped:
            self._deliver_at = app.clock.monotonic() + STOPPED_SECONDS
        elif report.is_left or not report.request_count:  # another process delivers, or a lane is paused
            self._deliver_at = app.clock.monotonic() + IDLE_SECONDS

    def reload(self) -> None:
        """Read the configuration again; if it is invalid, the previous one stays in use."""
        self.reload_requested = False
        try:
            self.app = self.open_again(self.app)
        except AudienceSyncError as error:
            _log_error(error, "configuration refused; the previous one stays in use")
            return
        self._deliver_at = 0.0
        self._pause_delivery.set()  # delivery starts again with the new key and limits
        logs.event(log, logging.INFO, "configuration reloaded", definitions=len(self.app.definitions()))
