"""PostgreSQL's expressions for the canonical text of ids and values, which depend on the type of the column.

No expression may raise an error for any value: the text is checked before a cast that could fail. The result must not
depend on a session's settings; compute.py sets those that affect a cast to text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from audience_sync.audiences.values import (
    BLANK,
    FALSE_WORDS,
    LIMIT,
    MAX_ID_LENGTH,
    MAX_NUMBER_LENGTH,
    NOT_BOOLEAN,
    NOT_NUMBER,
    NOT_PRIMITIVE,
    NUMBER,
    TRUE_WORDS,
    UNUSABLE_REASONS,
    unusable,
)

HASH = "encode(sha256(convert_to(user_id, 'UTF8')), 'hex')"

# A cheap condition that selects ids for a closer check, and the reason why such an id cannot be sent, or null.
NEEDS_CHECK = (
    f"(user_id IS NULL OR user_id < '!' OR user_id > '~' OR octet_length(user_id) > {MAX_ID_LENGTH})"
)
INVALID_REASON = f"""
CASE WHEN user_id IS NULL THEN 'null' {UNUSABLE_REASONS} WHEN btrim(user_id, '{BLANK}') = '' THEN 'empty'
     WHEN length(user_id) > {MAX_ID_LENGTH} THEN 'too_long' END"""

# Settings of the session that affect a definition's casts to text.
SETTINGS = {
    "extra_float_digits": "0",  # 15 digits
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",  # as statement.py reads them
}
# Matches the hexadecimal digits of valid UTF-8.
_UTF8 = (
    "^([0-7].|(c[2-9a-f]|d.)[89ab].|e0[ab].[89ab].|(e[1-9abcef])([89ab].){2}|ed[89].[89ab].|f0[9ab].([89ab].){2}"
    "|f[123]([89ab].){3}|f48.([89ab].){2})*$"
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a query's result under a generated name; its type as in pg_type."""

    name: str
    type_name: str
    category: str
    encoding: str  # the server's


def select(wanted: Sequence[str], query: str, columns: Sequence[Column], *, streamed: bool) -> str:
    """Return the SELECT of a query's canonical ids and values (`wanted`); `columns` are all its columns.

    `streamed`: replace null ids too. On our own database they stay null, because the plain column is faster.
    """
    makers = {"user_id": _streamed_id if streamed else _id, "value": _value}
    selected = ", ".join(
        f"{makers[column.name](column)} AS {column.name}" for column in columns if column.name in wanted
    )
    return f"SELECT {selected} FROM ({query}) AS definition ({', '.join(column.name for column in columns)})"


def _id(column: Column) -> str:
    is_given = "user_id IS DISTINCT FROM NULL"  # IS NOT NULL means something else for a row
    wrong = f"CASE WHEN {is_given} THEN '{unusable('not_text_or_number')}' END"
    match column.category, column.type_name:
        case ("S" | "E" | "X", _) | (_, "char" | "uuid") | ("N", "int2" | "int4" | "int8" | "oid"):
            text = "CAST(user_id AS text)"
            if column.encoding == "SQL_ASCII":
                text = f"CASE WHEN {_is_utf8('user_id')} THEN {text} WHEN {is_given} THEN '{unusable('not_unicode')}' END"
        case "N", "numeric":
            text = _numeric_id("user_id")
        case "N", "money":
            text = _numeric_id("CAST(user_id AS numeric)")
        case "N", "float4" | "float8":
            text = f"nullif({_number(_float8('user_id', column))}, '{NOT_PRIMITIVE}')"
        case "D", _:
            text = f"btrim({_date('user_id', column)}, '\"')"
        case "U", "json" | "jsonb" as kind:
            text = _json(kind, column, string="{}", number=_numeric_id, other=wrong)
        case "U", "bytea":
            text = f"CASE WHEN {is_given} THEN '{unusable('binary')}' END"
        case _:
            text = wrong
    return f'({text}) COLLATE "C"'


def _streamed_id(column: Column) -> str:
    return f"coalesce({_id(column)}, '{unusable('null')}')"


def _value(column: Column) -> str:
    other = f"CASE WHEN value IS DISTINCT FROM NULL THEN '{NOT_PRIMITIVE}' END"
    match column.category, column.type_name:
        case ("B", _) | ("N", "int2" | "int4" | "int8" | "oid"):
            text = "CAST(value AS text)"
        case "N", "numeric":
            text = _number("value")
        case "N", "money":
            text = _number("CAST(value AS numeric)")
        case "N", "float4" | "float8":
            text = _number(_float8("value", column))
        case ("S" | "E" | "X", _) | (_, "char" | "uuid"):
            text = _QUOTED.format("CAST(value AS text)")
            if column.encoding == "SQL_ASCII":
                text = f"CASE WHEN {_is_utf8('value')} THEN {text} ELSE {other} END"
        case "D", _:
            text = _date("value", column)
        case "U", "json" | "jsonb" as kind:
            text = _json(kind, column, string=_QUOTED, number=_number, other=other)
        case _:
            text = other
    return f'({text}) COLLATE "C"'


_QUOTED = "CAST(to_json({}) AS text)"


def _number(value: str) -> str:
    """Return the canonical text of a finite number; '!' for any other, and for one outside the range of float8."""
    # NaN is greater than every number. A cast to float8 refuses numbers outside its range.
    return (
        f"CASE WHEN {value} >= -{LIMIT} AND {value} < {LIMIT} AND {value} = trunc({value}) "
        f"THEN CAST(CAST({value} AS bigint) AS text) "
        f"WHEN {value} IS NOT NULL AND abs({value}) > 1.7976931348623157e308 THEN '{NOT_PRIMITIVE}' "
        f"WHEN abs({value}) < 2.5e-324 THEN '0' ELSE CAST(CAST({value} AS float8) AS text) END"
    )


def _numeric_id(value: str) -> str:
    """Return all digits of a whole number, and the canonical text of any other; null if it is not finite."""
    return (
        f"CASE WHEN {value} > -1e131071 AND {value} < 1e131071 THEN "
        f"CASE WHEN {value} = trunc({value}) THEN CAST(trunc({value}) AS text) ELSE {_number(value)} END END"
    )


def _float8(name: str, column: Column) -> str:
    """Return a number as float8. A float4 is read from its shortest decimal form: 0.1, not 0.100000001490116."""
    if column.type_name == "float8":
        return name
    digits = [f"CAST(CAST({name} AS text) AS float8)"]  # six
    digits += [f"CAST(to_char(CAST({name} AS float8), '9.{'9' * (n - 1)}EEEE') AS float8)" for n in (7, 8, 9)]
    tries = " ".join(f"WHEN CAST({number} AS float4) = {name} THEN {number}" for number in digits[:-1])
    is_special = f"{name} IN ('NaN', 'Infinity', '-Infinity')"
    return f"CASE WHEN {is_special} THEN CAST({name} AS float8) {tries} ELSE {digits[-1]} END"


def _date(name: str, column: Column) -> str:
    """Return a date or a time as JSON, independent of the session's time zone."""
    if column.type_name != "timestamptz":
        return _QUOTED.format(name)
    utc = _QUOTED.format(f"{name} AT TIME ZONE 'UTC'")
    return rf"""regexp_replace({utc}, '([0-9])( BC)?"$', '\1+00:00\2"')"""


def _json(kind: str, column: Column, *, string: str, number: Callable[[str], str], other: str) -> str:
    name = column.name
    text = f"({name} #>> '{{}}')"
    string = string.format(text)
    number_text = number(f"CAST({text} AS numeric)")
    if kind == "json":  # jsonb itself refuses strings and numbers that text and numeric cannot represent
        string = (
            f"CASE WHEN {_is_broken(f'CAST({name} AS text)', column.encoding)} THEN {other} ELSE {string} END"
        )
        number_text = _json_number(text, number, other)
    return (
        f"CASE {kind}_typeof({name}) WHEN 'string' THEN {string} WHEN 'number' THEN {number_text} "
        f"WHEN 'boolean' THEN {text if name == 'value' else other} WHEN 'null' THEN NULL ELSE {other} END"
    )


def _is_broken(raw: str, encoding: str) -> str:
    """Return the condition for a JSON string with an escape that text cannot represent: NUL, or a lone surrogate."""
    escapes = rf"replace({raw}, '\\', '')"
    pair = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    broken = rf"{escapes} ~ '\\u0000' OR regexp_replace({escapes}, '{pair}', '', 'g') ~ '\\u[dD][89a-fA-F]'"
    if encoding != "UTF8":
        broken += rf" OR {escapes} ~ '\\u(?!00[0-7])'"
    return rf"position('\u' IN {raw}) > 0 AND ({broken})"


def _json_number(text: str, number: Callable[[str], str], other: str) -> str:
    """Return the canonical text of a JSON number, which may have any exponent and any number of digits."""
    short = rf"regexp_replace({text}, '([eE][+-]?)0+([0-9])', '\1\2')"
    short = rf"regexp_replace({short}, '([.][0-9]{{255}})[0-9]+', '\1')"
    return (
        f"CASE WHEN {short} ~ '^-?[0.]+([eE].*)?$' OR {short} ~ '[eE]-[0-9]{{4}}' THEN '0' "
        f"WHEN {short} ~ '[eE][+]?[0-9]{{4}}' OR length({short}) > 900 THEN {other} "
        f"ELSE {number(f'CAST({short} AS numeric)')} END"
    )


def _is_utf8(name: str) -> str:
    return f"encode(convert_to(CAST({name} AS text), 'SQL_ASCII'), 'hex') ~ '{_UTF8}'"


# The canonical text of `value`, converted to a trait's type.
_WORD = "lower(btrim(value, '\" '))"
_DIGITS = "btrim(value, '\" ')"
CONVERSIONS = {
    "json": (
        r"""CASE WHEN left(value, 1) <> '"' THEN value """
        r"""WHEN strpos(replace(CAST(value AS json) #>> '{}', '\\', ''), '\u0000') > 0 THEN '!' """
        r"""ELSE CAST(value AS json) #>> '{}' END"""
    ),
    "boolean": (
        f"CASE WHEN left(value, 1) = '!' THEN value WHEN {_WORD} IN {TRUE_WORDS} THEN 'true' "
        f"WHEN {_WORD} IN {FALSE_WORDS} THEN 'false' WHEN value IS NOT NULL THEN '{NOT_BOOLEAN}' END"
    ),
    "number": (
        "CASE value WHEN 'true' THEN '1' WHEN 'false' THEN '0' ELSE "
        "CASE WHEN left(value, 1) <> '\"' THEN value "
        f"WHEN length({_DIGITS}) <= {MAX_NUMBER_LENGTH} AND {_DIGITS} ~ '^{NUMBER}$' "
        f"THEN replace({_number(f'CAST({_DIGITS} AS numeric)')}, '!', '{NOT_NUMBER}') "
        f"WHEN value IS NOT NULL THEN '{NOT_NUMBER}' END END"
    ),
    "string": """CASE WHEN left(value, 1) IN ('"', '!') THEN value ELSE '"' || value || '"' END""",
}
