import socket
import threading
import time

from audience_sync.userpilot.client import Client, Outcome


def serve(script):
    server = socket.create_server(("127.0.0.1", 0))

    def run():
        with server:
            peer, _ = server.accept()
            with peer:
                peer.recv(65536)
                script(peer)

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_202_is_accepted():
    url = serve(
        lambda p: p.sendall(b"HTTP/1.1 202 Accepted\r\nx-request-id: r1\r\ncontent-length: 0\r\n\r\n")
    )
    with Client(url, "k") as client:
        answer = client.send("v1/identify", {"user_id": "u1", "metadata": {}})
    assert (answer.outcome, answer.x_request_id) == (Outcome.ACCEPTED, "r1")


def test_a_dripping_body_ends_at_the_deadline():
    def drip(peer):
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            for _ in range(100):
                peer.sendall(b" ")
                time.sleep(0.1)
        except OSError:
            pass

    started = time.monotonic()
    with Client(serve(drip), "k", deadline_seconds=0.5) as client:
        assert client.send("v1/identify", {}).outcome is Outcome.UNKNOWN
    assert time.monotonic() - started < 0.8
