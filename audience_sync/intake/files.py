"""Import of calls from a file of any size: one JSON object a line (NDJSON), in UTF-8 or UTF-16, plain or gzip.

A line without a message id gets one that is derived from its bytes, so importing a file again adds nothing, and two
equal lines are one call. A second process may prepare the calls while this one stores them. Next: intake/__init__.py.
"""

import datetime as dt
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
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
from typing import Any, BinaryIO, NamedTuple, Self, cast

import msgspec

from audience_sync import intake, settings
from audience_sync.app import App
from audience_sync.calls.model import CallType, PreparedCall, Receipt
from audience_sync.calls.validation import MAX_CALL_BYTES, decode_json
from audience_sync.clock import SystemClock
from audience_sync.db import dialects, engines, rows
from audience_sync.errors import CallError, ConfigError
from audience_sync.settings import Settings

LINES_PER_PIECE = 10_000  # the most lines that are prepared and stored together
PIECE_BYTES = 8_000_000  # the most bytes of a piece's lines; prepared calls take a few times as much memory
# On SQLite a transaction stores several pieces, because its journal writes every changed page twice, and each piece
# changes the pages of the indexes by user. Other connections wait for the transaction, and the gap after it is long
# enough for them to try again. All pieces of a transaction are prepared before it begins.
LOCK_SECONDS, GAP_SECONDS, READ_AHEAD = 2, 0.12, 8
MAX_LINE_BYTES = 6 * MAX_CALL_BYTES  # an escape takes six bytes for one
HEAD_BYTES = 8192  # from which a file's encoding is detected
OLD = dt.timedelta(days=1)  # of an event: Userpilot counts events when they arrive
_GZIP, _BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
# Encodings by the first bytes of a file: a BOM, or the NULs around the first character, which is ASCII in JSON. The last
# entry is UTF-8 with lines that end with CR.
_ENCODINGS = {
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "utf-32",
    rb"\xff\xfe|\xfe\xff": "utf-16",
    rb"[^\0]\0\0\0": "utf-32-le",
    rb"\0\0\0[^\0]": "utf-32-be",
    rb"[^\0]\0": "utf-16-le",
    rb"\0[^\0]": "utf-16-be",
    rb"[^\r\n]*\r[^\n]": "utf-8",
}
_FORMATS = {
    rb"PK(\x03\x04|\x05\x06)": "a ZIP archive",
    rb"7z\xbc\xaf": "a 7-Zip archive",
    rb".{257}ustar": "a tar archive",
    _GZIP: "compressed with gzip twice",
    rb"BZh": "compressed with bzip2",
    rb"\xfd7zXZ": "compressed with xz",
    rb"\x28\xb5\x2f\xfd": "compressed with zstd",
    rb"\x04\x22\x4d\x18": "compressed with LZ4",
    rb"PAR1": "a Parquet file",
    rb"Obj\x01": "an Avro file",
    rb"ORC": "an ORC file",
    rb"%PDF": "a PDF file",
    rb"SQLite format": "an SQLite database",
}
_NDJSON = "import reads one JSON object a line (NDJSON), plain or gzip"
# The beginning of a batch, in which texts and numbers may come before the calls.
_BATCH = re.compile(rb'\{[^][{}]*"batch"\s*:\s*\[')
# The beginning of a line in the middle of a JSON object. A line that begins with { may be another call.
_CONTINUATION = re.compile(rb'[]"}:,0-9-]|(?:true|false|null)\b')
_SPAWN = multiprocessing.get_context("spawn")


class Line(NamedTuple):
    number: int  # from 1
    content: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int
    reason: str
    text: bytes  # its beginning


@dataclass(frozen=True, slots=True)
class Piece:
    """Prepared lines of a file."""

    calls: list[PreparedCall] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    accepted_count: int = 0
    ignored_count: int = 0
    kept_count: int = 0  # stored as history
    repeated_count: int = 0
    bad_count: int = 0
    old_event_count: int = 0  # of the accepted ones

    @property
    def line_count(self) -> int:
        counts = (
            self.accepted_count,
            self.ignored_count,
            self.kept_count,
            self.repeated_count,
            self.bad_count,
        )
        return sum(counts)

    def add(self, piece: "Piece", receipts: Sequence[Receipt]) -> None:
        old = rows.moment(SystemClock().now() - OLD)
        self.bad_count += len(piece.bad)
        for call, receipt in zip(piece.calls, receipts, strict=True):
            if receipt.is_repeat:
                self.repeated_count += 1
            elif receipt.ignored == intake.HISTORY:
                self.kept_count += 1
            elif receipt.ignored is not None:
                self.ignored_count += 1
            else:
                self.accepted_count += 1
                self.old_event_count += call.type == CallType.TRACK.value and call.timestamp < old


def decompressed(file: BinaryIO) -> BinaryIO:
    """Return a reader of the file's lines in UTF-8; gzip and the encoding are recognised by the first bytes.

    Raises ConfigError if the file has another format.
    """
    reader: Any = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast("Any", file))
    if reader.peek(2)[:2] == _GZIP:
        reader = gzip.GzipFile(fileobj=reader)
    try:
        head = reader.peek(HEAD_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        # A second attempt would continue after the header of gzip that was cut, and find an empty file.
        raise ConfigError(f"The file cannot be read: {error}. Nothing is imported.") from error
    for beginning, name in _FORMATS.items():
        if re.match(beginning, head, re.DOTALL):
            raise ConfigError(f"The file is {name}, but {_NDJSON}: convert it first. Nothing is imported.")
    for beginning, encoding in _ENCODINGS.items():
        if re.match(beginning, head):
            return cast("BinaryIO", _Recoded(reader, encoding))
    return cast("BinaryIO", reader)


class _Recoded:
    """Converts the lines of a file to UTF-8. They may end with CR, which no JSON text contains."""

    def __init__(self, file: Any, encoding: str) -> None:
        self._file = file
        self._errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
        self._text = io.TextIOWrapper(file, encoding, errors=self._errors)

    def readline(self, size: int) -> bytes:
        return self._text.readline(size).encode("utf-8", self._errors)

    def fileno(self) -> int:
        return int(self._file.fileno())


def import_calls(
    app: App,
    file: BinaryIO,
    on_bad: Callable[[BadLine], None],
    on_progress: Callable[[Summary], None] = lambda _: None,
    *,
    second_process: bool = False,
    keep_only: bool = False,
) -> Summary:
    """Store the call in each line; skip lines that are not valid calls, and report them to `on_bad`.

    `keep_only`: queue nothing. `second_process`: prepare the calls in a second process, which imports the main module
    again, so this is only for programs that allow that.

    Raises:
        ConfigError: the file cannot be read to its end; the lines before that are stored.
        DatabaseError: only committed lines are stored; importing again adds the others.

    """
    summary = Summary()
    read_errors: list[ConfigError] = []
    pieces = _pieces(_checked(_lines(file)), read_errors)
    may_wait = not _is_regular(file)
    lock_seconds, depth = 0, 2
    if dialects.is_sqlite(app.engine) and not may_wait:
        lock_seconds, depth = LOCK_SECONDS, READ_AHEAD
    begins_at = 0.0
    with Preparation(app.settings, second_process=second_process) as preparation:
        while preparation.read(pieces, 1 if may_wait and not summary.line_count else depth):
            bad: list[BadLine] = []
            piece = preparation.take()
            time.sleep(max(0, begins_at - time.monotonic()))
            ends_at = time.monotonic() + lock_seconds
            with engines.write(app.engine) as connection:
                while piece is not None:
                    bad += piece.bad
                    calls = [intake.as_history(call) for call in piece.calls] if keep_only else piece.calls
                    receipts = intake.save_within(connection, app, calls, user_by_user=True)
                    summary.add(piece, receipts)
                    piece = preparation.take(ends_at)
            begins_at = time.monotonic() + (GAP_SECONDS if lock_seconds else 0)
            for line in bad:  # after the transaction: `on_bad` may be slow
                on_bad(line)
            on_progress(summary)
    if read_errors:
        raise read_errors[0]
    return summary


class Preparation:
    """Prepares pieces in order, ahead of the caller.

    `second_process`: a child process prepares all pieces but the first, and ends with this process. A thread talks to it,
    so that it works on the next piece while the caller stores one.
    """

    def __init__(self, configured: Settings, *, second_process: bool) -> None:
        self._settings = configured
        self._uses_second_process = second_process
        self._count = 0
        self._pipe: Connection[Any, Any] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare", initializer=_block_interrupts)
        self._ahead: deque[Future[Piece]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._pipe is not None:
            self._pipe.close()  # this ends the child process

    def read(self, pieces: Iterator[list[Line]], depth: int) -> bool:
        """Read until this many pieces are being prepared; return False if none is left."""
        for piece in itertools.islice(pieces, max(0, depth - len(self._ahead))):
            prepare = (
                self._prepare_in_second_process
                if self._uses_second_process and self._count
                else self._prepare_here
            )
            self._ahead.append(self._thread.submit(prepare, piece))
            self._count += 1
        return bool(self._ahead)

    def take(self, until: float = math.inf) -> Piece | None:
        """Return the next piece; None if there is none, or if it is not ready by that time (monotonic clock)."""
        if not self._ahead or (seconds := until - time.monotonic()) <= 0:
            return None
        try:
            piece = self._ahead[0].result(None if seconds == math.inf else seconds)
        except TimeoutError:
            return None
        self._ahead.popleft()
        return piece

    def _prepare_here(self, lines: list[Line]) -> Piece:
        return prepare_lines(self._settings, lines)

    def _prepare_in_second_process(self, lines: list[Line]) -> Piece:
        """Have the second process prepare the piece; if it died, prepare it here."""
        if self._pipe is None:
            self._pipe, other = _SPAWN.Pipe()
            keys = {(each.kind, each.name): [each.key] for each in self._settings.definitions}
            process = _SPAWN.Process(target=_work, args=(other, self._settings.path, keys), daemon=True)
            process.start()
            other.close()
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(lines))
            return msgspec.msgpack.decode(self._pipe.recv_bytes(), type=Piece)
        except (EOFError, OSError):
            return self._prepare_here(lines)


def _block_interrupts() -> None:
    """Leave Ctrl-C to the main thread; the process that this thread starts inherits the mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _work(pipe: "Connection[Any, Any]", path: Path, keys: dict[tuple[str, str], list[str]]) -> None:
    configured = settings.with_stored_keys(settings.load(path, resolve_keys=False), keys)
    while True:
        try:
            lines = msgspec.msgpack.decode(pipe.recv_bytes(), type=list[Line])
            pipe.send_bytes(msgspec.msgpack.encode(prepare_lines(configured, lines)))
        except (EOFError, OSError):
            return


def prepare_lines(configured: Settings, lines: Sequence[Line]) -> Piece:
    piece = Piece()
    preparer = intake.Preparer(configured)
    received_at = SystemClock().now()
    for number, content in lines:
        try:
            piece.calls.append(preparer.prepare(_raw(content), received_at=received_at))
        except CallError as error:
            piece.bad.append(BadLine(number, str(error), content[:MAX_LINE_BYTES]))
    return piece


def _raw(content: bytes) -> Any:
    if len(content) > MAX_LINE_BYTES:
        raise CallError("the call is larger than 32 KB")
    raw = decode_json(content)
    if isinstance(raw, dict) and raw.get("messageId") is None:
        raw["messageId"] = f"audience-sync-{hashlib.sha256(content.strip()).hexdigest()[:40]}"
    return raw


def _pieces(lines: Iterator[Line], read_errors: list[ConfigError]) -> Iterator[list[Line]]:
    """Divide the lines into pieces; add an error that ends the file early to `read_errors`."""
    piece: list[Line] = []
    size = 0
    try:
        for line in lines:
            piece.append(line)
            size += len(line.content)
            if len(piece) == LINES_PER_PIECE or size >= PIECE_BYTES:
                yield piece
                piece, size = [], 0
    except ConfigError as error:
        read_errors.append(error)
    if piece:
        yield piece


def _lines(file: BinaryIO) -> Iterator[Line]:
    """Yield the lines that are not blank. Overlong lines are cut, but stay too long to be accepted."""
    number = 0
    try:
        while content := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = content
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            content = content.removeprefix(_BOM)
            if content.strip():
                yield Line(number, content)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The file cannot be read after line {number}: {error}. The lines before are imported."
        ) from error


def _checked(lines: Iterator[Line]) -> Iterator[Line]:
    """Yield the lines. Raises ConfigError if the first lines show JSON other than one object a line."""
    beginning = list(itertools.islice(lines, 1))
    first = beginning[0].content.strip() if beginning else b""
    second = b""
    if first.startswith(b"{") and not _is_json(first):
        beginning += itertools.islice(lines, 1)
        second = beginning[-1].content.strip() if len(beginning) > 1 else b""
    if problem := _other_json(first, second):
        description, command = problem
        raise ConfigError(
            f"The file {description}, but {_NDJSON}. Convert it: {command}. Nothing is imported."
        )
    yield from beginning
    yield from lines


def _other_json(first: bytes, second: bytes) -> tuple[str, str] | None:
    """Return what the first lines show, and a command that converts the file; None if they may be one object a line.

    `second` is empty if the first line is a JSON object.
    """
    if first.startswith(b"["):
        return "is a JSON array", "jq -c '.[]' FILE"
    if _is_batch(first, second):
        return "is a batch", "jq -c '.batch[]' FILE"
    if _CONTINUATION.match(second):
        return "has JSON objects that span several lines", "jq -c . FILE"
    if first.startswith(b"{"):
        rest = _after_object(first)
        if rest.startswith("{"):
            return "has several JSON objects in a line", "jq -c . FILE"
        if rest == ",":
            return "has commas between JSON objects", "sed 's/,[[:space:]]*$//' FILE"
    return None


def _is_batch(first: bytes, second: bytes) -> bool:
    try:
        document = decode_json(first)
    except CallError:  # it spans several lines, or was cut
        return _BATCH.match(first + second) is not None
    return isinstance(document, dict) and isinstance(document.get("batch"), list) and "type" not in document


def _after_object(line: bytes) -> str:
    """Return what follows the JSON value at the beginning of a line; nothing if there is no such value."""
    text = line.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    return text[end:].strip()


def _is_json(content: bytes) -> bool:
    try:
        decode_json(content)
    except CallError:
        return False
    return True


def _is_regular(file: BinaryIO) -> bool:
    """Return whether reading never waits. A pipe may be silent for an hour, while no transaction may be open."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:
        return False
