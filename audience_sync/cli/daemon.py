"""The commands that run until they are stopped: daemon, serve."""

import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from audience_sync import logs
from audience_sync.cli import lazy, output, session
from audience_sync.errors import ConfigError

if TYPE_CHECKING:
    from audience_sync.app import App


def _log_everything(app: "App") -> None:
    logs.configure(app.settings.logging.format, app.settings.logging.level)


def daemon(context: typer.Context) -> None:
    """Sync by schedule and deliver, until stopped.

    Runs each definition with a `schedule` when it is due, and delivers continuously. SIGTERM or Ctrl-C finishes the
    requests in flight and stops; SIGHUP reads the configuration again.
    """

    def reopen(before: "App") -> "App":
        after = before.reloaded()
        after.settings.destination.api_key.require()
        _log_everything(after)
        return after

    with session.open_app(context) as app:
        app.settings.destination.api_key.require()
        _log_everything(app)
        running = lazy.daemon.Daemon(app, reopen)

        def stop(_number: int, _frame: FrameType | None) -> None:
            if running.stop_requested:
                session.end_at_once("Stopped at once. Nothing is lost: start the daemon again to continue.")
            running.stop_requested = True

        def reload(_number: int, _frame: FrameType | None) -> None:
            running.reload_requested = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, reload)
        running.run()


def begin_commands(path: Path) -> str:
    """Return the beginning of commands that use this configuration if they are run in this folder."""
    try:
        usual = lazy.settings.find(None, os.environ, Path.cwd())
    except ConfigError:
        usual = None
    is_usual = usual is not None and usual.resolve() == path.resolve()
    return "audience-sync" if is_usual else f"audience-sync --config {shlex.quote(str(path.resolve()))}"


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="PORT", min=0, max=65_535, help="The port to listen on; 0 takes a free one."),
    ] = 8040,
) -> None:
    """Show the dashboard and accept calls by HTTP, until stopped.

    Open the address in a browser to see the dashboard. The API for calls is the one that Segment's libraries use: give
    them this address as host, and a key from [tracking] write_keys. Calls are stored and queued; `daemon` or `deliver`
    sends them. To listen for other machines, the dashboard needs users ([[web.users]]), and the API needs write keys.
    `serve` needs the extra packages of `pip install 'audience-sync[web]'`.
    """
    try:
        http, remote, server, site, writer = lazy.http, lazy.remote, lazy.server, lazy.site, lazy.writer
    except ImportError as error:
        raise ConfigError("serve needs more packages: run pip install 'audience-sync[web]'.") from error
    with session.open_app(context) as app:
        _log_everything(app)
        web, users = app.settings.web, app.settings.web.require_users()
        if not remote.is_loopback(host):
            reachable = f"{host} can be reached from other machines"
            if not app.settings.tracking.require_write_keys():
                raise ConfigError(f"{reachable}: set [tracking] write_keys first, or listen on 127.0.0.1.")
            if web.dashboard and not users:
                raise ConfigError(
                    f"{reachable}: give the dashboard users first ([[web.users]]), set [web] dashboard = false to serve "
                    "the tracking API alone, or listen on 127.0.0.1."
                )

        def stop(_number: int, _frame: FrameType | None) -> None:
            if app.stop.is_set():
                session.end_at_once(
                    "Stopped at once. Calls that were answered are stored; clients send the others again."
                )
            app.stop.set()

        with server.listen(host, port) as listening:
            shown = f"[{host}]" if ":" in host else host
            address = f"http://{shown}:{listening.getsockname()[1]}/"
            output.line(
                f"The dashboard is at {address}, which also accepts calls; the daemon sends them. Ctrl-C stops it."
                if web.dashboard
                else f"Calls are accepted at {address}. Ctrl-C stops it."
            )
            sys.stdout.flush()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            with writer.Writer(app) as running:
                api = http.TrackingApi(app, running).asgi(
                    site.dashboard(app, begin_commands(app.settings.path)) if web.dashboard else None
                )
                server.TrackingServer(api, app.stop).run(sockets=[listening])
