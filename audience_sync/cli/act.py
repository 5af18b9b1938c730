"""The commands that compute and send: plan, sync, deliver, identify, track, group, retry, discard."""

import datetime as dt
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audience_sync.cli import say
from audience_sync.cli.main import app
from audience_sync.errors import Busy, ConfigError, Interrupted

if TYPE_CHECKING:
    from audience_sync.app import App
    from audience_sync.delivery.worker import Report
    from audience_sync.sync import runs

Keys = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY]...", help="The definitions; all enabled ones if none.")
]
AsOf = Annotated[
    str | None, typer.Option(help="The moment to compute for (ISO 8601; UTC if it says nothing).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoDeliver = Annotated[bool, typer.Option("--no-deliver", help="Only queue; send nothing.")]


@contextmanager
def stoppable(opened: "App") -> Iterator[None]:
    """SIGTERM and Ctrl-C: a delivery finishes what is in flight, anything else ends at once; twice ends all."""

    def ask(_number: int, _frame: object) -> None:
        if opened.is_delivering and not opened.stop.is_set():
            opened.stop.set()
            say.aside("Stopping: finishing what is in flight.")
        else:
            raise Interrupted("Stopped. Nothing is lost: run the command again to go on.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def plan(context: typer.Context, keys: Keys = None, as_of: AsOf = None, as_json: Json = False) -> None:
    """Compute and compare; send and store nothing."""
    from audience_sync.cli.session import open_app
    from audience_sync.sync import runs

    with open_app(context.obj) as opened, stoppable(opened):
        definitions = opened.definitions(keys or ())
        moments = runs.resolve_as_of(opened.engine, definitions, moment(as_of), opened.clock.now())
        plans, request_count = opened.plan(definitions, moments)
        seconds = max(0.0, request_count * 60 / opened.settings.destination.identify_per_minute)
        if as_json:
            delivery = {
                "request_count": request_count,
                "bulk_row_count": 0,
                "estimated_seconds": round(seconds, 1),
            }
            say.document({"definitions": [_plan(each) for each in plans], "delivery": delivery})
            return
        rows = [
            [
                each.key,
                say.count(each.member_count),
                *(say.count(each.counts.get(name, 0)) for name in CHANGES),
            ]
            for each in plans
        ]
        say.table(["key", "members", *CHANGES], rows, numbers=["members", *CHANGES])
        for each in plans:
            for name, users in each.samples.items():
                if users:
                    say.line(f"{each.key} {name}, for example: {', '.join(users)}")
        say.line(
            f"It would take {request_count:,} requests: {say.span(seconds)} at the pace of this configuration."
        )


CHANGES = ("entered", "exited", "changed")


def _plan(each: "runs.Plan") -> dict[str, Any]:
    return {
        "key": each.key,
        "member_count": each.member_count,
        "entered_count": each.counts.get("entered", 0),
        "exited_count": each.counts.get("exited", 0),
        "changed_count": each.counts.get("changed", 0),
        "entered_sample": each.samples.get("entered", []),
        "exited_sample": each.samples.get("exited", []),
        "held_by": None,
    }


@app.command()
def sync(
    context: typer.Context,
    keys: Keys = None,
    full: Annotated[bool, typer.Option("--full", help="Send every member and everyone who left.")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Not yet: wait for `approve`.")] = False,
    user: Annotated[list[str] | None, typer.Option(help="Not yet: a canary of these users.")] = None,
    as_of: AsOf = None,
    no_deliver: NoDeliver = False,
    as_json: Json = False,
) -> None:
    """Compute the definitions, then deliver what changed."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import deliveries, engines, looks
    from audience_sync.sync import runs

    for name, value in (("--hold", hold), ("--user", user)):
        if value:
            not_yet(name)
    with open_app(context.obj) as opened, stoppable(opened):
        if not no_deliver:
            opened.settings.destination.require_api_key()
        definitions = opened.definitions(keys or ())
        if not definitions:
            raise ConfigError(
                f"{opened.settings.path} has no definition that is enabled: add one to [[audiences]]."
            )
        moments = runs.resolve_as_of(opened.engine, definitions, moment(as_of), opened.clock.now())
        run_ids, busy = [], []
        for definition in definitions:
            try:
                run_ids.append(opened.sync(definition, moments[definition.key], full=full))
            except Busy as error:
                busy.append(str(error))
                say.aside(f"audience-sync: {error}")
        report = None if no_deliver else deliver_now(opened, run_ids)
        with engines.read(opened.engine) as connection:
            found = looks.run_rows(connection, ids=run_ids)[::-1]
            pending = deliveries.pending_count(connection)
        if as_json:
            say.document({"runs": found, "delivery": _delivery(report, pending)})
        else:
            show_runs(found)
            tell_delivery(report, pending)
    failed = any(each["status"] == "failed" for each in found)
    finish(report, failed=failed, busy=bool(busy))


def show_runs(found: Sequence[dict[str, Any]]) -> None:
    """One line a run; errors below."""
    rows = [
        [
            str(each["run_id"]),
            each["key"],
            each["mode"],
            each["status"],
            *(say.count(each[f"{name}_count"]) for name in ("member", *CHANGES)),
        ]
        for each in found
    ]
    names = ["members", *CHANGES]
    say.table(["run", "key", "mode", "status", *names], rows, numbers=["run", *names])
    for each in found:
        if each["error"]:
            say.line(f"Run {each['run_id']} {each['status']}: {each['error']}")
        if each["set_aside_count"]:
            say.line(
                f"Run {each['run_id']}: {each['set_aside_count']:,} rows were set aside "
                f"(`audience-sync show {each['run_id']}` says why)."
            )


@app.command()
def deliver(context: typer.Context, as_json: Json = False) -> None:
    """Deliver what is due."""
    from audience_sync.cli.session import open_app

    with open_app(context.obj) as opened, stoppable(opened):
        report = deliver_now(opened)
        if as_json:
            say.document(_delivery(report, report.pending_count))
        else:
            tell_delivery(report, report.pending_count)
    finish(report)


def deliver_now(opened: "App", run_ids: Sequence[int] = (), call_ids: Sequence[int] = ()) -> "Report":
    with say.progress() as show:
        return opened.deliver(run_ids, call_ids, show)


def _delivery(report: "Report | None", pending: int) -> dict[str, int]:
    from audience_sync.delivery.worker import Report

    done = report or Report()
    return {
        "accepted_count": done.accepted_count,
        "dead_count": done.dead_count,
        "pending_count": pending,
        "request_count": done.request_count,
    }


def tell_delivery(report: "Report | None", pending: int) -> None:
    if report is None:
        say.line(f"Nothing was sent. Waiting for `audience-sync deliver`: {pending:,}.")
        return
    say.line(
        f"Delivered: {report.accepted_count:,} accepted, {report.dead_count:,} dead, {pending:,} pending "
        f"({report.request_count:,} requests)."
    )
    if report.dead_count:
        say.line("`audience-sync deliveries --status dead` says why they were refused.")
    if report.is_left:
        say.line("Another process is delivering: the rest is left to it.")
    elif report.stopped:
        say.aside(f"audience-sync: {report.stopped}")
    elif pending:
        say.line("What is pending is tried again by the next `audience-sync deliver` or `sync`.")


def finish(report: "Report | None", *, failed: bool = False, busy: bool = False) -> None:
    """Leave with the exit code of this command's work: 1 before 75."""
    undone = report is not None and (
        report.dead_count or report.stopped or (report.pending_count and not report.is_left)
    )
    if failed or undone:
        raise typer.Exit(1)
    if busy:
        raise typer.Exit(Busy.exit_code)


@app.command()
def identify(
    context: typer.Context,
    user_id: str,
    trait: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="A trait; V is JSON where it parses.")
    ] = None,
    no_deliver: NoDeliver = False,
) -> None:
    """Tell traits of a user, and deliver what is due."""
    _call(context, {"type": "identify", "userId": user_id, "traits": pairs(trait)}, no_deliver=no_deliver)


@app.command()
def track(
    context: typer.Context,
    user_id: str,
    event: str,
    property_: Annotated[
        list[str] | None,
        typer.Option("--property", metavar="K=V", help="A property; V is JSON where it parses."),
    ] = None,
    no_deliver: NoDeliver = False,
) -> None:
    """Tell something that a user did, and deliver what is due."""
    raw = {"type": "track", "userId": user_id, "event": event, "properties": pairs(property_)}
    _call(context, raw, no_deliver=no_deliver)


@app.command()
def group(
    context: typer.Context,
    user_id: str,
    group_id: str,
    trait: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A company's trait.")] = None,
    no_deliver: NoDeliver = False,
) -> None:
    """Tell the company of a user, and deliver what is due."""
    raw = {"type": "group", "userId": user_id, "groupId": group_id, "traits": pairs(trait)}
    _call(context, raw, no_deliver=no_deliver)


def _call(context: typer.Context, raw: dict[str, Any], *, no_deliver: bool) -> None:
    from audience_sync import intake
    from audience_sync.cli.session import open_app
    from audience_sync.store import deliveries, engines

    with open_app(context.obj) as opened, stoppable(opened):
        if not no_deliver:
            opened.settings.destination.require_api_key()
        receipt = intake.accept(opened, raw)
        if receipt.ignored:
            say.line(f"Call {receipt.call_id} was kept and ignored: {receipt.ignored}.")
        else:
            say.line(f"Call {receipt.call_id} was accepted for delivery.")
        report = None if no_deliver else deliver_now(opened, call_ids=[receipt.call_id])
        with engines.read(opened.engine) as connection:
            tell_delivery(report, deliveries.pending_count(connection))
    finish(report)


def pairs(given: Sequence[str] | None) -> dict[str, Any]:
    """k=v pairs; v is JSON where it parses, else the text itself."""
    found = {}
    for each in given or ():
        name, separator, text = each.partition("=")
        if not separator or not name:
            raise ConfigError(f"{each!r} is not NAME=VALUE: write, for example, plan=pro or age=12.")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


@app.command()
def retry(
    context: typer.Context,
    ids: Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Dead deliveries.")] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="Every dead delivery.")] = False,
) -> None:
    """Queue dead deliveries again, if nothing newer has overtaken them."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import deliveries, engines

    if bool(ids) == all_dead:
        raise ConfigError("Name the deliveries to try again, or say --all-dead.")
    with open_app(context.obj) as opened:
        with engines.write(opened.engine) as connection:
            count, reasons = deliveries.retry(connection, None if all_dead else ids, opened.clock.now())
        for reason in reasons:
            say.aside(reason)
        say.line(f"{count:,} deliveries are queued again: `audience-sync deliver` sends them.")
    if reasons and not all_dead:
        raise typer.Exit(1)


@app.command()
def discard(context: typer.Context, ids: Annotated[list[int], typer.Argument(metavar="ID...")]) -> None:
    """Cancel pending or dead deliveries; Userpilot is not told."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import deliveries, engines

    with open_app(context.obj) as opened:
        with engines.write(opened.engine) as connection:
            count = deliveries.discard(connection, ids, opened.clock.now())
        say.line(f"{count:,} of {len(set(ids)):,} deliveries are cancelled.")
        if count:
            say.line(
                "Where they came from an audience, `audience-sync sync KEY --full` tells Userpilot the truth again."
            )
    if count < len(set(ids)):
        say.aside("The others do not exist, or are neither pending nor dead.")
        raise typer.Exit(1)


def moment(text: str | None) -> dt.datetime | None:
    from audience_sync.calls.validation import parse_moment

    try:
        return None if text is None else parse_moment(text)
    except ValueError as error:
        raise ConfigError(f"{text} is not a moment: write ISO 8601, such as 2026-05-01T12:00:00Z.") from error


def not_yet(name: str) -> None:
    raise ConfigError(f"not yet: {name} belongs to a later release.")


def _later(name: str) -> None:
    @app.command(
        name, help="Not yet: it belongs to a later release.", hidden=True,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )  # fmt: skip
    def later() -> None:
        not_yet(name)


for _name in ("daemon", "serve", "approve", "reject", "retire", "forget", "import"):
    _later(_name)
