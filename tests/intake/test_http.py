"""The tracking API: senders, bodies, limits and verdicts."""

import datetime as dt
import gzip
import json
import logging
import zlib

import pytest
from starlette.responses import PlainTextResponse

from audience_sync.db import dialects, engines
from audience_sync.intake import http
from tests.intake.conftest import AS_SHOP, KEY, OTHER_KEY
from tests.queue.conftest import START

IDENTIFY = {"type": "identify", "userId": "ann", "messageId": "m1", "traits": {"plan": "pro"}}
GZIP = AS_SHOP | {"Content-Encoding": "gzip"}
SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the databases do not differ here


def accepted(*message_ids):
    return [{"messageId": each, "status": "accepted"} for each in message_ids]


def refusal(answer):
    return answer.status_code, answer.json()


def refused(error):
    return {"success": False, "error": error}


@pytest.mark.parametrize(
    ("path", "call", "verdict"),
    [
        ("identify", {"traits": {"plan": "pro"}}, {"status": "accepted"}),
        ("track", {"event": "Order Completed"}, {"status": "accepted"}),
        ("group", {"groupId": "acme"}, {"status": "accepted"}),
        ("page", {}, {"status": "ignored", "reason": "no mapping matched: Userpilot has no page calls"}),
        (
            "screen",
            {},
            {"status": "ignored", "reason": "no mapping matched: Userpilot has no screen calls"},
        ),
        (
            "alias",
            {"previousId": "a1"},
            {"status": "ignored", "reason": "no mapping matched: Userpilot has no alias calls"},
        ),
    ],
)
def test_each_type_has_a_path(api, path, call, verdict):
    answer = api.post(path, {"userId": "ann", "messageId": "m1", **call})
    assert answer.status_code == 200
    assert answer.json() == {"success": True, "calls": [{"messageId": "m1", **verdict}]}
    assert api.rows("calls", "message_id, type, user_id, status") == [("m1", path, "ann", verdict["status"])]


@SQLITE
def test_the_path_sets_the_type_and_a_missing_message_id_is_made(api):
    (verdict,) = api.post("identify", {"type": "track", "userId": "ann"}).json()["calls"]
    assert api.rows("calls", "message_id, type") == [(verdict["messageId"], "identify")]


def test_a_bad_call_in_a_batch_is_refused_alone(api):
    calls = [
        IDENTIFY,
        {"type": "track", "userId": "ann", "messageId": "m2"},
        7,
        IDENTIFY | {"messageId": "m3"},
    ]
    assert api.batch(*calls) == [
        {"messageId": "m1", "status": "accepted"},
        {
            "messageId": "m2",
            "status": "refused",
            "reason": "event must be a non-empty string in a track call",
        },
        {"messageId": None, "status": "refused", "reason": "a call must be a JSON object"},
        {"messageId": "m3", "status": "accepted"},
    ]
    assert api.rows("calls", "message_id") == [("m1",), ("m3",)]


def test_a_bad_call_alone_is_answered_400(api):
    answer = api.post("track", {"userId": "ann", "messageId": "m1"})
    reason = "event must be a non-empty string in a track call"
    verdict = {"messageId": "m1", "status": "refused", "reason": reason}
    assert refusal(answer) == (400, {"success": False, "error": reason, "calls": [verdict]})
    assert api.rows("calls") == []


def test_a_message_id_counts_once_in_a_batch_and_across_batches(api):
    other = IDENTIFY | {"traits": {"plan": "basic"}}
    repeated = {"messageId": "m1", "status": "repeated"}
    assert api.batch(IDENTIFY, other) == [*accepted("m1"), repeated]
    assert api.batch(other, IDENTIFY | {"messageId": "m2"}) == [repeated, *accepted("m2")]
    assert api.post("identify", other).json()["calls"] == [repeated]
    assert api.rows("deliveries", "action, subject_id") == [("identify", "ann"), ("identify", "ann")]
    assert api.rows("profiles", "CAST(traits AS text)")[0][0].replace(" ", "") == '{"plan":"pro"}'


def test_a_verdict_names_the_traits_that_are_not_sent(api):
    (verdict,) = api.batch(IDENTIFY | {"traits": {"vips": True, "plan": "pro"}})
    assert verdict == {"messageId": "m1", "status": "accepted", "leftOut": ["vips"]}


def test_a_call_that_is_kept_from_userpilot_is_ignored(api):
    (verdict,) = api.batch(IDENTIFY, integrations={"Userpilot": False})
    assert verdict == {
        "messageId": "m1",
        "status": "ignored",
        "reason": "integrations leaves Userpilot out",
    }


def test_shared_fields_of_a_batch_are_merged_into_each_call_whose_own_members_win(api):
    call = {"type": "track", "userId": "ann", "event": "Ordered"}
    api.batch(
        {**call, "messageId": "m1"},
        {**call, "messageId": "m2", "context": {"ip": "own"}, "integrations": {"All": True}},
        context={"ip": "shared", "app": "shop"},
        integrations={"All": False},
    )
    contexts = [json.loads(row[0]) for row in api.rows("events", "CAST(context AS text)")]
    assert sorted(contexts, key=str) == [{"ip": "own", "app": "shop"}, {"ip": "shared", "app": "shop"}]
    assert api.rows("calls", "message_id, status") == [("m1", "ignored"), ("m2", "accepted")]


def test_a_senders_clock_is_corrected_by_sent_at(api):
    an_hour_late = dt.timedelta(hours=1)
    sent_at = (START + an_hour_late).isoformat()
    at = {"timestamp": (START + an_hour_late - dt.timedelta(minutes=10)).isoformat()}
    right = {"timestamp": (START - dt.timedelta(minutes=20)).isoformat(), "sentAt": START.isoformat()}
    api.batch(IDENTIFY | at, IDENTIFY | {"messageId": "m2"} | right, sentAt=sent_at)
    api.post("identify", IDENTIFY | {"messageId": "m3", "sentAt": sent_at} | at)
    api.batch(IDENTIFY | {"messageId": "m4"} | at)
    assert [(row[0], str(row[1])[:16]) for row in api.rows("calls", "message_id, timestamp")] == [
        ("m1", "2025-12-31 23:50"),
        ("m2", "2025-12-31 23:40"),
        ("m3", "2025-12-31 23:50"),
        ("m4", "2026-01-01 00:00"),  # a moment to come counts as now
    ]


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


# Bodies.


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
def test_gzip_is_decompressed(api):
    body = gzip.compress(json.dumps({"batch": [IDENTIFY]}).encode())
    assert api.post("batch", body, headers=GZIP).json()["calls"] == accepted("m1")


@SQLITE
def test_incomplete_gzip_is_refused(api):
    body = gzip.compress(json.dumps(IDENTIFY).encode())
    early = "the body is not gzip: it ends early, or more data follows"
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
    assert refusal(api.post("identify", IDENTIFY)) == (503, refused("the database is behind: try again"))


def test_health_says_whether_calls_can_be_stored(api):
    assert refusal(api("GET", "/healthz")) == (200, {"status": "ok", "daemon_heartbeat_at": None})
    with engines.write(api.app.engine) as connection:
        dialects.sql(connection, "ALTER TABLE {our}destination RENAME TO away")
    failing = {"status": "failing", "reason": "the database cannot be used"}
    assert refusal(api("GET", "/healthz")) == (503, failing)


BATCH_PATHS = ["/v1/batch", "/v1/import", "/v1/b"]


@SQLITE
@pytest.mark.parametrize(
    "path", [*BATCH_PATHS, *(f"{path}/" for path in BATCH_PATHS), "/v1/import//", "/v1//b"]
)
def test_the_paths_of_all_libraries_take_a_batch(api, path):
    answer = api("POST", path, headers=AS_SHOP, json={"batch": [IDENTIFY]})
    assert (answer.status_code, answer.json()["calls"]) == (200, accepted("m1"))


@SQLITE
@pytest.mark.parametrize("path", ["identify", "identify/", "i", "i/"])
def test_the_paths_of_all_libraries_take_a_call(api, path):
    assert api.post(path, IDENTIFY).json()["calls"] == accepted("m1")
    assert api.rows("calls", "type") == [("identify",)]


@SQLITE
@pytest.mark.parametrize("path", ["/healthz/", "/openapi.json/"])
def test_a_slash_at_the_end_makes_no_difference(api, path):
    assert api("GET", path).status_code == 200


NO_PATH = "there is no such path: calls go to /v1/batch, and /openapi.json describes the API"


@SQLITE
@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/", 404, NO_PATH),
        ("POST", "/v1", 404, NO_PATH),
        ("POST", "/v1/delete", 404, NO_PATH),
        ("POST", "/v2/batch", 404, NO_PATH),
        ("POST", "/v1/identify/u1", 404, NO_PATH),
        ("GET", "/v1/identify", 405, "this path takes POST only"),
        ("GET", "/v1/import/", 405, "this path takes POST only"),
        ("PUT", "/v1/batch", 405, "this path takes POST only"),
        ("POST", "/healthz", 405, "this path takes GET, HEAD only"),
        ("DELETE", "/openapi.json", 405, "this path takes GET, HEAD only"),
    ],
)
def test_other_paths_and_methods_are_refused_in_json(api, method, path, status, error):
    answer = api(method, path, headers=AS_SHOP)
    assert (answer.headers["Content-Type"], *refusal(answer)) == ("application/json", status, refused(error))
    assert ("Allow" in answer.headers) == (status == 405)


async def page(scope, receive, send):
    await PlainTextResponse(f"page {scope['path']}")(scope, receive, send)


@SQLITE
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/batch", 404),
        ("POST", "/v2/batch", 404),
        ("GET", "/v1/batch", 405),
        ("PUT", "/v1/import/", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_beside_the_dashboard_a_client_of_the_api_gets_json_as_well(make_api, method, path, status):
    api = make_api(dashboard=page)
    answer = api(method, path, headers=AS_SHOP, json={"batch": []})
    assert (answer.headers["Content-Type"], answer.status_code) == ("application/json", status)
    assert ("Allow" in answer.headers) == (status == 405)
    assert api("POST", "/v1/batch", headers=AS_SHOP, json={"batch": []}).status_code == 200
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert api("POST", "/runs/1", headers=form, content=b"a=1").text == "page /runs/1"


# What was corrected.


@pytest.mark.parametrize("sent_at", ["soon", "", 7, [], {}, True])
def test_a_call_with_a_malformed_sent_at_is_accepted(api, sent_at):
    at = (START - dt.timedelta(hours=1)).isoformat()
    (verdict,) = api.batch(IDENTIFY | {"timestamp": at}, sentAt=sent_at)
    (text,) = verdict.pop("corrected")
    assert (verdict, text.startswith("sentAt is ")) == (accepted("m1")[0], True)
    assert [str(row[0])[:16] for row in api.rows("calls", "timestamp")] == ["2025-12-31 23:00"]


@SQLITE
def test_a_malformed_sent_at_of_a_call_leaves_that_of_its_batch(api):
    late = (START + dt.timedelta(hours=1)).isoformat()
    call = IDENTIFY | {"timestamp": late, "sentAt": "soon"}
    assert api.batch(call, sentAt=late) == [
        {**accepted("m1")[0], "corrected": ["sentAt is not a time: it is not used"]}
    ]


def test_php_sends_empty_lists_for_empty_objects(api):
    call = {"type": "track", "userId": "ann", "event": "Ordered", "messageId": "m1"}
    empty = {"properties": [], "context": [], "integrations": []}
    (verdict,) = api.batch(call | empty, context={"app": "shop"}, integrations=[])
    assert verdict == {
        **accepted("m1")[0],
        "corrected": [
            "properties is an empty list or text: read as an empty object",
            "integrations is an empty list or text: read as an empty object",
        ],
    }
    assert json.loads(api.rows("events", "CAST(context AS text)")[0][0]) == {"app": "shop"}


def test_browsers_send_an_empty_user_id(api):
    (verdict,) = api.batch({**IDENTIFY, "userId": "", "anonymousId": "a1"})
    assert verdict["corrected"] == ["userId is empty: anonymousId is used"]
    assert api.rows("deliveries", "subject_id") == [("a1",)]


def test_what_was_corrected_is_stored_with_the_call(api):
    api.batch(IDENTIFY | {"timestamp": "2025-12-31t23:59:60z"}, IDENTIFY | {"messageId": "m2"})
    stored = dict(api.rows("calls", "message_id, corrected"))
    assert stored["m2"] is None
    assert (
        json.loads(stored["m1"])
        if isinstance(stored["m1"], str)
        else stored["m1"] == ["timestamp was read as 2026-01-01T00:00:00Z"]
    )


@SQLITE
def test_a_created_at_in_another_form_is_sent_as_iso_8601(api):
    (verdict,) = api.batch(IDENTIFY | {"traits": {"createdAt": "2024-121t10:00:00z"}})
    assert verdict["corrected"] == ["createdAt was read as 2024-04-30T10:00:00Z"]
    assert [json.loads(row[0]) for row in api.rows("deliveries", "body")] == [
        {"created_at": "2024-04-30T10:00:00Z"}
    ]


@SQLITE
def test_members_of_a_call_that_are_zero_or_false_are_stored(api):
    api.batch(IDENTIFY | {"version": 0, "isTest": False, "note": "", "nothing": None, "context": {}})
    assert [json.loads(row[0]) for row in api.rows("calls", "body")] == [
        {"traits": {"plan": "pro"}, "version": 0, "isTest": False, "note": ""}
    ]


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


def test_an_event_may_have_a_name_of_500_characters(api):
    long = "".join(chr(0x1F300 + number) for number in range(500))
    track = {"type": "track", "userId": "ann"}
    verdicts = api.batch(
        {**track, "event": long, "messageId": "m1"}, {**track, "event": f"{long}.", "messageId": "m2"}
    )
    assert verdicts == [
        {"messageId": "m1", "status": "accepted"},
        {"messageId": "m2", "status": "refused", "reason": "event is longer than 500 characters"},
    ]
