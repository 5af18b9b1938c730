import collections
import functools
import itertools
import re
import zoneinfo
from bisect import bisect_left
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from audience_sync.audiences import schedule
from audience_sync.errors import ConfigError

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
ZONES = sorted(zoneinfo.available_timezones())


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def walk(plan, after):
    """The slots after a moment, one by one."""
    while True:
        after = plan.next(after)
        yield after


def following(text, zone, after, count):
    return [
        f"{slot:%Y-%m-%d %H:%M}"
        for slot in itertools.islice(walk(schedule.parse_schedule(text, zone), at(after)), count)
    ]


@pytest.mark.parametrize(
    ("text", "slots"),  # from Thursday, 1 January 2026, noon
    [
        ("30 6 * * *", ["2026-01-02 06:30", "2026-01-03 06:30"]),
        ("0 */2 * * *", ["2026-01-01 14:00", "2026-01-01 16:00"]),
        ("*/45 * * * *", ["2026-01-01 12:45", "2026-01-01 13:00", "2026-01-01 13:45"]),
        ("5-20/7 13 * * *", ["2026-01-01 13:05", "2026-01-01 13:12", "2026-01-01 13:19", "2026-01-02 13:05"]),
        ("0,30 9-17 * * *", ["2026-01-01 12:30", "2026-01-01 13:00"]),
        ("  00\t08  *  * * ", ["2026-01-02 08:00"]),
        ("59 23 31 12 *", ["2026-12-31 23:59", "2027-12-31 23:59"]),
        ("0 0 31 * *", ["2026-01-31 00:00", "2026-03-31 00:00", "2026-05-31 00:00"]),
        ("0 0 29 2 *", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        ("0 0 1 jan,JUL *", ["2026-07-01 00:00", "2027-01-01 00:00"]),
        ("0 0 1 Oct-dec/2 *", ["2026-10-01 00:00", "2026-12-01 00:00", "2027-10-01 00:00"]),
        # Monday is 1; both 0 and 7 are Sunday, the 4th.
        ("0 3 * * 1", ["2026-01-05 03:00", "2026-01-12 03:00"]),
        ("0 3 * * 0", ["2026-01-04 03:00", "2026-01-11 03:00"]),
        ("0 3 * * 7", ["2026-01-04 03:00", "2026-01-11 03:00"]),
        ("0 3 * * SUN", ["2026-01-04 03:00", "2026-01-11 03:00"]),
        ("0 3 * * 5-7", ["2026-01-02 03:00", "2026-01-03 03:00", "2026-01-04 03:00", "2026-01-09 03:00"]),
        ("0 3 * * fri-Sun", ["2026-01-02 03:00", "2026-01-03 03:00", "2026-01-04 03:00", "2026-01-09 03:00"]),
        ("0 3 * * sun-mon", ["2026-01-04 03:00", "2026-01-05 03:00", "2026-01-11 03:00"]),
        ("0 3 * * sun-sun", ["2026-01-04 03:00", "2026-01-11 03:00"]),
        ("0 3 * * mon-fri/2", ["2026-01-02 03:00", "2026-01-05 03:00", "2026-01-07 03:00"]),
        ("0 3 * * */7", ["2026-01-04 03:00", "2026-01-11 03:00"]),
        ("0 3 * * 2,sat", ["2026-01-03 03:00", "2026-01-06 03:00", "2026-01-10 03:00"]),
        # Both days restricted: either will do.
        ("0 0 13 * fri", ["2026-01-02 00:00", "2026-01-09 00:00", "2026-01-13 00:00", "2026-01-16 00:00"]),
        ("0 0 30 2 1", ["2026-02-02 00:00", "2026-02-09 00:00"]),
        ("0 0 1-31 * mon", ["2026-01-02 00:00", "2026-01-03 00:00"]),
        # A field that starts with a star does not count as restricted: both must hold.
        ("0 0 */2 * mon", ["2026-01-05 00:00", "2026-01-19 00:00", "2026-02-09 00:00"]),
        ("0 0 *,13 * mon", ["2026-01-05 00:00", "2026-01-12 00:00"]),
        ("0 0 13 * */5", ["2026-02-13 00:00", "2026-03-13 00:00", "2026-09-13 00:00"]),
        ("@hourly", ["2026-01-01 13:00", "2026-01-01 14:00"]),
        ("@daily", ["2026-01-02 00:00", "2026-01-03 00:00"]),
        ("@midnight", ["2026-01-02 00:00", "2026-01-03 00:00"]),
        ("@Weekly", ["2026-01-04 00:00", "2026-01-11 00:00"]),
        ("@monthly", ["2026-02-01 00:00", "2026-03-01 00:00"]),
        ("@yearly", ["2027-01-01 00:00", "2028-01-01 00:00"]),
        ("@annually", ["2027-01-01 00:00", "2028-01-01 00:00"]),
        ("every 30 minutes", ["2026-01-01 12:30", "2026-01-01 13:00"]),
        ("Every 1 hour", ["2026-01-01 13:00", "2026-01-01 14:00"]),
        ("every 1 day", ["2026-01-02 00:00", "2026-01-03 00:00"]),
        (
            "every 7 hours",
            ["2026-01-01 14:00", "2026-01-01 21:00"],
        ),  # 490,910 hours since 1970 are 7 * 70,130
        ("every 366 days", ["2026-02-12 00:00", "2027-02-13 00:00"]),  # 56 and 57 times 366 days
        ("every 90 minutes", ["2026-01-01 13:30", "2026-01-01 15:00"]),
    ],
)
def test_slots_are_due_when_crontab_says(text, slots):
    assert following(text, "UTC", "2026-01-01 12:00", len(slots)) == slots


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty: write"),
        (" \t ", "empty: write"),
        ("hourly", "five fields, without seconds or a year, and this one has 1: write"),
        ("0 0 6 * * *", "five fields, without seconds or a year, and this one has 6: write"),
        ("60 * * * *", "minute: '60' is not understood: write a number from 0 to 59"),
        ("-1 * * * *", "minute: '-1' is not understood: write *, */2, 0, 0-59 or a list"),
        ("0 24 * * *", "hour: '24' is not understood: write a number from 0 to 23"),
        ("0 0 0 * *", "day of month: '0' is not understood: write a number from 1 to 31"),
        (
            "0 0 1 13 *",
            "month: '13' is not understood: write a number from 1 to 12 or a name from jan to dec",
        ),
        ("0 0 * * 8", "day of week: '8' is not understood: write a number from 0 to 7 or a name from sun"),
        ("0 0 * * 1,,2", "day of week: '' is not understood: write"),
        ("0 0 * * Monday", "day of week: 'Monday' is not understood: write"),
        ("0 0 * mon *", "month: 'mon' is not understood: write"),
        ("0 0 L * *", "day of month: 'L' is not understood: write"),
        ("0 0 15W * *", "day of month: '15W' is not understood: write"),
        ("0 0 ? * 1", "day of month: '?' is not understood: write"),
        ("0 0 * * 5#2", "day of week: '5#2' is not understood: write"),
        ("5/15 * * * *", "minute: '5/15' is not understood: a step needs a range: write 5-59/15"),
        ("*-5 * * * *", "minute: '*-5' is not understood: write"),
        ("10-1000 * * * *", "minute: '1000' is not understood: write a number from 0 to 59"),
        ("0 22-4 * * *", "hour: '22-4' is not understood: a range goes upwards: write 22-23,0-4"),
        ("0 0 * * sat-Tue", "a range goes upwards: write sat-7,0-Tue"),
        ("0 0 * * 5-0", "a range goes upwards"),
        ("*/0 * * * *", "minute: '*/0' is not understood: a step is a number from 1 to 60"),
        ("*/90 * * * *", "minute: '*/90' is not understood: a step is a number from 1 to 60"),
        ("0 0 1-9/x * *", "day of month: '1-9/x' is not understood: write"),
        ("٣ * * * *", "minute: '٣' is not understood: write"),
        ("0 0 30 2 *", "never due: month '2' has no day '30': write"),
        ("0 0 31 2,4,jun */2", "never due: month '2,4,jun' has no day '31': write"),
        ("@reboot", "@reboot, which is not a time: write"),
        ("@fortnightly", "no schedule '@fortnightly': write one of @hourly, @daily"),
        ("@every 5 minutes", "no schedule '@every 5 minutes': write one of @hourly"),
        (
            "every 30 seconds",
            "no interval 'every 30 seconds': write a whole number of minutes, hours or days, at least 1 minute and",
        ),
        ("every 0 minutes", "no interval 'every 0 minutes'"),
        ("every hour", "no interval 'every hour': write a whole number of minutes, hours or days"),
        ("every 1.5 hours", "no interval 'every 1.5 hours'"),
        ("every 367 days", "no interval 'every 367 days': write"),
        ("every 9999999999999999999 days", "no interval 'every 9999"),
    ],
)
def test_an_invalid_schedule_is_refused_with_a_remedy(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        schedule.parse_schedule(text, "UTC")
    assert re.fullmatch(r"[a-z].*: write .*[^.]|.*: a (step|range) .*[^.]", str(refused.value))


@pytest.mark.parametrize(
    ("zone", "message"),
    [
        ("Europe/Berln", "no time zone 'Europe/Berln': did you mean Europe/Berlin"),
        ("", "no time zone '': write an IANA name such as Europe/Berlin or UTC"),
        ("../../etc/passwd", "no time zone '../../etc/passwd': write"),
        ("/usr/share/zoneinfo/UTC", "no time zone '/usr/share/zoneinfo/UTC': "),
        ("Europe", "no time zone 'Europe': "),
        ("Mars\0", r"no time zone 'Mars\x00': "),
        ("x" * 10_000, "no time zone 'xxx"),
    ],
)
@pytest.mark.parametrize("text", ["0 6 * * *", "every 30 minutes"])
def test_an_unknown_time_zone_is_refused_with_the_nearest(text, zone, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        schedule.parse_schedule(text, zone)


def test_the_next_leap_day_on_a_sunday_may_be_forty_years_away():
    assert following("0 0 29 2 */7", "UTC", "2088-02-29", 1) == ["2128-02-29 00:00"]


@pytest.mark.parametrize(
    ("text", "zone", "after", "slots"),
    [
        # Autumn: 02:30 occurs twice and is taken the first time, in summer time; so is each of its neighbours.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", ["2026-10-25 00:30", "2026-10-26 01:30"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-10-25 00:00", ["2026-10-25 00:30", "2026-10-25 02:00"]),
        ("every 30 minutes", "Europe/Berlin", "2026-10-25 00:00", ["2026-10-25 00:30", "2026-10-25 01:00"]),
        # Spring: 02:30 does not occur and is due at 03:00; all of the gap is one slot, with 03:00 itself.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28 12:00", ["2026-03-29 01:00", "2026-03-30 00:30"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29 00:30", ["2026-03-29 01:00", "2026-03-29 01:30"]),
        # Midnight is in the gap, and is due at 01:00.
        ("0 0 * * *", "America/Sao_Paulo", "2018-11-03 12:00", ["2018-11-04 03:00", "2018-11-05 02:00"]),
        # Half an hour: from 02:00 to 02:30 in spring; in autumn 01:30 occurs twice.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03 12:00", ["2026-10-03 15:30", "2026-10-04 15:15"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04 12:00", ["2026-04-04 14:45", "2026-04-05 15:15"]),
        # Friday, 30 December 2011 did not occur: its slots come as Saturday begins, with midnight's.
        ("0 6 * * *", "Pacific/Apia", "2011-12-29 00:00", ["2011-12-29 16:00", "2011-12-30 10:00", "2011-12-30 16:00"]),
        ("0 0 * * *", "Pacific/Apia", "2011-12-29 00:00", ["2011-12-29 10:00", "2011-12-30 10:00", "2011-12-31 10:00"]),
        ("every 1 day", "Asia/Tokyo", "2026-01-01 12:00", ["2026-01-02 00:00", "2026-01-03 00:00"]),
        # Ireland's winter is the exception, and Morocco's summer pauses for Ramadan (2026: until 22 March).
        ("30 1 * * *", "Europe/Dublin", "2026-03-28 12:00", ["2026-03-29 01:00", "2026-03-30 00:30"]),
        ("30 1 * * *", "Europe/Dublin", "2026-10-24 12:00", ["2026-10-25 00:30", "2026-10-26 01:30"]),
        ("30 2 * * *", "Africa/Casablanca", "2026-03-21 12:00", ["2026-03-22 02:00", "2026-03-23 01:30"]),
    ],
)  # fmt: skip
def test_a_local_time_is_due_once_when_clocks_change(text, zone, after, slots):
    assert following(text, zone, after, len(slots)) == slots


def test_in_the_repeated_hour_the_latest_slot_is_in_the_past():
    plan = schedule.parse_schedule("0,30 2 * * *", "Europe/Berlin")
    again = at("2026-10-25 01:10")  # 02:10, the second time
    assert plan.latest(at("2026-10-24 12:00"), again) == at("2026-10-25 00:30")
    assert plan.latest(at("2026-10-25 00:30"), again) is None
    assert plan.next(again) == at("2026-10-26 01:00")


def test_midnight_is_due_although_the_clock_went_back_to_the_day_before():
    plan = schedule.parse_schedule("@daily", "America/St_Johns")  # 7 November 2010, 00:01: back to 23:01
    assert plan.latest(at("2010-11-06 12:00"), at("2010-11-07 02:45")) == at("2010-11-07 02:30")
    assert plan.next(at("2010-11-07 02:45")) == at("2010-11-08 03:30")


def test_a_slot_is_due_at_its_moment_and_not_after_itself():
    for text in ("0 6 * * *", "every 6 hours"):
        plan = schedule.parse_schedule(text, "UTC")
        assert plan.latest(at("2026-01-01 05:59"), at("2026-01-01 06:00")) == at("2026-01-01 06:00")
        assert plan.latest(at("2026-01-01 06:00"), at("2026-01-01 11:59")) is None
        assert plan.latest(at("2000-01-01 06:00"), at("2026-01-01 06:00:00.000001")) == at("2026-01-01 06:00")


def test_offsets_with_seconds_are_exact():
    # Until 1972 it was 44 minutes and 30 seconds behind.
    plan = schedule.parse_schedule("0 12 * * *", "Africa/Monrovia")
    assert plan.next(at("1970-06-01")) == at("1970-06-01 12:44:30")


@functools.cache
def spans(name):
    """The spans of one offset, (start, end, offset), from 2011 to 2036; no zone changes twice in a fortnight."""
    zone = zoneinfo.ZoneInfo(name)

    def offset_at(moment):
        return moment.astimezone(zone).utcoffset()

    result, start, now = [], at("2010-12-25"), at("2010-12-25")
    offset = offset_at(start)
    while now < at("2036-01-01"):
        before, now = now, now + 14 * DAY
        if offset_at(now) != offset:
            minutes = range(14 * 24 * 60)
            change = bisect_left(minutes, True, key=lambda n: offset_at(before + n * MINUTE) != offset)
            end = before + change * MINUTE
            result.append((start, end, offset))
            start, offset = end, offset_at(end)
    return (*result, (start, now, offset))


@pytest.mark.parametrize(("text", "minutes"), [("0 0 * * *", 0), ("30 2 * * *", 150)])
def test_in_every_zone_of_the_world_each_day_of_ten_years_has_its_slot(text, minutes):
    start, end = at("2011-01-01"), at("2021-01-01")
    days = [start + n * DAY + minutes * MINUTE for n in range(-2, 3656)]
    alike = {}  # zones with the same changes in these years are one, and so are those with none
    for name in ZONES:
        changes = tuple(span for span in spans(name) if span[0] < end)
        alike[changes if len(changes) > 1 else ()] = name
    for name in alike.values():
        local = collections.deque(days)
        due = set()
        for first, last, offset in spans(name):  # in each, the clock reaches all that it shows before the end
            while local and local[0] - offset < last:
                due.add(max(first, local.popleft() - offset))
        slots = walk(schedule.parse_schedule(text, name), start - MINUTE)
        walked = itertools.takewhile(lambda slot: slot < end, slots)
        assert list(walked) == sorted(slot for slot in due if start <= slot < end), name


def fields(low, high):
    """A field of cron, as text and as the values it allows."""
    values = range(low, high + 1)
    steps = st.integers(1, high).map(lambda step: (f"*/{step}", set(values[::step])))
    some = st.sets(st.sampled_from(values), min_size=1, max_size=6)
    return st.just(("*", set(values))) | steps | some.map(lambda each: (",".join(map(str, each)), each))


@st.composite
def moments(draw, name):
    """Any moment of 2015 to 2035, or one on the day before the zone's clocks are changed."""
    changes = [start for start, *_ in spans(name) if start > at("2015-01-01")]
    if changes and draw(st.booleans()):
        return draw(st.sampled_from(changes)) - draw(st.integers(-120, 1440)) * MINUTE
    return at("2015-01-01") + draw(st.integers(0, 20 * 365 * 1440)) * MINUTE


def due_by_the_clock(zone, is_slot, after, until):
    """The obvious way: step through the minutes and collect local times that the clock reaches for the first time."""
    now, due = after - DAY, []
    reached = now.astimezone(zone).replace(tzinfo=None)
    while now < until:
        now += MINUTE
        fresh = []
        while reached < now.astimezone(zone).replace(tzinfo=None):
            reached += MINUTE
            fresh.append(reached)
        if now > after and any(map(is_slot, fresh)):
            due.append(now)
    return due


@given(
    st.data(),
    st.sampled_from(ZONES),
    fields(0, 59),
    fields(0, 23),
    fields(1, 31),
    fields(1, 12),
    fields(0, 7),
)
def test_slots_are_due_when_the_local_clock_first_reaches_them(data, name, minute, hour, day, month, weekday):
    either = "*" not in day[0] + weekday[0]
    assume(either or min(day[1]) < 29)  # it is due in every month

    def is_slot(local):
        by_date, by_weekday = (
            local.day in day[1],
            bool({local.isoweekday(), local.isoweekday() % 7} & weekday[1]),
        )
        on_day = (by_date or by_weekday) if either else (by_date and by_weekday)
        return on_day and local.month in month[1] and local.hour in hour[1] and local.minute in minute[1]

    plan = schedule.parse_schedule(f"{minute[0]} {hour[0]} {day[0]} {month[0]} {weekday[0]}", name)
    after = data.draw(moments(name))
    until = after + data.draw(st.integers(1, 3 * 1440)) * MINUTE
    due = due_by_the_clock(zoneinfo.ZoneInfo(name), is_slot, after, until)
    assert list(itertools.takewhile(lambda slot: slot <= until, walk(plan, after))) == due
    assert plan.latest(after, until) == (due[-1] if due else None)


@given(
    st.sampled_from(["minutes", "hours", "days"]), st.integers(1, 366), st.datetimes(timezones=st.just(UTC))
)
def test_spans_are_counted_from_1970(unit, count, moment):
    assume(2 < moment.year < 9998)
    plan, span = schedule.parse_schedule(f"every {count} {unit}", "UTC"), timedelta(**{unit: count})
    slot = plan.next(moment)
    assert (slot - at("1970-01-01")) % span == timedelta()
    assert slot - span <= moment < slot
    assert plan.latest(moment - span, moment) == slot - span


@given(
    st.text()
    | st.lists(st.text("0123456789*/,-LW#?@ monsun", min_size=1), min_size=5, max_size=5).map(" ".join)
    | st.from_regex(r"(@|every )[a-z0-9 ]*")
)
def test_any_text_is_a_schedule_with_slots_or_a_configuration_error(text):
    try:
        plan = schedule.parse_schedule(text, "Europe/Berlin")
    except ConfigError:
        return
    assert plan.next(at("2026-01-01")) > at("2026-01-01")


@settings(max_examples=30)  # each lists the zones of the machine
@given(st.text())
def test_any_text_is_a_time_zone_or_a_configuration_error(zone):
    try:
        schedule.parse_schedule("@daily", zone)
    except ConfigError:
        assert zone not in ZONES
