"""What people and machines read: tables of at most 80 columns, progress bars, and one JSON document.

Who reads it, and whether anybody does, changes neither the work nor its exit code.
"""

import contextlib
import datetime as dt
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from audience_sync.clock import isoformat

if TYPE_CHECKING:
    from audience_sync.queue.worker import Report

WIDTH = 80
NARROWEST = 16  # a column that is folded
FOLDED = {
    "key",
    "for",
    "body",
    "answer",
    "reason",
    "value",
    "user",
    "event or group",
    "state",
}  # may be of any length


def line(text: str = "") -> None:
    with _unmissed():
        print(text)  # noqa: T201


def warn(text: str) -> None:
    """A line for the person, not for the pipe."""
    with contextlib.suppress(OSError):  # a full disk, or a terminal that is gone
        print(text, file=sys.stderr)  # noqa: T201


@contextmanager
def _unmissed() -> Iterator[None]:
    """A reader who left (| head) hears no more, and is not missed."""
    try:
        yield
    except BrokenPipeError:
        _silence(sys.stdout)


@contextmanager
def streams() -> Iterator[None]:
    """Say things inside: at the end all of it is out, or an OSError says why not; closed streams are no trouble."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # else what is opened next would get its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    try:
        yield
    finally:
        with _unmissed():
            sys.stdout.flush()


def drop_output() -> None:
    """Drop what could not be said, which would be tried again when the interpreter ends, and change its exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
    """A table of at most 80 columns, in which nothing is cut; `numbers` names the columns that are set to the right.

    What does not fit is folded, in the columns that may be of any length; where that is not enough, the key
    stands in a line of its own above the rest of its row, whole, so that it can be copied.
    """
    layout = _Layout(columns, rows, numbers)
    line()
    layout.print(columns)
    line(" " + "─" * (layout.width - 1))
    for row in rows:
        if layout.above is not None:
            line(f" {row[layout.above]}")
        layout.print(row)
    line()


class _Layout:
    """How wide each column is, and which one, if any, stands above the others."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> None:
        self.numbers = {place for place, column in enumerate(columns) if column in numbers}
        self.widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        self.above: int | None = None
        self.gap = 2
        folding = [place for place, column in enumerate(columns) if column in FOLDED]
        self._fold(folding)
        if self.width > WIDTH and "key" in columns:
            self.above = columns.index("key")
            self.widths[self.above] = 0
        if self.width > WIDTH:
            self.gap = 1

    @property
    def width(self) -> int:
        return sum(each + self.gap for each in self.widths if each) - self.gap + 1

    def _fold(self, folding: Sequence[int]) -> None:
        """Narrow the widest of the columns that may be folded, until all fit or they would be too narrow."""
        while self.width > WIDTH and folding:
            widest = max(folding, key=self.widths.__getitem__)
            if self.widths[widest] <= NARROWEST:
                return
            self.widths[widest] -= 1

    def print(self, cells: Sequence[str]) -> None:
        folded = {
            place: textwrap.wrap(cell, self.widths[place], break_on_hyphens=False) or [""]
            for place, cell in enumerate(cells)
            if place != self.above
        }
        for number in range(max(map(len, folded.values()), default=0)):
            parts = []
            for place, lines in folded.items():
                part, width = lines[number] if number < len(lines) else "", self.widths[place]
                parts.append(part.rjust(width) if place in self.numbers else part.ljust(width))
            line((" " + (" " * self.gap).join(parts)).rstrip())


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
            done = report.accepted_count + report.dead_count + report.bulk_done_count
            lanes = [f"{name} {report.left[name]:,}" for name in report.left if report.left[name]]
            left = f"{', '.join(lanes)}: {span(report.seconds_left)}"
            bar.update(
                task, completed=done, total=done + report.pending_count - report.bulk_done_count, left=left
            )

        yield show


@contextmanager
def bytes_read(file: BinaryIO, size: int | None) -> Iterator[Callable[[object], None]]:
    """A bar on a terminal of how far a file is read, for each call of what is given; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, width=WIDTH), transient=True) as bar:
        task = bar.add_task("reading", total=size)
        yield lambda _: bar.update(task, completed=file.tell() if size else None)
