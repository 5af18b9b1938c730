import gzip
import json
import logging
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import trustme

from audience_sync.errors import ConfigError
from audience_sync.userpilot.client import Answer, Client, Outcome

KEY = "sEcReT/kEy=="
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nx-request-id: r-1\r\ncontent-length: 0\r\n\r\n"


def answering(answer):
    """Every request gets this answer."""

    def script(server, peer):
        while server.read_request(peer):
            peer.sendall(answer)

    return script


def then_close(answer):
    """The first request gets this answer, and the connection ends."""

    def script(server, peer):
        server.read_request(peer)
        peer.sendall(answer)

    return script


def response(status, body=b"", *headers):
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def send(server, **options):
    with Client(server.url, KEY, **options) as client:
        return client.send("v1/identify", {"user_id": "u1", "metadata": {"vip": True}})


def test_an_identify_is_sent_as_documented(serve):
    server = serve(answering(ACCEPTED))
    with Client(server.url, KEY) as client:
        answer = client.send("v1/identify", {"user_id": "ü", "metadata": {"vip": True}})
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    start, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert answer == Answer(Outcome.ACCEPTED, 202, "r-1", None, None)
    assert start == "POST /v1/identify HTTP/1.1"
    assert headers["Authorization"] == f"Token {KEY}"
    assert headers["X-API-Version"] == "2020-09-22"
    assert headers["Content-Type"] == "application/json"
    assert headers["Accept"] == "application/json, text/plain, */*"
    assert headers["Accept-Encoding"] == "identity"
    assert body == '{"user_id":"ü","metadata":{"vip":true}}'.encode()


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_endpoint_with_a_path_works_with_and_without_its_last_slash(serve, slash):
    server = serve(answering(ACCEPTED))
    with Client(server.url + "eu" + slash, KEY) as client:
        client.validate()
    assert server.requests[0].startswith(b"GET /eu/v1/validate HTTP/1.1\r\n")
    assert b"content-type" not in server.requests[0].lower()


def test_one_connection_serves_request_after_request(serve):
    server = serve(answering(ACCEPTED))
    with Client(server.url, KEY) as client:
        for _ in range(5):
            assert client.send("v1/track", {}).outcome is Outcome.ACCEPTED
    assert (len(server.requests), server.connection_count) == (5, 1)


def test_eight_threads_use_eight_connections_at_most(serve):
    server = serve(answering(ACCEPTED))
    with Client(server.url, KEY) as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: client.send("v1/track", {}), range(200)))
    assert {answer.outcome for answer in answers} == {Outcome.ACCEPTED}
    assert len(server.requests) == 200
    assert server.connection_count <= 8


@pytest.mark.parametrize("start", ["", "HTTP/1.1 200 OK\r\nx-request-id: r-2\r\n\r\n"], ids=["head", "body"])
def test_an_answer_that_drips_is_cut_off_at_the_deadline(serve, start):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(start.encode())
        server.drip(peer, b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 200)

    server = serve(script)
    started = time.monotonic()
    answer = send(server, deadline_seconds=0.5)
    assert 0.4 < time.monotonic() - started < 0.8
    assert answer.outcome is Outcome.UNKNOWN
    assert answer.error == "no complete answer within 0.5 s"
    assert answer.x_request_id == ("r-2" if start else None)


def test_a_drip_on_a_connection_that_was_used_before_is_cut_off_too(serve):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED)
        server.read_request(peer)
        server.drip(peer, b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 200)

    server = serve(script)
    with Client(server.url, KEY, deadline_seconds=0.5) as client:
        assert client.send("v1/track", {}).outcome is Outcome.ACCEPTED
        started = time.monotonic()
        assert client.send("v1/track", {}).outcome is Outcome.UNKNOWN
        assert time.monotonic() - started < 0.8


def test_a_drip_under_tls_is_cut_off_too(serve, tls_for, ca_file):
    def script(server, peer):
        server.read_request(peer)
        server.drip(peer, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 200)

    server = serve(script, tls=tls_for("127.0.0.1"))
    started = time.monotonic()
    assert send(server, ca_file=ca_file, deadline_seconds=0.5).outcome is Outcome.UNKNOWN
    assert time.monotonic() - started < 0.8


def test_each_of_many_requests_has_its_own_deadline(serve):
    def script(server, peer):
        request = server.read_request(peer)
        if b'"slow"' in request:
            server.drip(peer, b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 200)
        peer.sendall(ACCEPTED)

    server = serve(script)
    kinds = ["slow", "fast", "slow", "fast", "slow", "fast", "slow", "fast"]
    started = time.monotonic()
    with Client(server.url, KEY, deadline_seconds=0.5) as client, ThreadPoolExecutor(8) as threads:
        outcomes = [a.outcome for a in threads.map(lambda kind: client.send("v1/track", {"k": kind}), kinds)]
    assert outcomes == [Outcome.UNKNOWN, Outcome.ACCEPTED] * 4
    assert time.monotonic() - started < 0.9


def test_a_client_goes_on_after_an_answer_was_cut_off(serve):
    def script(server, peer):
        if server.read_request(peer) and len(server.requests) == 1:
            server.stopped.wait(5)
        peer.sendall(ACCEPTED)

    server = serve(script)
    with Client(server.url, KEY, deadline_seconds=0.2) as client:
        assert client.send("v1/track", {}).outcome is Outcome.UNKNOWN
        assert client.send("v1/track", {}).outcome is Outcome.ACCEPTED
        server.stopped.set()


def test_a_flood_of_100_continue_ends_at_the_deadline(serve):
    def script(server, peer):
        server.read_request(peer)
        while not server.stopped.is_set():
            peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    started = time.monotonic()
    assert send(serve(script), deadline_seconds=0.3).outcome is Outcome.UNKNOWN
    assert time.monotonic() - started < 0.8


def test_a_reset_is_unknown(serve):
    def script(server, peer):
        server.read_request(peer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    answer = send(serve(script))
    assert answer.outcome is Outcome.UNKNOWN
    assert answer.error.startswith("the connection broke: ")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 202 Acc",
        b'HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{"a":1}',
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7\r\n{}     \r\n",
        b"\x16\x03\x01 garbage\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"a" * 200_000,
    ],
    ids=["closed", "head", "body", "chunks", "garbage", "status", "length", "endless-head"],
)
def test_a_broken_answer_is_unknown(serve, answer):
    assert send(serve(then_close(answer))).outcome is Outcome.UNKNOWN


def test_a_kept_alive_connection_that_closes_is_unknown_and_not_tried_again(serve):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(ACCEPTED)
        server.read_request(peer)

    server = serve(script)
    with Client(server.url, KEY) as client:
        assert client.send("v1/track", {}).outcome is Outcome.ACCEPTED
        assert client.send("v1/track", {}).outcome is Outcome.UNKNOWN
    assert (len(server.requests), server.connection_count) == (2, 1)


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b"OK", b'{"a":', b"NaN", b"[" * 60_000])
def test_a_200_whose_body_is_not_json_is_unknown(serve, body):
    answer = send(serve(answering(response(200, body))))
    assert (answer.outcome, answer.status_code) == (Outcome.UNKNOWN, 200)


def test_an_endless_body_is_left_and_judged_by_its_status(serve):
    sent = 0

    def script(server, peer):
        nonlocal sent
        server.read_request(peer)
        peer.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"a":"')
        while not server.stopped.is_set():
            peer.sendall(b"a" * 65536)
            sent += 65536

    assert send(serve(script)).outcome is Outcome.ACCEPTED
    assert sent < 20_000_000  # what the sockets buffer


def test_a_bomb_of_gzip_stays_packed(serve):
    bomb = gzip.compress(b"[" + b" " * 40_000_000 + b"]", 1)
    assert len(bomb) > 100_000
    server = serve(answering(response(400, bomb, "content-encoding: gzip")))
    started = time.monotonic()
    answer = send(server)
    assert answer.outcome is Outcome.REFUSED
    assert len(answer.error) <= 500
    assert time.monotonic() - started < 0.5


def test_a_redirect_is_not_followed(serve):
    server = serve(answering(response(307, b"", "location: /elsewhere")))
    assert send(server) == Answer(Outcome.FAILED, 307, None, "HTTP 307 without a message", None)
    assert len(server.requests) == 1


def test_a_refusal_whose_body_breaks_off_is_still_a_refusal(serve):
    answer = send(serve(then_close(b'HTTP/1.1 400 X\r\ncontent-length: 99\r\n\r\n{"errors"')))
    assert (answer.outcome, answer.error) == (Outcome.REFUSED, '{"errors"')


def test_nobody_listening_is_failed():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", KEY) as client:
        answer = client.validate()
    assert (answer.outcome, answer.status_code) == (Outcome.FAILED, None)
    assert answer.error == "cannot connect: [Errno 111] Connection refused"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid"])
def test_a_host_that_does_not_resolve_is_failed(host):
    with Client(f"https://{host}", KEY) as client:
        assert client.validate().outcome is Outcome.FAILED


def test_a_tls_handshake_that_never_comes_is_failed(serve):
    server = serve(lambda server, _: server.stopped.wait(5))
    started = time.monotonic()
    with Client(server.url.replace("http:", "https:"), KEY, deadline_seconds=0.3) as client:
        assert client.validate().outcome is Outcome.FAILED
    assert time.monotonic() - started < 0.6


def test_a_tls_handshake_that_drips_is_failed_at_the_deadline(serve):
    def script(server, peer):
        server.drip(peer, b"\x16\x03\x03\x40\x00" + b"a" * 200)

    server = serve(script)
    started = time.monotonic()
    with Client(server.url.replace("http:", "https:"), KEY, deadline_seconds=0.3) as client:
        assert client.validate().outcome is Outcome.FAILED
    assert time.monotonic() - started < 0.6


def test_a_certificate_of_an_own_authority_is_good_with_ca_file(serve, tls_for, ca_file):
    server = serve(answering(ACCEPTED), tls=tls_for("127.0.0.1"))
    with Client(server.url, KEY, ca_file=ca_file) as client:
        assert [client.send("v1/track", {}).outcome for _ in range(3)] == [Outcome.ACCEPTED] * 3
    assert server.connection_count == 1


def test_a_certificate_of_an_unknown_authority_is_failed(serve, tls_for):
    answer = send(serve(answering(ACCEPTED), tls=tls_for("127.0.0.1")))
    assert answer.outcome is Outcome.FAILED
    assert "unable to get local issuer certificate" in answer.error


@pytest.mark.parametrize(
    ("name", "not_after", "words"),
    [
        ("127.0.0.1", datetime(2020, 1, 1, tzinfo=UTC), "certificate has expired"),
        ("elsewhere.example", None, "IP address mismatch"),
    ],
    ids=["expired", "wrong-host"],
)
def test_a_bad_certificate_is_failed_in_clear_words(serve, tls_for, ca_file, name, not_after, words):
    issued = tls_for(name, not_before=datetime(2019, 1, 1, tzinfo=UTC), not_after=not_after)
    server = serve(answering(ACCEPTED), tls=issued)
    answer = send(server, ca_file=ca_file)
    assert answer.outcome is Outcome.FAILED
    assert words in answer.error
    assert server.requests == []


def test_a_self_signed_certificate_is_failed(serve, tmp_path):
    itself = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    itself.private_key_pem.write_to_path(tmp_path / "self.pem")
    itself.cert_pem.write_to_path(tmp_path / "self.pem", append=True)
    context.load_cert_chain(tmp_path / "self.pem")
    answer = send(serve(answering(ACCEPTED), tls=context))
    assert answer.outcome is Outcome.FAILED
    assert "self-signed certificate" in answer.error


def test_a_payload_with_a_lone_surrogate_is_refused_unsent(serve):
    server = serve(answering(ACCEPTED))
    with Client(server.url, KEY) as client:
        answers = [client.send("v1/track", {"metadata": {"a": bad}}) for bad in ("\ud800", float("nan"), {1})]
    assert [(answer.outcome, answer.status_code) for answer in answers] == [(Outcome.REFUSED, None)] * 3
    assert server.requests == []


def test_the_key_is_taken_out_of_what_the_server_says(serve):
    told = json.dumps({"errors": [{"message": f"bad header: Token {KEY}"}]}).replace("/", "\\/").encode()
    answer = send(serve(answering(response(400, told, f"x-request-id: {KEY}"))))
    assert answer.error == "bad header: Token [API key]"
    assert answer.x_request_id == "[API key]"


def test_the_key_is_taken_out_of_garbage(serve):
    answer = send(serve(then_close(f"Token {KEY}\r\n\r\n".encode())))
    assert answer.outcome is Outcome.UNKNOWN
    assert KEY not in answer.error


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "ключ", " a"])
def test_a_key_that_no_header_takes_is_a_config_error_that_does_not_show_it(key):
    with pytest.raises(ConfigError, match="the API key is empty, or holds spaces"):
        Client("https://analytex.userpilot.io/", key)


@pytest.mark.parametrize(
    "endpoint",
    ["", "analytex.userpilot.io", "ftp://a.b/", "https://", "https://me:pw@a.b/", "https://a.b/?q=1"],
)
def test_an_endpoint_that_cannot_be_used_is_a_config_error(endpoint):
    with pytest.raises(ConfigError, match="endpoint") as raised:
        Client(endpoint, KEY)
    assert "pw" not in str(raised.value).replace("password", "")


def test_a_ca_file_that_cannot_be_read_is_a_config_error(tmp_path):
    (tmp_path / "empty.pem").touch()
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(ConfigError, match=name):
            Client("https://analytex.userpilot.io/", KEY, ca_file=str(tmp_path / name))


def test_proxies_of_the_environment_are_not_used(serve, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert send(serve(answering(ACCEPTED))).outcome is Outcome.ACCEPTED


def test_cookies_are_neither_kept_nor_sent(serve):
    server = serve(answering(response(202, b"", "set-cookie: a=b; Path=/")))
    with Client(server.url, KEY) as client:
        client.send("v1/track", {})
        client.send("v1/track", {})
    assert b"cookie" not in server.requests[1].lower()


def test_requests_are_not_logged_by_the_library(serve, caplog):
    caplog.set_level(logging.DEBUG)
    send(serve(answering(ACCEPTED)))
    assert caplog.records == []


def test_retry_after_reaches_the_answer(serve):
    answer = send(serve(answering(response(429, b"", "Retry-After: 7"))))
    assert (answer.outcome, answer.retry_after_seconds) == (Outcome.THROTTLED, 7.0)


def test_a_connection_that_the_server_ends_is_let_go(serve):
    gone = threading.Event()

    def script(server, peer):
        server.read_request(peer)
        peer.sendall(response(202, b"", "connection: close"))
        peer.shutdown(socket.SHUT_WR)
        if peer.recv(1) == b"":
            gone.set()

    server = serve(script)
    with Client(server.url, KEY) as client:
        client.send("v1/track", {})
        assert gone.wait(1)


def test_a_closed_client_says_so(serve):
    client = Client(serve(answering(ACCEPTED)).url, KEY)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.validate()


def test_closing_during_a_request_lets_it_end_at_its_deadline(serve):
    arrived = threading.Event()

    def script(server, peer):
        server.read_request(peer)
        arrived.set()
        server.stopped.wait(5)

    client = Client(serve(script).url, KEY, deadline_seconds=0.4)
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(client.validate)
        assert arrived.wait(2)
        client.close()
        assert pending.result(2).outcome is Outcome.UNKNOWN
    assert not [thread for thread in threading.enumerate() if thread.name == "userpilot-deadlines"]
