"""The tracking API: paths, verdicts and corrections."""

import datetime as dt
import json

import pytest
from starlette.responses import PlainTextResponse

from tests.intake.conftest import AS_SHOP, IDENTIFY, NO_PATH, SQLITE, accepted, refusal, refused
from tests.queue.conftest import START


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


def test_a_number_of_thousands_of_digits_does_not_cost_the_batch(api):
    text = json.dumps({"batch": [IDENTIFY, {**IDENTIFY, "messageId": "m2", "traits": {"n": -7}}]})
    answer = api("POST", "/v1/batch", headers=AS_SHOP, content=text.replace("-7", f"-{'7' * 5_000}"))
    assert [call["status"] for call in answer.json()["calls"]] == ["accepted", "refused"]
    assert answer.json()["calls"][1]["reason"] == "a number is too large"


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
def test_a_trailing_slash_makes_no_difference(api, path):
    assert api("GET", path).status_code == 200


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
def test_clients_of_the_api_get_json_also_when_the_dashboard_is_on(make_api, method, path, status):
    api = make_api(dashboard=page)
    answer = api(method, path, headers=AS_SHOP, json={"batch": []})
    assert (answer.headers["Content-Type"], answer.status_code) == ("application/json", status)
    assert ("Allow" in answer.headers) == (status == 405)
    assert api("POST", "/v1/batch", headers=AS_SHOP, json={"batch": []}).status_code == 200
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert api("POST", "/runs/1", headers=form, content=b"a=1").text == "page /runs/1"
    assert api("POST", "/runs/1").text == "page /runs/1"


@SQLITE
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "text/plain;charset=UTF-8", "Application/JSON", "text/json", "application/octet-stream"],
)
def test_a_library_that_leaves_out_v1_is_refused_in_json_and_logged(make_api, caplog, content_type):
    api = make_api(dashboard=page)
    headers = AS_SHOP | {"Content-Type": content_type}
    answer = api("POST", "/b", headers=headers, content=json.dumps({"batch": [IDENTIFY]}).encode())
    assert refusal(answer) == (404, refused(NO_PATH))
    assert [each.fields["status"] for each in caplog.records] == [404]


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
