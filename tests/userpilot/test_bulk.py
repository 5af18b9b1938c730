"""The bulk endpoint: uploads of files and polls of their jobs."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes

import pytest

from audience_sync.sandbox import Limits, Sandbox
from audience_sync.userpilot.client import Answer, Client, Outcome

KEY = "sEcReT/kEy=="
ROWS = b'{"user_id":"u1","metadata":{"vip":true}}\n{"user_id":"\xc3\xbc","metadata":{}}\n'


def response(status, body=b""):
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def answering(answer):
    def script(server, peer):
        while server.read_request(peer):
            peer.sendall(answer)

    return script


def test_an_upload_is_a_form_of_one_file(serve):
    server = serve(answering(response(202)))
    with Client(server.url, KEY) as client:
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", ROWS)
    start, rest = server.requests[0].split(b"\r\n", 1)
    form = message_from_bytes(rest)
    (part,) = form.get_payload()
    assert answer == Answer(Outcome.ACCEPTED, 202, None, None, None)
    assert start == b"POST /v1/users/bulk_identify HTTP/1.1"
    assert form.get_content_type() == "multipart/form-data"
    assert len(form.get_all("content-type")) == 1
    assert form["Authorization"] == f"Token {KEY}"
    assert form["X-API-Version"] == "2020-09-22"
    assert form["Content-Length"] == str(len(rest.partition(b"\r\n\r\n")[2]))
    assert part["Content-Disposition"] == 'form-data; name="file"; filename="users.ndjson"'
    assert part.get_content_type() == "application/x-ndjson"
    assert part.get_payload(decode=True) == ROWS


def test_json_and_uploads_share_a_connection_and_not_their_content_types(serve):
    server = serve(answering(response(202)))
    with Client(server.url, KEY) as client:
        client.send("v1/identify", {})
        client.upload("v1/users/bulk_identify", "users.ndjson", ROWS)
        client.send("v1/identify", {})
    first, form, last = (request.lower() for request in server.requests)
    assert server.connection_count == 1
    assert first == last
    assert b"content-type: application/json\r\n" in first
    assert b"application/json\r\n" not in form


def test_a_job_is_uploaded_and_followed_to_its_end():
    deadline = time.monotonic() + 60
    with (
        Sandbox(limits=Limits(bulk_rows_per_minute=1_000_000)) as sandbox,
        Client(sandbox.url, "sandbox") as client,
    ):
        job = client.upload("v1/users/bulk_identify", "users.ndjson", ROWS).document
        assert job["total_rows"] == 2
        path = f"v1/background_jobs/{job['job_id']}"
        while client.get(path).document["status"] != "completed":
            assert time.monotonic() < deadline
        assert client.get(path).document["completed_rows"] == 2
        assert [listed["job_id"] for listed in client.get("v1/background_jobs").document] == [job["job_id"]]
        assert sandbox.state.users["u1"]["properties"] == {"vip": True}


def test_ten_thousand_rows_of_5_kb_are_uploaded():
    rows = b"".join(
        json.dumps({"user_id": f"u{number}", "metadata": {"a": "x" * 4_900}}).encode() + b"\n"
        for number in range(10_000)
    )
    with Sandbox() as sandbox, Client(sandbox.url, "sandbox") as client:
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", rows)
        assert (answer.status_code, answer.document["file_size"]) == (202, len(rows))


@pytest.mark.parametrize("size", [70_000, 4 * 1024 * 1024])
def test_a_list_of_jobs_may_be_long(serve, size):
    body = b'["' + b"a" * (size - 4) + b'"]'
    with Client(serve(answering(response(200, body))).url, KEY) as client:
        assert client.get("v1/background_jobs").document == ["a" * (size - 4)]


def test_an_answer_longer_than_its_bound_has_no_document(serve):
    long = serve(answering(response(200, b"[1]" + b" " * 70_000)))
    too_long = serve(answering(response(200, b"[1]" + b" " * 4 * 1024 * 1024)))
    with Client(long.url, KEY) as client:
        assert client.get("v1/background_jobs").document == [1]
        for answer in (client.send("v1/identify", {}), client.upload("v1/x", "f", b""), client.validate()):
            assert (answer.outcome, answer.document) == (Outcome.ACCEPTED, None)
    with Client(too_long.url, KEY) as client:
        answer = client.get("v1/background_jobs")
        assert (answer.outcome, answer.document) == (Outcome.ACCEPTED, None)


def test_an_upload_has_more_time_than_other_requests(serve):
    arrived = threading.Event()

    def script(server, peer):
        slow = b"/v1/slow" in server.read_request(peer)
        arrived.set()
        server.stopped.wait(60 if slow else 0.4)
        peer.sendall(response(202))

    server = serve(script)
    bounds = {"deadline_seconds": 0.2, "upload_seconds": 20.0}
    with Client(server.url, KEY, **bounds) as client, ThreadPoolExecutor() as threads:
        upload = threads.submit(client.upload, "v1/users/bulk_identify", "users.ndjson", ROWS)
        assert arrived.wait(60)
        started = time.monotonic()
        slow = client.send("v1/slow", {})
        assert 0.1 < time.monotonic() - started < 30
        assert slow.error == "no complete answer within 0.2 s"
        assert upload.result().outcome is Outcome.ACCEPTED


def test_an_upload_that_is_not_answered_ends_at_its_own_deadline(serve):
    server = serve(lambda server, _: server.stopped.wait(60))
    with Client(server.url, KEY, deadline_seconds=0.1, upload_seconds=0.3) as client:
        started = time.monotonic()
        answer = client.upload("v1/users/bulk_identify", "users.ndjson", ROWS)
        assert 0.2 < time.monotonic() - started < 30
    assert (answer.outcome, answer.error) == (Outcome.UNKNOWN, "no complete answer within 0.3 s")
