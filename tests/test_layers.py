"""Which package may import which, and which writes which table, as read from the code."""

import ast
import re
import sys

import pytest

from audience_sync.db import tables

ROOT = {"errors", "clock", "crash", "stopping", "suggest", "__version__"}
PURE = {"errors"}
BASE = ROOT | {"logs", "db"}
MAY_IMPORT = {
    "errors": set(),
    "clock": set(),
    "crash": set(),
    "stopping": set(),
    "suggest": set(),
    "logs": ROOT,
    "userpilot": PURE,
    "db": ROOT,
    "queue": BASE | {"userpilot"},
    "retention": BASE | {"userpilot", "queue"},
    "audiences": BASE | {"queue", "retention"},
    "calls": BASE | {"queue", "retention", "userpilot"},
    "history": BASE | {"queue", "retention", "audiences", "settings"},
    "settings": ROOT | {"audiences", "calls"},
    "app": BASE | {"userpilot", "queue", "retention", "audiences", "calls", "settings"},
    "sandbox": set(),
    "remote": set(),
    "intake": BASE | {"queue", "calls", "settings", "app", "remote"},
    "daemon": BASE | {"queue", "audiences", "app"},
    "web": BASE | {"queue", "audiences", "settings", "app", "history", "remote"},
}
ONLY_CLI_IMPORTS = {"cli", "daemon", "intake", "sandbox", "web"}
ONLY_STANDARD_LIBRARY = {"errors", "clock", "crash", "suggest"}


def imports(path, package):
    """Yield each import of a file as a dotted name; for our own package, with the imported part."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively: write the whole name"
            if node.module == package:
                yield from (f"{package}.{alias.name}" for alias in node.names)
            elif node.module != "__future__":
                yield node.module


@pytest.fixture
def parts(repository):
    """Each part of the package (a folder or a module) with all that it imports."""
    found = {}
    for path in sorted((repository / "audience_sync").rglob("*.py")):
        part = path.relative_to(repository / "audience_sync").parts[0].removesuffix(".py")
        if part not in {"__init__", "__main__"}:
            found.setdefault(part, set()).update(imports(path, "audience_sync"))
    return found


def ours(imported):
    return {name.split(".")[1] for name in imported if name.startswith("audience_sync.")}


def test_each_part_imports_only_what_stands_below_it(parts):
    for part, allowed in MAY_IMPORT.items():
        surplus = ours(parts.get(part, set())) - allowed - {part}
        assert not surplus, f"{part} imports {sorted(surplus)}"


def test_every_part_has_its_rule(parts):
    assert set(parts) <= set(MAY_IMPORT) | ONLY_CLI_IMPORTS


def test_only_the_command_line_imports_what_stands_on_top(parts):
    for part, imported in parts.items():
        if part != "cli":
            assert not (ours(imported) - {part}) & ONLY_CLI_IMPORTS, part


def test_errors_clock_crash_and_suggest_import_only_the_standard_library(parts):
    for part in ONLY_STANDARD_LIBRARY:
        assert {name.split(".")[0] for name in parts[part]} <= sys.stdlib_module_names


PURE_MODULES = (
    "audiences/definition.py",
    "audiences/schedule.py",
    "audiences/statement.py",
    "calls/directives.py",
    "calls/fql.py",
    "calls/mappings.py",
    "calls/model.py",
    "calls/operations.py",
    "calls/validation.py",
    "queue/outcomes.py",
    "queue/split.py",
    "queue/pace.py",
)


def test_pure_modules_touch_neither_database_nor_network(repository):
    for name in PURE_MODULES:
        path = repository / "audience_sync" / name
        touched = {imported.split(".")[0] for imported in imports(path, "audience_sync")}
        assert not touched & {"sqlalchemy", "psycopg", "sqlite3", "httpx", "socket", "urllib", "http"}, name


def test_only_userpilot_speaks_http(parts):
    assert [
        part for part, imported in parts.items() if "httpx" in {name.split(".")[0] for name in imported}
    ] == ["userpilot"]


# Where each table is written. retention/ deletes from every table, and keeps the counts and marks that then differ.
OWNERS = {
    "definitions": "audiences",
    "runs": "audiences",
    "members": "audiences",
    "past_members": "audiences",
    "schedule_slots": "audiences",
    "deliveries": "queue/deliveries.py",
    "requests": "queue",
    "bulk_jobs": "queue",
    "destination": "queue/destination.py",
    "calls": "calls",
    "profiles": "calls",
    "companies": "calls",
    "events": "calls",
    "forgotten": "retention",
    "leases": "db",
    "sessions": "web/sessions.py",
    "actions": "web/record.py",
}
EXCEPTION = "retention"
SQL_WRITE = re.compile(r"\b(?:INSERT\s+INTO|UPDATE|DELETE\s+FROM)\s+\{{1,2}our\}{1,2}(\w+|\{)", re.IGNORECASE)


def written_tables(source):
    """Names of the tables that a module writes: by SQLAlchemy, by `rows`, or in SQL text.

    Where the name is computed, that may be any table that the module refers to.
    """
    tree = ast.parse(source)
    for name in _written_names(tree):
        if name in OWNERS:
            yield name
        else:
            yield from {table_name(node) for node in ast.walk(tree)} & set(OWNERS)


def _written_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method = node.func.value, node.func.attr
            if method in {"insert", "update"} and table_name(owner) == "rows":
                yield table_name(node.args[1])
            elif method in {"insert", "update", "delete"} and table_name(owner) in OWNERS:
                yield table_name(owner)
        elif isinstance(node, ast.JoinedStr | ast.Constant):
            yield from SQL_WRITE.findall(ast.unparse(node))


def table_name(node):
    """`deliveries` of a node `deliveries` or `tables.deliveries`."""
    return getattr(node, "id", None) or getattr(node, "attr", None)


def foreign_writes(place, source):
    """The tables that a module writes though it does not own them."""
    written = set(written_tables(source)) if not place.startswith(f"{EXCEPTION}/") else set()
    return {table for table in written if not place.startswith(OWNERS.get(table, "nobody"))}


def test_every_table_has_an_owner():
    assert set(tables.metadata.tables) == set(OWNERS)


def test_each_table_is_written_by_its_owner_only(repository):
    package = repository / "audience_sync"
    for path in sorted(package.rglob("*.py")):
        place = str(path.relative_to(package))
        assert not foreign_writes(place, path.read_text()), place


def test_each_owner_writes_its_tables(repository):
    package = repository / "audience_sync"
    written = set()
    for path in package.rglob("*.py"):
        written |= set(written_tables(path.read_text()))
    assert written >= set(OWNERS)


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("sql(connection, 'UPDATE {our}deliveries SET status = 1')", "deliveries"),
        ("sql(connection, f'DELETE FROM {{our}}deliveries WHERE {where}')", "deliveries"),
        ("sql(connection, 'INSERT  INTO {our}runs (key) VALUES (1)')", "runs"),
        ("connection.execute(tables.requests.delete().where(old))", "requests"),
        ("connection.execute(deliveries.insert().values(row))", "deliveries"),
        ("rows.update(connection, tables.profiles, columns, new)", "profiles"),
        ("sql(connection, f'DELETE FROM {{our}}{leases}')", "leases"),
        ("def add(table): rows.insert(connection, table, columns, new)\nadd(tables.events)", "events"),
    ],
)
def test_a_foreign_statement_is_noticed(statement, table):
    assert foreign_writes("history/runs.py", statement) == {table}
