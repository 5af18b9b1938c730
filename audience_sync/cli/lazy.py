"""The modules that commands use, each imported when it is first needed, so that `--help` does not wait for SQLAlchemy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audience_sync import app, daemon, history, intake, remote, sandbox, settings
    from audience_sync.audiences import compute, decisions, definition, foreign, plan, runs, statement
    from audience_sync.audiences.query import english, layout, review
    from audience_sync.calls import operations, times, validation
    from audience_sync.cli import demo
    from audience_sync.db import checks, engines, leases, migrate
    from audience_sync.intake import files, http, server, writer
    from audience_sync.queue import backlog, deliveries, destination
    from audience_sync.retention import erasure
    from audience_sync.settings import passwords
    from audience_sync.userpilot import answers
    from audience_sync.web import site

PACKAGES = {
    "audience_sync": ("app", "daemon", "history", "intake", "remote", "sandbox", "settings"),
    "audience_sync.audiences": (
        "compute",
        "decisions",
        "definition",
        "foreign",
        "plan",
        "runs",
        "statement",
    ),
    "audience_sync.audiences.query": ("english", "layout", "review"),
    "audience_sync.calls": ("operations", "times", "validation"),
    "audience_sync.cli": ("demo",),
    "audience_sync.db": ("checks", "engines", "leases", "migrate"),
    "audience_sync.intake": ("files", "http", "server", "writer"),
    "audience_sync.queue": ("backlog", "deliveries", "destination"),
    "audience_sync.retention": ("erasure",),
    "audience_sync.settings": ("passwords",),
    "audience_sync.userpilot": ("answers",),
    "audience_sync.web": ("site",),
}


def __getattr__(name: str) -> Any:
    for package, names in PACKAGES.items():
        if name in names:
            return importlib.import_module(f"{package}.{name}")
    raise AttributeError(name)
