"""How a process is asked to end: its threads look at an event, and what they wait for is interrupted."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop(threading.Event):
    """An event that also interrupts, when it is set, what was named to it at that moment."""

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
        """Call `interrupt`, from whatever thread asks for the end, if that happens meanwhile."""
        with self._lock:
            self._interrupts.append(interrupt)
            if self.is_set():
                interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._interrupts.remove(interrupt)
