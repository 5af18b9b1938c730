"""Pure decisions: what an HTTP answer means for the deliveries of its request.

Only Userpilot's own answer says anything about a delivery, but a gateway, proxy or login page may answer in its place.
An answer is not Userpilot's own if one of these is true:

- its body is a page: it is declared as HTML or XML, starts with `<`, or is text with an HTML tag
  (the empty body of a 2xx is not a page, whatever its type);
- its status is 3xx, 407, 421, 426, 499, 511 or 520 to 530, which proxies send;
- it is a refusal (4xx) in plain text, without the `x-request-id` that Userpilot's answers carry.

A 2xx from Userpilot is accepted, whether its body is empty, JSON or other text, in any encoding. If the end of the JSON is
missing, the outcome is unknown. Bodies that are compressed with gzip or deflate are decompressed; bodies in any other
encoding count as empty.
"""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

MAX_ERROR_LENGTH = 500
MAX_TEXT_LENGTH = 65_536  # the part of a body that is searched for a message
MAX_REQUEST_ID_LENGTH = 200
MAX_RETRY_AFTER_SECONDS = 900.0
MAX_DECODED_BYTES = 1024 * 1024
MAX_PAGE_LENGTH = 4096  # the part of a page from which an error is made
MIN_SECRET_LENGTH = 12  # a shorter one is not a real key, and might occur in a job id by chance


class Outcome(StrEnum):
    ACCEPTED = "accepted"  # 2xx: not necessarily stored
    THROTTLED = "throttled"
    UNAUTHORISED = "unauthorised"
    REFUSED = "refused"  # the same request would be refused again
    DOUBTFUL = "doubtful"  # refused like many before it, so the reason may lie elsewhere: only the queue decides this
    FAILED = "failed"  # not applied: try again
    UNKNOWN = "unknown"  # perhaps applied: try again where a repeat does no harm


_BY_CLASS = {2: Outcome.ACCEPTED, 3: Outcome.FAILED, 4: Outcome.REFUSED, 5: Outcome.FAILED}
_BY_STATUS = {
    401: Outcome.UNAUTHORISED,
    403: Outcome.UNAUTHORISED,
    407: Outcome.FAILED,
    408: Outcome.FAILED,
    421: Outcome.FAILED,
    423: Outcome.FAILED,
    425: Outcome.FAILED,
    426: Outcome.FAILED,
    429: Outcome.THROTTLED,
    499: Outcome.UNKNOWN,  # a proxy gave up waiting
    501: Outcome.REFUSED,
    502: Outcome.UNKNOWN,  # a gateway may have passed the request on before it failed
    504: Outcome.UNKNOWN,
}
_OF_PROXIES = {407, 421, 426, 499, 511, *range(300, 400)}
_OF_CLOUDFLARE = range(520, 531)
_PAGE_TAG = re.compile(r"<(!doctype|html|head|body|title)\b", re.IGNORECASE)
_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """Result of one request.

    `error` quotes the API's message if there is one; `retry_after_seconds` is the pause that the API asks for, 0 to
    900. `document` is the JSON body of an accepted answer, or None if the body is empty, cut off or not JSON.
    `is_evidence` is false if the answer proves nothing about the deliveries, for example because a gateway sent it.
    """

    outcome: Outcome
    status_code: int | None
    x_request_id: str | None
    error: str | None
    retry_after_seconds: float | None
    document: Any = field(default=None, compare=False)
    is_evidence: bool = field(default=True, compare=False)


def judge(
    status_code: int, headers: Mapping[str, str], body: bytes, *, cut: bool, secret: str, now: datetime
) -> Answer:
    """Decide the outcome of an answer. `headers` have lower-case names; `cut` means that `body` is only its beginning.

    `secret` is removed from all texts: some servers repeat a request's headers in their errors.
    """
    content = _read(headers.get("content-encoding", ""), body, cut=cut)
    outcome = _BY_STATUS.get(status_code) or _BY_CLASS.get(status_code // 100, Outcome.UNKNOWN)
    is_of_proxy, error = status_code in _OF_PROXIES, None
    is_page = not is_of_proxy and _is_page(headers.get("content-type", ""), content, outcome)
    is_foreign = is_page or (outcome is Outcome.REFUSED and _is_unsigned(headers, content))
    if is_page:
        text = " ".join(_TAGS.sub(" ", content.text[:MAX_PAGE_LENGTH]).split())
        error = f"HTTP {status_code}, but the body is not Userpilot's: {text or 'a page'}"
    elif outcome is Outcome.ACCEPTED and content.breaks_off:
        error = f"HTTP {status_code}, but the JSON of the body breaks off: {content.text}"
    elif outcome is not Outcome.ACCEPTED:
        error = _message(content).strip() or f"HTTP {status_code} without a message"
        if status_code // 100 == 3 and (location := headers.get("location")):
            error = f"HTTP {status_code} redirects to {location}: is [destination] endpoint right?"
    if (is_foreign and outcome is not Outcome.THROTTLED) or (error and outcome is Outcome.ACCEPTED):
        outcome = Outcome.UNKNOWN
    has_document = outcome is Outcome.ACCEPTED and content.is_json
    quotes_secret = len(secret) >= MIN_SECRET_LENGTH and secret in content.text
    return Answer(
        outcome=outcome,
        status_code=status_code,
        x_request_id=one_line(headers.get("x-request-id", ""), MAX_REQUEST_ID_LENGTH, secret) or None,
        error=one_line(error, MAX_ERROR_LENGTH, secret) if error else None,
        retry_after_seconds=retry_after(headers.get("retry-after"), now=now),
        document=content.document if has_document and not quotes_secret else None,
        is_evidence=not (is_foreign or is_of_proxy or status_code in _OF_CLOUDFLARE),
    )


def _is_page(content_type: str, content: "_Content", outcome: Outcome) -> bool:
    if not content.text and outcome is Outcome.ACCEPTED:
        return False
    declared = content_type.lower()
    if "html" in declared or "xml" in declared or content.text.startswith("<"):
        return True
    return not content.looks_like_json and bool(_PAGE_TAG.search(content.text[:MAX_PAGE_LENGTH]))


def _is_unsigned(headers: Mapping[str, str], content: "_Content") -> bool:
    """Return whether an answer is plain text without Userpilot's request id."""
    is_text = bool(content.text) and not content.is_json and not content.looks_like_json
    return is_text and not headers.get("x-request-id")


_NOT_JSON, _JSON_WITHOUT_END = object(), object()


@dataclass(frozen=True, slots=True)
class _Content:
    """The text of a body, and its JSON; `is_whole` is false if the text is only its beginning."""

    text: str
    document: Any
    is_whole: bool

    @property
    def is_json(self) -> bool:
        return self.document is not _NOT_JSON and not self.breaks_off

    @property
    def looks_like_json(self) -> bool:
        return self.text.startswith(("{", "["))

    @property
    def breaks_off(self) -> bool:
        return self.document is _JSON_WITHOUT_END


def _read(encoding: str, body: bytes, *, cut: bool) -> _Content:
    decoded, is_whole = _decode(encoding.strip().lower(), body)
    is_whole = is_whole and not cut
    charset = "utf-16" if decoded.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = decoded.decode(charset, "replace").lstrip("\ufeff").strip()
    return _Content(text, _json(decoded, text) if is_whole else _NOT_JSON, is_whole)


def _decode(encoding: str, body: bytes) -> tuple[bytes, bool]:
    """Return the decompressed body, up to 1 MB, and whether that is all of it."""
    if body.startswith(b"\x1f\x8b") or encoding in {"gzip", "x-gzip", "deflate"}:
        for window_bits in (47, -15):  # gzip or zlib, as the header says; deflate without a header
            decompressor = zlib.decompressobj(window_bits)
            try:
                return decompressor.decompress(body, MAX_DECODED_BYTES), decompressor.eof
            except zlib.error:
                pass
    elif encoding in {"", "identity"}:
        return body, True
    is_text = body.lstrip()[:1] in {b"<", b"{", b"["}  # servers may declare an encoding that they do not use
    return (body, True) if is_text else (b"", True)


def _json(body: bytes, text: str) -> Any:
    """Parse JSON. Text that only resembles JSON, such as `{ok}`, is not JSON, but it is complete."""
    has_end = text.endswith(("}", "]"))
    try:
        return json.loads(body, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        has_end &= error.pos < len(error.doc.rstrip()) and not error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        pass
    return _NOT_JSON if has_end or not text.startswith(("{", "[")) else _JSON_WITHOUT_END


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _message(content: _Content) -> str:
    """Return the error in `{"errors": [{"error_code", "error", "message", "details"}]}`, else the whole body."""
    document = content.document
    if isinstance(document, dict):
        errors = document.get("errors")
        entries = [entry for entry in errors if isinstance(entry, dict)] if isinstance(errors, list) else []
        message = "; ".join(filter(None, map(_entry_message, entries or [document])))
        if message:
            return message
    return content.text


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
    """Return a pattern of the secret, also as escaped in JSON, URLs and HTML."""
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
