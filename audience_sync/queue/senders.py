"""A few threads that send. What they bring back is taken in by the one thread that decides."""

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

SIGNAL_POLL_SECONDS = 0.2  # the longest wait, so that a signal is seen
TOGETHER_SECONDS = 0.003  # between two answers that are taken in at once: a transaction costs more than that
Brought = TypeVar("Brought")


class Senders(Generic[Brought]):
    """`start` gives a thread something to do, `collect` takes what was brought back since."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="send")
        self._brought: queue.SimpleQueue[Brought] = queue.SimpleQueue()
        self._out = 0  # errands that are not collected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, errand: Callable[[], Brought]) -> None:
        """Run it, which must not raise, in a thread."""
        self._out += 1
        self._pool.submit(lambda: self._brought.put(errand()))

    def collect(self, seconds: float) -> list[Brought]:
        """All that is there; while nothing is, wait for the first, a fifth of a second at most, and those close behind."""
        brought = list(self._rest())
        if not brought and seconds > 0:
            with contextlib.suppress(queue.Empty):
                brought.append(self._brought.get(timeout=min(seconds, SIGNAL_POLL_SECONDS)))
                while len(brought) < self._out:
                    brought.append(self._brought.get(timeout=TOGETHER_SECONDS))
        self._out -= len(brought)
        return brought

    def _rest(self) -> Iterator[Brought]:
        while not self._brought.empty():
            yield self._brought.get()
