"""The doors that stay open for many calls: serve, and import of a file."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from audience_sync.cli import output
from audience_sync.cli.main import app
from audience_sync.cli.sync import Json, deliver_now, end_at_once, finish, stoppable, tell_delivery
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    from audience_sync.intake.files import BadLine, Summary

MOST_SHOWN = 20  # bad lines that are told one by one


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 8040,
) -> None:
    """Take in calls by HTTP as Segment does, until SIGTERM; `daemon` delivers them."""
    from audience_sync import logs
    from audience_sync.cli.session import open_app

    try:
        from audience_sync.intake import http, server
    except ImportError as error:
        raise ConfigError("serve needs more packages: pip install 'audience-sync[web]'") from error
    from audience_sync.intake.writer import Writer

    with open_app(context.obj) as opened:
        logs.configure(opened.settings.logging.format, opened.settings.logging.level)
        if not http.is_loopback(host) and not opened.settings.tracking.require_write_keys():
            raise ConfigError(
                f"{host} is open to other machines: set [tracking] write_keys first, or listen on 127.0.0.1."
            )

        def end(_number: int, _frame: FrameType | None) -> None:
            if opened.stop.is_set():
                end_at_once("Stopped at once. What was answered is kept; the rest will be sent again.")
            opened.stop.set()

        with server.listen(host, port) as listening:
            shown = f"[{host}]" if ":" in host else host
            output.line(
                f"Listening on http://{shown}:{listening.getsockname()[1]}/ for calls. Ctrl-C ends it."
            )
            sys.stdout.flush()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, end)
            with Writer(opened) as writer:
                api = http.TrackingApi(opened, writer).asgi()
                server.TrackingServer(api, opened.stop).run(sockets=[listening])


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="NDJSON, plain or gzip; - is standard input.")],
    deliver: Annotated[bool, typer.Option("--deliver", help="Deliver what is due, too.")] = False,
    set_aside: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the bad lines there, with number and reason.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand in a file of calls, one a line; importing it again adds nothing."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.intake import files
    from audience_sync.queue import due

    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_app(context.obj))
        stack.enter_context(stoppable(opened))
        if deliver:
            opened.settings.destination.require_api_key()
        source, size = stack.enter_context(_source(file))
        on_bad = stack.enter_context(_bad_lines(set_aside, file))
        with output.bytes_read(source, size) as on_progress:
            summary = files.import_calls(opened, files.decompressed(source), on_bad, on_progress, beside=True)
        if not as_json:
            _tell(summary)
        report = deliver_now(opened) if deliver else None
        with engines.read(opened.engine) as connection:
            pending = due.pending_count(connection)
        if as_json:
            output.document(_document(summary, pending))
        else:
            tell_delivery(report, pending)
    if summary.bad_count == summary.line_count > 0:
        raise typer.Exit(1)
    finish(report)


@contextlib.contextmanager
def _source(file: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file, and its size in bytes where that is known."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    try:
        opened = Path(file).open("rb")  # noqa: SIM115
        size = Path(file).stat().st_size
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    with opened:
        yield opened, size or None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # lines hold what users told


@contextlib.contextmanager
def _bad_lines(path: Path | None, source: str) -> Iterator[Callable[["BadLine"], None]]:
    count = 0
    try:
        if path and path.exists() and source != "-" and path.samefile(source):
            raise ConfigError(f"{path} is the file itself: write the bad lines to another.")
        file = path and open(path, "w", encoding="utf-8", opener=_private)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    with file or contextlib.nullcontext() as aside:

        def tell(line: "BadLine") -> None:
            nonlocal count
            count += 1
            if count <= MOST_SHOWN:
                output.warn(f"Line {line.number}: {line.reason}.")
            if aside is not None:
                text = line.text.decode("utf-8", "replace").rstrip("\n")
                print(json.dumps({"line": line.number, "reason": line.reason, "text": text}), file=aside)

        yield tell
    if count > MOST_SHOWN:
        hint = "" if path else ": --set-aside PATH writes all of them"
        output.warn(f"And {count - MOST_SHOWN:,} more lines that are no calls{hint}.")


def _tell(summary: "Summary") -> None:
    lines = "1 line" if summary.line_count == 1 else f"{summary.line_count:,} lines"
    said = [f"{lines}: {summary.accepted_count:,} accepted"]
    for count, what in (
        (summary.ignored_count, "ignored (`audience-sync calls --status ignored` says why)"),
        (summary.repeated_count, "known already"),
        (summary.bad_count, "set aside"),
    ):
        if count:
            said.append(f"{count:,} {what}")
    output.line(f"{', '.join(said)}.")


def _document(summary: "Summary", pending: int) -> dict[str, int]:
    return {
        "line_count": summary.line_count,
        "accepted_count": summary.accepted_count,
        "ignored_count": summary.ignored_count,
        "repeated_count": summary.repeated_count,
        "set_aside_count": summary.bad_count,
        "pending_count": pending,
    }
