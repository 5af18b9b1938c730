"""The composition root: settings in, wired objects out."""

import datetime as dt
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from audience_sync import settings as settings_module
from audience_sync.clock import Clock, SystemClock
from audience_sync.definitions.model import Definition
from audience_sync.delivery import worker
from audience_sync.errors import ConfigError, SourceError
from audience_sync.settings import Settings
from audience_sync.store import deliveries, engines, migrate
from audience_sync.store import runs as store_runs
from audience_sync.sync import runs
from audience_sync.userpilot import payloads
from audience_sync.userpilot.answers import Outcome

if TYPE_CHECKING:
    from audience_sync.userpilot.client import Client


@dataclass(slots=True)
class App:
    """Everything a command needs; also the handle that applications give to `intake`."""

    settings: Settings
    engine: sa.Engine
    clock: Clock = field(default_factory=SystemClock)
    stop: threading.Event = field(default_factory=threading.Event)
    is_delivering: bool = False
    _sources: dict[str, sa.Engine] = field(default_factory=dict)

    def definitions(self, keys: Sequence[str] = ()) -> list[Definition]:
        """The enabled definitions, or those with these keys.

        Raises:
            ConfigError: there is none of that key, or none at all.

        """
        known = {definition.key: definition for definition in self.settings.definitions}
        for key in keys:
            if key not in known:
                raise ConfigError(
                    f"There is no definition with the key {key} in {self.settings.path}. "
                    f"There are: {', '.join(known) or 'none'}."
                )
        if keys:
            return [known[key] for key in dict.fromkeys(keys)]
        return [definition for definition in known.values() if definition.enabled]

    def take_stored_keys(self) -> None:
        """Give each definition the key that its name had at its first use."""
        with engines.read(self.engine) as connection:
            stored = store_runs.keys_by_name(connection)
        self.settings = settings_module.with_stored_keys(self.settings, stored)

    def source(self, definition: Definition) -> sa.Engine | None:
        """The engine of a definition's source; None where that is our own database."""
        return None if definition.source is None else self.open_source(definition.source)

    def open_source(self, name: str) -> sa.Engine:
        if name not in self._sources:
            self._sources[name] = source_engine(name, self.settings.sources[name].url)
        return self._sources[name]

    def sync(self, definition: Definition, as_of: dt.datetime, *, full: bool = False) -> int:
        return runs.sync(
            self.engine,
            definition,
            as_of,
            self.clock,
            source=self.source(definition),
            full=full,
            fingerprint=self.settings.destination.fingerprint if self.settings.destination.api_key else None,
        )

    def plan(
        self, definitions: Sequence[Definition], moments: dict[str, dt.datetime]
    ) -> tuple[list[runs.Plan], int]:
        pairs = [(definition, self.source(definition)) for definition in definitions]
        return runs.plan(self.engine, pairs, moments)

    def client(self) -> "Client":
        from audience_sync.userpilot.client import Client  # noqa: PLC0415  (httpx: only where something is sent)

        destination = self.settings.destination
        return Client(destination.endpoint, destination.require_api_key(), ca_file=destination.ca_file)

    def deliver(
        self,
        run_ids: Sequence[int] = (),
        call_ids: Sequence[int] = (),
        on_progress: Callable[[worker.Report], None] = lambda _: None,
    ) -> worker.Report:
        """Deliver what is due. A stopped destination is asked first whether the key is good now."""
        self.settings.destination.require_api_key()
        with engines.read(self.engine) as connection:
            stopped = deliveries.stopped(connection)
            pending = deliveries.pending_count(connection)
        if not pending:
            return worker.Report()
        with self.client() as client:
            if stopped:
                answer = client.validate()
                if answer.outcome is Outcome.UNAUTHORISED:
                    return worker.Report(pending_count=pending, stopped=stopped[1])
                with engines.write(self.engine) as connection:
                    deliveries.go(connection)
            self.is_delivering = True
            try:
                return self._worker(client, on_progress).deliver(run_ids, call_ids)
            finally:
                self.is_delivering = False

    def _worker(self, client: "Client", on_progress: Callable[[worker.Report], None]) -> worker.Worker:
        destination = self.settings.destination
        return worker.Worker(
            self.engine,
            client,
            worker.Settings(
                per_minute={
                    "identify": destination.identify_per_minute,
                    "track": destination.track_per_minute,
                    "company": destination.company_per_minute,
                },
                build=partial(payloads.build, booleans=destination.booleans, nested=destination.nested),
                tracks_at_most_once=destination.track_policy == "at_most_once",
            ),
            self.clock,
            stop=self.stop,
            on_progress=on_progress,
        )

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
            app.take_stored_keys()
        yield app
    finally:
        app.close()


def source_engine(name: str, url: str) -> sa.Engine:
    """The engine of a source, which definitions only read.

    Raises:
        SourceError: its driver is missing, or the URL makes no sense.

    """
    try:
        parsed = sa.make_url(url)
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
