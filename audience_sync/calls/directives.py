"""Segment's mapping directives, checked when the configuration loads and resolved against calls.

An object whose only key begins with `@` is a directive. Anything else is a fixed value, whose members may be
directives. A key whose value is missing from the call is left out; in a list, a missing item becomes null, so that the
other items keep their positions (as in Segment). Segment's engine follows JavaScript's truthiness and conversions; this
one follows JSON's types.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Never, TypeAlias

from audience_sync.calls.operations import compact_json, json_or_text, json_text
from audience_sync.errors import CallError, ConfigError
from audience_sync.suggest import did_you_mean, shown

MAX_LEVELS = 20  # of objects and lists, including those of directives


class _Missing(Enum):
    MISSING = "missing"


MISSING: Final = _Missing.MISSING
Document: TypeAlias = dict[str, Any]
_Resolve: TypeAlias = Callable[[Document], Any]


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled mapping."""

    _resolve: _Resolve

    def resolve(self, document: Document) -> Any:
        """Build the value for a call's document, or return MISSING.

        The value may share parts with the document and the mapping, so do not modify it. Raises CallError if the document
        is nested too deeply, or a number is too long to be converted to text.
        """
        try:
            return self._resolve(document)
        except (RecursionError, ValueError) as error:
            raise CallError("nested too deeply for its mapping, or a number is too long") from error


def compile_template(value: Any, where: str = "") -> Template:
    """Compile a mapping from the configuration. Raises ConfigError; its message begins with the place: `fields.name: …`."""
    return Template(_compile(value, where, MAX_LEVELS))


def _compile(value: Any, where: str, levels: int) -> _Resolve:
    _check_levels(where, levels)
    match value:
        case dict() if any(name.startswith("@") for name in value):
            return _directive(value, where, levels)
        case dict():
            return _object(
                {name: _compile(member, _at(where, name), levels - 1) for name, member in value.items()}
            )
        case list():
            items = [_compile(item, f"{where}[{index}]", levels - 1) for index, item in enumerate(value)]
            return lambda document: [
                None if (value := item(document)) is MISSING else value for item in items
            ]
        case _:
            return _literal(value, where, levels)


def _object(members: dict[str, _Resolve]) -> _Resolve:
    def resolve(document: Document) -> dict[str, Any]:
        values = ((name, member(document)) for name, member in members.items())
        return {name: value for name, value in values if value is not MISSING}

    return resolve


def _directive(value: dict[str, Any], where: str, levels: int) -> _Resolve:
    name = next(name for name in value if name.startswith("@"))
    if others := [other for other in value if other != name]:
        _fail(where, f"{shown(name)} must be the only key of its object: remove {shown(others[0])}")
    if name in _UNSUPPORTED:
        _fail(where, f"Segment's directive {name} is not supported")
    if name not in _DIRECTIVES:
        _fail(where, f"unknown directive {shown(name)}: {did_you_mean(name, _DIRECTIVES)}")
    return _DIRECTIVES[name](value[name], _at(where, name), levels - 1)


# Each directive has a function that checks its argument and returns a function that resolves it.


def _path(argument: Any, where: str, _levels: int) -> _Resolve:
    if not isinstance(argument, str):
        _fail(where, 'expected a path in quotes, such as "$.properties.total"')
    steps = _steps(argument, where)
    return lambda document: _walk(document, steps)


def _template(argument: Any, where: str, _levels: int) -> _Resolve:
    if not isinstance(argument, str):
        _fail(where, 'expected text, such as "Order of {{userId}}"')
    fixed, *placeholders = re.split(r"\{\{\{?", argument)
    parts = []
    for placeholder in placeholders:
        path, end, text = placeholder.partition("}}")
        if not end:
            _fail(where, "{{ has no }} after it")
        parts.append((_steps(path.strip(), where), text.removeprefix("}")))
    return lambda document: (
        fixed + "".join(_value_text(_walk(document, steps)) + text for steps, text in parts)
    )


def _literal(argument: Any, where: str, levels: int) -> _Resolve:
    _check_json(argument, where, levels)
    return lambda _: argument


def _if(argument: Any, where: str, levels: int) -> _Resolve:
    members = _members(argument, where, ("exists", "blank", "then", "else"))
    if ("exists" in members) == ("blank" in members):
        _fail(where, "expected one of exists and blank")
    if "then" not in members and "else" not in members:
        _fail(where, "expected then, else, or both")
    branches = {name: _compile(member, _at(where, name), levels - 1) for name, member in members.items()}
    name, test = ("exists", _exists) if "exists" in members else ("blank", _is_filled)
    tested, then, otherwise = branches[name], branches.get("then", _drop), branches.get("else", _drop)
    return lambda document: (then if test(tested(document)) else otherwise)(document)


def _case(argument: Any, where: str, levels: int) -> _Resolve:
    members = _members(argument, where, ("operator", "value"), required=("operator", "value"))
    change = _choice(members["operator"], _at(where, "operator"), {"upper": str.upper, "lower": str.lower})
    resolve = _compile(members["value"], _at(where, "value"), levels - 1)
    return lambda document: change(value) if isinstance(value := resolve(document), str) else value


def _flatten(argument: Any, where: str, levels: int) -> _Resolve:
    members = _members(argument, where, ("value", "separator", "omitArrays"), required=("value", "separator"))
    separator, omit_lists = members["separator"], members.get("omitArrays", False)
    if not isinstance(separator, str) or not separator:
        _fail(_at(where, "separator"), 'expected non-empty text, such as "."')
    if not isinstance(omit_lists, bool):
        _fail(_at(where, "omitArrays"), "expected true or false")
    kinds = (dict,) if omit_lists else (dict, list)
    resolve = _compile(members["value"], _at(where, "value"), levels - 1)

    def flatten(document: Document) -> Any:
        value = resolve(document)
        return dict(_leaves(value, "", separator, kinds)) if isinstance(value, kinds) else value

    return flatten


def _json(argument: Any, where: str, levels: int) -> _Resolve:
    members = _members(argument, where, ("mode", "value"), required=("mode", "value"))
    convert = _choice(members["mode"], _at(where, "mode"), {"encode": compact_json, "decode": _decode})
    resolve = _compile(members["value"], _at(where, "value"), levels - 1)
    return lambda document: MISSING if (value := resolve(document)) is MISSING else convert(value)


def _merge(argument: Any, where: str, levels: int) -> _Resolve:
    members = _members(argument, where, ("objects", "direction"), required=("objects", "direction"))
    order = _choice(members["direction"], _at(where, "direction"), {"right": 1, "left": -1})
    if not isinstance(members["objects"], list):
        _fail(_at(where, "objects"), "expected a list of objects or directives")
    resolve = _compile(members["objects"], _at(where, "objects"), levels - 1)

    def merge(document: Document) -> dict[str, Any]:
        objects = [value for value in resolve(document)[::order] if isinstance(value, dict)]
        return {name: member for value in objects for name, member in value.items()}

    return merge


_DIRECTIVES: dict[str, Callable[[Any, str, int], _Resolve]] = {
    "@path": _path,
    "@template": _template,
    "@literal": _literal,
    "@if": _if,
    "@case": _case,
    "@flatten": _flatten,
    "@json": _json,
    "@merge": _merge,
}
_UNSUPPORTED = {"@replace", "@arrayPath", "@transform", "@excludeWhenNull", "@liquid"}


def _walk(value: Any, steps: list[str | int]) -> Any:
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step, MISSING) if isinstance(step, str) else value.get(str(step), MISSING)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return MISSING
    return value


def _drop(_: Document) -> Any:
    return MISSING


def _exists(value: Any) -> bool:
    return value is not MISSING and value is not None


def _is_filled(value: Any) -> bool:
    return _exists(value) and (isinstance(value, list | dict) or bool(value))


def _value_text(value: Any) -> str:
    return json_text(value) if _exists(value) else ""


def _leaves(value: Any, name: str, separator: str, kinds: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    for key, member in value.items() if isinstance(value, dict) else enumerate(value):
        full_name = f"{name}{separator}{key}" if name else str(key)
        if isinstance(member, kinds):
            yield from _leaves(member, full_name, separator, kinds)
        else:
            yield full_name, member


def _decode(value: Any) -> Any:
    return json_or_text(value) if isinstance(value, str) else value


def _steps(path: str, where: str) -> list[str | int]:
    rest = path.removeprefix("$")
    if path and rest == path and not path.startswith("["):
        rest = f".{path}"
    if not re.fullmatch(f"(?:{_STEP})*", rest) or not path:
        example = 'write $.properties.items[1].sku, and names with dots or brackets as ["odd.name"]'
        _fail(where, f"not a path: {shown(path)}: {example}")
    names = [next(filter(None, step.groups()), "") for step in re.finditer(_STEP, rest)]
    return [int(name) if re.fullmatch("0|[1-9][0-9]{0,8}", name) else name for name in names]


_STEP = r"""\.([^.\[\]]+)|\[([0-9]+)\]|\["([^"]*)"\]|\['([^']*)'\]"""


def _members(
    argument: Any, where: str, known: Collection[str], required: Collection[str] = ()
) -> dict[str, Any]:
    if not isinstance(argument, dict):
        _fail(where, f"expected an object with {', '.join(known)}")
    for name in argument:
        if name not in known:
            _fail(where, f"unknown name {shown(name)}: {did_you_mean(name, known)}")
    for name in required:
        if name not in argument:
            _fail(where, f"{name} is missing")
    return argument


def _choice(value: Any, where: str, choices: dict[str, Any]) -> Any:
    if not isinstance(value, str) or value not in choices:
        _fail(where, f"expected {' or '.join(choices)}")
    return choices[value]


def _check_json(value: Any, where: str, levels: int) -> None:
    _check_levels(where, levels)
    match value:
        case dict():
            for name, member in value.items():
                _check_json(member, _at(where, name), levels - 1)
        case list():
            for index, item in enumerate(value):
                _check_json(item, f"{where}[{index}]", levels - 1)
        case float() if not math.isfinite(value):
            _fail(where, "nan and inf are not JSON")
        case None | bool() | int() | float() | str():
            pass
        case _:
            _fail(where, f"a {type(value).__name__} is not a JSON value: write it as text")


def _check_levels(where: str, levels: int) -> None:
    if levels < 0:
        _fail(where, f"nested more than {MAX_LEVELS} levels deep")


def _at(where: str, name: str) -> str:
    return f"{where}.{shown(name)}" if where else shown(name)


def _fail(where: str, message: str) -> Never:
    raise ConfigError(f"{where}: {message}" if where else message)
