"""The commands that hand in one call and deliver what is due: identify, track, group."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from audience_sync.calls.operations import json_or_text
from audience_sync.cli import output
from audience_sync.cli.main import app
from audience_sync.cli.sync import NoDeliver, deliver_now, finish, stoppable, tell_delivery
from audience_sync.errors import ConfigError


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
    """Tell a company's traits, and that the user is in it; deliver what is due."""
    raw = {"type": "group", "userId": user_id, "groupId": group_id, "traits": pairs(trait)}
    _call(context, raw, no_deliver=no_deliver)


def _call(context: typer.Context, raw: dict[str, Any], *, no_deliver: bool) -> None:
    from audience_sync import intake
    from audience_sync.cli.session import open_app
    from audience_sync.db import engines
    from audience_sync.queue import due

    with open_app(context.obj) as opened, stoppable(opened):
        if not no_deliver:
            opened.settings.destination.require_api_key()
        receipt = intake.submit(opened, raw)
        if receipt.ignored:
            output.line(f"Call {receipt.call_id} was kept and ignored: {receipt.ignored}.")
        else:
            output.line(f"Call {receipt.call_id} was accepted for delivery.")
            if receipt.reason:
                output.line(f"A part of it is not sent: {receipt.reason}.")
        if receipt.left_out:
            output.line(
                f"Left out: {', '.join(receipt.left_out)}. A definition's key is told by its runs, and some "
                "properties are Userpilot's own."
            )
        report = None if no_deliver else deliver_now(opened, call_ids=[receipt.call_id])
        with engines.read(opened.engine) as connection:
            tell_delivery(report, due.pending_count(connection))
    finish(report)


def pairs(given: Sequence[str] | None) -> dict[str, Any]:
    """k=v pairs; v is JSON where it parses, else the text itself."""
    found = {}
    for each in given or ():
        name, separator, text = each.partition("=")
        if not separator or not name:
            raise ConfigError(f"{each!r} is not NAME=VALUE: write, for example, plan=pro or age=12.")
        found[name] = json_or_text(text)
    return found
