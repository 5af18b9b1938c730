"""The commands that read the history: history, show, members, user, deliveries, calls."""

import json
import shlex
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audience_sync.cli import lazy, output, session, sync
from audience_sync.cli.session import Json, RunId, UserId, stored_texts
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    import datetime as dt

    import sqlalchemy as sa

    from audience_sync.app import App

SHOWN_ROWS = 50  # of a table; --json prints all
DELIVERY_STATUSES = ("held", "pending", "sending", "accepted", "dead", "cancelled")
CALL_STATUSES = ("accepted", "ignored")


def history(
    context: typer.Context,
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="Show the runs of this definition only.", callback=stored_texts),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first.

    The counts: members; users who entered, exited or changed; deliveries accepted, pending and dead.
    """
    with session.open_app(context) as app:
        with lazy.engines.read(app.engine) as connection:
            if key is not None:
                known_id(connection, app, key)
            runs = [] if as_json else lazy.history.run_rows(connection, key=key, limit=SHOWN_ROWS)
        if as_json:
            every = partial(lazy.history.run_rows, key=key)
            output.documents(lazy.history.pages(app.engine, every, "run_id"))
            return
    if not runs:
        output.line("There are no runs yet: `audience-sync sync` makes the first.")
        return
    names = {"member": "members", "entered": "entered", "exited": "exited", "changed": "changed"}
    names |= {"accepted": "accepted", "pending": "pending", "dead": "dead"}
    for name in ("changed", "pending", "dead"):  # only interesting when there are any
        if not any(run[f"{name}_count"] for run in runs):
            del names[name]
    rows = [
        [str(run["run_id"]), *([] if key else [run["key"]]), output.moment(run["as_of"]), run["status"]]
        + [output.count(run[f"{name}_count"]) for name in names]
        for run in runs
    ]
    columns = ["run", *([] if key else ["key"]), "as of (UTC)", "status", *names.values()]
    output.table(columns, rows, numbers=["run", *names.values()])
    _mention_more(runs)


def show(context: typer.Context, run_id: RunId, as_json: Json = False) -> None:
    """Show one run in detail.

    Its counts and times, how far its deliveries are, rows that were set aside, and some of the users who changed; the
    dashboard (`serve`) lists all of them.
    """
    with session.open_app(context) as app, lazy.engines.read(app.engine) as connection:
        run = lazy.history.run_in_full(connection, run_id)
    if run is None:
        raise ConfigError(f"There is no run {run_id}: `audience-sync history` lists the runs.")
    if as_json:
        output.document(run)
        return
    sync.show_table([run])
    for name in ("as_of", "started_at", "finished_at"):
        if run[name]:
            output.line(f"{name.replace('_', ' ')}: {output.moment(run[name])} UTC")
    output.line(f"deliveries: {_delivery_counts(run)}")
    for reason, count in run["set_aside"].items():
        output.line(f"set aside: {count:,} {reason.replace('_', ' ')}")
    for name in sync.CHANGES:
        if run[f"{name}_sample"]:
            output.line(f"{name}, for example: {', '.join(run[f'{name}_sample'])}")
    if run["held_by"]:
        output.line(f"held by: {run['held_by']}")
    if run["error"]:
        output.line(f"{'reason' if run['held_by'] else 'error'}: {run['error']}")


def _delivery_counts(run: dict[str, Any]) -> str:
    labels = {name: name for name in ("accepted", "pending", "dead", "cancelled")}
    if run["status"] == "held":
        labels["pending"] = "held"
    return ", ".join(f"{run[f'{name}_count']:,} {label}" for name, label in labels.items())


def members(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The definition.", callback=stored_texts)],
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="At a past time (ISO 8601) instead of now.")
    ] = None,
) -> None:
    """Print the members of an audience, now or at a past time.

    One user id a line; for a trait, the id, a tab and the value as JSON.

        audience-sync members at_risk --at 2026-05-01
    """
    moment = session.parse_time(at)
    with session.open_app(context) as app:
        with lazy.engines.read(app.engine) as connection:
            definition_id = known_id(connection, app, key)
        if definition_id is not None:
            for user_id, value in lazy.history.member_rows(app.engine, definition_id, moment):
                output.line(user_id if value is None else f"{user_id}\t{value}")


def user(
    context: typer.Context,
    user_id: UserId,
    as_json: Json = False,
) -> None:
    """Show a user's memberships, profile and deliveries.

    It also says when the user was erased.
    """
    with session.open_app(context) as app, lazy.engines.read(app.engine) as connection:
        document = lazy.history.user(connection, user_id)
        erasure = lazy.erasure.find_erasure(connection, user_id)
    if as_json:
        output.document(document)
        return
    if erasure is not None:
        output.line(_erasure(user_id, erasure.forgotten_at, erasure.returns_at))
    elif not document["memberships"] and not document["deliveries"] and document["profile"] is None:
        output.line(f"There is nothing about {user_id}: no membership, no profile and no delivery.")
    rows = [
        [row["key"], _json(row["value"]), output.moment(row["from"]), output.moment(row["to"])]
        for row in document["memberships"]
    ]
    output.table(["key", "value", "from (UTC)", "to (UTC)"], rows)
    if document["profile"]:
        output.line(f"profile: {_json(document['profile']['traits'])}")
    _show_deliveries(document["deliveries"][:SHOWN_ROWS])


def _erasure(user_id: str, forgotten_at: "dt.datetime", returns_at: "dt.datetime | None") -> str:
    text = f"{user_id} was erased on {output.moment(forgotten_at)} UTC, here and at Userpilot."
    if returns_at is not None:
        return f"{text} The user may be computed and sent again from {output.moment(returns_at)} UTC on."
    again = f"`audience-sync forget {shlex.quote(user_id)} --allow-return`"
    return f"{text} Runs and calls leave this user out until {again}."


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def deliveries(
    context: typer.Context,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help=f"Only {', '.join(DELIVERY_STATUSES)}.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the deliveries with Userpilot's answers, newest first."""
    query = lazy.history.delivery_rows
    rows = _newest(context, query, "delivery_id", status, DELIVERY_STATUSES, "deliveries", as_json=as_json)
    _show_deliveries(rows)
    _mention_more(rows)


def _newest(
    context: typer.Context,
    query: Callable[..., list[dict[str, Any]]],
    id_name: str,
    status: str | None,
    statuses: tuple[str, ...],
    noun: str,
    *,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Return the newest rows to show; with `as_json`, print all of them instead. Say so if there are none."""
    if status is not None and status not in statuses:
        raise ConfigError(f"There is no status {status}: choose {', '.join(statuses)}.")
    with session.open_app(context) as app:
        if as_json:
            output.documents(lazy.history.pages(app.engine, partial(query, status=status), id_name))
            return []
        with lazy.engines.read(app.engine) as connection:
            rows = query(connection, status=status, limit=SHOWN_ROWS)
    if not rows:
        output.line(f"There are no {f'{status} ' if status else ''}{noun}.")
    return rows


def _show_deliveries(deliveries: list[dict[str, Any]]) -> None:
    rows = [
        [
            str(row["delivery_id"]),
            row["action"],
            row["subject_id"],
            _json(row["body"]),
            row["status"],
            output.moment(row["created_at"]),
            row["error"] or str(row["status_code"] or ""),
        ]
        for row in deliveries
    ]
    columns = ["id", "action", "for", "body", "status", "created (UTC)", "answer"]
    output.table(columns, rows, numbers=["id"])


def calls(
    context: typer.Context,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help=f"Only {' or '.join(CALL_STATUSES)} ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the calls from applications, newest first."""
    query = lazy.history.call_rows
    calls = _newest(context, query, "call_id", status, CALL_STATUSES, "calls", as_json=as_json)
    rows = [
        [
            str(call["call_id"]),
            call["type"],
            call["user_id"] or f"{call['anonymous_id'] or ''} (anonymous)".strip(),
            call["event"] or call["group_id"] or "",
            call["status"],
            output.moment(call["received_at"]),
            call["reason"] or "",
        ]
        for call in calls
    ]
    columns = ["id", "type", "user", "event or group", "status", "received (UTC)", "reason"]
    output.table(columns, rows, numbers=["id"])
    _mention_more(calls)


def _mention_more(rows: list[dict[str, Any]]) -> None:
    if len(rows) == SHOWN_ROWS:
        output.line(f"Only the newest {SHOWN_ROWS} are shown: --json prints all.")


def known_id(connection: "sa.Connection", app: "App", key: str) -> int | None:
    """Return the id of a key that was synced, None for a key that is only configured.

    Raises:
        ConfigError: the key is neither.

    """
    definition_id = lazy.history.definition_id(connection, key)
    if definition_id is None:
        app.definitions([key])
    return definition_id
