"""Compiled queries over random data give what the reference says, on both databases."""

import datetime as dt
import os

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.layout import query_text
from audience_sync.audiences.query.parser import parse_query
from audience_sync.audiences.query.tree import Comparator, Reducer
from tests.audiences.query import reference
from tests.audiences.query.world import catalog_of, computed, write

NOW = dt.datetime(2026, 11, 27, 12, 30, 15, 250_000, tzinfo=dt.UTC)
USERS = ["1", "ann", "bob"]
EVENTS = ["A", "B", "it's %_"]
NAMES = ["a", "b.c", 'q"', "0", "%"]
TEXTS = [
    "",
    "a",
    "ab",
    "A",
    "ß",
    "%",
    "_",
    "'",
    '"',
    "\\",
    "true",
    "false",
    "1",
    "10",
    "9",
    "\U0001f600",
    "\uffff",
]
DATES = [
    "2026-11-27",
    "2026-11-24",
    "2026-11-20T12:30",
    "2026-11-27 12:30:15.250",
    "2026-11-27T14:30:15.2500009+02:00",
    "2026-11-26T23:59:59Z",
    "2026-12-01T00:00:00-12:45",
    "2024-02-29",
    "2026-02-29",
    "2026-02-30T10:00:00Z",
    "2026-11-31",
    "2026-13-01",
    "2026-11-27T24:00",
    "2026-11-27T12:60",
    "2026-11-27T12:30:60",
    "2026-11-27T12:30+24:00",
    "0000-01-01",
    "0001-01-01",
    "9999-12-31",
    "2026-11-27T",
    "2026-11-27T12",
    "2026-11-27T12:30.5",
    "2026-11-27T12:30:00.Z",
    "2026-11-27Z",
    "2026-11-27+01:00",
    "20261127",
    " 2026-11-27",
    "2026-11-27\n",
]
NUMBERS = [0, 1, 1.0, -1, 2, 0.1, 0.2, 0.30000000000000004, 1e300, 2**53 + 1, 3.5, 10, 100]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(DATES)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=5,
)
DOCUMENTS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)
EDGES = [dt.timedelta(days=days, hours=hours) for days in (0, 1, 3, 7) for hours in (0, 1)]
MOMENTS = st.builds(
    lambda edge, microseconds: NOW - edge + dt.timedelta(microseconds=microseconds),
    st.sampled_from(EDGES),
    st.sampled_from([0, 0, 1, -1, 3_600_000_000]),
)
ROWS = st.lists(
    st.tuples(st.sampled_from(USERS), st.sampled_from(EVENTS), MOMENTS, DOCUMENTS, DOCUMENTS), max_size=8
)

PATHS = st.lists(st.sampled_from([*NAMES, "$", "1"]), min_size=1, max_size=3).filter(
    lambda steps: steps[0] != "$"
)
PATHS = PATHS.map(lambda steps: tree.ValuePath(tuple(steps)))
SINGLE_PATHS = PATHS.filter(lambda path: tree.ANY_ITEM not in path.steps)
CONSTANTS = st.one_of(st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(DATES))
CONSTANTS = CONSTANTS.map(tree.Constant)
SPANS = st.builds(tree.Span, st.sampled_from([0, 1, 3, 7, 24]), st.booleans())
SPAN_COMPARATORS = [
    Comparator.WITHIN_LAST,
    Comparator.WITHIN_NEXT,
    Comparator.BEFORE_LAST,
    Comparator.AFTER_NEXT,
]
MANY = [Comparator.CONTAINS, Comparator.OMITS, Comparator.STARTS_WITH, Comparator.ENDS_WITH]
VALID_DATES = [text for text in DATES if reference.parse_moment(text)]


@st.composite
def compared(draw, left, others):
    """A comparison of a scalar of `left`, with literals or with scalars of `others`."""
    value = draw(left)
    comparator = draw(st.sampled_from(list(Comparator)))
    if comparator in SPAN_COMPARATORS:
        return tree.Compared(value, comparator, span=draw(SPANS))
    if comparator in {Comparator.EXISTS, Comparator.ABSENT}:
        return tree.Compared(value, comparator)
    if comparator in MANY:
        arguments = draw(st.lists(st.sampled_from(TEXTS).map(tree.Constant) | others, min_size=1, max_size=2))
    elif comparator in {Comparator.ONE_OF, Comparator.NONE_OF}:
        arguments = draw(st.lists(CONSTANTS | others, min_size=1, max_size=3))
    elif comparator in {Comparator.BEFORE_DATE, Comparator.AFTER_DATE}:
        arguments = [draw(st.sampled_from(VALID_DATES).map(tree.Constant) | others)]
    else:
        arguments = [draw(CONSTANTS | others)]
    return tree.Compared(value, comparator, tuple(arguments))


@st.composite
def windows(draw, depth):
    of_parent = depth > 0 and draw(st.booleans())
    near, far = sorted(draw(st.lists(st.sampled_from(EDGES), min_size=2, max_size=2)))
    near = draw(st.sampled_from([near, dt.timedelta(0)]))
    return tree.Window(near, far, True) if of_parent else tree.Window(far, near)


@st.composite
def reductions(draw, depth=0):
    filters = draw(
        st.lists(
            windows(depth) | conditions(depth + 1).map(tree.Where) if depth < 2 else windows(depth),
            max_size=2,
        )
    )
    stream = tree.Stream(tree.StreamKind.EVENT, draw(st.sampled_from(EVENTS)), tuple(filters))
    reducer = draw(st.sampled_from([Reducer.COUNT, *Reducer]))
    if reducer is Reducer.COUNT:
        return tree.Reduction(stream, reducer)
    kind = draw(st.sampled_from([tree.Property, tree.Property, tree.Context]))
    as_text = reducer in {Reducer.MIN, Reducer.MAX} and draw(st.booleans())
    least = draw(st.sampled_from([1, 1, 2])) if reducer is Reducer.MODE else 1
    return tree.Reduction(stream, reducer, kind(draw(PATHS)), as_text, least)


def of_row(depth):
    parents = [False] if depth < 2 else [False, True]
    kinds = [tree.Property, tree.Property, tree.Context]
    return st.builds(
        lambda kind, path, of_parent: kind(path, of_parent),
        st.sampled_from(kinds),
        PATHS,
        st.sampled_from(parents),
    )


def conditions(depth=0):
    singles = st.builds(tree.Trait, SINGLE_PATHS)
    left = singles | reductions(depth)
    left |= st.builds(tree.Trait, PATHS)
    left = of_row(depth) | of_row(depth) | left if depth else left
    others = (of_row(depth) | singles) if depth else (singles | reductions(depth))
    return st.recursive(
        compared(left, others),
        lambda inner: st.one_of(
            inner.map(tree.Negation),
            st.lists(inner, min_size=2, max_size=3).map(lambda each: tree.Conjunction(tuple(each))),
            st.lists(inner, min_size=2, max_size=3).map(lambda each: tree.Disjunction(tuple(each))),
        ),
        max_leaves=3,
    )


def names_no_definition(query):
    return not any(
        isinstance(scalar, tree.Trait) and scalar.path.steps in {("0",), ("%",)}
        for scalar in tree.scalars(query)
    )


@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("QUERY_EXAMPLES", "60")),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking a query takes very long
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
def test_a_random_query_gives_what_the_reference_says(engine, data):
    traits = {user: data.draw(DOCUMENTS) for user in USERS}
    rows = [reference.Row(*row[:3], number, *row[3:]) for number, row in enumerate(data.draw(ROWS), 1)]
    definitions = {
        "0": (data.draw(conditions().filter(names_no_definition)), False),
        "%": (data.draw((conditions() | reductions()).filter(names_no_definition)), True),
    }
    definitions = data.draw(st.sampled_from([{}, {}, definitions]))
    world = reference.World(NOW, traits, rows, definitions)
    is_trait = data.draw(st.booleans())
    query = data.draw(
        conditions() | reductions() | st.builds(tree.Trait, SINGLE_PATHS) if is_trait else conditions()
    )
    assert parse_query(query_text(query)) == query
    expected = reference.trait(world, query) if is_trait else reference.audience(world, query)
    with engine.connect() as connection:
        write(connection, traits, rows)
        try:
            actual = computed(connection, query, catalog_of(engine, definitions), NOW, is_trait=is_trait)
        except sa.exc.OperationalError as error:  # SQLite before 3.46 has a limit, and few queries reach it
            if "parser stack overflow" not in str(error):
                raise
            reject()
        connection.rollback()
    assert actual == expected, query_text(query)


@pytest.mark.parametrize("value", [[], {}, [None], [[1]], {"a": 1}, "", False, 0, None], ids=str)
@pytest.mark.parametrize("test", ["exists()", "absent()", "!= 'x'", "none_of('x', 1)"])
def test_a_trait_beside_a_row_exists_whatever_its_value(engine, test, value):
    test = f" {test}" if test.startswith("!") else f".{test}"
    query = parse_query(f"event('A').where(trait('a'){test}).count()")
    traits, rows = {"ann": {}, "bob": {"a": value}}, [("bob", "A", NOW - dt.timedelta(days=1), 1, {}, {})]
    rows = [reference.Row(*row) for row in rows]
    expected = reference.trait(reference.World(NOW, traits, rows, {}), query)
    with engine.connect() as connection:
        write(connection, traits, rows)
        actual = computed(connection, query, catalog_of(engine, {}), NOW, is_trait=True)
        connection.rollback()
    assert actual == expected
