"""Requests that may count among the identifies: Userpilot does not document whether they do."""

import pytest

ROWS = {"users": [{"user_id": f"row{number}"} for number in range(60)]}


@pytest.fixture
def fill(client):
    """Identifies until one is refused; returns how many were accepted."""

    def fill():
        count = 0
        while client.identify("u") == 202:
            count += 1
        return count

    return fill


def upload(client, body=ROWS):
    return client.status("POST", "/v1/users/bulk_identify", body)


def identify_company(client):
    return client.status("POST", "/v1/companies/identify", {"company_id": "c"})


def test_nothing_but_identifies_counts_by_default(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 3})
    assert (upload(client), identify_company(client)) == (202, 202)
    clock.seconds = 2
    assert client.status("GET", "/v1/background_jobs") == 200
    assert fill() == 3
    assert (upload(client), identify_company(client)) == (202, 202)
    assert client.status("GET", "/v1/background_jobs/none") == 404


def test_uploads_can_count(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 4, "uploads_count": True})
    assert [upload(client), upload(client), upload(client, {})] == [202, 409, 400]
    clock.seconds = 30
    assert fill() == 1
    assert upload(client) == 429
    clock.seconds = 59.9
    assert upload(client) == 429
    clock.seconds = 60
    assert upload(client) == 202
    assert client.status("GET", "/v1/background_jobs") == 200
    assert fill() == 2


def test_polls_can_count(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 3, "polls_count": True})
    polls = ("/v1/background_jobs", "/v1/background_jobs/none")
    assert [client.status("GET", path) for path in polls] == [200, 404]
    assert fill() == 1
    assert [client.status("GET", path) for path in polls] == [429, 429]
    assert (upload(client), client.status("GET", "/v1/validate")) == (202, 200)
    clock.seconds = 60
    assert fill() == 3


def test_rows_can_count_when_they_are_applied(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 40, "rows_count": True})
    assert upload(client) == 202
    clock.seconds = 1
    assert fill() == 10  # 30 rows are applied
    clock.seconds = 60.5
    assert fill() == 0  # the window is overfull: 45 rows, 10 identifies
    clock.seconds = 61.01
    assert fill() == 10  # 30 rows are left in it
    assert len(client.control("GET", "state")["users"]) == 61


def test_rows_count_at_the_time_when_they_were_due(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 40, "rows_count": True})
    assert upload(client) == 202
    clock.seconds = 0.5
    client.control("POST", "limits", {"bulk_rows_per_minute": 60})
    clock.seconds = 80
    assert fill() == 14  # 15 rows in the first half second, then one a second: 20.5 … 45.5 are in the window


def test_rows_that_are_never_applied_take_no_places(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 40, "rows_count": True})
    client.control("POST", "job_faults", {"outcome": "hangs", "after_rows": 25})
    assert upload(client) == 202
    clock.seconds = 30
    assert fill() == 15


def test_rows_of_another_client_count_too(client, clock, fill):
    client.control("POST", "limits", {"identify_per_minute": 40, "rows_count": True})
    client.control("POST", "other_job", {"rows": 60})
    clock.seconds = 1
    assert fill() == 10


def test_company_calls_can_take_a_place_in_both_windows(client, clock, fill):
    limits = {"identify_per_minute": 4, "company_per_minute": 2, "companies_count": True}
    client.control("POST", "limits", limits)
    assert [identify_company(client) for _ in range(3)] == [202, 202, 429]
    clock.seconds = 30
    assert fill() == 2  # the refused one took a place in neither
    clock.seconds = 60
    assert fill() == 2
    assert identify_company(client) == 429
    clock.seconds = 90
    assert [identify_company(client) for _ in range(3)] == [202, 202, 429]


def test_other_clients_take_places(client, clock, fill):
    limits = {"identify_per_minute": 5, "company_per_minute": 1, "others_per_minute": 2}
    client.control("POST", "limits", limits)
    assert (fill(), identify_company(client)) == (3, 202)
    client.control("POST", "limits", {"others_per_minute": 6})
    clock.seconds = 60
    assert fill() == 0
    client.control("POST", "limits", {"others_per_minute": 0})
    assert fill() == 5
    assert client.status("POST", "/_sandbox/limits", {"others_per_minute": -1}) == 400
    assert client.status("POST", "/_sandbox/limits", {"polls_count": 1}) == 400
