"""Jobs that go wrong, jobs of another client, and jobs with few or no details."""

import pytest

from tests.faulty_sandbox import JobFault


@pytest.fixture
def upload(client):
    def upload(count=60):
        rows = [{"user_id": f"u{number}"} for number in range(count)]
        return client.send("POST", "/v1/users/bulk_identify", {"users": rows})

    return upload


@pytest.fixture
def poll(client):
    def poll(job):
        answer = client.send("GET", f"/v1/background_jobs/{job['job_id']}")[1]
        return answer["status"], answer["completed_rows"], answer["end_time"]

    return poll


def users(client):
    return list(client.control("GET", "state")["users"])


def test_a_job_fails_after_some_rows(client, clock, upload, poll):
    fault = {"outcome": "failed", "after_rows": 40}
    assert client.control("POST", "job_faults", fault) == fault | {"state": None}
    _, job = upload()
    clock.seconds = 1
    assert poll(job) == ("processing", 30, None)
    clock.seconds = 2
    assert poll(job) == ("failed", 40, "2026-01-01T00:00:02Z")
    assert users(client) == [f"u{number}" for number in range(40)]
    assert upload()[0] == 202


def test_a_job_fails_before_its_first_row(client, clock, upload, poll):
    client.control("POST", "job_faults", {"outcome": "failed"})
    _, job = upload()
    clock.seconds = 1
    assert poll(job) == ("failed", 0, "2026-01-01T00:00:01Z")
    assert users(client) == []
    assert client.send("GET", "/v1/background_jobs")[1][0]["start_time"] is None


def test_a_job_completes_short_of_its_rows(client, clock, upload, poll):
    client.control("POST", "job_faults", {"outcome": "short", "after_rows": 59})
    _, job = upload()
    clock.seconds = 1
    assert poll(job) == ("processing", 30, None)
    clock.seconds = 2
    assert poll(job) == ("completed", 59, "2026-01-01T00:00:02Z")
    assert (users(client)[-1], job["total_rows"]) == ("u58", 60)


def test_a_job_ends_at_its_last_row(client, clock, upload, poll):
    client.control("POST", "job_faults", {"outcome": "short", "after_rows": 100})
    _, job = upload()
    clock.seconds = 2
    assert poll(job) == ("completed", 60, "2026-01-01T00:00:02Z")


def test_a_hanging_job_blocks_others(client, clock, upload, poll):
    client.control("POST", "job_faults", {"outcome": "hangs", "after_rows": 2})
    _, job = upload(2)
    clock.seconds = 86_400
    assert poll(job) == ("processing", 2, None)
    assert client.status("POST", "/v1/users/bulk_identify", {"users": [{"user_id": "u"}]}) == 409
    assert users(client) == ["u0", "u1"]


def test_a_job_shows_another_state_while_it_runs(client, clock, upload, poll):
    client.control("POST", "job_faults", {"state": "mystery"})
    _, job = upload()
    assert job["status"] == "mystery"
    clock.seconds = 1
    assert poll(job) == ("mystery", 30, None)
    clock.seconds = 2
    assert poll(job) == ("completed", 60, "2026-01-01T00:00:02Z")


def test_each_job_takes_the_first_fault(sandbox, clock, upload, poll):
    sandbox.state.job_faults += [JobFault(), JobFault("failed", 1), JobFault("short", 1)]
    ends = []
    for number in range(1, 5):
        status, job = upload(2)
        assert (status, upload(2)[0]) == (202, 409)
        clock.seconds = number
        ends.append(poll(job)[:2])
    assert ends == [("completed", 2), ("failed", 1), ("completed", 1), ("completed", 2)]
    assert sandbox.state.job_faults == []


def test_job_faults_are_checked_outlive_a_reset_and_can_be_cleared(sandbox, client):
    for body in ({"outcome": "late"}, {"after_rows": -1}, {"rows": 1}, []):
        assert client.status("POST", "/_sandbox/job_faults", body) == 400
    client.control("POST", "job_faults", {"outcome": "hangs"})
    client.control("POST", "reset")
    assert sandbox.state.job_faults == [JobFault("hangs")]
    client.control("DELETE", "job_faults")
    assert sandbox.state.job_faults == []


def test_a_job_of_another_client_blocks_ours(sandbox, client, clock, upload, poll):
    job = client.control("POST", "other_job", {"rows": 60})
    assert (job["status"], job["total_rows"], upload()[0]) == ("queued", 60, 409)
    clock.seconds = 1
    assert (poll(job), upload()[0]) == (("processing", 30, None), 409)
    clock.seconds = 2
    assert (poll(job), users(client)) == (("completed", 60, "2026-01-01T00:00:02Z"), [])
    clock.seconds = 10
    sandbox.state.start_other_job(60)
    clock.seconds = 11.9
    assert upload()[0] == 409
    clock.seconds = 12
    assert upload()[0] == 202


def test_our_job_blocks_one_of_another_client(client, upload):
    upload()
    assert client.status("POST", "/_sandbox/other_job", {"rows": 1}) == 409
    for body in ({}, {"rows": -1}, {"count": 1}):
        assert client.status("POST", "/_sandbox/other_job", body) == 400


def test_bare_jobs_have_an_id_and_a_status_only(client, clock, upload):
    client.control("POST", "limits", {"bare_jobs": True})
    _, job = upload()
    bare = {"job_id": job["job_id"], "status": "queued"}
    assert job == bare
    clock.seconds = 1
    bare["status"] = "processing"
    assert client.send("GET", f"/v1/background_jobs/{job['job_id']}") == (200, bare)
    assert client.send("GET", "/v1/background_jobs") == (200, [bare])


def test_forgotten_jobs_are_unknown_and_continue(client, clock, upload):
    ids = [upload()[1]["job_id"]]
    clock.seconds = 2
    ids.append(upload()[1]["job_id"])
    client.control("POST", "forget_jobs")
    assert [client.status("GET", f"/v1/background_jobs/{name}") for name in ids] == [404, 404]
    assert client.send("GET", "/v1/background_jobs") == (200, [])
    clock.seconds = 3.9
    assert upload()[0] == 409
    clock.seconds = 4
    assert client.control("GET", "history?user_id=u59") == []
    assert upload(1)[0] == 202
    assert len(users(client)) == 60
