"""The commands for setting up: init, check, demo, sandbox, db."""

import contextlib
import getpass
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audience_sync.cli import lazy, output, session, sync
from audience_sync.errors import AudienceSyncError, ConfigError, DefinitionError, unexpected

if TYPE_CHECKING:
    from audience_sync.app import App
    from audience_sync.audiences.definition import Definition


def init(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The folder in which config/ is made."),
    ] = Path(),
) -> None:
    """Write a commented configuration file to start from.

    The file is config/audience_sync.toml; an existing file is not changed.
    """
    package = Path(__file__).parent.parent
    shipped = package / "_config" / "audience_sync.toml"
    starter = shipped if shipped.is_file() else package.parent / "config" / "audience_sync.toml"
    target = folder / "config" / "audience_sync.toml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(starter.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(
            f"{target} exists already and was not changed: edit it, or name another folder: `audience-sync init DIR`."
        ) from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from None
    place = "" if folder == Path() else f" in {folder}"
    output.line(f"Wrote {target}. Edit it, set USERPILOT_API_KEY, then run `audience-sync check`{place}.")


def check(
    context: typer.Context,
    accept_destination: Annotated[
        bool,
        typer.Option(
            "--accept-destination",
            help="Confirm that a changed endpoint or API key still leads to the same Userpilot environment.",
        ),
    ] = False,
) -> None:
    """Check the configuration, databases, API key and definitions.

    Each line begins with ok, with warn for a possible mistake, or with wrong. Sends no users and stores no members.

    Exit codes: 0, even with warnings; 2 if something is wrong.
    """
    with session.open_app(context, migrated=False) as app:
        output.line(f"ok     configuration: {app.settings.path} is valid")
        marks = Counter(_checks(app, accept_destination=accept_destination))
    warnings = output.plural(marks["warn"], "warning")
    if marks["wrong"]:
        failed = output.plural(marks["wrong"], "check") + " failed" + f", {warnings}" * bool(marks["warn"])
        output.line(f"{failed}: fix what is marked wrong, then run `audience-sync check` again.")
        raise typer.Exit(ConfigError.exit_code)
    ready = f"Everything is ready{f', with {warnings}' if marks['warn'] else ''}."
    output.line(f"{ready} `audience-sync plan` shows what a sync would send.")


@dataclass(frozen=True, slots=True)
class _Passed:
    """The result of a check that did not fail; each warning describes a possible mistake."""

    text: str = ""
    warnings: Sequence[str] = ()


def _checks(app: "App", *, accept_destination: bool) -> Iterator[str]:
    """Make the checks one by one; yield the mark of each printed line."""
    yield from (database := _try("database", partial(_check_database, app)))
    for name in app.settings.sources:
        yield from _try(f"source {name}", partial(_check_source, app, name))
    yield from (key := _try("API key", partial(_check_key, app)))
    if accept_destination and "wrong" in database + key:
        output.line("wrong  destination: not accepted, because the database or the API key is wrong")
    elif accept_destination:
        with lazy.engines.write(app.engine) as connection:
            keys = lazy.foreign.accept_destination(connection, app.destination)
        output.line(f"ok     destination: accepted for {', '.join(keys) or 'everything'}")
    if "wrong" not in database:
        yield from _checks_with_database(app)


def _checks_with_database(app: "App") -> Iterator[str]:
    if app.destination.fingerprint is not None:  # without one, the API key is marked wrong
        yield from _try("destination", partial(_check_destination, app))
    yield from (keys := _try("keys", partial(_check_keys, app)))
    if app.settings.tables:
        yield from _try("tables", partial(_check_tables, app))
    for definition in app.settings.definitions if "wrong" not in keys else ():
        yield from _try(f"definition {definition.key}", partial(_check_definition, app, definition))


def _try(name: str, action: Callable[[], _Passed]) -> list[str]:
    """Make one check and print its result; return the mark of each line."""
    try:
        passed = action()
    except AudienceSyncError as error:
        lines = [("wrong", str(error).removeprefix(f"{name.rsplit(maxsplit=1)[-1]}: "))]
    except Exception as error:  # noqa: BLE001  (such as a driver's, about a parameter of a url)
        lines = [("wrong", f"an unexpected error: {unexpected(error)}")]
    else:
        lines = [("warn", warning) for warning in passed.warnings] or [("ok", passed.text)]
        if passed.text and passed.warnings:
            lines[0] = ("warn", f"{passed.text}, but {passed.warnings[0]}")
    for mark, text in lines:
        output.line(f"{mark:<5}  {name}: {text}")
    return [mark for mark, _ in lines]


def _check_database(app: "App") -> _Passed:
    lazy.migrate.ensure(app.engine)
    description = lazy.checks.check_own(app.engine, app.settings.database.schema)
    return _Passed(f"{description}, version {lazy.migrate.HEAD} of our tables")


def _check_source(app: "App", name: str) -> _Passed:
    engine = app.open_source(name)
    is_writable = lazy.checks.source_is_writable(engine)
    if engine.dialect.name not in lazy.statement.SUPPORTED:
        warning = (
            "reachable, experimental: neither a timeout nor Ctrl-C ends a running statement, and only the check of the "
            "SQL keeps a definition from writing: give audience-sync a role that may only SELECT"
        )
        return _Passed(warnings=[warning])
    if is_writable:
        return _Passed("reachable", ["its role may write: give audience-sync a role that may only SELECT"])
    return _Passed("reachable")


def _check_key(app: "App") -> _Passed:
    endpoint = app.settings.destination.endpoint
    if app.check_key():
        return _Passed(f"accepted by {endpoint}")
    return _Passed(warnings=[f"not verified, because {endpoint} answers but has no way to validate a key"])


def _check_destination(app: "App") -> _Passed:
    with lazy.engines.read(app.engine) as connection:
        keys = lazy.foreign.foreign_keys(connection, app.destination)
    if keys:
        message = lazy.destination.other_destination(*(keys if len(keys) == 1 else ()))
        raise ConfigError(f"the last sync of {', '.join(keys)} was {message}.")
    return _Passed("unchanged")


def _check_keys(app: "App") -> _Passed:
    app.load_keys()
    with lazy.engines.read(app.engine) as connection:
        definitions = lazy.history.definitions(connection, app.settings, app.clock.now())
        is_any_used = bool(lazy.history.definition_keys(connection))
    keys = sorted(row["key"] for row in definitions if row["state"] == "not configured")
    if keys:
        warning = (
            f"no longer in the configuration: {', '.join(keys)}. Userpilot keeps their last values until "
            "`audience-sync retire KEY`"
        )
        return _Passed(warnings=[warning])
    return _Passed(
        "every key that was synced is configured or retired" if is_any_used else "none was synced yet"
    )


def _check_tables(app: "App") -> _Passed:
    """Check whether [tables.*] hide the profiles of calls. Their columns are checked with each definition."""
    with lazy.engines.read(app.engine) as connection:
        warning = lazy.review.hidden_profiles(connection, app.settings.tables)
    return _Passed(f"{len(app.settings.tables):,} mapped", [warning] if warning else [])


def _check_definition(app: "App", definition: "Definition") -> _Passed:
    app.definitions([definition.key])  # a retired key is an error
    engine = app.source(definition) or app.engine
    warnings = []
    if definition.query is None:
        warnings = lazy.statement.check(definition.sql, engine.dialect.name)
    moments = lazy.runs.resolve_as_of(app.engine, [definition], None, app.clock.now())
    planned, _ = app.plan([definition], moments)
    for message in planned.errors.values():
        raise DefinitionError(message)
    warnings += lazy.compute.review(app.engine, definition, moments[definition.key], app.source(definition))
    (plan,) = planned.plans
    for name in ("max_exit_ratio", "max_change_ratio"):
        if (ratio := getattr(definition.guard, name)) > 1:  # it looks like a percentage
            warnings.append(f"{name} is {ratio:g}, which no run exceeds: it is a share, and half is 0.5")
    if plan.unusable:
        warnings.append(f"a sync would leave out {sync.describe_unusable(plan.unusable)}")
    return _Passed(output.plural(plan.member_count, "member"), warnings)


def _percent(text: str) -> float:
    try:
        share = float(str(text).removesuffix("%"))  # the default is a number
    except ValueError:
        share = -1
    if not 0 <= share <= 100:
        raise typer.BadParameter(f"{text} is not a share such as 3%.")
    return share


def sandbox(
    port: Annotated[
        int, typer.Option(metavar="PORT", help="The port to listen on; 0 takes a free one.")
    ] = 8787,
    api_key: Annotated[str, typer.Option(metavar="KEY", help="The key to accept; any text.")] = "sandbox",
    refuse: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            parser=_percent,
            help="Refuse this share of the requests with HTTP 400, such as 3%, to try dead deliveries. Not bulk jobs.",
        ),
    ] = 0,
) -> None:
    """Run a local stand-in for Userpilot.

    It answers like Userpilot, within the documented limits, and keeps everything in memory until Ctrl-C.

        audience-sync sandbox --refuse 3%
    """
    try:
        server = lazy.sandbox.Sandbox(
            port=port, api_key=api_key, limits=lazy.sandbox.Limits(refused_percent=refuse)
        ).start()
        output.line("A local stand-in for Userpilot is running. To use it, set in your configuration:")
        output.line(f'  [destination]\n  endpoint = "{server.url}"\n  api_key = "{api_key}"')
        output.line(f"Users and companies that it received: {server.url}_sandbox/state")
        output.line(f"Requests that it received: {server.url}_sandbox/requests")
        output.line("Ctrl-C stops it.")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    except OSError as error:
        raise ConfigError(
            f"Port {port} cannot be used: {error.strerror}. Choose another one with --port."
        ) from error


def demo(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A new folder for its files, or that of an earlier demo."),
    ] = Path("audience-sync-demo"),
) -> None:
    """Try everything on real orders, without an account.

    Starts a local stand-in for Userpilot, loads a year of orders into SQLite, syncs three audiences for each day of a
    month and sends a few calls. It ends with commands that explore the result; the first, `serve`, shows it in a browser.
    """
    lazy.demo.run(folder)


def password() -> None:
    """Make the hash of a password for [[web.users]].

    Asks twice on a terminal; otherwise it reads a line of standard input. The hash goes to standard output.
    """
    try:
        if sys.stdin is not None and sys.stdin.isatty():
            given = getpass.getpass("Password: ")
            if given != getpass.getpass("Repeat the password: "):
                raise ConfigError("The passwords differ. Run `audience-sync password` again.")
        else:
            given = (sys.stdin.buffer.readline() if sys.stdin else b"").decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ConfigError("The password is not UTF-8.") from None
    except EOFError:
        raise ConfigError("No password was given.") from None
    if len(given) < lazy.passwords.MIN_LENGTH:
        raise ConfigError(f"The password is too short: use at least {lazy.passwords.MIN_LENGTH} characters.")
    output.line(lazy.passwords.hash_password(given))


def upgrade(context: typer.Context) -> None:
    """Upgrade our tables to the version that this program needs.

    Back the database up first.
    """
    with session.open_app(context, migrated=False) as app:
        lazy.migrate.upgrade(app.engine)
    output.line(f"Our tables are at version {lazy.migrate.HEAD}, as this program needs.")


def current(context: typer.Context) -> None:
    """Show the version of our tables."""
    with session.open_app(context, migrated=False) as app:
        revision = lazy.migrate.current(app.engine)
    if revision is None:
        output.line(
            "The database has none of our tables yet: the first command that needs them creates them."
        )
    elif revision == lazy.migrate.HEAD:
        output.line(f"{revision} (the newest)")
    else:
        output.line(
            f"{revision} (this program needs {lazy.migrate.HEAD}: back up, then `audience-sync db upgrade`)"
        )


def downgrade(
    context: typer.Context,
    revision: Annotated[
        str, typer.Argument(metavar="VERSION", help="An older version of our tables, or base.")
    ],
) -> None:
    """Downgrade our tables to an older version.

    `base` drops all our tables and everything in them, for good.
    """
    if revision != "base" and revision not in lazy.migrate.KNOWN:
        raise ConfigError(f"There is no version {revision}: choose base, {', '.join(lazy.migrate.KNOWN)}.")
    with session.open_app(context, migrated=False) as app:
        if lazy.migrate.current(app.engine) == lazy.migrate.HEAD:
            _require_idle(app)
        lazy.migrate.downgrade(app.engine, revision)
    output.line(f"Our tables are at version {revision}.")


def _require_idle(app: "App") -> None:
    with lazy.engines.read(app.engine) as connection:
        holders = lazy.leases.holders(connection)
    if holders:
        raise ConfigError(f"Process {holders[0].pid} on {holders[0].host} is working: stop it first.")
