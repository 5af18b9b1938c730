"""The SQL expressions that the compiler needs from a database. None of them may fail because of the data that it reads.

on_sqlite.py and on_postgresql.py implement them.
"""

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import sqlalchemy as sa

from audience_sync.audiences import statement
from audience_sync.audiences.query import tree
from audience_sync.audiences.query.moments import moment_text
from audience_sync.audiences.values import FALSE_WORDS, TRUE_WORDS

_BLANKS = '" '  # removed from a text before it is converted
Expression: TypeAlias = sa.ColumnElement[Any]
LARGEST_DOUBLE: Expression = sa.literal_column("1.7976931348623157e308")


def execute(
    connection: sa.Connection, sql: str, as_of: dt.datetime = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
) -> sa.CursorResult[Any]:
    """Run a query only to inspect it; `:today` is then the day in UTC."""
    bound = statement.bind(sql, connection.dialect.name)
    style, moment = connection.dialect.paramstyle, as_of.astimezone(dt.UTC)
    values: dict[str, Any] = {"as_of": moment, "today": moment.date()}
    if connection.dialect.name == "sqlite":
        values = {"as_of": moment_text(moment)[:19], "today": moment.date().isoformat()}
    arguments = bound.arguments(style, values)
    if not arguments:
        return connection.exec_driver_sql(sql, execution_options={"no_parameters": True})
    return connection.exec_driver_sql(bound.render(style), arguments)


def described_columns(connection: sa.Connection, sql: str) -> list[tuple[str, Any]]:
    """Return the name of each column of a query, and its type as the driver reports it."""
    result = execute(connection, f"SELECT * FROM ({sql}\n) AS q LIMIT 0")
    columns = [(column[0], column[1]) for column in (result.cursor.description if result.cursor else ())]
    result.close()
    return columns


@dataclass(frozen=True, slots=True)
class TypedColumn:
    """A column with its kind, which catalog.py lists."""

    expression: Expression
    kind: str


def is_between(moment: Expression, after: Expression | None, until: Expression) -> Expression:
    """Return whether a moment is after one moment, if there is one, and not after another."""
    return moment <= until if after is None else sa.and_(moment > after, moment <= until)


def is_one_of(value: Any, literals: Sequence[Any]) -> Expression:
    is_one: Expression = value == literals[0] if len(literals) == 1 else value.in_(literals)
    return is_one


class JsonValue(ABC):
    """A value in a JSON document: for each kind, an expression that is null for a value of another kind."""

    @abstractmethod
    def at(self, step: str) -> "JsonValue":
        """Return a member of an object by its name; digits are also the index in a list."""

    @abstractmethod
    def items(self, name: str) -> "tuple[sa.FromClause, JsonValue]":
        """Return the items of a list as a table with their positions (`key`), and the value of an item.

        The table is empty if this is not a list.
        """

    @property
    @abstractmethod
    def exists(self) -> Expression: ...

    @property
    @abstractmethod
    def number(self) -> Expression: ...

    @property
    @abstractmethod
    def text(self) -> Expression: ...

    @property
    @abstractmethod
    def boolean(self) -> Expression: ...

    def is_text(self, texts: Sequence[str]) -> Expression:
        """Return whether this is one of these strings."""
        return is_one_of(self.text, texts)


class Dialect(ABC):
    """The expressions that differ between databases.

    `moment_kinds`: the kinds of columns that contain moments. `value_types`: for kinds of traits whose column does not
    show their type, the type to convert to. `has_semi_joins`: EXISTS is joined as a set, not looked up for each user, and
    so needs no grouped rows. `position`: the function that finds a text in another.
    """

    sqlalchemy: ClassVar[sa.Dialect]
    moment_kinds: ClassVar[frozenset[str]]
    value_types: ClassVar[Mapping[str, str]] = {}
    has_semi_joins: ClassVar[bool] = False
    position: ClassVar[Any]

    @abstractmethod
    def column_kinds(self, connection: sa.Connection, table: str | None, sql: str | None) -> dict[str, str]:
        """Return the kind of each column of a table or of a query."""

    @abstractmethod
    def json_of_column(self, column: TypedColumn) -> JsonValue: ...

    @abstractmethod
    def text_of(self, column: TypedColumn) -> Expression:
        """Return a column's text; a number has the same text as in a user id."""

    @abstractmethod
    def key_of(self, column: TypedColumn) -> Expression:
        """Return the expression by which columns of the same kind are compared: equal only if their texts are equal."""

    def are_same(self, own: TypedColumn, other: TypedColumn) -> Expression:
        """Return whether two columns are equal, in a form that can use an index of the first."""
        is_alike = own.kind == other.kind
        return (
            self.key_of(own) == self.key_of(other) if is_alike else self.text_of(own) == self.text_of(other)
        )

    # Moments.

    @abstractmethod
    def moment_literal(self, moment: dt.datetime) -> Expression: ...

    def moment_of(self, column: TypedColumn) -> Expression:
        """Return the moment of a timestamp column of any kind, or null."""
        if column.kind in self.moment_kinds:
            return self.moment_of_column(column)
        return self.moment_of_text(self.text_of(column))

    @abstractmethod
    def moment_of_column(self, column: TypedColumn) -> Expression:
        """Return the moment of a column of one of the `moment_kinds`, or null."""

    @abstractmethod
    def moment_of_text(self, text: Expression) -> Expression:
        """Return the moment that an ISO 8601 text names, or null."""

    @abstractmethod
    def moment_text(self, column: TypedColumn) -> Expression:
        """Return a column of a date or timestamp type as the language's text."""

    @abstractmethod
    def is_within(self, column: TypedColumn, after: dt.datetime | None, until: dt.datetime) -> Expression:
        """Return whether a column's moment is after one moment and not after another, in a form that can use an index."""

    @abstractmethod
    def is_within_parent(
        self, own: TypedColumn, parent: TypedColumn, window: tree.Window, until: dt.datetime
    ) -> Expression:
        """Return whether a column's moment is in a window from a parent's moment, which is not after `until`."""

    # Numbers and text.

    @abstractmethod
    def finite(self, number: Expression) -> Expression:
        """Return a number of any type as a double, null if no double can hold it."""

    @abstractmethod
    def number_of_column(self, column: TypedColumn) -> Expression: ...

    def boolean_of_column(self, column: TypedColumn) -> Expression:
        return column.expression

    def parts_of_any(self, column: TypedColumn) -> tuple[Expression, Expression]:
        """Return the number and the text of a column with values of any type, which only SQLite has."""
        return self.number_of_column(column), self.text_of(column)

    @abstractmethod
    def at_15_digits(self, number: Expression) -> Expression: ...

    def summed(self, number: Expression) -> Expression:
        """Return a number in the type in which numbers are summed."""
        return number

    def by_code_points(self, text: Expression) -> Expression:
        return text

    @abstractmethod
    def number_text(self, number: Expression) -> Expression:
        """Return a number as text in a list: whole numbers as integers, others with up to 15 digits."""

    @abstractmethod
    def number_of_text(self, text: Expression) -> Expression:
        """Return the number in a text, as a trait's `type` converts it; null if it has none."""

    def converted(self, parts: Mapping[str, Any], value_type: str) -> dict[str, Any]:
        """Return the value with these expressions by kind, converted to a trait's type; null if that is impossible."""
        number, text, boolean = (parts.get(kind) for kind in ("number", "text", "boolean"))
        word = None if text is None else sa.func.lower(sa.func.trim(text, _BLANKS))
        either: list[Any] = []
        match value_type:
            case "boolean":
                kind, either = "boolean", [boolean]
                if number is not None:
                    either.append(sa.case((number == 1, sa.true()), (number == 0, sa.false())))
                if word is not None:
                    either.append(
                        sa.case((word.in_(TRUE_WORDS), sa.true()), (word.in_(FALSE_WORDS), sa.false()))
                    )
            case "number":
                kind, either = "number", [number]
                if boolean is not None:
                    either.append(sa.case((boolean, 1.0), (~boolean, 0.0)))
                if text is not None:
                    either.append(self.number_of_text(sa.func.trim(text, _BLANKS)))
            case _:
                kind, either = "text", [text]
                if number is not None:
                    either.append(self.number_text(number))
                if boolean is not None:
                    either.append(sa.case((boolean, "true"), (~boolean, "false")))
        return {kind: sa.func.coalesce(*[part for part in either if part is not None], sa.null())}

    def date_literal(self, date: dt.date) -> str:
        """Return a date in SQL, as `:today` is bound."""
        return f"'{date.isoformat()}'"

    @abstractmethod
    def joined(self, text: Expression, *order: Expression) -> Expression:
        """Return the aggregate that joins texts with commas in this order, in which the rows already are."""

    @abstractmethod
    def json_of(self, parts: Mapping[str, Expression]) -> Expression:
        """Return the part that is not null, as JSON, which shows its kind."""
