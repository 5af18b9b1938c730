"""Conversion of nested values to properties: Userpilot accepts only strings, numbers, booleans and null."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAMES_LENGTH = 1_000_000  # characters of all flattened names together


def primitives(metadata: Mapping[str, Any], nested: str) -> dict[str, Any]:
    """Convert metadata to primitives; nothing is dropped. `nested` is flatten or json.

    flatten: names are joined with dots, list items by index: `{"a": {"b": [7]}}` gives `{"a.b.0": 7}`. A definition's
    key never contains a dot, so no flattened name equals one. Empty objects and lists become "{}" and "[]". If names
    collide, the least nested one stays, and the others get the suffixes "~2", "~3", whatever their order:
    `{"a.b": 1, "a": {"b": 2}}` gives `{"a.b": 1, "a.b~2": 2}`.
    json: each object or list becomes a string of compact JSON. Flattening falls back to this if all names together
    would be too long, as for a long list under a long name.
    """
    if nested == "flatten":
        leaves = {path: value for name, value in metadata.items() for path, value in _leaves((name,), value)}
        if sum(len(part) + 1 for path in leaves for part in path) > MAX_NAMES_LENGTH:
            nested = "json"
    if nested == "json":
        return {name: _text(value) if _is_nested(value) else value for name, value in metadata.items()}
    names = _names(leaves)
    return {names[path]: value for path, value in leaves.items()}


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not _is_nested(value):
        yield path, value
    elif not value:
        yield path, _text(value)
    else:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, member in items:
            yield from _leaves((*path, str(name)), member)


def _names(paths: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], str]:
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


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list | tuple)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
