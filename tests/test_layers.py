"""Who may import whom, as it is written in the code: every import statement, those inside functions too."""

import ast
import sys

import pytest

ROOT = {"errors", "clock", "crash", "stopping", "__version__"}
PURE = {"errors"}
BASE = ROOT | {"logs", "db"}
MAY_IMPORT = {
    "errors": set(),
    "clock": set(),
    "crash": set(),
    "stopping": set(),
    "logs": ROOT,
    "userpilot": PURE,
    "db": ROOT,
    "queue": BASE | {"userpilot"},
    "retention": BASE | {"queue"},
    "audiences": BASE | {"queue", "retention"},
    "calls": BASE | {"queue", "retention", "userpilot"},
    "history": BASE | {"queue"},
    "settings": ROOT | {"audiences", "calls"},
    "app": BASE | {"userpilot", "queue", "retention", "audiences", "calls", "settings"},
    "sandbox": set(),
    "intake": BASE | {"queue", "calls", "settings", "app"},
    "daemon": BASE | {"queue", "audiences", "app"},
}
ONLY_CLI_IMPORTS = {"cli", "daemon", "intake", "history", "sandbox"}
ONLY_STANDARD_LIBRARY = {"errors", "clock", "crash"}


def imports(path, package):
    """Of a file: each import as a dotted name; of our own package, which part of it."""
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


def test_errors_clock_and_crash_know_only_the_standard_library(parts):
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
