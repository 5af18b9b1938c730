import pytest

from audience_sync.calls.operations import json_or_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ('"12"', "12"),
        ("null", None),
        ('{"a": [true]}', {"a": [True]}),
        ("pro", "pro"),
        ("", ""),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e400", "1e400"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_json_or_text(text, value):
    assert json_or_text(text) == value
