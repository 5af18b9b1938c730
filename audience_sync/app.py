"""The App, which connects settings, database, clock and Userpilot's client for the commands, the daemon and `intake`.

It makes no decisions. Next: audiences/runs.py for a sync, queue/worker.py for a delivery.
"""

import contextlib
import datetime as dt
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from audience_sync import logs
from audience_sync.audiences import foreign, plan, records, runs
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.clock import Clock, DatabaseClock, SystemClock
from audience_sync.db import dialects, engines, migrate, sources
from audience_sync.errors import ConfigError, SourceError
from audience_sync.queue import backlog, deliveries, progress, split
from audience_sync.queue.destination import Destination, try_to_resume
from audience_sync.queue.pace import WINDOW_SECONDS
from audience_sync.retention import pruning
from audience_sync.settings import Settings, load, queries, with_stored_keys
from audience_sync.settings.schema import span_seconds
from audience_sync.stopping import Stop
from audience_sync.userpilot import payloads
from audience_sync.userpilot.answers import Outcome

if TYPE_CHECKING:
    from audience_sync.queue.worker import Worker
    from audience_sync.userpilot.client import Client

log = logging.getLogger(__name__)


@dataclass(slots=True)
class App:
    """The settings, the database and the clock of a program, from `open_app`; the functions of `intake` take it."""

    settings: Settings
    engine: sa.Engine
    clock: Clock = field(default_factory=SystemClock)
    stop: Stop = field(default_factory=Stop)
    is_delivering: bool = False
    retired: set[str] = field(default_factory=set)  # keys
    _sources: dict[str, sa.Engine] = field(default_factory=dict)

    @property
    def destination(self) -> Destination:
        return Destination(self.settings.destination.fingerprint or None)

    def definitions(self, keys: Sequence[str] = ()) -> list[Definition]:
        """Return the enabled definitions, or those with these keys.

        Raises ConfigError if a key belongs to no definition, or was retired.
        """
        by_key = {definition.key: definition for definition in self.settings.definitions}
        for key in keys:
            if key not in by_key:
                raise ConfigError(
                    f"There is no definition with the key {key} in {self.settings.path}. "
                    f"There are: {', '.join(by_key) or 'none'}."
                )
            if key in self.retired:
                raise runs.retired_error(key)
        if keys:
            return [by_key[key] for key in dict.fromkeys(keys)]
        return [
            definition for key, definition in by_key.items() if definition.enabled and key not in self.retired
        ]

    def load_keys(self) -> None:
        """Load the keys under which the definitions were first used, and the keys that are retired.

        Raises ConfigError if two definitions have the same key, or if a key belongs to the other kind of definition.
        """
        with engines.read(self.engine) as connection:
            rows = records.all_definitions(connection)
        stored: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            stored.setdefault((row.kind, row.name), []).append(row.key)
        self.settings = with_stored_keys(self.settings, stored)
        self.retired = {row.key for row in rows if row.retired_at is not None}
        by_key = {row.key: row for row in rows}
        for definition in self.settings.definitions:
            try:
                records.check_kind(definition, by_key.get(definition.key))
            except ConfigError as error:
                raise ConfigError(f"{self.settings.path}: {error}") from None

    def source(self, definition: Definition) -> sa.Engine | None:
        """Return the engine of a definition's source; None for our own database."""
        return None if definition.source is None else self.open_source(definition.source)

    def open_source(self, name: str) -> sa.Engine:
        if name not in self._sources:
            self._sources[name] = sources.open_source(name, self.settings.sources[name].url)
        return self._sources[name]

    def client(self) -> "Client":
        from audience_sync.userpilot.client import Client  # noqa: PLC0415  (httpx: only where something is sent)

        destination = self.settings.destination
        return Client(
            destination.endpoint,
            destination.api_key.require(),
            ca_file=destination.ca_file,
            only_public=destination.is_public,
        )

    def check_key(self) -> bool:
        """Return whether the endpoint accepted the API key; False if it cannot validate keys.

        Raises ConfigError if it refuses the key or does not answer.
        """
        with self.client() as client:
            answer = client.validate()
        endpoint = self.settings.destination.endpoint
        match answer.outcome:
            case Outcome.ACCEPTED:
                return True
            case Outcome.UNAUTHORISED:
                raise ConfigError(
                    f"{endpoint} refused it (HTTP {answer.status_code}): put the right key into [destination] api_key."
                )
        if answer.status_code == 404:
            return False
        raise ConfigError(
            f"{endpoint} did not answer: {answer.error}. Check [destination] endpoint and the network."
        )

    def sync(
        self,
        definition: Definition,
        as_of: dt.datetime,
        options: runs.RunOptions = runs.RunOptions(),  # noqa: B008  (frozen)
    ) -> int:
        """Run a definition for the configured destination; return the run's id."""
        options = replace(options, destination=self.destination)
        source = partial(self.source, definition)
        return runs.sync(self.engine, definition, as_of, self.clock, options, source=source, stop=self.stop)

    @property
    def pace(self) -> split.Pace:
        """The configured limits of the lanes that send users."""
        destination = self.settings.destination
        return split.Pace(
            live_limit=destination.identify_per_minute,
            live_per_second=destination.identify_per_minute / WINDOW_SECONDS,
            rows_per_second=destination.bulk_rows_per_minute / 60,
            rows_per_job=destination.rows_per_job,
        )

    def plan(
        self, definitions: Sequence[Definition], moments: dict[str, dt.datetime]
    ) -> tuple[plan.Plans, split.Forecast]:
        """Compute what a sync of the definitions would change, and how it would be delivered."""
        pairs, errors = [], {}
        for definition in definitions:
            try:
                pairs.append((definition, self.source(definition)))
            except SourceError as error:
                errors[definition.key] = f"{definition.key}: {error}"
        planned = plan.plan(self.engine, pairs, moments, self.clock.now(), self.destination)
        push_count, user_count = planned.affected.push_count, planned.affected.user_count
        planned = replace(planned, errors=errors | planned.errors)
        return planned, split.forecast(push_count, user_count - push_count, self.pace)

    def query_definition(self, text: str, source: str | None, kind: Kind) -> Definition:
        """Return a definition for a query that is not configured, to preview or explain it."""
        return queries.unnamed_definition(self.settings, text, source, kind)

    def likely_source(self, text: str, kind: Kind) -> str | None:
        """Return the only source on which a query can run; None is the database of audience-sync."""
        return queries.likely_source(self.settings, text, kind)

    def deliver(
        self,
        run_ids: Sequence[int] = (),
        call_ids: Sequence[int] = (),
        on_progress: Callable[[progress.Report], None] = lambda _: None,
        *,
        stop: threading.Event | None = None,
        is_gathering: Callable[[], bool] = lambda: False,
    ) -> progress.Report:
        """Hold the deliveries for other destinations, then deliver what is due.

        `stop` ends only this delivery. While `is_gathering`, changes wait for changes of the same users that other runs
        are about to commit.
        """
        self.settings.destination.api_key.require()
        with engines.write(self.engine) as connection:
            held_count = foreign.hold_foreign(connection, self.destination, self.clock.now())
            ahead_count = deliveries.bring_forward(connection, self.clock.now(), dialects.now(connection))
            is_empty = not backlog.is_anything_pending(connection)
        if ahead_count:
            logs.event(log, logging.WARNING, "calls came while a clock was ahead", deliveries=ahead_count)
        if is_empty:
            return progress.Report(held_count=held_count)
        with self.client() as client:
            if reason := try_to_resume(self.engine, client):
                with engines.read(self.engine) as connection:
                    pending_count = backlog.pending_count(connection)
                return progress.Report(pending_count=pending_count, stopped=reason, held_count=held_count)
            self.is_delivering = True
            try:
                started = self.clock.monotonic()
                delivering = self._worker(client, on_progress, stop or self.stop, is_gathering)
                report = delivering.deliver(run_ids, call_ids)
                report.held_count = held_count
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
        on_progress: Callable[[progress.Report], None],
        stop: threading.Event,
        is_gathering: Callable[[], bool],
    ) -> "Worker":
        from audience_sync.queue import bulk, worker  # noqa: PLC0415  (only where something is sent)

        destination = self.settings.destination
        build = partial(payloads.build, booleans=destination.booleans, nested=destination.nested)
        return worker.Worker(
            self.engine,
            client,
            worker.DeliverySettings(
                per_minute={
                    "identify": destination.identify_per_minute,
                    "track": destination.track_per_minute,
                    "company": destination.company_per_minute,
                },
                build=build,
                tracks_at_most_once=destination.track_policy == "at_most_once",
                fingerprint=destination.fingerprint,
                jobs=bulk.BulkSettings(
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
        """Delete rows that are older than the settings allow; return the number for each table."""
        database = self.settings.database
        retention = pruning.Retention(
            calls=span_seconds(database.keep_calls),
            deliveries=span_seconds(database.keep_deliveries),
            requests=span_seconds(database.keep_requests),
            past_members=span_seconds(database.keep_past_members),
        )
        return pruning.prune(self.engine, retention, self.clock.now(), seconds=seconds)

    def reloaded(self) -> "App":
        """Return an app for the same database with the configuration file read again.

        Raises ConfigError if the file is invalid, or names another database.
        """
        settings = load(self.settings.path, resolve_keys=False)
        before, after = self.settings.database, settings.database
        if (before.url, before.schema) != (after.url, after.schema):
            raise ConfigError(f"{settings.path}: to use another [database], restart the daemon.")
        app = App(settings, self.engine, self.clock, self.stop)
        app.load_keys()
        return app

    def close_sources(self) -> None:
        """Close the idle connections to sources; those in use are closed when their run ends."""
        for engine in self._sources.values():
            engine.dispose()

    def close(self) -> None:
        self.close_sources()
        self.engine.dispose()


@contextlib.contextmanager
def open_app(path: Path | None = None, *, migrated: bool = True) -> Iterator[App]:
    """Read the configuration and open the database; create the tables in an empty one.

    Raises ConfigError if the configuration is invalid, and DatabaseError if the database cannot be used or is too old.
    """
    settings = load(path, resolve_keys=False)
    app = App(settings, engines.open_own(settings.database.url, settings.database.schema))
    try:
        if migrated:
            migrate.ensure(app.engine)
            if not dialects.is_sqlite(app.engine):  # SQLite has no clock but this machine's
                app.clock = DatabaseClock(app.clock, partial(dialects.time_of, app.engine))
            app.load_keys()
        yield app
    finally:
        app.close()
