"""SQLite's part of the compiler: moments, numbers, text and JSON. No expression fails because of the data it reads.

A moment is text in the form of our own tables: `2026-01-31 12:00:00.000000`, in UTC.
"""

import contextlib
import datetime as dt
import functools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from audience_sync.audiences import statement
from audience_sync.audiences.query import tree
from audience_sync.audiences.query.dialect import (
    LARGEST_DOUBLE,
    Dialect,
    Expression,
    JsonValue,
    TypedColumn,
    described_columns,
    is_between,
)
from audience_sync.audiences.query.moments import moment_text, moved
from audience_sync.audiences.values import MAX_NUMBER_LENGTH

_DAY = "[0-9][0-9][0-9][0-9]-[0-1][0-9]-[0-3][0-9]"
_TIME = f"{_DAY}[T ][0-2][0-9]:[0-5][0-9]"
_ZONE = "[+-][0-2][0-9]:[0-5][0-9]"
_VIEW = "audience_sync_columns"
# Kinds by patterns of declared types. `NUM` is SQLite's type of a computed number.
_KINDS = (
    ("^(NUM)?$", "any"),
    ("JSON", "json"),
    ("BOOL", "boolean"),
    ("TIMESTAMP|DATETIME", "timestamp"),
    ("DATE", "date"),
    (r"\bU?(TINY|SMALL|MEDIUM|BIG|HUGE)?INT(EGER)?[0-9]*\b", "integer"),
    ("CHAR|CLOB|TEXT|UUID", "text"),
    ("REAL|FLOA|DOUB|NUMERIC|DECIMAL|NUMBER", "number"),
    ("INT", "any"),  # POINT and INTERVAL: SQLite converts texts that look like integers
)


@dataclass(frozen=True, slots=True)
class SqliteJson(JsonValue):
    """A JSON value: its type and value as SQLite's functions return them, NULL if there is none.

    `paths`: its possible paths in the document, because a step of digits may be a list index or a name in an object.
    """

    kind: Expression
    value: Expression
    document: Expression  # the text that contains it, NULL if that is not an object or list
    paths: tuple[str, ...] = ("$",)

    @classmethod
    def in_document(cls, document: Expression, paths: tuple[str, ...]) -> "SqliteJson":
        def either(function: Any) -> Expression:
            values = [function(document, path) for path in paths]
            return values[0] if len(values) == 1 else sa.func.coalesce(*values)

        return cls(either(sa.func.json_type), either(sa.func.json_extract), document, paths)

    def at(self, step: str) -> "SqliteJson":
        if re.fullmatch(r"[^\"\\\x00-\x1f]*", step):
            paths = tuple(f'{path}."{step}"' for path in self.paths)
            if step.isdecimal() and step == str(int(step)) and len(step) < 10:
                paths += tuple(f"{path}[{step}]" for path in self.paths)
            return self.in_document(self.document, paths)
        container = sa.case((self.kind == "object", self.value))
        members = sa.func.json_each(container).table_valued("key", "value", "type")

        def of_member(column: Expression) -> Expression:
            return (
                sa.select(column).select_from(members).where(members.c.key == step).limit(1).scalar_subquery()
            )

        kind, value = of_member(members.c.type), of_member(members.c.value)
        return SqliteJson(kind, value, sa.case((kind.in_(["object", "array"]), value)))

    def items(self, name: str) -> tuple[sa.FromClause, "SqliteJson"]:
        listed = sa.case((self.kind == "array", self.value))
        table = sa.func.json_each(listed).table_valued("value", "type", "key", name=name)
        document = sa.case((table.c.type.in_(["object", "array"]), table.c.value))
        return table, SqliteJson(table.c.type, table.c.value, document)

    @property
    def exists(self) -> Expression:
        return sa.func.coalesce(self.kind != "null", sa.false())

    @property
    def number(self) -> Expression:
        is_double = sa.and_(
            self.kind.in_(["integer", "real"]), self.value.between(-LARGEST_DOUBLE, LARGEST_DOUBLE)
        )
        return sa.case((is_double, sa.cast(self.value, sa.REAL)))

    @property
    def text(self) -> Expression:
        return sa.case((self.kind == "text", self.value))

    @property
    def boolean(self) -> Expression:
        return sa.case((self.kind == "true", sa.true()), (self.kind == "false", sa.false()))


def _kind(type_name: str) -> str:
    """Return the kind of a declared type. In SQLite each value has a type; the language uses the declared one."""
    for pattern, kind in _KINDS:
        if re.search(pattern, type_name):
            return kind
    return "other"


def _declared_types(connection: sa.Connection, *names: str) -> dict[str, str]:
    """Return the declared type of each column of a table or view; `names`: its name, and its schema."""
    columns = sa.func.pragma_table_xinfo(*names).table_valued("name", "type")
    return {column: type_name or "" for column, type_name in connection.execute(sa.select(columns))}


def _types_of_query(connection: sa.Connection, sql: str) -> dict[str, str]:
    """Return the declared type of each column of a query: the type of a table's column, empty for an expression.

    Only a view of the query shows them. It is temporary, so it writes nothing to the database, and is rolled back.
    """
    types = {name: "" for name, _ in described_columns(connection, sql)}
    text = "NULL".join(statement.bind(sql, "sqlite").parts)  # a view has no parameters
    is_read_only = connection.exec_driver_sql("PRAGMA query_only").scalar_one()
    with contextlib.suppress(sa.exc.DBAPIError), connection.begin_nested() as savepoint:
        connection.exec_driver_sql("PRAGMA query_only = OFF")
        connection.exec_driver_sql(
            f"CREATE TEMP VIEW {_VIEW} AS SELECT * FROM ({text}\n)", execution_options={"no_parameters": True}
        )
        types |= _declared_types(connection, _VIEW, "temp")
        savepoint.rollback()
    connection.exec_driver_sql(f"PRAGMA query_only = {is_read_only}")
    return types


def _if_text(value: Expression) -> Expression:
    return sa.case((sa.func.typeof(value) == "text", value))


class OnSqlite(Dialect):
    sqlalchemy = sqlite.dialect(paramstyle="named")
    moment_kinds = frozenset({"date", "timestamp", "moment"})
    value_types: ClassVar = {"boolean": "boolean", "json": "json"}
    position: ClassVar = sa.func.instr

    def json_of_column(self, column: TypedColumn) -> SqliteJson:
        text = column.expression
        document = text if column.kind == "document" else sa.case((sa.func.json_valid(text), text))
        return SqliteJson.in_document(document, ("$",))

    def column_kinds(self, connection: sa.Connection, table: str | None, sql: str | None) -> dict[str, str]:
        """Return the kinds according to the declared types."""
        if sql is not None:
            types = _types_of_query(connection, sql)
        else:
            schema, _, name = (table or "").rpartition(".")
            types = _declared_types(connection, name, *([schema] if schema else []))
            if not types:
                raise sa.exc.NoSuchTableError(table)
        return {column: _kind(type_name.upper()) for column, type_name in types.items()}

    def parts_of_any(self, column: TypedColumn) -> tuple[Expression, Expression]:
        return self.number_of_column(column), sa.collate(_if_text(column.expression), "BINARY")

    def text_of(self, column: TypedColumn) -> Expression:
        """Return the text; null for an infinite number, and a blob unchanged: it is neither a user id nor a value."""
        value = column.expression
        if column.kind == "text":
            return sa.collate(value, "BINARY")
        of_type = sa.func.typeof(value)
        cases: list[Any] = [(of_type == "blob", value)]
        if column.kind in {"number", "any"}:
            cases.append((of_type == "real", self.number_text(self.number_of_column(column))))
        return sa.collate(sa.case(*cases, else_=sa.cast(value, sa.Text)), "BINARY")

    def key_of(self, column: TypedColumn) -> Expression:
        is_number = column.kind in {"integer", "number"}
        return column.expression if is_number else sa.collate(column.expression, "BINARY")

    # Moments.

    def moment_literal(self, moment: dt.datetime) -> Expression:
        return sa.literal(moment_text(moment), sa.Text)

    def moment_of_column(self, column: TypedColumn) -> Expression:
        """Return a column's moment; our own tables' columns are moments."""
        if column.kind == "moment":
            return column.expression
        return self.moment_of_text(_if_text(column.expression))

    def moment_of_text(self, text: Expression) -> Expression:
        """Return the moment in an ISO 8601 text, or NULL. Nested SELECTs keep each step from repeating the previous one."""
        given = sa.select(text.label("t")).correlate_except().subquery("given")
        t = given.c.t
        has_zone = t.op("GLOB")(f"*{_ZONE}")
        has_time = sa.func.length(t) > 10
        local: Expression = sa.case(
            (t.op("GLOB")("*Z"), sa.func.substr(t, 1, sa.func.length(t) - 1)),
            (sa.and_(has_time, has_zone), sa.func.substr(t, 1, sa.func.length(t) - 6)),
            else_=t,
        )
        zone: Expression = sa.case((sa.and_(has_time, has_zone), sa.func.substr(t, -6)), else_="+00:00")
        split = sa.select(
            sa.func.replace(local, "T", " ").label("local"), zone.label("zone"), has_time.label("has_time")
        ).subquery("split")
        local, zone = split.c.local, split.c.zone
        day = sa.func.substr(local, 1, 10)
        is_moment = sa.and_(
            sa.or_(
                sa.and_(~split.c.has_time, local.op("GLOB")(_DAY)),
                local.op("GLOB")(_TIME),
                local.op("GLOB")(f"{_TIME}:[0-5][0-9]"),
                sa.and_(
                    local.op("GLOB")(f"{_TIME}:[0-5][0-9].[0-9]*"),
                    sa.func.substr(local, 21).op("NOT GLOB")("*[^0-9]*"),
                ),
            ),
            sa.func.date(day, "+0 days") == day,
            day > "0001",
            sa.func.substr(local, 12, 2) < "24",
            sa.func.substr(zone, 2, 2) < "24",
        )
        sign = sa.case((zone < "-", "-"), else_="+")  # an offset is subtracted
        whole = sa.func.datetime(
            sa.func.substr(local, 1, 19),
            self._concatenated(sign, sa.func.substr(zone, 2, 2), " hours"),
            self._concatenated(sign, sa.func.substr(zone, 5, 2), " minutes"),
        )
        fraction = sa.func.substr(self._concatenated(sa.func.substr(local, 21), "000000"), 1, 6)
        moment = sa.case((is_moment, self._concatenated(whole, ".", fraction)))
        return sa.select(moment).select_from(split).scalar_subquery()

    def _concatenated(self, *parts: Expression | str) -> Expression:
        texts = [
            sa.literal(part, sa.Text) if isinstance(part, str) else sa.type_coerce(part, sa.Text)
            for part in parts
        ]
        return functools.reduce(operator.add, texts)

    def json_of(self, parts: Mapping[str, Expression]) -> Expression:
        """Return a number as it is, and JSON text of a string or a boolean."""
        texts: dict[str, Callable[[Expression], Expression]] = {
            "number": lambda part: part,
            "text": lambda part: sa.case((part.is_not(None), sa.func.json_quote(part))),
            "boolean": lambda part: sa.case((part, "true"), (~part, "false")),
        }
        return sa.func.coalesce(*(texts[kind](part) for kind, part in parts.items()))

    def moment_text(self, column: TypedColumn) -> Expression:
        moment = self.moment_of_column(column)
        if column.kind == "date":
            return sa.func.substr(moment, 1, 10)
        trimmed = sa.func.rtrim(sa.func.rtrim(sa.func.replace(moment, " ", "T"), "0"), ".")
        whole = sa.func.substr(sa.func.replace(moment, " ", "T"), 1, 19)
        return self._concatenated(
            sa.case((sa.func.substr(moment, 21) == "000000", whole), else_=trimmed), "Z"
        )

    def is_within_parent(
        self, own: TypedColumn, parent: TypedColumn, window: tree.Window, until: dt.datetime
    ) -> Expression:
        del until  # datetime() of a moment that is too late is NULL
        start = self.moment_of(parent)
        return is_between(
            self.moment_of(own), self._shifted(start, window.start), self._shifted(start, window.end)
        )

    def _shifted(self, moment: Expression, span: dt.timedelta) -> Expression:
        if not span:
            return moment
        hours = span // dt.timedelta(hours=1)
        return self._concatenated(sa.func.datetime(moment, f"{hours:+} hours"), sa.func.substr(moment, 20))

    def is_within(self, column: TypedColumn, after: dt.datetime | None, until: dt.datetime) -> Expression:
        moment = (
            column.expression if column.kind == "moment" else self.moment_of_text(_if_text(column.expression))
        )
        lowest = None if after is None else self.moment_literal(after)
        is_within = is_between(moment, lowest, self.moment_literal(until))
        if column.kind == "moment":  # of our own tables
            return is_within
        day = dt.timedelta(days=1)
        nearly = [column.expression < moment_text(until + 2 * day)[:10]] if until.year < 9999 else []
        if after is not None:  # the text of a moment begins with its day, by any zone
            nearly.append(column.expression >= moment_text(moved(after, -day))[:10])
        return sa.and_(*nearly, is_within)

    # Numbers and text.

    def finite(self, number: Expression) -> Expression:
        return sa.case((number.between(-LARGEST_DOUBLE, LARGEST_DOUBLE), sa.cast(number, sa.REAL)))

    def number_of_column(self, column: TypedColumn) -> Expression:
        is_number = sa.func.typeof(column.expression).in_(["integer", "real"])
        return sa.case((is_number, self.finite(column.expression)))

    def at_15_digits(self, number: Expression) -> Expression:
        return sa.case((number.is_not(None), sa.cast(sa.func.printf("%.15g", number), sa.REAL)))

    def boolean_of_column(self, column: TypedColumn) -> Expression:
        return sa.case((sa.func.typeof(column.expression) == "integer", column.expression != 0))

    def number_text(self, number: Expression) -> Expression:
        whole = sa.cast(sa.cast(number, sa.Integer), sa.Text)
        is_whole = sa.and_(sa.func.abs(number) < 1e15, number == sa.cast(number, sa.Integer))
        return sa.case((is_whole, whole), (number.is_not(None), sa.func.printf("%.15g", number)))

    def number_of_text(self, text: Expression) -> Expression:
        """Check the parts of the text first, because SQLite's cast accepts any text and reads a number at its start."""

        def unsigned(part: Expression) -> Expression:
            return sa.func.substr(part, sa.case((part.op("GLOB")("[-+]*"), 2), else_=1))

        at = sa.func.instr(sa.func.lower(text), "e")
        digits = unsigned(sa.case((at > 0, sa.func.substr(text, 1, at - 1)), else_=text))
        exponent = unsigned(sa.func.substr(text, at + 1))
        is_number = sa.and_(
            sa.func.length(text) <= MAX_NUMBER_LENGTH,
            digits.op("GLOB")("*[0-9]*"),
            digits.op("NOT GLOB")("*[^0-9.]*"),
            digits.op("NOT GLOB")("*.*.*"),
            sa.or_(
                at == 0, sa.and_(exponent.op("NOT GLOB")("*[^0-9]*"), sa.func.length(exponent).between(1, 3))
            ),
        )
        return sa.case((is_number, self.finite(sa.cast(text, sa.REAL))))

    def joined(self, text: Expression, *order: Expression) -> Expression:  # noqa: ARG002
        return sa.func.group_concat(text, ", ")


SQLITE = OnSqlite()
