"""The commands that compute and send: plan, sync, deliver."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audience_sync.cli import lazy, output, session
from audience_sync.cli.session import Json, NoDeliver
from audience_sync.clock import duration
from audience_sync.errors import Busy, ConfigError

if TYPE_CHECKING:
    from audience_sync.app import App
    from audience_sync.audiences.plan import Plan, Plans
    from audience_sync.queue.progress import Report
    from audience_sync.queue.split import Forecast

PRUNE_SECONDS = 1.0  # each command that sent something removes some of the expired rows
CHANGES = ("entered", "exited", "changed")

Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY", help="The definitions to compute. Default: all enabled ones."),
]
AsOf = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Compute as of this time (ISO 8601, in UTC unless it has an offset) instead of now.",
    ),
]


def plan(context: typer.Context, keys: Keys = None, as_of: AsOf = None, as_json: Json = False) -> None:
    """Show what a sync would change, without storing or sending.

    For each definition: its members, who would enter, exit or change, and whether the run would be held. At the end:
    how many requests this takes, and how long. If a definition cannot be computed, the others are still shown, and the
    exit code is 1.

        audience-sync plan
        audience-sync plan at_risk --as-of 2026-05-01
    """
    with session.open_app(context) as app, session.stoppable(app):
        definitions = app.definitions(keys or ())
        moments = lazy.runs.resolve_as_of(app.engine, definitions, session.parse_time(as_of), app.clock.now())
        planned, forecast = app.plan(definitions, moments)
    for message in planned.errors.values():
        output.warn(f"audience-sync: {message}")
    _show_plan(planned, forecast, as_json=as_json)
    if planned.errors:
        raise typer.Exit(1)


def _show_plan(planned: "Plans", forecast: "Forecast", *, as_json: bool) -> None:
    plans = planned.plans
    if as_json:
        delivery = {
            "request_count": forecast.request_count,
            "bulk_row_count": forecast.row_count,
            "estimated_seconds": round(forecast.seconds, 1),
        }
        errors = [{"key": key, "error": message} for key, message in planned.errors.items()]
        documents = [_document(plan) for plan in plans]
        output.document({"definitions": documents, "errors": errors, "delivery": delivery})
        return
    rows = [
        [plan.key, *map(output.count, (plan.member_count, *(getattr(plan.counts, name) for name in CHANGES)))]
        for plan in plans
    ]
    output.table(["key", "members", *CHANGES], rows, numbers=["members", *CHANGES])
    for plan in plans:
        for name, users in plan.samples.items():
            if users:
                output.line(f"{plan.key} {name}, for example: {', '.join(users)}")
        if plan.unusable:
            output.line(f"{plan.key} would leave out {describe_unusable(plan.unusable)}.")
        if plan.held:
            output.line(f"{plan.key} would be held for approval. {plan.held.reason}")
    if plans or not planned.errors:
        output.line(_duration(forecast))


def describe_unusable(counts: Mapping[str, int]) -> str:
    """Return how many rows cannot be used, and why."""
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items()))
    return f"{output.plural(sum(counts.values()), 'row')} that cannot be used: {reasons}"


def _duration(forecast: "Forecast") -> str:
    if not forecast.request_count:
        return "A sync would send nothing."
    requests = output.plural(forecast.request_count, "request")
    match forecast.job_count:
        case 0:
            jobs = ""
        case 1:
            jobs = f", one of them a bulk job of {forecast.row_count:,} rows"
        case count:
            jobs = f", {count:,} of them bulk jobs with {forecast.row_count:,} rows together"
    return (
        f"A sync would send {requests}{jobs}. At the configured limits that takes "
        f"{duration(forecast.seconds)}. Nothing was stored or sent."
    )


def _document(plan: "Plan") -> dict[str, Any]:
    return {
        "key": plan.key,
        "member_count": plan.member_count,
        **{f"{name}_count": getattr(plan.counts, name) for name in CHANGES},
        "entered_sample": plan.samples.get("entered", []),
        "exited_sample": plan.samples.get("exited", []),
        "held_by": plan.held and plan.held.by,
    }


def sync(
    context: typer.Context,
    keys: Keys = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Send every member and everyone who has left, instead of only what changed."
        ),
    ] = False,
    hold: Annotated[
        bool, typer.Option("--hold", help="Compute, then wait: `approve` commits exactly these changes.")
    ] = False,
    user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USER_ID",
            help="A canary: commit and send only this user's changes. May be repeated.",
            callback=session.user_ids,
        ),
    ] = None,
    as_of: AsOf = None,
    no_deliver: NoDeliver = False,
    as_json: Json = False,
) -> None:
    """Compute the definitions and send what changed.

    The first sync of a definition sends every member; later ones send only the changes. A run whose changes look like
    an accident is held until `approve` or `reject`.

        audience-sync sync
        audience-sync sync at_risk --user me@example.org

    Exit codes: 0 done, 1 a run failed or was abandoned, or something was not delivered, 2 usage or configuration, 3 a
    run is held, 75 another process is syncing the definition.
    """
    if user and not keys:
        raise ConfigError("--user needs the definitions to try: run `audience-sync sync KEY --user USER_ID`.")
    if user and hold:
        raise ConfigError("--user commits at once, so it cannot be combined with --hold: leave one out.")
    with session.open_app(context) as app, session.stoppable(app):
        if not no_deliver:
            app.settings.destination.api_key.require()
        definitions = app.definitions(keys or ())
        if not definitions:
            problem = "only retired or disabled definitions" if app.settings.definitions else "no definition"
            raise ConfigError(
                f"{app.settings.path} has {problem}: add one under [[audiences]] or [[traits]]."
            )
        moments = lazy.runs.resolve_as_of(app.engine, definitions, session.parse_time(as_of), app.clock.now())
        options = lazy.runs.RunOptions(full=full, hold=hold, users=tuple(user or ()) or None)
        run_ids, busy, refused = [], False, []
        for definition in definitions:
            try:
                run_ids.append(app.sync(definition, moments[definition.key], options))
            except Busy as error:
                busy = True
                output.warn(f"audience-sync: {error}")
            except ConfigError as error:
                refused.append(error)
        report = None if no_deliver else deliver_now(app, run_ids)
        with lazy.engines.read(app.engine) as connection:
            runs = lazy.history.run_rows(connection, ids=run_ids)[::-1]
            unusable = lazy.history.unusable_counts(connection, run_ids)
            pending = lazy.backlog.pending_count(connection)
    if as_json:
        output.document({"runs": runs, "delivery": _delivery(report, pending)})
    else:
        _show_runs(runs, unusable)
        show_delivery(report, pending)
    if refused:
        raise refused[0]
    statuses = {run["status"] for run in runs}
    session.finish(
        report, failed=bool(statuses & {"failed", "abandoned"}), busy=busy, held="held" in statuses
    )


def _show_runs(runs: Sequence[dict[str, Any]], unusable: Mapping[int, int]) -> None:
    """Print a table of runs, and below it what needs attention."""
    show_table(runs)
    for run in runs:
        if run["status"] == "held":
            output.line(held(run["run_id"], run["key"], run["error"]))
        elif run["error"]:
            output.line(f"Run {run['run_id']} of {run['key']} {run['status']}: {run['error']}")
        if count := unusable[run["run_id"]]:
            output.line(
                f"Run {run['run_id']} of {run['key']} left out {output.plural(count, 'row')} that "
                f"cannot be used: `audience-sync show {run['run_id']}` shows the reasons."
            )


def show_table(runs: Sequence[dict[str, Any]]) -> None:
    names = ["members", *CHANGES]
    rows = [
        [str(run["run_id"]), run["key"], run["mode"], run["status"]]
        + [output.count(run[f"{name}_count"]) for name in ("member", *CHANGES)]
        for run in runs
    ]
    output.table(["run", "key", "mode", "status", *names], rows, numbers=["run", *names])


def held(run_id: int, key: str, reason: str) -> str:
    if lazy.destination.MADE_FOR_ANOTHER in reason:  # `approve` would refuse it
        return f"Run {run_id} of {key} is held. {reason}"
    return (
        f"Run {run_id} of {key} is held for approval. {reason} `audience-sync show {run_id}` shows its changes, "
        f"`audience-sync approve {run_id}` commits exactly these, `audience-sync reject {run_id}` drops them."
    )


def deliver(context: typer.Context, as_json: Json = False) -> None:
    """Send what is due.

    Works until nothing is due within the next minute. If another process is delivering, that process sends the rest.
    """
    with session.open_app(context) as app, session.stoppable(app):
        report = deliver_now(app)
    if as_json:
        output.document(_delivery(report, report.pending_count))
    else:
        show_delivery(report, report.pending_count)
    session.finish(report, held=report.held_count > 0)


def deliver_now(app: "App", run_ids: Sequence[int] = (), call_ids: Sequence[int] = ()) -> "Report":
    """Deliver with a progress bar, then remove some expired rows."""
    with output.progress() as show:
        report = app.deliver(run_ids, call_ids, show)
    if report.request_count:
        app.prune(seconds=PRUNE_SECONDS)
    return report


def _delivery(report: "Report | None", pending: int) -> dict[str, int]:
    return {
        "accepted_count": report.accepted_count if report else 0,
        "dead_count": report.dead_count if report else 0,
        "pending_count": pending,
        "request_count": report.request_count if report else 0,
    }


def show_delivery(report: "Report | None", pending: int) -> None:
    """Print what was sent; `pending` is the number of deliveries left in the whole queue."""
    if report is None:
        waiting = f"{output.plural(pending, 'delivery', 'deliveries')} in the queue"
        how = (
            f"`audience-sync deliver` or the daemon sends {waiting}" if pending else "Nothing is in the queue"
        )
        output.line(f"Nothing was sent. {how}.")
        return
    if not report.request_count and not report.accepted_count and not pending:
        output.line("There was nothing to send.")
    else:
        counts = [f"{report.accepted_count:,} accepted", f"{pending:,} still pending"]
        if report.dead_count:
            counts.insert(1, f"{report.dead_count:,} refused for good")
        requests = output.plural(report.request_count, "request")
        output.line(f"Deliveries: {', '.join(counts)} ({requests} to Userpilot).")
    if report.dead_count:
        output.line("`audience-sync deliveries --status dead` shows the refused ones with the reasons.")
    if report.held_count:
        output.line(
            f"{output.plural(report.held_count, 'delivery is', 'deliveries are')} held, "
            f"{lazy.destination.other_destination()}. To drop held calls, run `audience-sync discard`."
        )
    if report.is_handed_over:
        output.line("Another process is delivering and sends the rest.")
    elif report.stopped:
        output.warn(f"audience-sync: {report.stopped}")
    elif pending:
        output.line(
            "The next `audience-sync deliver` or `sync` continues with the pending ones; `audience-sync status` shows "
            "what they wait for."
        )
