"""Segment's own libraries send to `serve`: every call arrives once, even if the server is killed in between."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from audience_sync.db import dialects, engines
from tests.intake.conftest import KEY, served
from tests.tools import required

CLIENTS = Path(__file__).parent / "clients"
COUNT = 60  # of each of six types
TYPES = ("identify", "track", "group", "page", "screen", "alias")


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """The command that sends with the library for Node, which is installed first."""
    node, npm = (required(program, "Segment's library for Node needs it") for program in ("node", "npm"))
    folder = tmp_path_factory.mktemp("clients") / "node"
    shutil.copytree(CLIENTS, folder, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return [node, str(folder / "send.mjs")]


@pytest.fixture(params=["python", "python with gzip", "node"])
def sender(request):
    """The command that sends with one of the libraries."""
    if request.param == "node":
        return request.getfixturevalue("node")
    return [sys.executable, str(CLIENTS / "send.py"), *(["--gzip"] if "gzip" in request.param else [])]


@pytest.fixture
def kept(engine):
    """What is in the database: a message id and a type for each call."""

    def read():
        with engines.read(engine) as connection:
            return [tuple(row) for row in dialects.sql(connection, "SELECT message_id, type FROM {our}calls")]

    return read


def sending(sender, port):
    return subprocess.Popen(
        [*sender, "--host", f"http://127.0.0.1:{port}", "--write-key", KEY, "--count", str(COUNT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sent(process):
    """The calls that the library was given, without those that it reported as given up."""
    said, troubles = process.communicate(timeout=100)
    assert process.returncode == 0, troubles
    return [(call["messageId"], call["type"]) for call in map(json.loads, said.splitlines())]


def test_every_call_of_segments_libraries_arrives_once(start, sender, kept):
    with served(start({}, f'[tracking]\nwrite_keys = ["{KEY}"]')) as (_, port):
        calls = sent(sending(sender, port))
    assert Counter(kind for _, kind in calls) == dict.fromkeys(TYPES, COUNT)
    assert Counter(kept()) == Counter(calls)


def test_every_call_arrives_once_where_the_server_is_killed_in_between(start, sender, kept):
    command = start({}, f'[tracking]\nwrite_keys = ["{KEY}"]\ncalls_per_second = 100')
    with served(command) as (process, port):
        client = sending(sender, port)
        while not kept():
            assert client.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    before = len(kept())
    with served(command, port):
        calls = sent(client)
    assert before < len(calls)
    assert Counter(kept()) == Counter(calls)
