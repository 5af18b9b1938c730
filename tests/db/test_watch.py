"""A watch closes a connection that takes too long, but not because our own process does."""

import socket
import threading
from types import SimpleNamespace

from audience_sync.db import watch


class Connection:
    """A connection whose status a test sets; it counts how often the status is read."""

    def __init__(self):
        self.client, self.server = socket.socketpair()
        self.status, self.cancel_count = "INTRANS", 0
        self.looked = threading.Semaphore(0)

    def fileno(self):
        return self.client.fileno()

    @property
    def info(self):
        self.looked.release()
        return SimpleNamespace(transaction_status=SimpleNamespace(name=self.status))

    def cancel_safe(self, **_):
        self.cancel_count += 1


def test_a_connection_that_could_not_be_opened_is_not_watched_for_ever(monkeypatch):
    monkeypatch.setattr(watch, "CLOSE_SECONDS", 0.01)
    connection = Connection()
    watching = watch.Watch(connection, 0.0)  # the first statements failed, so nothing ends it
    with connection.client, connection.server:
        connection.server.settimeout(30)
        assert connection.server.recv(1) == b""
    watching._thread.join(30)
    assert not watching._thread.is_alive()


def test_a_connection_is_not_closed_while_only_our_process_takes_long(monkeypatch):
    monkeypatch.setattr(watch, "CLOSE_SECONDS", 0.01)
    connection = Connection()
    with connection.client, connection.server, watch.Watch(connection, 0.0, keeps_idle=True):
        for _ in range(3):
            assert connection.looked.acquire(timeout=30)
        connection.client.send(b"?")
        assert (connection.server.recv(1), connection.cancel_count) == (b"?", 0)
        connection.status = "ACTIVE"
        connection.server.settimeout(30)
        assert connection.server.recv(1) == b""
    assert connection.cancel_count > 0
