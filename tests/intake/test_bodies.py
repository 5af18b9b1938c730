"""Bodies of requests to the tracking API: their form, encoding and limits."""

import gzip
import json
import zlib

import pytest

from tests.intake.conftest import AS_SHOP, IDENTIFY, SQLITE, accepted, refusal, refused

GZIP = AS_SHOP | {"Content-Encoding": "gzip"}


@SQLITE
@pytest.mark.parametrize("path", ["identify", "batch"])
@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"\xff", "the body is not valid JSON"),
        (b'{"userId": "u1", "event": "K\xf6ln"}', "the body is not valid JSON"),
        (b"[" * 20_000, "the body is not valid JSON"),
        (b"[]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b'"a"', "the body must be a JSON object"),
    ],
)
def test_a_body_must_be_a_json_object(api, path, body, error):
    assert refusal(api.post(path, body)) == (400, refused(error))


@SQLITE
@pytest.mark.parametrize("batch", [None, {}, "a", 7])
def test_a_batch_is_a_list(api, batch):
    assert refusal(api.post("batch", {"batch": batch})) == (400, refused("batch must be a list of calls"))
    assert refusal(api.post("batch", {})) == (400, refused("batch must be a list of calls"))


@SQLITE
def test_an_empty_batch_is_a_batch(api):
    assert api.batch() == []


@SQLITE
def test_invalid_unicode_is_refused_call_by_call(api):
    body = b'{"batch": [{"type": "identify", "userId": "ann", "messageId": "\\ud800"}, %s]}'
    answer = api.post("batch", body % json.dumps(IDENTIFY).encode())
    reason = "text with a lone surrogate is not valid Unicode"
    assert answer.json()["calls"] == [
        {"messageId": None, "status": "refused", "reason": reason},
        *accepted("m1"),
    ]


@SQLITE
@pytest.mark.parametrize("name", ["gzip", "GZip", " x-gzip"])
def test_gzip_is_decompressed(api, name):
    body = gzip.compress(json.dumps({"batch": [IDENTIFY]}).encode())
    assert api.post("batch", body, headers=AS_SHOP | {"Content-Encoding": name}).json()["calls"] == accepted(
        "m1"
    )


@SQLITE
def test_incomplete_gzip_is_refused(api):
    body = gzip.compress(json.dumps(IDENTIFY).encode())
    early = "the body is not valid gzip: it ends early, or more data follows"
    for broken, error in [
        (b"{}", "the body is not gzip"),
        (b"", early),
        (body[:-1], early),
        (body + body, early),
        (body[:-8] + bytes(8), "the body is not gzip"),
        (zlib.compress(b"{}"), "the body is not gzip"),
    ]:
        assert refusal(api.post("identify", broken, headers=GZIP)) == (400, refused(error))
    deflated = api.post("identify", body, headers=AS_SHOP | {"Content-Encoding": "deflate"})
    assert refusal(deflated) == (400, refused("Content-Encoding must be gzip, or absent"))


@SQLITE
def test_a_gzip_bomb_is_refused(api):
    bomb = gzip.compress(bytes(100_000_000))
    assert refusal(api.post("batch", bomb, headers=GZIP)) == (
        413,
        refused("the body is larger than 500 KB"),
    )
    assert refusal(api.post("track", bomb, headers=GZIP)) == (413, refused("the body is larger than 32 KB"))


@SQLITE
def test_bodies_have_a_limit(api):
    most = json.dumps({"batch": [IDENTIFY]}).encode()
    assert api.post("batch", most.ljust(500 * 1024)).status_code == 200
    assert refusal(api.post("batch", most.ljust(500 * 1024 + 1))) == (
        413,
        refused("the body is larger than 500 KB"),
    )
    assert api.post("identify", json.dumps(IDENTIFY).encode().ljust(32 * 1024)).status_code == 200
    assert refusal(api.post("identify", b"{}".ljust(32 * 1024 + 1))) == (
        413,
        refused("the body is larger than 32 KB"),
    )


@SQLITE
def test_a_call_in_a_batch_has_a_limit_of_its_own(api):
    large = IDENTIFY | {"messageId": "m2", "traits": {"a": "x" * 32 * 1024}}
    assert api.batch(large, IDENTIFY) == [
        {"messageId": "m2", "status": "refused", "reason": "the call is larger than 32 KB"},
        *accepted("m1"),
    ]


@SQLITE
def test_shared_fields_count_for_each_call(api):
    calls = [{"type": "track", "userId": "ann", "event": "Clicked"}] * 2000
    for context, error in [
        (
            {"a": "x" * 32 * 1024},
            (400, "the batch's context and integrations: the call is larger than 32 KB"),
        ),
        (
            {"a": "x" * 10_000},
            (413, "the batch's context and integrations are too large for this many calls: divide it"),
        ),
        ("all", (200, None)),
    ]:
        answer = api.post("batch", {"batch": calls, "context": context})
        assert (answer.status_code, answer.json().get("error")) == error


def test_the_number_of_calls_in_a_batch_is_limited(api):
    calls = [
        {"type": "track", "userId": "ann", "event": "Clicked", "messageId": f"c{n}"} for n in range(2501)
    ]
    assert refusal(api.post("batch", {"batch": calls})) == (
        413,
        refused("a batch has at most 2,500 calls: divide it"),
    )
    assert api.rows("calls") == []
    assert api.batch(*calls[:2500]) == accepted(*(each["messageId"] for each in calls[:2500]))
