"""The rows of a stream, their values, and the value that they are reduced to."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from audience_sync.audiences.query import tree
from audience_sync.audiences.query.catalog import ReadTable
from audience_sync.audiences.query.comparisons import (
    ABSENT,
    NUMBER_TESTS,
    Scope,
    SqlValue,
    any_of,
    by_kind,
    chain,
)
from audience_sync.audiences.query.dialect import Dialect, Expression, TypedColumn
from audience_sync.audiences.query.moments import moved
from audience_sync.audiences.query.tree import Reducer
from audience_sync.errors import ConfigError
from audience_sync.suggest import did_you_mean

if TYPE_CHECKING:
    from audience_sync.audiences.query.compiler import Users

COUNTS = {Reducer.COUNT, Reducer.COUNT_UNIQUE}


class Row(Scope):
    """A row of a stream: its columns, and the conditions that every row of the stream meets."""

    def __init__(self, users: "Users", stream: tree.Stream, parent: "Row | None") -> None:
        super().__init__(users.catalog, users.as_of)
        self.users, self.parent = users, parent
        self.table = self._find(stream)
        self.alias = users.alias(self.table)
        self.from_, self.user = user_of(users, self.table, self.alias)
        self.conditions: list[Expression] = [self.user.expression.is_not(None)]
        if parent is not None:
            self.conditions = [self._belongs_to(parent)]
        if stream.kind is tree.StreamKind.EVENT and self.table.event_name:
            self.conditions.append(self.alias.c[self.table.event_name] == stream.name)
        self._add_windows(stream)
        self.conditions += map(self.condition, stream.conditions)

    def _find(self, stream: tree.Stream) -> ReadTable:
        is_event = stream.kind is tree.StreamKind.EVENT
        table = self.catalog.event(stream.name) if is_event else self.catalog.tables.get(stream.name)
        if table is None:
            known = self.catalog.event_names() if is_event else list(self.catalog.tables)
            kind = f"{stream.kind}('{stream.name}')"
            raise ConfigError(
                f"{kind} is not mapped by [tables.*] on this database: {did_you_mean(stream.name, known)}"
            )
        return table

    def _belongs_to(self, parent: "Row") -> Expression:
        mapping = self.table.mapping
        if mapping.parent == parent.table.name:
            self.from_, self.user = self.alias, parent.user
            parent_id = parent.table.column(parent.alias, parent.table.mapping.id)
            return self.db.are_same(self.table.column(self.alias, mapping.parent_id), parent_id)
        return self.db.are_same(self.user, parent.user)

    @property
    def user_key(self) -> Expression:
        """Return the expression that identifies the user among user columns of the same kind."""
        return self.db.key_of(self.user)

    @property
    def user_text(self) -> Expression:
        return self.db.text_of(self.user)

    def _add_windows(self, stream: tree.Stream) -> None:
        if self.table.mapping.timestamp is None:
            if stream.windows:
                raise ConfigError(
                    f"{stream.kind}('{stream.name}') has no timestamp in [tables.*]: a window needs one"
                )
            return
        before_run = [window for window in stream.windows if not window.of_parent]
        for window in before_run:
            after, until = moved(self.as_of, -window.start), moved(self.as_of, -window.end)
            self.conditions.append(self.db.is_within(self.timestamp, after, until))
        if not before_run:
            self.conditions.append(self.db.is_within(self.timestamp, None, self.as_of))
        for window in stream.windows:
            if window.of_parent:
                self._add_parent_window(stream, window)

    def _add_parent_window(self, stream: tree.Stream, window: tree.Window) -> None:
        parent = self.parent
        assert parent is not None  # noqa: S101  (the parser checked)
        if parent.table.mapping.timestamp is None:
            name = parent.table.name
            raise ConfigError(
                f"[tables.{name}] has no timestamp: `parent:` in {stream.kind}('{stream.name}') needs one"
            )
        self.conditions.append(self.db.is_within_parent(self.timestamp, parent.timestamp, window, self.as_of))

    @property
    def timestamp(self) -> TypedColumn:
        return self.table.column(self.alias, self.table.mapping.timestamp)

    def order(self) -> list[Expression]:
        """Return the order of rows: by timestamp, then by arrival."""
        moments = [self.db.moment_of(self.timestamp)] if self.table.mapping.timestamp else []
        arrivals = [self.alias.c[self.table.arrival]] if self.table.arrival else []
        return [*moments, *arrivals]

    def property_value(self, scalar: tree.Property | tree.Context) -> tuple[list[sa.FromClause], SqlValue]:
        row = self.parent if scalar.of_parent else self
        assert row is not None  # noqa: S101  (the parser checked)
        is_context = isinstance(scalar, tree.Context)
        document = row.table.context if is_context else row.table.properties
        if is_context and document is None:
            return [], ABSENT
        return self.users.value_in(row.table, row.alias, document, scalar.path)

    def trait_value(self, path: tree.ValuePath) -> tuple[list[sa.FromClause], SqlValue]:
        return self.users.trait_of(path, self)

    def reduction(self, reduction: tree.Reduction) -> SqlValue:
        row = Row(self.users, reduction.stream, self)
        select = reduced(row, reduction, is_grouped=False)
        parts = {
            kind: select.with_only_columns(column, maintain_column_froms=True).scalar_subquery()
            for kind, column in by_kind(select.selected_columns).items()
        }
        return of_reduction(reduction, parts)

    def compared(self, compared: tree.Compared) -> Expression:
        is_there = asks_whether_any(compared)
        if is_there is None:
            return super().compared(compared)
        assert isinstance(compared.left, tree.Reduction)  # noqa: S101
        return Row(self.users, compared.left.stream, self).exists(is_there)

    def exists(self, is_there: bool, *conditions: Expression) -> Expression:
        """Return whether there are such rows; if `is_there` is false, whether there are none."""
        rows: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(self.from_)
        exists = sa.exists(rows.where(*self.conditions, *conditions).correlate_except())
        return exists if is_there else ~exists


def asks_whether_any(compared: tree.Compared) -> bool | None:
    """Return True if a comparison asks whether there are rows, False if it asks whether there are none, else None."""
    match compared.left, compared.arguments:
        case (
            tree.Reduction(reducer=Reducer.COUNT),
            (tree.Constant(int() | float() as number, is_boolean=False),),
        ) if compared.comparator in NUMBER_TESTS:
            none, one, most = (
                bool(NUMBER_TESTS[compared.comparator](count, number)) for count in (0, 1, math.inf)
            )
            return one if none != one == most else None
    return None


def of_reduction(reduction: tree.Reduction, parts: dict[str, Any]) -> SqlValue:
    if reduction.reducer is Reducer.UNIQUE:  # a list: it exists, and is of no kind that compares
        return SqlValue(parts["text"].is_not(None))
    if reduction.reducer in COUNTS:
        return SqlValue(sa.true(), number=sa.func.coalesce(parts["number"], 0))
    exists = any_of(part.is_not(None) for part in parts.values())
    return SqlValue(exists, **parts, is_rounded=reduction.reducer in {Reducer.SUM, Reducer.AVG})


def reduced(row: Row, reduction: tree.Reduction, *, is_grouped: bool) -> sa.Select[Any]:
    """Return the SELECT of the reduced values by kind: for each user (`user_id`) if grouped, else for the current row."""
    db, reducer = row.db, reduction.reducer
    keys = [row.user_text.label("user_id")] if is_grouped else []
    groups = [row.user_key] if is_grouped else []
    items, value = row.value(reduction.value) if reduction.value is not None else ([], ABSENT)
    from_ = chain([row.from_, *items])

    def rows(*columns: Expression, where: Expression | None = None) -> sa.Select[Any]:
        conditions = row.conditions if where is None else [*row.conditions, where]
        return sa.select(*columns).select_from(from_).where(*conditions).correlate_except()

    def relation(select: sa.Select[Any]) -> sa.FromClause:
        return row.users.relation(select, is_grouped=is_grouped)

    if reducer is Reducer.COUNT:
        return rows(*keys, sa.func.count().label("number")).group_by(*groups)
    simple: dict[Reducer, Callable[[Expression], Expression]] = {
        Reducer.SUM: lambda number: db.finite(sa.func.sum(db.summed(number))),
        Reducer.AVG: lambda number: db.finite(sa.func.avg(db.summed(number))),
        Reducer.MIN: sa.func.min,
        Reducer.MAX: sa.func.max,
    }
    if reducer in simple:
        kind = "text" if reduction.as_text else "number"
        part = value.kinds().get(kind, sa.null())
        if reduction.as_text:
            part = db.by_code_points(sa.cast(part, sa.Text))
        return rows(*keys, simple[reducer](part).label(kind)).group_by(*groups)
    kinds = value.kinds() or {"number": sa.cast(sa.null(), sa.REAL)}
    columns = [part.label(kind) for kind, part in kinds.items()]
    is_scalar = any_of(part.is_not(None) for part in kinds.values())
    place: Any
    if reducer in {Reducer.FIRST, Reducer.LAST}:
        places = [*row.order(), *(item.c.key for item in items)]
        order = [column.desc() if reducer is Reducer.LAST else column.asc() for column in places]
        place = sa.func.row_number().over(partition_by=groups, order_by=order).label("place")
        return _first_of(relation(rows(*keys, *columns, place, where=is_scalar)))
    scalars = relation(rows(*keys, *columns, where=is_scalar))
    counted = relation(sa.select(*scalars.c, sa.func.count().label("times")).group_by(*scalars.c))
    by_value = _by_value(db, counted, kinds)
    users = [counted.c.user_id] if is_grouped else []
    if reducer is Reducer.MODE:
        place = sa.func.row_number().over(partition_by=users, order_by=[counted.c.times.desc(), *by_value])
        ranked = sa.select(*counted.c, place.label("place")).where(counted.c.times >= reduction.least_count)
        return _first_of(relation(ranked))
    if reducer is Reducer.COUNT_UNIQUE:
        return sa.select(*users, sa.func.count().label("number")).select_from(counted).group_by(*users)
    ordered = relation(sa.select(*counted.c).order_by(*users, *by_value))
    users = [ordered.c.user_id] if is_grouped else []
    listed = db.joined(_shown(db, ordered, kinds), *_by_value(db, ordered, kinds)).label("text")
    return sa.select(*users, listed).group_by(*users)


def _first_of(ranked: sa.FromClause) -> sa.Select[Any]:
    columns = [column for column in ranked.c if column.name not in {"place", "times"}]
    return sa.select(*columns).where(ranked.c.place == 1)


def _by_value(db: Dialect, values: sa.FromClause, kinds: Iterable[str]) -> list[Expression]:
    """Return the order of values: numbers, then strings by code points, then false and true."""
    order: list[Expression] = []
    for kind in kinds:
        column = values.c[kind]
        order += [column.is_(None), db.by_code_points(column) if kind == "text" else column]
    return order


def _shown(db: Dialect, values: sa.FromClause, kinds: Iterable[str]) -> Expression:
    """Return the text of a value in a list."""
    texts: dict[str, Callable[[Any], Any]] = {
        "number": db.number_text,
        "text": lambda column: column,
        "boolean": lambda column: sa.case((column, "true"), (~column, "false")),
    }
    return sa.func.coalesce(*(texts[kind](values.c[kind]) for kind in kinds), sa.null())


def user_of(users: "Users", table: ReadTable, alias: sa.FromClause) -> tuple[sa.FromClause, TypedColumn]:
    """Return the FROM of a row with its user, and the column of the user's id. A nested row has its parent's user."""
    mapping = table.mapping
    if mapping.user_id is not None:
        return alias, table.column(alias, mapping.user_id)
    parent = users.catalog.tables[mapping.parent or ""]
    outer = users.alias(parent)
    from_, user = user_of(users, parent, outer)
    link = table.column(alias, mapping.parent_id), parent.column(outer, parent.mapping.id)
    return alias.join(from_, users.db.are_same(*link)), user
