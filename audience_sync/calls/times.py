"""Parse times as clients write them: all forms of ISO 8601, Unix times, and the formats of headers and languages."""

import datetime as dt
import email.utils
import re

EARLIEST_UNIX_TIME = 1e8  # 1973; a smaller number is probably not a time
# Numbers below these are in seconds, milliseconds, microseconds, nanoseconds.
_UNITS = (1e11, 1e14, 1e17, 1e20)
# Forms that `datetime.fromisoformat` reads as ISO 8601 means them: not a fraction of an hour, nor a zone after a date.
_USUAL = re.compile(
    r"\d{4}-?\d\d-?\d\d(?:[Tt ]\d\d(?::?\d\d(?::?\d\d(?:[.,]\d+)?)?)?(?:Z|[+-]\d\d(?::?\d\d(?::?\d\d)?)?)?)?",
    re.ASCII,
)
_ISO = re.compile(
    r"""(?:\+00?)?(?:(?P<year>\d{4})(?P<separator>[-/.])(?P<month>\d{1,2})(?P=separator)(?P<day>\d{1,2})
      | (?P<basic>\d{8})
      | (?P<ordinal>\d{4}-?\d{3})
      | (?P<week>\d{4}-?W\d\d(?:-?\d)?))
    (?:(?:[T_\s]\s*|-(?=\d\d:?\d\d:?\d\d))
      (?P<hour>\d{1,2})(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d))?)?(?P<fraction>[.,]\d*)?)?
    \s*(?P<zone>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?(?:\s*(?:Z|UTC|GMT|[+-]\d\d:?\d\d\ UTC))?
    (?(zone)(?:\[[A-Z0-9_/+-]+\] | \ [A-Z]{3,5})?(?:\ M=[+-][\d.]+)?)  # as Java and Go print a time""",
    re.VERBOSE | re.ASCII,
)
# Date and time without separators, to the minute, second or millisecond. Read as Unix time in milliseconds or
# microseconds, it would be in the year 1976, or after the year 2570.
_COMPACT = re.compile(r"((?:19|20)\d{6})(\d{4}|\d{6}|\d{9})", re.ASCII)
_LENGTHS = {name: dt.timedelta(**{f"{name}s": 1}) for name in ("hour", "minute", "second")}
# Dates in HTTP and e-mail headers, and as JavaScript and C print them.
_HEADER = re.compile(
    r"""(?:[a-z]{3,9},?\s+)?(?:
        \d{1,2}[ -][a-z]{3}[ -](?:\d\d|\d{4})\s+\d\d:\d\d:\d\d\s+(?:gmt|utc?|z|[ecmp][sd]t|[+-]\d{4})
      | [a-z]{3}\s+\d{1,2}\s+\d{4}\s+\d\d:\d\d:\d\d\s+gmt[+-]\d{4}
      | [a-z]{3}\s+\d{1,2}\s+\d\d:\d\d:\d\d\s+(?:(?:gmt|utc)\s+)?\d{4}
    )(?:\s*\(.*\))?""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def parse_time(value: object) -> dt.datetime:
    """Parse a time that has only one sensible meaning; return it aware, in UTC. Raises ValueError.

    Without an offset it is UTC. `:60` is the next minute, `24:00` the next day. Numbers are Unix times in seconds,
    milliseconds, microseconds or nanoseconds.
    """
    try:
        if isinstance(value, str):
            return _in_utc(_parse_text(value.strip()))
        if isinstance(value, int) and _COMPACT.fullmatch(str(value)):
            return parse_time(str(value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _parse_number(value)
    except OverflowError as error:
        raise ValueError("out of range") from error
    raise ValueError("not a time")


def parse_complete(text: str) -> dt.datetime | None:
    """Parse ordinary ISO 8601 with an offset, as `parse_time` does; return None if the text has another form."""
    usual = _read_usual(text)
    if usual is None or usual.tzinfo is None:
        return None
    try:
        return usual.astimezone(dt.UTC)
    except OverflowError:
        return None


def _read_usual(text: str) -> dt.datetime | None:
    try:
        return dt.datetime.fromisoformat(text) if _USUAL.fullmatch(text) else None
    except ValueError:  # such as 24:00
        return None


def _in_utc(time: dt.datetime) -> dt.datetime:
    return time.replace(tzinfo=time.tzinfo or dt.UTC).astimezone(dt.UTC)


def _parse_text(text: str) -> dt.datetime:
    if match := _COMPACT.fullmatch(text):
        date, time = match.groups()
        return dt.datetime.fromisoformat(f"{date}T{time[:6]}" + (f".{time[6:]}" if time[6:] else ""))
    if text.isascii() and re.fullmatch(r"-?\d{9,20}(\.\d+)?", text):
        return _parse_number(float(text) if "." in text else int(text))
    if (usual := _read_usual(text)) is not None:
        return usual
    if match := _ISO.fullmatch(text.upper()):
        return _from_parts(match.groupdict())
    if _HEADER.fullmatch(text):
        return email.utils.parsedate_to_datetime(re.sub(r"(?i)gmt(?=[+-])", "", text))
    raise ValueError("not a time")


def _from_parts(parts: dict[str, str | None]) -> dt.datetime:
    hour, minute, second = (int(parts[name] or 0) for name in ("hour", "minute", "second"))
    last = next((name for name in ("second", "minute") if parts[name]), "hour")  # what the fraction is of
    digits = (parts["fraction"] or "")[1:16]
    more: dt.timedelta = _LENGTHS[last] * int(digits or 0) / 10 ** len(digits)
    if (hour, minute, second, more) == (24, 0, 0, dt.timedelta()):
        hour, more = 0, dt.timedelta(days=1)
    elif second == 60:
        second, more = 59, more + dt.timedelta(seconds=1)
    return dt.datetime.combine(_date(parts), dt.time(hour, minute, second), _zone(parts["zone"])) + more


def _date(parts: dict[str, str | None]) -> dt.date:
    if ordinal := parts["ordinal"]:
        year, number = int(ordinal[:4]), int(ordinal[-3:])
        date = dt.date(year, 1, 1) + dt.timedelta(days=number - 1)
        if date.year != year:
            raise ValueError("no such day")
        return date
    whole = parts["week"] or parts["basic"]
    if whole is not None:
        return dt.date.fromisoformat(whole)
    return dt.date(*(int(parts[name] or 0) for name in ("year", "month", "day")))


def _zone(text: str | None) -> dt.tzinfo:
    if text is None or text in {"Z", "UTC", "GMT"}:
        return dt.UTC
    digits = text[1:].replace(":", "").ljust(4, "0")
    offset = dt.timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return dt.timezone(-offset if text[0] == "-" else offset)


def _parse_number(number: float) -> dt.datetime:
    for power, limit in enumerate(_UNITS):
        if EARLIEST_UNIX_TIME <= abs(number) < limit:
            epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
            microseconds = number * 10**6 // 1000**power
            return epoch + dt.timedelta(microseconds=microseconds)
    raise ValueError("not a Unix time")
