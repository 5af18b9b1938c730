"""The commands that submit calls: identify, track, group, and import of a file."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from audience_sync.cli import lazy, output, session, sync
from audience_sync.cli.session import Json, NoDeliver
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    from audience_sync.intake.files import BadLine, Summary

SHOWN_BAD_LINES = 20

UserId = Annotated[str, typer.Argument(metavar="USER_ID", help="The user's id.")]


def _pairs_option(name: str, description: str) -> Any:
    text = f'{description} VALUE is JSON where it parses (true, 12, "12"), else text. May be repeated.'
    return typer.Option(name, metavar="NAME=VALUE", help=text)


def identify(
    context: typer.Context,
    user_id: UserId,
    trait: Annotated[list[str] | None, _pairs_option("--trait", "A trait of the user.")] = None,
    no_deliver: NoDeliver = False,
) -> None:
    """Submit traits of a user.

    They are stored and queued, and what is due is delivered.

        audience-sync identify u1 --trait plan=pro --trait seats=12
    """
    _submit(context, {"type": "identify", "userId": user_id, "traits": pairs(trait)}, no_deliver=no_deliver)


def track(
    context: typer.Context,
    user_id: UserId,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.")],
    property_: Annotated[list[str] | None, _pairs_option("--property", "A property of the event.")] = None,
    no_deliver: NoDeliver = False,
) -> None:
    """Submit an event of a user.

    It is stored and queued, and what is due is delivered.

        audience-sync track u1 "Order Completed" --property total=12.5
    """
    call = {"type": "track", "userId": user_id, "event": event, "properties": pairs(property_)}
    _submit(context, call, no_deliver=no_deliver)


def group(
    context: typer.Context,
    user_id: UserId,
    group_id: Annotated[str, typer.Argument(metavar="GROUP_ID", help="The company's id.")],
    trait: Annotated[list[str] | None, _pairs_option("--trait", "A trait of the company.")] = None,
    no_deliver: NoDeliver = False,
) -> None:
    """Submit a user's company and its traits.

    They are stored and queued, and what is due is delivered.

        audience-sync group u1 acme --trait name="Acme Ltd" --trait size=40
    """
    call = {"type": "group", "userId": user_id, "groupId": group_id, "traits": pairs(trait)}
    _submit(context, call, no_deliver=no_deliver)


def _submit(context: typer.Context, call: dict[str, Any], *, no_deliver: bool) -> None:
    with session.open_app(context) as app, session.stoppable(app):
        if not no_deliver:
            app.settings.destination.api_key.require()
        receipt = lazy.intake.submit(app, call)
        if receipt.ignored:
            output.line(f"Call {receipt.call_id} is stored and ignored: {receipt.ignored}.")
        else:
            output.line(f"Call {receipt.call_id} is accepted for delivery.")
            if receipt.reason:
                output.line(f"A part of the call is not sent: {receipt.reason}.")
        if receipt.corrected:
            output.line(f"Corrected: {'; '.join(receipt.corrected)}.")
        if receipt.left_out:
            output.line(
                f"Left out: {', '.join(receipt.left_out)}. The key of a definition is sent by its runs only, some "
                "properties are reserved by Userpilot, and calls and users have limits."
            )
        report = None if no_deliver else sync.deliver_now(app, call_ids=[receipt.call_id])
        with lazy.engines.read(app.engine) as connection:
            sync.show_delivery(report, lazy.backlog.pending_count(connection))
    session.finish(report)


def pairs(texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE texts; a value that is not JSON is text."""
    values = {}
    for pair in texts or ():
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"{pair!r} is not NAME=VALUE: write, for example, plan=pro or age=12.")
        values[name] = lazy.operations.json_or_text(text)
    return values


def import_(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="One JSON object a line, plain or gzip; - reads standard input."),
    ],
    deliver: Annotated[bool, typer.Option("--deliver", help="Then deliver what is due.")] = False,
    keep_only: Annotated[
        bool, typer.Option("--keep-only", help="Store the calls as history without sending them.")
    ] = False,
    set_aside: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Write the lines that are not valid calls to this file, with their reasons."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Import calls from an NDJSON file.

    Each line is a call in the form that Segment's libraries send. Importing a file again changes nothing. Lines that
    are not valid calls are reported and left out.

    With --keep-only, calls fill profiles, companies and events, and nothing is sent, because Userpilot would count an old
    event as today's.

        audience-sync import calls.ndjson.gz --set-aside bad.ndjson
    """
    if deliver and keep_only:
        raise ConfigError(
            "--keep-only sends nothing: leave out --deliver, or run `audience-sync deliver` afterwards."
        )
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(session.open_app(context))
        stack.enter_context(session.stoppable(app))
        if deliver:
            app.settings.destination.api_key.require()
        source, size = stack.enter_context(_source(file))
        on_bad = stack.enter_context(_bad_lines(set_aside, file))
        with output.bytes_read(source, size) as on_progress:
            summary = lazy.files.import_calls(
                app,
                lazy.files.decompressed(source),
                on_bad,
                on_progress,
                second_process=True,
                keep_only=keep_only,
            )
        if summary.old_event_count:
            output.warn(
                f"{output.plural(summary.old_event_count, 'event')} happened over a day ago. Userpilot counts an event "
                "when it arrives, so old ones count as today's: import history with --keep-only."
            )
        if not as_json:
            _show(summary)
        report = sync.deliver_now(app) if deliver else None
        with lazy.engines.read(app.engine) as connection:
            pending = lazy.backlog.pending_count(connection)
    if as_json:
        output.document(_document(summary, pending))
    else:
        sync.show_delivery(report, pending)
    if summary.bad_count == summary.line_count > 0:
        output.warn(
            "No line is a call: import reads one JSON object a line, as Segment's libraries send them."
        )
        raise typer.Exit(1)
    session.finish(report)


@contextlib.contextmanager
def _source(file: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """Open the file; return it with its size in bytes if that is known."""
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
    return os.open(path, flags, 0o600)  # lines contain personal data


@contextlib.contextmanager
def _bad_lines(path: Path | None, source: str) -> Iterator[Callable[["BadLine"], None]]:
    """Print the first bad lines, and write all of them to a file if one is given."""
    count = 0
    try:
        if path and path.exists() and source != "-" and path.samefile(source):
            raise ConfigError(f"{path} is the file to import: name another file for --set-aside.")
        file = path and open(path, "w", encoding="utf-8", opener=_private)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    with file or contextlib.nullcontext() as set_aside:

        def report(line: "BadLine") -> None:
            nonlocal count
            count += 1
            if count <= SHOWN_BAD_LINES:
                output.warn(f"Line {line.number}: {line.reason}.")
            if set_aside is not None:
                text = line.text.decode("utf-8", "replace").rstrip("\n")
                print(json.dumps({"line": line.number, "reason": line.reason, "text": text}), file=set_aside)

        yield report
    if count > SHOWN_BAD_LINES:
        hint = "" if path else ": --set-aside PATH writes all of them to a file"
        output.warn(f"And {count - SHOWN_BAD_LINES:,} more lines that are not valid calls{hint}.")


def _show(summary: "Summary") -> None:
    parts = [f"{output.plural(summary.line_count, 'line')}: {summary.accepted_count:,} accepted"]
    for count, what in (
        (summary.ignored_count, "ignored (`audience-sync calls --status ignored` shows the reasons)"),
        (summary.kept_count, "stored as history"),
        (summary.repeated_count, "known already"),
        (summary.bad_count, "set aside"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    output.line(f"{', '.join(parts)}.")


def _document(summary: "Summary", pending: int) -> dict[str, int]:
    return {
        "line_count": summary.line_count,
        "accepted_count": summary.accepted_count,
        "ignored_count": summary.ignored_count,
        "kept_count": summary.kept_count,
        "repeated_count": summary.repeated_count,
        "set_aside_count": summary.bad_count,
        "pending_count": pending,
    }
