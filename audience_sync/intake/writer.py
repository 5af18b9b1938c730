"""Calls of many callers in one transaction: while one is committed, the next ones gather.

A commit costs the same for one call as for a thousand, so the door keeps its pace under load, and a single call
waits for two commits at most.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from audience_sync import intake
from audience_sync.app import App
from audience_sync.calls.records import PreparedCall
from audience_sync.errors import DatabaseError

MOST_CALLS = 2_500  # in a transaction, if more than one batch is waiting


@dataclass(slots=True)
class _Batch:
    calls: Sequence[PreparedCall]
    future: "Future[list[intake.Receipt]]" = field(default_factory=Future)


class Writer:
    """A thread that commits what is handed to `accept`, in order; at the end of `with` all of it is committed."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._count, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="calls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting_count(self) -> int:
        """How many calls are not yet being committed."""
        return self._count

    def accept(self, calls: Sequence[PreparedCall]) -> "Future[list[intake.Receipt]]":
        """The receipts, once the calls are committed; or what kept them from that, and then none of them is."""
        batch = _Batch(calls)
        batch.future.set_running_or_notify_cancel()  # who no longer waits for it cannot undo it
        with self._lock:
            self._count += len(calls)
        self._waiting.put(batch)
        return batch.future

    def _work(self) -> None:
        is_ending = False
        while not is_ending:
            batches, is_ending = self._next()
            trouble = self._commit(batches) if batches else None
            if trouble is None:
                continue
            may_part = len(batches) > 1 and not _is_everybodys(trouble)
            for batch in batches:  # one of them may be the trouble: the others need not suffer
                own = self._commit([batch]) if may_part else trouble
                if own is not None:
                    batch.future.set_exception(own)

    def _next(self) -> tuple[list[_Batch], bool]:
        """What is waiting, at least one; and whether that was the last."""
        batches: list[_Batch] = []
        count = 0
        while count < MOST_CALLS:
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
        """What kept them from being committed."""
        try:
            receipts = intake.save(self._app, [call for batch in batches for call in batch.calls])
        except Exception as error:  # noqa: BLE001  (whatever it is, who waits must hear of it)
            return error
        start = 0
        for batch in batches:
            batch.future.set_result(receipts[start : start + len(batch.calls)])
            start += len(batch.calls)
        return None


def _is_everybodys(error: Exception) -> bool:
    """A database that cannot be used is not asked again for each batch, a busy time for each."""
    return isinstance(error, DatabaseError) and isinstance(error.__cause__, sa.exc.OperationalError)
