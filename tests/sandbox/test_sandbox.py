import contextlib
import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import typer

from audience_sync.cli import setup
from audience_sync.sandbox import Limits
from tests.faulty_sandbox import FaultySandbox
from tests.sandbox.conftest import Client


def test_identify_merges_and_null_removes(client):
    assert client.identify("u1", plan="pro", age=3) == 202
    assert client.identify("u1", plan=None, vip=True) == 202
    assert client.control("GET", "state")["users"] == {
        "u1": {"properties": {"age": 3, "vip": True}, "company_id": None}
    }
    assert client.control("GET", "history?user_id=u1") == [
        ["plan", "pro", 1],
        ["age", 3, 1],
        ["plan", None, 2],
        ["vip", True, 2],
    ]


def test_a_user_has_one_company(client):
    for company in ({"id": "c1", "name": "One"}, {"id": "c2"}):
        assert client.status("POST", "/v1/identify", {"user_id": "u1", "company": company}) == 202
    state = client.control("GET", "state")
    assert state["users"]["u1"]["company_id"] == "c2"
    assert state["companies"] == {"c1": {"properties": {"name": "One"}}, "c2": {"properties": {}}}


def test_track_of_an_unknown_user_is_accepted_and_noted(client):
    client.identify("u1")
    for user in ("u1", "u2"):
        event = {"user_id": user, "event_name": "Paid", "metadata": {"gbp": 2.5}}
        assert client.status("POST", "/v1/track", event) == 202
    events = client.control("GET", "state")["events"]
    assert [(event["user_id"], event["user_known"]) for event in events] == [("u1", True), ("u2", False)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/identify", {}),
        ("/v1/identify", []),
        ("/v1/identify", {"user_id": 1}),
        ("/v1/identify", {"user_id": ""}),
        ("/v1/identify", {"user_id": "u", "metadata": None}),
        ("/v1/identify", {"user_id": "u", "metadata": {"a": [1]}}),
        ("/v1/identify", {"user_id": "u", "metadata": {"a": {}}}),
        ("/v1/identify", {"user_id": "u", "metadata": {"a": float("nan")}}),
        ("/v1/identify", {"user_id": "u", "company": {"name": "no id"}}),
        ("/v1/identify", {"user_id": "u", "traits": {}}),
        ("/v1/track", {"user_id": "u"}),
        ("/v1/track", {"event_name": "e"}),
        ("/v1/companies/identify", {"metadata": {}}),
        ("/v1/users/bulk_identify", {"users": []}),
        ("/v1/users/bulk_identify", {"users": [{"user_id": "u"}, {"user_id": 2}]}),
        ("/v1/users/bulk_identify", {"users": [{"user_id": "u", "company": {"id": "c"}}]}),
        ("/v1/users/bulk_identify", {"users": [{"company_id": "c"}]}),
    ],
)
def test_a_malformed_request_is_refused_and_changes_nothing(client, path, body):
    status, answer = client.send("POST", path, body)
    assert status == 400
    assert set(answer["errors"][0]) == {"details", "error", "error_code", "message"}
    state = client.control("GET", "state")
    assert state == {"users": {}, "companies": {}, "events": [], "jobs": [], "deletions": []}


def test_headers_are_required(client):
    identify = ("POST", "/v1/identify", {"user_id": "u"})
    assert client.status(*identify, Authorization="Token other") == 401
    assert client.status(*identify, Authorization=None) == 401
    assert client.status(*identify, X_API_Version=None) == 400
    assert client.status(*identify, Content_Type="text/plain") == 400
    assert client.status("POST", "//v1/identify", {"user_id": "u"}) == 404
    assert client.status("GET", "/v1/validate") == 200


def test_the_window_slides_and_a_refused_request_does_not_count(client, clock):
    client.control("POST", "limits", {"identify_per_minute": 2})
    assert client.identify("a") == 202
    clock.seconds = 30
    assert client.identify("b") == 202
    clock.seconds = 59.9
    assert client.identify("c") == 429
    clock.seconds = 60
    assert client.identify("c") == 202
    assert client.identify("d") == 429
    assert client.status("POST", "/v1/track", {"user_id": "a", "event_name": "e"}) == 202


def test_parallel_callers_share_one_window(connect, client):
    client.control("POST", "limits", {"identify_per_minute": 100})

    def send(start):
        own = connect()
        return [own.identify(f"u{number}") for number in range(start, start + 40)]

    with ThreadPoolExecutor(4) as pool:
        statuses = [status for part in pool.map(send, (0, 40, 80, 120)) for status in part]
    assert (statuses.count(202), statuses.count(429)) == (100, 60)
    assert len(client.control("GET", "state")["users"]) == 100
    assert [entry["number"] for entry in client.control("GET", "requests")] == list(range(1, 161))


def test_answers_come_in_order_on_one_connection(sandbox):
    head = "POST /v1/identify HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection(sandbox.url.removeprefix("http://").rstrip("/").split(":")) as connection:
        connection.sendall((head + "not json!" + head.replace("identify", "nowhere") + "not json!").encode())
        connection.sendall(b"GET /v1/validate HTTP/1.1\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert answers.count("HTTP/1.1 401 Unauthorized\r\n") == 3
    assert answers.count("x-request-id: ") == 3


def test_a_running_job_overwrites_what_came_after_it(client, clock):
    rows = [{"user_id": "u1", "metadata": {"vip": False}}]
    client.send("POST", "/v1/users/bulk_identify", {"users": rows})
    client.identify("u1", vip=True)
    clock.seconds = 60
    assert client.control("GET", "state")["users"]["u1"]["properties"] == {"vip": False}
    assert client.control("GET", "history") == {"u1": [["vip", True, 2], ["vip", False, 1]]}


def test_a_new_speed_applies_from_now_on(client, clock):
    rows = [{"user_id": f"u{number}"} for number in range(100)]
    client.send("POST", "/v1/users/bulk_identify", {"users": rows})
    clock.seconds = 1
    client.control("POST", "limits", {"bulk_rows_per_minute": 0})
    clock.seconds = 1000
    assert client.control("GET", "state")["jobs"][0]["completed_rows"] == 30
    assert client.status("POST", "/_sandbox/limits", {"bulk_speed": 1}) == 400


def test_jobs_run_at_their_speed_one_at_a_time(client, clock):
    rows = [{"user_id": f"u{number}", "metadata": {"vip": True}} for number in range(60)]
    status, job = client.send("POST", "/v1/users/bulk_identify", {"users": rows})
    assert (status, job["status"], job["total_rows"]) == (202, "queued", 60)
    assert client.status("POST", "/v1/users/bulk_identify", {"users": [{"user_id": "u"}]}) == 409
    clock.seconds = 1
    path = f"/v1/background_jobs/{job['job_id']}"
    answer = client.send("GET", path)[1]
    assert (answer["status"], answer["completed_rows"], answer["end_time"]) == ("processing", 30, None)
    assert len(client.control("GET", "state")["users"]) == 30
    clock.seconds = 2
    assert client.send("GET", path.replace(":", "%3A"))[1]["status"] == "completed"
    assert [item["job_id"] for item in client.send("GET", "/v1/background_jobs")[1]] == [job["job_id"]]
    assert client.status("POST", "/v1/users/bulk_identify", {"users": [{"user_id": "u"}]}) == 202
    assert client.status("GET", "/v1/background_jobs/none") == 404


def multipart(content):
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="rows.ndjson"\r\n'
    return head + b"Content-Type: application/x-ndjson\r\n\r\n" + content + b"\r\n--B--\r\n"


def test_bulk_rows_as_a_file(client, clock):
    raw = multipart(b'{"user_id":"u1","company_id":"c1"}\n{"user_id":"u2","metadata":{"a":"\xc3\xa9"}}\n')
    content_type = "multipart/form-data; boundary=B"
    status, job = client.send("POST", "/v1/users/bulk_identify", raw=raw, Content_Type=content_type)
    assert (status, job["filename"], job["total_rows"]) == (202, "rows.ndjson", 2)
    clock.seconds = 1
    assert client.control("GET", "state")["users"] == {
        "u1": {"properties": {}, "company_id": "c1"},
        "u2": {"properties": {"a": "é"}, "company_id": None},
    }
    assert client.status("POST", "/v1/identify", raw=raw, Content_Type=content_type) == 400


def test_too_many_rows_or_bytes(client):
    client.control("POST", "limits", {"bulk_rows_per_request": 2, "bulk_bytes_per_request": 200})
    rows = [{"user_id": f"u{number}"} for number in range(3)]
    assert client.status("POST", "/v1/users/bulk_identify", {"users": rows}) == 413
    long = [{"user_id": "u", "metadata": {"a": "x" * 200}}]
    assert client.status("POST", "/v1/users/bulk_identify", {"users": long}) == 413
    huge = [{"user_id": "u", "metadata": {"a": "x" * 100_000}}]
    assert client.status("POST", "/v1/users/bulk_identify", {"users": huge}) == 413
    assert client.status("POST", "/v1/users/bulk_identify", {"users": rows[:2]}) == 202


def test_deletions_wait_for_two_in_the_morning(client, clock):
    client.identify("u1")
    client.identify("u2")
    assert client.status("DELETE", "/v1/users", {"users": ["u1"]}) == 202
    assert client.status("DELETE", "/v1/users", {"users": ["u2"]}) == 429
    clock.seconds = 2 * 3600 - 1
    assert set(client.control("GET", "state")["users"]) == {"u1", "u2"}
    clock.seconds = 2 * 3600
    assert set(client.control("GET", "state")["users"]) == {"u2"}
    assert client.status("DELETE", "/v1/users", {"users": ["u2"]}) == 202
    client.control("POST", "deletions")
    assert client.control("GET", "state")["users"] == {}


def test_deletions_are_carried_out_day_after_day(client, clock):
    for day in (0, 1):
        client.identify("u1")
        clock.seconds = day * 86_400 + 60
        assert client.status("DELETE", "/v1/users", {"users": ["u1"]}) == 202
        clock.seconds += 3
        assert client.status("DELETE", "/v1/users", {"users": ["u2"]}) == 202
        assert set(client.control("GET", "state")["users"]) == {"u1"}
        clock.seconds = day * 86_400 + 2 * 3600
        assert client.control("GET", "state")["users"] == {}
    done = [deletion["done_at"] - 1_767_225_600 for deletion in client.control("GET", "state")["deletions"]]
    assert done == [7200, 7200, 93_600, 93_600]


def test_every_request_is_on_the_log(client):
    client.identify("u1", a=1)
    sent_id = client.x_request_id
    client.status("POST", "/v1/track", {"user_id": "u1"})
    first, second = client.control("GET", "requests")
    assert first == {
        "number": 1,
        "method": "POST",
        "path": "/v1/identify",
        "body": {"user_id": "u1", "metadata": {"a": 1}},
        "user_id": "u1",
        "company_id": None,
        "received_at": 1_767_225_600.0,
        "monotonic": 0.0,
        "status": 202,
        "applied": True,
        "fault": None,
        "x_request_id": sent_id,
    }
    assert (second["status"], second["applied"]) == (400, False)
    assert [entry["number"] for entry in client.control("GET", "requests?after=1")] == [2]
    client.control("POST", "reset")
    assert client.control("GET", "requests") == []


def test_the_log_is_counted(client):
    client.control("POST", "limits", {"identify_per_minute": 2})
    client.control("POST", "faults", {"user_id": "u1", "drop": "after", "times": 1})
    with pytest.raises(http.client.RemoteDisconnected):
        client.identify("u1")
    client.connection.close()
    assert [client.identify("u1") for _ in range(3)] == [202, 429, 429]
    for job in ("one", "two"):
        client.status("GET", f"/v1/background_jobs/{job}")
    client.status("GET", "/v1/background_jobs")
    assert client.control("GET", "counts") == {
        "POST /v1/identify": {"null": 1, "202": 1, "429": 2},
        "GET /v1/background_jobs/*": {"404": 2},
        "GET /v1/background_jobs": {"200": 1},
    }
    client.control("POST", "reset")
    assert client.control("GET", "counts") == {}


def test_a_fault_answers_instead(client):
    fault = {"path": "/v1/identify", "after": 1, "times": 2, "status": 503}
    client.control(
        "POST", "faults", fault | {"body": "busy", "headers": {"Retry-After": "7"}, "name": "busy"}
    )
    assert client.identify("u0") == 202
    client.connection.request("POST", "/v1/identify", "{}", {"Content-Type": "application/json"})
    response = client.connection.getresponse()
    assert (response.status, response.getheader("Retry-After"), response.read()) == (503, "7", b"busy")
    client.control("POST", "faults", {"user_id": "u2", "status": 500, "apply": True})
    with pytest.raises(json.JSONDecodeError):
        client.identify("u1")
    assert client.identify("u1") == 202
    assert client.identify("u2") == 500
    assert set(client.control("GET", "state")["users"]) == {"u0", "u1", "u2"}
    log = [(entry["status"], entry["applied"], entry["fault"]) for entry in client.control("GET", "requests")]
    assert log[1:] == [
        (503, False, "busy"),
        (503, False, "busy"),
        (202, True, None),
        (500, True, "fault-2"),
    ]
    client.control("DELETE", "faults")
    assert client.control("GET", "faults") == []


def test_a_fault_strikes_every_nth(client):
    client.control("POST", "faults", {"status": 500, "after": 1, "every": 3, "times": 2})
    assert [client.identify("u") for _ in range(10)] == [202, 202, 202, 500, 202, 202, 500, 202, 202, 202]


@pytest.mark.parametrize(
    ("effect", "error", "applied"),
    [
        ({"drop": "before"}, http.client.RemoteDisconnected, False),
        ({"drop": "after"}, http.client.RemoteDisconnected, True),
        ({"garbage": True}, http.client.BadStatusLine, True),
    ],
)
def test_a_fault_can_prevent_the_answer(client, effect, error, applied):
    client.control("POST", "faults", effect | {"user_id": "u1"})
    with pytest.raises(error):
        client.identify("u1")
    client.connection.close()
    assert client.identify("u2") == 202
    assert ("u1" in client.control("GET", "state")["users"]) is applied
    entry = client.control("GET", "requests")[0]
    assert (entry["status"], entry["applied"]) == (None, applied)


@pytest.mark.parametrize(("effect", "applied"), [("delay_seconds", False), ("delay_after_seconds", True)])
def test_a_fault_delays_the_answer(client, effect, applied):
    client.control("POST", "faults", {"path": "/v1/*", effect: 60})
    client.connection.close()
    client.connection.timeout = 0.2
    with pytest.raises(TimeoutError):
        client.identify("u1")
    client.connection.close()
    assert ("u1" in client.control("GET", "state")["users"]) is applied


@pytest.mark.parametrize(
    "body", [{"stats": 500}, {"status": "500"}, {"path": "/v1/track"}, {"drop": "later"}]
)
def test_a_fault_is_checked(client, body):
    status, answer = client.send("POST", "/_sandbox/faults", body)
    assert status == 400
    assert next(iter(body)) in answer["errors"][0]["message"] or "effect" in answer["errors"][0]["message"]


def test_the_key_can_be_revoked(client):
    client.control("POST", "key", {"api_key": "new"})
    assert client.identify("u1") == 401
    assert client.status("GET", "/v1/validate", Authorization="Token new") == 200


def test_an_outage_keeps_port_and_state(sandbox, client):
    client.identify("u1")
    url = sandbox.url
    sandbox.stop()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        client.identify("u1")
    client.connection.close()
    sandbox.start()
    assert sandbox.url == url
    assert set(client.control("GET", "state")["users"]) == {"u1"}


def test_the_defaults_are_userpilots():
    assert Limits() == Limits(600, 600, 600, 1800, 10_000, 50_000_000, 60.0)


def test_a_share_of_the_requests_is_refused_on_purpose(clock):
    with FaultySandbox(
        limits=Limits(refused_percent=25), monotonic=clock.monotonic, wall=clock.wall
    ) as sandbox:
        client = Client(sandbox)
        assert [client.identify(f"u{number}") for number in range(8)].count(400) == 2
        assert len(client.control("GET", "state")["users"]) == 6
        client.connection.close()


@pytest.mark.parametrize(
    ("text", "share"),
    [("3%", 3), ("0", 0), ("2.5", 2.5), ("100%", 100), ("101%", None), ("nan", None), ("x", None)],
)
def test_the_share_to_refuse_is_a_percentage(text, share):
    with pytest.raises(typer.BadParameter) if share is None else contextlib.nullcontext():
        assert setup._percent(text) == share
