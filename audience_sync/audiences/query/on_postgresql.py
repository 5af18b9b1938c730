"""PostgreSQL's part of the compiler: moments, numbers, text and JSON. No expression fails because of the data it reads.

A moment is a `timestamp` in UTC.
"""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.dialect import (
    LARGEST_DOUBLE,
    Dialect,
    Expression,
    JsonValue,
    TypedColumn,
    described_columns,
    execute,
    is_between,
    is_one_of,
)
from audience_sync.audiences.query.moments import moment_text
from audience_sync.audiences.values import MAX_NUMBER_LENGTH, NUMBER

KINDS = {
    **dict.fromkeys(("int2", "int4", "int8"), "integer"),
    **dict.fromkeys(("numeric", "float8"), "number"),
    "float4": "real",
    "money": "money",
    **dict.fromkeys(("text", "varchar"), "text"),
    **{name: name for name in ("date", "timestamp", "timestamptz", "json", "jsonb", "uuid", "bpchar")},
    "bool": "boolean",
}
_COLLATED_KINDS = {
    ("text", '"default"'): "text",
    ("text", '"C"'): "text_c",
    ("bpchar", '"default"'): "bpchar",
    ("bpchar", '"C"'): "bpchar",
}

# A valid date, time and zone, except that the month may not have that day, which is checked separately.
_DATE = (
    "^(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    "([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]+)?)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])?)?$"
)
_LEAST: Expression = sa.literal_column("2.5e-324")  # a cast to float8 refuses numbers nearer to 0
_ZERO: Expression = sa.literal_column("0::float8")
# Escapes in JSON that text cannot represent: NUL, and half a pair of surrogates. A backslash before them may be escaped.
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_NO_TEXT: Expression = sa.literal_column(
    rf"'(?<!\\)((?:\\\\)*)(?:\\u0000|{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW})'"
)
_ZONED = {"timestamptz", "moment"}
_ZONE = "(Z|[+-][0-9]{2}:[0-9]{2})$"


@dataclass(frozen=True, slots=True)
class PostgresqlJson(JsonValue):
    """A JSON value: a jsonb expression, or json, in which U+FFFD replaces what PostgreSQL cannot convert to a string."""

    document: Expression
    is_binary: bool

    def at(self, step: str) -> "PostgresqlJson":
        key: Expression
        operator, key = "->", sa.literal(step, sa.Text)
        if step.isdecimal() and step == str(int(step)) and len(step) < 10:
            operator, key = "#>", sa.literal_column(f"'{{{step}}}'")
        return PostgresqlJson(self.document.op(operator)(key), self.is_binary)

    def items(self, name: str) -> tuple[sa.FromClause, "PostgresqlJson"]:
        empty: Expression = sa.literal_column("'[]'::jsonb" if self.is_binary else "'[]'::json")
        listed = sa.case((self._kind == "array", self.document), else_=empty)
        function = sa.func.jsonb_array_elements if self.is_binary else sa.func.json_array_elements
        table = function(listed).table_valued("value", with_ordinality="key").render_derived(name=name)
        return table, PostgresqlJson(table.c.value, self.is_binary)

    @property
    def _kind(self) -> Expression:
        return (sa.func.jsonb_typeof if self.is_binary else sa.func.json_typeof)(self.document)

    @property
    def _scalar(self) -> Expression:
        return self.document.op("#>>")(sa.literal_column("'{}'"))

    @property
    def exists(self) -> Expression:
        return sa.func.coalesce(self._kind != "null", sa.false())

    @property
    def number(self) -> Expression:
        exact = sa.cast(self.document if self.is_binary else self._scalar, sa.Numeric)
        is_number = self._kind == "number"
        if not self.is_binary:  # json takes any number of digits, and any exponent
            is_short = sa.func.length(self._scalar) <= 300
            has_short_exponent = self._scalar.op("!~", is_comparison=True)("[eE][+-]?0*[1-9][0-9]{3}")
            is_number = sa.and_(is_number, is_short, has_short_exponent)
        is_zero = sa.func.abs(exact) < _LEAST
        double = sa.case(
            (is_zero, _ZERO), (exact.between(-LARGEST_DOUBLE, LARGEST_DOUBLE), sa.cast(exact, sa.Double))
        )
        return sa.case((is_number, double))

    @property
    def text(self) -> Expression:
        return sa.case((self._kind == "string", self._scalar))

    def scalar_text(self, dialect: Dialect) -> Expression:
        """Return a string, or a number as text, as in a user id; null for anything else."""
        number = sa.case((self.number.is_not(None), sa.cast(self._scalar, sa.Numeric)))
        return sa.case(
            (self._kind == "number", dialect.text_of(TypedColumn(number, "number"))), else_=self.text
        )

    def is_text(self, texts: Sequence[str]) -> Expression:
        """Compare jsonb as it is, which takes half the time of checking its kind and comparing its text."""
        if not self.is_binary:
            return is_one_of(self.text, texts)
        literals = [json.dumps(text, ensure_ascii=False) for text in texts]
        return is_one_of(
            self.document, [sa.cast(sa.literal(each, sa.Text), postgresql.JSONB) for each in literals]
        )

    @property
    def boolean(self) -> Expression:
        return sa.case((self._kind == "boolean", sa.cast(self._scalar, sa.Boolean)))


_TYPE_NAMES = sa.text(
    "SELECT t.oid, coalesce(b.typname, t.typname) AS typname FROM pg_catalog.pg_type t "
    "LEFT JOIN pg_catalog.pg_type b ON b.oid = t.typbasetype WHERE t.oid = ANY(:oids)"
)


class OnPostgresql(Dialect):
    sqlalchemy = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]
    moment_kinds = frozenset({"date", "timestamp", "timestamptz", "moment"})
    has_semi_joins = True
    position: ClassVar = sa.func.strpos

    def json_of_column(self, column: TypedColumn) -> PostgresqlJson:
        value = column.expression
        if column.kind == "jsonb":
            return PostgresqlJson(value, True)
        text = sa.cast(value, sa.Text)
        readable = sa.func.regexp_replace(text, _NO_TEXT, r"\1\ufffd", "g")
        document = sa.case((text.op("~")(_NO_TEXT), sa.cast(readable, postgresql.JSON)), else_=value)
        return PostgresqlJson(document, False)

    def column_kinds(self, connection: sa.Connection, table: str | None, sql: str | None) -> dict[str, str]:
        """Return the kinds by the types' names in pg_type (a domain has its base type's kind) and by collations."""
        if sql is None:
            preparer: Any = connection.dialect.identifier_preparer
            sql = f"SELECT * FROM {'.'.join(preparer.quote(part) for part in (table or '').rsplit('.', 1))}"
        described = described_columns(connection, sql)
        rows = connection.execute(_TYPE_NAMES, {"oids": [oid for _, oid in described]})
        types = {row.oid: row.typname for row in rows}
        kinds = [KINDS.get(types[oid], "other") for _, oid in described]
        texts = [number for number, kind in enumerate(kinds) if kind in {"text", "bpchar"}]
        if texts:
            asked = ", ".join(f"pg_catalog.pg_collation_for(q.c{number})" for number in texts)
            columns = ", ".join(f"c{number}" for number in range(len(kinds)))
            joined = f"(SELECT 1) AS one LEFT JOIN ({sql}\n) AS q ({columns}) ON false"  # one row, and none is read
            for number, collation in zip(
                texts, execute(connection, f"SELECT {asked} FROM {joined}").one(), strict=True
            ):
                kinds[number] = _COLLATED_KINDS.get((kinds[number], collation), "collated")
        return {name: kind for (name, _), kind in zip(described, kinds, strict=True)}

    def text_of(self, column: TypedColumn) -> Expression:
        value = column.expression
        text = value if column.kind in {"text", "text_c"} else sa.cast(value, sa.Text)
        if column.kind == "collated":  # it may ignore case, refuse to search, or conflict with a column's
            return sa.collate(text, "C")
        if column.kind in {"json", "jsonb"}:
            scalar = self.json_of_column(column).scalar_text(self)
            is_readable = text.op("!~", is_comparison=True)(_NO_TEXT)
            return scalar if column.kind == "jsonb" else sa.case((is_readable, scalar))
        if column.kind == "money":
            value = sa.cast(value, sa.Numeric)
        elif column.kind not in {"number", "real"}:
            return text
        wide = sa.cast(value, sa.Numeric)
        is_whole = sa.and_(self._is_double(wide), value == sa.func.trunc(value))
        fits = sa.and_(value >= -(2**63), value < 2**63)
        digits = sa.case(  # a float8 as numeric has 15 digits
            (fits, sa.cast(sa.cast(value, sa.BigInteger), sa.Text)),
            else_=sa.cast(sa.func.trunc(wide), sa.Text),
        )
        return sa.case((is_whole, digits), else_=sa.cast(self.number_of_column(column), sa.Text))

    def key_of(self, column: TypedColumn) -> Expression:
        is_compared_as_text = column.kind in {"other", "json", "jsonb", "collated"}
        return self.text_of(column) if is_compared_as_text else column.expression

    def are_same(self, own: TypedColumn, other: TypedColumn) -> Expression:
        if (own.kind, other.kind) == ("text", "text_c"):  # an index is used only in its own collation
            return own.expression == sa.collate(other.expression, "default")
        return super().are_same(own, other)

    # Moments.

    def moment_literal(self, moment: dt.datetime) -> Expression:
        return self._bound(moment, "timestamp")

    def moment_of_column(self, column: TypedColumn) -> Expression:
        value = column.expression
        utc = sa.func.timezone("UTC", value) if column.kind in _ZONED else sa.cast(value, sa.DateTime())
        return utc if column.kind == "moment" else sa.case((self._has_moment(column), utc))

    def _has_moment(self, column: TypedColumn) -> Expression:
        """Return whether the column's value is a valid moment: a date may be later than every timestamp."""
        is_finite: Expression = sa.func.isfinite(column.expression)
        if column.kind != "date":
            return is_finite
        return sa.and_(is_finite, column.expression < sa.literal_column("DATE '294276-01-01'"))

    def moment_of_text(self, text: Expression) -> Expression:
        given = sa.select(text.label("t")).correlate_except().subquery("given")
        t = given.c.t
        year, month, day = (
            sa.cast(sa.func.substr(t, start, length), sa.Integer)
            for start, length in ((1, 4), (6, 2), (9, 2))
        )
        is_leap = sa.and_(year % 4 == 0, sa.or_(year % 100 != 0, year % 400 == 0))
        last_day = sa.case((month.in_([4, 6, 9, 11]), 30), (month != 2, 31), (is_leap, 29), else_=28)
        local = sa.func.regexp_replace(sa.func.regexp_replace(t, _ZONE, ""), "([.][0-9]{6})[0-9]+", r"\1")
        zone = sa.func.coalesce(sa.func.substring(t, "[+-][0-9]{2}:[0-9]{2}$"), "00:00")
        moment = sa.cast(local, sa.DateTime()) - sa.cast(zone, postgresql.INTERVAL())
        checked = sa.case((t.op("~")(_DATE), sa.case((day <= last_day, moment))))
        return sa.select(checked).select_from(given).scalar_subquery()

    def json_of(self, parts: Mapping[str, Expression]) -> Expression:
        """Return the part that is not null as jsonb."""
        return sa.func.coalesce(*(sa.func.to_jsonb(part) for part in parts.values()))

    def moment_text(self, column: TypedColumn) -> Expression:
        if column.kind == "date":
            return sa.case((self._has_moment(column), sa.func.to_char(column.expression, "YYYY-MM-DD")))
        moment = self.moment_of_column(column)
        fraction = sa.func.rtrim(sa.func.to_char(moment, ".US"), "0")
        whole = sa.func.to_char(moment, 'YYYY-MM-DD"T"HH24:MI:SS', type_=sa.Text)
        return whole + sa.func.rtrim(fraction, ".", type_=sa.Text) + "Z"

    def is_within_parent(
        self, own: TypedColumn, parent: TypedColumn, window: tree.Window, until: dt.datetime
    ) -> Expression:
        """Compare the column itself, so that an index can be used. With `least`, no sum exceeds the last timestamp."""
        if own.kind in self.moment_kinds and own.kind == parent.kind:
            start = sa.func.least(parent.expression, self._bound(until, own.kind))
        else:
            start = sa.func.least(self.moment_of(parent), self.moment_literal(until))
            start = sa.func.timezone("UTC", start) if own.kind in _ZONED else start

        def shifted(span: dt.timedelta) -> Expression:
            hours: Expression = sa.literal_column(f"INTERVAL '{span // dt.timedelta(hours=1)} hours'")
            return start.op("+")(hours) if span else start

        moment = own.expression if own.kind in self.moment_kinds else self.moment_of(own)
        return is_between(moment, shifted(window.start), shifted(window.end))

    def is_within(self, column: TypedColumn, after: dt.datetime | None, until: dt.datetime) -> Expression:
        is_moment = column.kind in self.moment_kinds
        kind = column.kind if is_moment else "timestamp"
        lowest = None if after is None else self._bound(after, kind)
        if lowest is None and is_moment and kind != "moment":
            lowest = sa.literal_column(f"{kind.upper()} '-infinity'")
        moment = column.expression if is_moment else self.moment_of(column)
        return is_between(moment, lowest, self._bound(until, kind))

    def _bound(self, moment: dt.datetime, kind: str) -> Expression:
        """Return a moment in a form that can be compared with a column of a date or timestamp type."""
        if kind == "date":  # a date is after a moment if it is after the moment's day
            return sa.literal_column(f"DATE '{moment_text(moment)[:10]}'")
        if kind in _ZONED:
            return sa.literal_column(f"TIMESTAMPTZ '{moment_text(moment)}+00'")
        return sa.literal_column(f"TIMESTAMP '{moment_text(moment)}'")

    # Numbers and text.

    def finite(self, number: Expression) -> Expression:
        """Return a number of any type as a double, NULL if it is outside the range of a double."""
        wide = sa.cast(number, sa.Numeric)
        return sa.case(
            (sa.func.abs(wide) < _LEAST, _ZERO), (self._is_double(wide), sa.cast(number, sa.Double))
        )

    def _is_double(self, wide: Expression) -> Expression:
        return sa.and_(wide != sa.literal_column("'NaN'::numeric"), sa.func.abs(wide) <= LARGEST_DOUBLE)

    def number_of_column(self, column: TypedColumn) -> Expression:
        value = column.expression
        match column.kind:
            case "integer":
                return sa.cast(value, sa.Double)
            case "money":
                return self.finite(sa.cast(value, sa.Numeric))
            case "real":
                return self.finite(self._shortest(value))
        return self.finite(value)

    def _shortest(self, column: Expression) -> Expression:
        """Return a float4 as the number of its shortest decimal form: 0.1, not 0.100000001490116."""
        wide = sa.cast(column, sa.Double)
        digits: list[Expression] = [
            sa.cast(sa.func.to_char(wide, f"9.{'9' * (count - 1)}EEEE"), sa.Double) for count in (6, 7, 8, 9)
        ]
        is_special = column.in_([sa.literal_column(f"'{name}'") for name in ("NaN", "Infinity", "-Infinity")])
        tries = [(sa.cast(number, sa.REAL) == column, number) for number in digits]
        return sa.case((is_special, wide), *tries, else_=wide)

    def at_15_digits(self, number: Expression) -> Expression:
        return sa.cast(sa.func.to_char(number, "9.99999999999999EEEE"), sa.Double)

    def summed(self, number: Expression) -> Expression:
        return sa.cast(number, sa.Numeric)

    def by_code_points(self, text: Expression) -> Expression:
        return sa.collate(text, "C")

    def number_text(self, number: Expression) -> Expression:
        size = sa.func.abs(self.at_15_digits(number))
        plain = sa.cast(sa.func.trim_scale(sa.cast(self.at_15_digits(number), sa.Numeric)), sa.Text)
        exponential = sa.func.ltrim(sa.func.to_char(number, "9.99999999999999EEEE"))
        short = sa.func.regexp_replace(exponential, "[.]?0*e", "e")
        is_plain = sa.or_(
            size == 0, sa.and_(size >= sa.literal_column("1e-4"), size < sa.literal_column("1e15"))
        )
        return sa.case((is_plain, plain), else_=short)

    def number_of_text(self, text: Expression) -> Expression:
        is_number = sa.and_(sa.func.length(text) <= MAX_NUMBER_LENGTH, text.op("~")(f"^{NUMBER}$"))
        return sa.case((is_number, self.finite(sa.cast(text, sa.Numeric))))

    def date_literal(self, date: dt.date) -> str:
        return f"DATE {super().date_literal(date)}"

    def joined(self, text: Expression, *order: Expression) -> Expression:
        return sa.func.string_agg(text, postgresql.aggregate_order_by(sa.literal_column("', '"), *order))


POSTGRESQL = OnPostgresql()
