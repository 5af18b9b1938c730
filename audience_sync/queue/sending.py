"""Send a request in a thread. If the key is refused, ask whether it is valid before that stops the destination."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from audience_sync import crash
from audience_sync.clock import Clock
from audience_sync.queue import destination, outcomes, requests
from audience_sync.queue.jobs import JobRequest, JobSender
from audience_sync.userpilot.answers import Answer, Outcome

VALIDATE_PATH = "v1/validate"
VALIDATION_SECONDS = 10.0  # how long the answer about the key is reused


class Sender(JobSender, Protocol):
    def send(self, path: str, payload: dict[str, Any], /) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """A request and its answer; the answer is None if the request was not sent."""

    request: requests.ClaimedRequest | JobRequest
    answer: Answer | None


@dataclass(slots=True)
class RequestSender:
    """Builds (with DeliverySettings.build) and sends requests, in several threads at once."""

    sender: Sender
    build: Callable[[str, str, dict[str, Any]], tuple[str, dict[str, Any]]]
    clock: Clock
    _validation: Answer | None = None  # the last answer about the key
    _validated_at: float = -math.inf
    _validating: threading.Lock = field(default_factory=threading.Lock)

    def send(self, request: requests.ClaimedRequest | JobRequest, send_by: float) -> Reply:
        """Send a request, unless the lease may have expired, because another process may then have sent newer values."""
        if self.clock.monotonic() > send_by:
            return Reply(request, None)
        try:
            answer = self._ask(request)
            if answer.outcome is Outcome.UNAUTHORISED:
                answer = destination.interpret_refusal(answer, self._validate())
            return Reply(request, answer)
        except Exception as error:  # noqa: BLE001  (it becomes the request's error; nothing else in the thread catches it)
            return Reply(
                request, Answer(Outcome.UNKNOWN, None, None, f"{type(error).__name__} while sending", None)
            )

    def _ask(self, request: requests.ClaimedRequest | JobRequest) -> Answer:
        return request.send(self.sender) if isinstance(request, JobRequest) else self._send_claimed(request)

    def _send_claimed(self, claimed: requests.ClaimedRequest) -> Answer:
        try:
            body = outcomes.body_of(claimed.deliveries)
            path, payload = self.build(claimed.action, claimed.subject_id, body)
        except Exception as error:  # noqa: BLE001  (concerns this delivery alone)
            return Answer(Outcome.REFUSED, None, None, f"It cannot be written ({type(error).__name__})", None)
        crash.at("before_send")
        answer = self.sender.send(path, payload)
        crash.at("after_send")
        return answer

    def _validate(self) -> Answer:
        """Ask whether the key is valid, once for all refusals that arrive together."""
        with self._validating:
            if self._validation is None or self.clock.monotonic() > self._validated_at + VALIDATION_SECONDS:
                self._validation = self.sender.get(VALIDATE_PATH)
                self._validated_at = self.clock.monotonic()
            return self._validation
