"""What people and machines read: tables of at most 80 columns, progress bars, and one JSON document."""

import datetime as dt
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from audience_sync.clock import isoformat

if TYPE_CHECKING:
    from audience_sync.delivery.worker import Report

WIDTH = 80
FOLDED = {"key", "for", "body", "answer", "reason", "value", "user", "event or group"}  # may be of any length


def line(text: str = "") -> None:
    print(text)  # noqa: T201


def aside(text: str) -> None:
    """A line for the person, not for the pipe."""
    print(text, file=sys.stderr)  # noqa: T201


def document(value: Any) -> None:
    line(json.dumps(value, indent=2, ensure_ascii=False, default=_encode))


def _encode(value: Any) -> str:
    if isinstance(value, dt.datetime):
        return isoformat(value)
    raise TypeError(type(value).__name__)


def moment(value: dt.datetime | None) -> str:
    """To the minute, for tables; UTC."""
    return f"{value.astimezone(dt.UTC):%Y-%m-%d %H:%M}" if value else ""


def count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """A table of at most 80 columns; `numbers` names the columns that are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in numbers else "left"
        shown.add_column(column, justify=justify, no_wrap=column not in FOLDED, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # ids and errors are no markup
    Console(width=WIDTH, highlight=False, emoji=False).print(shown)


def span(seconds: float) -> str:
    """A span in words, rounded as people would."""
    if seconds < 1:
        return "less than a second"
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{round(seconds / size)} {unit}s"
    return f"{round(seconds)} seconds"


@contextmanager
def progress() -> Iterator[Callable[["Report"], None]]:
    """A bar on a terminal, fed with the delivery's reports; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("delivering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True, width=WIDTH), transient=True) as bar:
        task = bar.add_task("delivering", total=None, left="")

        def show(report: "Report") -> None:
            done = report.accepted_count + report.dead_count
            left = f"{span(report.seconds_left)} left"
            bar.update(task, completed=done, total=done + report.pending_count, left=left)

        yield show
