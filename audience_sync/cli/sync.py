"""The commands that compute and send: plan, sync, deliver."""

import datetime as dt
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from audience_sync.cli import output
from audience_sync.cli.main import app
from audience_sync.errors import Busy, ConfigError, Interrupted

if TYPE_CHECKING:
    from audience_sync.app import App
    from audience_sync.audiences import plan as plans
    from audience_sync.queue.split import Forecast
    from audience_sync.queue.worker import Report

PRUNE_SECONDS = 1.0  # a little of what is old goes with each command
HELD = 3  # the exit code where a run waits for a person

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
    """SIGTERM, Ctrl-C or a terminal that closes: a delivery finishes what is in flight, anything else ends at once.

    Twice ends all. What `nohup` had ignored stays ignored.
    """

    def ask(_number: int, _frame: object) -> None:
        if opened.stop.is_set():
            end_at_once("Stopped at once. Nothing is lost: run the command again to go on.")
        if opened.is_delivering:
            opened.stop.set()
            output.warn("Stopping: finishing what is in flight.")
        else:
            raise Interrupted("Stopped. Nothing is lost: run the command again to go on.")

    asked = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once(text: str) -> NoReturn:
    """What is in flight would be waited for, half a minute perhaps; the next process sees to it as after a crash."""
    output.warn(f"audience-sync: {text}")
    os._exit(Interrupted.exit_code)


@app.command()
def plan(context: typer.Context, keys: Keys = None, as_of: AsOf = None, as_json: Json = False) -> None:
    """Compute and compare; send and store nothing."""
    from audience_sync.audiences import runs
    from audience_sync.cli.session import open_app

    with open_app(context.obj) as opened, stoppable(opened):
        definitions = opened.definitions(keys or ())
        moments = runs.resolve_as_of(opened.engine, definitions, moment(as_of), opened.clock.now())
        plans, forecast = opened.plan(definitions, moments)
        if as_json:
            delivery = {
                "request_count": forecast.request_count,
                "bulk_row_count": forecast.row_count,
                "estimated_seconds": round(forecast.seconds, 1),
            }
            output.document({"definitions": [_plan(each) for each in plans], "delivery": delivery})
            return
        rows = [
            [
                each.key,
                output.count(each.member_count),
                *(output.count(getattr(each.counts, name)) for name in CHANGES),
            ]
            for each in plans
        ]
        output.table(["key", "members", *CHANGES], rows, numbers=["members", *CHANGES])
        for each in plans:
            for name, users in each.samples.items():
                if users:
                    output.line(f"{each.key} {name}, for example: {', '.join(users)}")
            if each.held:
                output.line(f"{each.key} would be held. {each.held.reason}")
        output.line(
            f"It would take {forecast.request_count:,} requests{_jobs(forecast)}: {output.span(forecast.seconds)} "
            "at the pace of this configuration."
        )


def _jobs(forecast: "Forecast") -> str:
    match forecast.job_count:
        case 0:
            return ""
        case 1:
            return f", one of them a bulk job of {forecast.row_count:,} rows"
        case count:
            return f", {count:,} of them bulk jobs, of {forecast.row_count:,} rows together"


CHANGES = ("entered", "exited", "changed")


def _plan(each: "plans.Plan") -> dict[str, Any]:
    return {
        "key": each.key,
        "member_count": each.member_count,
        "entered_count": each.counts.entered,
        "exited_count": each.counts.exited,
        "changed_count": each.counts.changed,
        "entered_sample": each.samples.get("entered", []),
        "exited_sample": each.samples.get("exited", []),
        "held_by": each.held and each.held.by,
    }


@app.command()
def sync(
    context: typer.Context,
    keys: Keys = None,
    full: Annotated[bool, typer.Option("--full", help="Send every member and everyone who left.")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Compute, then wait for `approve`.")] = False,
    user: Annotated[
        list[str] | None, typer.Option(help="A canary: only this user's changes (may be repeated).")
    ] = None,
    as_of: AsOf = None,
    no_deliver: NoDeliver = False,
    as_json: Json = False,
) -> None:
    """Compute the definitions, then deliver what changed."""
    from audience_sync import history
    from audience_sync.audiences import runs
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.queue import due

    if user and not keys:
        raise ConfigError("A canary is of named definitions: audience-sync sync KEY --user USER_ID.")
    if user and hold:
        raise ConfigError("A canary commits its users' changes at once: leave out --hold or --user.")
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
                moment_of = moments[definition.key]
                run_ids.append(opened.sync(definition, moment_of, full=full, hold=hold, users=user or ()))
            except Busy as error:
                busy.append(str(error))
                output.warn(f"audience-sync: {error}")
        report = None if no_deliver else deliver_now(opened, run_ids)
        with engines.read(opened.engine) as connection:
            found = history.run_rows(connection, ids=run_ids)[::-1]
            pending = due.pending_count(connection)
        if as_json:
            output.document({"runs": found, "delivery": _delivery(report, pending)})
        else:
            show_runs(found)
            tell_delivery(report, pending)
    statuses = {each["status"] for each in found}
    finish(report, failed="failed" in statuses, busy=bool(busy), held="held" in statuses)


def show_runs(found: Sequence[dict[str, Any]]) -> None:
    """One line a run; errors below."""
    rows = [
        [
            str(each["run_id"]),
            each["key"],
            each["mode"],
            each["status"],
            *(output.count(each[f"{name}_count"]) for name in ("member", *CHANGES)),
        ]
        for each in found
    ]
    names = ["members", *CHANGES]
    output.table(["run", "key", "mode", "status", *names], rows, numbers=["run", *names])
    for each in found:
        if each["error"]:
            output.line(f"Run {each['run_id']} {each['status']}: {each['error']}")
        if each["status"] == "held":
            output.line(
                f"`audience-sync show {each['run_id']}` shows it; `approve {each['run_id']}` commits exactly this, "
                f"`reject {each['run_id']}` drops it."
            )
        if each["set_aside_count"]:
            output.line(
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
            output.document(_delivery(report, report.pending_count))
        else:
            tell_delivery(report, report.pending_count)
    finish(report, held=report.held_count > 0)


def deliver_now(opened: "App", run_ids: Sequence[int] = (), call_ids: Sequence[int] = ()) -> "Report":
    with output.progress() as show:
        report = opened.deliver(run_ids, call_ids, show)
    if report.request_count:  # what grows by work shrinks with work
        opened.prune(seconds=PRUNE_SECONDS)
    return report


def _delivery(report: "Report | None", pending: int) -> dict[str, int]:
    from audience_sync.queue.worker import Report

    done = report or Report()
    return {
        "accepted_count": done.accepted_count,
        "dead_count": done.dead_count,
        "pending_count": pending,
        "request_count": done.request_count,
    }


def tell_delivery(report: "Report | None", pending: int) -> None:
    if report is None:
        output.line(f"Nothing was sent. Waiting for `audience-sync deliver`: {pending:,}.")
        return
    output.line(
        f"Delivered: {report.accepted_count:,} accepted, {report.dead_count:,} dead, {pending:,} pending "
        f"({report.request_count:,} request{'s' * (report.request_count != 1)})."
    )
    if report.dead_count:
        output.line("`audience-sync deliveries --status dead` says why they were refused.")
    if report.held_count:
        from audience_sync.queue.destination import other_destination

        output.line(
            f"Held: {report.held_count:,}, {other_destination()}. To drop held calls, run `audience-sync discard`."
        )
    if report.is_left:
        output.line("Another process is delivering: the rest is left to it.")
    elif report.stopped:
        output.warn(f"audience-sync: {report.stopped}")
    elif pending:
        output.line(
            "What is pending is tried again by the next `audience-sync deliver` or `sync`; `status` says what it waits for."
        )


def finish(report: "Report | None", *, failed: bool = False, busy: bool = False, held: bool = False) -> None:
    """Leave with the exit code of this command's work: 1 before 75 before 3."""
    undone = report is not None and (
        report.dead_count or report.stopped or (report.pending_count and not report.is_left)
    )
    if failed or undone:
        raise typer.Exit(1)
    if busy:
        raise typer.Exit(Busy.exit_code)
    if held:
        raise typer.Exit(HELD)


def moment(text: str | None) -> dt.datetime | None:
    from audience_sync.calls.validation import parse_time

    try:
        return None if text is None else parse_time(text)
    except ValueError as error:
        raise ConfigError(f"{text} is not a moment: write ISO 8601, such as 2026-05-01T12:00:00Z.") from error
