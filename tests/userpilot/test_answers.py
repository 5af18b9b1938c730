import gzip
import zlib
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


ACCEPTED_BODIES = [
    b"",
    b" \r\n",
    b"{}",
    b'{"id":"1"}',
    b"[]",
    b"null",
    b"\xef\xbb\xbf{}",
    b"OK",
    b"Infinity",
    b"1 < 2",
    b"\x80\x81",
    b'{"message":"<html>"}',
    b"{ok}",
    b"[OK]",
    b"{'status': 'ok'}\n",
    b'{"a": NaN}',
    b'{"id":"1"}\n{"id":"2"}',
    b"[" * 9999 + b"]" * 9999,
]


@pytest.mark.parametrize("body", ACCEPTED_BODIES)
def test_a_2xx_of_userpilots_is_accepted(body):
    assert judged(200, body) == Answer(Outcome.ACCEPTED, 200, None, None, None)
    assert judged(202, gzip.compress(body, mtime=0), content_encoding="gzip").outcome is Outcome.ACCEPTED
    assert judged(202, gzip.compress(body, mtime=0)).outcome is Outcome.ACCEPTED
    assert judged(202, zlib.compress(body), content_encoding="deflate").outcome is Outcome.ACCEPTED


def test_a_2xx_whose_encoding_is_not_known_is_accepted():
    assert judged(202, b"\x8b\x00\x80", content_encoding="br") == Answer(
        Outcome.ACCEPTED, 202, None, None, None
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"a"',
        b'{"a":{"b":1}',
        b'{"a":[1]',
        b'{"a":"}',
        b'{"a":tru',
        b'{"a":1,',
        b'\xef\xbb\xbf{"a"',
        b'[{"job_id":"1"},',
        b"[" * 9999,
    ],
)
def test_a_2xx_whose_json_breaks_off_is_unknown(body):
    answer = judged(202, body)
    assert answer.outcome is Outcome.UNKNOWN
    assert answer.error.startswith("HTTP 202, but the JSON of the body breaks off: ")


PAGES = [
    (b"<html><body>Log in</body></html>", {}),
    (b"\n <!DOCTYPE html>", {"content_type": "application/json"}),
    (b"\xef\xbb\xbf<html>", {"x_request_id": "r-1"}),
    ("\ufeff<html>".encode("utf-16-le"), {}),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", {"content_type": "application/xml"}),
    (b"Please wait <title>Just a moment</title>", {"content_type": "text/plain", "x_request_id": "r-1"}),
    (b'{"a":1}', {"content_type": "Text/HTML; charset=utf-8"}),
    (gzip.compress(b"<html>Log in</html>", mtime=0), {"content_encoding": "gzip"}),
    (gzip.compress(b"<html>Log in</html>", mtime=0), {}),
    (b"<html>", {"content_encoding": "gzip"}),
    (b"\x8b\x00\x80", {"content_encoding": "br", "content_type": "text/html", "x_request_id": "r-1"}),
]


@pytest.mark.parametrize(
    "status_code", [200, 202, 400, 401, 403, 404, 405, 409, 413, 422, 500, 502, 503, 520, 999]
)
@pytest.mark.parametrize(("body", "headers"), PAGES)
def test_a_page_says_nothing_about_a_delivery_whatever_its_status(status_code, body, headers):
    if "br" in headers.values() and status_code < 300:  # it cannot be read, and counts as empty
        return
    answer = judged(status_code, body, **headers)
    assert (answer.outcome, answer.is_evidence, answer.document) == (Outcome.UNKNOWN, False, None)
    assert answer.error.startswith(f"HTTP {status_code}, but the body is not Userpilot's: ")


def test_a_page_is_quoted_without_its_tags():
    page = b"<html><head><style>p {}</style><title>502 Bad Gateway</title></head><hr>nginx</html>"
    assert judged(502, page).error == "HTTP 502, but the body is not Userpilot's: 502 Bad Gateway nginx"
    assert judged(502, b"<br>").error == "HTTP 502, but the body is not Userpilot's: a page"


def test_a_page_of_a_429_slows_the_lane_down():
    answer = judged(429, b"<html>", retry_after="7")
    assert (answer.outcome, answer.is_evidence, answer.retry_after_seconds) == (Outcome.THROTTLED, False, 7.0)


@pytest.mark.parametrize("status_code", [301, 302, 307, 407, 421, 426, 511])
@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"moved"])
def test_the_statuses_of_proxies_say_nothing_about_a_delivery(status_code, body):
    answer = judged(status_code, body)
    assert (answer.outcome, answer.is_evidence) == (Outcome.FAILED, False)


@pytest.mark.parametrize("body", [b"", b"<html>moved"])
def test_a_redirect_says_where_it_leads(body):
    answer = judged(307, body, location="https://eu.example/k3y")
    message = "HTTP 307 redirects to https://eu.example/[API key]: is [destination] endpoint right?"
    assert (answer.outcome, answer.error) == (Outcome.FAILED, message)


@pytest.mark.parametrize("body", [b"", b"error code: 522", b"{}"])
@pytest.mark.parametrize(
    ("status_code", "outcome"),
    [(499, Outcome.UNKNOWN), (520, Outcome.FAILED), (522, Outcome.FAILED), (530, Outcome.FAILED)],
)
def test_the_failures_of_proxies_say_nothing_about_a_delivery(status_code, outcome, body):
    answer = judged(status_code, body)
    assert (answer.outcome, answer.is_evidence) == (outcome, False)


def test_a_refusal_in_plain_text_is_userpilots_if_it_has_a_request_id():
    assert judged(404, b"404 page not found").outcome is Outcome.UNKNOWN
    assert not judged(404, b"404 page not found").is_evidence
    assert judged(404, b"no such user", x_request_id="r-1").outcome is Outcome.REFUSED


@pytest.mark.parametrize("body", [b"", b"{}", b'{"errors":[{"message":"no"}]}', b'{"errors":[', b'"no"'])
@pytest.mark.parametrize("status_code", [400, 404, 405, 413, 422])
def test_a_refusal_that_is_empty_or_json_is_userpilots(status_code, body):
    answer = judged(status_code, body)
    assert (answer.outcome, answer.is_evidence) == (Outcome.REFUSED, True)


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (b'{"job_id":"1"}', {"job_id": "1"}),
        (gzip.compress(b'{"job_id":"1"}', mtime=0), {"job_id": "1"}),
        (b"[]", []),
        (b"7", 7),
        (b"", None),
        (b" ", None),
        (b"OK", None),
    ],
)
def test_the_document_is_the_json_of_an_accepted_answer(body, document):
    assert judged(200, body).document == document


def test_an_answer_that_was_cut_off_or_not_accepted_has_no_document():
    assert judged(200, b"[1]", cut=True).document is None
    assert judged(400, b"{}").document is None
    assert judged(200, b"{}", content_type="text/html").document is None


def test_two_answers_that_differ_in_their_documents_alone_are_equal():
    assert judged(200, b"[1]") == judged(200, b"[2]")


def test_a_2xx_of_type_html_is_unknown_unless_it_is_empty():
    answer = judged(200, b'"x"', content_type="text/HTML; charset=utf-8")
    assert answer.error == 'HTTP 200, but the body is not Userpilot\'s: "x"'
    assert judged(200, b"", content_type="text/html").outcome is Outcome.ACCEPTED


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
