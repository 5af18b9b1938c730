"""The command that runs by itself: daemon."""

import signal
from types import FrameType

import typer

from audience_sync.cli.main import app
from audience_sync.cli.sync import end_at_once


@app.command()
def daemon(context: typer.Context) -> None:
    """Sync by the schedules and deliver, until SIGTERM; SIGHUP reads the configuration anew."""
    from audience_sync import logs
    from audience_sync.app import App
    from audience_sync.cli.session import open_app
    from audience_sync.daemon import Daemon

    def open_again(before: App) -> App:
        after = before.reloaded()
        after.settings.destination.require_api_key()
        logs.configure(after.settings.logging.format, after.settings.logging.level)
        return after

    with open_app(context.obj) as opened:
        opened.settings.destination.require_api_key()
        logs.configure(opened.settings.logging.format, opened.settings.logging.level)
        working = Daemon(opened, open_again)

        def end(_number: int, _frame: FrameType | None) -> None:
            if working.stop_requested:
                end_at_once("Stopped at once. Nothing is lost: start it again to go on.")
            working.stop_requested = True

        def reload(_number: int, _frame: FrameType | None) -> None:
            working.reload_requested = True

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGHUP, reload)
        working.run()
