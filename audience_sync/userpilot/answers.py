"""What an answer of Userpilot means for the delivery; pure."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

MAX_ERROR_LENGTH = 500
MAX_TEXT_LENGTH = 65_536  # of a body that is looked at for words; the rest is not worth the memory
MAX_REQUEST_ID_LENGTH = 200
MAX_RETRY_AFTER_SECONDS = 900.0
SHORTEST_SECRET = 12  # a shorter one is a toy, which job ids may hold by chance


class Outcome(StrEnum):
    ACCEPTED = "accepted"  # 2xx: taken in, which is not stored
    THROTTLED = "throttled"
    UNAUTHORISED = "unauthorised"
    REFUSED = "refused"  # the same request would be refused again
    FAILED = "failed"  # not applied: try again
    UNKNOWN = "unknown"  # maybe applied: try again where a repeat does no harm


_BY_CLASS = {2: Outcome.ACCEPTED, 3: Outcome.FAILED, 4: Outcome.REFUSED, 5: Outcome.FAILED}
_BY_STATUS = {
    401: Outcome.UNAUTHORISED,
    403: Outcome.UNAUTHORISED,
    408: Outcome.FAILED,
    423: Outcome.FAILED,
    425: Outcome.FAILED,
    429: Outcome.THROTTLED,
    501: Outcome.REFUSED,
    502: Outcome.UNKNOWN,  # a gateway lost sight of a request that it may have passed on
    504: Outcome.UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """`error` is in the API's own words where it has any; `retry_after_seconds` is its wish, 0 to 900.

    `document` is the JSON of an accepted answer's body; None where that is empty, was cut off or is no JSON.
    """

    outcome: Outcome
    status_code: int | None
    x_request_id: str | None
    error: str | None
    retry_after_seconds: float | None
    document: Any = field(default=None, compare=False)


def judge(
    status_code: int, headers: Mapping[str, str], body: bytes, *, cut: bool, secret: str, now: datetime
) -> Answer:
    """What the answer means. `headers` are asked for in lower case; `cut`: the body went on beyond `body`.

    `secret` is taken out of whatever the server said: some repeat a request's headers in their errors.
    """
    outcome = _outcome(status_code)
    found = _json(body)
    error = None
    if outcome is Outcome.ACCEPTED and not _is_success(headers, body, found, cut=cut):
        outcome = Outcome.UNKNOWN
        error = f"HTTP {status_code}, but the body is not Userpilot's: {_words(body, found)}"
    elif outcome is not Outcome.ACCEPTED:
        error = _words(body, found).strip() or f"HTTP {status_code} without a message"
    quotes_secret = len(secret) >= SHORTEST_SECRET and secret.encode() in body
    may_keep = outcome is Outcome.ACCEPTED and not cut and not quotes_secret
    return Answer(
        outcome=outcome,
        status_code=status_code,
        x_request_id=one_line(headers.get("x-request-id", ""), MAX_REQUEST_ID_LENGTH, secret) or None,
        error=one_line(error, MAX_ERROR_LENGTH, secret) if error else None,
        retry_after_seconds=retry_after(headers.get("retry-after"), now=now),
        document=found if may_keep and found is not _NOT_JSON else None,
    )


def _outcome(status_code: int) -> Outcome:
    return _BY_STATUS.get(status_code) or _BY_CLASS.get(status_code // 100, Outcome.UNKNOWN)


def _is_success(headers: Mapping[str, str], body: bytes, found: Any, *, cut: bool) -> bool:
    """Whether the body of a 2xx is empty or JSON; a proxy's or a login page is neither."""
    text = body.strip()
    if not text:
        return True
    if "html" in headers.get("content-type", "").lower() or text.startswith(b"<"):
        return False
    return cut or found is not _NOT_JSON


_NOT_JSON = object()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _words(body: bytes, found: Any) -> str:
    """What an error body says: `{"errors": [{"error_code", "error", "message", "details"}]}`, or as it is."""
    if isinstance(found, dict):
        errors = found.get("errors")
        entries = [entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else []
        told = "; ".join(filter(None, map(_entry_words, entries or [found])))
        if told:
            return told
    return body.decode("utf-8", "replace")


def _entry_words(entry: dict[str, Any]) -> str:
    values = (entry.get(name) for name in ("error_code", "error", "message", "details"))
    return ": ".join(dict.fromkeys(value for value in values if isinstance(value, str) and value))


def one_line(text: str, max_length: int, secret: str) -> str:
    """The text without the secret, as every database and terminal takes it."""
    open_text = _spellings(secret).sub("[API key]", text)[:MAX_TEXT_LENGTH]
    printable = "".join(character if character.isprintable() else " " for character in open_text)
    return " ".join(printable.split())[:max_length]


@lru_cache(maxsize=4)
def _spellings(secret: str) -> re.Pattern[str]:
    """The secret as it is, and as JSON, URLs and HTML write it."""
    return re.compile("".join(map(_spelled, secret)), re.IGNORECASE)


def _spelled(character: str) -> str:
    code = f"{ord(character):x}"
    forms = (
        rf"\\?{re.escape(character)}",
        rf"\\u0*{code}",
        f"%{code:0>2}",
        f"&#x0*{code};",
        f"&#0*{ord(character)};",
    )
    return f"(?:{'|'.join(forms)})"


def retry_after(value: str | None, *, now: datetime) -> float | None:
    """Seconds to wait, from 0 to 900; None if the header is missing or makes no sense.

    Userpilot documents no Retry-After; honour one all the same.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return min(float(text), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
