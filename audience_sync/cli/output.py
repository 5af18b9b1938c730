"""Output for people and programs: tables, progress bars and JSON documents.

If the reader closes the pipe (`| head`), neither the work nor its exit code changes.
"""

import contextlib
import datetime as dt
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from audience_sync.clock import duration, isoformat

if TYPE_CHECKING:
    from audience_sync.queue.progress import Report

MIN_WIDTH = 40
NARROWEST = 16  # of a column that is folded


def line(text: str = "") -> None:
    with _reader_may_leave():
        print(text)  # noqa: T201


def warn(text: str) -> None:
    """Print a line to standard error."""
    with contextlib.suppress(OSError):  # a full disk, or a terminal that is gone
        print(text, file=sys.stderr)  # noqa: T201


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _silence(sys.stdout)


@contextmanager
def streams() -> Iterator[None]:
    """Open standard streams that are closed, and flush standard output at the end.

    Raises:
        OSError: output could not be written.

    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # otherwise the next file that is opened gets its descriptor
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    try:
        yield
    finally:
        with _reader_may_leave():
            sys.stdout.flush()


def drop_output() -> None:
    """Drop output that cannot be written: the interpreter would try again at exit, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def document(value: Any) -> None:
    """Print a value as JSON."""
    line(json.dumps(value, indent=2, ensure_ascii=False, default=_encode))


def documents(values: Iterable[Any]) -> None:
    """Print a list as one JSON document, as `document` does, with one value in memory."""
    start = "["
    for value in values:
        line(start)
        text = json.dumps(value, indent=2, ensure_ascii=False, default=_encode).replace("\n", "\n  ")
        with _reader_may_leave():
            print(f"  {text}", end="")  # noqa: T201
        start = ","
    line("[]" if start == "[" else "\n]")


def _encode(value: Any) -> str:
    if isinstance(value, dt.datetime):
        return isoformat(value)
    raise TypeError(type(value).__name__)


def moment(value: dt.datetime | None) -> str:
    """Return a time in UTC, to the minute."""
    return f"{value.astimezone(dt.UTC):%Y-%m-%d %H:%M}" if value else ""


def count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def plural(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: 1 row, 2,000 rows."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def some(texts: Sequence[str], most: int) -> str:
    """Return the first texts, and the number of the others."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table that fits the terminal (80 columns without one), without cutting anything off; nothing without rows.

    `numbers` names the columns that are aligned to the right. Long texts are folded. If that is not enough, the key is
    printed on a separate line above the rest of its row.
    """
    if not rows:
        return
    width = _terminal_width()
    layout = _layout(columns, rows, numbers, width)
    line()
    layout.print(columns)
    line(" " + "─" * (layout.width - 1))
    for row in rows:
        layout.print(row)
    line()
    if layout.is_folded:
        line("Some values are folded to fit: a wider terminal or --json shows them whole.")


def _terminal_width() -> int:
    return max(shutil.get_terminal_size().columns, MIN_WIDTH)


class _Layout:
    """The columns' widths, the gap between them, and the column that is printed above the others, if any."""

    def __init__(self, widths: list[int], numbers: set[int], gap: int, above: int | None) -> None:
        self.widths, self.numbers, self.gap, self.above = widths, numbers, gap, above
        self.is_folded = above is not None

    @property
    def width(self) -> int:
        shown = [width for column, width in enumerate(self.widths) if column != self.above]
        return sum(shown) + self.gap * (len(shown) - 1) + 1

    def fold(self, width: int, key: int | None) -> None:
        """Narrow the widest text column, except the key, until all fit or none can be narrowed further."""
        texts = [column for column in range(len(self.widths)) if column not in {key, *self.numbers}]
        while self.width > width and texts:
            widest = max(texts, key=self.widths.__getitem__)
            if self.widths[widest] <= NARROWEST:
                return
            self.widths[widest] -= 1

    def print(self, cells: Sequence[str]) -> None:
        if self.above is not None:
            for part in wrap(cells[self.above], _terminal_width() - 1):
                line(f" {part}")
        shown = [column for column in range(len(cells)) if column != self.above]
        folded = {column: wrap(cells[column], self.widths[column]) for column in shown}
        height = max(map(len, folded.values()), default=0)
        self.is_folded |= height > 1
        for number in range(height):
            parts = []
            for column, lines in folded.items():
                part = lines[number] if number < len(lines) else ""
                align = part.rjust if column in self.numbers else part.ljust
                parts.append(align(self.widths[column]))
            line((" " + (" " * self.gap).join(parts)).rstrip())


def _layout(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str], width: int
) -> _Layout:
    """Return the first of four layouts that fits, else the narrowest: wide or narrow gaps, the key beside or above."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    right = {column for column, name in enumerate(columns) if name in numbers}
    key = columns.index("key") if "key" in columns else None
    for above in (None, key):
        for gap in (2, 1):
            layout = _Layout(list(widths), right, gap, above)
            layout.fold(width, key)
            if layout.width <= width:
                return layout
    return layout


def wrap(text: str, width: int) -> list[str]:
    """Break a text at spaces; a word that is too long after its underscores, or anywhere where it has none."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
            continue
        rest = word
        while len(rest) > width:
            cut = rest.rfind("_", 0, width) + 1 or width
            lines.append(rest[:cut])
            rest = rest[cut:]
        lines.append(rest)
    return lines or [""]


@contextmanager
def progress() -> Iterator[Callable[["Report"], None]]:
    """Show the progress of a delivery on a terminal; yield a function that shows a report."""
    with _bar("delivering", None, "MofNCompleteColumn") as update:

        def show(report: "Report") -> None:
            if update is None:
                return
            done = report.accepted_count + report.dead_count + report.bulk_done_count
            total = done + report.pending_count - report.bulk_done_count
            lanes = [f"{name} {report.left[name]:,}" for name in report.left if report.left[name]]
            update(completed=done, total=total, left=f"{', '.join(lanes)}: {duration(report.seconds_left)}")

        yield show


@contextmanager
def bytes_read(file: BinaryIO, size: int | None) -> Iterator[Callable[[object], None]]:
    """Show on a terminal how much of a file has been read; yield a function to call after each piece."""
    with _bar("reading", size, "DownloadColumn", "TimeRemainingColumn") as update:

        def show(_: object) -> None:
            if update is not None and size:
                update(completed=file.tell())

        yield show


@contextmanager
def _bar(name: str, total: int | None, *columns: str) -> Iterator[Callable[..., None] | None]:
    """Show a progress bar with these columns of rich; yield its update function, or None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    import rich.console  # noqa: PLC0415  (slow to import)
    import rich.progress  # noqa: PLC0415

    console = rich.console.Console(stderr=True, width=_terminal_width())
    more = [getattr(rich.progress, column)() for column in columns]
    left = rich.progress.TextColumn("{task.fields[left]}")
    with rich.progress.Progress(
        name, rich.progress.BarColumn(), *more, left, console=console, transient=True
    ) as bar:
        task = bar.add_task(name, total=total, left="")
        yield lambda **values: bar.update(task, **values)
