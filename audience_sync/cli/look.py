"""The commands that look inside: status, list, history, show, members, user, deliveries, calls."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audience_sync.cli import act, say
from audience_sync.cli.act import Json, show_runs
from audience_sync.cli.main import app
from audience_sync.errors import ConfigError

ROWS = 50  # of a table on a terminal; --json gives all
STATUSES = ("held", "pending", "sending", "accepted", "dead", "cancelled")

if TYPE_CHECKING:
    from audience_sync.app import App


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Say whether anything is stopped, dead or late, and how long the queue is."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    with open_app(context.obj) as opened:
        with engines.read(opened.engine) as connection:
            found = looks.queue_state(connection, opened.clock.now())
        found["lanes"] = _lanes(opened, found.pop("sent_last_minute"), found.pop("slow_downs"))
        found["next_slots"] = []
        if as_json:
            say.document(found)
            return
        stopped, holder = found["stopped"], found["deliverer"]
        say.line(
            f"Stopped since {say.moment(stopped['since'])}: {stopped['reason']}"
            if stopped
            else "Not stopped."
        )
        say.line(
            f"Process {holder['pid']} on {holder['host']} delivers." if holder else "Nobody delivers now."
        )
        oldest = f", the oldest since {say.moment(found['oldest_at'])} UTC" if found["oldest_at"] else ""
        say.line(
            f"Queue: {found['pending_count']:,} pending{oldest}; {found['late_count']:,} wait for another attempt."
        )
        dead = " (`audience-sync deliveries --status dead` says why)" if found["dead_count"] else ""
        say.line(f"Dead: {found['dead_count']:,}{dead}. Held: {found['held_count']:,}.")
        rows = [
            [
                name,
                say.count(lane["per_minute"]),
                say.count(lane["sent_last_minute"]),
                lane["reason"] or "at its pace",
            ]
            for name, lane in found["lanes"].items()
        ]
        numbers = ["per minute", "last minute"]
        say.table(["lane", *numbers, "state"], rows, numbers=numbers)


def _lanes(opened: "App", sent: dict[str, int], slow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    destination = opened.settings.destination
    limits = {
        "identify": destination.identify_per_minute,
        "track": destination.track_per_minute,
        "company": destination.company_per_minute,
    }
    return {
        name: {
            "per_minute": int(limit * slow.get(name, {}).get("factor", 1.0)),
            "sent_last_minute": sent.get(name, 0),
            "paused_until": slow.get(name, {}).get("paused_until"),
            "reason": slow.get(name, {}).get("reason"),
        }
        for name, limit in limits.items()
    }


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the definitions: size, last run, state."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    with open_app(context.obj) as opened:
        with engines.read(opened.engine) as connection:
            used = looks.definition_rows(connection)
        for definition in opened.settings.definitions:
            blank = {"member_count": 0, "last_run": None}
            described = {"key": definition.key, "name": definition.name, "kind": definition.kind.value}
            state = "enabled" if definition.enabled else "disabled"
            used[definition.key] = (
                described
                | {name: used.get(definition.key, blank)[name] for name in blank}
                | {"next_slot_at": None, "state": state}
            )
        found = [{"next_slot_at": None, "state": "not in the configuration"} | each for each in used.values()]
        found = [{name: each[name] for name in LIST} for each in found]
        if as_json:
            say.document(found)
            return
        if not found:
            say.line(f"No definitions yet: add one to [[audiences]] in {opened.settings.path}.")
            return
        rows = []
        for each in found:
            last = each["last_run"]
            ran = f"{say.moment(last['started_at'])} {last['status']}" if last else "never"
            rows.append([each["key"], each["kind"], say.count(each["member_count"]), ran, each["state"]])
        say.table(["key", "kind", "members", "last run", "state"], rows, numbers=["members"])


LIST = ("key", "name", "kind", "member_count", "last_run", "next_slot_at", "state")


@app.command()
def history(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="Of this definition only.")] = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        if key is not None:
            known_id(connection, opened, key)
        found = looks.run_rows(connection, key=key, limit=None if as_json else ROWS)
        if as_json:
            say.document(found)
            return
        names = {"member": "members", "entered": "in", "exited": "out", "changed": "new", "accepted": "sent"}
        names |= {"pending": "left", "dead": "dead"}
        for name in ("changed", "pending", "dead"):  # columns that people look at when there is something
            if not any(run[f"{name}_count"] for run in found):
                del names[name]
        rows = [
            [
                str(run["run_id"]),
                run["key"],
                say.moment(run["as_of"]),
                run["status"],
                *(say.count(run[f"{name}_count"]) for name in names),
            ]
            for run in found
        ]
        numbers = ["run", *names.values()]
        say.table(["run", "key", "as of", "status", *names.values()], rows, numbers=numbers)


@app.command()
def show(context: typer.Context, run_id: int, as_json: Json = False) -> None:
    """Show a run: counts, what was set aside, some of those who changed."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        found = looks.run_in_full(connection, run_id)
        if found is None:
            raise ConfigError(f"There is no run {run_id}: `audience-sync history` lists them.")
        if as_json:
            say.document(found)
            return
        show_runs([found | {"error": None, "set_aside_count": 0}])
        for name in ("as_of", "started_at", "finished_at"):
            say.line(f"{name}: {say.moment(found[name])} UTC")
        counts = ", ".join(
            f"{found[f'{name}_count']:,} {name}" for name in ("accepted", "pending", "dead", "cancelled")
        )
        say.line(f"deliveries: {counts}")
        for reason, count in found["set_aside"].items():
            say.line(f"set aside: {count:,} {reason.replace('_', ' ')}")
        for name in ("entered", "exited", "changed"):
            if found[f"{name}_sample"]:
                say.line(f"{name}, for example: {', '.join(found[f'{name}_sample'])}")
        if found["error"]:
            say.line(f"error: {found['error']}")


@app.command()
def members(
    context: typer.Context,
    key: str,
    at: Annotated[str | None, typer.Option(help="At a past moment (ISO 8601) instead of now.")] = None,
) -> None:
    """Print the members, one user id a line (a trait: id, tab, JSON value)."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        definition_id = known_id(connection, opened, key)
        if definition_id is not None:
            for user_id, value in looks.member_rows(connection, definition_id, act.moment(at)):
                say.line(user_id if value is None else f"{user_id}\t{value}")


@app.command()
def user(context: typer.Context, user_id: str, as_json: Json = False) -> None:
    """Show all that is known of a user, and what was sent."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        found = looks.user(connection, user_id)
        if as_json:
            say.document(found)
            return
        if not found["memberships"] and not found["deliveries"] and found["profile"] is None:
            say.line(f"Nothing is known of {user_id}.")
            return
        rows = [
            [
                each["key"],
                json.dumps(each["value"], ensure_ascii=False),
                say.moment(each["from"]),
                say.moment(each["to"]),
            ]
            for each in found["memberships"]
        ]
        if rows:
            say.table(["key", "value", "from", "to"], rows)
        if found["profile"]:
            say.line(f"profile: {json.dumps(found['profile']['traits'], ensure_ascii=False)}")
        _show_deliveries(found["deliveries"][:ROWS])


@app.command()
def deliveries(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help=f"One of {', '.join(STATUSES)}.")] = None,
    as_json: Json = False,
) -> None:
    """List the deliveries, newest first."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks
    from audience_sync.store.tables import deliveries as deliveries_table

    if status is not None and status not in STATUSES:
        raise ConfigError(f"{status} is no status of a delivery: there are {', '.join(STATUSES)}.")
    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        where = [] if status is None else [deliveries_table.c.status == status]
        found = looks.delivery_rows(connection, *where, limit=None if as_json else ROWS)
        if as_json:
            say.document(found)
        else:
            _show_deliveries(found)


def _show_deliveries(found: list[dict[str, Any]]) -> None:
    rows = [
        [
            str(each["delivery_id"]),
            each["action"],
            each["subject_id"],
            json.dumps(each["body"], ensure_ascii=False),
            each["status"],
            say.moment(each["created_at"]),
            each["error"] or str(each["status_code"] or ""),
        ]
        for each in found
    ]
    say.table(["id", "action", "for", "body", "status", "created", "answer"], rows, numbers=["id"])


@app.command()
def calls(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="accepted or ignored.")] = None,
    as_json: Json = False,
) -> None:
    """List the calls that applications handed in, newest first."""
    from audience_sync.cli.session import open_app
    from audience_sync.store import engines, looks

    if status not in {None, "accepted", "ignored"}:
        raise ConfigError(f"{status} is no status of a call: there are accepted, ignored.")
    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        found = looks.call_rows(connection, status, limit=None if as_json else ROWS)
        if as_json:
            say.document(found)
            return
        rows = [
            [
                str(each["call_id"]),
                each["type"],
                each["user_id"] or "",
                each["event"] or each["group_id"] or "",
                each["status"],
                say.moment(each["received_at"]),
                each["reason"] or "",
            ]
            for each in found
        ]
        say.table(
            ["id", "type", "user", "event or group", "status", "received", "reason"], rows, numbers=["id"]
        )


def known_id(connection: Any, opened: "App", key: str) -> int | None:
    """The id of a definition that was used, None for one that is only configured; others are a mistake."""
    from audience_sync.store import runs

    row = runs.find(connection, key)
    if row is not None:
        return int(row.definition_id)
    opened.definitions([key])
    return None
