"""The dates in a query: ISO 8601 in exactly these forms."""

import datetime as dt
import re

# A day, or a day and a time; seconds, fraction and zone are optional. The dialects have the same pattern.
MOMENT_PATTERN = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(Z|[+-][0-9]{2}:[0-9]{2})?)?"
)


def moved(moment: dt.datetime, length: dt.timedelta) -> dt.datetime:
    """Return a moment moved by a length; outside the years 1 to 9999, the first day of the first or last year."""
    try:
        return moment + length
    except OverflowError:
        year = dt.MINYEAR if length < dt.timedelta(0) else dt.MAXYEAR
        return dt.datetime(year, 1, 1, tzinfo=moment.tzinfo)


def moment_text(moment: dt.datetime) -> str:
    """Return a moment in UTC as databases write it, with a four-digit year."""
    return moment.replace(tzinfo=None).isoformat(" ", "microseconds")


def parse_moment(text: str) -> dt.datetime | None:
    """Return the moment in a text, or None if it is not a date. Without a zone it is in UTC; without a time, midnight.

    Fractions beyond microseconds are cut off. A day or time that does not exist is not a date.
    """
    if not re.fullmatch(MOMENT_PATTERN, text):
        return None
    whole = re.sub(r"([.][0-9]{1,6})[0-9]*", r"\1", text)
    fraction = re.search(r"[.]([0-9]+)", whole)
    if fraction:
        whole = whole.replace(fraction[0], "." + fraction[1].ljust(6, "0"))
    try:
        moment = dt.datetime.fromisoformat(whole)
    except ValueError:
        return None
    try:
        return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
    except OverflowError:  # before the year 1 or after 9999 in UTC
        return None
