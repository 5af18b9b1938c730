from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.userpilot.answers import Answer, Outcome, judge, retry_after

NOW = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)


def judged(status_code, body=b"", *, cut=False, **headers):
    given_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return judge(status_code, given_headers, body, cut=cut, secret="k3y", now=NOW)


@pytest.mark.parametrize(
    ("status_codes", "outcome"),
    [
        ([200, 201, 202, 204], Outcome.ACCEPTED),
        ([429], Outcome.THROTTLED),
        ([401, 403], Outcome.UNAUTHORISED),
        ([400, 404, 409, 413, 422, 501], Outcome.REFUSED),
        ([301, 302, 307, 308, 408, 423, 425, 500, 503, 505, 520], Outcome.FAILED),
        ([101, 502, 504, 600, 999], Outcome.UNKNOWN),
    ],
)
def test_the_status_decides_the_outcome(status_codes, outcome):
    assert {judged(status_code).outcome for status_code in status_codes} == {outcome}


@pytest.mark.parametrize("body", [b"", b" \r\n", b"{}", b'{"id":"1"}', b"[]", b"null", b"\xef\xbb\xbf{}"])
def test_a_2xx_with_an_empty_body_or_json_is_accepted(body):
    assert judged(200, body) == Answer(Outcome.ACCEPTED, 200, None, None, None)


@pytest.mark.parametrize(
    "body", [b"<html></html>", b"OK", b'{"a"', b"\xff\xfe\xfd", b"Infinity", b"[" * 9999]
)
def test_a_2xx_with_another_body_is_unknown(body):
    assert judged(202, body).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("body", "document"),
    [(b'{"job_id":"1"}', {"job_id": "1"}), (b"[]", []), (b"7", 7), (b"", None), (b" ", None)],
)
def test_the_document_is_the_json_of_an_accepted_answer(body, document):
    assert judged(200, body).document == document


def test_an_answer_that_was_cut_off_or_not_accepted_has_no_document():
    assert judged(200, b"[1]", cut=True).document is None
    assert judged(400, b"{}").document is None
    assert judged(200, b"{}", content_type="text/html").document is None


def test_two_answers_that_differ_in_their_documents_alone_are_equal():
    assert judged(200, b"[1]") == judged(200, b"[2]")


def test_a_2xx_of_type_html_is_unknown():
    answer = judged(200, b'"x"', content_type="text/HTML; charset=utf-8")
    assert answer.error == 'HTTP 200, but the body is not Userpilot\'s: "x"'


def test_a_2xx_that_was_cut_is_accepted_unless_it_is_a_page():
    assert judged(200, b'{"a":"aaa', cut=True).outcome is Outcome.ACCEPTED
    assert judged(200, b"<!doctype html>", cut=True).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            b'{"errors":[{"error_code":"E1","error":"Bad","message":"No user_id","details":"No user_id"}]}',
            "E1: Bad: No user_id",
        ),
        (b'{"errors":[{"message":"one"},{"message":"two"}]}', "one; two"),
        (b'{"message":"not found"}', "not found"),
        (b'{"errors":["plain"]}', '{"errors":["plain"]}'),
        (b'{"errors":[{"message":7}]}', '{"errors":[{"message":7}]}'),
        (b"Bad\r\n  gateway\x00", "Bad gateway"),
        (b'{"message":"a\\ud800b\\u0000c"}', "a b c"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
        (b" ", "HTTP 400 without a message"),
        (b"x" * 900, "x" * 500),
        (b"you sent k3y", "you sent [API key]"),
        (b'{"message":"you sent k\\u0033y"}', "you sent [API key]"),
    ],
)
def test_an_error_quotes_the_api(body, message):
    assert judged(400, body).error == message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("100000", 900.0),
        ("9" * 500, 900.0),
        ("Wed, 01 May 2024 12:00:30 GMT", 30.0),
        ("Wed, 01 May 2024 12:00:30 -0000", 30.0),
        ("Wed, 01 May 2024 14:00:30 +0200", 30.0),
        ("Wed, 01 May 2024 11:00:00 GMT", 0.0),
        ("Sat, 01 May 2094 11:00:00 GMT", 900.0),
        ("-5", None),
        ("", None),
        (None, None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("1e3", None),
        ("٣", None),
        ("Wed, 99 Foo 2024 99:99:99 GMT", None),
        ("1, 2", None),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after(value, now=NOW) == seconds


@given(st.text() | st.integers().map(str) | st.floats().map(str))
def test_no_retry_after_is_out_of_range(value):
    seconds = retry_after(value, now=NOW)
    assert seconds is None or 0 <= seconds <= 900


@given(st.integers(0, 900))
def test_a_date_means_the_seconds_until_then(seconds):
    assert retry_after(format_datetime(NOW + timedelta(seconds=seconds)), now=NOW) == seconds
