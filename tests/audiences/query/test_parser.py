"""Parsing of queries: which texts are valid, and the message and position of errors.

QUERY_EXAMPLES=1000000 tries a million texts.
"""

import os
import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.form import QueryError
from audience_sync.audiences.query.layout import query_text
from audience_sync.audiences.query.parser import parse_condition, parse_query
from audience_sync.audiences.query.tree import Comparator, Reducer

ORDERED = tree.Stream(tree.StreamKind.EVENT, "Order Completed")
VALID = [
    "event('Order Completed').where(property('total') >= 100).within(30 days).count() >= 1",
    (
        "event('Added to Cart').where(NOT (event('Order Completed').within(parent: 1 day).count() >= 1))"
        ".within(7 days).count() >= 1"
    ),
    "trait('country') = 'DE' AND NOT (trait('vip_customers') = 'true')",
    "event('Order Completed').within(90 days).sum(property('total'))",
    "entity('orders').where(entity('order-products').count() >= 1).max(property('a') as string).contains('x', 'y')",
    (
        "event('A').where(event('B').where(property('x') = property(parent: 'y')).between(parent: 1 day, 5 days)"
        ".count() > 0).unique(property('products.$.sku')).count() > event('B').count() OR trait('a.0').exists()"
    ),
    "event('A').mode(context('page.url'), 3) != -1.5e3 AND (trait('a') = true OR trait('b').within_last(3 days))",
]


def path(*steps):
    return tree.ValuePath(steps)


def count(*filters):
    return tree.Reduction(tree.Stream(ORDERED.kind, ORDERED.name, filters), Reducer.COUNT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "event('Order Completed').count() >= 1",
            tree.Compared(count(), Comparator.AT_LEAST, (tree.Constant(1),)),
        ),
        ("trait('a')", tree.Trait(path("a"))),
        (r"trait('a.b\.c.0')", tree.Trait(path("a", "b.c", "0"))),
        (r"trait('a\\.b')", tree.Trait(path("a.b"))),
        (r"trait('it\'s') == " + r'"a \"b\" \\"', tree.Compared(
            tree.Trait(path("it's")), Comparator.EQUALS, (tree.Constant('a "b" \\'),)
        )),
        ("trait('a') = literal('x')", tree.Compared(tree.Trait(path("a")), Comparator.EQUALS, (tree.Constant("x"),))),
        ("trait('a').one_of(1, 2.5, TRUE, 'x')", tree.Compared(
            tree.Trait(path("a")),
            Comparator.ONE_OF,
            (tree.Constant(1), tree.Constant(2.5), tree.Constant(True), tree.Constant("x")),
        )),
        ("trait('a').within_last(2 Hours)", tree.Compared(
            tree.Trait(path("a")), Comparator.WITHIN_LAST, span=tree.Span(2, False)
        )),
        ("not trait('a').exists() or trait('b').absent() and trait('c').exists()", tree.Disjunction((
            tree.Negation(tree.Compared(tree.Trait(path("a")), Comparator.EXISTS)),
            tree.Conjunction((
                tree.Compared(tree.Trait(path("b")), Comparator.ABSENT),
                tree.Compared(tree.Trait(path("c")), Comparator.EXISTS),
            )),
        ))),
        ("event('Order Completed').min(property('a') As String)", tree.Reduction(
            ORDERED, Reducer.MIN, tree.Property(path("a")), as_text=True
        )),
        ("event('Order Completed').sum(property('a') as number)", tree.Reduction(
            ORDERED, Reducer.SUM, tree.Property(path("a"))
        )),
        ("event('Order Completed') # all of them\n  .count()", count()),
    ],
)  # fmt: skip
def test_a_text_becomes_a_tree(text, expected):
    assert parse_query(text) == expected


@pytest.mark.parametrize(
    ("text", "reason", "position"),
    [
        ("", "expected a condition", 0),
        ("event('A')", "add a reducer", 10),
        ("trait('a')", "an audience needs a condition", 10),
        ("event('A).count() > 1", "no closing quote", 21),
        ("even('A').count() > 1", "unknown function even: did you mean event?", 0),
        ("event('A').witin(3 days).count() > 1", "unknown function witin: did you mean within?", 11),
        ("event('A').within(3 weeks).count() > 1", "unknown unit weeks: known are hour, hours, day, days", 20),
        ("event('A').within(0.5 days).count() > 1", "a span is a whole number", 18),
        ("event('A').within(36501 days).count() > 1", "at most 36,500 days", 18),
        ("event('A').between(7 days, 3 days).count() > 1", "the shorter span comes first", 27),
        ("event('A').within(parent: 3 days).count() > 1", "needs a where", 18),
        ("event('A').within(parnt: 3 days).count() > 1", "did you mean parent?", 18),
        ("property('a') = 1", "use it inside where(…) or a reducer", 0),
        ("event('A').where(property(parent: 'a') = 1).count() > 1", "needs another `where`", 17),
        ("event('A').where(event('B').sum(property(parent: 'a')) > 1).count() > 1", "not of the parent", 32),
        ("trait('a') = 1 && trait('b') = 2", "write `AND` for `&&`", 15),
        ("trait('a') <> 1", "write `!=` for `<>`", 11),
        ("trait('a') = 1 trait('b') = 2", "expected a comparator", 15),
        ("event('A').where(total > 1).count() > 1", "total needs quotes, 'total', or to be a function", 17),
        ("event(Order Completed).count() > 1", "Order needs quotes", 6),
        ("trait('a') = DE", "DE needs quotes", 13),
        ("trait('a') = Null", "there is no null: write absent() or exists()", 13),
        ("trait('a') IN ('x', 'y')", "for IN write one_of", 11),
        ("trait('a') is not null", "for IS NULL write absent", 11),
        ("trait(\u201ca\u201d) = 1", "write straight quotes", 6),
        ("5 = trait('a')", "put the literal on the right", 0),
        ("trait('a').contains(5)", "looks for a string", 20),
        ("trait('a').contains()", "takes at least one argument", 11),
        ("trait('a').exists(1)", "takes no argument", 11),
        ("trait('a').equals(1, 2)", "takes one argument", 11),
        ("trait('a').before_date('2026-02-30')", "not a date", 23),
        ("trait('a').within_last(3)", "write within_last(7 days)", 11),
        ("trait('a') = 1e999", "too large", 13),
        ("trait('a..b') = 1", "empty name in its path", 0),
        ("trait('$') = 1", "begins with a name", 0),
        ("event('').count() > 1", "has no name", 0),
        ("event('A').count().count() > 1", "before it is reduced", 19),
        ("event('A').sum(property('a') as array) > 1", "`as array` is not supported", 32),
        ("event('A').sum(property('a') as string) > 1", "is not of strings", 32),
        ("event('A').mode(property('a'), 0) = 1", "a whole number from 1 on", 31),
        ("sources('x')", "not supported", 0),
        ("ANY event('A').count() > 1", "ANY is not supported", 0),
        ("event('A').where(trait('a')).count() > 1", "a condition is needed here", 27),
        ("NOT " * 65 + "trait('a') = 1", "nested more than 64 levels deep", 256),
        ("(" * 65, "nested more than 64 levels deep", 64),
        (" OR ".join(["trait('a') = 1"] * 51), "at most 50 extractors", 900),
    ],
)  # fmt: skip
def test_an_error_says_what_is_wrong_and_where(text, reason, position):
    with pytest.raises(QueryError, match=re.escape(reason)) as caught:
        parse_condition(text)
    assert caught.value.position == position


def test_an_error_shows_the_place():
    with pytest.raises(QueryError) as caught:
        parse_query("trait('a') = 1 AND\n  event('B').witin(3 days).count() > 1")
    assert str(caught.value) == (
        "line 2, column 14: unknown function witin: did you mean within?\n"
        "      event('B').witin(3 days).count() > 1\n"
        "                 ^"
    )


def error_position(text):
    """Return the position of the error in a text, None if the text is valid."""
    try:
        parse_query(text)
    except QueryError as error:
        return error.position
    return None


@pytest.mark.parametrize("text", VALID)
def test_every_prefix_is_an_error_at_its_end(text):
    for length in range(len(text)):
        prefix = text[:length].rstrip()
        position = error_position(prefix)
        last_token = re.search(r"(\w+|\W)?$", prefix).start()
        assert position is None or position >= last_token, (prefix, position)


@pytest.mark.parametrize(
    "text",
    [
        *VALID,
        "NOT " * 63 + "trait('a') = 1",
        "event('A').where(NOT " * 31 + "trait('a') = 1" + ").count() = 1" * 31,
    ],
)
def test_the_layout_of_a_query_parses_to_the_same_tree(text):
    query = parse_query(text)
    assert parse_query(query_text(query)) == query
    assert query_text(parse_query(query_text(query))) == query_text(query)


WORDS = [
    *re.findall(r"\w+|\s|[^\w\s]", " ".join(VALID)),
    "\x00",
    "\\",
    "é",
    "$",
    "..",
    "1e5",
    "#",
    "\n",
    "((",
    "))",
]


DEEP = [
    "(",
    "NOT ",
    "event('A').where(",
    "trait('a').one_of(",
    "{",
    "'",
    "\\",
    "trait('a') = 1 AND (",
    ".count()",
    "# ",
]


def fuzzed(random):
    """A text of random words or bytes, deeply nested, or a valid query with mistakes in it."""
    kind = random.randrange(8)
    if kind == 0:
        return "".join(random.choices(WORDS, k=random.randrange(40)))
    if kind == 1:
        return random.randbytes(random.randrange(60)).decode(
            random.choice(["latin-1", "utf-8"]), "surrogateescape"
        )
    if kind == 2:
        opening = "".join(random.choices(DEEP, k=random.randrange(1, 3))) * random.choice(
            [1, 5, 63, 64, 65, 900]
        )
        return opening + random.choice(
            ["", "trait('a') = 1", "trait('a').exists()" + ")" * opening.count("(")]
        )
    text = random.choice(VALID)
    for _ in range(random.randrange(1, 4)):
        start, end = sorted(random.choices(range(len(text) + 1), k=2))
        put = random.choice(
            ["", *random.choices(WORDS, k=3), text[start:end] * 2, chr(random.randrange(0x500))]
        )
        text = text[:start] + put + text[random.choice([start, start + 1, end]) :]
    return text


def check_text(text):
    position = error_position(text)
    if position is None:
        query = parse_query(text)
        assert parse_query(query_text(query)) == query, text
    else:
        assert 0 <= position <= len(text), text


@given(st.integers(0, 2**64))
@settings(max_examples=max(1, int(os.environ.get("QUERY_EXAMPLES", "400")) // 20))
def test_every_text_parses_or_raises_a_query_error(seed):
    random = Random(seed)
    for _ in range(20):
        check_text(fuzzed(random))


@pytest.mark.parametrize(
    "text",
    ["'\\", "trait('a') = -", "", "\n" * 20_001, "(" * 20_000, "trait('a').one_of(" + "1," * 1_000 + "1)"],
)
def test_an_odd_text_parses_or_raises_a_query_error(text):
    check_text(text)


@pytest.mark.parametrize("text", ["trait('a\0b') = 1", "trait('a') = '\udcff'"])
def test_characters_that_are_not_text_are_refused(text):
    with pytest.raises(QueryError, match="this character is not text"):
        parse_query(text)
