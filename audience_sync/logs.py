"""Logging to standard error, as lines of text or of JSON. Callers never pass user ids, traits or secrets.

An exception is logged with its type and where it arose. The message is added for our own errors only: a driver's
message quotes the row ("Key (user_id)=(17850) already exists"), even where SQLAlchemy hides parameters.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime

from audience_sync.errors import AudienceSyncError

# The reference of log events in docs/ is this table. Fields follow the event on a line of text; in JSON they are members
# beside "message", which is the event.
EVENTS = """
| event | level | fields | when |
| --- | --- | --- | --- |
| run succeeded | info | run_id, key, members, entered, exited, changed, seconds | a run was committed to the queue |
| run held by guard, run held by hold, run held by fingerprint | info \
| run_id, key, members, entered, exited, changed, seconds | a run waits for approval, or for its destination to be accepted |
| run failed | warning | run_id, key, error, seconds | a run ended with an error of that type |
| delivered | info | accepted, dead, pending, requests, seconds | delivery ended, or made way for a reload; `pending` \
counts the whole queue |
| lane slows down | warning | lane, status_code | Userpilot asked for it, or requests failed; `status` shows the reason |
| lane is at its pace again | warning | lane, status_code | a request succeeded after that |
| bulk job sent | info | rows, request_id | Userpilot accepted the upload of a bulk job |
| bulk job completed | info | rows, request_id, seconds | Userpilot processed the job |
| bulk job failed, bulk job dropped, bulk job lost | warning | rows, request_id, seconds | the job ended otherwise; its \
deliveries are sent again |
| bulk job refused | warning | rows | Userpilot refused the upload |
| bulk lane waits for another job | warning | | a job that is not ours is running at Userpilot |
| bulk lane pauses | warning | seconds | bulk jobs are not possible at the moment |
| daemon started, configuration reloaded | info | definitions | the number of enabled definitions |
| daemon stopped | info | | the daemon ended as requested |
| slot given back (Busy), slot given back (Interrupted) | info | key | another process syncs the definition, or the daemon \
stops: the slot is due again |
| the clock was set | warning | | the wall clock moved by more than two seconds |
| failed | error | error | a run or delivery of the daemon failed; it tries again |
| configuration refused; the previous one stays in use | error | error | a reload failed |
| calls refused | warning | count, first_reason | `serve` answered that calls are not valid |
| calls could not be kept | error | error | `serve` could not write calls to the database |
"""

# Libraries that log URLs, statements and every tick: warnings only.
QUIET = ("alembic", "apscheduler", "httpcore", "httpx", "sqlalchemy", "uvicorn")


def configure(format: str = "text", level: str = "info") -> None:  # noqa: A002  (its name in the configuration)
    """Log from `level` on to standard error, as `text` or `json`; the last call takes effect."""
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
