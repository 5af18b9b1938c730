"""The expressions that the compiler needs from a database. No expression may fail because of the data that it reads.

on_sqlite.py and on_postgresql.py implement them.
"""

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import sqlalchemy as sa

Expression: TypeAlias = sa.ColumnElement[Any]
LARGEST_DOUBLE: Expression = sa.literal_column("1.7976931348623157e308")


def described_columns(result: sa.CursorResult[Any]) -> list[tuple[str, Any]]:
    """Return the name of each column of a result, and its type as the driver reports it; close the result."""
    columns = [(column[0], column[1]) for column in (result.cursor.description if result.cursor else ())]
    result.close()
    return columns


class JsonValue(ABC):
    """A value in a JSON document: for each kind, an expression that is null for a value of another kind."""

    @abstractmethod
    def at(self, step: str) -> "JsonValue":
        """Return a member of an object by its name; digits are also the index in a list."""

    @abstractmethod
    def items(self, name: str) -> "tuple[sa.FromClause, JsonValue]":
        """Return the items of a list as a table, and the value of one; the table is empty if this is not a list."""

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


class Dialect(ABC):
    """The expressions that differ between databases.

    `value_types` has the kinds of traits whose column does not show their type, with the type to convert to.
    """

    sqlalchemy: ClassVar[sa.Dialect]
    moment_kinds: ClassVar[frozenset[str]]
    value_types: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def column_kind(self, type_name: str) -> str:
        """Return how the language sees a column, by the name of its type."""

    @abstractmethod
    def column_types(
        self, connection: sa.Connection, table: str | None, described: list[tuple[str, Any]] | None
    ) -> dict[str, str]:
        """Return the name of the type of each column of a table, or of a query that the driver has described."""

    @abstractmethod
    def json_of_column(self, column: Expression, kind: str) -> JsonValue: ...

    @abstractmethod
    def parts_of_any(self, column: Expression) -> tuple[Expression, Expression]:
        """Return the number and the text of a column that holds values of any type."""

    @abstractmethod
    def text_of(self, column: Expression, kind: str) -> Expression:
        """Return a column's text; a number's is the one that it has as a user id."""

    @abstractmethod
    def key_of(self, column: Expression, kind: str) -> Expression:
        """Return what two columns of the same kind are compared by: equal only where their texts are equal."""

    # Moments.

    @abstractmethod
    def moment_literal(self, moment: dt.datetime) -> Expression: ...

    @abstractmethod
    def moment_of(self, column: Expression, kind: str) -> Expression:
        """Return the moment of a timestamp column of any kind, or null."""

    @abstractmethod
    def moment_of_text(self, text: Expression) -> Expression:
        """Return the moment that an ISO 8601 text names, or null."""

    @abstractmethod
    def moment_text(self, column: Expression, kind: str) -> Expression:
        """Return a column of a date or timestamp type as the language's text."""

    @abstractmethod
    def shifted(self, moment: Expression, span: dt.timedelta) -> Expression: ...

    @abstractmethod
    def is_within(
        self, column: Expression, kind: str, after: dt.datetime | None, until: dt.datetime
    ) -> Expression:
        """Return whether a column's moment is after one moment and not after another, in a form that can use an index."""

    # Numbers and text.

    @abstractmethod
    def number_of_column(self, column: Expression, kind: str) -> Expression: ...

    @abstractmethod
    def boolean_of_column(self, column: Expression) -> Expression: ...

    @abstractmethod
    def at_15_digits(self, number: Expression) -> Expression: ...

    @abstractmethod
    def total(self, number: Expression) -> Expression:
        """Return the sum, or null if it is too large for a double."""

    @abstractmethod
    def mean(self, number: Expression) -> Expression: ...

    @abstractmethod
    def by_code_points(self, text: Expression) -> Expression: ...

    @abstractmethod
    def contains(self, text: Expression, part: Expression) -> Expression: ...

    @abstractmethod
    def ends_with(self, text: Expression, part: Expression) -> Expression: ...

    @abstractmethod
    def number_text(self, number: Expression) -> Expression:
        """Return a number as a list shows it: whole ones as integers, others with up to 15 digits."""

    @abstractmethod
    def joined(self, text: Expression, *order: Expression) -> Expression:
        """Return the aggregate that joins texts with commas in this order; the rows are already in it."""

    @abstractmethod
    def json_of(self, parts: Mapping[str, Expression]) -> Expression:
        """Return the part that is not null, in a form that shows its kind."""
