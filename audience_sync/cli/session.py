"""What every command does first: read the configuration, set up logging, open the database."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audience_sync import app, logs


@contextmanager
def open_app(path: Path | None, *, migrated: bool = True) -> Iterator[app.App]:
    """As app.open_app; on a terminal the command's own output replaces the lines of progress."""
    with app.open_app(path, migrated=migrated) as opened:
        chosen = opened.settings.logging
        quiet = chosen.level == "info" and sys.stderr.isatty()
        logs.configure(chosen.format, "warning" if quiet else chosen.level)
        yield opened
