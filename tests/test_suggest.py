"""Suggestions for unknown names."""

import pytest

from audience_sync.suggest import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("prperties", ["properties", "traits"], "did you mean properties?"),
        ("zzz", ["properties", "traits"], "known are properties, traits"),
        ("zzz", [], "none is declared"),
        ("ab\n", ["ab\nc"], r"did you mean 'ab\nc'?"),
        ("x" * 10_000, ["traits"], "known are traits"),
    ],
)
def test_the_nearest_name_or_all_names(name, known, suggestion):
    assert did_you_mean(name, known) == suggestion


def test_a_list_that_is_too_long_is_replaced():
    assert did_you_mean("zzz", ["Europe/Berlin"], "write an IANA name") == "write an IANA name"
