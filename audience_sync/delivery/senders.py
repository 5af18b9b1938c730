"""A few threads that send. What they bring back is taken in by the one thread that decides."""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

LOOK_SECONDS = 0.2  # the longest wait, so that a signal is seen
Brought = TypeVar("Brought")


class Senders(Generic[Brought]):
    """`start` gives a thread something to do, `collect` takes what was brought back since."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="send")
        self._brought: queue.SimpleQueue[Brought] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, errand: Callable[[], Brought]) -> None:
        """Run it, which must not raise, in a thread."""
        self._pool.submit(lambda: self._brought.put(errand()))

    def collect(self, seconds: float) -> list[Brought]:
        """All that is there; while nothing is, wait for the first, a fifth of a second at most."""
        if self._brought.empty() and seconds > 0:
            try:
                return [self._brought.get(timeout=min(seconds, LOOK_SECONDS)), *self._rest()]
            except queue.Empty:
                return []
        return list(self._rest())

    def _rest(self) -> Iterator[Brought]:
        while not self._brought.empty():
            yield self._brought.get()
