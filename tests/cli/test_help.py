"""The help: commands in their groups, one line each, and every option explained."""

import re
import subprocess
import sys

import pytest

from audience_sync.cli.main import COMMANDS, app


def help_of(*command):
    called = [sys.executable, "-m", "audience_sync", *command, "--help"]
    return subprocess.run(called, capture_output=True, text=True, check=True).stdout


def test_the_commands_are_listed_in_their_groups_one_line_each():
    headings = re.split(r"^(.+):$", help_of(), flags=re.MULTILINE)
    listed = {
        heading: re.findall(r"^  ([a-z]+)  +([A-Z].*)\.$", lines, re.MULTILINE)
        for heading, lines in zip(headings[1::2], headings[2::2], strict=True)
        if heading != "Options"
    }
    expected = {}
    for heading, name, _ in COMMANDS:
        expected.setdefault(heading, []).append(name.split()[0])
    names = {heading: [name for name, _ in lines] for heading, lines in listed.items()}
    assert names == {heading: list(dict.fromkeys(commands)) for heading, commands in expected.items()}
    assert list(names) == ["Set up", "Audiences", "Delivery", "Calls", "Run", "Inspect"]


@pytest.mark.parametrize("name", [name for _, name, _ in COMMANDS])
def test_every_argument_and_option_is_explained(name):
    import typer.main  # noqa: PLC0415

    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    assert command.help
    assert [parameter.name for parameter in command.params if not parameter.help] == []


def test_examples_are_printed_as_they_are():
    assert "\n      audience-sync sync\n      audience-sync sync at_risk --user" in help_of("sync")
