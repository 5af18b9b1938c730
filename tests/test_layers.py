"""Who may import whom, as it is written in the code: every import statement, those inside functions too."""

import ast
import sys

import pytest

ROOT = {"errors", "clock", "crash", "stopping", "__version__"}
PURE = {"errors"}
MAY_IMPORT = {
    "errors": set(),
    "clock": set(),
    "crash": set(),
    "stopping": set(),
    "logs": ROOT,
    "definitions": PURE,
    "calls": PURE | {"userpilot"},
    "settings": ROOT | {"definitions", "calls"},
    "store": ROOT | {"definitions", "calls", "userpilot"},
    "userpilot": PURE,
    "sync": ROOT | {"logs", "definitions", "store"},
    "intake": ROOT
    | {"settings", "definitions", "calls", "store", "app"},  # its doors take the application, as `app`
    "delivery": ROOT | {"logs", "store", "userpilot"},
    "sandbox": set(),
    "app": ROOT | {"settings", "logs", "definitions", "calls", "store", "sync", "delivery", "userpilot"},
}
ONLY_CLI_IMPORTS = {"cli", "daemon", "web", "sandbox"}
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


def test_what_decides_touches_neither_database_nor_network(parts):
    for part in ("definitions", "calls"):
        touched = {name.split(".")[0] for name in parts[part]}
        assert not touched & {"sqlalchemy", "psycopg", "sqlite3", "httpx", "socket", "urllib", "http"}


def test_only_userpilot_speaks_http(parts):
    assert [
        part for part, imported in parts.items() if "httpx" in {name.split(".")[0] for name in imported}
    ] == ["userpilot"]
