"""Faults of servers and networks: each gives an answer in time, in bounded memory, with the right outcome."""

import contextlib
import gzip
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from audience_sync.userpilot.client import Answer, Client, Outcome
from tests.userpilot.conftest import ACCEPTED, KEY, answering, response, then_close

MB = 1024 * 1024


def client_of(server, seconds=30.0, **options):
    return Client(server.url, KEY, deadline_seconds=seconds, upload_seconds=seconds, **options)


@contextlib.contextmanager
def taking(least, most):
    started = time.monotonic()
    yield
    assert least < time.monotonic() - started < most


@contextlib.contextmanager
def allocating(most):
    """Check that never more than `most` bytes are allocated, by the test's own server included."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.fixture
def serve_from_process():
    """Runs code in a process with a listener; a process that suspends itself vanishes from the network silently."""
    processes = []

    def start(code, *arguments):
        preamble = "import os, signal, socket, sys; listener = socket.create_server(('127.0.0.1', 0))\n"
        preamble += "print(listener.getsockname()[1], flush=True); peer, _ = listener.accept()\n"
        process = subprocess.Popen(
            [sys.executable, "-SEc", preamble + code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        processes.append(process)
        return f"http://127.0.0.1:{process.stdout.readline().strip()}/"

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


# Slow and endless answers


@pytest.mark.parametrize("start", ["", "HTTP/1.1 200 OK\r\nx-request-id: r-2\r\n\r\n"], ids=["head", "body"])
def test_an_answer_that_drips_is_cut_off_at_the_deadline(serve, ask, start):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(start.encode())
        server.drip(peer, b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 1_200)

    with client_of(serve(script), 3.0) as client, taking(2.9, 30):
        answer = ask(client)
    assert (answer.outcome, answer.document) == (Outcome.UNKNOWN, None)
    assert answer.error == "no complete answer within 3 s"
    assert answer.x_request_id == ("r-2" if start else None)


def test_a_drip_on_a_connection_that_was_used_before_is_cut_off_too(serve, ask):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED)
        server.read_request(peer)
        server.drip(peer, b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 1_200)

    with client_of(serve(script), 3.0) as client:
        assert ask(client).outcome is Outcome.ACCEPTED
        with taking(2.9, 30):
            assert ask(client).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("kind", ["100 Continue", "103 Early Hints"])
def test_a_flood_of_interim_answers_ends_at_the_deadline(serve_from_process, ask, kind):
    code = (
        "peer.recv(65536)\nwhile True: peer.sendall(b'HTTP/1.1 %s\\r\\n\\r\\n' % sys.argv[1].encode() * 1000)"
    )
    url = serve_from_process(code, kind)
    client = Client(url, KEY, deadline_seconds=0.2, upload_seconds=0.2)
    with client, taking(0.1, 30):
        assert ask(client).outcome is Outcome.UNKNOWN


def test_an_interim_answer_is_skipped(serve, ask):
    with client_of(serve(answering(b"HTTP/1.1 100 Continue\r\n\r\n" + ACCEPTED))) as client:
        assert ask(client) == Answer(Outcome.ACCEPTED, 202, "r-1", None, None)


def test_an_endless_list_in_pieces_of_a_byte_ends_at_the_deadline(serve):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not server.stopped.is_set():
            peer.sendall(b"1\r\n[\r\n" * 1000)

    with client_of(serve(script), 0.3) as client, taking(0.2, 30), allocating(8 * MB):
        assert client.get("v1/background_jobs").outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(("status", "outcome"), [(200, Outcome.ACCEPTED), (400, Outcome.REFUSED)])
def test_an_endless_body_is_cut_off_and_judged_by_its_status(serve, ask, status, outcome):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(f'HTTP/1.1 {status} X\r\n\r\n{{"a":"'.encode())
        while not server.stopped.is_set():
            peer.sendall(piece)

    piece = b"a" * 65536
    with client_of(serve(script)) as client, taking(0, 30), allocating(32 * MB):
        answer = ask(client)
    assert (answer.outcome, answer.document) == (outcome, None)


@pytest.mark.parametrize(("status", "outcome"), [(200, Outcome.ACCEPTED), (400, Outcome.REFUSED)])
def test_a_gzip_bomb_is_not_unpacked(serve, ask, bomb, status, outcome):
    server = serve(answering(response(status, bomb, "content-encoding: gzip")))
    with client_of(server) as client, taking(0, 30), allocating(6 * MB):
        answer = ask(client)
    assert (answer.outcome, answer.document) == (outcome, None)
    assert len(answer.error or "") <= 500


@pytest.fixture(scope="module")
def bomb():
    """A list of 100 MB that is sent as 440 KB."""
    return gzip.compress(b"[" + b" " * 100_000_000 + b"]", 1, mtime=0)


# Peers that vanish silently


@pytest.mark.parametrize(
    "start",
    ["", "HTTP/1.1 202 Acc", 'HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{"a":'],
    ids=["before", "head", "body"],
)
def test_a_server_that_stops_in_its_answer_is_unknown_at_the_deadline(serve_from_process, ask, start):
    code = "peer.recv(65536); peer.sendall(sys.argv[1].encode()); os.kill(os.getpid(), signal.SIGSTOP)"
    url = serve_from_process(code, start)
    client = Client(url, KEY, deadline_seconds=1.0, upload_seconds=1.0)
    with client, taking(0.9, 30):
        answer = ask(client)
    assert (answer.outcome, answer.error) == (Outcome.UNKNOWN, "no complete answer within 1 s")


@pytest.mark.parametrize("read_bytes", [0, 100_000], ids=["from-the-start", "half-way"])
def test_a_server_that_stops_in_an_upload_is_unknown_at_the_deadline(serve_from_process, read_bytes):
    code = "[peer.recv(1000) for _ in range(int(sys.argv[1]) // 1000)]; os.kill(os.getpid(), signal.SIGSTOP)"
    url = serve_from_process(code, str(read_bytes))
    rows = b"x" * 5 * MB
    with Client(url, KEY, upload_seconds=0.4) as client, taking(0.3, 30), allocating(2 * MB):
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", rows)
    assert (answer.outcome, answer.error) == (Outcome.UNKNOWN, "no complete answer within 0.4 s")


def test_an_upload_that_nobody_reads_is_unknown_at_the_deadline(serve):
    server = serve(lambda server, _: server.stopped.wait(60))
    with client_of(server, 1.0) as client, taking(0.9, 30):
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", b"x" * 5 * MB)
    assert (answer.outcome, answer.error) == (Outcome.UNKNOWN, "no complete answer within 1 s")


def test_an_upload_that_is_read_slowly_is_unknown_at_the_deadline(serve):
    def script(server, peer):
        while not server.stopped.wait(0.02):
            peer.recv(30_000)

    server = serve(script)
    with client_of(server, 0.4) as client, taking(0.3, 30):
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", b"x" * 20 * MB)
    assert (answer.outcome, answer.error) == (Outcome.UNKNOWN, "no complete answer within 0.4 s")


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "leaves"])
def test_an_upload_that_is_refused_before_it_was_read_is_refused(serve, stays):
    def script(server, peer):
        peer.recv(1000)
        peer.sendall(response(413, b'{"errors":[{"message":"too large"}]}'))
        if stays:
            server.stopped.wait(60)

    with client_of(serve(script), 3.0) as client, taking(0, 30):
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", b"x" * 20 * MB)
    assert (answer.outcome, answer.status_code, answer.error) == (Outcome.REFUSED, 413, "too large")


# Broken answers


def test_a_reset_is_unknown(serve, ask):
    def script(server, peer):
        server.read_request(peer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with client_of(serve(script)) as client:
        answer = ask(client)
    assert answer.outcome is Outcome.UNKNOWN
    assert answer.error.startswith("the connection broke: ")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 202 Acc",
        b'HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{"a":1}',
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7\r\n{}     \r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\n\r\n[{"job_id":"1"},',
        b"\x16\x03\x01 garbage\r\n\r\n",
        b"\0" * 70_000,
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"a" * 200_000,
        b"HTTP/2 200\r\n\r\n",
    ],
    ids=[
        *("closed", "head", "body", "chunks", "chunk-size", "json", "garbage", "zeros", "status", "length"),
        *("lengths", "endless-head", "version"),
    ],
)
def test_a_broken_answer_is_unknown(serve, ask, answer):
    with client_of(serve(then_close(answer))) as client, taking(0, 30):
        broken = ask(client)
    assert (broken.outcome, broken.document) == (Outcome.UNKNOWN, None)


def test_a_refusal_whose_body_breaks_off_is_still_a_refusal(serve, ask):
    with client_of(serve(then_close(b'HTTP/1.1 400 X\r\ncontent-length: 99\r\n\r\n{"errors"'))) as client:
        answer = ask(client)
    assert (answer.outcome, answer.error) == (Outcome.REFUSED, '{"errors"')


@pytest.mark.parametrize("fault", [{"drop": "after"}, {"garbage": True}], ids=["drop", "garbage"])
def test_a_request_that_is_applied_and_not_answered_is_unknown(sandbox, ask, fault):
    sandbox.faults.add(fault)
    with Client(sandbox.url, "sandbox") as client:
        assert ask(client).outcome is Outcome.UNKNOWN
    (entry,) = sandbox.state.requests
    assert entry.applied is (entry.method == "POST")


def test_a_request_that_is_dropped_unapplied_is_unknown_as_well(sandbox, ask):
    sandbox.faults.add({"drop": "before"})
    with Client(sandbox.url, "sandbox") as client:
        assert ask(client).outcome is Outcome.UNKNOWN
    (entry,) = sandbox.state.requests
    assert not entry.applied


# Kept-alive connections


def test_a_kept_alive_connection_that_closes_is_unknown_and_not_tried_again(serve, ask):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED)
        server.read_request(peer)

    server = serve(script)
    with client_of(server) as client:
        assert ask(client).outcome is Outcome.ACCEPTED
        assert ask(client).outcome is Outcome.UNKNOWN
    assert (len(server.requests), server.connection_count) == (2, 1)


@pytest.mark.parametrize("linger", [0, 1], ids=["closed", "reset"])
def test_a_connection_that_ended_between_two_requests_is_replaced(serve, ask, linger):
    gone, taken = threading.Event(), threading.Event()

    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED)
        taken.wait(60)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", linger, 0))
        peer.close()
        gone.set()

    server = serve(script)
    with client_of(server) as client:
        assert ask(client).outcome is Outcome.ACCEPTED
        taken.set()
        assert gone.wait(60)
        assert ask(client).outcome is Outcome.ACCEPTED
    assert (len(server.requests), server.connection_count) == (2, 2)


def test_bytes_after_an_answer_are_not_the_next_answer(serve, ask):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED + b'{"job_id":"1"}')
        server.read_request(peer)
        peer.sendall(ACCEPTED)

    with client_of(serve(script)) as client:
        assert [ask(client).outcome for _ in range(2)] == [Outcome.ACCEPTED, Outcome.UNKNOWN]


def test_an_answer_that_comes_to_an_idle_connection_ends_it(serve, ask):
    """A proxy sends 408 before it closes an idle connection."""
    gone, answered = threading.Event(), threading.Event()

    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED)
        answered.wait(60)
        peer.sendall(response(408))
        gone.set()

    server = serve(script)
    with client_of(server) as client:
        assert ask(client).outcome is Outcome.ACCEPTED
        answered.set()
        assert gone.wait(60)
        assert ask(client).outcome is Outcome.ACCEPTED
    assert server.connection_count == 2


# Well-formed answers that are errors


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (408, Outcome.FAILED),
        (425, Outcome.FAILED),
        (500, Outcome.FAILED),
        (502, Outcome.UNKNOWN),
        (503, Outcome.FAILED),
        (504, Outcome.UNKNOWN),
    ],
)
def test_a_server_error_can_be_retried(serve, ask, status, outcome):
    with client_of(serve(answering(response(status, b"oops")))) as client:
        assert ask(client) == Answer(outcome, status, None, "oops", None)


@pytest.mark.parametrize("status", [202, 400, 403, 404, 405, 413, 500, 502, 503])
def test_the_page_of_a_gateway_is_unknown_with_its_retry_after(serve, ask, status):
    page = response(status, b"<h1>oops</h1>", "content-type: text/html", "retry-after: 7")
    with client_of(serve(answering(page))) as client:
        answer = ask(client)
    error = f"HTTP {status}, but the body is not Userpilot's: oops"
    assert answer == Answer(Outcome.UNKNOWN, status, None, error, 7.0)
    assert not answer.is_evidence


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (b"Retry-After: 7", 7.0),
        (b"Retry-After: Wed, 01 May 2024 12:00:30 GMT", 0.0),
        (b"Retry-After: 86400", 900.0),
        (b"Retry-After: -1", None),
        (b"Retry-After: \xff\xfe", None),
        (b"Retry-After: " + b"9" * 60_000, 900.0),
        (b"Retry-After: 1\r\nRetry-After: 2", None),
        (b"X-None: 1", None),
    ],
    ids=["seconds", "past", "huge", "negative", "garbage", "digits", "two", "none"],
)
def test_retry_after_of_a_429_is_bounded(serve, ask, header, seconds):
    throttled = b"HTTP/1.1 429 X\r\ncontent-length: 0\r\n" + header + b"\r\n\r\n"
    with client_of(serve(answering(throttled))) as client:
        answer = ask(client)
    assert (answer.outcome, answer.retry_after_seconds) == (Outcome.THROTTLED, seconds)


@pytest.mark.parametrize(
    ("body", "outcome", "document"),
    [
        (b"", Outcome.ACCEPTED, None),
        (b'{"errors":[{"user_id":"u1"}]}', Outcome.ACCEPTED, {"errors": [{"user_id": "u1"}]}),
        (b'{"job_id":', Outcome.UNKNOWN, None),
        (b"<html>Log in</html>", Outcome.UNKNOWN, None),
        (b"OK", Outcome.ACCEPTED, None),
        (gzip.compress(b'{"job_id":"1"}', mtime=0), Outcome.ACCEPTED, {"job_id": "1"}),
    ],
    ids=["empty", "errors", "malformed", "html", "text", "gzip"],
)
def test_a_2xx_is_accepted_unless_it_is_a_page_or_breaks_off(serve, ask, body, outcome, document):
    with client_of(serve(answering(response(200, body)))) as client:
        answer = ask(client)
    assert (answer.outcome, answer.document) == (outcome, document)


# Where a request goes


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve, ask, status):
    elsewhere = serve(answering(ACCEPTED))
    server = serve(answering(response(status, b"", f"location: {elsewhere.url}")))
    with client_of(server) as client:
        answer = ask(client)
    error = f"HTTP {status} redirects to {elsewhere.url}: is [destination] endpoint right?"
    assert answer == Answer(Outcome.FAILED, status, None, error, None)
    assert (len(server.requests), elsewhere.connection_count) == (1, 0)


@pytest.mark.parametrize(
    "path", ["//{}/x", "http://{}/x", "@{}/x", "/\\{}/x", "..//{}/x", "?@{}", "#@{}", "%0d%0a"]
)
def test_no_path_leads_to_another_host(serve, path):
    elsewhere, server = serve(answering(ACCEPTED)), serve(answering(ACCEPTED))
    with client_of(server) as client:
        assert client.get(path.format(elsewhere.url.split("/")[2])).outcome is Outcome.ACCEPTED
    assert server.requests[0].count(b"\r\nHost: " + server.url.split("/")[2].encode()) == 1
    assert elsewhere.connection_count == 0


def test_a_refused_connection_is_failed(ask):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", KEY) as client:
        answer = ask(client)
    assert (answer.outcome, answer.status_code) == (Outcome.FAILED, None)
    assert answer.error == "cannot connect: [Errno 111] Connection refused"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid", "[::1%25nowhere]"])
def test_a_host_that_does_not_resolve_is_failed(ask, host):
    with Client(f"https://{host}", KEY) as client, taking(0, 30):
        assert ask(client).outcome is Outcome.FAILED


def test_an_address_without_a_route_is_failed(ask):
    with Client("https://[100::1]/", KEY, connect_seconds=0.2) as client, taking(0, 30):
        answer = ask(client)
    assert (answer.outcome, answer.status_code) == (Outcome.FAILED, None)


@pytest.fixture
def black_hole():
    """An address that answers no SYN: its backlog is full."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=0)
    except OSError:  # no IPv6 here
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    with listener, socket.create_connection(listener.getsockname()[:2]):
        yield listener.getsockname()


@pytest.fixture
def resolving(monkeypatch):
    """Makes every name resolve to these addresses."""

    def to(*addresses):
        results = [
            (socket.AF_INET6 if ":" in at[0] else socket.AF_INET, socket.SOCK_STREAM, 6, "", at)
            for at in addresses
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: results)

    return to


def test_a_black_hole_is_failed_when_no_connection_came_in_time(black_hole, resolving, ask):
    resolving(black_hole)
    with Client("http://analytex.test/", KEY, connect_seconds=0.2) as client, taking(0.1, 30):
        answer = ask(client)
    assert (answer.outcome, answer.error) == (Outcome.FAILED, "no connection in time")


def test_behind_a_black_hole_the_next_address_is_tried(black_hole, resolving, serve, ask):
    server = serve(answering(ACCEPTED))
    resolving(black_hole, ("127.0.0.1", int(server.url.rsplit(":", 1)[1].strip("/"))))
    with Client("http://analytex.test/", KEY, connect_seconds=0.2) as client, taking(0.1, 30):
        assert ask(client).outcome is Outcome.ACCEPTED


def test_nothing_is_sent_on_a_connection_made_after_the_deadline(black_hole, resolving, serve, ask):
    server = serve(answering(ACCEPTED))
    port = int(server.url.rsplit(":", 1)[1].strip("/"))
    resolving(black_hole, black_hole, ("127.0.0.1", port))
    client = Client(
        "http://analytex.test/", KEY, connect_seconds=0.2, deadline_seconds=0.3, upload_seconds=0.3
    )
    with client, taking(0.3, 30):
        answer = ask(client)
    assert (answer.outcome, answer.error) == (Outcome.FAILED, "no complete answer within 0.3 s")
    assert server.requests == []


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_nothing_is_sent_to_a_private_network(address, serve, resolving, ask):
    server = serve(answering(ACCEPTED))
    resolving((address, int(server.url.rsplit(":", 1)[1].strip("/"))))
    with Client("http://analytex.userpilot.io/", KEY, only_public=True) as client, taking(0, 30):
        answer = ask(client)
    assert (answer.outcome, answer.status_code) == (Outcome.FAILED, None)
    assert answer.error == "cannot connect: the host resolves to 127.0.0.1, an address of a private network"
    assert server.requests == []
