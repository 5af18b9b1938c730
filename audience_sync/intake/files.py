"""The door for files: one call a line (NDJSON), plain or gzip, as long as the disk is.

A line without a message id gets one made of its bytes: a file that is imported again adds nothing, and two equal
lines are one call.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import msgspec

from audience_sync import intake
from audience_sync.app import App
from audience_sync.calls.model import Call
from audience_sync.calls.validation import MAX_CALL_BYTES
from audience_sync.errors import CallError, ConfigError
from audience_sync.intake.writer import Writer

PIECE = 1_000  # calls in a transaction
MOST_PIECES = 3  # read ahead of the one that is being committed
LONGEST_LINE = 2 * MAX_CALL_BYTES  # with white space, or escapes that shorten
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int  # from 1
    reason: str
    text: bytes  # its beginning


@dataclass(slots=True)
class Summary:
    accepted_count: int = 0
    ignored_count: int = 0
    repeated_count: int = 0
    bad_count: int = 0

    @property
    def line_count(self) -> int:
        return self.accepted_count + self.ignored_count + self.repeated_count + self.bad_count

    def add(self, receipts: list[intake.Receipt]) -> None:
        for receipt in receipts:
            if receipt.is_repeat:
                self.repeated_count += 1
            elif receipt.ignored:
                self.ignored_count += 1
            else:
                self.accepted_count += 1


def unpacked(file: BinaryIO) -> BinaryIO:
    """The file's lines, whether it is gzip or not: its first bytes tell."""
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast("Any", file))
    if buffered.peek(2)[:2] == _GZIP:
        return cast("BinaryIO", gzip.GzipFile(fileobj=buffered))
    return buffered


def take_in(
    app: App,
    lines: BinaryIO,
    on_bad: Callable[[BadLine], None],
    on_progress: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Hand in a call for each line; what is no valid call is told to `on_bad`, and left out.

    Raises:
        ConfigError: the file cannot be read to its end; what was read before is in.
        DatabaseError: what was committed before is in; importing again adds the rest.

    """
    summary = Summary()
    under_way: deque[Future[list[intake.Receipt]]] = deque()

    def settle(most: int) -> None:
        while len(under_way) > most:
            summary.add(under_way.popleft().result())
            on_progress(summary)

    trouble: ConfigError | None = None
    with Writer(app) as writer:
        piece: list[Call] = []
        try:
            for number, line in _lines(lines):
                try:
                    piece.append(_call(app, line))
                except CallError as error:
                    summary.bad_count += 1
                    on_bad(BadLine(number, str(error), line[:LONGEST_LINE]))
                if len(piece) == PIECE:
                    under_way.append(writer.accept(piece))
                    piece = []
                    settle(MOST_PIECES)
        except ConfigError as error:
            trouble = error
        if piece:
            under_way.append(writer.accept(piece))
        settle(0)
    if trouble is not None:
        raise trouble
    return summary


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers; of one that is too long a beginning that is still too long."""
    number = 0
    try:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            rest = line
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE + 1)
            if line.strip():
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"The file cannot be read after line {number}: {error}. What stands before that is handed in."
        ) from error


def _call(app: App, line: bytes) -> Call:
    if len(line) > LONGEST_LINE:
        raise CallError("the call is larger than 32 KB")
    raw = decoded(line)
    if isinstance(raw, dict) and raw.get("messageId") is None:
        raw["messageId"] = f"audience-sync-{hashlib.sha256(line.strip()).hexdigest()[:40]}"
    return intake.parse(raw, received_at=app.clock.now())


def decoded(text: bytes) -> Any:
    """A JSON document; CallError for what is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        return json.loads(
            text
        )  # it takes what msgspec does not (lone surrogates, NaN), and validation says what it is
    except (ValueError, RecursionError):
        raise CallError("not JSON") from None
