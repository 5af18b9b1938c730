"""The stop request of a process, which ends its threads and interrupts what they wait for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop(threading.Event):
    """An event that also calls the registered interrupts when it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._interrupts: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def set(self) -> None:
        super().set()
        with self._lock:
            for interrupt in self._interrupts:
                interrupt()

    @contextmanager
    def interrupting(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """Call `interrupt`, from any thread, if the event is set before or during the block."""
        with self._lock:
            self._interrupts.append(interrupt)
            if self.is_set():
                interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._interrupts.remove(interrupt)
