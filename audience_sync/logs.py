"""Logging to standard error, as lines of text or of JSON. Callers never pass user ids, traits or secrets.

docs/reference/log-events.md lists every event with its fields; a test compares it with the code.

An exception is logged with its type and traceback. Only our own errors are logged with their message, because a driver's
message may quote a row ("Key (user_id)=(17850) already exists") even if SQLAlchemy hides parameters.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime

from audience_sync.errors import AudienceSyncError

# Libraries that log URLs, statements or every tick; only their warnings are logged.
QUIET = ("alembic", "apscheduler", "httpcore", "httpx", "sqlalchemy", "uvicorn")


def configure(format: str = "text", level: str = "info") -> None:  # noqa: A002  (its name in the configuration)
    """Log messages of at least this level to standard error, as `text` or `json`; a later call replaces an earlier one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def event(log: logging.Logger, level: int, name: str, **fields: str | float) -> None:
    """Log an event and its fields on one line."""
    log.log(level, "%s", name, extra={"fields": fields})


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        return " | ".join(f"{_at(record)} {record.levelname} {_message(record)}{fields}".splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        common = {"at": _at(record), "level": record.levelname.lower(), "logger": record.name}
        return json.dumps(common | {"message": _message(record)} | getattr(record, "fields", {}))


def _at(record: logging.LogRecord) -> str:
    return f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _message(record: logging.LogRecord) -> str:
    return "\n".join([record.getMessage(), *_trace(record.exc_info[1] if record.exc_info else None)])


def _trace(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield type(error).__name__ + (f": {error}" if isinstance(error, AudienceSyncError) else "")
        yield from (
            f"  {frame.filename}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
        )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
