import http.client
import json

import pytest

from tests.faulty_sandbox import FaultySandbox


class Clock:
    """A clock that tests set; it starts at 2026-01-01T00:00:00Z."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds

    def wall(self):
        return 1_767_225_600 + self.seconds


class Client:
    def __init__(self, sandbox):
        self.address = sandbox.url.removeprefix("http://").rstrip("/")
        self.connection = http.client.HTTPConnection(self.address, timeout=10)
        self.x_request_id = None

    def send(self, method, path, body=None, *, raw=None, **headers):
        headers = {
            "Authorization": "Token sandbox",
            "X-API-Version": "2020-09-22",
            "Content-Type": "application/json",
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        payload = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {name: value for name, value in headers.items() if value is not None}
        self.connection.request(method, path, payload, headers)
        response = self.connection.getresponse()
        content = response.read()
        self.x_request_id = response.getheader("x-request-id")
        return response.status, json.loads(content) if content else None

    def status(self, method, path, body=None, **options):
        return self.send(method, path, body, **options)[0]

    def identify(self, user_id, **metadata):
        return self.status("POST", "/v1/identify", {"user_id": user_id, "metadata": metadata})

    def control(self, method, name, body=None):
        status, answer = self.send(method, f"/_sandbox/{name}", body)
        assert status == 200, answer
        return answer


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sandbox(clock):
    with FaultySandbox(monotonic=clock.monotonic, wall=clock.wall) as running:
        yield running


@pytest.fixture
def connect(sandbox):
    """Makes further clients."""
    clients = []

    def one_more():
        clients.append(Client(sandbox))
        return clients[-1]

    yield one_more
    for client in clients:
        client.connection.close()


@pytest.fixture
def client(connect):
    return connect()
