"""The daemon, which runs definitions when their slots are due, delivers, reloads the configuration, and stops on request.

APScheduler only ticks. Each tick reads the due slots from the database, so missed ticks, clock changes, restarts and
other daemons do no harm. A tick does not wait for a lock: a later tick does what another transaction delayed. At most
[daemon] concurrency definitions run at a time, each in its own thread, which then runs the next one that is due. One
more thread delivers. Next: audiences/slots.py, which decides what is due; app.py, which runs and delivers.
"""

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from audience_sync import logs
from audience_sync.app import App
from audience_sync.audiences import runs, slots
from audience_sync.db import engines
from audience_sync.errors import AudienceSyncError, Busy, DatabaseError, DatabaseLocked, Interrupted
from audience_sync.queue import backlog, destination

log = logging.getLogger(__name__)

TICK_SECONDS = 5.0
QUEUE_POLL_SECONDS = 1.0  # also how often the clock and requests to stop or reload are checked
LOCK_SECONDS = 2.0  # the longest that a tick waits for a lock
# Changes of runs that start within this time are delivered together. At least as long passes before the next such wait.
GATHER_SECONDS = 10.0
LATE_LOG_SECONDS = 60.0  # the time between two events about the same late runs
STOPPED_SECONDS = 300.0  # the time between two checks of a refused key
IDLE_SECONDS = 15.0  # the wait after a poll at which nothing could be sent, unless something else becomes due
JUST_QUEUED = dt.timedelta(seconds=1)  # the longest time between a delivery's due time and its commit
PRUNE_SECONDS = 3600.0
ENDING_SECONDS = 60.0  # a single request may take half of it
CLOCK_SECONDS = 2.0  # the wall clock was set if it differs by more than this from the monotonic clock


def in_thread(name: str, work: Callable[[], None]) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()


def _log_error(error: AudienceSyncError, event: str = "failed") -> None:
    logs.event(log, logging.ERROR, event, error=str(error))


@dataclass(slots=True)
class Daemon:
    """The daemon. `open_again` reads the configuration again; `start` starts a run in a thread (tests run it at once)."""

    app: App
    open_again: Callable[[App], App]
    start: Callable[[str, Callable[[], None]], None] = in_thread
    # Signal handlers set these. They are not events, because a handler may interrupt code that holds an event's lock.
    stop_requested: bool = False
    reload_requested: bool = False
    _running: set[str] = field(default_factory=set)  # keys
    _given_back: set[str] = field(default_factory=set)  # keys to try again at the next tick
    _taking: threading.Lock = field(default_factory=threading.Lock)
    _gather_until: float = 0.0
    _late_log_at: float = 0.0
    _started_at: dt.datetime | None = None  # the first tick
    _heartbeat_at: dt.datetime | None = None
    _is_delayed: bool = False
    _pause_delivery: threading.Event = field(default_factory=threading.Event)
    _deliver_at: float = 0.0
    _waiting_since: dt.datetime | None = None  # deliveries that were due at this time wait for something
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
                    # If the clock was set back by an hour, the next tick would be an hour away.
                    ticker.reschedule_job("tick", trigger=interval)
                    logs.event(log, logging.WARNING, "the clock was set")
        finally:
            self.app.stop.set()
            self._pause_delivery.set()
            ticker.shutdown()  # a tick that is under way waits for locks, so a few seconds at most
            delivering.join(ENDING_SECONDS)
            self._await_runs()
            self._end_heartbeat()
            logs.event(log, logging.INFO, "daemon stopped")

    @staticmethod
    def _clock_offset() -> float:
        return time.time() - time.monotonic()  # this machine's clock, by which the ticker works

    def _await_runs(self) -> None:
        clock = self.app.clock
        end = clock.monotonic() + ENDING_SECONDS
        while self._running and clock.monotonic() < end:
            clock.sleep(0.05)

    def _end_heartbeat(self) -> None:
        """Make `status` report at once that the daemon is not running; otherwise that takes a minute."""
        try:
            if self._heartbeat_at is not None:
                with engines.write(self.app.engine, LOCK_SECONDS) as connection:
                    destination.end_heartbeat(connection, self._heartbeat_at)
        except DatabaseError as error:
            _log_error(error)

    def tick(self) -> None:
        """Record a heartbeat, start what is due, and prune from time to time."""
        app, clock = self.app, self.app.clock
        now = clock.now()
        self._started_at = min(self._started_at or now, now)
        try:
            with engines.write(app.engine, LOCK_SECONDS) as connection:
                destination.record_heartbeat(connection, now)
            self._heartbeat_at = now
            self._given_back.clear()
            while (slot := self._take_next()) is not None:
                self.start(slot.definition.key, partial(self._sync_one_by_one, app, slot))
            self._is_delayed = False
            if clock.monotonic() >= self._prune_at:
                self._prune_at = clock.monotonic() + PRUNE_SECONDS
                self.start("prune", partial(self._prune, app))
        except DatabaseLocked as error:
            if not self._is_delayed:
                self._is_delayed = True
                logs.event(log, logging.WARNING, "tick delayed", error=str(error))
        except DatabaseError as error:
            _log_error(error)

    def _take_next(self, ended: str | None = None) -> slots.Slot | None:
        """Take the slot that has been due longest, unless enough runs are running; the run of `ended` has ended."""
        with self._taking:
            app, clock = self.app, self.app.clock
            self._running.discard(ended or "")
            if app.stop.is_set():
                return None
            now = clock.now()
            skipped = self._running | self._given_back
            due = slots.find_due(app.engine, app.definitions(), now, skipped, LOCK_SECONDS)
            self._log_late(due, now)
            limit = 1 if len(self._running) < app.settings.daemon.concurrency else 0
            taken = slots.take(app.engine, due, now, limit=limit, wait_seconds=LOCK_SECONDS)
            for slot in taken:
                self._running.add(slot.definition.key)
                if clock.monotonic() >= self._gather_until + GATHER_SECONDS:
                    self._gather_until = clock.monotonic() + GATHER_SECONDS
            return taken[0] if taken else None

    def _log_late(self, due: Sequence[slots.Due], now: dt.datetime) -> None:
        # A slot that was due before this daemon started counts as due from its start.
        late_before = now - slots.LATE_AFTER
        late = [slot for slot in due if max(slot.due_at, self._started_at or now) < late_before]
        if late and self.app.clock.monotonic() >= self._late_log_at:
            self._late_log_at = self.app.clock.monotonic() + LATE_LOG_SECONDS
            first = late[0]
            seconds = round((now - first.due_at).total_seconds())
            key = first.definition.key
            logs.event(log, logging.WARNING, "runs are late", count=len(late), key=key, seconds=seconds)

    def _is_gathering(self) -> bool:
        """Return whether some of the runs that started together have not ended yet."""
        return bool(self._running) and self.app.clock.monotonic() < self._gather_until

    def _prune(self, app: App) -> None:
        try:
            app.prune()
        except DatabaseError as error:
            _log_error(error)

    def _sync_one_by_one(self, app: App, slot: slots.Slot | None) -> None:
        """Run a slot, then the slots that are due next."""
        while slot is not None:
            key = slot.definition.key
            self._sync(app, slot)
            app = self.app
            try:
                slot = self._take_next(ended=key)
            except DatabaseError:  # the next tick continues
                return
            except Exception:  # a bug; the next tick continues
                log.exception("tick crashed")
                return

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
                self._given_back.add(key)
                self._give_back(app, slot)

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
        since = self._waiting_since if app.clock.monotonic() < self._deliver_at else None
        if app.stop.is_set() or (since is None and app.clock.monotonic() < self._deliver_at):
            return
        now = app.clock.now()
        with engines.read(app.engine) as connection:
            if not (backlog.is_due(connection, now, since) or backlog.scheduled_ahead(connection, now)):
                return
        report = app.deliver(stop=self._pause_delivery, is_gathering=self._is_gathering)
        self._waiting_since = None
        if report.stopped:
            self._deliver_at = app.clock.monotonic() + STOPPED_SECONDS
        elif report.is_handed_over:  # another process delivers
            self._deliver_at = app.clock.monotonic() + IDLE_SECONDS
        elif not report.request_count:  # deliveries wait for their subject, or a lane is paused
            self._deliver_at = app.clock.monotonic() + IDLE_SECONDS
            self._waiting_since = now - JUST_QUEUED

    def reload(self) -> None:
        """Read the configuration again; if it is invalid, keep the previous one."""
        self.reload_requested = False
        before = self.app
        try:
            self.app = self.open_again(before)
        except AudienceSyncError as error:
            _log_error(error, "configuration refused; the previous one stays in use")
            return
        before.close_sources()
        self._deliver_at = 0.0
        self._pause_delivery.set()  # delivery starts again with the new key and limits
        logs.event(log, logging.INFO, "configuration reloaded", definitions=len(self.app.definitions()))
