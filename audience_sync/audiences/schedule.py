"""Schedules: the slots (moments in UTC) of a configured `schedule` and `timezone`.

A cron expression has the meaning of crontab(5), in the local time of its zone. Each local time is one slot, at the first
moment at which the zone's clock has reached it:
- a local time that occurs twice (clocks go back) is a slot only the first time. During the repeated hour nothing is due,
  not even for `*/30 * * * *`; `every 30 minutes` has no such pause;
- a local time that does not occur (clocks go forward) is a slot at the end of the gap. All times in one gap, and a slot
  that is due at its end anyway, are one slot.

`every N minutes` (hours, days) is due at whole multiples of the span since 1970-01-01T00:00Z, in every zone.

Slots are computed from the text alone, so every process computes the same slots.
"""

import calendar
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple, TypeAlias
from zoneinfo import ZoneInfo, available_timezones

from audience_sync.errors import ConfigError
from audience_sync.suggest import did_you_mean

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST = timedelta(days=366)

_NICKNAMES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip
_EVERY = re.compile(r"every ([1-9][0-9]{0,5}) (minute|hour|day)s?")
_PART = re.compile(r"(?:\*|(?P<first>[0-9A-Za-z]+)(?:-(?P<last>[0-9A-Za-z]+))?)(?:/(?P<step>[0-9]{1,9}))?")
_EXAMPLES = '"0 6 * * *" (minute hour day-of-month month day-of-week) or "every 30 minutes"'


class _Field(NamedTuple):
    label: str
    low: int
    high: int
    names: tuple[str, ...] = ()


_MINUTE, _HOUR, _DAY = _Field("minute", 0, 59), _Field("hour", 0, 23), _Field("day of month", 1, 31)
_MONTH = _Field(
    "month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
)
_WEEKDAY = _Field("day of week", 0, 7, ("sun", "mon", "tue", "wed", "thu", "fri", "sat"))


@dataclass(frozen=True, slots=True)
class Cron:
    zone: ZoneInfo
    times: tuple[time, ...]  # ascending
    months: frozenset[int]
    days: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0
    is_either: bool  # both kinds of day are restricted: a day needs to match only one of them
    text: str = field(default="", compare=False)  # as configured, here and below

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """Return the latest slot with after < slot <= until."""
        # After clocks have gone back (by a day at most), local times later than now may be past slots.
        newest = until.astimezone(self.zone).toordinal() + 1
        oldest = after.astimezone(self.zone).toordinal()
        for day in self._days(range(newest, oldest - 1, -1)):
            if passed := self._passed(day, until):
                slot = self._slot(day, self.times[passed - 1])
                return slot if slot > after else None
        return None

    def next(self, after: datetime) -> datetime:
        """Return the first slot after a moment. One exists: `parse_schedule` refuses expressions that are never due."""
        for day in self._days(itertools.count(after.astimezone(self.zone).toordinal())):
            if (passed := self._passed(day, after)) < len(self.times):
                return self._slot(day, self.times[passed])
        raise AssertionError  # the days never end

    def _days(self, ordinals: Iterable[int]) -> Iterator[date]:
        for ordinal in ordinals:
            day = date.fromordinal(ordinal)
            if day.month in self.months:
                by_date, by_weekday = day.day in self.days, ordinal % 7 in self.weekdays
                if (by_date or by_weekday) if self.is_either else (by_date and by_weekday):
                    yield day

    def _passed(self, day: date, moment: datetime) -> int:
        """Count the day's slots up to that moment."""
        return bisect_right(self.times, moment, key=lambda local: self._slot(day, local))

    def _slot(self, day: date, local: time) -> datetime:
        return _first_moment(datetime.combine(day, local, self.zone))


@dataclass(frozen=True, slots=True)
class Every:
    span: timedelta
    text: str = field(default="", compare=False)

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        slot = until - (until - _EPOCH) % self.span
        return slot if slot > after else None

    def next(self, after: datetime) -> datetime:
        return after - (after - _EPOCH) % self.span + self.span


Schedule: TypeAlias = Cron | Every


def parse_schedule(text: str, timezone: str) -> Schedule:
    """Return the schedule that the text describes; `timezone` is an IANA name.

    Raises:
        ConfigError: one of them is not valid.

    """
    zone = load_zone(timezone)
    fields = text.split()
    if not fields:
        raise ConfigError(f"a schedule is empty: write {_EXAMPLES}")
    as_configured = " ".join(fields)
    if fields[0].lower() == "every":
        return replace(_every(as_configured), text=as_configured)
    if fields[0].startswith("@"):
        fields = _nickname(as_configured).split()
    if len(fields) != 5:
        raise ConfigError(
            f"a schedule has five fields, without seconds or a year, and this one has {len(fields)}: write {_EXAMPLES}"
        )
    return replace(_cron(fields, zone), text=as_configured)


def _first_moment(local: datetime) -> datetime:
    """Return the first moment at which the zone's clock shows `local`, or the end of the gap that contains it."""
    moment, zone = local.astimezone(UTC), local.tzinfo
    if moment.astimezone(zone) == local:  # datetimes of the same zone are compared by their local time
        return moment
    # In a gap, fold=0 uses the offset from before it and gives a moment after it; fold=1 does the reverse.
    before = local.replace(fold=1).astimezone(UTC)
    seconds = range((moment - before) // timedelta(seconds=1))
    end = bisect_left(seconds, True, key=lambda n: (before + timedelta(seconds=n)).astimezone(zone) >= local)
    return before + timedelta(seconds=end)


def load_zone(name: str) -> ZoneInfo:
    """Return the time zone of an IANA name. Raises ConfigError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown; not a plain name, or not a zone file; a folder
        known = available_timezones()
    if not known:
        raise ConfigError("this machine has no time zones: install its tzdata package, or tzdata from PyPI")
    hint = did_you_mean(name, known, "write an IANA name such as Europe/Berlin or UTC")
    raise ConfigError(f"there is no time zone {name[:60]!r}: {hint}")


def _nickname(text: str) -> str:
    if text.lower() == "@reboot":
        raise ConfigError(
            "nothing would ever be due with @reboot, which is not a time: write @daily, for example"
        )
    if text.lower() not in _NICKNAMES:
        raise ConfigError(f"there is no schedule {text[:60]!r}: write one of {', '.join(_NICKNAMES)}")
    return _NICKNAMES[text.lower()]


def _every(text: str) -> Every:
    if match := _EVERY.fullmatch(text.lower()):
        span = timedelta(**{f"{match[2]}s": int(match[1])})
        if span <= _LONGEST:
            return Every(span)
    raise ConfigError(
        f"there is no interval {text[:60]!r}: write a whole number of minutes, hours or days, "
        f'at least 1 minute and at most {_LONGEST.days} days, such as "every 30 minutes"'
    )


def _cron(fields: list[str], zone: ZoneInfo) -> Cron:
    kinds = (_MINUTE, _HOUR, _DAY, _MONTH, _WEEKDAY)
    minutes, hours, days, months, weekdays = map(_values, kinds, fields)
    # crontab decides by the first character: */2 does not count as a restriction, 1-31 does.
    is_either = not fields[2].startswith("*") and not fields[4].startswith("*")
    # Every date falls on every weekday at some time, 29 February within 40 years: only the date can be impossible.
    if not is_either and min(days) > max(calendar.monthrange(2000, month)[1] for month in months):
        raise ConfigError(
            f"never due: month {fields[3][:60]!r} has no day {fields[2][:60]!r}: write one that it has"
        )
    return Cron(
        zone=zone,
        times=tuple(time(hour, minute) for hour in sorted(hours) for minute in sorted(minutes)),
        months=months,
        days=days,
        weekdays=frozenset(day % 7 for day in weekdays),
        is_either=is_either,
    )


def _values(field: _Field, text: str) -> frozenset[int]:
    return frozenset(value for part in text.split(",") for value in _range(field, part))


def _range(field: _Field, part: str) -> range:
    if not (match := _PART.fullmatch(part)):
        raise _wrong(
            field, part, f"write *, */2, {field.low}, {field.low}-{field.high} or a list, with commas"
        )
    first, last, step = match["first"], match["last"], int(match["step"] or 1)
    low = _value(field, first) if first else field.low
    high = _value(field, last or first) if first else field.high
    if last and last.lower() == "sun" and low:
        high = 7  # fri-sun: Sunday is 0, except at the end of a range
    if high < low:
        raise _wrong(field, part, f"a range goes upwards: write {first}-{field.high},{field.low}-{last}")
    if match["step"] and first and not last:
        raise _wrong(field, part, f"a step needs a range: write {first}-{field.high}/{step}")
    if step not in range(1, field.high - field.low + 2):
        raise _wrong(field, part, f"a step is a number from 1 to {field.high - field.low + 1}")
    return range(low, high + 1, step)


def _value(field: _Field, text: str) -> int:
    if text.lower() in field.names:
        return field.low + field.names.index(text.lower())
    if re.fullmatch("[0-9]{1,2}", text) and field.low <= int(text) <= field.high:
        return int(text)
    names = f" or a name from {field.names[0]} to {field.names[-1]}" if field.names else ""
    raise _wrong(field, text, f"write a number from {field.low} to {field.high}{names}")


def _wrong(field: _Field, text: str, remedy: str) -> ConfigError:
    return ConfigError(f"{field.label}: {text[:60]!r} is not understood: {remedy}")
