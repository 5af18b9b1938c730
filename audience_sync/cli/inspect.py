"""The commands that look inside: status, list, history, show, members, user, deliveries, calls."""

import datetime as dt
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audience_sync.cli import output, sync
from audience_sync.cli.main import Id, app
from audience_sync.cli.sync import Json, show_runs
from audience_sync.errors import ConfigError

NEXT = 10  # slots that `status` shows
ALIVE_SECONDS = 60.0  # after a daemon's last sign of life
ROWS = 50  # of a table on a terminal; --json gives all
STATUSES = ("held", "pending", "sending", "accepted", "dead", "cancelled")

if TYPE_CHECKING:
    import sqlalchemy as sa

    from audience_sync.app import App


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Say whether anything is stopped, held, dead or late, how long the queue is, and what comes next."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    with open_app(context.obj) as opened:
        with engines.read(opened.engine) as connection:
            found = history.queue_state(connection, opened.clock.now())
            found |= _coming(opened, connection)
        found["lanes"] = _lanes(opened, found)
        if as_json:
            output.document(found)
        else:
            _show_status(found)


def _show_status(found: dict[str, Any]) -> None:
    stopped, holder = found["stopped"], found["deliverer"]
    output.line(
        f"Stopped since {output.moment(stopped['since'])}: {stopped['reason']}" if stopped else "Not stopped."
    )
    output.line(_daemon_words(found["daemon"]))
    output.line(
        f"Process {holder['pid']} on {holder['host']} delivers." if holder else "Nothing is being sent now."
    )
    oldest = f", the oldest since {output.moment(found['oldest_at'])} UTC" if found["oldest_at"] else ""
    output.line(
        f"Queue: {found['pending_count']:,} pending{oldest}; {found['late_count']:,} wait for another attempt."
    )
    dead = " (`audience-sync deliveries --status dead` says why)" if found["dead_count"] else ""
    output.line(f"Dead: {found['dead_count']:,}{dead}. Held: {found['held_count']:,}.")
    for each in found["held_runs"]:
        output.line(f"Run {each['run_id']} of {each['key']} is held. {each['reason']}")
    if found["waiting"]:
        output.line(f"Their slots wait for a person: {', '.join(found['waiting'])}.")
    if found["late"]:
        output.line(f"Late, a slot has passed: {', '.join(found['late'])}.")
    rows = [
        [
            name,
            output.count(lane["per_minute"]),
            output.count(lane["sent_last_minute"]),
            lane["reason"] or "at its pace",
        ]
        for name, lane in found["lanes"].items()
    ]
    numbers = ["per minute", "last minute"]
    output.table(["lane", *numbers, "state"], rows, numbers=numbers)
    if found["next_slots"]:
        slots = [[each["key"], output.moment(each["slot_at"])] for each in found["next_slots"][:NEXT]]
        output.table(["key", "next slot (UTC)"], slots)


def _daemon_words(daemon: dict[str, Any]) -> str:
    if daemon["heartbeat_at"] is None:
        return "No daemon has run here."
    seen = f"its last sign of life: {output.moment(daemon['heartbeat_at'])} UTC"
    return f"The daemon is at work, {seen}." if daemon["is_alive"] else f"The daemon is gone, {seen}."


def _coming(opened: "App", connection: "sa.Connection") -> dict[str, Any]:
    """The daemon's sign of life, the next slots, and those that wait or are late."""
    from audience_sync.audiences import slots
    from audience_sync.queue import destination

    now, beat = opened.clock.now(), destination.last_heartbeat(connection)
    outlooks = {each.key: slots.outlook(connection, each, now) for each in opened.settings.definitions}
    coming = sorted((each.next_at, key) for key, each in outlooks.items() if each.next_at and not each.waits)
    is_alive = beat is not None and now - beat < dt.timedelta(seconds=ALIVE_SECONDS)
    return {
        "daemon": {"heartbeat_at": beat, "is_alive": is_alive},
        "next_slots": [{"key": key, "slot_at": at} for at, key in coming],
        "waiting": [key for key, each in outlooks.items() if each.waits],
        "late": [key for key, each in outlooks.items() if each.is_late and not each.waits],
    }


def _lanes(opened: "App", found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each lane's pace; of bulk in rows, what it sent in uploads."""
    destination = opened.settings.destination
    sent, slow, job = found.pop("sent_last_minute"), found.pop("slow_downs"), found["bulk_job"]
    limits = {
        "identify": destination.identify_per_minute,
        "track": destination.track_per_minute,
        "company": destination.company_per_minute,
        "bulk": destination.bulk_rows_per_minute if destination.bulk else 0,
    }
    lanes = {
        name: {
            "per_minute": int(limit * slow.get(name, {}).get("factor", 1.0)),
            "sent_last_minute": sent.get(name, 0),
            "paused_until": slow.get(name, {}).get("paused_until"),
            "reason": slow.get(name, {}).get("reason"),
        }
        for name, limit in limits.items()
    }
    if not lanes["bulk"]["reason"]:
        lanes["bulk"]["reason"] = _job_words(job) if job else None if destination.bulk else "switched off"
    return lanes


def _job_words(job: dict[str, Any]) -> str:
    done = "" if job["completed_count"] is None else f", {job['completed_count']:,} done"
    return f"a job of {job['row_count']:,} rows since {output.moment(job['submitted_at'])}{done}"


@app.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the definitions: size, last run, next slot, state."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    with open_app(context.obj) as opened:
        with engines.read(opened.engine) as connection:
            used = history.definition_rows(connection)
            coming = _coming(opened, connection)
        found = _definitions(opened, used, {each["key"]: each["slot_at"] for each in coming["next_slots"]})
        if as_json:
            output.document(found)
            return
        if not found:
            output.line(f"No definitions yet: add one to [[audiences]] in {opened.settings.path}.")
            return
        rows = []
        for each in found:
            last = each["last_run"]
            ran = f"{_short(last['started_at'])} {last['status']}" if last else "never"
            next_slot = _short(each["next_slot_at"])
            rows.append([each["key"], output.count(each["member_count"]), ran, next_slot, each["state"]])
        output.table(["key", "members", "last run (UTC)", "next slot", "state"], rows, numbers=["members"])
        output.line(_daemon_words(coming["daemon"]))


def _short(value: dt.datetime | None) -> str:
    return output.moment(value)[5:]  # a year ago is far away here


def _definitions(
    opened: "App", used: dict[str, dict[str, Any]], slots: dict[str, Any]
) -> list[dict[str, Any]]:
    """Those of the configuration, and those that were used and are not in it any more."""
    configured = {each.key: each for each in opened.settings.definitions}
    found = []
    for key in [*configured, *(each for each in used if each not in configured)]:
        row, definition = used.get(key, {}), configured.get(key)
        state = "enabled" if definition and definition.enabled else "disabled"
        if row.get("is_retired"):
            state = "retired"
        elif definition is None:
            state = "not configured"
        elif row.get("is_held"):
            state = "held"
        found.append(
            {
                "key": key,
                "name": definition.name if definition else row["name"],
                "kind": definition.kind.value if definition else row["kind"],
                "member_count": row.get("member_count", 0),
                "last_run": row.get("last_run"),
                "next_slot_at": slots.get(key),
                "state": state,
            }
        )
    return found


@app.command()
def history(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="Of this definition only.")] = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        if key is not None:
            known_id(connection, opened, key)
        found = history.run_rows(connection, key=key, limit=None if as_json else ROWS)
        if as_json:
            output.document(found)
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
                output.moment(run["as_of"]),
                run["status"],
                *(output.count(run[f"{name}_count"]) for name in names),
            ]
            for run in found
        ]
        numbers = ["run", *names.values()]
        output.table(["run", "key", "as of", "status", *names.values()], rows, numbers=numbers)
        _tell_more(found)


@app.command()
def show(context: typer.Context, run_id: Id, as_json: Json = False) -> None:
    """Show a run: counts, what was set aside, some of those who changed."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        found = history.run_in_full(connection, run_id)
        if found is None:
            raise ConfigError(f"There is no run {run_id}: `audience-sync history` lists them.")
        if as_json:
            output.document(found)
            return
        show_runs([found | {"error": None, "set_aside_count": 0}])
        for name in ("as_of", "started_at", "finished_at"):
            output.line(f"{name}: {output.moment(found[name])} UTC")
        counts = ", ".join(
            f"{found[f'{name}_count']:,} {name}" for name in ("accepted", "pending", "dead", "cancelled")
        )
        output.line(f"deliveries: {counts}")
        for reason, count in found["set_aside"].items():
            output.line(f"set aside: {count:,} {reason.replace('_', ' ')}")
        for name in ("entered", "exited", "changed"):
            if found[f"{name}_sample"]:
                output.line(f"{name}, for example: {', '.join(found[f'{name}_sample'])}")
        if found["held_by"]:
            output.line(f"held by: {found['held_by']}")
        if found["error"]:
            output.line(f"{'why' if found['status'] == 'held' else 'error'}: {found['error']}")


@app.command()
def members(
    context: typer.Context,
    key: str,
    at: Annotated[str | None, typer.Option(help="At a past moment (ISO 8601) instead of now.")] = None,
) -> None:
    """Print the members, one user id a line (a trait: id, tab, JSON value)."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        definition_id = known_id(connection, opened, key)
        if definition_id is not None:
            for user_id, value in history.member_rows(connection, definition_id, sync.moment(at)):
                output.line(user_id if value is None else f"{user_id}\t{value}")


@app.command()
def user(context: typer.Context, user_id: str, as_json: Json = False) -> None:
    """Show all that is known of a user, and what was sent."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        found = history.user(connection, user_id)
        if as_json:
            output.document(found)
            return
        if not found["memberships"] and not found["deliveries"] and found["profile"] is None:
            output.line(f"Nothing is known of {user_id}.")
            return
        rows = [
            [
                each["key"],
                json.dumps(each["value"], ensure_ascii=False),
                output.moment(each["from"]),
                output.moment(each["to"]),
            ]
            for each in found["memberships"]
        ]
        if rows:
            output.table(["key", "value", "from", "to"], rows)
        if found["profile"]:
            output.line(f"profile: {json.dumps(found['profile']['traits'], ensure_ascii=False)}")
        _show_deliveries(found["deliveries"][:ROWS])


@app.command()
def deliveries(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help=f"One of {', '.join(STATUSES)}.")] = None,
    as_json: Json = False,
) -> None:
    """List the deliveries, newest first."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.db.tables import deliveries as deliveries_table

    if status is not None and status not in STATUSES:
        raise ConfigError(f"{status} is no status of a delivery: there are {', '.join(STATUSES)}.")
    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        where = [] if status is None else [deliveries_table.c.status == status]
        found = history.delivery_rows(connection, *where, limit=None if as_json else ROWS)
        if as_json:
            output.document(found)
        else:
            _show_deliveries(found)
            _tell_more(found)


def _show_deliveries(found: list[dict[str, Any]]) -> None:
    rows = [
        [
            str(each["delivery_id"]),
            each["action"],
            each["subject_id"],
            json.dumps(each["body"], ensure_ascii=False),
            each["status"],
            output.moment(each["created_at"]),
            each["error"] or str(each["status_code"] or ""),
        ]
        for each in found
    ]
    output.table(["id", "action", "for", "body", "status", "created", "answer"], rows, numbers=["id"])


@app.command()
def calls(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="accepted or ignored.")] = None,
    as_json: Json = False,
) -> None:
    """List the calls that applications handed in, newest first."""
    from audience_sync import history
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines

    if status not in {None, "accepted", "ignored"}:
        raise ConfigError(f"{status} is no status of a call: there are accepted, ignored.")
    with open_app(context.obj) as opened, engines.read(opened.engine) as connection:
        found = history.call_rows(connection, status, limit=None if as_json else ROWS)
        if as_json:
            output.document(found)
            return
        rows = [
            [
                str(each["call_id"]),
                each["type"],
                each["user_id"] or "",
                each["event"] or each["group_id"] or "",
                each["status"],
                output.moment(each["received_at"]),
                each["reason"] or "",
            ]
            for each in found
        ]
        output.table(
            ["id", "type", "user", "event or group", "status", "received", "reason"], rows, numbers=["id"]
        )
        _tell_more(found)


def _tell_more(found: list[dict[str, Any]]) -> None:
    if len(found) == ROWS:
        output.line(f"These are the newest {ROWS}: --json gives all.")


def known_id(connection: Any, opened: "App", key: str) -> int | None:
    """The id of a definition that was used, None for one that is only configured; others are a mistake."""
    from audience_sync.audiences import records

    row = records.find_definition(connection, key)
    if row is not None:
        return int(row.definition_id)
    opened.definitions([key])
    return None
