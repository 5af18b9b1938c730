"""Rows of a source as the snapshot takes them: the rules that the SQL in store/snapshots.py keeps, in Python."""

import datetime as dt
import decimal
import json
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

MAX_ID_LENGTH = 255
NOT_PRIMITIVE = "!"


def rows(
    batch: Sequence[Sequence[Any]], places: Sequence[int], counts: Counter[str]
) -> Iterator[tuple[str, str | None]]:
    """(user id, JSON text of the value) of each row that can be sent; the others are counted by reason."""
    id_place, value_place = places[0], places[1] if len(places) > 1 else None
    for row in batch:
        user_id = row[id_place]
        if type(user_id) is not str:
            user_id, reason = _id(user_id)
            if reason:
                counts[reason] += 1
                continue
        if not 0 < len(user_id) <= MAX_ID_LENGTH or not user_id.isprintable() or user_id.isspace():
            if reason := _unfit(user_id):
                counts[reason] += 1
                continue
        yield user_id, None if value_place is None else value(row[value_place])


def _id(raw: Any) -> tuple[str, str | None]:
    match raw:
        case None:
            return "", "null"
        case bool() | bytes() | bytearray() | memoryview():
            return "", "binary"
        case int() | uuid.UUID():
            return str(raw), None
        case float() | decimal.Decimal():
            return number(raw) if math.isfinite(raw) else str(raw), None
    return str(raw), None


def _unfit(user_id: str) -> str | None:
    if not user_id.strip(" \t\r\n"):
        return "empty"
    if "\0" in user_id:
        return "nul_character"
    if len(user_id) > MAX_ID_LENGTH:
        return "too_long"
    if any("\ud800" <= character <= "\udfff" for character in user_id):
        return "not_unicode"
    return None


def number(raw: float | decimal.Decimal) -> str:
    """Whole decimals exactly, others at 15 significant digits, as both databases print them."""
    if isinstance(raw, decimal.Decimal) and raw == raw.to_integral_value():
        return f"{raw.to_integral_value():f}"
    text = f"{float(raw):.15g}"
    return "0" if text == "-0" else text


def value(raw: Any) -> str | None:
    """A trait's value as JSON text; None for null, '!' for what is not a primitive."""
    match raw:
        case None:
            return None
        case bool():
            return "true" if raw else "false"
        case int():
            return str(raw)
        case float() | decimal.Decimal():
            return number(raw) if math.isfinite(raw) else NOT_PRIMITIVE
        case str() | uuid.UUID():
            text = str(raw)
            return (
                NOT_PRIMITIVE if "\0" in text or not _encodes(text) else json.dumps(text, ensure_ascii=False)
            )
        case dt.date() | dt.time():
            return json.dumps(raw.isoformat())
    return NOT_PRIMITIVE


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
