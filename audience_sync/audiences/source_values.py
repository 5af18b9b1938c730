"""Rows of a source as the snapshot takes them: the rules of store/forms.py for what drivers give."""

import datetime as dt
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from audience_sync.audiences import values

_ZEROS = re.compile(r"(?<=\.\d\d\d\d\d)0|(?<=\.\d\d\d\d)00|(?<=\.\d\d\d)000|(?<=\.\d\d)0000|(?<=\.\d)00000")
Row = tuple[str] | tuple[str, str]


def rows(batch: Sequence[Sequence[Any]], places: Sequence[int], counts: Counter[str]) -> list[Row]:
    """(user id,) or (user id, JSON text of the value) of each row that has one; unfit ids are counted by reason."""
    id_place, value_place = places[0], places[-1]
    is_trait = len(places) > 1
    taken: list[Row] = []
    for row in batch:
        user_id = row[id_place]
        if type(user_id) is int:
            user_id = str(user_id)
        elif (
            type(user_id) is not str
            or not 0 < len(user_id) <= values.MAX_ID_LENGTH
            or not user_id.isprintable()
            or user_id.isspace()
        ):
            user_id, reason = _id(user_id)
            if reason:
                counts[reason] += 1
                continue
        if not is_trait:
            taken.append((user_id,))
        elif (text := value(row[value_place])) is not None:
            taken.append((user_id, text))
    return taken


def _id(raw: Any) -> tuple[str, str | None]:
    match raw:
        case None:
            return "", "null"
        case bool() | bytes() | bytearray() | memoryview():
            return "", "binary"
        case Decimal() if raw.is_finite() and raw == raw.to_integral_value():
            text = str(int(raw))
        case float() | Decimal():
            text = values.number(raw)
            if text == values.NOT_PRIMITIVE:
                return "", "null"
        case _:
            text = str(raw)
    return text, values.invalid_reason(text)


def value(raw: Any) -> str | None:
    """A trait's value as JSON text; None for null, '!' for what is not a primitive."""
    match raw:
        case None:
            return None
        case bool():
            return "true" if raw else "false"
        case int() | float() | Decimal():
            return values.number(raw)
        case str() | uuid.UUID():
            return values.string(str(raw))
        case dt.date() | dt.time():  # as PostgreSQL writes them: no zeros at the end of a fraction
            return f'"{_ZEROS.sub("", raw.isoformat())}"'
    return values.NOT_PRIMITIVE
