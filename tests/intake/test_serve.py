"""`serve`: start and end, slow senders, and several servers on one database."""

import contextlib
import json
import random
import re
import select
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from audience_sync.db import dialects, engines
from audience_sync.intake import http, server
from tests.conftest import SCHEMA
from tests.intake.conftest import AS_SHOP, KEY, served
from tests.web.conftest import HASH, PASSWORD, USERS

SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here
TRACKING = f'[tracking]\nwrite_keys = ["{KEY}"]\ncalls_per_second = 1_000_000'
IDENTIFY = b'{"type": "identify", "userId": "ann", "messageId": "m1"}'
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def head(path, length, *more):
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {length}",
        *(f"{name}: {value}" for name, value in AS_SHOP.items()),
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def connect(address):
    return socket.create_connection(address, timeout=60)


def answer(connection):
    """The status and the body of the next answer."""
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(reader.readline, b"\r\n"))
    return status, reader.read(int(headers["content-length"]))


def begun(address):
    """A connection on which a call has begun to come, which the API waits for."""
    connection = connect(address)
    connection.sendall(head("/v1/identify", len(IDENTIFY), "Expect: 100-continue"))
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
    connection.sendall(IDENTIFY[:10])
    return connection


def test_the_body_of_an_answer_does_not_wait_for_the_acknowledgement_of_its_head():
    with server.listen("127.0.0.1", 0) as listening, connect(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def is_cut(connection, drip=b""):
    """Return whether the server ends the connection within a minute, while bytes drip in."""
    connection.settimeout(0.02)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            connection.send(drip)
            if connection.recv(65536) == b"":
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def stops_taking(connection, sent):
    """Whether the server ends the connection before it took all of it, and does not just leave it lying."""
    try:
        connection.sendall(sent)
    except ConnectionError:
        return True
    return False


def refuses_connections(address):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            connect(address).close()
        except ConnectionError:
            return True
    return False


def message_ids(url):
    engine = engines.open_own(url, SCHEMA)
    with engines.read(engine) as connection:
        found = dialects.sql(connection, "SELECT message_id FROM {our}calls").scalars().all()
    engine.dispose()
    return found


# How it starts and ends.


@SQLITE
def test_without_write_keys_it_stays_on_this_machine(start):
    code, said = start({})("serve", "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert said == (
        "audience-sync: 0.0.0.0 can be reached from other machines: set [tracking] write_keys first, or listen on "
        "127.0.0.1.\n"
    )


@SQLITE
def test_without_users_the_dashboard_stays_on_this_machine(start):
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        code, said = start({}, TRACKING)("serve", "--host", host, "--port", "0")
        assert code == 2
        assert said == (
            f"audience-sync: {host} can be reached from other machines: give the dashboard users first ([[web.users]]), "
            "set [web] dashboard = false to serve the tracking API alone, or listen on 127.0.0.1.\n"
        )
    missing = USERS.replace(HASH, "${MISSING_HASH}")
    code, said = start({}, f"{TRACKING}\n{missing}")("serve", "--port", "0")
    assert code == 2
    assert said.endswith("olga: password: set the environment variable MISSING_HASH, which is missing\n")


@SQLITE
@pytest.mark.parametrize("text", ["[web]\ndashboard = false", USERS])
def test_other_machines_reach_the_api_alone_or_the_dashboard_with_users(start, text):
    command = start({}, f"{TRACKING}\n{text}")
    with command.popen("serve", "--host", "0.0.0.0", "--port", "0") as process:
        said = process.stdout.readline()
        port = int(re.search(r"http://0.0.0.0:(\d+)/", said)[1])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Host": "sync.example"}) as client:
            page = client.get("/")
            call = client.post("/v1/identify", json={"userId": "ann"}, headers=AS_SHOP)
        process.send_signal(signal.SIGKILL)
    assert call.status_code == 200
    if text == USERS:
        assert said.startswith("The dashboard is at ")
        assert (page.status_code, page.headers["location"]) == (303, "/login?next=%2F")
    else:
        assert said == f"Calls are accepted at http://0.0.0.0:{port}/. Ctrl-C stops it.\n"
        assert (page.status_code, page.json()["success"]) == (404, False)


@SQLITE
def test_a_session_posts_no_call_and_a_write_key_opens_no_page(start):
    with served(start({}, f"{TRACKING}\n{USERS}")) as (_, port):
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, headers={"Origin": address}) as client:
            signed_in = client.post("/login", data={"name": "olga", "password": PASSWORD})
            assert (signed_in.status_code, client.get("/").status_code) == (303, 200)
            assert client.post("/v1/identify", json={"userId": "ann"}).status_code == 401
            forged = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "127.0.0.1"}
            # These headers are ignored, because no proxy is trusted.
            assert client.get("/", headers=forged).status_code == 200
        with httpx.Client(base_url=address, headers=AS_SHOP) as client:
            assert client.get("/").status_code == 303
            assert client.post("/runs/1/approve", data={"csrf": KEY}).status_code == 303


@SQLITE
def test_a_proxy_is_refused_without_users_and_write_keys(start):
    with served(start({})) as (_, port), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.get("/").status_code == 200
        assert client.post("/v1/identify", json={"userId": "ann"}).status_code == 200
        for headers in ({"X-Forwarded-For": "192.0.2.1"}, {"Host": "evil.example"}):
            assert client.get("/", headers=headers).status_code == 403
            assert client.post("/v1/identify", json={"userId": "ann"}, headers=headers).status_code == 403
        with connect(("127.0.0.1", port)) as nginx:
            nginx.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            assert nginx.recv(100).startswith(b"HTTP/1.1 403 ")


@SQLITE
def test_a_port_in_use_is_an_error(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = start({})("serve", "--port", str(port))
    assert code == 2
    assert said == (
        f"audience-sync: 127.0.0.1, port {port}, cannot be used: Address already in use. Choose others with "
        "--host and --port.\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_requests_in_flight_before_it_ends(start, url, number):
    with served(start({}, TRACKING)) as (process, port):
        address = ("127.0.0.1", port)
        with connect(address) as idle, begun(address) as connection:
            idle.sendall(HEALTH)
            assert answer(idle)[0] == 200
            process.send_signal(number)
            assert refuses_connections(address)
            assert is_cut(idle)
            connection.sendall(IDENTIFY[10:])
            status, body = answer(connection)
            assert (status, json.loads(body)["calls"][0]["status"]) == (200, "accepted")
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    assert message_ids(url) == ["m1"]


@SQLITE
def test_a_second_signal_ends_it_at_once(start, url):
    with served(start({}, TRACKING)) as (process, port), begun(("127.0.0.1", port)):
        process.send_signal(signal.SIGTERM)
        assert refuses_connections(("127.0.0.1", port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        assert process.stderr.read() == (
            "audience-sync: Stopped at once. Calls that were answered are stored; clients send the others again.\n"
        )
    assert message_ids(url) == []


# What it bears.


@SQLITE
def test_a_head_that_drips_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 2.0)
    with serving() as address:
        with connect(address) as silent, connect(address) as dripping:
            assert is_cut(dripping, b"G")
            assert is_cut(silent)
        with connect(address) as second:
            second.sendall(HEALTH)
            assert answer(second)[0] == 200
            assert is_cut(second, b"G")


@SQLITE
def test_a_connection_may_be_idle_between_requests(serving, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 2.0)
    with serving() as address, connect(address) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200
            assert select.select([connection], [], [], 2.5) == ([], [], [])


@SQLITE
def test_a_connection_that_is_idle_too_long_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    with serving() as address, connect(address) as connection:
        connection.sendall(HEALTH)
        assert answer(connection)[0] == 200
        assert is_cut(connection)


@SQLITE
def test_a_body_that_drips_is_answered_408(serving, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.2)
    with serving() as address, begun(address) as connection:
        assert answer(connection) == (408, b'{"success":false,"error":"the body took too long"}')
        assert is_cut(connection)


@SQLITE
@pytest.mark.parametrize("path", ["/v1/nowhere", "/healthz"])
def test_an_unread_body_that_drips_is_cut_off(serving, monkeypatch, path):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 2.0)
    with serving() as address, connect(address) as connection:
        connection.sendall(head(path, 1_000_000))
        assert answer(connection)[0] in {404, 405}
        assert is_cut(connection, b"x")


@SQLITE
def test_silence_after_an_unread_body_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 2.0)
    with serving() as address, connect(address) as connection:
        connection.sendall(head("/v1/nowhere", 1))
        assert answer(connection)[0] == 404
        connection.sendall(b"x")
        assert is_cut(connection)


@SQLITE
def test_a_sender_that_reads_no_answers_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.2)
    asked = HEALTH.replace(b"/healthz", b"/openapi.json") * 100_000
    with serving() as address, connect(address) as connection:
        assert stops_taking(connection, asked)


@SQLITE
def test_a_thousand_idle_connections_do_not_block_requests(serving, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 600.0)  # a slow machine needs long to open them
    with serving() as address, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(address)) for _ in range(1_000)]
        for connection in idle[:500]:
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200
        with connect(address) as another:
            another.sendall(head("/v1/identify", len(IDENTIFY)) + IDENTIFY)
            assert answer(another)[0] == 200
        idle[0].sendall(HEALTH)
        assert answer(idle[0])[0] == 200


@SQLITE
def test_beyond_the_limit_the_connection_that_has_been_idle_longest_is_closed(serving, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with serving() as address, begun(address) as busy, connect(address) as first, connect(address) as second:
        for connection in (first, second, first):  # the first was used last
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200
        with connect(address) as third:
            third.sendall(HEALTH)
            assert answer(third)[0] == 200
            assert is_cut(second)
        first.sendall(HEALTH)
        assert answer(first)[0] == 200
        busy.sendall(IDENTIFY[10:])
        assert answer(busy)[0] == 200


@SQLITE
def test_a_new_connection_is_closed_while_all_others_are_busy(serving, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    with serving() as address, begun(address) as busy:
        with connect(address) as surplus:
            assert is_cut(surplus)
        busy.sendall(IDENTIFY[10:])
        assert answer(busy)[0] == 200


@SQLITE
def test_what_is_not_http_is_answered_in_json_and_logged(serving, caplog):
    with serving() as address, connect(address) as connection:
        connection.sendall(b"nonsense s3cret\r\n\r\n")
        status, body = answer(connection)
        assert (status, json.loads(body)["success"]) == (400, False)
        assert is_cut(connection)
    (record,) = [each for each in caplog.records if each.getMessage() == "request refused"]
    assert (record.fields["status"], record.fields["path"]) == (400, "other")
    assert "s3cret" not in caplog.text


@SQLITE
def test_a_body_that_is_too_large_takes_no_memory(start):
    with served(start({}, TRACKING)) as (process, port), connect(("127.0.0.1", port)) as connection:
        connection.sendall(HEALTH)
        answer(connection)
        before = most_memory(process)
        connection.sendall(head("/v1/batch", 60_000_000))
        assert stops_taking(connection, bytes(60_000_000))
        with connect(("127.0.0.1", port)) as slightly:
            slightly.sendall(head("/v1/batch", 1_000_000) + bytes(1_000_000))
            assert answer(slightly) == (413, b'{"success":false,"error":"the body is larger than 500 KB"}')
        assert most_memory(process) - before < 10_000_000


def most_memory(process):
    """The most bytes that it ever had in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


# Several on one database.


def test_two_servers_with_the_same_calls_store_each_once(start, url):
    command = start({}, TRACKING)
    chance = random.Random(7)
    calls = [
        {"type": "track", "userId": f"u{number % 20}", "event": "Clicked", "messageId": f"m{number}"}
        if number % 3
        else {"type": "group", "userId": f"u{number % 20}", "groupId": f"c{number % 5}", "messageId": f"m{number}",
              "traits": {"n": number}}
        for number in range(400)
    ]  # fmt: skip
    batches = [chance.sample(calls, 60) for _ in range(60)]
    batches.append(calls)
    with served(command) as (_, one), served(command) as (_, other), httpx.Client() as client:
        together = threading.Barrier(8)

        def send(share):
            together.wait()
            verdicts = []
            for number in share:
                port = one if number % 2 else other
                answered = client.post(
                    f"http://127.0.0.1:{port}/v1/batch",
                    json={"batch": batches[number // 2]},
                    headers=AS_SHOP,
                    timeout=60,
                )
                assert answered.status_code == 200, answered.text
                verdicts += answered.json()["calls"]
            return verdicts

        with ThreadPoolExecutor(8) as pool:
            shares = [range(first, 2 * len(batches), 8) for first in range(8)]
            verdicts = [verdict for each in pool.map(send, shares) for verdict in each]
    once = dict.fromkeys((f"m{number}" for number in range(400)), 1)
    assert Counter(each["messageId"] for each in verdicts if each["status"] == "accepted") == once
    assert {each["status"] for each in verdicts} == {"accepted", "repeated"}
    assert Counter(message_ids(url)) == once
    engine = engines.open_own(url, SCHEMA)
    with engines.read(engine) as connection:
        for statement in (
            "SELECT c.message_id FROM {our}events e JOIN {our}calls c USING (call_id)",
            "SELECT c.message_id FROM {our}deliveries d JOIN {our}calls c USING (call_id) WHERE d.action = 'company'",
        ):
            kept = Counter(dialects.sql(connection, statement).scalars())
            assert set(kept.values()) == {1}
        counts = [
            dialects.sql(connection, f"SELECT count(*) FROM {{our}}{table}").scalar()
            for table in ("events", "deliveries", "profiles", "companies")
        ]
    engine.dispose()
    assert counts == [266, 266 + 2 * 134, 20, 5]
