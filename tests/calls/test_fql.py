import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.calls import fql
from audience_sync.calls.fql import And, Comparison, FieldPath, FunctionCall, List, Literal, Not, Or
from audience_sync.errors import ConfigError
from tests.calls.fql_printer import to_text

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


names = st.text("ab_-.\\ 1é\n", min_size=1, max_size=3) | st.sampled_from(["and", "TRUE", "not", "in", "0"])
paths = st.builds(FieldPath, st.lists(names, min_size=1, max_size=3).map(tuple))
texts = st.text("ab*?[-]\\ '\n", max_size=5) | st.text('ab"', max_size=3)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False, width=32)
literals = st.builds(Literal, st.none() | st.booleans() | numbers | texts)


def calls(values, functions):
    return st.sampled_from(functions).flatmap(
        lambda name: st.builds(
            FunctionCall, st.just(name), st.tuples(*[values] * (2 if name in ("contains", "match") else 1))
        )
    )


SCALARS = [
    "length",
    "lowercase",
    "uppercase",
    "snakecase",
    "kebabcase",
    "titlecase",
    "typeof",
    "string",
    "number",
]
TESTS = ["contains", "match", "bool"]
values = st.recursive(
    literals | paths,
    lambda inner: st.builds(List, st.lists(inner, max_size=3).map(tuple)) | calls(inner, SCALARS + TESTS),
    max_leaves=4,
)
comparisons = st.builds(
    Comparison, st.sampled_from(["=", "!=", ">", ">=", "<", "<="]), values, values
) | st.builds(
    Comparison, st.just("in"), values, paths | st.builds(List, st.lists(values, max_size=3).map(tuple))
)
bare = paths | calls(values, TESTS) | st.builds(Literal, st.none() | st.booleans())


def joined(inner):
    groups = st.lists(inner, min_size=2, max_size=3).map(tuple)
    negatable = inner.filter(lambda e: not isinstance(e, Literal) or e.value in (None, True, False))
    return st.builds(Or, groups) | st.builds(And, groups) | st.builds(Not, negatable)


expressions = st.recursive(comparisons | bare, joined, max_leaves=5)


@given(expressions)
def test_printed_expressions_parse_to_themselves(expression):
    text = to_text(expression)
    try:
        assert repr(fql.parse_trigger(text)) == repr(expression)
    except ConfigError as error:
        if "not a pattern" not in str(error):
            raise


@given(st.text(max_size=30) | st.text("ab.\\ '\"()[],!=<>1-andorin", max_size=30))
def test_any_text_is_an_expression_or_refused(text):
    check(text)


def check(text):
    try:
        expression = fql.parse_trigger(text)
    except ConfigError:
        return
    assert repr(fql.parse_trigger(to_text(expression))) == repr(expression)


WORDS = [
    "a",
    "b.c",
    "'x'",
    "1",
    "-2.5",
    "null",
    "true",
    "(",
    ")",
    "[",
    "]",
    ",",
    "!",
    "=",
    "!=",
    ">",
    "in",
    "and",
    "or",
]


@given(st.lists(st.sampled_from([*WORDS, "length(", "contains(", "match(", "lenght("]), max_size=12))
def test_any_words_are_an_expression_or_refused(words):
    check(" ".join(words))


def naive_glob(pattern, text):
    """Every choice of every `*` in turn."""
    if not pattern:
        return not text
    first, rest = pattern[0], pattern[1:]
    if first == "*":
        return any(naive_glob(rest, text[start:]) for start in range(len(text) + 1))
    if first == "[":
        allowed, rest = members(rest)
        return bool(text) and text[0] in allowed and naive_glob(rest, text[1:])
    if first == "\\":
        first, rest = rest[0], rest[1:]
    elif first == "?":
        return bool(text) and naive_glob(rest, text[1:])
    return text[:1] == first and naive_glob(rest, text[1:])


def members(pattern):
    """The letters of a class whose bracket was opened, and what follows its closing."""
    listed = []
    while pattern[0] != "]":
        escaped = pattern[0] == "\\"
        listed.append((pattern[escaped], escaped))
        pattern = pattern[1 + escaped :]
    allowed = set()
    while listed:
        start = listed.pop(0)[0]
        end = start
        if len(listed) > 1 and listed[0] == ("-", False):
            end = listed[1][0]
            del listed[:2]
        allowed |= {chr(code) for code in range(ord(start), ord(end) + 1)}
    return allowed, pattern[1:]


pieces = st.sampled_from(
    ["*", "?", "a", "b", "-", "\\*", "\\a", "\\\\", "[ab]", "[a-c]", "[a\\-c]", "[-b]", "[b-]", "[c-a]"]
)


@given(st.lists(pieces, max_size=6).map("".join), st.text("abc-*\\", max_size=7))
def test_globs_as_the_slow_model_says(pattern, text):
    got = fql.compile_trigger(FunctionCall("match", (FieldPath(("t",)), FieldPath(("p",)))))(
        {"t": text, "p": pattern}
    )
    assert got is naive_glob(pattern, text)


def tagged(value):
    """A JSON value together with its type, so that Python's own equality is strict."""
    if isinstance(value, dict):
        return ("object", {name: tagged(member) for name, member in value.items()})
    if isinstance(value, list):
        return ("list", [tagged(item) for item in value])
    if value is None or isinstance(value, bool):
        return ("null" if value is None else "bool", value)
    return ("string", value) if isinstance(value, str) else ("number", Fraction(value))


def model(e, document):
    """What the documentation says, one step after the other, on tagged values."""
    if isinstance(e, Literal):
        return tagged(e.value)
    if isinstance(e, List):
        return ("list", [model(item, document) for item in e.items])
    if isinstance(e, FieldPath):
        found = tagged(document)
        for name in e.names:
            found = found[1].get(name, ("null", None)) if found[0] == "object" else ("null", None)
        return found
    if isinstance(e, Not):
        return ("bool", model(e.operand, document) != ("bool", True))
    if isinstance(e, And):
        return ("bool", [model(o, document) for o in e.operands].count(("bool", True)) == len(e.operands))
    if isinstance(e, Or):
        return ("bool", ("bool", True) in [model(o, document) for o in e.operands])
    if isinstance(e, Comparison):
        left, right = model(e.left, document), model(e.right, document)
        if e.sign in ("=", "!="):
            return ("bool", (left == right) == (e.sign == "="))
        if e.sign == "in":
            return ("bool", right[0] == "list" and left in right[1])
        both = left[0] == right[0] == "number"
        difference = left[1] - right[1] if both else 0
        return (
            "bool",
            both
            and {">": difference > 0, ">=": difference >= 0, "<": difference < 0, "<=": difference <= 0}[
                e.sign
            ],
        )
    kind, value = model(e.arguments[0], document)
    if e.name == "contains":
        other, part = model(e.arguments[1], document)
        return (
            "bool",
            kind == other == "string" and len(value.split(part)) > 1 if part else kind == other == "string",
        )
    if e.name == "typeof":
        return ("string", kind)
    if e.name == "length":
        return (
            "number",
            {"string": lambda: len(value.encode()), "list": lambda: len(value)}.get(kind, lambda: 0)(),
        )
    if e.name == "bool":
        return ("bool", (kind, value) not in FALSE)
    if kind != "string":
        return ("null", None)
    if e.name == "titlecase":
        return ("string", re.sub("(^| )([^ ])", lambda m: m[1] + m[2].upper(), value))
    change = {"lowercase": value.lower(), "uppercase": value.upper()}
    change |= {"snakecase": "_".join(value.split(" ")), "kebabcase": "-".join(value.split(" "))}
    return ("string", change[e.name])


FALSE = [("null", None), ("bool", False), ("number", 0), ("list", []), ("object", {})]
FALSE += [("string", text) for text in ("", "0", "false")]
small = st.sampled_from(
    [None, True, False, 0, 1, 1.0, -2, 0.5, "", "a", "a b", "É", "0", "false", [], [1], [True], {}]
)
small_values = st.recursive(
    st.builds(Literal, small.filter(lambda v: not isinstance(v, list | dict)))
    | st.builds(FieldPath, st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(tuple)),
    lambda inner: (
        st.builds(List, st.lists(inner, max_size=2).map(tuple))
        | calls(
            inner,
            [
                "contains",
                "typeof",
                "length",
                "bool",
                "titlecase",
                "lowercase",
                "uppercase",
                "snakecase",
                "kebabcase",
            ],
        )
    ),
    max_leaves=4,
)
small_comparisons = st.builds(
    Comparison, st.sampled_from(["=", "!=", ">", ">=", "<", "<=", "in"]), small_values, small_values
)
documents = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        small, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner)
    ),
)


@given(st.recursive(small_comparisons | small_values, joined, max_leaves=4), documents)
def test_conditions_as_the_slow_model_says(expression, document):
    assert fql.compile_trigger(expression)(document) is (model(expression, document) == ("bool", True))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab_-.\\ 1é\n", max_size=3), inner),
    max_leaves=10,
)


@given(expressions, st.dictionaries(names, anything))
def test_any_document_gives_a_bool(expression, document):
    assert type(fql.compile_trigger(expression)(document)) is bool
