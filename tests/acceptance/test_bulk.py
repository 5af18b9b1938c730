"""Single requests and bulk jobs through the command line: planned, sent, followed and interrupted."""

import signal
from collections import Counter

import pytest

from audience_sync.sandbox import Limits
from tests.faulty_sandbox import FaultySandbox
from tests.waiting import until

USERS = 2_000
PACE = {"identify_per_minute": 1_200, "bulk_rows_per_minute": 36_000}


@pytest.fixture
def sandbox():
    with FaultySandbox(limits=Limits(**PACE)) as running:
        yield running


@pytest.fixture
def command(start, company):
    company("CREATE TABLE people (user_id text)")
    rows = [{"user_id": f"u{number:04}"} for number in range(USERS)]
    company("INSERT INTO people VALUES (:user_id)", *rows)
    return start({"In": "SELECT user_id FROM people", "Also": "SELECT user_id FROM people"}, **PACE)


def assert_all_true(sandbox, users=USERS):
    users_now = sandbox.state.snapshot()["users"]
    assert Counter(str(user["properties"]) for user in users_now.values()) == {
        "{'in': True, 'also': True}": users
    }


def paths(sandbox):
    return Counter((entry.path, entry.status) for entry in sandbox.state.requests if entry.method == "POST")


def test_a_plan_predicts_what_the_sync_does(command, sandbox):
    planned = command.document("plan")["delivery"]
    code, output = command("plan")
    assert code == 0
    assert f"one of them a bulk job of {planned['bulk_row_count']:,} rows" in output

    delivery = command.document("sync")["delivery"]

    assert delivery["accepted_count"] == 2 * USERS
    assert delivery["pending_count"] == delivery["dead_count"] == 0
    assert_all_true(sandbox)
    sent = paths(sandbox)
    assert sent["/v1/users/bulk_identify", 202] == 1
    live = sent["/v1/identify", 202]
    assert sum(sent.values()) == live + 1 == delivery["request_count"]
    (upload,) = [entry.body for entry in sandbox.state.requests if entry.path == "/v1/users/bulk_identify"]
    assert live + len(upload) == USERS
    assert planned["bulk_row_count"] == pytest.approx(len(upload), abs=60)
    assert planned["request_count"] == pytest.approx(delivery["request_count"], abs=60)
    assert 1 < planned["estimated_seconds"] < 10


def test_a_job_under_way_is_shown_and_followed_by_the_next_process(command, sandbox):
    sandbox.state.set_limits(Limits(**PACE | {"bulk_rows_per_minute": 1_800}))
    syncing = command.popen("sync")
    status = wait_for_job(command)
    assert status["lanes"]["bulk"]["reason"].startswith("a job of ")
    assert status["bulk_job"]["row_count"] == status["lanes"]["bulk"]["sent_last_minute"] > 1_000
    code, output = command("status")
    assert code == 0
    assert "a job of " in output
    syncing.send_signal(signal.SIGTERM)
    code, output = command.ended(syncing)
    assert code == 1, output
    sandbox.state.set_limits(Limits(**PACE))

    code, output = command("deliver")

    assert code == 0, output
    assert_all_true(sandbox)
    assert paths(sandbox)["/v1/users/bulk_identify", 202] == 1
    assert command.document("status")["bulk_job"] is None
    user_id = sandbox.state.jobs.popitem()[1].rows[0]["user_id"]
    assert {each["status_code"] for each in command.document("user", user_id)["deliveries"]} == {202}


def wait_for_job(command):
    statuses = []

    def is_started():
        statuses.append(command.document("status"))
        return statuses[-1]["bulk_job"] and statuses[-1]["bulk_job"]["job_id"]

    until(is_started)
    return statuses[-1]


def test_the_previous_version_treats_a_job_as_a_request_without_an_answer(command, sandbox):
    sandbox.state.set_limits(Limits(**PACE | {"bulk_rows_per_minute": 1_800}))
    syncing = command.popen("sync")
    wait_for_job(command)
    syncing.send_signal(signal.SIGKILL)
    command.ended(syncing)
    assert command("db", "downgrade", "0002")[0] == 0
    assert command("db", "upgrade")[0] == 0
    sandbox.state.set_limits(Limits(identify_per_minute=1_000_000))
    command.path.write_text(command.path.read_text().replace("1200", "100000"))
    code, output = command("deliver")
    assert code == 0, output
    assert_all_true(sandbox)


def test_bulk_may_be_switched_off(start, company, sandbox):
    company("CREATE TABLE people (user_id text)")
    company("INSERT INTO people VALUES (:user_id)", *[{"user_id": f"u{number}"} for number in range(150)])
    sandbox.state.set_limits(Limits(identify_per_minute=6_000))
    command = start({"In": "SELECT user_id FROM people"}, identify_per_minute=100, bulk=False)
    assert command.document("plan")["delivery"]["bulk_row_count"] == 0
    lanes = command.document("status")["lanes"]
    assert (lanes["bulk"]["per_minute"], lanes["bulk"]["reason"]) == (0, "switched off")
