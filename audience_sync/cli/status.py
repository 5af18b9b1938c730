"""The commands that show the current state: status, list."""

from typing import Any

import typer

from audience_sync.cli import lazy, output, session, sync
from audience_sync.cli.session import Json

SHOWN_SLOTS = 10


def status(context: typer.Context, as_json: Json = False) -> None:
    """Show what needs attention, who delivers, and the queue.

    Needing attention: delivery that is stopped, runs that are held, failed or left out most of their rows, dead deliveries,
    and schedules that are late. Then each lane's pace, and the next runs by schedule.

    Exit codes: 0, or 1 while a scheduled run has failed or was abandoned and none has succeeded since.
    """
    with session.open_app(context) as app, lazy.engines.read(app.engine) as connection:
        now = app.clock.now()
        document = lazy.history.status(connection, app.settings, now)
        problems = lazy.history.problems(connection, app.settings, document, now)
    if as_json:
        output.document(document)
    else:
        _show_status(document, problems)
    # `sync` reports a failed run by its own exit code; failed runs of the daemon are reported here.
    session.finish(None, failed=any(run["trigger"] == "schedule" for run in document["failed_runs"]))


def _show_status(document: dict[str, Any], problems: list[tuple[str, Any]]) -> None:
    output.line("These need attention:" if problems else "Nothing needs attention.")
    for kind, facts in problems:
        output.line(f"- {_problem(kind, facts, document)}")
    output.line()
    output.line(_daemon(document["daemon"]))
    deliverer = document["deliverer"]
    output.line(
        f"Process {deliverer['pid']} on {deliverer['host']} is delivering."
        if deliverer
        else "No process is delivering at the moment."
    )
    output.line(_queue(document))
    rows = [
        [name, *map(output.count, (lane["per_minute"], lane["sent_last_minute"])), lane["reason"] or "normal"]
        for name, lane in document["lanes"].items()
    ]
    numbers = ["limit per minute", "sent last minute"]
    output.table(["lane", *numbers, "state"], rows, numbers=numbers)
    if slots := document["next_slots"][:SHOWN_SLOTS]:
        rows = [[slot["key"], output.moment(slot["slot_at"])] for slot in slots]
        output.table(["key", "next run (UTC)"], rows)


def _problem(kind: str, facts: Any, document: dict[str, Any]) -> str:
    """Return the text for a problem: the problem, then the remedy."""
    match kind:
        case "stopped":
            return f"Delivery has been stopped since {output.moment(facts['since'])} UTC. {facts['reason']}"
        case "foreign":
            keys = output.some(facts, SHOWN_SLOTS)
            advice = lazy.destination.other_destination(*(facts if len(facts) == 1 else ()))
            return f"The members of {keys} were {advice}."
        case "lane":
            until = facts["until"]
            state = f"pauses until {until:%Y-%m-%d %H:%M:%S} UTC" if until else "sends nothing"
            return f"The lane {facts['lane']} {state}: {facts['reason']}. {facts['advice']}"
        case "held":
            return sync.held(facts["run_id"], facts["key"], facts["reason"])
        case "failed":
            at = facts["retry_at"]
            again = f" It will be tried again at {output.moment(at)} UTC." if at else ""
            last = f"The last run of {facts['key']} ({facts['run_id']}) {facts['status']}."
            return f"{last} {facts['reason'] or ''}{again}".strip()
        case "unusable":
            rows, used = sync.describe_unusable(facts["unusable"]), facts["member_count"]
            last = f"The last run of {facts['key']} ({facts['run_id']}) left out {rows}"
            return f"{last}; it has {output.plural(used, 'member')}. Check its query."
        case "dead":
            return (
                f"{output.plural(facts, 'delivery is', 'deliveries are')} dead: `audience-sync deliveries --status dead` "
                "shows the reasons. The next sync tries each once more if its value still holds."
            )
        case "waiting":
            return f"Not run by schedule until their held run is decided: {', '.join(facts)}."
        case "late":
            longest = sorted(facts, key=lambda key: facts[key])
            keys = output.some(
                [f"{key} (since {output.moment(facts[key])} UTC)" for key in longest], SHOWN_SLOTS
            )
            advice = LATE_ADVICE[document["daemon"]["is_alive"]]
            return f"Late, because a scheduled run has not started: {keys}. {advice}"
        case _:
            return "The daemon is not running, so nothing runs by schedule: start `audience-sync daemon`."


def _daemon(daemon: dict[str, Any]) -> str:
    if daemon["heartbeat_at"] is None:
        return "No daemon has run on this database."
    if not daemon["is_alive"]:
        return "The daemon is not running."
    return f"The daemon is running; its last heartbeat was at {output.moment(daemon['heartbeat_at'])} UTC."


def _queue(document: dict[str, Any]) -> str:
    held_count = document["held_count"]
    held = f" {output.plural(held_count, 'more is held', 'more are held')}." if held_count else ""
    if not document["pending_count"]:
        return f"Nothing is waiting to be sent.{held}"
    pending = output.plural(document["pending_count"], "delivery waits", "deliveries wait")
    retried = f", {document['late_count']:,} of them for another attempt" if document["late_count"] else ""
    oldest = f"{output.moment(document['oldest_at'])} UTC"
    return f"{pending} to be sent{retried}; the oldest was queued at {oldest}.{held}"


def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the definitions with their size, last run and next run."""
    with session.open_app(context) as app, lazy.engines.read(app.engine) as connection:
        definitions = lazy.history.definitions(connection, app.settings, app.clock.now())
        daemon = lazy.history.daemon_state(connection, app.clock.now())
    if as_json:
        output.document(definitions)
        return
    if not definitions:
        output.line(
            f"There are no definitions yet: add one under [[audiences]] or [[traits]] in {app.settings.path}."
        )
        return
    rows = []
    for row in definitions:
        last = row["last_run"]
        last_run = f"{_short(last['started_at'])} {last['status']}" if last else "never"
        rows.append(
            [
                row["key"],
                output.count(row["member_count"]),
                last_run,
                _short(row["next_slot_at"]),
                row["state"],
            ]
        )
    output.table(["key", "members", "last run (UTC)", "next run", "state"], rows, numbers=["members"])
    states = {state: [row["key"] for row in definitions if row["state"] == state] for state in ADVICE}
    for state, keys in states.items():
        if keys:
            output.line(f"{ADVICE[state]}: {', '.join(keys)}.")
    output.line(_daemon(daemon))


LATE_ADVICE = {
    True: "Their earlier runs or those of others take too long: make the queries faster, run them less often, or raise "
    "`concurrency` under [daemon].",
    False: "Is the daemon running?",
}
ADVICE = {
    "held": "A run waits for `approve` or `reject` (`audience-sync status` says why)",
    "not configured": "No longer in the configuration; Userpilot keeps the last values until "
    "`audience-sync retire KEY`",
}


def _short(value: Any) -> str:
    return output.moment(value)[5:]  # without the year
