"""Random triggers and globs, compared with slow and obvious models."""

import re
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from audience_sync.calls import fql
from audience_sync.calls.fql import And, Comparison, FieldPath, FunctionCall, List, Literal, Not, Or
from audience_sync.errors import ConfigError
from tests.calls.fql_printer import to_text

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
    """The documentation's rules, step by step, on tagged values."""
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
