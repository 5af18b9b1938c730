"""Faults on demand: which requests they strike, and what becomes of those."""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(slots=True)
class Fault:
    name: str
    path: str | None = None  # exact; with a final * by its beginning
    user_id: str | None = None
    after: int = 0  # matching requests that pass first
    times: int | None = None  # None: until it is cleared
    status: int | None = None
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    delay_after_seconds: float = 0.0
    drop: Literal["before", "after"] | None = None
    garbage: bool = False
    apply: bool = False
    matched: int = 0
    struck: int = 0

    @property
    def applies(self) -> bool:
        return self.drop != "before" and (self.status is None or self.apply)

    def matches(self, path: str, user_id: str | None) -> bool:
        if self.user_id is not None and self.user_id != user_id:
            return False
        if self.path is not None and self.path.endswith("*"):
            return path.startswith(self.path[:-1])
        return self.path in (None, path)


class Faults:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._added = 0

    def add(self, body: Any) -> dict[str, Any]:
        """Raises ValueError, naming the members that are wrong."""
        _check(body)
        with self._lock:
            self._added += 1
            fault = Fault(**({"name": f"fault-{self._added}"} | body))
            self._faults.append(fault)
            return asdict(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def list(self) -> list[dict[str, Any]]:
        with self._lock:
            return [asdict(fault) for fault in self._faults]

    def take(self, path: str, user_id: str | None) -> Fault | None:
        """The first fault, in the order added, that strikes this request; those behind it do not see it."""
        with self._lock:
            for fault in self._faults:
                spent = fault.times is not None and fault.struck >= fault.times
                if spent or not fault.matches(path, user_id):
                    continue
                fault.matched += 1
                if fault.matched > fault.after:
                    fault.struck += 1
                    return fault
            return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and _number(value)


def _headers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


_MEMBERS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "path": lambda value: isinstance(value, str) and value.startswith("/"),
    "user_id": lambda value: isinstance(value, str),
    "after": _whole,
    "times": lambda value: _whole(value) and value > 0,
    "status": lambda value: _whole(value) and 200 <= value <= 599,
    "body": lambda _value: True,
    "headers": _headers,
    "delay_seconds": _number,
    "delay_after_seconds": _number,
    "drop": lambda value: value in ("before", "after"),
    "garbage": lambda value: isinstance(value, bool),
    "apply": lambda value: isinstance(value, bool),
}
_EFFECTS = {"status", "delay_seconds", "delay_after_seconds", "drop", "garbage"}


def _check(body: Any) -> None:
    if not isinstance(body, dict):
        raise ValueError("a fault is a JSON object")  # noqa: TRY004 (all refusals are one kind)
    if unknown := sorted(body.keys() - _MEMBERS.keys()):
        raise ValueError(f"unknown members: {', '.join(unknown)}; known: {', '.join(_MEMBERS)}")
    if wrong := [name for name, value in body.items() if not _MEMBERS[name](value)]:
        raise ValueError(f"wrong values: {', '.join(wrong)}")
    if not body.keys() & _EFFECTS:
        raise ValueError(f"an effect is needed: one of {', '.join(sorted(_EFFECTS))}")
    if len(body.keys() & {"status", "drop", "garbage"}) > 1:
        raise ValueError("only one of status, drop, garbage can be")
    if "status" not in body and (stray := sorted(body.keys() & {"body", "headers", "apply"})):
        raise ValueError(f"these need a status: {', '.join(stray)}")
