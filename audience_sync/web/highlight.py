"""Syntax highlighting of SQL and queries: HTML with a class for each kind of word."""

import re

from markupsafe import Markup, escape

# A comment or string without an end extends to the end of the text, so that each character is read once.
_SQL = re.compile(
    r"""(?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<string>'(?:[^']|'')*(?:'|\Z))
    |(?P<name>"(?:[^"]|"")*(?:"|\Z))
    |(?P<parameter>(?<![:\w]):[A-Za-z_]\w*)
    |(?P<number>\b\d+(?:\.\d+)?\b)
    |(?P<keyword>\b(?:ALL|AND|AS|ASC|BETWEEN|BY|CASE|CAST|CROSS|DESC|DISTINCT|ELSE|END|EXCEPT|EXISTS|FALSE|FETCH|FILTER
        |FROM|FULL|GROUP|HAVING|IN|INNER|INTERSECT|INTERVAL|IS|JOIN|LATERAL|LEFT|LIKE|ILIKE|LIMIT|NOT|NULL|OFFSET|ON|OR
        |ORDER|OUTER|OVER|PARTITION|RIGHT|SELECT|THEN|TRUE|UNION|USING|VALUES|WHEN|WHERE|WINDOW|WITH)\b)
    |(?P<function>\b[A-Za-z_]\w*(?=\())
    |\w+""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_QUERY = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<string>'(?:\\.|[^'\\])*(?:'|\Z)|"(?:\\.|[^"\\])*(?:"|\Z))
    |(?P<number>\b\d+(?:\.\d+)?\b)
    |(?P<keyword>\b(?:AND|OR|NOT|AS|TRUE|FALSE)\b)
    |(?P<function>\b[A-Za-z_]\w*(?=\())
    |\w+""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


def highlight(text: str, language: str = "sql") -> Markup:
    """Return a text as HTML; the language is sql or query."""
    parts, end = [], 0
    for match in (_QUERY if language == "query" else _SQL).finditer(text):
        word = escape(match[0])
        if match.lastgroup:
            word = Markup('<span class="{}">{}</span>').format(match.lastgroup, word)
        parts += [escape(text[end : match.start()]), word]
        end = match.end()
    return Markup().join([*parts, escape(text[end:])])
