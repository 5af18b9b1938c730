"""The commands that decide about runs, keys, users and deliveries; `deliver` or the daemon sends what they queue."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from audience_sync.cli import lazy, output, session
from audience_sync.cli.session import RunId, UserId, row_ids, stored_texts
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    from audience_sync.app import App


ERASED = {  # nouns for the rows of each table
    "members": ("membership",),
    "past_members": ("past membership",),
    "deliveries": ("delivery", "deliveries"),
    "calls": ("call",),
    "events": ("event",),
    "profiles": ("profile",),
}


def approve(context: typer.Context, run_id: RunId) -> None:
    """Commit the changes of a held run.

    Exactly the changes that `audience-sync show RUN_ID` shows are queued.
    """
    with session.open_app(context) as app:
        lazy.decisions.approve(app.engine, run_id, app.clock, app.destination)
        _show_queued(app, run_id)


def reject(context: typer.Context, run_id: RunId) -> None:
    """Drop the changes of a held run.

    None of its changes are sent. The next run computes again, from the last committed members.
    """
    with session.open_app(context) as app:
        lazy.decisions.reject(app.engine, run_id, app.clock)
        output.line(
            f"Run {run_id} is rejected. None of its changes are sent, and the next run computes again."
        )


def retire(
    context: typer.Context,
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="The key of an audience or trait that was synced.",
            callback=stored_texts,
        ),
    ],
) -> None:
    """End a key: send false to all its members, then reserve it.

    Members of an audience get false; users with a value of a trait get null. The key can never be used again.
    """
    with session.open_app(context) as app:
        run_id = lazy.decisions.retire(app.engine, key, app.clock, app.destination)
        _show_queued(app, run_id)
        if key in {definition.key for definition in app.settings.definitions}:
            output.line(f"{key} is retired and will not run again: remove it from {app.settings.path}.")


def _show_queued(app: "App", run_id: int) -> None:
    with lazy.engines.read(app.engine) as connection:
        [run] = lazy.history.run_rows(connection, ids=[run_id])
    counts = ", ".join(f"{run[f'{name}_count']:,} {name}" for name in ("entered", "exited", "changed"))
    queued = output.plural(run["pending_count"], "delivery", "deliveries")
    output.line(f"Run {run_id} of {run['key']} is committed: {counts}.")
    if run["cancelled_count"]:
        users = output.plural(run["cancelled_count"], "user")
        output.line(
            f"{users} of these left before anything was sent, or were erased: nothing is sent about them."
        )
    output.line(f"{queued} queued. `audience-sync deliver` or the daemon sends what is in the queue.")


def forget(
    context: typer.Context,
    user_id: UserId,
    allow_return: Annotated[
        bool, typer.Option("--allow-return", help="Allow an erased user to be computed and sent again.")
    ] = False,
) -> None:
    """Erase a user here and at Userpilot.

    Userpilot deletes at 02:00 UTC. All local rows about the user are removed. A hash of the id remains, so that later
    runs and calls leave the user out.
    """
    quoted = shlex.quote(user_id)
    with session.open_app(context) as app:
        if allow_return:
            with lazy.engines.write(app.engine) as connection:
                moment = lazy.erasure.allow_return(connection, user_id)
            if moment is None:
                raise ConfigError("This user was not erased, so there is nothing to allow.")
            output.line(f"{user_id} may be computed and sent again from {output.moment(moment)} UTC on.")
            return
        with app.client() as client:
            counts = lazy.erasure.forget_everywhere(app.engine, client, user_id, app.clock)
    erased = [output.plural(counts[table], *noun) for table, noun in ERASED.items() if counts[table]]
    output.line(
        f"Erased here for {user_id}: {', '.join(erased)}."
        if erased
        else f"Nothing was stored here about {user_id}."
    )
    output.line(
        "Userpilot accepted the deletion and carries it out at 02:00 UTC. Later runs and calls leave this user out."
    )
    output.line(f"To let the user return: `audience-sync forget {quoted} --allow-return`.")


def retry(
    context: typer.Context,
    ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", help="Dead deliveries, as `deliveries` lists them.", callback=row_ids),
    ] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="Retry every dead delivery.")] = False,
) -> None:
    """Queue dead deliveries again.

    A delivery whose value has been superseded by a newer one stays dead.

        audience-sync deliveries --status dead
        audience-sync retry 1041 1042
        audience-sync retry --all-dead
    """
    if bool(ids) == all_dead:
        raise ConfigError("Name the deliveries to retry, or give --all-dead for all of them.")
    with session.open_app(context) as app, lazy.engines.write(app.engine) as connection:
        retried = lazy.deliveries.retry(connection, None if all_dead else ids, app.clock.now())
    for reason in retried.refusals:
        output.warn(reason)
    if retried.count:
        queued = output.plural(retried.count, "delivery", "deliveries")
        output.line(
            f"{queued} queued again. `audience-sync deliver` or the daemon sends what is in the queue."
        )
    else:
        output.line("There are no dead deliveries." if all_dead else "Nothing was queued again.")
    if retried.refusals and not all_dead:
        raise typer.Exit(1)


def discard(
    context: typer.Context,
    ids: Annotated[
        list[int],
        typer.Argument(metavar="ID", help="Deliveries, as `deliveries` lists them.", callback=row_ids),
    ],
) -> None:
    """Cancel deliveries, so that they are never sent.

    Pending, dead and held deliveries can be cancelled; the deliveries of a held run only together, with `reject`.
    Userpilot then lacks these values until `audience-sync sync KEY --full`.
    """
    with session.open_app(context) as app, lazy.engines.write(app.engine) as connection:
        count = lazy.deliveries.discard(connection, ids, app.clock.now())
    total = len(set(ids))
    output.line(f"{count:,} of {total:,} deliveries cancelled.")
    if count:
        output.line(
            "If an audience or trait sent them, `audience-sync sync KEY --full` sends its values again."
        )
    if count < total:
        output.warn("The others do not exist, are settled already, or belong to a held run (use `reject`).")
        raise typer.Exit(1)
