"""The door for files: one call a line (NDJSON), plain or gzip, as long as the disk is.

A line without a message id gets one made of its bytes: a file that is imported again adds nothing, and two equal
lines are one call. A file of more than one piece is made into calls by a process of its own, while this one keeps
what is ready: two cores share the work.
"""

import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import msgspec

from audience_sync import intake, settings
from audience_sync.app import App
from audience_sync.calls.records import PreparedCall, SavedCall
from audience_sync.calls.validation import MAX_CALL_BYTES
from audience_sync.clock import SystemClock
from audience_sync.db import dialects
from audience_sync.errors import CallError, ConfigError
from audience_sync.settings import Settings

LINES_PER_PIECE = 10_000  # lines that are made ready, and kept, together
PIECE_BYTES = 8_000_000  # of them, at most: what is held of a line is a few times as much
# On SQLite a transaction takes several pieces: its journal writes each page that is touched twice, and the pages of the
# indexes by user are touched by every piece. Others wait for it; after it they have the time in which those ask again,
# and it is used to read as many pieces as a transaction may take: while it is open, nothing is waited for.
LOCK_SECONDS, GAP_SECONDS, READ_AHEAD = 2, 0.12, 8
LONGEST_LINE = 6 * MAX_CALL_BYTES  # with escapes: six bytes may stand for one
_GZIP = b"\x1f\x8b"
_SPAWN = multiprocessing.get_context("spawn")

Line = tuple[int, bytes]  # its number, from 1


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int
    reason: str
    text: bytes  # its beginning


@dataclass(frozen=True, slots=True)
class Piece:
    calls: list[PreparedCall] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    accepted_count: int = 0
    ignored_count: int = 0
    repeated_count: int = 0
    bad_count: int = 0

    @property
    def line_count(self) -> int:
        return self.accepted_count + self.ignored_count + self.repeated_count + self.bad_count

    def add(self, bad: Sequence[BadLine], kept: Sequence[SavedCall]) -> None:
        repeated_count = sum(each.is_repeat for each in kept)
        ignored_count = sum(each.ignored is not None for each in kept)
        self.bad_count += len(bad)
        self.repeated_count += repeated_count
        self.ignored_count += ignored_count
        self.accepted_count += len(kept) - repeated_count - ignored_count


def unpacked(file: BinaryIO) -> BinaryIO:
    """The file's lines, whether it is gzip or not: its first bytes tell."""
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast("Any", file))
    if buffered.peek(2)[:2] == _GZIP:
        return cast("BinaryIO", gzip.GzipFile(fileobj=buffered))
    return buffered


def take_in(
    app: App,
    file: BinaryIO,
    on_bad: Callable[[BadLine], None],
    on_progress: Callable[[Summary], None] = lambda _: None,
    *,
    beside: bool = False,
) -> Summary:
    """Hand in a call for each line; what is no valid call is told to `on_bad`, and left out.

    `beside`: with a process of its own for half of the work, which imports the main module once more: only for a
    program whose main module may be imported.

    Raises:
        ConfigError: the file cannot be read to its end; what was read before is in.
        DatabaseError: what was committed before is in; importing again adds the rest.

    """
    summary = Summary()
    trouble: list[ConfigError] = []
    pieces = _pieces(_lines(file), trouble)
    waits = not _never_waits(file)
    longest, depth = 0, 2
    if dialects.is_sqlite(app.engine) and not waits:
        longest, depth = LOCK_SECONDS, READ_AHEAD
    begins_at = 0.0
    with Preparer(app.settings, beside=beside) as preparer:
        while preparer.read(pieces, 1 if waits and not summary.line_count else depth):
            bad: list[BadLine] = []
            piece = preparer.take()
            time.sleep(max(0, begins_at - time.monotonic()))
            ends_at = time.monotonic() + longest
            with intake.saving(app, user_by_user=True) as keep:
                while piece is not None:
                    bad += piece.bad
                    summary.add(piece.bad, keep(piece.calls))
                    piece = preparer.take(ends_at)
            begins_at = time.monotonic() + (GAP_SECONDS if longest else 0)
            for each in bad:  # whoever takes them may take his time: nothing is locked now
                on_bad(each)
            on_progress(summary)
    if trouble:
        raise trouble[0]
    return summary


class Preparer:
    """Makes pieces ready in their order, ahead of who takes them.

    `beside`: all but the first in a process that ends with this one. A thread speaks with it, so that it has the next
    piece while this one is kept.
    """

    def __init__(self, configured: Settings, *, beside: bool) -> None:
        self._settings = configured
        self._beside = beside
        self._count = 0
        self._pipe: Connection[Any, Any] | None = None
        self._speaker = ThreadPoolExecutor(1, thread_name_prefix="prepare", initializer=_leave_interrupts)
        self._ahead: deque[Future[Piece]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._speaker.shutdown(cancel_futures=True)
        if self._pipe is not None:
            self._pipe.close()  # which ends the process

    def read(self, pieces: Iterator[list[Line]], depth: int) -> bool:
        """Read until so many pieces are under way; False where none is left."""
        for piece in itertools.islice(pieces, max(0, depth - len(self._ahead))):
            where = self._elsewhere if self._beside and self._count else self._here
            self._ahead.append(self._speaker.submit(where, piece))
            self._count += 1
        return bool(self._ahead)

    def take(self, until: float = math.inf) -> Piece | None:
        """The next piece, if one was read and is ready before that moment (of the monotonic clock)."""
        if not self._ahead or (seconds := until - time.monotonic()) <= 0:
            return None
        try:
            piece = self._ahead[0].result(None if seconds == math.inf else seconds)
        except TimeoutError:
            return None
        self._ahead.popleft()
        return piece

    def _here(self, piece: list[Line]) -> Piece:
        return prepare(self._settings, piece)

    def _elsewhere(self, piece: list[Line]) -> Piece:
        """What the process made of the piece; where it died, it is made here."""
        if self._pipe is None:
            self._pipe, other = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_work, args=(other, self._settings.path), daemon=True)
            process.start()
            other.close()
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(piece))
            return msgspec.msgpack.decode(self._pipe.recv_bytes(), type=Piece)
        except (EOFError, OSError):
            return self._here(piece)


def _leave_interrupts() -> None:
    """Ctrl-C is for the main thread; a process that is started by this one inherits that, and is silent about it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _work(pipe: "Connection[Any, Any]", path: Path) -> None:
    configured = settings.load(path)
    while True:
        try:
            lines = msgspec.msgpack.decode(pipe.recv_bytes(), type=list[Line])
            pipe.send_bytes(msgspec.msgpack.encode(prepare(configured, lines)))
        except (EOFError, OSError):
            return


def prepare(configured: Settings, lines: Sequence[Line]) -> Piece:
    calls, bad = [], []
    received_at = SystemClock().now()
    for number, line in lines:
        try:
            calls.append(intake.parse(_raw(line), received_at=received_at))
        except CallError as error:
            bad.append(BadLine(number, str(error), line[:LONGEST_LINE]))
    return Piece(intake.prepare(configured, calls), bad)


def _raw(line: bytes) -> Any:
    if len(line) > LONGEST_LINE:
        raise CallError("the call is larger than 32 KB")
    raw = decoded(line)
    if isinstance(raw, dict) and raw.get("messageId") is None:
        raw["messageId"] = f"audience-sync-{hashlib.sha256(line.strip()).hexdigest()[:40]}"
    return raw


def _pieces(lines: Iterator[Line], trouble: list[ConfigError]) -> Iterator[list[Line]]:
    """The lines, so many together; where they end early, `trouble` says why."""
    piece: list[Line] = []
    size = 0
    try:
        for line in lines:
            piece.append(line)
            size += len(line[1])
            if len(piece) == LINES_PER_PIECE or size >= PIECE_BYTES:
                yield piece
                piece, size = [], 0
    except ConfigError as error:
        trouble.append(error)
    if piece:
        yield piece


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


def _never_waits(file: BinaryIO) -> bool:
    """Whether its lines are there: a pipe may be silent for an hour, in which no transaction may be open."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:
        return False


def decoded(text: bytes) -> Any:
    """A JSON document; CallError for what is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(text)  # it takes lone surrogates and NaN, too, and validation names them
    except (ValueError, RecursionError):
        raise CallError("not JSON") from None
