"""Colours for SQL and queries: the text stays unchanged, and none of it becomes HTML."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.web.highlight import highlight

PIECES = st.sampled_from(
    ["'", '"', "--", "/*", "*/", "<", "&", "\n", "\\", ":as_of", "SELECT", "f(", "1.5", "#", "é"]
)


@given(st.lists(PIECES | st.text(max_size=3)).map("".join), st.sampled_from(["sql", "query"]))
def test_the_text_stays_as_it_is(text, language):
    shown = re.sub(r'</span>|<span class="[a-z]+">', "", highlight(text, language))
    assert "<" not in shown
    assert html.unescape(shown) == text


@pytest.mark.parametrize(
    ("text", "language", "parts"),
    [
        ("SELECT 'it''s' -- all\n", "sql", {"keyword": ["SELECT"], "string": ["'it''s'"], "comment": ["-- all"]}),
        ("count(x) < :as_of", "sql", {"function": ["count"], "parameter": [":as_of"]}),
        ("now()::date /* a\nb */ 12", "sql", {"function": ["now"], "comment": ["/* a\nb */"], "number": ["12"]}),
        (r"trait('it\'s') = 5", "query", {"function": ["trait"], "string": [r"'it\'s'"], "number": ["5"]}),
        ("a AND not b", "query", {"keyword": ["AND", "not"]}),
        ("'open", "sql", {"string": ["'open"]}),
    ],
)  # fmt: skip
def test_words_have_classes(text, language, parts):
    found = {}
    for kind, word in re.findall(
        r'<span class="([a-z]+)">(.*?)</span>', highlight(text, language), re.DOTALL
    ):
        found.setdefault(kind, []).append(html.unescape(word))
    assert found == parts


def test_an_unclosed_text_takes_no_longer():
    assert len(highlight("'" * 200_001 + "/*" * 200_000)) > 600_000
