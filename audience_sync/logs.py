"""Logging to standard error, as lines of text or of JSON. Callers keep user ids, traits and secrets out of it.

Of an exception we print its kind and where it arose, and the words of our own errors only: a driver's quote
the row ("Key (user_id)=(17850) already exists"), whatever SQLAlchemy hides.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime

from audience_sync.errors import AudienceSyncError

QUIET = (
    "alembic",
    "apscheduler",
    "httpcore",
    "httpx",
    "sqlalchemy",
    "uvicorn",
)  # they print URLs, statements, every tick


def configure(format: str = "text", level: str = "info") -> None:  # noqa: A002  (the configuration's word)
    """Send what is logged from `level` on to standard error, as `text` or `json`; the last call holds."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def event(log: logging.Logger, level: int, name: str, **fields: str | float) -> None:
    """Log what happened in a line: its name, and facts about it; never an id of a user, a trait or a secret."""
    log.log(level, "%s", name, extra={"facts": fields})


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {name}={value}" for name, value in getattr(record, "facts", {}).items())
        return " | ".join(f"{_at(record)} {record.levelname} {_message(record)}{facts}".splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        known = {"at": _at(record), "level": record.levelname.lower(), "logger": record.name}
        return json.dumps(known | {"message": _message(record)} | getattr(record, "facts", {}))


def _at(record: logging.LogRecord) -> str:
    return f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _message(record: logging.LogRecord) -> str:
    return "\n".join([record.getMessage(), *_trace(record.exc_info[1] if record.exc_info else None)])


def _trace(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield type(error).__name__ + (f": {error}" if isinstance(error, AudienceSyncError) else "")
        yield from (
            f"  {at.filename}:{at.lineno} {at.name}" for at in traceback.extract_tb(error.__traceback__)
        )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
