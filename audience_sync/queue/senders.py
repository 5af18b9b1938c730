"""A few threads that send requests; the thread that decides collects their replies."""

import contextlib
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

SIGNAL_POLL_SECONDS = 0.2  # the longest wait, so that signals are handled
BATCH_SECONDS = 0.003  # replies this close together are collected together: a transaction takes longer
ReplyT = TypeVar("ReplyT")


class Senders(Generic[ReplyT]):
    """`start` gives a thread a request to send; `collect` returns the replies since then."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="send")
        self._replies: queue.SimpleQueue[ReplyT] = queue.SimpleQueue()
        self._open = 0  # requests whose reply is not collected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, send: Callable[[], ReplyT]) -> None:
        """Call `send`, which must not raise, in a thread."""
        self._open += 1
        self._pool.submit(lambda: self._replies.put(send()))

    def collect(self, seconds: float) -> list[ReplyT]:
        """Return the replies so far; if there are none, wait up to 0.2 s for one and any that follow closely."""
        replies = []
        while not self._replies.empty():
            replies.append(self._replies.get())
        if not replies and seconds > 0:
            with contextlib.suppress(queue.Empty):
                replies.append(self._replies.get(timeout=min(seconds, SIGNAL_POLL_SECONDS)))
                while len(replies) < self._open:
                    replies.append(self._replies.get(timeout=BATCH_SECONDS))
        self._open -= len(replies)
        return replies
