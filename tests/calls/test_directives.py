import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audience_sync.calls import directives
from audience_sync.calls.directives import MISSING
from audience_sync.errors import CallError, ConfigError

CALL = {
    "type": "track",
    "userId": "u1",
    "event": "Order Completed",
    "context": None,
    "properties": {
        "total": 12.0,
        "vip": False,
        "note": "",
        "coupon": None,
        "odd.name": {"a b": 1},
        "items": [{"sku": "A"}, {"sku": "B", "tags": ["x", "y"]}],
        "raw": '{"a":[1]}',
        "count": 0,
    },
}


def resolve(mapping):
    return directives.compile_template(mapping).resolve(CALL)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("$.userId", "u1"),
        ("userId", "u1"),
        ("$.properties.items[1].sku", "B"),
        ("properties.items.0.sku", "A"),
        ("$.properties.items[1].tags[0]", "x"),
        ('$.properties["odd.name"].a b', 1),
        ("$['properties']['odd.name']['a b']", 1),
        ('["userId"]', "u1"),
        ("$", CALL),
        ("$.properties.coupon", None),
        ("$.context", None),
        ("$.context.page", MISSING),
        ("$.properties.items[2]", MISSING),
        ("$.properties.items.sku", MISSING),
        ("$.userId[0]", MISSING),
        ("$.nothing.at.all", MISSING),
    ],
)
def test_path(path, value):
    assert resolve({"@path": path}) == value


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Order of {{userId}}", "Order of u1"),
        ("{{ $.properties.total }} and {{{properties.vip}}}", "12 and false"),
        ("[{{properties.coupon}}{{nothing}}]", "[]"),
        ("{{properties.items[1].tags}}", '["x","y"]'),
        ("no placeholder }} here", "no placeholder }} here"),
        ("", ""),
    ],
)
def test_template_is_always_text(template, text):
    assert resolve({"@template": template}) == text


@pytest.mark.parametrize(
    ("path", "exists", "filled"),
    [
        ("userId", "then", "then"),
        ("properties.items", "then", "then"),
        ("properties.note", "then", "else"),
        ("properties.count", "then", "else"),
        ("properties.vip", "then", "else"),
        ("properties.coupon", "else", "else"),
        ("nothing", "else", "else"),
    ],
)
def test_if(path, exists, filled):
    branches = {"then": "then", "else": "else"}
    assert resolve({"@if": {"exists": {"@path": path}, **branches}}) == exists
    assert resolve({"@if": {"blank": {"@path": path}, **branches}}) == filled


def test_a_branch_that_is_not_given_drops_the_key():
    assert resolve({"a": {"@if": {"exists": {"@path": "nothing"}, "then": 1}}, "b": 2}) == {"b": 2}
    assert resolve({"@if": {"exists": {"@path": "userId"}, "else": 1}}) is MISSING
    assert resolve({"@if": {"exists": {"@path": "nothing"}, "else": ""}}) == ""


@pytest.mark.parametrize(
    ("mapping", "value"),
    [
        ({"@literal": {"@path": "$.userId"}}, {"@path": "$.userId"}),
        ({"@literal": None}, None),
        ({"@case": {"operator": "upper", "value": {"@path": "event"}}}, "ORDER COMPLETED"),
        ({"@case": {"operator": "lower", "value": {"@path": "event"}}}, "order completed"),
        ({"@case": {"operator": "lower", "value": {"@path": "properties.total"}}}, 12),
        ({"@case": {"operator": "lower", "value": {"@path": "nothing"}}}, MISSING),
        (
            {"@flatten": {"value": {"@path": "properties.items"}, "separator": "_"}},
            {"0_sku": "A", "1_sku": "B", "1_tags_0": "x", "1_tags_1": "y"},
        ),
        (
            {
                "@flatten": {
                    "value": {"a": {"b": [1, {"c": 2}]}, "d": {}},
                    "separator": ".",
                    "omitArrays": True,
                }
            },
            {"a.b": [1, {"c": 2}]},
        ),
        ({"@flatten": {"value": {"@path": "userId"}, "separator": "."}}, "u1"),
        ({"@flatten": {"value": {"@path": "nothing"}, "separator": "."}}, MISSING),
        ({"@json": {"mode": "encode", "value": {"a": [1, "é"]}}}, '{"a":[1,"é"]}'),
        ({"@json": {"mode": "encode", "value": {"@path": "nothing"}}}, MISSING),
        ({"@json": {"mode": "decode", "value": {"@path": "properties.raw"}}}, {"a": [1]}),
        ({"@json": {"mode": "decode", "value": {"@path": "event"}}}, "Order Completed"),
        ({"@json": {"mode": "decode", "value": "NaN"}}, "NaN"),
        ({"@json": {"mode": "decode", "value": "[1e999]"}}, "[1e999]"),
        ({"@json": {"mode": "decode", "value": "[" * 100_000}}, "[" * 100_000),
        ({"@json": {"mode": "decode", "value": 1}}, 1),
        (
            {"@merge": {"objects": [{"a": 1, "b": 1}, {"b": 2}, {"@path": "nothing"}], "direction": "right"}},
            {"a": 1, "b": 2},
        ),
        (
            {"@merge": {"objects": [{"b": 1}, {"a": 2, "b": 2}, "text"], "direction": "left"}},
            {"a": 2, "b": 1},
        ),
    ],
)
def test_the_other_directives(mapping, value):
    assert resolve(mapping) == value


def test_other_values_are_fixed_member_by_member():
    mapping = {
        "a": [1, {"@path": "userId"}, {"@path": "nothing"}],
        "b": {"c": {"@path": "nothing"}},
        "d": "{{x}}",
    }
    assert resolve(mapping) == {"a": [1, "u1", None], "b": {}, "d": "{{x}}"}
    assert resolve([{"@path": "properties.coupon"}]) == [None]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"@path": "a", "@template": "b"},
            "fields: @path must be the only key of its object: remove @template",
        ),
        ({"a": 1, "@path": "b"}, "fields: @path must be the only key of its object: remove a"),
        ({"a": [0, {"@pth": "b"}]}, "fields.a[1]: unknown directive @pth: did you mean @path?"),
        ({"@liquid": "x"}, "fields: Segment's directive @liquid is not supported"),
        ({"a": {"@path": 1}}, 'fields.a.@path: expected a path in quotes, such as "$.properties.total"'),
        ({"@template": 1}, 'fields.@template: expected text, such as "Order of {{userId}}"'),
        ({"@template": "{{a"}, "fields.@template: {{ has no }} after it"),
        ({"@if": 1}, "fields.@if: expected an object with exists, blank, then, else"),
        ({"@if": {"then": 1}}, "fields.@if: expected one of exists and blank"),
        ({"@if": {"exists": 1, "blank": 1, "then": 1}}, "fields.@if: expected one of exists and blank"),
        ({"@if": {"exists": 1}}, "fields.@if: expected then, else, or both"),
        ({"@if": {"exist": 1, "then": 2}}, "fields.@if: unknown name exist: did you mean exists?"),
        ({"@if": {"exists": 1, "then": {"@x": 1}}}, "fields.@if.then: unknown directive @x: known are "),
        ({"@case": {"operator": "title", "value": "x"}}, "fields.@case.operator: expected upper or lower"),
        ({"@case": {"operator": "upper"}}, "fields.@case: value is missing"),
        (
            {"@flatten": {"value": 1, "separator": ""}},
            "fields.@flatten.separator: expected non-empty text",
        ),
        ({"@flatten": {"value": 1, "separator": ".", "omitArrays": 1}}, "omitArrays: expected true or false"),
        ({"@json": {"mode": "x", "value": 1}}, "fields.@json.mode: expected encode or decode"),
        ({"@merge": {"objects": {}, "direction": "left"}}, "fields.@merge.objects: expected a list"),
        ({"@merge": {"objects": [], "direction": []}}, "fields.@merge.direction: expected right or left"),
        ({"a": float("nan")}, "fields.a: nan and inf are not JSON"),
        ({"@literal": [{1}]}, "fields.@literal[0]: a set is not a JSON value: write it as text"),
    ],
)
def test_errors_name_the_place(mapping, message):
    with pytest.raises(ConfigError) as raised:
        directives.compile_template(mapping, "fields")
    assert message in str(raised.value)


@pytest.mark.parametrize("path", ["", ".", "a..b", "a.", "$a", "a[", "a[x]", "a]b", "a[-1]", 'a["b', "[0]b"])
def test_bad_paths(path):
    with pytest.raises(ConfigError, match="not a path"):
        directives.compile_template({"@path": path})
    with pytest.raises(ConfigError, match="not a path"):
        directives.compile_template({"@template": "{{" + path + "}}"})


def test_nesting_is_bounded():
    def nested(levels, inner, around):
        for _ in range(levels):
            inner = around(inner)
        return inner

    for around in (lambda x: [x], lambda x: {"a": x}, lambda x: {"@case": {"operator": "upper", "value": x}}):
        with pytest.raises(ConfigError, match="nested more than 20 levels deep"):
            directives.compile_template(nested(3000, 1, around))
        with pytest.raises(ConfigError, match="nested more than 20 levels deep"):
            directives.compile_template({"@literal": nested(21, 1, around)})
    assert resolve(nested(20, 1, lambda x: [x])) == nested(20, 1, lambda x: [x])


def test_an_extreme_document_is_an_invalid_call():
    deep = []
    for _ in range(200_000):
        deep = [deep]
    for mapping in ({"@json": {"mode": "encode", "value": {"@path": "a"}}}, {"@template": "{{a}}"}):
        for value in (deep, 10**5000):
            with pytest.raises(CallError):
                directives.compile_template(mapping).resolve({"a": value})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
steps = st.lists(st.sampled_from(["a", "b", "c", 0, 1]), min_size=1, max_size=3)


def with_directives(inner):
    return st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        st.fixed_dictionaries(
            {"@if": st.fixed_dictionaries({"exists": inner, "then": inner}, optional={"else": inner})}
        ),
        st.fixed_dictionaries(
            {"@if": st.fixed_dictionaries({"blank": inner, "else": inner}, optional={"then": inner})}
        ),
        st.builds(
            lambda value, mode: {"@json": {"mode": mode, "value": value}},
            inner,
            st.sampled_from(["encode", "decode"]),
        ),
        st.builds(
            lambda objects, direction: {"@merge": {"objects": objects, "direction": direction}},
            st.lists(inner, max_size=3),
            st.sampled_from(["left", "right"]),
        ),
    )


mappings = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=2) | st.builds(lambda steps: {"@path": steps}, steps),
    with_directives,
    max_leaves=6,
)


class GoneError(Exception):
    pass


def model(mapping, call):
    """The value, or GoneError is raised: no sentinel, and paths are lists of steps."""
    if isinstance(mapping, list):
        return [safely(item, call, None) for item in mapping]
    if not isinstance(mapping, dict):
        return mapping
    [(name, argument)] = mapping.items() if len(mapping) == 1 else [("", None)]
    if name == "@path":
        for step in argument:
            try:
                call = call[str(step) if isinstance(call, dict) else step]
            except (KeyError, IndexError, TypeError):
                raise GoneError from None
            if isinstance(call, str) and step is not argument[-1]:
                raise GoneError
        return call
    if name == "@if":
        test = safely(argument["exists" if "exists" in argument else "blank"], call, None)
        no = [None] if "exists" in argument else [None, "", 0]
        branch = "else" if any(test == x and type(test) not in (list, dict) for x in no) else "then"
        if branch not in argument:
            raise GoneError
        return model(argument[branch], call)
    if name == "@json":
        value = model(argument["value"], call)
        if argument["mode"] == "encode":
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        try:
            return json.loads(value)
        except (ValueError, TypeError):
            return value
    if name == "@merge":
        objects = [safely(each, call, None) for each in argument["objects"]]
        result = {}
        for each in objects if argument["direction"] == "right" else reversed(objects):
            if isinstance(each, dict):
                result.update(each)
        return result
    found = {}
    for key, member in mapping.items():
        with contextlib.suppress(GoneError):
            found[key] = model(member, call)
    return found


def safely(mapping, call, instead):
    try:
        return model(mapping, call)
    except GoneError:
        return instead


def written(mapping):
    """The mapping with its paths as text."""
    if isinstance(mapping, list):
        return [written(item) for item in mapping]
    if not isinstance(mapping, dict):
        return mapping
    if "@path" in mapping:
        return {"@path": "$" + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in mapping["@path"])}
    return {name: written(member) for name, member in mapping.items()}


@given(mappings, st.dictionaries(st.sampled_from("abc"), json_values, max_size=3))
def test_as_the_slow_model_says(mapping, call):
    before = json.dumps(call)
    assert directives.compile_template(written(mapping)).resolve(call) == safely(mapping, call, MISSING)
    assert json.dumps(call) == before


@given(
    st.recursive(
        json_values,
        lambda inner: st.dictionaries(
            st.sampled_from(
                [
                    "@path",
                    "@if",
                    "@merge",
                    "@json",
                    "@case",
                    "value",
                    "exists",
                    "then",
                    "objects",
                    "mode",
                    "operator",
                ]
            ),
            inner,
            max_size=3,
        ),
    ),
    json_values,
)
def test_any_mapping_is_refused_or_resolves(mapping, properties):
    try:
        template = directives.compile_template(mapping, "fields")
    except ConfigError as error:
        if not str(error).startswith("fields"):
            raise
    else:
        template.resolve({"properties": properties})


@given(st.text("$.[]'\"ab0 ", max_size=12))
def test_any_path_is_refused_or_read(path):
    try:
        template = directives.compile_template({"@path": path})
    except ConfigError:
        return
    template.resolve({"a": [{"b": {"": 1}}]})
