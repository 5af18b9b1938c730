import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from audience_sync.errors import ConfigError
from audience_sync.userpilot.client import Answer, Client, Outcome
from tests.userpilot.conftest import ACCEPTED, KEY, answering, response, then_close


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


def test_each_of_many_requests_has_its_own_deadline(serve):
    def script(server, peer):
        while request := server.read_request(peer):  # the client may use a connection again
            if b'"slow"' in request:
                server.drip(peer, b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 1_200)
            peer.sendall(ACCEPTED)

    server = serve(script)
    kinds = ["slow", "fast", "slow", "fast", "slow", "fast", "slow", "fast"]
    started = time.monotonic()
    with Client(server.url, KEY, deadline_seconds=10) as client, ThreadPoolExecutor(8) as threads:
        outcomes = [a.outcome for a in threads.map(lambda kind: client.send("v1/track", {"k": kind}), kinds)]
    assert outcomes == [Outcome.UNKNOWN, Outcome.ACCEPTED] * 4
    assert time.monotonic() - started < 30  # one after another, the slow ones alone would take 40


def test_a_client_is_usable_after_an_answer_was_cut_off(serve):
    def script(server, peer):
        if server.read_request(peer) and len(server.requests) == 1:
            server.stopped.wait(60)
        peer.sendall(ACCEPTED)

    server = serve(script)
    with Client(server.url, KEY, deadline_seconds=3) as client:
        assert client.send("v1/track", {}).outcome is Outcome.UNKNOWN
        assert client.send("v1/track", {}).outcome is Outcome.ACCEPTED
        server.stopped.set()


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b'{"a":', b"[" * 60_000])
def test_a_200_that_is_a_page_or_breaks_off_is_unknown(serve, body):
    answer = send(serve(answering(response(200, body))))
    assert (answer.outcome, answer.status_code) == (Outcome.UNKNOWN, 200)


def test_a_payload_with_a_lone_surrogate_is_refused_unsent(serve):
    server = serve(answering(ACCEPTED))
    with Client(server.url, KEY) as client:
        answers = [client.send("v1/track", {"metadata": {"a": bad}}) for bad in ("\ud800", float("nan"), {1})]
    assert [(answer.outcome, answer.status_code) for answer in answers] == [(Outcome.REFUSED, None)] * 3
    assert server.requests == []


def test_the_key_is_removed_from_the_answer(serve):
    body = json.dumps({"errors": [{"message": f"bad header: Token {KEY}"}]}).replace("/", "\\/").encode()
    answer = send(serve(answering(response(400, body, f"x-request-id: {KEY}"))))
    assert answer.error == "bad header: Token [API key]"
    assert answer.x_request_id == "[API key]"


def test_the_key_is_removed_from_garbage(serve):
    answer = send(serve(then_close(f"Token {KEY}\r\n\r\n".encode())))
    assert answer.outcome is Outcome.UNKNOWN
    assert KEY not in answer.error


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "ключ", " a"])
def test_an_invalid_key_is_a_config_error_that_does_not_show_it(key):
    with pytest.raises(ConfigError, match="the API key is empty, or contains spaces"):
        Client("https://analytex.userpilot.io/", key)


@pytest.mark.parametrize(
    "endpoint",
    ["", "analytex.userpilot.io", "ftp://a.b/", "https://", "https://me:pw@a.b/", "https://a.b/?q=1"],
)
def test_an_invalid_endpoint_is_a_config_error(endpoint):
    with pytest.raises(ConfigError, match="endpoint") as raised:
        Client(endpoint, KEY)
    assert "pw" not in str(raised.value).replace("password", "")


def test_an_unreadable_ca_file_is_a_config_error(tmp_path):
    (tmp_path / "empty.pem").touch()
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(ConfigError, match=name):
            Client("https://analytex.userpilot.io/", KEY, ca_file=str(tmp_path / name))


def test_proxies_of_the_environment_are_not_used(serve, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert send(serve(answering(ACCEPTED))).outcome is Outcome.ACCEPTED


def test_cookies_are_neither_stored_nor_sent(serve):
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


def test_a_connection_that_the_server_ends_is_closed(serve):
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
        assert gone.wait(60)


def test_a_closed_client_raises(serve):
    client = Client(serve(answering(ACCEPTED)).url, KEY)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.validate()


def test_closing_during_a_request_lets_it_end_at_its_deadline_and_ends_all_connections(serve):
    arrived, gone = threading.Event(), threading.Semaphore(0)

    def script(server, peer):
        while request := server.read_request(peer):
            if b"/validate " in request:
                arrived.set()
            else:
                peer.sendall(ACCEPTED)
        gone.release()

    server = serve(script)
    client = Client(server.url, KEY, deadline_seconds=0.4)
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(client.validate)
        assert arrived.wait(60)
        assert client.send("v1/track", {}).outcome is Outcome.ACCEPTED
        client.close()
        assert pending.result(2).outcome is Outcome.UNKNOWN
    assert all(gone.acquire(timeout=2) for _ in range(server.connection_count))
    assert server.connection_count == 2
