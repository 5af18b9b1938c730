"""Faults on demand: which requests they strike, and what becomes of those."""

import threading
from typing import Annotated, Any, Literal

import msgspec

_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: Annotated[str, msgspec.Meta(pattern="^/")] = "*"  # exact; with a final * by its beginning
    user_id: str | None = None
    after: Annotated[int, msgspec.Meta(ge=0)] = 0  # matching requests that pass first
    every: Annotated[int, msgspec.Meta(ge=1)] = 1  # of those that follow, each one, or each nth
    times: Annotated[int, msgspec.Meta(ge=1)] | None = None  # None: until it is cleared
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] | None = None
    body: Any = None
    headers: dict[str, str] = {}
    delay_seconds: _Seconds = 0.0
    delay_after_seconds: _Seconds = 0.0
    drop: Literal["before", "after"] | None = None
    garbage: bool = False
    apply: bool = False


class Fault(_Asked):
    matched: int = 0
    struck: int = 0

    @property
    def applies(self) -> bool:
        return self.drop != "before" and (self.status is None or self.apply)

    def strikes(self, path: str, user_id: str | None) -> bool:
        matches = path.startswith(self.path[:-1]) if self.path.endswith("*") else path == self.path
        if self.struck == self.times or self.user_id not in (None, user_id) or not matches:
            return False
        self.matched += 1
        late = self.matched - self.after
        strikes = late > 0 and late % self.every == 0
        self.struck += strikes
        return strikes


class Faults:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._added = 0

    def add(self, body: Any) -> dict[str, Any]:
        """Raises ValueError, naming the member that is wrong."""
        with self._lock:
            asked = msgspec.convert({"name": f"fault-{self._added + 1}"} | body, _Asked)
            answers = [bool(asked.status), bool(asked.drop), asked.garbage]
            if not (any(answers) or asked.delay_seconds or asked.delay_after_seconds):
                raise ValueError(
                    "an effect is needed: status, drop, garbage, delay_seconds, delay_after_seconds"
                )
            if sum(answers) > 1:
                raise ValueError("only one of status, drop, garbage can be")
            if not asked.status and (asked.body is not None or asked.headers or asked.apply):
                raise ValueError("body, headers and apply need a status")
            self._added += 1
            self._faults.append(Fault(**msgspec.structs.asdict(asked)))
            return msgspec.structs.asdict(self._faults[-1])

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def list(self) -> list[dict[str, Any]]:
        with self._lock:
            return [msgspec.structs.asdict(fault) for fault in self._faults]

    def take(self, path: str, user_id: str | None) -> Fault | None:
        """The first fault, in the order added, that strikes this request; those behind it do not see it."""
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(path, user_id)), None)
