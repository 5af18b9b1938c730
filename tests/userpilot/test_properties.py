import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.userpilot.properties import primitives


def test_primitives_stay_as_they_are():
    metadata = {"a": 1, "b": None, "c": True, "d": "x", "e": 1.5}
    assert primitives(metadata, "flatten") == primitives(metadata, "json") == metadata


@pytest.mark.parametrize(
    ("metadata", "flat"),
    [
        ({"a": {"b": {"c": 1}}}, {"a.b.c": 1}),
        ({"a": [1, {"b": 2}, [3]]}, {"a.0": 1, "a.1.b": 2, "a.2.0": 3}),
        ({"a": {}, "b": [], "c": {"d": []}}, {"a": "{}", "b": "[]", "c.d": "[]"}),
        ({"a": {"b": 2}, "a.b": 1}, {"a.b": 1, "a.b~2": 2}),
        ({"a": {"b": 2}, "a.b": 1, "a.b~2": 0}, {"a.b": 1, "a.b~2": 0, "a.b~3": 2}),
        ({"a": {"b.c": 1, "b": {"c": 2}}, "a.b": {"c": 3}}, {"a.b.c": 1, "a.b.c~2": 3, "a.b.c~3": 2}),
    ],
)
def test_flatten(metadata, flat):
    assert primitives(metadata, "flatten") == flat


def test_json():
    assert primitives({"a": {"b": [1, "é", None]}, "c": []}, "json") == {"a": '{"b":[1,"é",null]}', "c": "[]"}


names = st.text("ab.~2", max_size=3)
values = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3)
)


def leaf_count(value):
    if isinstance(value, dict):
        value = list(value.values())
    return (sum(map(leaf_count, value)) or 1) if isinstance(value, list) else 1


@given(st.dictionaries(names, values, max_size=4))
def test_flattening_loses_nothing(metadata):
    flat = primitives(metadata, "flatten")
    assert len(flat) == sum(map(leaf_count, metadata.values()))
    assert not any(isinstance(value, dict | list) for value in flat.values())


@given(st.dictionaries(names, values, max_size=4), st.randoms())
def test_the_order_of_the_properties_does_not_matter(metadata, rng: random.Random):
    items = list(metadata.items())
    rng.shuffle(items)
    assert primitives(dict(items), "flatten") == primitives(metadata, "flatten")


def test_flattening_with_very_long_names_falls_back_to_json():
    metadata = {"k" * 15_000: [1] * 7_500, "plain": True}
    properties = primitives(metadata, "flatten")
    assert properties == {"k" * 15_000: f"[{','.join('1' * 7_500)}]", "plain": True}
