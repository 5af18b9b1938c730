"""The same id and the same value get the same text, wherever they are computed.

The same rows are stored in SQLite and in PostgreSQL, then computed in place and streamed from both as sources.
"""

import datetime as dt
import json
import sqlite3
import uuid
from decimal import Decimal

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync.audiences import compute, snapshot, values
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.db import dialects, engines, migrate
from audience_sync.db.sources import open_source

AS_OF = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
INTEGERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, -1, 10**15, 2**53 + 1, 2**63 - 1, -(2**63)])
)
FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1e6, 1e6).map(lambda number: round(number, 2)),
    st.sampled_from(
        [1.0, -0.0, 0.1 + 0.2, 1e15, 1e16, 123456789012345678.0, 1e20, 1e-5, 1e300, 5e-324, 2.0**63]
    ),
)
DECIMALS = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**25), max_value=10**25, places=3),
    st.sampled_from(
        [Decimal("1.50"), Decimal("1.000"), Decimal(10) ** 20, Decimal("1e-30"), Decimal(2) ** 63]
    ),
)
JSON_VALUES = st.one_of(st.none(), st.booleans(), TEXTS, FLOATS, INTEGERS, st.lists(INTEGERS, max_size=2))
IDS = st.one_of(
    TEXTS,
    st.sampled_from(["007", "7", "x" * 255, "x" * 256, "\u00e9" * 255, " ", "\t\n", " a ", "Ann", "ann"]),
)


ROWS_OF_ENTERED = (
    "SELECT coalesce(sum(s.row_count), 0) FROM {temp}audience_sync_snapshot s "
    "JOIN {temp}audience_sync_changes c ON c.user_id = s.user_id"
)


class Databases:
    """One of our databases on each server, each with a table of rows, and each as the other's source."""

    def __init__(self, folder, postgres):
        server_url = postgres.url(postgres.create())
        urls = {"sqlite": f"sqlite:///{folder}/own.db", "postgresql": server_url}
        self.own, self.sources = {}, {}
        for name, url in urls.items():
            self.own[name] = engines.open_own(url, "audience_sync")
            migrate.upgrade(self.own[name])
            self.sources[name] = open_source(name, url)

    def fill(self, name, id_type, value_type, rows):
        with engines.write(self.own[name]) as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS rows_of_it")
            connection.exec_driver_sql(f"CREATE TABLE rows_of_it (user_id {id_type}, value {value_type})")
            if rows:
                places = "?, ?" if name == "sqlite" else "%s, %s"
                connection.exec_driver_sql(f"INSERT INTO rows_of_it VALUES ({places})", rows)

    def computed(self, name, kind):
        """Compute in place and streamed: who enters, and what is set aside; both must be the same."""
        results = []
        for source, own in ((None, name), (name, "sqlite"), (name, "postgresql")):
            sql = "SELECT user_id, value FROM rows_of_it"
            definition = Definition("it", "it", kind, sql, source=source)
            with self.own[own].connect() as connection:
                compute.compute(connection, definition, AS_OF, source and self.sources[source])
                counts = snapshot.diff(connection, None, definition, AS_OF).set_aside
                rows = dialects.sql(connection, "SELECT user_id, value FROM {temp}audience_sync_changes")
                results.append((dict(map(tuple, rows)), counts))
                self.row_count = dialects.sql(connection, ROWS_OF_ENTERED).scalar_one()
        assert results[0] == results[1] == results[2]
        return results[0]


@pytest.fixture(scope="module")
def databases(tmp_path_factory, postgres):
    made = Databases(tmp_path_factory.mktemp("forms"), postgres)
    yield made
    for engine in (*made.own.values(), *made.sources.values()):
        engine.dispose()


examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def is_json(text):
    return text is None or json.dumps(json.loads(text)) is not None


@pytest.mark.parametrize(
    ("sqlite_type", "postgresql_type", "raws"),
    [
        ("text", "text", IDS),
        ("integer", "bigint", INTEGERS),
        ("real", "double precision", FLOATS),
    ],
)
def test_ids_are_the_same_text_on_both_databases(databases, sqlite_type, postgresql_type, raws):
    @examples
    @given(st.lists(st.one_of(raws, st.none()), max_size=12))
    def check(ids):
        rows = [(each, None) for each in ids]
        databases.fill("sqlite", sqlite_type, "text", rows)
        databases.fill("postgresql", postgresql_type, "text", rows)
        computed = databases.computed("sqlite", Kind.AUDIENCE)
        assert databases.row_count + sum(computed[1].values()) == len(ids)
        assert computed == databases.computed("postgresql", Kind.AUDIENCE)
        assert databases.row_count + sum(computed[1].values()) == len(ids)

    check()


@pytest.mark.parametrize(
    ("sqlite_type", "postgresql_type", "raws"),
    [
        ("text", "text", TEXTS),
        ("integer", "bigint", INTEGERS),
        ("real", "double precision", FLOATS),
    ],
)
def test_values_are_the_same_json_on_both_databases(databases, sqlite_type, postgresql_type, raws):
    @examples
    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(raws, st.none())), max_size=12))
    def check(rows):
        databases.fill("sqlite", "text", sqlite_type, rows)
        databases.fill("postgresql", "text", postgresql_type, rows)
        computed = databases.computed("sqlite", Kind.TRAIT)
        assert computed == databases.computed("postgresql", Kind.TRAIT)
        assert all(is_json(text) for text in computed[0].values())

    check()


@pytest.mark.parametrize(
    ("postgresql_type", "raws"),
    [
        ("numeric", DECIMALS),
        ("real", FLOATS.filter(lambda number: 1e-37 < abs(number) < 1e37)),
        ("boolean", st.booleans()),
        ("uuid", st.uuids()),
        ("bytea", st.binary(max_size=3)),
        ("date", st.dates()),
        ("timestamp", st.datetimes()),
        (
            "timestamptz",
            st.datetimes(timezones=st.just(dt.UTC)),
        ),
        ("time", st.times()),
        ("interval", st.timedeltas(dt.timedelta(0), dt.timedelta(9))),
        ("integer[]", st.just([1])),
        ("json", JSON_VALUES.map(json.dumps)),
        ("jsonb", JSON_VALUES.map(json.dumps)),
        ("varchar(8)", TEXTS),
    ],
)
def test_values_of_postgresql_are_the_same_in_place_and_streamed(databases, postgresql_type, raws):
    raws = raws.filter(lambda raw: not (isinstance(raw, str) and "\\u0000" in raw))

    @settings(examples, max_examples=20)
    @given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(raws, st.none())), max_size=12))
    def check(rows):
        databases.fill("postgresql", "text", postgresql_type, rows)
        texts, _ = databases.computed("postgresql", Kind.TRAIT)
        assert all(is_json(text) for text in texts.values())

    check()


@pytest.mark.parametrize("postgresql_type", ["json", "jsonb"])
def test_numbers_in_json_keep_the_digits_that_a_double_has_not(databases, postgresql_type):
    rows = [("a", "2.215411740277963e+16"), ("b", "9007199254740993.0"), ("c", "0.10")]
    databases.fill("postgresql", "text", postgresql_type, rows)
    texts, _ = databases.computed("postgresql", Kind.TRAIT)
    assert texts == {"a": "22154117402779630", "b": "9007199254740993", "c": "0.1"}


@pytest.mark.parametrize(
    ("postgresql_type", "raws"),
    [("numeric", DECIMALS), ("numeric(30,0)", DECIMALS), ("uuid", st.uuids()), ("real", st.integers(0, 99))],
)
def test_ids_of_postgresql_are_the_same_in_place_and_streamed(databases, postgresql_type, raws):
    @settings(examples, max_examples=20)
    @given(st.lists(st.one_of(raws, st.none()), max_size=12))
    def check(ids):
        databases.fill("postgresql", postgresql_type, "text", [(each, None) for each in ids])
        databases.computed("postgresql", Kind.AUDIENCE)

    check()


def test_sqlite_gives_each_value_a_type_of_its_own(databases):
    raws = st.one_of(TEXTS, INTEGERS, FLOATS, st.binary(max_size=3), st.none(), st.just("a\0b"), st.just("1"))

    @examples
    @given(st.lists(st.tuples(st.one_of(raws, IDS), raws), max_size=12))
    def check(rows):
        databases.fill("sqlite", "", "", rows)
        databases.computed("sqlite", Kind.AUDIENCE)
        databases.computed("sqlite", Kind.TRAIT)

    check()


def test_text_that_is_not_unicode_is_set_aside(databases):
    databases.fill("sqlite", "text", "text", [("ann", "x"), ("caf\u00e9", "\u00e9")])
    with engines.write(databases.own["sqlite"]) as connection:
        connection.exec_driver_sql("INSERT INTO rows_of_it VALUES (CAST(x'41ff' AS text), 'x')")
        connection.exec_driver_sql("INSERT INTO rows_of_it VALUES ('bob', CAST(x'ff41' AS text))")
    definition = Definition("it", "it", Kind.TRAIT, "SELECT user_id, value FROM rows_of_it")
    with databases.own["sqlite"].connect() as connection:
        compute.compute(connection, definition, AS_OF, None)
        set_aside = snapshot.diff(connection, None, definition, AS_OF).set_aside
        rows = dialects.sql(
            connection, "SELECT user_id, value FROM temp.audience_sync_changes ORDER BY 1"
        ).all()
    assert set_aside == {"not_unicode": 1, "not_primitive": 1}
    assert [tuple(row) for row in rows] == [("ann", '"x"'), ("caf\u00e9", '"\u00e9"')]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (1, "1"),
        (1.0, "1"),
        (Decimal("1.00"), "1"),
        (-0.0, "0"),
        (0.1 + 0.2, "0.3"),
        (2.9999999999999996, "3"),
        (1e15, "1000000000000000"),
        (2**63 - 1, "9223372036854775807"),
        (2**63, "9.22337203685478e+18"),
        (1e20, "1e+20"),
        (Decimal(10) ** 20, "1e+20"),
        (10**20, "1e+20"),
        (1e-5, "1e-05"),
        (Decimal("0.1"), "0.1"),
        (float("inf"), "!"),
        (float("nan"), "!"),
        (Decimal("1e400"), "!"),
        (Decimal("NaN"), "!"),
        (True, "true"),
        (None, None),
        ("1", '"1"'),
        ('a"\\\n\u00e9', '"a\\"\\\\\\n\u00e9"'),
        ("a\0b", "!"),
        ("\ud800", "!"),
        (b"x", "!"),
        ([1], "!"),
        ({"a": 1}, "!"),
        (dt.timedelta(1), "!"),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (dt.date(2026, 1, 2), '"2026-01-02"'),
        (dt.datetime(2026, 1, 2, 3, 4, 5, 500000, tzinfo=dt.UTC), '"2026-01-02T03:04:05.5+00:00"'),
    ],
)
def test_a_value_has_one_written_form(raw, text):
    assert values.canonical_value(raw) == text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("a\0b", "nul_character"),
        ("\ud800", "not_unicode"),
        (b"\xff", "not_unicode"),
        ("x" * 256, "too_long"),
        ("x" * 255, None),
        ("\u4e16" * 255, None),
        ("\u00a0\u200b", "empty"),
    ],
)
def test_why_a_text_cannot_be_an_id(raw, reason):
    assert values.invalid_reason(raw) == reason


def test_numbers_have_the_text_that_sqlite_itself_gets_wrong(databases):
    """Its printf gives another fifteenth digit than C's: the reason why SQLite calls Python."""
    printed = sqlite3.connect(":memory:").execute("SELECT printf('%.15g', 1e300 / 3.0)").fetchone()[0]
    databases.fill("sqlite", "text", "real", [("a", 1e300 / 3.0)])
    assert databases.computed("sqlite", Kind.TRAIT)[0] == {"a": f"{1e300 / 3.0:.15g}"}
    assert float(printed) == pytest.approx(1e300 / 3.0)


def test_the_rules_hold_for_what_other_drivers_give():
    batch = [
        (1, "a"),
        (2**70, "b"),
        (Decimal("1.0"), "c"),
        (True, "d"),
        (1.5, "e"),
        (float("nan"), "f"),
        (b"g", "g"),
    ]
    aside = [(values.unusable(reason),) for reason in ("not_text_or_number", "null", "binary")]
    expected = [("1",), (str(2**70),), ("1",), aside[0], ("1.5",), *aside[1:]]
    assert values.canonical_rows(batch, [0]) == expected


def test_sources_stay_closed_to_writing(databases):
    with (
        databases.sources["sqlite"].connect() as connection,
        pytest.raises(sa.exc.OperationalError, match="readonly"),
    ):
        connection.exec_driver_sql("CREATE TABLE mine (x)")
