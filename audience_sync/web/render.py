"""Render results of `history` as HTML: the template environment, and the format of numbers, times and states."""

import datetime as dt
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any
from urllib.parse import quote_plus

import jinja2
import msgspec
from markupsafe import Markup

from audience_sync import __version__
from audience_sync.clock import duration
from audience_sync.web.highlight import highlight

# (CSS class, shape) of each state. The shape helps people who cannot distinguish the colours.
STATES = {
    "enabled": ("good", "●"), "succeeded": ("good", "✓"), "accepted": ("good", "✓"),
    "done": ("good", "✓"), "refused": ("warn", "▲"),
    "running": ("busy", "◐"), "pending": ("busy", "◔"), "sending": ("busy", "◐"),
    "held": ("warn", "▲"), "late": ("warn", "▲"), "not running": ("warn", "▲"), "abandoned": ("bad", "✕"),
    "failed": ("bad", "✕"), "failing": ("bad", "✕"), "dead": ("bad", "✕"), "stopped": ("bad", "■"),
    "disabled": ("quiet", "○"), "retired": ("quiet", "○"), "not configured": ("quiet", "○"),
    "rejected": ("quiet", "○"), "cancelled": ("quiet", "○"), "ignored": ("quiet", "○"),
    "entered": ("good", "→"), "exited": ("quiet", "←"), "changed": ("busy", "↻"),
    "no answer": ("warn", "?"), "under way": ("busy", "◐"), "completed": ("good", "✓"),
    "gathering": ("busy", "◔"), "uploading": ("busy", "◐"), "lost": ("bad", "?"), "dropped": ("warn", "?"),
}  # fmt: skip
SPARKLINE_SIZE = (120, 28)
CHART_SIZE = (1000, 200)
PROGRAM = "audience-sync"
_JSON = json.JSONEncoder(ensure_ascii=False, default=str)
_COMMAND = re.compile(r"`([^`]+)`")


class Templates(jinja2.Environment):
    """Templates that find a row's values fast: first as an item, unless every dict has an attribute of the name."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)


@cache
def environment() -> jinja2.Environment:
    templates = Templates(
        loader=jinja2.PackageLoader("audience_sync.web"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
    )
    filters = (number, breakable, state, sparkline, chart, highlight, duration, prose, short)
    templates.filters.update(
        {function.__name__: function for function in filters}, moment=time_tag, json=as_json
    )
    templates.globals.update(link=link, version=__version__, notice=None, is_outdated=False, live=False)
    return templates


def number(value: float | None, most: float | None = None) -> str:
    """A number with separators; nothing for None. `most`: where counting stopped, which is shown as 100,000+."""
    if value is None:
        return ""
    return f"{value:,}" if most is None or value < most else f"{most:,}+"


@lru_cache(8_192)
def time_tag(value: dt.datetime | None, *, seconds: bool = False) -> Markup:
    """A time in UTC, to the minute or the second; the browser adds the local time as a tooltip."""
    if value is None:
        return Markup()
    utc = value.astimezone(dt.UTC)
    text = f"{utc:%Y-%m-%d %H:%M:%S}" if seconds else f"{utc:%Y-%m-%d %H:%M}"
    return Markup('<time datetime="{}">{}</time>').format(utc.isoformat(timespec="seconds"), text)


@lru_cache(1_024)
def breakable(text: str) -> Markup:
    """A key with possible line breaks after its underscores."""
    return Markup("_<wbr>").join(text.split("_"))


@lru_cache(256)
def state(name: str) -> Markup:
    """A state as a shape and a word."""
    tag = Markup('<span class="state {}"><span aria-hidden="true">{}</span> {}</span>')
    return tag.format(*STATES.get(name, ("quiet", "○")), name)


def sparkline(sizes: Iterable[int]) -> Markup:
    """A small line chart of numbers, oldest first."""
    numbers = list(sizes)
    if len(numbers) < 2:
        return Markup()
    label = f"from {numbers[0]:,} to {numbers[-1]:,} members in {len(numbers)} runs"
    return _line_chart("sparkline", SPARKLINE_SIZE, range(len(numbers)), numbers, label, low=min(numbers))


def chart(points: Sequence[tuple[dt.datetime, int]]) -> Markup:
    """A line chart of sizes over time, oldest first, for readers without JavaScript."""
    if len(points) < 2:
        return Markup()
    numbers = [size for _, size in points]
    (first, _), (last, _) = points[0], points[-1]
    label = f"{min(numbers):,} to {max(numbers):,} members from {first:%Y-%m-%d} to {last:%Y-%m-%d}"
    seconds = [(at - first).total_seconds() for at, _ in points]
    # A size holds until the next run changes it, so each is a step.
    places = [seconds[0], *(second for second in seconds[1:] for _ in range(2))]
    steps = [*(number for number in numbers[:-1] for _ in range(2)), numbers[-1]]
    return _line_chart("chart", CHART_SIZE, places, steps, label, low=0)


def _line_chart(
    name: str, size: tuple[int, int], places: Sequence[float], numbers: Sequence[int], label: str, *, low: int
) -> Markup:
    (width, height), high = size, max(numbers)
    step, scale = width / (places[-1] or 1), (height - 4) / ((high - low) or 1)
    points = " ".join(
        f"{place * step:.1f},{height / 2 if high == low else height - 2 - (value - low) * scale:.1f}"
        for place, value in zip(places, numbers, strict=True)
    )
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}" preserveAspectRatio="none">'
        '<polyline points="{}" vector-effect="non-scaling-stroke"/></svg>'
    ).format(name, width, height, label, points)


def as_json(value: Any, indent: int | None = None) -> str:
    """A value as readable JSON; a template escapes it."""
    text = _JSON.encode(value)
    try:
        return text if indent is None else msgspec.json.format(text, indent=indent)
    except msgspec.DecodeError:  # NaN
        return text


def short(text: Any, length: int) -> str:
    """A text on one line, shortened to a number of characters."""
    line = " ".join(str(text)[: length + 1].split())
    return line if len(line) <= length else line[: length - 1] + "…"


@jinja2.pass_context
def prose(context: jinja2.runtime.Context, text: str) -> Markup:
    """A message whose commands, in backticks, become code, and begin in the way that the reader must type."""
    program = str(context["program"])
    texts: list[str] = _COMMAND.split(text)
    for place in range(1, len(texts), 2):
        name, space, rest = texts[place].partition(" ")
        called = program if name == PROGRAM else name
        texts[place] = Markup("<code>{}</code>").format(called + space + rest)
    return Markup().join(texts)


def link(path: str, **parameters: Any) -> str:
    """A path with a query string of the given parameters that are not None."""
    given = [
        f"{name}={quote_plus(str(value))}" for name, value in parameters.items() if value not in (None, "")
    ]
    return f"{path}?{'&'.join(given)}" if given else path
