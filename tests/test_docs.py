"""What the README shows works: its queries on both databases, its commands, its starter and its Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from audience_sync import settings
from audience_sync.db import dialects, engines
from tests.acceptance.killing import KINDS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("query", blocks("sql"))
def test_its_queries_run(engine, query):
    with engines.read(engine) as connection:
        if not dialects.is_sqlite(connection):
            connection.exec_driver_sql("SET LOCAL search_path TO audience_sync")
        assert connection.execute(sa.text(query)).all() == []


def test_its_configurations_load(tmp_path):
    path = tmp_path / "audience_sync.toml"
    environ = {"DB_PASSWORD": "x", "USERPILOT_API_KEY": "y", "WRITE_KEY": "z"}
    found = []
    for block in blocks("toml"):
        path.write_text(block)
        loaded = settings.load(path, environ)
        found += [definition.key for definition in loaded.definitions]
        found += [*loaded.tracking.write_keys, *(mapping.name for mapping in loaded.mappings)]
    assert found == ["order_completed_last_30days", "z", "Big orders"]


def test_its_commands_are_those_of_the_program():
    table = README.partition("| command | does |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[1:]
    named = {code.split()[0] for cell in cells for code in re.findall(r"`([^`]+)`", cell)}
    shown = subprocess.run(
        [sys.executable, "-m", "audience_sync", "--help"], capture_output=True, text=True, check=True
    ).stdout
    offered = set(re.findall(r"^  ([a-z]+) ", shown.partition("Commands:")[2], re.MULTILINE))
    assert named == offered


def test_its_kills_are_those_that_are_made_and_lost_nothing():
    rows = re.findall(r"^\|.*`pytest soak -k ([a-z-]+)` \|$", README, re.MULTILINE)
    assert sorted(rows) == sorted(
        f"{backend}-{name}" for name in KINDS for backend in ("postgresql", "sqlite")
    )
    kept = re.findall(
        r"^\| [^|]+ \| (?:SQLite|PostgreSQL) \| [0-9,]+ \| ([0-9,]+) \| ([0-9,]+) \|", README, re.MULTILINE
    )
    assert kept == [("0", "0")] * len(rows)


def test_its_python_hands_in_calls_and_delivers(tmp_path, sandbox):
    (tmp_path / "audience_sync.toml").write_text(
        f'[destination]\nendpoint = "{sandbox.url}"\napi_key = "sandbox"\n'
    )
    subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, check=True)
    assert sandbox.state.snapshot()["users"]["u1"]["properties"] == {"plan": "pro"}
