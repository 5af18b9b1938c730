"""Triggers in FQL: their meaning, and which are refused."""

import math

import pytest

from audience_sync.calls import fql
from audience_sync.calls.fql import And, Comparison, FieldPath, FunctionCall, List, Literal, Not, Or
from audience_sync.errors import ConfigError

CALL = {
    "event": "Button Clicked",
    "type": "track",
    "context": {"library": {"name": "analytics.js", "version": "1.0"}},
    "properties": {
        "features": ["discounts", "dark-mode"],
        "product 1": {"price": "19.99"},
        "total": 100,
        "rate": 1.0,
        "vip": True,
        "none": None,
        "a-b": 1,
        "2nd": 2,
        "and": 3,
        "object": {"a": [1]},
        "same": {"a": [1.0]},
        "other": {"a": [True]},
        "pattern": "Button *",
        "broken": "[",
    },
}


def holds(text, document=CALL):
    return fql.compile_trigger(fql.parse_trigger(text))(document)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("event = 'Button Clicked'", True),
        ("event = 'Screen Tapped'", False),
        ("context.path.path = '/login'", False),
        ("type = 'identify' or type = 'track'", True),
        ("event = 'Button Clicked' and type = 'track'", True),
        ("match( context.library.version, '1.*' )", True),
        ("match( context.library.version, '2.*' )", False),
        ("type = 'track' and ( event = 'Click' or match( event, 'Button *' ) )", True),
        ("!contains( context.library.name, 'js' )", False),
        ("'dark-mode' in properties.features", True),
        ("'blink' in properties.features", False),
        ("properties.product\\ 1.price = '19.99'", True),
        ("!( type in ['track', 'identify'] )", False),
        ("length( userId ) > 0", False),
        ("type = 'track' and ( event = 'Click' or match( 'Button *', event ) )", False),
    ],
)
def test_the_examples_of_the_documentation(text, expected):
    assert holds(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("properties.rate = 1", True),
        ("properties.vip = 1", False),
        ("properties.vip != 1", True),
        ("properties.vip = true", True),
        ("properties.total = '100'", False),
        ("properties.total != '100'", True),
        ("properties.nothing = null", True),
        ("properties.none = null", True),
        ("properties.none.deeper = null", True),
        ("properties.features.0 = null", True),
        ("properties.nothing != null", False),
        ("properties.features = ['discounts', \"dark-mode\"]", True),
        ("properties.features = ['dark-mode', 'discounts']", False),
        ("[1, true] = [1.0, true]", True),
        ("[1] = [true]", False),
        ("properties.object = properties.same", True),
        ("properties.object = properties.other", False),
        ("properties.total > 99.5", True),
        ("properties.total >= 100", True),
        ("properties.total < -1", False),
        ("properties.total <= +100", True),
        ("properties.vip >= 0", False),
        ("'b' > 'a'", False),
        ("properties.nothing < 1", False),
        ("1 in [true, '1']", False),
        ("true in [true]", True),
        ("null in [null]", True),
        ("properties.total in [type, properties.rate, 100]", True),
        ("type in []", False),
        ("type in event", False),
        ("properties.a-b = 1", True),
        ("properties.2nd = 2", True),
        ("properties.and = 3", True),
        ("\\properties.\\and = 3", True),
        ("event=\"Button Clicked\"and type='track'", True),
    ],
)
def test_comparisons(text, expected):
    assert holds(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("properties.vip", True),
        ("!properties.vip", False),
        ("properties.total", False),
        ("!properties.total", True),
        ("!!properties.total", False),
        ("event", False),
        ("null", False),
        ("!null", True),
        ("true or true and false", True),
        ("(true or true) and false", False),
        ("false and true or true", True),
        ("!false and false", False),
        ("!(false and false)", True),
        ("bool(properties.total) and !bool(userId)", True),
    ],
)
def test_only_true_is_true_and_not_binds_before_and_before_or(text, expected):
    assert holds(text) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("contains('abc', 'b')", True),
        ("contains('abc', 'B')", False),
        ("contains(null, 'a')", False),
        ("contains('null', null)", False),
        ("contains(12, '1')", False),
        ("contains(['a'], 'a')", False),
        ("length('a')", 1),
        ("length('ア')", 3),
        ("length(['a', 'b'])", 2),
        ("length(null)", 0),
        ("length(12)", 0),
        ("length(properties.object)", 0),
        ("lowercase('AbÉ')", "abé"),
        ("lowercase(null)", None),
        ("lowercase(12)", None),
        ("uppercase('abé')", "ABÉ"),
        ("uppercase(null)", None),
        ("snakecase('test string')", "test_string"),
        ("kebabcase('test string')", "test-string"),
        ("titlecase('test string iOS')", "Test String IOS"),
        ("titlecase(null)", None),
        ("typeof('')", "string"),
        ("typeof(1)", "number"),
        ("typeof(1.5)", "number"),
        ("typeof([])", "list"),
        ("typeof(false)", "bool"),
        ("typeof(null)", "null"),
        ("typeof(nothing)", "null"),
        ("typeof(properties)", "object"),
        ("match(null, '*')", False),
        ("match('a', null)", False),
        ("match(1, '1')", False),
        ("match(event, properties.pattern)", True),
        ("match(event, properties.broken)", False),
        ("bool(null)", False),
        ("bool(0)", False),
        ("bool(0.5)", True),
        ("bool('')", False),
        ("bool('false')", False),
        ("bool('0')", False),
        ("bool('no')", True),
        ("bool([])", False),
        ("bool([0])", True),
        ("bool(true)", True),
        ("string('a')", "a"),
        ("string(1)", "1"),
        ("string(1.0)", "1"),
        ("string(1.5)", "1.5"),
        ("string(true)", "true"),
        ("string([1, 'a', null])", '[1,"a",null]'),
        ("string(null)", None),
        ("string(properties)", None),
        ("number(12)", 12),
        ("number('12')", 12),
        ("number('-1.5e2')", -150),
        ("number('12a')", None),
        ("number('')", None),
        ("number('Infinity')", None),
        ("number('1e999')", None),
        ("number(true)", None),
        ("number(null)", None),
        ("number([1])", None),
    ],
)
def test_functions(value, expected):
    assert fql.compile_trigger(Comparison("=", fql.parse_trigger(f"{value} = 0").left, Literal(expected)))(
        CALL
    )


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("abcd", "a*d", True),
        ("", "*", True),
        ("abc", "ab", False),
        ("abcd", "a??d", True),
        ("abcd", "*d", True),
        ("ab*d", "ab\\*d", True),
        ("abxd", "ab\\*d", False),
        ("abCd", "ab[cC]d", True),
        ("abcd", "ab[a-z]d", True),
        ("abcd", "ab[A-Z]d", False),
        ("a", "a*a", False),
        ("a\nb", "a?b", True),
        ("]", "[\\]]", True),
        ("-", "[a\\-z]", True),
        ("b", "[a\\-z]", False),
        ("-", "[a-]", True),
        ("^", "[^a]", True),
        ("b", "[!a]", False),
        ("b", "[z-a]", False),
        ("a.c", "a.c", True),
        ("abc", "a.c", False),
        ("", "", True),
    ],
)
def test_globs(text, pattern, expected):
    assert (
        fql.compile_trigger(FunctionCall("match", (FieldPath(("text",)), Literal(pattern))))({"text": text})
        is expected
    )


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a.b\\ c.\\. = 'x'", Comparison("=", FieldPath(("a", "b c", ".")), Literal("x"))),
        ("a or b and !c", Or((FieldPath(("a",)), And((FieldPath(("b",)), Not(FieldPath(("c",)))))))),
        ("(a or b) or c", Or((Or((FieldPath(("a",)), FieldPath(("b",)))), FieldPath(("c",))))),
        (
            "x in [1, -2.5, null]",
            Comparison("in", FieldPath(("x",)), List((Literal(1), Literal(-2.5), Literal(None)))),
        ),
        ("contains(x, '\"')", FunctionCall("contains", (FieldPath(("x",)), Literal('"')))),
        ("x = '\\n'", Comparison("=", FieldPath(("x",)), Literal("\\n"))),
        ("\n\tx\r\n", FieldPath(("x",))),
    ],
)
def test_trees(text, tree):
    assert repr(fql.parse_trigger(text)) == repr(tree)


def test_literals_are_compared_as_json():
    assert holds("1 = 1.0")
    assert not holds("1 = true")
    assert not holds("0 = false")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: expected a condition"),
        (" \n ", "expected a condition"),
        ("event =", "line 1, column 8: expected a value: a field, text in quotes"),
        ("event 'x'", "column 7: expected a comparison (= != > >= < <=), `in`, `and`, `or` or the end"),
        ("a = 1 and\n  or b", "line 2, column 3: expected a condition"),
        ('userId = oops"', "column 14: this text has no closing quote"),
        ("(a", "column 3: expected a closing parenthesis"),
        ("a)", "column 2: expected the end"),
        ("a in [1, 2", "column 11: expected a comma or a closing bracket"),
        ("a in 'abc'", "column 6: expected a list or a field"),
        ("'abc'", "column 6: expected a comparison"),
        ("!a = 1", "column 4: expected `and`, `or` or the end"),
        ("a = b = c", "column 7: expected `and`, `or` or the end"),
        ("(a) = 1", "column 5: expected `and`"),
        ("a == 1", "write `=` for `==`"),
        ("a && b", "write `and` for `&&`"),
        ("a || b", "write `or` for `||`"),
        ("a <> b", "write `!=` for `<>`"),
        ("not a", "column 1: there is no `not`: write !( … )"),
        ("a not in [1]", "column 3: there is no `not`"),
        ("a AND b", "column 3: write `and` in small letters"),
        ("a = TRUE", "column 5: write `true` in small letters"),
        ("a = é", "column 5: unexpected character"),
        ("contain(a, 'b')", "column 1: unknown function: did you mean contains?"),
        ("a and zzz(b)", "column 7: unknown function: known are contains, match, length"),
        ("contains(a)", "write contains(text, part)"),
        ("length() > 1", "write length(value)"),
        ("length(a)", "length( ) returns a number: compare it with something"),
        ("match(a, '[b')", "not a pattern"),
        ("match(a, 'b\\')", "not a pattern"),
        ("match(a, '" + "b" * 501 + "')", "not a pattern"),
        ("a = " + "9" * 301, "a number has at most 300 digits"),
        ("a" * 10_001, "longer than 10000 characters"),
        ("!" * 9_000 + "a", "nested more than 50 levels deep"),
        ("a = " + "[" * 4_000 + "]" * 4_000, "nested more than 50 levels deep"),
        ("(" * 10_000, "expected a condition"),
    ],
)
def test_errors_name_the_place(text, message):
    with pytest.raises(ConfigError) as raised:
        fql.parse_trigger(text)
    assert message in str(raised.value)


def test_redundant_parentheses_may_be_nested_without_limit():
    assert fql.parse_trigger("(" * 4_000 + "a" + ")" * 4_000) == FieldPath(("a",))


def test_the_message_points_at_the_place():
    with pytest.raises(ConfigError) as raised:
        fql.parse_trigger('type = "track" and\n\tevent == "x"')
    assert str(raised.value).splitlines() == [
        "line 2, column 9: write `=` for `==`",
        '     event == "x"',
        "            ^",
    ]


def test_a_glob_never_backtracks():
    assert holds("match(a, '*a*a*a*a*a*a*a*a*b')", {"a": "a" * 30_000}) is False
    assert holds("match(a, b)", {"a": "a" * 30_000, "b": "*" + "a" * 400 + "b*"}) is False


def test_extreme_documents():
    deep, wide = [], {}
    for _ in range(200_000):
        deep, wide = [deep], {"a": wide}
    for value in (deep, wide, 10**5000, "9" * 5000, math.inf, math.nan):
        document = {"a": value, "b": value, "c": [value]}
        for text in (
            "a = b",
            "a = c",
            "a in c",
            "string(a) = 'x'",
            "number(a) > 1",
            "bool(a)",
            "a.a.a > 1",
            "a > 1",
        ):
            assert holds(text, document) in (True, False)
