"""Bad TLS is a failure to connect: neither the key nor the request is sent."""

import socket
import ssl
import struct
import time
import warnings
from datetime import UTC, datetime

import pytest
import trustme

from audience_sync.userpilot.client import Client, Outcome

KEY = "sEcReT/kEy=="
ACCEPTED = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"


def accepting(server, peer):
    while server.read_request(peer):
        peer.sendall(ACCEPTED)


def asked(ask, url, seconds=30.0, **options):
    """Answer of a server over https."""
    url = url.replace("http:", "https:")
    with Client(url, KEY, deadline_seconds=seconds, upload_seconds=seconds, **options) as client:
        return ask(client)


def test_ca_file_adds_a_private_authority(serve, tls_for, ca_file):
    server = serve(accepting, tls=tls_for("127.0.0.1"))
    with Client(server.url, KEY, ca_file=ca_file) as client:
        assert [client.send("v1/track", {}).outcome for _ in range(3)] == [Outcome.ACCEPTED] * 3
    assert server.connection_count == 1


def test_a_certificate_of_an_unknown_authority_is_failed(serve, tls_for, ask):
    server = serve(accepting, tls=tls_for("127.0.0.1"))
    answer = asked(ask, server.url)
    assert answer.outcome is Outcome.FAILED
    assert "unable to get local issuer certificate" in answer.error
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "begins", "ends", "reason"),
    [
        ("127.0.0.1", 2019, 2020, "certificate has expired"),
        ("127.0.0.1", 2090, 2091, "certificate is not yet valid"),
        ("elsewhere.example", 2019, 2090, "IP address mismatch"),
    ],
    ids=["expired", "too-early", "wrong-host"],
)
def test_a_bad_certificate_is_failed_with_the_reason(
    serve, tls_for, ca_file, ask, name, begins, ends, reason
):
    dates = {"not_before": datetime(begins, 1, 1, tzinfo=UTC), "not_after": datetime(ends, 1, 1, tzinfo=UTC)}
    server = serve(accepting, tls=tls_for(name, **dates))
    answer = asked(ask, server.url, ca_file=ca_file)
    assert answer.outcome is Outcome.FAILED
    assert reason in answer.error
    assert server.requests == []


def test_a_self_signed_certificate_is_failed(serve, tmp_path, ask):
    itself = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    itself.private_key_pem.write_to_path(tmp_path / "self.pem")
    itself.cert_pem.write_to_path(tmp_path / "self.pem", append=True)
    context.load_cert_chain(tmp_path / "self.pem")
    server = serve(accepting, tls=context)
    answer = asked(ask, server.url)
    assert answer.outcome is Outcome.FAILED
    assert "self-signed certificate" in answer.error
    assert server.requests == []


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_a_server_of_old_tls_is_failed(serve, tls_for, ca_file, ask, version):
    context = tls_for("127.0.0.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    server = serve(accepting, tls=context)
    answer = asked(ask, server.url, ca_file=ca_file)
    assert answer.outcome is Outcome.FAILED
    assert "protocol version" in answer.error
    assert server.requests == []


@pytest.mark.parametrize("length", [0, 1, 5, 60, 700])
def test_a_handshake_that_breaks_off_is_failed(serve, tls_for, ca_file, ask, length):
    context = tls_for("127.0.0.1")

    def script(_, peer):
        hello, flight = ssl.MemoryBIO(), ssl.MemoryBIO()
        itself = context.wrap_bio(hello, flight, server_side=True)
        hello.write(peer.recv(65536))
        with pytest.raises(ssl.SSLWantReadError):
            itself.do_handshake()
        peer.sendall(flight.read(length))

    answer = asked(ask, serve(script).url, ca_file=ca_file)
    assert answer.outcome is Outcome.FAILED
    assert answer.error.startswith("cannot connect: ")


def test_a_server_without_tls_is_failed(serve, ask):
    answer = asked(ask, serve(lambda _, peer: peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")).url)
    assert answer.outcome is Outcome.FAILED
    assert "wrong version number" in answer.error.lower()


def test_a_handshake_that_never_comes_is_failed(serve, ask):
    server = serve(lambda server, _: server.stopped.wait(60))
    started = time.monotonic()
    assert asked(ask, server.url, 0.3).outcome is Outcome.FAILED
    assert time.monotonic() - started < 30


def test_a_handshake_that_drips_is_failed_at_the_deadline(serve, ask):
    server = serve(lambda server, peer: server.drip(peer, b"\x16\x03\x03\x40\x00" + b"a" * 1_200))
    started = time.monotonic()
    assert asked(ask, server.url, 0.3).outcome is Outcome.FAILED
    assert time.monotonic() - started < 30


def test_an_answer_that_drips_is_cut_off(serve, tls_for, ca_file, ask):
    def script(server, peer):
        server.read_request(peer)
        server.drip(peer, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 1_200)

    server = serve(script, tls=tls_for("127.0.0.1"))
    started = time.monotonic()
    assert asked(ask, server.url, 3.0, ca_file=ca_file).outcome is Outcome.UNKNOWN
    assert time.monotonic() - started < 30


def test_an_upload_that_nobody_reads_is_cut_off(serve, tls_for, ca_file):
    server = serve(lambda server, _: server.stopped.wait(60), tls=tls_for("127.0.0.1"))
    started = time.monotonic()
    with Client(server.url, KEY, ca_file=ca_file, upload_seconds=3.0) as client:
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", b"x" * 5_000_000)
    assert (answer.outcome, answer.error) == (Outcome.UNKNOWN, "no complete answer within 3 s")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("linger", [0, 1], ids=["closed", "reset"])
@pytest.mark.parametrize(
    "answer", [b"", b'HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{"a":1}'], ids=["head", "body"]
)
def test_an_answer_that_breaks_off_is_unknown(serve, tls_for, ca_file, ask, answer, linger):
    def script(server, peer):
        server.read_request(peer)
        peer.sendall(answer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", linger, 0))

    server = serve(script, tls=tls_for("127.0.0.1"))
    assert asked(ask, server.url, ca_file=ca_file).outcome is Outcome.UNKNOWN
