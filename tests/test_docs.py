"""Every command, query, configuration and program in the README and docs/ works.

A page is a script: its blocks run in order in a new folder, together with a local Userpilot. Comments that readers
do not see say what a block needs; CONTRIBUTING.md lists them. UPDATE_DOCS=1 writes the output that the commands
print into the pages.
"""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
import typer

from audience_sync import errors, settings
from audience_sync.cli.main import app
from audience_sync.db import dialects, engines, tables
from audience_sync.queue import deliveries
from audience_sync.sandbox import Sandbox
from tests.acceptance.killing import KINDS
from tests.test_layers import OWNERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ENVIRON = {
    "DB_PASSWORD": "x",
    "USERPILOT_API_KEY": "sandbox",
    "WRITE_KEY": "z",
    "SHOP_DATABASE_URL": "sqlite://",
}
SHOWN_POSTGRESQL = "postgresql://audience_sync:${DB_PASSWORD}@localhost/shop"
SHOWN_PORTS = ("8787", "8788", "8040")
CHANGES_EACH_TIME = re.compile(
    r"\d+(\.\d+)? (s|seconds)\b|less than a second|20[2-9]\d-\d\d-\d\d \d\d:\d\d|\b\d\d-\d\d \d\d:\d\d"
    r"|[\d,]+ requests|\s*─+|process \d+ on \S+"
)
START_SECONDS = 30


@dataclass
class Block:
    """A fenced block: its language, text and line, and the comments before it."""

    language: str
    text: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)


def blocks(path):
    found, marks, lines = [], {}, iter(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if line.strip() == "<!-- setup":
            commands = _until(lines, "-->")
            found.append(Block("setup", "\n".join(commands), number))
        elif mark := re.fullmatch(r"\s*<!-- ([a-z ]+?)(?:: (.*))? -->", line):
            marks[mark[1]] = mark[2] or ""
        elif fence := re.fullmatch(r"( *)```([a-z]+)", line):
            text = [each.removeprefix(fence[1]) for each in _until(lines, "```")]
            found.append(Block(fence[2], "\n".join(text) + "\n", number, marks))
            marks = {}
    return found


def _until(lines, end):
    taken = []
    for _, line in lines:
        if line.strip() == end:
            return taken
        taken.append(line)
    raise AssertionError(f"no {end}")


def all_blocks(language):
    return [
        pytest.param(block, id=f"{name}:{block.line}")
        for page, name in zip(PAGES, NAMES, strict=True)
        for block in blocks(page)
        if block.language == language
    ]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


class Reader:
    """A person who follows a page: types its commands, writes its files, opens other terminals."""

    def __init__(self, folder, page, database_url=""):
        self.folder, self.page, self.database_url = folder, page, database_url
        self.ports = {shown: free_port() for shown in SHOWN_PORTS}
        self.running, self.output = [], ""
        self.environ = {
            name: value for name, value in os.environ.items() if "AUDIENCE_SYNC" not in name
        } | ENVIRON
        self.environ |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "100",
        }

    def real(self, text):
        for shown, port in self.ports.items():
            text = text.replace(shown, port)
        text = re.sub(
            r"audience-sync sandbox(?! --port)", f"audience-sync sandbox --port {self.ports['8787']}", text
        )
        text = re.sub(
            r"audience-sync serve(?! --port)", f"audience-sync serve --port {self.ports['8040']}", text
        )
        return text.replace(SHOWN_POSTGRESQL, self.database_url or SHOWN_POSTGRESQL)

    def shown(self, text):
        for shown, port in self.ports.items():
            text = text.replace(port, shown)
        return text.replace(str(self.folder), ".")

    def follow(self, block):
        if "edit" in block.marks:
            path, _, change = block.marks["edit"].partition(" ")
            old, new = change.split(" => ")
            before = (self.folder / path).read_text()
            assert old in before, f"{self.page}:{block.line}: {path} does not contain {old}"
            (self.folder / path).write_text(before.replace(old, new))
        if "file" in block.marks:
            target = self.folder / block.marks["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self.real(block.text))
        elif block.language in {"sh", "setup"} and "not run" not in block.marks:
            if "another terminal" in block.marks:
                self.open_terminal(block)
            else:
                self.type(block)
        elif block.language == "python" and "not run" not in block.marks:
            subprocess.run(
                [sys.executable, "-c", self.real(block.text)], cwd=self.folder, env=self.environ, check=True
            )

    def type(self, block):
        kept = self.folder / ".environment"
        keep = f'export -p > {kept}; echo cd "$PWD" >> {kept}'
        begin = f"trap 'status=$?; {keep}; exit $status' EXIT\n[ -f {kept} ] && . {kept}\nset -e\n"
        done = subprocess.run(
            ["bash", "-c", begin + self.real(block.text)],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        self.output = self.shown(done.stdout)
        expected = int(block.marks.get("exit", "0"))
        where = f"{self.page}:{block.line}"
        assert done.returncode == expected, (
            f"{where} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        assert "Traceback" not in done.stderr

    def open_terminal(self, block):
        log = self.folder / f".terminal-{len(self.running)}"
        with log.open("w") as output:
            self.running.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {self.real(block.text).strip()}"],
                    cwd=self.folder, env=self.environ, stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        self._wait_for(log, block)

    def _wait_for(self, log, block):
        end = time.monotonic() + START_SECONDS
        while not log.read_text():
            assert self.running[-1].poll() is None, f"{self.page}:{block.line} ended"
            assert time.monotonic() < end, f"{self.page}:{block.line} printed nothing"
            time.sleep(0.05)

    def close(self):
        for process in self.running:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """The folder of somebody who has synced an audience, with its local Userpilot: how-to pages begin in a copy."""
    reader = Reader(tmp_path_factory.mktemp("shop"), "shop")
    with Sandbox(port=int(reader.ports["8787"])):
        load_orders(sa.create_engine(f"sqlite:///{reader.folder}/shop.db"))
        reader.follow(Block("toml", CONFIGURATION, 0, {"file": "config/audience_sync.toml"}))
        reader.follow(Block("sh", "audience-sync sync\n", 0))
        yield reader


@pytest.fixture
def read_page(tmp_path, request):
    """Opens a page: in an empty folder, or, for how-to pages, in a copy of the shop's."""
    readers = []

    def open_page(name):
        database_url = ""
        if SHOWN_POSTGRESQL in (ROOT / name).read_text():
            server = request.getfixturevalue("postgres")
            database_url = server.url(server.create())
            load_orders(sa.create_engine(database_url))
        reader = Reader(tmp_path, name, database_url)
        readers.append(reader)
        if name.startswith("docs/how-to/"):
            shop = request.getfixturevalue("shop")
            reader.ports["8787"] = shop.ports["8787"]
            for part in ("shop.db", "audience_sync.db", "config"):
                copy = shutil.copytree if part == "config" else shutil.copy
                copy(shop.folder / part, tmp_path / part)
        return reader

    yield open_page
    for reader in readers:
        reader.close()


ORDERS = [
    ("12347", 1, 224.82),
    ("12350", 3, 51.0),
    ("12360", 12, 2100.5),
    ("me", 2, 10.0),
    ("12372", 45, 80.0),
]


def load_orders(engine):
    """A shop's orders: users, days since each order, pounds."""
    with engine.begin() as connection:
        sqlite = dialects.is_sqlite(connection)
        connection.exec_driver_sql(
            f"CREATE TABLE orders (user_id text, ordered_on {'text' if sqlite else 'date'}, total_gbp numeric)"
        )
        day = "date('now', '-' || :age || ' days')" if sqlite else "current_date - CAST(:age AS int)"
        rows = [{"user": user, "age": age, "total": total} for user, age, total in ORDERS]
        connection.execute(sa.text(f"INSERT INTO orders VALUES (:user, {day}, :total)"), rows)
    engine.dispose()


CONFIGURATION = """\
[database]
url = "sqlite:///audience_sync.db"

[sources.shop]
url = "sqlite:///shop.db"

[destination]
endpoint = "http://127.0.0.1:8787/"
api_key = "${USERPILOT_API_KEY}"

[tracking]
write_keys = ["${WRITE_KEY}"]

[[audiences]]
name = "Order Completed Last 30days"
source = "shop"
guard_above = 3
sql = '''
SELECT DISTINCT user_id FROM orders
WHERE ordered_on > date(:as_of, '-30 days') AND ordered_on <= date(:as_of)
'''
"""


def is_followed(name):
    return any(block.language in {"sh", "python"} for block in blocks(ROOT / name))


@pytest.mark.parametrize("name", [name for name in NAMES if is_followed(name)])
def test_a_page_can_be_followed(name, read_page):
    reader, outputs = read_page(name), []
    for block in blocks(ROOT / name):
        reader.follow(block)
        if block.language == "text" and "not run" not in block.marks:
            outputs.append((block, reader.output))
    if os.environ.get("UPDATE_DOCS"):
        update(ROOT / name, outputs)
        return
    for block, output in outputs:
        assert comparable(block.text) in comparable(output), f"{name}:{block.line}: it prints:\n{output}"


def comparable(text):
    """The text without what differs each time, and without the blanks that align it."""
    return re.sub(r"[ \n]+", " ", CHANGES_EACH_TIME.sub("*", text)).strip()


def update(path, outputs):
    text = path.read_text(encoding="utf-8")
    for block, output in outputs:
        if comparable(block.text) not in comparable(output):
            clean = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
            text = text.replace(f"```text\n{block.text}```", f"```text\n{clean}\n```")
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("block", all_blocks("sql"))
def test_its_queries_run(engine, block):
    with engines.read(engine) as connection:
        if not dialects.is_sqlite(connection):
            connection.exec_driver_sql("SET LOCAL search_path TO audience_sync")
        assert connection.execute(sa.text(block.text)).all() == []


@pytest.mark.parametrize("block", all_blocks("toml"))
def test_its_configurations_load(tmp_path, block):
    path = tmp_path / "audience_sync.toml"
    path.write_text(block.text)
    loaded = settings.load(path, ENVIRON)
    assert len(loaded.definitions) == len(re.findall(r"^\[\[(?:audiences|traits)", block.text, re.MULTILINE))
    assert len(loaded.mappings) == len(re.findall(r"^\[\[mappings", block.text, re.MULTILINE))


def commands_in(text):
    """Each `audience-sync COMMAND …`, as lists of words."""
    for match in re.finditer(r"(?:(?<=bin/)|(?<![\w/.-]))audience-sync ((?:[^\n`|&;<>#]|<[A-Z]+>)+)", text):
        words = match[1].split()
        while words and words[0] == "--config":
            words = words[2:]
        yield [word.strip("[](),.…'\"") for word in words]


def known_commands():
    return typer.main.get_command(app)


def test_every_command_that_is_named_exists_with_its_options():
    program = known_commands()
    for page, name in zip(PAGES, NAMES, strict=True):
        text = page.read_text(encoding="utf-8")
        spans = re.findall(r"`([^`\n]+)`", text) + [
            block.text for block in blocks(page) if block.language in {"sh", "ini", "crontab", "setup"}
        ]
        for words in (words for span in spans for words in commands_in(span)):
            command, rest = program, words
            while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
                assert rest[0] in command.commands, f"{name}: no command {rest[0]!r} in {words}"
                command, rest = command.commands[rest[0]], rest[1:]
            options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - options
            assert not unknown, f"{name}: {words} has no {unknown}"


def test_what_is_not_run_exists():
    """Make targets and folders of tests in blocks that are marked as not run."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, name in zip(PAGES, NAMES, strict=True):
        for block in blocks(page):
            if block.language == "sh" and "not run" in block.marks:
                for target in re.findall(r"\bmake ([a-z0-9-]+)", block.text):
                    assert target in targets, f"{name}:{block.line}: make {target}"
                for path in re.findall(r"\b((?:tests|soak|benchmarks|docs)/[\w/.]*\w)", block.text):
                    assert (ROOT / path).exists(), f"{name}:{block.line}: {path}"


def test_every_module_that_is_named_exists():
    for page, name in zip(PAGES, NAMES, strict=True):
        for path in re.findall(r"`((?:\w+/)*\w+/\w+\.(?:py|toml))\b", page.read_text(encoding="utf-8")):
            places = [ROOT / path, ROOT / "audience_sync" / path]
            assert any(place.exists() for place in places), f"{name}: {path}"


def transitions(text):
    """(from, to) of each row of a state table."""
    for before, after in re.findall(r"^\| ([a-z, -]+?) *\| ([a-z]+) *\|", text, re.MULTILINE):
        if after in STATES:
            yield from ((each, after) for each in before.split(", "))


STATES = {"held", "pending", "sending", "accepted", "dead", "cancelled"}


def test_the_design_has_each_transition_of_a_delivery():
    shown = set(transitions((ROOT / "docs" / "design.md").read_text()))
    assert shown == set(transitions(deliveries.__doc__))


def test_the_design_has_the_owner_of_each_table():
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `(\w+)/?`? \| [^|]* \| (`[^|]*`) \|$", text, re.MULTILINE)
    shown = {table: owner for owner, cell in rows for table in re.findall(r"`(\w+)`", cell)}
    assert shown == {table: owner.partition("/")[0] for table, owner in OWNERS.items()}


def test_links_lead_to_pages_and_headings():
    for page, name in zip(PAGES, NAMES, strict=True):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in link:
                continue
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{name}: {link}"
            if heading:
                assert heading in headings(target), f"{name}: {link}"


def headings(path):
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for name in NAMES:
        if name.startswith("docs/") and name != "docs/README.md":
            assert f"({name.removeprefix('docs/')})" in index, name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_pages_made_from_the_code_are_up_to_date():
    subprocess.run([sys.executable, "docs/make_reference.py", "--check"], cwd=ROOT, check=True)


def test_the_kill_table_names_the_kills_that_are_made_and_none_lost_anything():
    text = (ROOT / "docs" / "explanation" / "promises.md").read_text()
    rows = re.findall(r"^\|.*`pytest soak -k ([a-z-]+)` \|$", text, re.MULTILINE)
    assert sorted(rows) == sorted(
        f"{backend}-{name}" for name in KINDS for backend in ("postgresql", "sqlite")
    )
    lost = re.findall(
        r"^\| [^|]+ \| (?:SQLite|PostgreSQL) \| [0-9,]+ \| ([0-9,]+) \| ([0-9,]+) \|", text, re.MULTILINE
    )
    assert lost == [("0", "0")] * len(rows)


def table_rows(text):
    """The first cells of a page's tables, under the heading that each stands under."""
    heading, found = "", {}
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.strip("# `")
        elif cell := re.match(r"\| (?:\*\*)?`([^`]+)`", line):
            found.setdefault(heading, []).append(cell[1])
    return found


def test_the_page_of_tables_has_every_column_and_view(engine):
    described = table_rows((ROOT / "docs/reference/tables-and-views.md").read_text())
    for table in tables.metadata.sorted_tables:
        assert described.get(table.name) == [column.name for column in table.columns], table.name
    with engines.read(engine) as connection:
        schema = engine.get_execution_options().get("schema")
        inspector = sa.inspect(connection)
        for view in inspector.get_view_names(schema=schema):
            columns = [column["name"] for column in inspector.get_columns(view, schema=schema)]
            assert described.get(view) == columns, view


def logged_events():
    for path in sorted((ROOT / "audience_sync").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in {"logs.event", "event"}
                and len(node.args) > 2
            ):
                yield from (
                    each.value
                    for each in ast.walk(node.args[2])
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                )


def test_the_page_of_log_events_has_each_that_is_logged():
    described = (ROOT / "docs/reference/log-events.md").read_text()
    missing = {event for event in logged_events() if f"`{event}" not in described}
    assert not missing


def test_the_page_of_exit_codes_has_each():
    described = (ROOT / "docs/reference/exit-codes.md").read_text()
    codes = set(map(int, re.findall(r"^\| (\d+) \|", described, re.MULTILINE)))
    raised = {each.exit_code for each in vars(errors).values() if hasattr(each, "exit_code")}
    assert codes == raised | {0, 3, 130}
