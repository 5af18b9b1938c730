"""Userpilot in this process: the sandbox without a socket, on a clock that tests set."""

import json
import threading
from email.message import Message

import msgspec

from audience_sync.sandbox.api import API_VERSION, Body, answer
from audience_sync.userpilot.answers import Answer, Outcome, judge
from tests.faulty_sandbox import FaultyState, Limits

KEY = "sandbox"


class LocalUserpilot:
    """A sender. Faults are the sandbox's; after a dropped connection the outcome is unknown."""

    def __init__(self, clock, **limits):
        self.clock = clock
        self.state = FaultyState(KEY, Limits(**limits), clock.monotonic, lambda: clock.now().timestamp())
        self.faults = self.state.faults
        self.lock = threading.Lock()
        self._headers = Message()
        self._headers["Authorization"] = f"Token {KEY}"
        self._headers["X-API-Version"] = API_VERSION

    def limit(self, **limits):
        self.state.set_limits(msgspec.structs.replace(self.state.limits, **limits))

    def send(self, path, payload):
        return self._ask("POST", path, Body(payload))

    def upload(self, path, filename, content):
        rows = [json.loads(line) for line in content.splitlines()]
        return self._ask("POST", path, Body(rows, filename=filename, size=len(content)))

    def get(self, path):
        return self._ask("GET", path, Body())

    def _ask(self, method, path, body):
        with self.lock:
            self.state.advance()
            entry = self.state.receive(method, f"/{path}", body.value)
            fault = self.faults.take(entry.path, entry.user_id)
            status, content = 0, None
            if fault is None or fault.applies:
                status, content = answer(self.state, entry, self._headers, body)
                entry.applied = method == "POST" and status < 300
            if fault is not None and fault.drop:
                return Answer(Outcome.UNKNOWN, None, None, "the connection broke", None)
            if fault is not None:
                status, content = fault.status or status, fault.body if fault.status else content
            entry.status = status
            headers = {"x-request-id": entry.x_request_id} | (fault.headers if fault else {})
            return judge(status, headers, _bytes(content), cut=False, secret=KEY, now=self.clock.now())

    def values_of(self, property_name):
        """Return a property by user."""
        users = self.state.users.items()
        return {
            user_id: user["properties"][property_name]
            for user_id, user in users
            if property_name in user["properties"]
        }

    def uploads(self):
        """Return the status and the number of rows of each upload."""
        return [
            (entry.status, len(entry.body))
            for entry in self.state.requests
            if entry.path.endswith("/bulk_identify")
        ]

    def refusals(self, status):
        return sum(entry.status == status for entry in self.state.requests)


def _bytes(content):
    """A body; texts and bytes are sent as they are."""
    if content is None or isinstance(content, bytes):
        return content or b""
    return content.encode() if isinstance(content, str) else json.dumps(content).encode()
