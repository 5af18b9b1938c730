"""The meaning of an HTTP answer for the deliveries of its request; pure."""

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
MAX_TEXT_LENGTH = 65_536  # of a body that is searched for a message
MAX_REQUEST_ID_LENGTH = 200
MAX_RETRY_AFTER_SECONDS = 900.0
MIN_SECRET_LENGTH = 12  # a shorter one is not a real key, and might occur in a job id by chance


class Outcome(StrEnum):
    ACCEPTED = "accepted"  # 2xx: not necessarily stored
    THROTTLED = "throttled"
    UNAUTHORISED = "unauthorised"
    REFUSED = "refused"  # the same request would be refused again
    FAILED = "failed"  # not applied: try again
    UNKNOWN = "unknown"  # perhaps applied: try again where a repeat does no harm


_BY_CLASS = {2: Outcome.ACCEPTED, 3: Outcome.FAILED, 4: Outcome.REFUSED, 5: Outcome.FAILED}
_BY_STATUS = {
    401: Outcome.UNAUTHORISED,
    403: Outcome.UNAUTHORISED,
    408: Outcome.FAILED,
    423: Outcome.FAILED,
    425: Outcome.FAILED,
    429: Outcome.THROTTLED,
    501: Outcome.REFUSED,
    502: Outcome.UNKNOWN,  # a gateway may have passed the request on before it failed
    504: Outcome.UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Result of one request.

    `error` quotes the API's message if there is one; `retry_after_seconds` is the pause that the API asks for, 0 to
    900. `document` is the JSON of an accepted answer's body, or None if the body is empty, cut off or not JSON.
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
    """Decide the outcome of an answer. `headers` have lower-case names; `cut` means that `body` is only its beginning.

    `secret` is removed from all texts: some servers repeat a request's headers in their errors.
    """
    outcome = _BY_STATUS.get(status_code) or _BY_CLASS.get(status_code // 100, Outcome.UNKNOWN)
    document = _json(body)
    error = None
    if outcome is Outcome.ACCEPTED and not _is_success(headers, body, document, cut=cut):
        outcome = Outcome.UNKNOWN
        error = f"HTTP {status_code}, but the body is not Userpilot's: {_message(body, document)}"
    elif outcome is not Outcome.ACCEPTED:
        error = _message(body, document).strip() or f"HTTP {status_code} without a message"
    quotes_secret = len(secret) >= MIN_SECRET_LENGTH and secret.encode() in body
    has_document = outcome is Outcome.ACCEPTED and document is not _NOT_JSON and not cut and not quotes_secret
    return Answer(
        outcome=outcome,
        status_code=status_code,
        x_request_id=one_line(headers.get("x-request-id", ""), MAX_REQUEST_ID_LENGTH, secret) or None,
        error=one_line(error, MAX_ERROR_LENGTH, secret) if error else None,
        retry_after_seconds=retry_after(headers.get("retry-after"), now=now),
        document=document if has_document else None,
    )


def _is_success(headers: Mapping[str, str], body: bytes, document: Any, *, cut: bool) -> bool:
    """Return whether the body of a 2xx is empty or JSON, unlike the page of a proxy or a login form."""
    text = body.strip()
    if not text:
        return True
    if "html" in headers.get("content-type", "").lower() or text.startswith(b"<"):
        return False
    return cut or document is not _NOT_JSON


_NOT_JSON = object()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _message(body: bytes, document: Any) -> str:
    """Text of an error: from `{"errors": [{"error_code", "error", "message", "details"}]}`, else the whole body."""
    if isinstance(document, dict):
        errors = document.get("errors")
        entries = [entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else []
        message = "; ".join(filter(None, map(_entry_message, entries or [document])))
        if message:
            return message
    return body.decode("utf-8", "replace")


def _entry_message(entry: dict[str, Any]) -> str:
    values = (entry.get(name) for name in ("error_code", "error", "message", "details"))
    return ": ".join(dict.fromkeys(value for value in values if isinstance(value, str) and value))


def one_line(text: str, max_length: int, secret: str) -> str:
    """Remove the secret and all unprintable characters, and shorten the text to one line."""
    without_secret = _spellings(secret).sub("[API key]", text)[:MAX_TEXT_LENGTH]
    printable = "".join(character if character.isprintable() else " " for character in without_secret)
    return " ".join(printable.split())[:max_length]


@lru_cache(maxsize=4)
def _spellings(secret: str) -> re.Pattern[str]:
    """Pattern of the secret as it is, and as JSON, URLs and HTML escape it."""
    return re.compile("".join(map(_character_pattern, secret)), re.IGNORECASE)


def _character_pattern(character: str) -> str:
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
    """Parse a Retry-After header into seconds from 0 to 900; None if it is missing or invalid.

    Userpilot documents no Retry-After, but a proxy may send one.
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
