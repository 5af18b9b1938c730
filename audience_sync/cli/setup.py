"""The commands around the work: init, check, db, sandbox, demo."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audience_sync.audiences.definition import Definition
from audience_sync.cli import output
from audience_sync.cli.main import app
from audience_sync.errors import AudienceSyncError, ConfigError, DatabaseError

db = typer.Typer(help="Migrations of our own tables.", no_args_is_help=True)
app.add_typer(db, name="db")

if TYPE_CHECKING:
    from audience_sync.app import App


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="[DIR]")] = Path()) -> None:
    """Write the commented starter configuration."""
    import audience_sync

    package = Path(audience_sync.__file__).parent
    shipped = package / "_config" / "audience_sync.toml"
    starter = shipped if shipped.is_file() else package.parent / "config" / "audience_sync.toml"
    target = folder / "config" / "audience_sync.toml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(starter.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{target} is there already: it was left as it is.") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from None
    output.line(f"Wrote {target}. Edit it, set USERPILOT_API_KEY, then run `audience-sync check`.")


@app.command()
def check(
    context: typer.Context,
    accept_destination: Annotated[
        bool,
        typer.Option(
            "--accept-destination",
            help="The destination is the one that all was made for, with a new key or address.",
        ),
    ] = False,
) -> None:
    """Check configuration, databases, migrations, API key and every definition."""
    from audience_sync.audiences import foreign
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.settings import load

    settings = load(context.obj)
    output.line(f"ok    configuration {settings.path}")
    with open_app(context.obj, migrated=False) as opened:
        good = has_database = _try("database", partial(_check_database, opened))
        for name in settings.sources:
            good = _try(f"source {name}", partial(_check_source, opened, name)) and good
        has_key = _try("API key", partial(_check_key, opened))
        good = has_key and good
        if accept_destination and not (has_database and has_key):
            output.line("WRONG destination: not accepted: mend the database and the API key first")
        elif accept_destination:
            with engines.write(opened.engine) as connection:
                moved = foreign.accept_destination(connection, opened.destination)
            output.line(f"ok    destination: accepted for {', '.join(moved) or 'all that there is'}")
        if has_database:
            good = _try("destination", partial(_check_destination, opened)) and good
        for definition in opened.settings.definitions if has_database else ():
            name = f"definition {definition.key}"
            good = _try(name, partial(_check_definition, opened, definition)) and good
        if has_database:
            good = _try("keys", partial(_check_retired, opened)) and good
    if not good:
        raise typer.Exit(ConfigError.exit_code)


def _try(what: str, action: Callable[[], str]) -> bool:
    """Print the line of one check; its text is what was found."""
    try:
        found = action()
    except AudienceSyncError as error:
        output.line(f"WRONG {what}: {error}")
        return False
    output.line(f"ok    {what}: {found}")
    return True


def _check_database(opened: "App") -> str:
    from audience_sync.db import dialects, engines, migrate

    migrate.ensure(opened.engine)
    opened.load_keys()
    with engines.read(opened.engine) as connection:
        if dialects.is_sqlite(connection):
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
            return f"SQLite, journal mode {mode}, version {migrate.HEAD}"
        may = (
            "SELECT has_database_privilege(current_database(), 'TEMPORARY'), current_database(), current_user"
        )
        may_stage, database, role = connection.exec_driver_sql(may).one()
        if not may_stage:
            raise DatabaseError(
                "its role may not create temporary tables, which syncs and large imports are computed in: "
                f"GRANT TEMPORARY ON DATABASE {database} TO {role}"
            )
        return f"PostgreSQL, schema {opened.settings.database.schema}, version {migrate.HEAD}"


def _check_source(opened: "App", name: str) -> str:
    import sqlalchemy as sa

    from audience_sync.db import engines
    from audience_sync.errors import SourceError

    source = opened.open_source(name)
    try:
        with source.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            if source.dialect.name == "postgresql" and _may_write(connection):
                return "reached; its role could write: give audience-sync one that may only SELECT"
    except sa.exc.DBAPIError as error:
        raise SourceError(f"cannot be reached: {engines.reason(error)}. Is its url right?") from error
    return "reached"


def _may_write(connection: object) -> bool:
    import sqlalchemy as sa

    query = (
        "SELECT rolsuper OR EXISTS (SELECT 1 FROM information_schema.table_privileges WHERE grantee = current_user "
        "AND privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')) FROM pg_roles WHERE rolname = current_user"
    )
    return bool(connection.execute(sa.text(query)).scalar())  # type: ignore[attr-defined]


def _check_key(opened: "App") -> str:
    from audience_sync.userpilot.answers import Outcome

    with contextlib.closing(opened.client()) as client:
        answer = client.validate()
    endpoint = opened.settings.destination.endpoint
    if answer.outcome is Outcome.ACCEPTED:
        return f"Userpilot takes it ({endpoint})"
    if answer.outcome is Outcome.UNAUTHORISED:
        raise ConfigError(
            f"Userpilot refused it (HTTP {answer.status_code}): put the right key into [destination] api_key."
        )
    if answer.status_code == 404:
        return f"{endpoint} answers, but does not say whether the key is good"
    raise ConfigError(
        f"{endpoint} gave no answer: {answer.error}. Is [destination] endpoint right, and the network up?"
    )


def _check_destination(opened: "App") -> str:
    from audience_sync.audiences import foreign
    from audience_sync.db import engines
    from audience_sync.queue.destination import other_destination

    if opened.destination.fingerprint is None:
        return "not known without the key"
    with engines.read(opened.engine) as connection:
        keys = foreign.foreign_keys(connection, opened.destination)
    if keys:
        raise ConfigError(f"the last sync of {', '.join(keys)} was {other_destination(keys[0])}.")
    return "the one that all was made for"


def _check_retired(opened: "App") -> str:
    from audience_sync.audiences import records
    from audience_sync.db import engines

    configured = {definition.key for definition in opened.settings.definitions}
    with engines.read(opened.engine) as connection:
        used = {row.key for row in records.all_definitions(connection) if row.retired_at is None}
    if gone := sorted(used - configured):
        return (
            f"not in the configuration any more: {', '.join(gone)}. Userpilot keeps their last values until "
            "`audience-sync retire KEY`"
        )
    return "every key that was used is configured, or retired"


def _check_definition(opened: "App", definition: Definition) -> str:
    from audience_sync.audiences import runs, statement

    opened.definitions([definition.key])  # a retired key is an error
    source = opened.source(definition)
    warnings = statement.check(definition.sql, (source or opened.engine).dialect.name)
    moments = runs.resolve_as_of(opened.engine, [definition], None, opened.clock.now())
    plans, _ = opened.plan([definition], moments)
    return "; ".join([f"{plans[0].member_count:,} members", *warnings])


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.")] = 8787,
    api_key: Annotated[str, typer.Option(help="A toy key, not Userpilot's.")] = "sandbox",
) -> None:
    """Run a local Userpilot to try things on."""
    from audience_sync.sandbox import Sandbox

    try:
        server = Sandbox(port=port, api_key=api_key)
        output.line(
            f'A local Userpilot listens. In [destination]: endpoint = "{server.url}", api_key = "{api_key}"'
        )
        output.line(
            f"Its state: {server.url}_sandbox/state. Its requests: {server.url}_sandbox/requests. Ctrl-C ends it."
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    except OSError as error:
        raise ConfigError(
            f"Port {port} cannot be used: {error.strerror}. Choose another with --port."
        ) from error


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where its files go.")] = Path(
        "audience-sync-demo"
    ),
) -> None:
    """Sync a year of real orders to a local sandbox; needs nothing."""
    from audience_sync.cli import demo

    demo.run(folder)


@db.command()
def upgrade(context: typer.Context) -> None:
    """Bring the database to this program's version."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import migrate

    with open_app(context.obj, migrated=False) as opened:
        migrate.upgrade(opened.engine)
        output.line(f"The database is at version {migrate.HEAD}.")


@db.command()
def current(context: typer.Context) -> None:
    """Print the database's version."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import migrate

    with open_app(context.obj, migrated=False) as opened:
        revision = migrate.current(opened.engine)
        newest = "the newest" if revision == migrate.HEAD else f"this program needs {migrate.HEAD}"
        output.line(f"{revision} ({newest})" if revision else "none of our tables yet")


@db.command()
def downgrade(context: typer.Context, revision: str) -> None:
    """Go back to an older version, or to `base`: that drops all our tables and what they hold, for good."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import migrate

    if revision != "base" and revision not in migrate.KNOWN:
        raise ConfigError(f"There is no version {revision}: there are base, {', '.join(migrate.KNOWN)}.")
    with open_app(context.obj, migrated=False) as opened:
        if migrate.current(opened.engine) == migrate.HEAD:
            _need_nobody_at_work(opened)
        migrate.downgrade(opened.engine, revision)
        output.line(f"The database is at version {revision}.")


def _need_nobody_at_work(opened: "App") -> None:
    from audience_sync.db import engines, leases

    with engines.read(opened.engine) as connection:
        holders = leases.holders(connection)
    if holders:
        raise ConfigError(f"Process {holders[0].pid} on {holders[0].host} is at work: stop it first.")
