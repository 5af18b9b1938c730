r"""Odd values of every type: the same text, or set aside for the same reason, on our own database and from a source.

Each literal has its expected text, written by hand. `aside` marks the reason for which a row is set aside. The values are
computed in place, and streamed from a source into SQLite and into PostgreSQL: three results that must be the same.
"""

import contextlib
import datetime as dt
import json
import sqlite3
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync.audiences import compute, snapshot
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.audiences.values import canonical_value
from audience_sync.db import dialects, engines, migrate
from audience_sync.db.sources import open_source

AS_OF = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)


class aside(str):  # noqa: N801, SLOT000  (reads as a word in the tables)
    """A reason."""


NOT_PRIMITIVE = aside("not_primitive")

VALUES = {
    "text": {
        "'a'": '"a"',
        "''": '""',
        "'a '": '"a "',
        r"E'a\"\\\n\t\x01'": r'"a\"\\\n\t\u0001"',
        "'Łódź 😀'": '"Łódź 😀"',
        "'!'": '"!"',
        "'null'": '"null"',
        "NULL": None,
    },
    "char(5)": {"'ann'": '"ann"', "''": '""', "'é'": '"é"'},
    "varchar(5)": {"'ann'": '"ann"', "'ann '": '"ann "'},
    "name": {"'ann'": '"ann"'},
    '"char"': {"'a'": '"a"'},
    "uuid": {"'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'": '"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"'},
    "mood": {"'so so'": '"so so"'},
    "positive": {"7": "7"},
    "email": {"'a@b'": '"a@b"'},
    "boolean": {"true": "true", "false": "false", "NULL": None},
    "bytea": {r"'\x00ff'": NOT_PRIMITIVE, "''": NOT_PRIMITIVE, "NULL": None},
    "smallint": {"-32768": "-32768"},
    "bigint": {"9223372036854775807": "9223372036854775807", "-9223372036854775808": "-9223372036854775808"},
    "oid": {"4294967295": "4294967295"},
    "money": {"12.5": "12.5", "1234567.89": "1234567.89", "-3": "-3"},
    "numeric": {
        "1": "1",
        "1.0": "1",
        "1.50": "1.5",
        "-0.0": "0",
        "1234567890.12345678": "1234567890.12346",
        "9223372036854775808": "9.22337203685478e+18",
        "1e400": NOT_PRIMITIVE,
        "-1e400": NOT_PRIMITIVE,
        "1e-400": "0",
        "repeat('7', 1000)::numeric": NOT_PRIMITIVE,
        "('0.' || repeat('3', 1000))::numeric": "0.333333333333333",
        "'NaN'": NOT_PRIMITIVE,
        "'Infinity'": NOT_PRIMITIVE,
        "'-Infinity'": NOT_PRIMITIVE,
        "1e131071": NOT_PRIMITIVE,
    },
    "float8": {
        "0.1::float8 + 0.2::float8": "0.3",
        "1e15": "1000000000000000",
        "1e20": "1e+20",
        "1.5e-5": "1.5e-05",
        "'-0'": "0",
        "'NaN'": NOT_PRIMITIVE,
        "'Infinity'": NOT_PRIMITIVE,
        "'-Infinity'": NOT_PRIMITIVE,
        "1.7976931348623157e308": "1.79769313486232e+308",
        "5e-324": "4.94065645841247e-324",
    },
    "float4": {
        "0.1": "0.1",
        "16777217": "16777216",
        "1.1754944e-38": "1.1754944e-38",
        "3.4028235e38": "3.4028235e+38",
        "1e-45": "1.4013e-45",
        "123456.79": "123456.79",
        "'NaN'": NOT_PRIMITIVE,
        "'-Infinity'": NOT_PRIMITIVE,
        "NULL": None,
    },
    "date": {
        "'2026-01-02'": '"2026-01-02"',
        "'infinity'": '"infinity"',
        "'-infinity'": '"-infinity"',
        "'0044-03-15 BC'": '"0044-03-15 BC"',
        "'10000-01-01'": '"10000-01-01"',
    },
    "timestamp": {
        "'2026-01-02 03:04:05.500'": '"2026-01-02T03:04:05.5"',
        "'2026-01-02 24:00'": '"2026-01-03T00:00:00"',
        "'infinity'": '"infinity"',
        "'0044-03-15 12:00 BC'": '"0044-03-15T12:00:00 BC"',
        "'294276-12-31 23:59'": '"294276-12-31T23:59:00"',
    },
    "timestamptz": {
        "'2026-01-02 03:04:05.5+02'": '"2026-01-02T01:04:05.5+00:00"',
        "'infinity'": '"infinity"',
        "'-infinity'": '"-infinity"',
        "'0044-03-15 12:00+00 BC'": '"0044-03-15T12:00:00+00:00 BC"',
        "'10000-01-01 00:00+00'": '"10000-01-01T00:00:00+00:00"',
    },
    "time": {"'24:00'": '"24:00:00"', "'03:04:05.5'": '"03:04:05.5"'},
    "timetz": {"'24:00+02'": '"24:00:00+02"', "'03:04+05:30'": '"03:04:00+05:30"'},
    "interval": {"'1 day'": NOT_PRIMITIVE, "NULL": None},
    "json": {
        "'\"a\"'": '"a"',
        "' \"a\" '": '"a"',
        r"""'"caf\u00e9 \ud83d\ude00"'""": '"café 😀"',
        r"""'"\u0000"'""": NOT_PRIMITIVE,
        r"""'"\\u0000"'""": r'"\\u0000"',
        r"""'"\\\u0000"'""": NOT_PRIMITIVE,
        r"""'"\ud800"'""": NOT_PRIMITIVE,
        r"""'"\udc00\ud800"'""": NOT_PRIMITIVE,
        r"""'"\\ud800"'""": r'"\\ud800"',
        "'1'": "1",
        "'1.0'": "1",
        "' -0 '": "0",
        "'0.10'": "0.1",
        "'1e400'": NOT_PRIMITIVE,
        "'1e999999999'": NOT_PRIMITIVE,
        "'-1E+99999'": NOT_PRIMITIVE,
        "'1e-999999999'": "0",
        "'0e999999999'": "0",
        "'1e0000005'": "100000",
        "('0.' || repeat('3', 20000))::json": "0.333333333333333",
        "repeat('7', 200000)::json": NOT_PRIMITIVE,
        "'9007199254740993.0'": "9007199254740993",
        "'true'": "true",
        "'null'": None,
        "'[1]'": NOT_PRIMITIVE,
        "'{}'": NOT_PRIMITIVE,
        r"""'{"a": "\u0000"}'""": NOT_PRIMITIVE,
        "NULL": None,
    },
    "jsonb": {
        "'\"a\"'": '"a"',
        r"""'"\\u0000"'""": r'"\\u0000"',
        "'1.0'": "1",
        "'1e400'": NOT_PRIMITIVE,
        "'1e-400'": "0",
        "'12345678901234567890'": "1.23456789012346e+19",
        "'false'": "false",
        "'null'": None,
        "'[]'": NOT_PRIMITIVE,
    },
    "int[]": {"'{1}'": NOT_PRIMITIVE, "'{}'": NOT_PRIMITIVE, "NULL": None},
    "date[]": {"'{infinity}'": NOT_PRIMITIVE},
    "pair": {"ROW(1, NULL)": NOT_PRIMITIVE, "ROW(NULL, NULL)": NOT_PRIMITIVE, "NULL": None},
    "daterange": {"'[infinity,)'": NOT_PRIMITIVE, "'empty'": NOT_PRIMITIVE},
    "inet": {"'127.0.0.1'": NOT_PRIMITIVE},
    "point": {"'(1,2)'": NOT_PRIMITIVE},
    "bit(3)": {"'101'": NOT_PRIMITIVE},
    "regclass": {"'pg_type'": NOT_PRIMITIVE},
    "tsvector": {"'a b'": NOT_PRIMITIVE},
}
NULL, BINARY, WRONG = aside("null"), aside("binary"), aside("not_text_or_number")
IDS = {
    "text": {
        "'ann'": "ann",
        "'ann '": "ann ",
        "''": aside("empty"),
        r"E' \t\n'": aside("empty"),
        "U&'\\00a0\\200b'": aside("empty"),
        "U&'\\00a0x'": "\u00a0x",
        "repeat('é', 255)": "é" * 255,
        "repeat('é', 256)": aside("too_long"),
        "NULL": NULL,
    },
    "char(8)": {"'ann'": "ann", "'é'": "é", "''": aside("empty"), "NULL": NULL},
    "uuid": {"'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"},
    "mood": {"'so so'": "so so"},
    "positive": {"7": "7"},
    "bigint": {"-9223372036854775808": "-9223372036854775808"},
    "numeric": {
        "1.00": "1",
        "1.50": "1.5",
        "12345678901234567890123": "12345678901234567890123",
        "repeat('7', 1000)::numeric": aside("too_long"),
        "'NaN'": NULL,
        "'Infinity'": NULL,
        "'-Infinity'": NULL,
    },
    "float8": {"7": "7", "1e20": "1e+20", "'NaN'": NULL, "'Infinity'": NULL},
    "float4": {"0.1": "0.1", "16777217": "16777216", "'NaN'": NULL},
    "money": {"7": "7", "7.5": "7.5"},
    "oid": {"7": "7"},
    "date": {"'2026-01-02'": "2026-01-02", "'infinity'": "infinity", "'10000-01-01'": "10000-01-01", "NULL": NULL},
    "timestamptz": {"'2026-01-02 03:00+02'": "2026-01-02T01:00:00+00:00", "'0044-03-15 BC'": "0044-03-15T00:00:00+00:00 BC"},
    "time": {"'24:00'": "24:00:00"},
    "json": {
        "'\"ann\"'": "ann",
        "'7'": "7",
        "'7.0'": "7",
        "'1e999999999'": WRONG,
        r"""'"\u0000"'""": WRONG,
        r"""'"\ud800"'""": WRONG,
        "'true'": WRONG,
        "'[1]'": WRONG,
        "'null'": NULL,
        "NULL": NULL,
    },
    "jsonb": {"'\"ann\"'": "ann", "'7.50'": "7.5", "'{}'": WRONG, "'null'": NULL},
    "boolean": {"true": WRONG, "NULL": NULL},
    "bytea": {r"'\x61'": BINARY, "NULL": NULL},
    "text[]": {"'{a}'": WRONG, "'{}'": WRONG, "NULL": NULL},
    "pair": {"ROW(1, NULL)": WRONG, "NULL": NULL},
    "int4range": {"'[1,2)'": WRONG},
    "interval": {"'1 day'": WRONG},
    "inet": {"'127.0.0.1'": WRONG},
}  # fmt: skip
SQLITE_VALUES = {
    "'a'": '"a"',
    "'é'": '"é"',
    "char(9, 34)": r'"\t\""',
    "'a' || char(0) || 'b'": NOT_PRIMITIVE,
    "CAST(x'ff41' AS TEXT)": NOT_PRIMITIVE,
    "CAST(x'eda080' AS TEXT)": NOT_PRIMITIVE,
    "x'00'": NOT_PRIMITIVE,
    "x''": NOT_PRIMITIVE,
    "1": "1",
    "1.0": "1",
    "-0.0": "0",
    "9223372036854775807": "9223372036854775807",
    "9223372036854775808": "9.22337203685478e+18",
    "1e400": NOT_PRIMITIVE,
    "-1e400": NOT_PRIMITIVE,
    "0.1 + 0.2": "0.3",
    "1e20": "1e+20",
    "5e-324": "4.94065645841247e-324",
    "1 = 1": "1",
    "NULL": None,
}
SQLITE_IDS = {
    "'ann'": "ann",
    "'é'": "é",
    "'a' || char(0) || 'b'": aside("nul_character"),
    "char(0)": aside("nul_character"),
    "CAST(x'ff41' AS TEXT)": aside("not_unicode"),
    "x'61'": BINARY,
    "x''": BINARY,
    "''": aside("empty"),
    "char(160)": aside("empty"),
    "printf('%300s', 'null')": aside("null"),  # the mark itself; it could not be sent either
    "printf('%301s', 'null')": aside("too_long"),
    "7": "7",
    "7.0": "7",
    "7.5": "7.5",
    "9223372036854775808": "9.22337203685478e+18",
    "1e400": NULL,
    "NULL": NULL,
}


class Databases:
    """One of our databases on each server; each is a source for both."""

    def __init__(self, folder, postgres):
        server_url = postgres.url(postgres.create())
        self.urls = {"sqlite": f"sqlite:///{folder}/own.db", "postgresql": server_url}
        self.own = {name: engines.open_own(url, "audience_sync") for name, url in self.urls.items()}
        self.sources = {name: open_source(name, url) for name, url in self.urls.items()}
        for engine in self.own.values():
            migrate.upgrade(engine)
        self.run(
            "postgresql",
            "CREATE TYPE mood AS ENUM ('so so')",
            "CREATE DOMAIN positive AS int CHECK (value > 0)",
            "CREATE DOMAIN email AS varchar(20)",
            "CREATE TYPE pair AS (a int, b int)",
        )

    def run(self, name, *statements):
        with engines.write(self.own[name]) as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def compute(self, name, sql, kind, **options):
        """Compute in place, and streamed into each; return the rows and the set-aside counts, which must be the same."""
        results = []
        for source, own in ((None, name), (name, "sqlite"), (name, "postgresql")):
            definition = Definition("it", "it", kind, sql, source=source, **options)
            with self.own[own].connect() as connection:
                compute.compute(connection, definition, AS_OF, source and self.sources[source])
                counts = snapshot.diff(connection, None, definition, AS_OF).set_aside
                rows = dialects.sql(connection, "SELECT user_id, value FROM {temp}audience_sync_changes")
                results.append((dict(map(tuple, rows)), counts))
        assert results[0] == results[1] == results[2]
        return results[0]

    def dispose(self):
        for engine in (*self.own.values(), *self.sources.values()):
            engine.dispose()


@pytest.fixture(scope="module")
def databases(tmp_path_factory, postgres):
    made = Databases(tmp_path_factory.mktemp("canonical"), postgres)
    yield made
    made.dispose()


def counted(expected):
    """Count the reasons among expected texts."""
    reasons = [str(text) for text in expected if isinstance(text, aside)]
    return {reason: reasons.count(reason) for reason in reasons}


def check_values(databases, name, cast, cases):
    rows = " UNION ALL ".join(f"SELECT 'u{n}', {cast.format(literal)}" for n, literal in enumerate(cases))

    columns = "user_id, value"
    databases.run(
        name,
        "DROP TABLE IF EXISTS odd",
        f"CREATE TABLE odd AS WITH t ({columns}) AS ({rows}) SELECT {columns} FROM t",
    )
    texts, set_aside = databases.compute(name, "SELECT user_id, value FROM odd", Kind.TRAIT)
    expected = {
        f"u{n}": text
        for n, text in enumerate(cases.values())
        if text is not None and not isinstance(text, aside)
    }
    assert texts == expected
    assert set_aside == counted(cases.values())


def check_ids(databases, name, cast, cases):
    rows = " UNION ALL ".join(f"SELECT {cast.format(literal)}" for literal in cases)
    databases.run(
        name,
        "DROP TABLE IF EXISTS odd",
        f"CREATE TABLE odd AS WITH t (user_id) AS ({rows}) SELECT user_id FROM t",
    )
    texts, set_aside = databases.compute(name, "SELECT user_id FROM odd", Kind.AUDIENCE)
    assert set(texts) == {text for text in cases.values() if not isinstance(text, aside)}
    assert set_aside == counted(cases.values())
    texts, set_aside = databases.compute(name, "SELECT user_id, 1 AS value FROM odd", Kind.TRAIT)
    assert set(texts) == {text for text in cases.values() if not isinstance(text, aside)}
    assert set_aside == counted(cases.values())


@pytest.mark.parametrize("type_name", VALUES)
def test_values_of_postgresql(databases, type_name):
    check_values(databases, "postgresql", f"CAST({{}} AS {type_name})", VALUES[type_name])


@pytest.mark.parametrize("type_name", IDS)
def test_ids_of_postgresql(databases, type_name):
    check_ids(databases, "postgresql", f"CAST({{}} AS {type_name})", IDS[type_name])


def test_values_of_sqlite(databases):
    check_values(databases, "sqlite", "{}", SQLITE_VALUES)


def test_ids_of_sqlite(databases):
    check_ids(databases, "sqlite", "{}", SQLITE_IDS)


@pytest.fixture(scope="module", params=["UTF-16le", "UTF-16be"])
def wide(request, tmp_path_factory, postgres):
    """Databases of which SQLite's has text in UTF-16."""
    folder = tmp_path_factory.mktemp("wide")
    with contextlib.closing(sqlite3.connect(folder / "own.db")) as connection:
        connection.execute(f"PRAGMA encoding = '{request.param}'")
        connection.execute("CREATE TABLE first (x)")
    made = Databases(folder, postgres)
    yield made, "x'41d8'" if request.param == "UTF-16le" else "x'd841'"
    made.dispose()


def test_ids_and_values_of_sqlite_in_utf_16(wide):
    databases, half_a_character = wide
    broken = f"CAST({half_a_character} AS TEXT)"
    odd = {literal for literal in {**SQLITE_VALUES, **SQLITE_IDS} if literal.startswith("CAST(x'")}
    values = {literal: text for literal, text in SQLITE_VALUES.items() if literal not in odd}
    ids = {literal: text for literal, text in SQLITE_IDS.items() if literal not in odd}
    texts = {"'Łódź 😀'": "Łódź 😀", "'a' || char(10) || 'é'": "a\né"}
    quoted = {literal: json.dumps(text, ensure_ascii=False) for literal, text in texts.items()}
    check_values(databases, "sqlite", "{}", values | quoted | {broken: NOT_PRIMITIVE})
    check_ids(databases, "sqlite", "{}", ids | texts | {broken: aside("not_unicode")})


CONVERTED = {
    "boolean": {
        "1": "true",
        "0": "false",
        "1.0": "true",
        "'true'": "true",
        "' Yes '": "true",
        "'T'": "true",
        "'1'": "true",
        "'off'": "false",
        "'F'": "false",
        "2": aside("not_a_boolean"),
        "-1": aside("not_a_boolean"),
        "0.5": aside("not_a_boolean"),
        "'maybe'": aside("not_a_boolean"),
        "''": aside("not_a_boolean"),
        "NULL": None,
    },
    "number": {
        "7": "7",
        "'7'": "7",
        "'7.50'": "7.5",
        "' -1e3 '": "-1000",
        "'.5'": "0.5",
        "'+5.'": "5",
        "'12345678901234567890'": "1.23456789012346e+19",
        "'1e-999'": "0",
        "'1e999'": aside("not_a_number"),
        "'NaN'": aside("not_a_number"),
        "'1,5'": aside("not_a_number"),
        "'0x10'": aside("not_a_number"),
        "'\"7\"'": aside("not_a_number"),
        "''": aside("not_a_number"),
        "'7 8'": aside("not_a_number"),
        "NULL": None,
    },
    "string": {"7": '"7"', "7.50": '"7.5"', "'7'": '"7"', "''": '""', "'a\"b'": r'"a\"b"', "NULL": None},
}
CONVERTED_OF_POSTGRESQL = {
    "boolean": {"true": "true", "false": "false", "json '[1]'": NOT_PRIMITIVE, "json '\"no\"'": "false"},
    "number": {
        "true": "1",
        "false": "0",
        "date '2026-01-02'": aside("not_a_number"),
        "'NaN'::float8": NOT_PRIMITIVE,
    },
    "string": {"true": '"true"', "date '2026-01-02'": '"2026-01-02"', "'{}'::int[]": NOT_PRIMITIVE},
}


@pytest.mark.parametrize("value_type", CONVERTED)
@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_values_are_converted_to_the_type_of_the_trait(databases, name, value_type):
    for literal, expected in CONVERTED[value_type].items() | (
        CONVERTED_OF_POSTGRESQL[value_type].items() if name == "postgresql" else set()
    ):
        sql = f"SELECT 'ann' AS user_id, {literal} AS value"
        texts = {} if expected is None or isinstance(expected, aside) else {"ann": expected}
        result = databases.compute(name, sql, Kind.TRAIT, value_type=value_type)
        assert result == (texts, counted([expected])), literal


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_values_that_are_equal_once_they_are_converted_are_one_value(databases, name):
    rows = "SELECT 'ann' AS user_id, 'yes' AS value UNION ALL SELECT 'ann', '1' UNION ALL SELECT 'bob', '1'"
    assert databases.compute(name, rows, Kind.TRAIT) == ({"bob": '"1"'}, {"unequal_values": 1})
    texts = {"ann": "true", "bob": "true"}
    assert databases.compute(name, rows, Kind.TRAIT, value_type="boolean") == (texts, {})


HOSTILE = {
    "extra_float_digits": "3",
    "DateStyle": "'German, DMY'",
    "IntervalStyle": "iso_8601",
    "bytea_output": "escape",
    "TimeZone": "'Asia/Tokyo'",
    "standard_conforming_strings": "off",
    "client_encoding": "LATIN1",
}
CASTS = {
    "CAST(0.1::float8 + 0.2::float8 AS text)": '"0.3"',
    "CAST(DATE '2026-01-02' AS text)": '"2026-01-02"',
    "CAST(interval '1 day 2 hours' AS text)": '"1 day 02:00:00"',
    r"CAST('\x00ff'::bytea AS text)": r'"\\x00ff"',
    r"'c:\'": r'"c:\\"',
    "'Łódź'": '"Łódź"',
    "CAST('2026-01-02 03:04+00'::timestamptz AS text)": '"2026-01-02 03:04:00+00"',
    "'2026-01-02 03:04+00'::timestamptz": '"2026-01-02T03:04:00+00:00"',
    "CAST('02/01/2026' AS date)": '"2026-01-02"',  # its order of day and month stays the server's
}


@pytest.fixture
def hostile(postgres, tmp_path):
    """Databases of which PostgreSQL's has other settings for new sessions."""
    made = Databases(tmp_path, postgres)
    name = made.sources["postgresql"].url.database
    for setting, value in HOSTILE.items():
        postgres.run(f"ALTER DATABASE {name} SET {setting} = {value}")
    made.dispose()
    yield made
    made.dispose()


@pytest.mark.parametrize("expression", CASTS)
def test_text_does_not_depend_on_the_settings_of_the_server(hostile, expression):
    sql = f"SELECT 'ann' AS user_id, {expression} AS value"
    assert hostile.compute("postgresql", sql, Kind.TRAIT) == ({"ann": CASTS[expression]}, {})


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_a_moment_is_in_utc_whatever_zone_a_url_sets(postgres, tmp_path, zone):
    made = Databases(tmp_path, postgres)
    url = f"{made.urls['postgresql']}&options=-c%20timezone%3D{zone}"
    made.sources["postgresql"] = open_source("postgresql", url)
    sql = "SELECT 'ann' AS user_id, timestamptz '2026-01-02 03:04+00' AS value"
    assert made.compute("postgresql", sql, Kind.TRAIT) == ({"ann": '"2026-01-02T03:04:00+00:00"'}, {})
    made.dispose()


def test_a_database_without_an_encoding(postgres, tmp_path):
    name = f"ascii_{tmp_path.name}"
    postgres.run(
        f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    source = open_source("shop", postgres.url(name))
    own = engines.open_own(f"sqlite:///{tmp_path}/own.db", "audience_sync")
    migrate.upgrade(own)
    with source.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE odd (user_id text, value text, document json)")
        connection.exec_driver_sql(
            "INSERT INTO odd SELECT convert_from(id, 'SQL_ASCII'), convert_from(value, 'SQL_ASCII'), document::json FROM "
            r"(VALUES ('\x616e6e'::bytea, '\xc3a9'::bytea, '\"a\"'), ('\xc3a9', '\x61', '1'), ('\xe9', '\x61', NULL), "
            r"('\x626f62', '\xeda080', '\"\u00e9\"'), (NULL, '\x61', NULL)) AS t (id, value, document)".replace(
                '\\"', '"'
            )
        )
    results = []
    for value in ("value", "document"):
        sql = f"SELECT user_id, {value} AS value FROM odd"
        definition = Definition("it", "it", Kind.TRAIT, sql, source="shop")
        with own.connect() as connection:
            compute.compute(connection, definition, AS_OF, source)
            counts = snapshot.diff(connection, None, definition, AS_OF).set_aside
            rows = dialects.sql(connection, "SELECT user_id, value FROM {temp}audience_sync_changes")
            results.append((dict(map(tuple, rows)), counts))
    assert results[0] == ({"ann": '"é"', "é": '"a"'}, {"not_unicode": 1, "null": 1, "not_primitive": 1})
    assert results[1] == ({"ann": '"a"', "é": "1"}, {"not_unicode": 1, "null": 1, "not_primitive": 1})
    source.dispose()
    own.dispose()


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
DOCUMENTS = st.one_of(
    st.from_regex(r'"(a|\\\\|\\u[0-9a-fA-F]{4}|\\u0000|\\ud83d\\ude00|\\n|\\")*"', fullmatch=True),
    st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,6})?", fullmatch=True),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(DOCUMENTS, TEXTS.map(json.dumps)), min_size=1, max_size=20))
def test_no_json_value_fails_a_run(databases, documents):
    with engines.write(databases.own["postgresql"]) as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS odd")
        connection.exec_driver_sql("CREATE TABLE odd (user_id text, value json)")
        rows = [(str(number), document) for number, document in enumerate(documents)]
        connection.exec_driver_sql("INSERT INTO odd VALUES (%s, %s)", rows)
    texts, set_aside = databases.compute("postgresql", "SELECT user_id, value FROM odd", Kind.TRAIT)
    assert len(texts) + sum(set_aside.values()) == len(documents)
    for number, document in enumerate(documents):
        text = texts.get(str(number))
        value = json.loads(document, parse_float=Decimal, parse_int=Decimal)
        assert text == (None if canonical_value(value) == "!" else canonical_value(value)), document


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_json_text_of_a_query_with_a_nul_is_set_aside(databases, name):
    texts = {
        "u1": r'"a\u0000b"',
        "u2": r'"\\u0000"',
        "u3": r'"\\\u0000"',
        "u4": '"é"',
        "u5": "7",
        "u6": "[1]",
    }
    rows = " UNION ALL ".join(
        f"SELECT '{user}' AS user_id, '{text}' AS value" for user, text in texts.items()
    )
    values, set_aside = databases.compute(name, rows, Kind.TRAIT, value_type="json")
    assert values == {user: texts[user] for user in ("u2", "u4", "u5", "u6")}
    assert set_aside == {"not_primitive": 2}
