"""A server of raw sockets, whose answers a test scripts byte by byte."""

import contextlib
import socket
import ssl
import threading

import pytest
import trustme

KEY = "sEcReT/kEy=="
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nx-request-id: r-1\r\ncontent-length: 0\r\n\r\n"
REQUESTS = {
    "send": lambda client: client.send("v1/identify", {"user_id": "u1", "metadata": {"vip": True}}),
    "upload": lambda client: client.upload(
        "v1/users/bulk_identify", "users.ndjson", b'{"user_id":"u1","metadata":{"vip":true}}\n'
    ),
    "get": lambda client: client.get("v1/background_jobs"),
}


def answering(answer):
    """A script that gives every request this answer."""

    def script(server, peer):
        while server.read_request(peer):
            peer.sendall(answer)

    return script


def then_close(answer):
    """A script that gives the first request this answer, and ends the connection."""

    def script(server, peer):
        server.read_request(peer)
        peer.sendall(answer)

    return script


def response(status, body=b"", *headers):
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Server:
    def __init__(self, script, tls):
        self.requests = []
        self.connection_count = 0
        self.stopped = threading.Event()
        self._script = script
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._peers = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}/"

    def read_request(self, peer):
        """Return the next request, empty when the client has closed the connection."""
        request = b""
        while b"\r\n\r\n" not in request:
            chunk = peer.recv(65536)
            if not chunk:
                return b""
            request += chunk
        head, _, body = request.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                while len(body) < int(line.split(b":")[1]):
                    body += peer.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        return self.requests[-1]

    def drip(self, peer, text):
        for byte in text:
            peer.sendall(bytes([byte]))
            if self.stopped.wait(0.05):
                return

    def stop(self):
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                self.connection_count += 1
                thread = threading.Thread(target=self._talk, args=(peer,))
                self._threads.append(thread)
                thread.start()

    def _talk(self, peer):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(peer.close)
            if self._tls:
                peer = stack.enter_context(self._tls.wrap_socket(peer, server_side=True))
            self._peers.append(peer)
            self._script(self, peer)


@pytest.fixture(params=REQUESTS)
def ask(request):
    """ask(client) makes a request: one test for each kind."""
    return REQUESTS[request.param]


@pytest.fixture
def serve():
    """serve(script) runs script(server, peer) for each connection."""
    servers = []

    def start(script, *, tls=None):
        servers.append(Server(script, tls))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture
def ca_file(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture
def tls_for(authority):
    def context_for(*names, **options):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names, **options).configure_cert(context)
        return context

    return context_for
