"""Compile a query into one SELECT: `user_id`, and `value` for a trait.

An outermost stream becomes a common table expression, grouped by user, which is joined to the users. A stream inside a
`where` becomes a correlated subquery of the current row (rows.py). If the query is false for everybody without rows in
its streams, the users are read from the streams alone, so that an index on the events can be used. comparisons.py
compiles the conditions; on_sqlite.py and on_postgresql.py have the differences between databases.
"""

import datetime as dt
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import sqlalchemy as sa

from audience_sync.audiences import statement
from audience_sync.audiences.query import tree
from audience_sync.audiences.query.catalog import Catalog, ReadTable, sql_text
from audience_sync.audiences.query.comparisons import (
    ABSENT,
    NUMBER_TESTS,
    Scope,
    SqlValue,
    any_of,
    by_kind,
)
from audience_sync.audiences.query.configured import QueryDefinition
from audience_sync.audiences.query.dialect import Expression, TypedColumn
from audience_sync.audiences.query.rows import COUNTS, Row, asks_whether_any, of_reduction, reduced, user_of
from audience_sync.audiences.query.tree import ANY_ITEM, Comparator, Reducer
from audience_sync.audiences.schedule import load_zone
from audience_sync.errors import ConfigError

_DOCUMENT_KINDS = {"document", "json", "jsonb"}
_TEXT_KINDS = {"integer", "number", "real", "money", "any"}  # their text may have more digits than a double


@dataclass(frozen=True, slots=True)
class CompiledQuery:
    """The SELECT of a definition. `value_type`: the type of a trait's value if its column does not show it."""

    sql: str
    value_type: str | None = None


def compile_query(
    query: tree.Query, catalog: Catalog, as_of: dt.datetime, *, is_trait: bool
) -> CompiledQuery:
    """Return the SELECT of an audience's or a trait's query on the catalog's database.

    Raises:
        ConfigError: the query names a table that does not exist there, or needs a timestamp that is not mapped.

    """
    users = Users(catalog, as_of)
    select, kind = users.trait(query) if is_trait else (users.audience(query), None)  # type: ignore[arg-type]
    return CompiledQuery(statement_text(select, catalog), users.db.value_types.get(kind or ""))


def statement_text(select: sa.Select[Any], catalog: Catalog) -> str:
    """Return a SELECT as text, in which every literal is quoted."""
    return str(select.compile(dialect=catalog.db.sqlalchemy, compile_kwargs={"literal_binds": True}))


@dataclass(frozen=True, slots=True)
class _Joined:
    """A relation that is joined to the users, with the text of its user id."""

    from_: sa.FromClause
    user_id: Expression


def _is_stream(key: Any) -> bool:
    """Return whether a joined relation is a reduced stream, which contains few of all users and can use an index."""
    return isinstance(key, tree.Reduction)


class Users(Scope):
    """The users of a query, and the relations joined to them: reduced streams, profiles, definitions."""

    def __init__(
        self,
        catalog: Catalog,
        as_of: dt.datetime,
        parents: tuple[str, ...] = (),
        names: Iterator[int] | None = None,
    ) -> None:
        super().__init__(catalog, as_of.astimezone(dt.UTC))
        self._parents = parents  # keys of the definitions that this query is a part of
        self._joined: dict[Any, _Joined] = {}  # by reduction, by table name, by ("definition", key)
        self._read: dict[Any, ReadTable] = {}  # by place: mapped tables that the query names
        self._names = names or itertools.count(1)  # one series for a statement
        self._users_name = self.name() if parents else "users"
        self._user_id: Expression | None = None  # of an audience's users

    def name(self) -> str:
        return f"q{next(self._names)}"

    def alias(self, table: ReadTable) -> sa.FromClause:
        self._read[table.place] = table
        return table.from_clause(self.name())

    def relation(self, select: sa.Select[Any], *, is_grouped: bool) -> sa.FromClause:
        """Return a SELECT as a relation: a common table expression if it is grouped by user, else a subquery."""
        return select.cte(self.name()) if is_grouped else select.subquery(self.name())

    def only_table(self) -> sa.FromClause | None:
        """Return the one table that is joined so far."""
        return next((joined.from_ for joined in self._joined.values()), None)

    # The selected users and values.

    def audience(self, condition: tree.Condition) -> sa.Select[Any]:
        drivers = self._drivers(condition)
        self._user_id = self._driving_user_id(drivers)
        where = self.condition(condition)
        from_, user_id = self._from(drivers)
        return sa.select(user_id.label("user_id")).select_from(from_).where(where)

    def trait(self, query: tree.Query) -> tuple[sa.Select[Any], str]:
        """Return the SELECT of a trait, and the kind of its value."""
        if isinstance(query, tree.Condition):
            return self.audience(query).add_columns(sa.true().label("value")), "boolean"
        parts, select = self.scalar_parts(query)
        kind, column = next(iter(parts.items())) if len(parts) == 1 else ("json", self.db.json_of(parts))
        return select.add_columns(column.label("value")), kind

    def scalar_parts(self, query: tree.Scalar) -> tuple[dict[str, Expression], sa.Select[Any]]:
        """Return a scalar's expressions by kind, and the SELECT of the users who have it."""
        items, value = self.value(query)
        if items:
            raise ConfigError("a trait has one value for each user: a path with $ gives several")
        parts = value.kinds()
        drivers: list[Any] | None = self._drivers(tree.Compared(query, Comparator.EXISTS))
        if isinstance(query, tree.Reduction):  # a count of 0 is not a value
            relation, drivers = self._joined[query].from_, [query]
            parts = by_kind(relation.c)
            if query.reducer in {Reducer.SUM, Reducer.AVG}:
                parts["number"] = self.db.at_15_digits(parts["number"])
        from_, user_id = self._from(drivers)
        is_there = any_of(part.is_not(None) for part in parts.values())
        return parts, sa.select(user_id.label("user_id")).select_from(from_).where(is_there)

    def _from(self, drivers: list[Any] | None) -> tuple[sa.FromClause, Expression]:
        """Return the FROM that joins everything to the users of the drivers, or to all users if `drivers` is None."""
        joined = dict(self._joined)
        if drivers is not None and len(drivers) == 1:
            first = joined.pop(drivers[0])
        else:
            relations = [self._joined[key] for key in drivers] if drivers is not None else self._all_users()
            selects = [sa.select(part.user_id.label("user_id")).select_from(part.from_) for part in relations]
            users = sa.union(*selects).cte(self._users_name)
            first = _Joined(users, users.c.user_id)
        from_ = first.from_
        for other in joined.values():
            from_ = from_.outerjoin(other.from_, other.user_id == first.user_id)
        return from_, first.user_id

    def _driving_user_id(self, drivers: list[Any] | None) -> Expression:
        """Return the id of the users of the drivers, or of all users, as a subquery refers to it."""
        for driver in drivers or ():
            self._join(driver)
        if drivers is None or len(drivers) != 1:
            return sa.literal_column(f"{self._users_name}.user_id")
        return self._joined[drivers[0]].user_id

    def _join(self, key: Any) -> None:
        """Join a reduced stream, a definition or a table of profiles by its key."""
        if key in self._joined:
            return
        match key:
            case tree.Reduction():
                select = reduced(Row(self, key.stream, None), key, is_grouped=True)
                relation = self.relation(select, is_grouped=True)
                self._joined[key] = _Joined(relation, relation.c.user_id)
            case ("definition", name):
                relation = self._definition_relation(name, self.catalog.definitions[name])
                self._joined[key] = _Joined(relation, relation.c.user_id)
            case _:
                self._joined[key] = self._of_table(self._profile_table(key))

    def _profile_table(self, name: str) -> ReadTable:
        return next(table for table in self.catalog.profile_tables() if table.name == name)

    def _all_users(self) -> list[_Joined]:
        """Return the relations of all users who have a profile or are in a table that the query names."""
        profiles = self.catalog.profile_tables()
        tables = {table.place: table for table in [*profiles, *self._read.values()]}
        if self.catalog.profiles in profiles:  # every user with an event in our table has a profile, too
            tables = {place: table for place, table in tables.items() if table is not self.catalog.events}
        if not tables:
            raise ConfigError(
                "the query names no table of users on its source: mark one of its [tables.*] with profile = true, "
                "so that traits have users"
            )
        return [self._of_table(table, only_user=True) for table in tables.values()]

    def _of_table(self, table: ReadTable, *, only_user: bool = False) -> _Joined:
        alias = self.alias(table)
        from_, user = user_of(self, table, alias)
        text = self.db.text_of(user)
        if not only_user:
            return _Joined(from_, text)
        ids = sa.select(text.label("user_id")).select_from(from_).where(user.expression.is_not(None))
        users = (ids if table is self.catalog.profiles else ids.distinct()).subquery(self.name())
        return _Joined(users, users.c.user_id)

    def _drivers(self, condition: tree.Condition) -> list[Any] | None:
        """Return the keys of joined relations that contain every user with a true condition; None if unknown."""
        match condition:
            case tree.Conjunction(operands):
                sets = [drivers for operand in operands if (drivers := self._drivers(operand)) is not None]
                return min(
                    sets, key=lambda drivers: (len(drivers), not all(map(_is_stream, drivers))), default=None
                )
            case tree.Disjunction(operands):
                either = dict[Any, None]()
                for operand in operands:
                    drivers = self._drivers(operand)
                    if drivers is None:
                        return None
                    either |= dict.fromkeys(drivers)
                return list(either)
            case tree.Compared(tree.Reduction() as left):
                return None if self._is_true_without_rows(condition) else [left]
            case tree.Compared(tree.Trait(path), comparator):
                if comparator in {Comparator.ABSENT, Comparator.OMITS}:
                    return None
                key = self._trait_key(path)
                return None if key is None or self._is_audience(key) else [key]
        return None

    def _is_true_without_rows(self, compared: tree.Compared) -> bool:
        """Return whether a comparison may be true for a user without rows, such as a count of 0 or an absent value."""
        left, comparator = compared.left, compared.comparator
        assert isinstance(left, tree.Reduction)  # noqa: S101
        if left.reducer not in COUNTS:
            return comparator in {Comparator.ABSENT, Comparator.OMITS}
        match compared.arguments:
            case (tree.Constant(int() | float() as number, is_boolean=False),) if comparator in NUMBER_TESTS:
                return bool(NUMBER_TESTS[comparator](0, number))
        return True

    # Scalars.

    def property_value(self, scalar: tree.Property | tree.Context) -> NoReturn:
        raise AssertionError(f"the parser refuses a property outside of a stream: {scalar}")

    def compared(self, compared: tree.Compared) -> Expression:
        left = compared.left
        if not isinstance(left, tree.Reduction) or left.reducer not in COUNTS:
            return super().compared(compared)
        is_there = asks_whether_any(compared)
        is_joined = left in self._joined or self._user_id is None
        if is_there is not None and not is_joined and self._is_looked_up(left.stream):
            row = Row(self, left.stream, None)
            return row.exists(is_there, row.user_text == self._user_id)
        self._join(left)
        if is_there is not None:
            user_id = self._joined[left].user_id
            return user_id.is_not(None) if is_there else user_id.is_(None)
        if self._is_true_without_rows(compared):
            return super().compared(compared)
        number = self._joined[left].from_.c.number
        return self._test(compared, SqlValue(number.is_not(None), number=number))

    def _is_looked_up(self, stream: tree.Stream) -> bool:
        """Return whether EXISTS is faster than grouping: it is joined as a set, or the stream is all our events."""
        is_ours = (
            stream.kind is tree.StreamKind.EVENT and self.catalog.event(stream.name) is self.catalog.events
        )
        return self.db.has_semi_joins or (is_ours and not stream.windows)

    def reduction(self, reduction: tree.Reduction) -> SqlValue:
        self._join(reduction)
        return of_reduction(reduction, by_kind(self._joined[reduction].from_.c))

    def _trait_key(self, path: tree.ValuePath) -> Any:
        """Return the origin of a trait: ("definition", key), a table's name, or None if nobody has it."""
        name = path.steps[0]
        if len(path.steps) == 1 and name in self.catalog.definitions:
            return ("definition", name)
        for table in self.catalog.profile_tables():
            if table.properties is not None or name in table.columns:
                return table.name
        return None

    def _is_audience(self, key: Any) -> bool:
        """Return whether a trait's key belongs to an audience, which has a value for every user."""
        return isinstance(key, tuple) and not self.catalog.definitions[key[1]].is_trait

    def trait_value(self, path: tree.ValuePath) -> tuple[list[sa.FromClause], SqlValue]:
        key = self._trait_key(path)
        if key is None:
            return [], ABSENT
        if isinstance(key, tuple):
            return [], self._definition_value(key)
        self._join(key)
        table = self._profile_table(key)
        return self.value_in(table, self._joined[key].from_, table.properties, path)

    def _definition_value(self, key: tuple[str, str]) -> SqlValue:
        self._join(key)
        relation = self._joined[key].from_
        if self._is_audience(key):
            return SqlValue(sa.true(), boolean=relation.c.user_id.is_not(None))
        parts = by_kind(relation.c)
        return SqlValue(any_of(part.is_not(None) for part in parts.values()), **parts)

    def _definition_relation(self, key: str, definition: QueryDefinition) -> sa.FromClause:
        if key in self._parents:
            circle = " → ".join([*self._parents[self._parents.index(key) :], key])
            raise ConfigError(f"these definitions refer to each other: {circle}")
        if definition.query is None:
            return self._sql_relation(key, definition)
        users = Users(self.catalog, self.as_of, (*self._parents, key), self._names)
        if isinstance(definition.query, tree.Condition):
            select = users.audience(definition.query).distinct()
            parts: dict[str, Expression] = {"boolean": sa.true()} if definition.is_trait else {}
        else:
            parts, select = users.scalar_parts(definition.query)
        return select.add_columns(*self._labelled(parts, definition)).cte(self.name())

    def _sql_relation(self, key: str, definition: QueryDefinition) -> sa.FromClause:
        """Return the users of a definition in SQL, with a trait's value by kind."""
        kinds = self.catalog.definition_columns[key]
        today = self.as_of.astimezone(load_zone(definition.timezone)).date()
        bound = statement.bind(definition.sql, self.catalog.dialect)
        sql = bound.with_literal("today", self.db.date_literal(today))
        rows = sql_text(sql).columns(*map(sa.column, kinds)).subquery(self.name())
        by_name = {name.lower(): TypedColumn(rows.c[name], kind) for name, kind in kinds.items()}
        user = by_name["user_id"]
        columns = [self.db.text_of(user).label("user_id")]
        if definition.is_trait:
            value = by_name["value"]
            parts = self._value_of_column(value).kinds()
            is_text = set(parts) <= {"number", "text"} and value.kind in _TEXT_KINDS
            if definition.value_type == "string" and is_text:
                parts = {"text": self.db.text_of(value)}  # with all digits
            columns += self._labelled(parts, definition)
        return sa.select(*columns).where(user.expression.is_not(None)).distinct().cte(self.name())

    def _labelled(self, parts: dict[str, Any], definition: QueryDefinition) -> list[Any]:
        """Return a trait's value by kind, converted to the definition's type."""
        if definition.value_type is not None:
            parts = self.db.converted(parts, definition.value_type)
        return [part.label(kind) for kind, part in parts.items()]

    def trait_of(self, path: tree.ValuePath, row: "Row") -> tuple[list[sa.FromClause], SqlValue]:
        """Return a trait of a row's user, by correlated subqueries."""
        users = Users(self.catalog, self.as_of, self._parents, self._names)
        items, value = users.trait_value(path)
        if not users._joined:
            return items, value
        ((key, joined),) = users._joined.items()
        if items:
            table = users._profile_table(key)
            own = sa.select(*joined.from_.c).where(joined.user_id == row.user_text).correlate_except()
            profile = own.subquery(self.name())
            items, value = self.value_in(table, profile, table.properties, path)
            return [profile, *items], value

        def of_user(part: Expression) -> Expression:
            of_row = sa.select(part).select_from(joined.from_).where(joined.user_id == row.user_text)
            return of_row.correlate_except().limit(1).scalar_subquery()

        parts: dict[str, Any] = {kind: of_user(part) for kind, part in value.kinds().items()}
        if self._is_audience(key):
            return [], SqlValue(sa.true(), boolean=sa.func.coalesce(parts["boolean"], sa.false()))
        moment = None if value.moment is None else of_user(value.moment)
        return [], SqlValue(sa.func.coalesce(of_user(value.exists), sa.false()), **parts, moment=moment)

    def value_in(
        self, table: ReadTable, alias: sa.FromClause, document: str | None, path: tree.ValuePath
    ) -> tuple[list[sa.FromClause], SqlValue]:
        """Return a value of a table's row: a member of our JSON document, a column, or a member of a JSON column."""
        first, *rest = path.steps
        name, steps = (document, path.steps) if document is not None else (first, tuple(rest))
        if name not in table.columns:
            return [], ABSENT
        column = table.column(alias, name)
        if column.kind in _DOCUMENT_KINDS:
            return self._value_in_json(self.db.json_of_column(column), steps)
        return [], ABSENT if steps else self._value_of_column(column)

    def _value_in_json(self, value: Any, steps: tuple[str, ...]) -> tuple[list[sa.FromClause], SqlValue]:
        items = []
        for step in steps:
            if step == ANY_ITEM:
                table, value = value.items(self.name())
                items.append(table)
            else:
                value = value.at(step)
        return items, SqlValue(value.exists, value.number, value.text, value.boolean, document=value)

    def _value_of_column(self, column: TypedColumn) -> SqlValue:
        exists = column.expression.is_not(None)
        if column.kind in self.db.moment_kinds:
            return SqlValue(exists, text=self.db.moment_text(column), moment=self.db.moment_of(column))
        match column.kind:
            case "any":
                return SqlValue(exists, *self.db.parts_of_any(column))
            case "integer" | "number" | "real" | "money":
                return SqlValue(exists, number=self.db.number_of_column(column))
            case "boolean":
                return SqlValue(exists, boolean=self.db.boolean_of_column(column))
        return SqlValue(exists, text=self.db.text_of(column))
