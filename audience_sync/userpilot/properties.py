"""Conversion of nested values to properties: Userpilot accepts only strings, numbers, booleans and null."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

MAX_NAMES_LENGTH = 100_000  # characters of the flattened names of one object or list
_NESTED = (dict, list, tuple)
_VALUE, _GONE = "@value", "@gone"
_Path: TypeAlias = tuple[str, ...]


def primitives(metadata: Mapping[str, Any], nested: str) -> dict[str, Any]:
    """Convert metadata to primitives; nothing is dropped. `nested` is flatten or json.

    flatten: names are joined with dots, list items by index: `{"a": {"b": [7]}}` gives `{"a.b.0": 7}`. Keys of definitions
    contain no dots, so they never equal a flattened name. Empty objects and lists become "{}" and "[]". If names
    collide, the least nested one stays, and the others get the suffixes "~2", "~3", in any order of the members:
    `{"a.b": 1, "a": {"b": 2}}` gives `{"a.b": 1, "a.b~2": 2}`.
    json: each object or list becomes a string of compact JSON. So does an object or list whose flattened names together
    would be too long, such as a long list under a long name.
    """
    if nested == "json":
        return {name: _text(value) if _is_nested(value) else value for name, value in metadata.items()}
    leaves = dict(_leaves(metadata))
    names = _names(leaves)
    return {names[path]: _text(value) if _is_nested(value) else value for path, value in leaves.items()}


def trait_properties(traits: Mapping[str, Any], nested: str) -> dict[str, Any]:
    """Convert the traits of a user or a company, which Userpilot keeps until they are null.

    Works like `primitives`, but empty objects and lists become no property when flattened, and properties that
    `with_gone` added become null.
    """
    gone = [name for value in traits.values() if _is_marked(value) for name in value[_GONE]]
    values = {name: without_gone(value) for name, value in traits.items()}
    if nested == "json":
        return primitives(values, nested)
    leaves = _filled_leaves(values)
    names = _names(leaves)
    properties = {names[path]: value for path, value in leaves.items()}
    return properties | {name: None for name in gone if name not in properties}


def property_names(traits: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the properties that `trait_properties` makes by flattening, with the trait of each."""
    if not has_nested(traits):
        return {name: name for name in traits}
    return {name: path[0] for path, name in _names(_filled_leaves(traits)).items()}


def has_nested(traits: Mapping[str, Any]) -> bool:
    return any(isinstance(value, _NESTED) for value in traits.values())


def with_gone(value: Any, names: Iterable[str]) -> Any:
    """Return a trait's value in a form that includes the names of properties that the trait no longer has."""
    gone = sorted(names)
    return {_VALUE: value, _GONE: gone} if gone or _is_marked(value) else value


def without_gone(value: Any) -> Any:
    """Return the value in the form of `with_gone`, or the value itself."""
    return value[_VALUE] if _is_marked(value) else value


def _is_nested(value: object) -> bool:
    return isinstance(value, _NESTED)


def _is_marked(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {_VALUE, _GONE}


def _filled_leaves(traits: Mapping[str, Any]) -> dict[_Path, Any]:
    return {path: value for path, value in _leaves(traits) if not _is_nested(value)}


def _leaves(metadata: Mapping[str, Any]) -> Iterator[tuple[_Path, Any]]:
    """Yield the paths and values of all primitives, and of empty objects and lists."""
    for name, value in metadata.items():
        leaves = dict(_below((name,), value))
        if len(leaves) > 1 and sum(len(part) + 1 for path in leaves for part in path) > MAX_NAMES_LENGTH:
            leaves = {(name,): _text(value)}
        yield from leaves.items()


def _below(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    if not _is_nested(value) or not value:
        yield path, value
        return
    for name, member in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _below((*path, str(name)), member)


def _names(paths: Iterable[_Path]) -> dict[_Path, str]:
    plain = {".".join(path) for path in paths}
    taken: set[str] = set()
    names = {}
    for path in sorted(paths, key=lambda path: (len(path), path)):
        name = joined = ".".join(path)
        number = 1
        while name in taken or (number > 1 and name in plain):
            number += 1
            name = f"{joined}~{number}"
        taken.add(name)
        names[path] = name
    return names


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
