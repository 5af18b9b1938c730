"""What a person does about runs, keys, users and deliveries: it is queued, and `deliver` or the daemon sends it."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from audience_sync.cli import output
from audience_sync.cli.main import Id, app
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    from audience_sync.app import App


@app.command()
def approve(context: typer.Context, run_id: Id) -> None:
    """Commit the changes that a held run waits with."""
    from audience_sync.audiences import decisions
    from audience_sync.cli.session import open_app

    with open_app(context.obj) as opened:
        decisions.approve(opened.engine, run_id, opened.clock, opened.destination)
        _tell_run(opened, run_id)


@app.command()
def reject(context: typer.Context, run_id: Id) -> None:
    """Drop the changes that a held run waits with."""
    from audience_sync.audiences import decisions
    from audience_sync.cli.session import open_app

    with open_app(context.obj) as opened:
        decisions.reject(opened.engine, run_id, opened.clock)
        output.line(f"Run {run_id} is rejected: nothing of it is sent, and the next run computes anew.")


@app.command()
def retire(context: typer.Context, key: str) -> None:
    """Tell false (of a trait, null) of all who hold it, and let the key rest."""
    from audience_sync.audiences import decisions
    from audience_sync.cli.session import open_app

    with open_app(context.obj) as opened:
        run_id = decisions.retire(opened.engine, key, opened.clock, opened.destination)
        _tell_run(opened, run_id)
        if key in {definition.key for definition in opened.settings.definitions}:
            output.line(f"{key} rests from now on: remove it from {opened.settings.path}.")


@app.command()
def forget(
    context: typer.Context,
    user_id: str,
    allow_return: Annotated[
        bool, typer.Option("--allow-return", help="Let a user who was forgotten be sent again.")
    ] = False,
) -> None:
    """Have Userpilot delete a user, and erase what is known of the user here."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.retention import erasure

    with open_app(context.obj) as opened:
        if allow_return:
            with engines.write(opened.engine) as connection:
                at = erasure.allow_return(connection, user_id)
            if at is None:
                raise ConfigError("That user was not forgotten: nothing to allow.")
            output.line(f"From {output.moment(at)} UTC on the user may be computed and sent again.")
            return
        with opened.client() as client:
            ended = erasure.forget_everywhere(opened.engine, client, user_id, opened.clock)
        output.line(
            f"Userpilot carries the deletion out at 02:00 UTC. Here everything of the user is erased ({ended} "
            "memberships), and later computations and calls set the user aside."
        )
        output.line(f"To undo the last part: `audience-sync forget {shlex.quote(user_id)} --allow-return`.")


def _tell_run(opened: "App", run_id: Id) -> None:
    from audience_sync import history
    from audience_sync.cli.sync import show_runs
    from audience_sync.db import engines

    with engines.read(opened.engine) as connection:
        found = history.run_rows(connection, ids=[run_id])
    show_runs(found)
    output.line(f"Queued: {found[0]['pending_count']:,}. `audience-sync deliver` or the daemon sends them.")


@app.command()
def retry(
    context: typer.Context,
    ids: Annotated[
        list[int] | None, typer.Argument(metavar="[ID]...", help="Dead deliveries.", min=1, max=2**63 - 1)
    ] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="Every dead delivery.")] = False,
) -> None:
    """Queue dead deliveries again, if nothing newer has overtaken them."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.queue import deliveries

    if bool(ids) == all_dead:
        raise ConfigError("Name the deliveries to try again, or say --all-dead.")
    with open_app(context.obj) as opened:
        with engines.write(opened.engine) as connection:
            retried = deliveries.retry(connection, None if all_dead else ids, opened.clock.now())
        for reason in retried.refusals:
            output.warn(reason)
        if retried.count:
            output.line(f"Queued again: {retried.count:,}. `audience-sync deliver` or the daemon sends them.")
        else:
            output.line("Nothing was queued again: there is no such dead delivery.")
    if retried.refusals and not all_dead:
        raise typer.Exit(1)


@app.command()
def discard(
    context: typer.Context, ids: Annotated[list[int], typer.Argument(metavar="ID...", min=1, max=2**63 - 1)]
) -> None:
    """Cancel pending, dead, or held deliveries (not a held run's); Userpilot is not told."""
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.queue import deliveries

    with open_app(context.obj) as opened:
        with engines.write(opened.engine) as connection:
            count = deliveries.discard(connection, ids, opened.clock.now())
        output.line(f"{count:,} of {len(set(ids)):,} deliveries are cancelled.")
        if count:
            output.line(
                "Where they came from an audience, `audience-sync sync KEY --full` tells Userpilot the truth again."
            )
    if count < len(set(ids)):
        output.warn("The others do not exist, are settled, or belong to a held run (`audience-sync reject`).")
        raise typer.Exit(1)
