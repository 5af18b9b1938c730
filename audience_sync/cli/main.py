"""The commands, and what their errors and signals become."""

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from audience_sync import __version__
from audience_sync.errors import AudienceSyncError, Interrupted

Id = Annotated[int, typer.Argument(min=1, max=2**63 - 1)]

app = typer.Typer(
    name="audience-sync",
    help="Keeps audiences computed in your database true in Userpilot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"audience-sync {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="The configuration file.", envvar="AUDIENCE_SYNC_CONFIG")
    ] = None,
    version: Annotated[  # noqa: ARG001  (its callback prints it)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = config


def main() -> None:
    # Most of what a command makes are its imports, which stay, and what an import reads, which makes no cycles:
    # looking them over would take a tenth of its time.
    gc.set_threshold(200_000)
    from audience_sync.cli import calls, daemon, inspect, intake, operate, output, setup, sync  # noqa: F401  (they register their commands)

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
    finally:
        output.drop_output()
