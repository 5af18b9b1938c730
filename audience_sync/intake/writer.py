"""The writer commits the calls of many requests in one transaction, while the next calls are collected.

A commit takes about as long for one call as for a thousand. So throughput rises with the load, and a call waits for
at most two commits. Next: `save` in intake/__init__.py.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import sqlalchemy as sa

from audience_sync import intake
from audience_sync.app import App
from audience_sync.calls.model import PreparedCall, Receipt
from audience_sync.errors import DatabaseError

MAX_CALLS = 2_500  # in a transaction with more than one batch


@dataclass(slots=True)
class _Batch:
    calls: Sequence[PreparedCall]
    future: "Future[list[Receipt]]" = field(default_factory=Future)


class Writer:
    """A thread that commits batches in the order of `submit`; leaving the `with` block waits for all of them."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()  # None: the end
        self._count, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="calls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting_count(self) -> int:
        """Number of calls whose commit has not begun."""
        return self._count

    def submit(self, calls: Sequence[PreparedCall]) -> "Future[list[Receipt]]":
        """Queue a batch; its future gets the receipts when all calls are committed, or the error if none are."""
        batch = _Batch(calls)
        batch.future.set_running_or_notify_cancel()  # from now on the caller cannot cancel it
        with self._lock:
            self._count += len(calls)
        self._waiting.put(batch)
        return batch.future

    def _work(self) -> None:
        is_ending = False
        while not is_ending:
            batches, is_ending = self._next()
            error = self._commit(batches) if batches else None
            if error is None:
                continue
            is_divisible = len(batches) > 1 and not _is_unavailable(error)
            for batch in batches:  # only one of them may be at fault
                batch_error = self._commit([batch]) if is_divisible else error
                if batch_error is not None:
                    batch.future.set_exception(batch_error)

    def _next(self) -> tuple[list[_Batch], bool]:
        """Wait for a batch, then take all that are queued; the flag says whether the end follows."""
        batches: list[_Batch] = []
        count = 0
        while count < MAX_CALLS:
            try:
                batch = self._waiting.get(block=not batches)
            except queue.Empty:
                break
            if batch is None:
                return batches, True
            batches.append(batch)
            count += len(batch.calls)
            with self._lock:
                self._count -= len(batch.calls)
        return batches, False

    def _commit(self, batches: Sequence[_Batch]) -> Exception | None:
        """Commit the batches in one transaction; return the error if that fails."""
        try:
            receipts = intake.save(self._app, [call for batch in batches for call in batch.calls])
        except Exception as error:  # noqa: BLE001  (any error belongs to the callers who wait)
            return error
        start = 0
        for batch in batches:
            batch.future.set_result(receipts[start : start + len(batch.calls)])
            start += len(batch.calls)
        return None


def _is_unavailable(error: Exception) -> bool:
    """Return whether every batch would fail, so that trying each one is pointless."""
    return isinstance(error, DatabaseError) and isinstance(error.__cause__, sa.exc.OperationalError)
