"""`serve` takes requests in the form that Segment's libraries for other languages send, by their public sources.

Each request is built byte by byte: path, headers, authorization, body and compression. test_clients.py runs the
libraries for Python and Node themselves.
"""

import base64
import gzip
import json
import socket

import pytest

from tests.intake.conftest import KEY
from tests.intake.test_serve import answer

BASIC = f"Basic {base64.b64encode(f'{KEY}:'.encode()).decode()}"
SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here


def identify(**members):
    return {"type": "identify", "userId": "ann", "messageId": "m1", "traits": {"plan": "pro"}, **members}


def library(name, version):
    return {"library": {"name": name, "version": version}}


def compact(document):
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def request(path, headers, body, *, chunked=False):
    """A POST over HTTP/1.1."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1:8040", *headers, framing, "", ""]
    if chunked:
        body = (
            b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:100], body[100:])) + b"0\r\n\r\n"
        )
    return "\r\n".join(lines).encode() + body


RUBY = request(
    "/v1/batch",
    [
        "Accept: application/json",
        "Content-Type: application/json",
        "User-Agent: analytics-ruby/2.5.0",
        f"Authorization: {BASIC}",
        "Connection: keep-alive",
        "Accept-Encoding: gzip;q=1.0,deflate;q=0.6,identity;q=0.3",
    ],
    compact(
        {
            "sentAt": "2026-01-01T00:00:00.000Z",
            "batch": [
                identify(
                    context=library("analytics-ruby", "2.5.0"),
                    timestamp="2026-01-01T00:00:00.000Z",
                    options=None,
                    integrations=None,
                )
            ],
        }
    ),
)
PHP_CALL = identify(
    context={"library": {"name": "analytics-php", "version": "3.8.1", "consumer": "LibCurl"}},
    timestamp="2026-01-01T00:00:00+00:00",
    integrations=[],
)
PHP_BODY = compact({"batch": [PHP_CALL], "sentAt": "2026-01-01T00:00:00+00:00"})
PHP_HEADERS = [
    f"Authorization: {BASIC}",
    "Accept: */*",
    "Content-Type: application/json",
    "User-Agent: analytics-php/3.8.1",
]
PHP = request("/v1/batch", PHP_HEADERS, PHP_BODY)
PHP_GZIP = request("/v1/batch", [*PHP_HEADERS, "Content-Encoding: gzip"], gzip.compress(PHP_BODY, mtime=0))
PHP_SOCKET = (
    "POST /v1/batch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    f"Authorization: {BASIC}\r\nAccept: application/json\r\nUser-Agent: analytics-php/3.8.1\r\n"
    f"Content-length: {len(PHP_BODY)}\r\n\r\n"
).encode() + PHP_BODY
JAVA_BODY = compact(
    {
        "batch": [
            identify(
                channel="server",
                anonymousId="0c1f2a5e",
                context=library("analytics-java", "3.5.2"),
                integrations={},
                timestamp="2026-01-01T00:00:00.000Z",
            )
        ],
        "sentAt": "2026-01-01T00:00:00.000Z",
        "context": library("analytics-java", "3.5.2"),
        "sequence": 1,
        "writeKey": KEY,
    }
)
JAVA_HEADERS = [
    f"Authorization: {BASIC}",
    "User-Agent: analytics-java/3.5.2",
    "Content-Type: application/json; charset=UTF-8",
    "Connection: Keep-Alive",
    "Accept-Encoding: gzip",
]
JAVA = request("/v1/import/", JAVA_HEADERS, JAVA_BODY)
JAVA_BEHIND_A_HOST_WITH_A_SLASH = request("//v1/import/", JAVA_HEADERS, JAVA_BODY)
JAVA_GZIP = request(
    "/v1/import", [*JAVA_HEADERS, "Content-Encoding: gzip"], gzip.compress(JAVA_BODY, mtime=0), chunked=True
)
NET_BODY = compact(
    {
        "messageId": "b1",
        "sentAt": "2026-01-01T01:00:00.0000000+01:00",
        "batch": [
            identify(
                anonymousId=None,
                timestamp="2026-01-01T01:00:00.0000000+01:00",
                context=library("Analytics.NET", "3.8.1"),
                integrations={},
            )
        ],
        "writeKey": KEY,
        "context": library("Analytics.NET", "3.8.1"),
    }
)
NET_HEADERS = [f"Authorization: {BASIC}", "User-Agent: Analytics.NET/3.8.1", "Content-Type: application/json"]
NET = request("/v1/import", NET_HEADERS, NET_BODY)
NET_GZIP = request("/v1/import", [*NET_HEADERS, "Content-Encoding: gzip"], gzip.compress(NET_BODY, mtime=0))
PHONE = {"sentAt": "2026-01-01T00:00:00.000Z", "writeKey": KEY}
PHONE_CALL = identify(
    anonymousId="2f6a",
    timestamp="2026-01-01T00:00:00.000Z",
    integrations={},
    _metadata={"bundled": [], "unbundled": [], "bundledIds": []},
)
CSHARP = request(
    "/v1/b",
    ["Connection: close", "Accept: text/plain", "Content-Encoding: gzip"],
    gzip.compress(compact({"batch": [PHONE_CALL], **PHONE}), mtime=0),
)
KOTLIN = request(
    "/v1/b",
    [
        "User-Agent: analytics-kotlin/1.16.3",
        "Content-Type: text/plain",
        "Content-Encoding: gzip",
        "Accept: text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
        "Connection: keep-alive",
    ],
    gzip.compress(compact({"batch": [PHONE_CALL], **PHONE}), mtime=0),
    chunked=True,
)
SWIFT = request(
    "/v1/b",
    [
        "Content-Type: application/json; charset=utf-8",
        "User-Agent: analytics-ios/1.5.11",
        "Accept-Encoding: gzip",
        f"Authorization: {BASIC}",
        "Accept: */*",
        "Connection: keep-alive",
    ],
    # It opens the file with a line that ends after "[", and closes it when the batch is sent.
    b'{ "batch": [\n'
    + compact(PHONE_CALL)
    + b'],"sentAt":"2026-01-01T00:00:00.000Z","writeKey":"%s"}' % KEY.encode(),
)
GO = request(
    "/v1/batch",
    [
        "User-Agent: analytics-go (version: 3.0.0)",
        f"Authorization: {BASIC}",
        "Content-Type: application/json",
        "Accept-Encoding: gzip",
    ],
    compact(
        {
            "messageId": "b1",
            "sentAt": "2026-01-01T00:00:00.123456789Z",
            "batch": [identify(timestamp="2026-01-01T00:00:00.123456789Z")],
            "context": library("analytics-go", "3.0.0"),
        }
    ),
)
REQUESTS = {
    "Ruby": RUBY,
    "PHP": PHP,
    "PHP with gzip": PHP_GZIP,
    "PHP by socket": PHP_SOCKET,
    "Java": JAVA,
    "Java behind a host with a slash": JAVA_BEHIND_A_HOST_WITH_A_SLASH,
    "Java with gzip": JAVA_GZIP,
    ".NET": NET,
    ".NET with gzip": NET_GZIP,
    "C#": CSHARP,
    "Kotlin": KOTLIN,
    "Swift": SWIFT,
    "Go": GO,
}


@SQLITE
@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_libraries_for_other_languages_are_accepted(serving, name):
    with serving() as address, socket.create_connection(address, timeout=60) as connection:
        connection.sendall(REQUESTS[name])
        status, body = answer(connection)
    document = json.loads(body)
    (verdict,) = document["calls"]
    assert (status, document["success"]) == (200, True)
    assert (verdict["messageId"], verdict["status"]) == ("m1", "accepted")
    assert "PHP" in name or "corrected" not in verdict


@SQLITE
@pytest.mark.parametrize("name", REQUESTS)
def test_a_library_with_a_wrong_key_gets_an_answer_in_json(serving, name):
    wrong = base64.b64encode(b"wrong-of-the-shop!:").decode()
    sent = REQUESTS[name].replace(BASIC.encode(), f"Basic {wrong}".encode())
    if name in {"C#", "Kotlin"}:
        body = compact({"batch": [PHONE_CALL], **PHONE, "writeKey": "wrong"})
        sent = request("/v1/b", ["Content-Encoding: gzip"], gzip.compress(body, mtime=0))
    with serving() as address, socket.create_connection(address, timeout=60) as connection:
        connection.sendall(sent)
        status, body = answer(connection)
    assert (status, json.loads(body)["success"]) == (401, False)
