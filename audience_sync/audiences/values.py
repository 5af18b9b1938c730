"""Canonical text of user ids and trait values: the same on our own database and on a source, on SQLite and PostgreSQL.

The database that computes a definition produces the text in SQL, so that no driver reads the raw values. A value's
canonical text is JSON, and equal texts mean equal values: a whole number that fits into 64 bits is written as an integer,
any other number with 15 significant digits. '!' stands for a value that is not a primitive, '!REASON' for one that cannot
be converted to the trait's type; both sort before all others. An id that cannot be sent becomes `unusable(reason)`.

This module has SQLite's expressions, the rules in Python, which SQLite calls in rare cases, and the rules for rows from
other drivers. postgresql_values.py has PostgreSQL's expressions.
"""

import datetime as dt
import json
import math
import re
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import sqlalchemy as sa

from audience_sync.retention.erasure import user_hash

MAX_ID_LENGTH = 255
NOT_PRIMITIVE = "!"
NOT_BOOLEAN, NOT_NUMBER = "!not_a_boolean", "!not_a_number"
UNUSABLE_VALUES = {mark: mark[1:] or "not_primitive" for mark in (NOT_PRIMITIVE, NOT_BOOLEAN, NOT_NUMBER)}
REASONS = ("null", "binary", "not_text_or_number", "nul_character", "not_unicode")
TRUE_WORDS = ("true", "t", "yes", "y", "on", "1")  # the words that PostgreSQL accepts as booleans
FALSE_WORDS = ("false", "f", "no", "n", "off", "0")
NUMBER = "[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]{1,3})?"
MAX_NUMBER_LENGTH = 300  # of a number in a string
LIMIT = 2**63
# White space and zero-width characters.
BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u2060\ufeff"
_ZEROS_AT_END = re.compile(
    r"(?<=\.\d\d\d\d\d)0|(?<=\.\d\d\d\d)00|(?<=\.\d\d\d)000|(?<=\.\d\d)0000|(?<=\.\d)00000"
)
Row = tuple[str | None, ...]  # the canonical text of an id and, for a trait, of a value


def unusable(reason: str) -> str:
    """Return the text that replaces an id that cannot be sent. It is longer than any id, and starts with a space."""
    return f"{reason:>{MAX_ID_LENGTH + 45}}"


def canonical_number(raw: float | Decimal) -> str:
    if isinstance(raw, float) and 1e-4 <= abs(raw) < 1e14:  # the common case, for speed
        return f"{raw:.15g}"
    if not math.isfinite(raw):
        return NOT_PRIMITIVE
    if -LIMIT <= raw < LIMIT and raw == int(raw):
        return str(int(raw))
    try:
        real = float(raw)
    except OverflowError:
        return NOT_PRIMITIVE
    if not math.isfinite(real):
        return NOT_PRIMITIVE
    text = f"{real:.15g}"
    return "0" if text == "-0" else text


def canonical_string(raw: str | bytes, encoding: str = "utf-8") -> str:
    try:
        text = raw.decode(encoding) if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:
        return NOT_PRIMITIVE
    return NOT_PRIMITIVE if "\0" in text else json.dumps(text, ensure_ascii=False)


def invalid_reason(raw: str | bytes, encoding: str = "utf-8") -> str | None:
    """Return why a text cannot be a user id, or None."""
    try:
        text = raw.decode(encoding) if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:
        return "not_unicode"
    if "\0" in text:
        return "nul_character"
    if not text.strip(BLANK):
        return "empty"
    return "too_long" if len(text) > MAX_ID_LENGTH else None


def as_boolean(canonical: str) -> str:
    word = canonical.strip('" ').lower()
    return "true" if word in TRUE_WORDS else "false" if word in FALSE_WORDS else NOT_BOOLEAN


def as_number(canonical: str) -> str:
    if canonical in {"true", "false"}:
        return str(int(canonical == "true"))
    text = canonical.strip('" ')
    if len(text) > MAX_NUMBER_LENGTH or not re.fullmatch(NUMBER, text):
        return NOT_NUMBER
    number = canonical_number(Decimal(text))
    return NOT_NUMBER if number == NOT_PRIMITIVE else number


def register_functions(connection: sa.Connection) -> None:
    """Register the functions that the SQLite expressions call for some values.

    SQLite's printf is wrong in the fifteenth digit, and its text may contain any bytes.
    """
    encoding = sqlite_encoding(connection)
    functions: dict[str, Callable[[Any], Any]] = {
        "canonical_number": canonical_number,
        "canonical_string": partial(canonical_string, encoding=encoding),
        "invalid_reason": partial(invalid_reason, encoding=encoding),
        "as_boolean": as_boolean,
        "as_number": as_number,
        "user_hash": user_hash,
    }
    raw: Any = connection.connection.dbapi_connection
    for name, function in functions.items():
        raw.create_function(f"audience_sync_{name}", 1, _never_failing(function), deterministic=True)


def sqlite_encoding(connection: sa.Connection) -> str:
    """Return the encoding of a SQLite file's text, which a cast to a blob keeps: UTF-8, or a form of UTF-16."""
    return str(connection.exec_driver_sql("PRAGMA encoding").scalar_one())


def _never_failing(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a function return null instead of raising: SQLite would hide the error, which would look like a signal."""

    def call(raw: Any) -> Any:
        try:
            return function(raw)
        except Exception:  # noqa: BLE001  (a definition may call it with anything)
            return None

    return call


# ASCII without NUL; other text may not even be UTF-8.
_PLAIN = "(instr({0}, char(0)) = 0 AND {0} NOT GLOB '*[^' || char(1) || '-' || char(127) || ']*')"
_SQLITE_REAL = (
    f"CASE WHEN {{0}} >= -{LIMIT}.0 AND {{0}} < {LIMIT}.0 AND {{0}} = CAST({{0}} AS INTEGER) "
    "THEN CAST(CAST({0} AS INTEGER) AS TEXT) ELSE audience_sync_canonical_number({0}) END"
)
# Text is not converted, and its bytes need not be valid text. The diff checks only ids that enter.
SQLITE_ID = f"""
CASE typeof(user_id)
  WHEN 'text' THEN user_id
  WHEN 'integer' THEN CAST(user_id AS TEXT)
  WHEN 'real' THEN CASE WHEN user_id IN (9e999, -9e999) THEN '{unusable("null")}' ELSE {_SQLITE_REAL.format("user_id")} END
  WHEN 'blob' THEN '{unusable("binary")}'
  ELSE '{unusable("null")}' END"""
SQLITE_VALUE = f"""
CASE typeof(value)
  WHEN 'integer' THEN CAST(value AS TEXT)
  WHEN 'real' THEN {_SQLITE_REAL.format("value")}
  WHEN 'text' THEN CASE WHEN {_PLAIN.format("value")} THEN json_quote(value)
                        ELSE audience_sync_canonical_string(CAST(value AS BLOB)) END
  WHEN 'blob' THEN '!' END"""
SQLITE_HASH = "audience_sync_user_hash(user_id)"

# A cheap condition that selects ids for a closer check, and the reason why such an id cannot be sent, or null.
SQLITE_NEEDS_CHECK = f"(user_id < '!' OR length(user_id) > {MAX_ID_LENGTH} OR NOT {_PLAIN.format('user_id')})"
UNUSABLE_REASONS = " ".join(f"WHEN user_id = '{unusable(reason)}' THEN '{reason}'" for reason in REASONS)
SQLITE_INVALID_REASON = (
    f"CASE {UNUSABLE_REASONS} ELSE audience_sync_invalid_reason(CAST(user_id AS BLOB)) END"
)

# The canonical text of `value`, converted to a trait's type.
SQLITE_CONVERSIONS = {
    "json": (  # JSON text in a string; an escape of NUL is not a value, unless its backslash is escaped
        r"""CASE WHEN value NOT GLOB '"*' THEN value """
        r"""WHEN instr(replace(json_extract(value, '$'), '\\', ''), '\u0000') THEN '!' ELSE json_extract(value, '$') END"""
    ),
    "boolean": (
        "CASE WHEN value IS NULL OR value GLOB '!*' THEN value WHEN value IN ('true', '1') THEN 'true' "
        "WHEN value IN ('false', '0') THEN 'false' ELSE audience_sync_as_boolean(value) END"
    ),
    "number": "CASE WHEN value IS NULL OR value GLOB '[-0-9!]*' THEN value ELSE audience_sync_as_number(value) END",
    "string": """CASE WHEN value GLOB '["!]*' THEN value ELSE '"' || value || '"' END""",
}


def sqlite_select(wanted: Sequence[str], query: str, names: Sequence[str], *, streamed: bool) -> str:
    """Return the SELECT of a query's canonical ids and values (`wanted`); `names` are names for all its columns.

    `streamed`: return the ids as blobs, because text that is not UTF-8 cannot be fetched.
    """
    expressions = {"user_id": f"CAST({SQLITE_ID} AS BLOB)" if streamed else SQLITE_ID, "value": SQLITE_VALUE}
    selected = ", ".join(f"{expressions[name]} AS {name}" for name in wanted)
    return f"WITH audience_sync_result ({', '.join(names)}) AS ({query}) SELECT {selected} FROM audience_sync_result"


def decode_ids(batch: Sequence[Sequence[Any]], encoding: str) -> list[Row]:
    """Return SQLite's rows with their ids, which were fetched as bytes, as text."""
    ids, *others = zip(*batch, strict=True)
    try:  # all at once takes a third of the time
        texts = "\0".encode(encoding).join(ids).decode(encoding).split("\0")
    except UnicodeDecodeError:
        texts = []
    if len(texts) != len(ids):
        texts = [_decoded(user_id, encoding) for user_id in ids]
    return list(zip(texts, *others, strict=True))


def plain_rows(batch: Sequence[Any]) -> Sequence[Row]:
    """Return PostgreSQL's rows, which are canonical already, as tuples."""
    return batch if isinstance(batch[0], tuple) else [tuple(row) for row in batch]


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return unusable("not_unicode")
    return unusable("nul_character") if "\0" in text else text


def canonical_rows(batch: Sequence[Sequence[Any]], positions: Sequence[int]) -> list[Row]:
    """Return (user id,) or (user id, JSON text) for each row of another driver.

    `positions`: the positions of the id and, for a trait, of the value in a row.
    """
    id_position, *value_positions = positions
    return [
        (_canonical_id(row[id_position]), *[canonical_value(row[position]) for position in value_positions])
        for row in batch
    ]


def _canonical_id(raw: Any) -> str:
    match raw:
        case None:
            return unusable("null")
        case bytes() | bytearray() | memoryview():
            return unusable("binary")
        case str() | uuid.UUID():
            text = str(raw)
            reason = invalid_reason(text)
            return unusable(reason) if reason in REASONS else text
        case bool():
            return unusable("not_text_or_number")
        case int():
            return str(raw)
        case Decimal() if raw.is_finite() and raw == raw.to_integral_value():
            return f"{raw:.0f}"
        case float() | Decimal():
            text = canonical_number(raw)
            return unusable("null") if text == NOT_PRIMITIVE else text
        case dt.date() | dt.time():
            return str(canonical_value(raw)).strip('"')
    return unusable("not_text_or_number")


def canonical_value(raw: Any) -> str | None:
    """Return a trait's value as JSON text; None for null, '!' for a value that is not a primitive."""
    match raw:
        case None:
            return None
        case bool():
            return "true" if raw else "false"
        case int() | float() | Decimal():
            return canonical_number(raw)
        case str() | uuid.UUID():
            return canonical_string(str(raw))
        case dt.date() | dt.time():  # as PostgreSQL writes them, without zeros at the end of a fraction
            return f'"{_ZEROS_AT_END.sub("", raw.isoformat())}"'
    return NOT_PRIMITIVE
