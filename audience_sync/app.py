"""The composition root: settings in, wired objects out."""

import datetime as dt
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from audience_sync import logs
from audience_sync import settings as settings_module
from audience_sync.audiences import decisions, foreign, plan, records, runs
from audience_sync.audiences.definition import Definition
from audience_sync.clock import Clock, SystemClock
from audience_sync.db import engines, migrate
from audience_sync.errors import ConfigError, NotForgotten, SourceError
from audience_sync.queue import bulk, due, split, worker
from audience_sync.queue import destination as destination_module
from audience_sync.queue.destination import Destination
from audience_sync.queue.pace import WINDOW_SECONDS
from audience_sync.retention import erasure, pruning
from audience_sync.settings import Settings
from audience_sync.settings.schema import span_seconds
from audience_sync.stopping import Stop
from audience_sync.userpilot import payloads
from audience_sync.userpilot.answers import Outcome

log = logging.getLogger(__name__)

DELETION_ATTEMPTS = 4
DELETION_PAUSE_SECONDS = 2.5  # one request in 2 s, documented

if TYPE_CHECKING:
    from audience_sync.userpilot.client import Client


@dataclass(slots=True)
class App:
    """Everything a command needs; also the handle that applications give to `intake`."""

    settings: Settings
    engine: sa.Engine
    clock: Clock = field(default_factory=SystemClock)
    stop: Stop = field(default_factory=Stop)
    is_delivering: bool = False
    retired: set[str] = field(default_factory=set)  # keys
    _sources: dict[str, sa.Engine] = field(default_factory=dict)

    def definitions(self, keys: Sequence[str] = ()) -> list[Definition]:
        """The enabled definitions, or those with these keys.

        Raises:
            ConfigError: there is none of that key, or it was retired.

        """
        known = {definition.key: definition for definition in self.settings.definitions}
        for key in keys:
            if key not in known:
                raise ConfigError(
                    f"There is no definition with the key {key} in {self.settings.path}. "
                    f"There are: {', '.join(known) or 'none'}."
                )
            if key in self.retired:
                raise runs.retired_error(key)
        if keys:
            return [known[key] for key in dict.fromkeys(keys)]
        return [each for key, each in known.items() if each.enabled and key not in self.retired]

    def learn_keys(self) -> None:
        """Give each definition the key that its name had at its first use, and learn which keys rest."""
        with engines.read(self.engine) as connection:
            rows = records.all_definitions(connection)
        stored: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            stored.setdefault((row.kind, row.name), []).append(row.key)
        self.settings = settings_module.with_stored_keys(self.settings, stored)
        self.retired = {row.key for row in rows if row.retired_at is not None}

    def source(self, definition: Definition) -> sa.Engine | None:
        """The engine of a definition's source; None where that is our own database."""
        return None if definition.source is None else self.open_source(definition.source)

    def open_source(self, name: str) -> sa.Engine:
        if name not in self._sources:
            self._sources[name] = source_engine(name, self.settings.sources[name].url)
        return self._sources[name]

    def sync(
        self,
        definition: Definition,
        as_of: dt.datetime,
        *,
        full: bool = False,
        hold: bool = False,
        users: Sequence[str] = (),
        trigger: str = "manual",
        slot_at: dt.datetime | None = None,
    ) -> int:
        """Run a definition (see `runs.sync`); return the run's id."""
        options = runs.RunOptions(
            full=full,
            hold=hold,
            users=tuple(users) or None,
            trigger=trigger,
            slot_at=slot_at,
            destination=self.destination,
        )
        source = partial(self.source, definition)
        return runs.sync(self.engine, definition, as_of, self.clock, options, source=source, stop=self.stop)

    def plan(
        self, definitions: Sequence[Definition], moments: dict[str, dt.datetime]
    ) -> tuple[list[plan.Plan], split.Forecast]:
        """What a sync of the definitions would change, and how it would be delivered."""
        pairs = [(definition, self.source(definition)) for definition in definitions]
        planned = plan.plan(self.engine, pairs, moments, self.clock.now(), self.destination)
        affected = planned.affected
        destination = self.settings.destination
        pace = split.Pace(
            live_limit=destination.identify_per_minute,
            live_per_second=destination.identify_per_minute / WINDOW_SECONDS,
            rows_per_second=destination.bulk_rows_per_minute / 60,
            rows_per_job=destination.rows_per_job,
        )
        return planned.plans, split.forecast(
            affected.push_count, affected.user_count - affected.push_count, pace
        )

    def approve(self, run_id: int) -> None:
        decisions.approve(self.engine, run_id, self.clock, self.destination)

    def reject(self, run_id: int) -> None:
        decisions.reject(self.engine, run_id, self.clock)

    def retire(self, key: str) -> int:
        return decisions.retire(self.engine, key, self.clock, self.destination)

    def forget(self, user_id: str) -> int:
        """Have Userpilot delete a user, then erase what is here; how many memberships that ended.

        Raises:
            NotForgotten: Userpilot did not take it; nothing was changed.

        """
        with self.client() as client:
            answer = client.delete_user(user_id)
            for _ in range(DELETION_ATTEMPTS - 1):
                if answer.outcome in {Outcome.ACCEPTED, Outcome.REFUSED, Outcome.UNAUTHORISED}:
                    break
                self.clock.sleep(answer.retry_after_seconds or DELETION_PAUSE_SECONDS)
                answer = client.delete_user(user_id)
        if answer.outcome is not Outcome.ACCEPTED:
            raise NotForgotten(
                f"Userpilot did not take the deletion ({answer.error}), so nothing was changed: run it again."
            )
        with engines.write(self.engine) as connection:
            return erasure.forget(connection, user_id, self.clock.now())

    def allow_return(self, user_id: str) -> dt.datetime | None:
        with engines.write(self.engine) as connection:
            return erasure.allow_return(connection, user_id)

    def accept_destination(self) -> list[str]:
        """Take the configured destination for the one that everything was made for; the keys that this moved."""
        self.settings.destination.require_api_key()
        with engines.write(self.engine) as connection:
            return foreign.accept_destination(connection, self.destination)

    @property
    def destination(self) -> Destination:
        return Destination(self.settings.destination.fingerprint or None)

    def client(self) -> "Client":
        from audience_sync.userpilot.client import Client  # noqa: PLC0415  (httpx: only where something is sent)

        destination = self.settings.destination
        return Client(
            destination.endpoint,
            destination.require_api_key(),
            ca_file=destination.ca_file,
            only_public=destination.is_public,
        )

    def deliver(
        self,
        run_ids: Sequence[int] = (),
        call_ids: Sequence[int] = (),
        on_progress: Callable[[worker.Report], None] = lambda _: None,
        *,
        stop: threading.Event | None = None,
        is_gathering: Callable[[], bool] = lambda: False,
    ) -> worker.Report:
        """Deliver what is due. A stopped destination is asked first whether the key is good now.

        What was made for another destination is held, and counted in the report. `stop` ends this delivery
        alone; while `is_gathering`, changes wait for those that other runs are about to commit.
        """
        self.settings.destination.require_api_key()
        with engines.write(self.engine) as connection:
            held = foreign.hold_foreign(connection, self.destination, self.clock.now())
            stopped = destination_module.stopped(connection)
            is_empty = not due.is_anything_pending(connection)
        if is_empty:
            return worker.Report(held_count=held)
        with self.client() as client:
            if stopped:
                answer = client.validate()
                if answer.outcome is Outcome.UNAUTHORISED:
                    with engines.read(self.engine) as connection:
                        pending = due.pending_count(connection)
                    return worker.Report(pending_count=pending, stopped=stopped[1], held_count=held)
                with engines.write(self.engine) as connection:
                    destination_module.resume(connection)
            self.is_delivering = True
            try:
                started = self.clock.monotonic()
                working = self._worker(client, on_progress, stop or self.stop, is_gathering)
                report = working.deliver(run_ids, call_ids)
                report.held_count = held
                if report.request_count:
                    logs.event(
                        log,
                        logging.INFO,
                        "delivered",
                        accepted=report.accepted_count,
                        dead=report.dead_count,
                        pending=report.pending_count,
                        requests=report.request_count,
                        seconds=round(self.clock.monotonic() - started, 3),
                    )
                return report
            finally:
                self.is_delivering = False

    def _worker(
        self,
        client: "Client",
        on_progress: Callable[[worker.Report], None],
        stop: threading.Event,
        is_gathering: Callable[[], bool],
    ) -> worker.Worker:
        destination = self.settings.destination
        build = partial(payloads.build, booleans=destination.booleans, nested=destination.nested)
        return worker.Worker(
            self.engine,
            client,
            worker.Settings(
                per_minute={
                    "identify": destination.identify_per_minute,
                    "track": destination.track_per_minute,
                    "company": destination.company_per_minute,
                },
                build=build,
                tracks_at_most_once=destination.track_policy == "at_most_once",
                fingerprint=destination.fingerprint,
                jobs=bulk.Settings(
                    row=lambda user_id, body: payloads.bulk_row(build("identify", user_id, body)[1]),
                    rows_per_minute=destination.bulk_rows_per_minute,
                    rows_per_job=destination.rows_per_job,
                    fingerprint=destination.fingerprint,
                ),
            ),
            self.clock,
            stop=stop,
            on_progress=on_progress,
            is_gathering=is_gathering,
        )

    def prune(self, seconds: float = 5.0) -> dict[str, int]:
        """Remove what is older than the configuration keeps it; how many rows of each table went."""
        database = self.settings.database
        keep = pruning.Retention(
            calls=span_seconds(database.keep_calls),
            deliveries=span_seconds(database.keep_deliveries),
            requests=span_seconds(database.keep_requests),
            past_members=span_seconds(database.keep_past_members),
        )
        return pruning.prune(self.engine, keep, self.clock.now(), seconds=seconds)

    def reloaded(self) -> "App":
        """The configuration as it is now, on the same database.

        Raises:
            ConfigError: it is not right, or names another database.

        """
        settings = settings_module.load(self.settings.path)
        before, after = self.settings.database, settings.database
        if (before.url, before.schema) != (after.url, after.schema):
            raise ConfigError(f"{settings.path}: another [database] takes a restart.")
        again = App(settings, self.engine, self.clock, self.stop)
        again.learn_keys()
        return again

    def close(self) -> None:
        for engine in (self.engine, *self._sources.values()):
            engine.dispose()


@contextmanager
def open_app(path: Path | None = None, *, migrated: bool = True) -> Iterator[App]:
    """Read the configuration and open the database; a new database is set up.

    Raises:
        ConfigError: the configuration is not right.
        DatabaseError: the database cannot be used, or is behind.

    """
    settings = settings_module.load(path)
    app = App(settings, engines.open_own(settings.database.url, settings.database.schema))
    try:
        if migrated:
            migrate.ensure(app.engine)
            app.learn_keys()
        yield app
    finally:
        app.close()


def source_engine(name: str, url: str) -> sa.Engine:
    """The engine of a source, which definitions only read.

    Raises:
        SourceError: its driver is missing, or the URL makes no sense.

    """
    try:
        parsed = engines.parse_url(url)
        if parsed.get_backend_name() == "sqlite":
            return engines.open_sqlite_source(parsed)
        if parsed.get_backend_name() == "postgresql":
            return engines.open_postgresql_source(parsed)
        return sa.create_engine(parsed, hide_parameters=True, pool_pre_ping=True)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as error:
        raise SourceError(
            f"The source {name} cannot be opened: {type(error).__name__}. Is its url right, and is the Python "
            "driver that it names installed?"
        ) from error
