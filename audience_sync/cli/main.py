"""The commands in their groups; errors and signals become messages and exit codes.

Typer reads each command's arguments and help from its function. An indented paragraph of a docstring, such as an
example, is printed unchanged.
"""

import atexit
import gc
import inspect as introspection
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from audience_sync import __version__
from audience_sync.cli import calls, daemon, inspect, operate, output, queries, setup, status, sync
from audience_sync.errors import AudienceSyncError, Interrupted, unexpected

COMMANDS = (
    ("Set up", "init", setup.init),
    ("Set up", "check", setup.check),
    ("Set up", "demo", setup.demo),
    ("Set up", "sandbox", setup.sandbox),
    ("Set up", "password", setup.password),
    ("Set up", "db upgrade", setup.upgrade),
    ("Set up", "db current", setup.current),
    ("Set up", "db downgrade", setup.downgrade),
    ("Audiences", "preview", queries.preview),
    ("Audiences", "explain", queries.explain),
    ("Audiences", "plan", sync.plan),
    ("Audiences", "sync", sync.sync),
    ("Audiences", "approve", operate.approve),
    ("Audiences", "reject", operate.reject),
    ("Audiences", "retire", operate.retire),
    ("Delivery", "deliver", sync.deliver),
    ("Delivery", "retry", operate.retry),
    ("Delivery", "discard", operate.discard),
    ("Delivery", "forget", operate.forget),
    ("Calls", "identify", calls.identify),
    ("Calls", "track", calls.track),
    ("Calls", "group", calls.group),
    ("Calls", "import", calls.import_),
    ("Run", "daemon", daemon.daemon),
    ("Run", "serve", daemon.serve),
    ("Inspect", "status", status.status),
    ("Inspect", "list", status.list_),
    ("Inspect", "history", inspect.history),
    ("Inspect", "show", inspect.show),
    ("Inspect", "members", inspect.members),
    ("Inspect", "user", inspect.user),
    ("Inspect", "deliveries", inspect.deliveries),
    ("Inspect", "calls", inspect.calls),
)

TAKE_QUERIES = {"preview", "explain"}  # these explain themselves what to do if the shell split a query

ELSEWHERE = {  # options that people expect of a command
    "--config": "It goes before the command: `audience-sync --config FILE COMMAND`.",
    "--dry-run": "`audience-sync plan` shows what a sync would change.",
}


class Grouped(TyperGroup):
    """A group of commands whose help lists them under the headings of COMMANDS."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = list(dict.fromkeys(name.split()[0] for _, name, _ in COMMANDS))
        return sorted(super().list_commands(ctx), key=lambda name: (*names, name).index(name))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hint := ELSEWHERE.get(getattr(error, "option_name", None) or ""):
                error.message = f"{error.message}. {hint}"  # type: ignore[attr-defined]
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        headings: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            line = (name.ljust(10), command.get_short_help_str(limit=formatter.width))
            headings.setdefault(command.rich_help_panel or "Commands", []).append(line)
        for heading, lines in headings.items():
            with formatter.section(heading):
                formatter.write_dl(lines)


app = typer.Typer(
    name="audience-sync",
    cls=Grouped,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
db = typer.Typer(
    help="Show, upgrade or downgrade the version of our tables.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(db, name="db", rich_help_panel="Set up")


def _register() -> None:
    for heading, name, function in COMMANDS:
        is_db = name.startswith("db ")
        text = re.sub(r"\n\n(?=  )", "\n\n\b\n", introspection.getdoc(function) or "")
        (db if is_db else app).command(
            name.removeprefix("db "),
            help=text,
            rich_help_panel=None if is_db else heading,
            context_settings={"allow_extra_args": name in TAKE_QUERIES},
        )(function)


_register()


def _version(value: bool) -> None:
    if value:
        typer.echo(f"audience-sync {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="AUDIENCE_SYNC_CONFIG",
            help="The configuration file. By default config/audience_sync.toml, else audience_sync.toml.",
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001  (its callback prints it)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep the audiences that you compute in your database up to date in Userpilot.

    To try it without an account: `audience-sync demo`. To begin with your own database: `init`, `check`, `plan`, and
    then `sync`. `audience-sync COMMAND --help` explains each command.
    """
    context.obj = config


def main() -> None:
    # Most of the memory that a command allocates is for its imports, which stay. Collecting garbage among them would
    # take a tenth of the time of a short command, and once more at exit a quarter.
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)
    try:
        with output.streams():
            app()
    except (AudienceSyncError, Interrupted) as error:
        output.warn(f"audience-sync: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        output.warn("audience-sync: stopped")
        sys.exit(130)
    except OSError as error:
        output.warn(f"audience-sync: {error.strerror or error}")
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  (a bug: never a traceback)
        output.warn(f"audience-sync: an unexpected error: {unexpected(error)}. Please report it.")
        sys.exit(1)
    finally:
        output.drop_output()
