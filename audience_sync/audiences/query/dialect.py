"""The expressions that the compiler needs of a database. None may fail because of the data that it reads.

on_sqlite.py and on_postgresql.py have the databases.
"""

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import sqlalchemy as sa

Expression: TypeAlias = sa.ColumnElement[Any]


class JsonValue(ABC):
    """A value in a JSON document: for each kind, an expression that is null where it is of another one."""

    @abstractmethod
    def at(self, step: str) -> "JsonValue":
        """Return a member of an object by its name; digits are also the index in a list."""

    @abstractmethod
    def items(self, name: str) -> "tuple[sa.FromClause, JsonValue]":
        """Return the items of a list as a table, and the value of one; no items where it is no list."""

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

    `value_types`: what a trait's value must be converted to, by its kind, where its column cannot say.
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
    def text_of(self, column: Expression, kind: str) -> Expression: ...

    # Moments.

    @abstractmethod
    def moment_literal(self, moment: dt.datetime) -> Expression: ...

    @abstractmethod
    def moment_of(self, column: Expression, kind: str) -> Expression:
        """Return the moment of a timestamp column of any kind, null where it holds none."""

    @abstractmethod
    def moment_of_text(self, text: Expression) -> Expression:
        """Return the moment that an ISO 8601 text names, else null."""

    @abstractmethod
    def moment_text(self, column: Expression, kind: str) -> Expression:
        """Return a column of a date or timestamp type as the language's text."""

    @abstractmethod
    def shifted(self, moment: Expression, span: dt.timedelta) -> Expression: ...

    @abstractmethod
    def is_within(
        self, column: Expression, kind: str, after: dt.datetime | None, until: dt.datetime
    ) -> Expression:
        """Return whether a column's moment is after one moment and not after another, so that an index serves it."""

    # Numbers and text.

    @abstractmethod
    def number_of_column(self, column: Expression, kind: str) -> Expression: ...

    @abstractmethod
    def boolean_of_column(self, column: Expression) -> Expression: ...

    @abstractmethod
    def at_15_digits(self, number: Expression) -> Expression: ...

    @abstractmethod
    def total(self, number: Expression) -> Expression:
        """Return the sum, null where it is too large for a double."""

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
        """Return the aggregate that joins texts with commas in this order, in which the rows come already."""

    @abstractmethod
    def json_of(self, parts: Mapping[str, Expression]) -> Expression:
        """Return the part that is not null, in a form that shows of which kind it is."""
