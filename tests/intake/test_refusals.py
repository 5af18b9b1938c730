"""Requests and calls that the tracking API refuses: for their key, their number or a failing database; and its log."""

import json
import logging

import pytest

from audience_sync.db import dialects, engines
from audience_sync.intake import http
from tests.intake.conftest import (
    AS_SHOP,
    IDENTIFY,
    KEY,
    NO_PATH,
    OTHER_KEY,
    SQLITE,
    accepted,
    refusal,
    refused,
)

# Write keys.


@SQLITE
def test_refused_calls_are_logged_because_the_libraries_do_not_read_the_verdicts(api, caplog):
    api.batch(IDENTIFY, {"type": "track", "userId": "s3cret"}, {"type": "identify"})
    (record,) = [each for each in caplog.records if each.getMessage() == "calls refused"]
    reason = "event must be a non-empty string in a track call"
    assert record.fields == {"count": 2, "first_reason": reason, "unlogged": 0}


@SQLITE
@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_any_of_the_write_keys_is_accepted(api, key):
    assert api("POST", "/v1/identify", json=IDENTIFY, auth=(key, "")).status_code == 200
    assert api("POST", "/v1/identify", json=IDENTIFY | {"writeKey": key}).status_code == 200
    assert api("POST", "/v1/batch", json={"batch": [IDENTIFY], "writeKey": key}).status_code == 200


@SQLITE
@pytest.mark.parametrize(
    ("authorization", "body_key"),
    [
        (None, None),
        (None, "wrong"),
        (None, ""),
        (None, 7),
        (None, [KEY]),
        (None, "\ud800"),
        (None, KEY[:-1]),
        ("Basic d3Jvbmc6", None),
        ("Basic d3Jvbmc6", KEY),  # what is said in the header counts
        ("Basic", KEY),
        ("Basic ====", KEY),
        ("Basic /////w==", KEY),
        (f"Bearer {KEY}", None),
        (KEY, None),
        ("", KEY),
    ],
)
def test_without_a_known_write_key_a_request_is_refused(api, authorization, body_key):
    headers = {} if authorization is None else {"Authorization": authorization}
    for path, document in (("identify", dict(IDENTIFY)), ("batch", {"batch": [IDENTIFY]})):
        if body_key is not None:
            document["writeKey"] = body_key
        answer = api.post(path, json.dumps(document).encode(), headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Basic"
        assert "is" in answer.json()["error"]
        assert KEY not in answer.text
    assert api.rows("calls") == []


def test_a_write_key_appears_in_no_table_log_or_answer(api, caplog):
    caplog.set_level(logging.DEBUG)
    call = {"type": "track", "userId": "ann", "event": "Ordered", "writeKey": KEY}
    answers = [
        api("POST", "/v1/track", json=call, auth=(KEY, "")),
        api("POST", "/v1/batch", json={"batch": [call, {"writeKey": KEY}], "writeKey": KEY}),
        api("POST", "/v1/batch", json={"batch": [call], "writeKey": f"{KEY}!"}),
        api("POST", "/v1/batch", content=b"{", auth=(KEY, "")),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 400]
    kept = [api.rows(table) for table in ("calls", "events", "deliveries", "profiles")]
    assert len(kept[0]) == 2
    answered = [answer.text + str(answer.headers) for answer in answers]
    assert KEY not in f"{kept} {answered} {caplog.text}"


@SQLITE
def test_without_write_keys_only_local_programs_that_are_no_browser_may_send(make_api):
    api = make_api(tracked="")
    for address in ("http://127.0.0.1:8040", "http://localhost", "http://[::1]:8040"):
        assert api.post("identify", IDENTIFY, headers={}, address=address).status_code == 200
    refusing = [
        {"Host": "evil.example"},
        {"Host": "bad_name.evil.example:8040"},  # leads here, perhaps: DNS rebinding
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.1.7:8040"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "http://127.0.0.1:8040"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Forwarded": "for=192.0.2.1"},  # through a proxy on this machine
        {"Via": "1.1 proxy"},
        {"X-Real-IP": "192.0.2.1"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-Proto": "https"},
    ]
    for headers in refusing:
        answer = api.post("identify", IDENTIFY, headers=headers)
        assert refusal(answer) == (
            403,
            refused("without [tracking] write_keys only programs on this machine may send"),
        )


# Pace, and troubles.


@SQLITE
def test_above_the_rate_an_answer_says_when_to_try_again(make_api):
    api = make_api(tracked="calls_per_second = 10")
    calls = [{"type": "track", "userId": "ann", "event": "Clicked", "messageId": f"c{n}"} for n in range(40)]
    assert api.post("batch", {"batch": calls}, headers={}).status_code == 200  # whole, once one call fits
    answer = api.post("identify", IDENTIFY, headers={})
    assert refusal(answer) == (429, refused("more calls than [tracking] calls_per_second"))
    assert answer.headers["Retry-After"] == "4"
    api.clock.sleep(2.9)
    assert api.post("identify", IDENTIFY, headers={}).headers["Retry-After"] == "1"
    api.clock.sleep(0.1)
    assert api.post("identify", IDENTIFY, headers={}).status_code == 200
    assert api.post("identify", IDENTIFY, headers={}).status_code == 429


def test_nothing_is_stored_in_part_while_the_database_cannot_be_used(api, caplog):
    with engines.write(api.app.engine) as connection:
        dialects.sql(connection, "ALTER TABLE {our}events RENAME TO away")
    track = {"type": "track", "userId": "bob", "messageId": "m2", "event": "Ordered"}
    answer = api.post("batch", {"batch": [IDENTIFY, track]})
    assert refusal(answer) == (503, refused("the database cannot be used: try again"))
    assert answer.headers["Retry-After"] == "5"
    assert "calls could not be stored" in caplog.text
    assert api.rows("calls") == api.rows("profiles") == api.rows("deliveries") == []
    with engines.write(api.app.engine) as connection:
        dialects.sql(connection, "ALTER TABLE {our}away RENAME TO events")
    assert api.batch(IDENTIFY, track) == accepted("m1", "m2")


@SQLITE
def test_calls_are_refused_while_the_database_is_behind(api, monkeypatch):
    monkeypatch.setattr(http, "MAX_WAITING_CALLS", 0)
    assert refusal(api.post("identify", IDENTIFY)) == (503, refused("the database cannot keep up: try again"))


def test_health_says_whether_calls_can_be_stored(api):
    assert refusal(api("GET", "/healthz")) == (200, {"status": "ok", "daemon_heartbeat_at": None})
    with engines.write(api.app.engine) as connection:
        dialects.sql(connection, "ALTER TABLE {our}destination RENAME TO away")
    failing = {"status": "failing", "reason": "the database cannot be used"}
    assert refusal(api("GET", "/healthz")) == (503, failing)


# Logs.


@SQLITE
def test_each_refused_request_is_logged_without_what_it_said(api, caplog):
    api("POST", "/v1/batch", content=b"{", headers=AS_SHOP)
    api("POST", "/v1/batch", json={"batch": [IDENTIFY], "writeKey": "s3cret"})
    api("POST", "/v1/identify/s3cret", headers=AS_SHOP)
    api("PUT", "/v1/import/", headers=AS_SHOP)
    api.post("track", bytes(40_000))
    fields = [each.fields for each in caplog.records if each.getMessage() == "request refused"]
    assert {each.pop("unlogged") for each in fields} == {0}
    assert fields == [
        {"status": 400, "path": "/v1/batch", "reason": "the body is not valid JSON"},
        {"status": 401, "path": "/v1/batch", "reason": "the write key is missing or not known"},
        {"status": 404, "path": "other", "reason": NO_PATH},
        {"status": 405, "path": "/v1/import", "reason": "this path takes POST only"},
        {"status": 413, "path": "/v1/track", "reason": "the body is larger than 32 KB"},
    ]
    assert "s3cret" not in caplog.text


@SQLITE
def test_a_flood_of_refused_requests_does_not_flood_the_log(api, caplog):
    def refused_count():
        return len([each for each in caplog.records if each.getMessage() == "request refused"])

    for _ in range(25):
        api("POST", "/v1/nowhere")
    assert refused_count() == 10
    api.clock.sleep(1)
    api("POST", "/v1/nowhere")
    assert (refused_count(), caplog.records[-1].fields["unlogged"]) == (11, 15)


# Requests at a time.


@SQLITE
def test_too_many_requests_at_a_time_are_answered_503(api, monkeypatch):
    monkeypatch.setattr(http, "MAX_REQUESTS", 0)
    answer = api.post("identify", IDENTIFY)
    assert refusal(answer) == (503, refused("too many requests at a time: try again"))
    assert answer.headers["Retry-After"] == "5"
    assert api("POST", "/v1/identify", json=IDENTIFY | {"writeKey": KEY}).status_code == 200


@SQLITE
def test_unauthenticated_senders_do_not_use_up_the_requests_of_known_senders(api, monkeypatch):
    monkeypatch.setattr(http, "MAX_UNKNOWN_REQUESTS", 0)
    assert api("POST", "/v1/identify", json=IDENTIFY | {"writeKey": KEY}).status_code == 503
    assert api.post("identify", IDENTIFY).status_code == 200
