"""Common parts of the commands: options, opening the database, signals and exit codes."""

import datetime as dt
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from audience_sync import logs
from audience_sync.cli import lazy, output
from audience_sync.errors import Busy, ConfigError, Interrupted

if TYPE_CHECKING:
    from audience_sync.app import App
    from audience_sync.queue.progress import Report

HELD = 3  # the exit code when a run is held

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
NoDeliver = Annotated[
    bool, typer.Option("--no-deliver", help="Only add to the queue; `deliver` or the daemon sends it later.")
]


def row_ids(ids: Any) -> Any:
    """Refuse ids that no row can have."""
    for row_id in ids if isinstance(ids, list) else [ids or 1]:
        if not 1 <= row_id < 2**63:
            raise typer.BadParameter(f"there cannot be a number {row_id}.")
    return ids


def stored_texts(texts: Any) -> Any:
    """Refuse keys and ids that are not UTF-8, which no database has."""
    for text in _all(texts):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise typer.BadParameter("it is not valid UTF-8.")
    return texts


def user_ids(texts: Any) -> Any:
    """Refuse ids that no user has."""
    for text in _all(texts):
        if lazy.validation.is_blank(text):
            raise typer.BadParameter(f"a user id is never {'only white space' if text else 'empty'}.")
    return stored_texts(texts)


def _all(texts: Any) -> list[str]:
    return [] if texts is None else [texts] if isinstance(texts, str) else texts


UserId = Annotated[str, typer.Argument(metavar="USER_ID", help="The user's id.", callback=user_ids)]


def _run_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text} is not the number of a run: `audience-sync history` lists them."
        ) from None


RunId = Annotated[
    int,
    typer.Argument(
        metavar="RUN_ID", help="The run's number in `history`.", callback=row_ids, parser=_run_number
    ),
]


@contextmanager
def open_app(context: typer.Context, *, migrated: bool = True) -> Iterator["App"]:
    """Open the configuration and the database that the command line names.

    On a terminal the command shows its progress itself, so logging at level info is reduced to warnings.
    """
    with lazy.app.open_app(context.obj, migrated=migrated) as app:
        settings = app.settings.logging
        quiet = settings.level == "info" and sys.stderr.isatty()
        logs.configure(settings.format, "warning" if quiet else settings.level)
        yield app


@contextmanager
def stoppable(app: "App") -> Iterator[None]:
    """Stop on SIGTERM, SIGINT or SIGHUP: during a delivery after the requests in flight, otherwise at once.

    A second signal ends the process at once. SIGHUP stays ignored if `nohup` ignored it.
    """

    def stop(_number: int, _frame: object) -> None:
        if app.stop.is_set():
            end_at_once("Stopped at once. Nothing is lost: run the command again to continue.")
        if not app.is_delivering:
            raise Interrupted("Stopped. Nothing is lost: run the command again to continue.")
        app.stop.set()
        output.warn("Stopping after the requests in flight. Press Ctrl-C again to stop at once.")

    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once(message: str) -> NoReturn:
    """Exit without waiting for requests in flight; the next process recovers them as after a crash."""
    output.warn(f"audience-sync: {message}")
    os._exit(Interrupted.exit_code)


def parse_time(text: str | None) -> dt.datetime | None:
    try:
        return None if text is None else lazy.times.parse_time(text)
    except ValueError as error:
        raise ConfigError(f"{text} is not a time: write ISO 8601, such as 2026-05-01T12:00:00Z.") from error


def finish(report: "Report | None", *, failed: bool = False, busy: bool = False, held: bool = False) -> None:
    """Exit with the code of this command's work; 1 takes precedence over 75, and 75 over 3."""
    unfinished = report is not None and (
        report.dead_count or report.stopped or (report.pending_count and not report.is_handed_over)
    )
    if failed or unfinished:
        raise typer.Exit(1)
    if busy:
        raise typer.Exit(Busy.exit_code)
    if held:
        raise typer.Exit(HELD)
