"""Canonical text of user ids and trait values: the same from SQLite, PostgreSQL, and rows of a source in Python.

A value's canonical text is JSON, and equal texts are equal values: a whole number that fits 64 bits is written as an
integer, any other number with 15 significant digits. '!' stands for a value that is not a primitive, and sorts before
all others. The SQL expressions come first, with the Python functions that SQLite calls in rare cases; then the same
rules for rows that a source's driver returns.
"""

import datetime as dt
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from audience_sync.retention.erasure import user_hash

MAX_ID_LENGTH = 255
NOT_PRIMITIVE = "!"
_LIMIT = 2**63
_ZEROS_AT_END = re.compile(
    r"(?<=\.\d\d\d\d\d)0|(?<=\.\d\d\d\d)00|(?<=\.\d\d\d)000|(?<=\.\d\d)0000|(?<=\.\d)00000"
)
Row = tuple[str] | tuple[str, str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a definition's result; its type as in PostgreSQL's pg_type, empty on SQLite."""

    name: str
    type_name: str = ""
    category: str = ""


def canonical_number(raw: float | Decimal) -> str:
    if isinstance(raw, float) and 1e-4 <= abs(raw) < 1e14:  # the common case, for speed
        return f"{raw:.15g}"
    if not math.isfinite(raw):
        return NOT_PRIMITIVE
    if -_LIMIT <= raw < _LIMIT and raw == int(raw):
        return str(int(raw))
    real = float(raw)
    if not math.isfinite(real):
        return NOT_PRIMITIVE
    text = f"{real:.15g}"
    return "0" if text == "-0" else text


def canonical_string(raw: str | bytes) -> str:
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:
        return NOT_PRIMITIVE
    return NOT_PRIMITIVE if "\0" in text else json.dumps(text, ensure_ascii=False)


def invalid_reason(raw: str | bytes) -> str | None:
    """Return why a text cannot be a user id, or None."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:
        return "not_unicode"
    if "\0" in text:
        return "nul_character"
    if not text.strip(" \t\r\n"):
        return "empty"
    return "too_long" if len(text) > MAX_ID_LENGTH else None


def register_functions(connection: sa.Connection) -> None:
    """Register the functions that the SQLite expressions call for a few values.

    SQLite's own printf is wrong in the fifteenth digit, and its text may contain any bytes.
    """
    raw: Any = connection.connection.dbapi_connection
    for function in (canonical_number, canonical_string, invalid_reason, user_hash):
        raw.create_function(f"audience_sync_{function.__name__}", 1, function, deterministic=True)


# ASCII without NUL; other text may not even be UTF-8.
_PLAIN = "(instr({0}, char(0)) = 0 AND {0} NOT GLOB '*[^' || char(1) || '-' || char(127) || ']*')"
_SQLITE_REAL = (
    f"CASE WHEN {{0}} >= -{_LIMIT}.0 AND {{0}} < {_LIMIT}.0 AND {{0}} = CAST({{0}} AS INTEGER) "
    "THEN CAST(CAST({0} AS INTEGER) AS TEXT) ELSE audience_sync_canonical_number({0}) END"
)
# A primary key cannot hold null, so blobs stand for ids that are not text: x'' for null, x'00' for binary.
SQLITE_ID = f"""
CASE typeof(user_id)
  WHEN 'text' THEN user_id
  WHEN 'integer' THEN CAST(user_id AS TEXT)
  WHEN 'real' THEN CASE WHEN user_id IN (9e999, -9e999) THEN x'' ELSE {_SQLITE_REAL.format("user_id")} END
  WHEN 'blob' THEN x'00'
  ELSE x'' END"""
SQLITE_VALUE = f"""
CASE typeof(value)
  WHEN 'integer' THEN CAST(value AS TEXT)
  WHEN 'real' THEN {_SQLITE_REAL.format("value")}
  WHEN 'text' THEN CASE WHEN {_PLAIN.format("value")} THEN json_quote(value)
                        ELSE audience_sync_canonical_string(CAST(value AS BLOB)) END
  WHEN 'blob' THEN '!' END"""

SQLITE_HASH = "audience_sync_user_hash(user_id)"
POSTGRESQL_HASH = "encode(sha256(convert_to(user_id, 'UTF8')), 'hex')"

# A cheap condition for ids that need a closer check, and the reason why such an id cannot be sent, or null.
SQLITE_NEEDS_CHECK = f"(user_id >= x'' OR user_id < '!' OR length(user_id) > {MAX_ID_LENGTH} OR NOT {_PLAIN.format('user_id')})"  # noqa: E501
SQLITE_INVALID_REASON = """
CASE WHEN user_id = x'' THEN 'null' WHEN user_id = x'00' THEN 'binary'
     ELSE audience_sync_invalid_reason(CAST(user_id AS BLOB)) END"""
POSTGRESQL_NEEDS_CHECK = f"(user_id IS NULL OR user_id < '!' OR octet_length(user_id) > {MAX_ID_LENGTH})"
POSTGRESQL_INVALID_REASON = f"""
CASE WHEN user_id IS NULL THEN 'null'
     WHEN btrim(user_id, E' \\t\\n\\r') = '' THEN 'empty'
     WHEN length(user_id) > {MAX_ID_LENGTH} THEN 'too_long' END"""


def postgresql_id(column: Column) -> str:
    """Return the expression for an id's canonical text, which depends on the type of the column."""
    match column.category, column.type_name:
        case "N", "numeric":
            text = (
                "CASE WHEN user_id IN ('NaN', 'Infinity', '-Infinity') THEN NULL WHEN user_id = trunc(user_id) "
                f"THEN CAST(trunc(user_id) AS text) ELSE {_postgresql_number('user_id')} END"
            )
        case "N", "float4" | "float8":
            text = f"nullif({_postgresql_number(_float('user_id', column))}, '{NOT_PRIMITIVE}')"
        case _:
            text = "CAST(user_id AS text)"
    return f'({text}) COLLATE "C"'


def postgresql_value(column: Column) -> str:
    """Return the expression for a value's canonical text."""
    match column.category, column.type_name:
        case ("B", _) | ("N", "int2" | "int4" | "int8"):
            text = "CAST(value AS text)"
        case "N", "numeric" | "float4" | "float8":
            text = _postgresql_number(_float("value", column))
        case "U", "json" | "jsonb":
            as_number = _postgresql_number("CAST(CAST(value AS jsonb) AS numeric)")
            text = (
                "CASE jsonb_typeof(CAST(value AS jsonb)) WHEN 'object' THEN '!' WHEN 'array' THEN '!' "
                f"WHEN 'null' THEN NULL WHEN 'number' THEN {as_number} ELSE CAST(CAST(value AS jsonb) AS text) END"
            )
        case ("S" | "E" | "X", _) | ("U", "uuid"):
            text = "CAST(to_json(CAST(value AS text)) AS text)"
        case "D", _:
            text = "CAST(to_json(value) AS text)"
        case _:
            text = "CASE WHEN value IS NOT NULL THEN '!' END"
    return f'({text}) COLLATE "C"'


def _float(name: str, column: Column) -> str:
    # Cast to text first: 0.1 of four bytes is 0.1, not 0.100000001490116.
    return f"CAST(CAST({name} AS text) AS float8)" if column.type_name == "float4" else name


def _postgresql_number(value: str) -> str:
    # NaN is greater than every number. A cast to float8 refuses what a float8 cannot hold.
    return (
        f"CASE WHEN {value} >= -{_LIMIT} AND {value} < {_LIMIT} AND {value} = trunc({value}) "
        f"THEN CAST(CAST({value} AS bigint) AS text) "
        f"WHEN {value} IS NOT NULL AND abs({value}) > 1.7976931348623157e308 THEN '!' "
        f"WHEN abs({value}) < 2.5e-324 THEN '0' ELSE CAST(CAST({value} AS float8) AS text) END"
    )


def extra_float_digits(columns: Sequence[Column]) -> int:
    """Return PostgreSQL's extra_float_digits: 0 is 15 digits; 1 is the shortest text that identifies a float4."""
    return int(any(column.type_name == "float4" for column in columns))


def can_be_id(column: Column) -> bool:
    """Return whether a column of this PostgreSQL type can hold user ids."""
    return column.category in {"", "S", "N", "E", "X"} or column.type_name in {"uuid", "citext"}


def canonical_rows(
    batch: Sequence[Sequence[Any]], positions: Sequence[int], set_aside: Counter[str]
) -> list[Row]:
    """Return (user id,) or (user id, JSON text) of each row; count the rows with an invalid id by reason.

    `positions`: where a row has its id and, for a trait, its value. Rows without a value are left out.
    """
    id_position, value_position = positions[0], positions[-1]
    is_trait = len(positions) > 1
    rows: list[Row] = []
    for row in batch:
        user_id = row[id_position]
        if type(user_id) is int:
            user_id = str(user_id)
        elif (
            type(user_id) is not str
            or not 0 < len(user_id) <= MAX_ID_LENGTH
            or not user_id.isprintable()
            or user_id.isspace()
        ):
            user_id, reason = _canonical_id(user_id)
            if reason:
                set_aside[reason] += 1
                continue
        if not is_trait:
            rows.append((user_id,))
        elif (text := canonical_value(row[value_position])) is not None:
            rows.append((user_id, text))
    return rows


def _canonical_id(raw: Any) -> tuple[str, str | None]:
    """Return an id's text, and why it is invalid, or None."""
    match raw:
        case None:
            return "", "null"
        case bool() | bytes() | bytearray() | memoryview():
            return "", "binary"
        case Decimal() if raw.is_finite() and raw == raw.to_integral_value():
            text = str(int(raw))
        case float() | Decimal():
            text = canonical_number(raw)
            if text == NOT_PRIMITIVE:
                return "", "null"
        case _:
            text = str(raw)
    return text, invalid_reason(text)


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
