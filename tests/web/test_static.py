"""The static files of other projects are as published, and have their licences."""

import hashlib
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "audience_sync" / "web" / "static"
VENDORED = re.findall(
    r"^\| (\S+) \| \S+ [\d.]+ \| (\S+) \(.+\) \| ([0-9a-f]{64}) \|$",
    (STATIC / "vendor" / "README.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(("name", "licence", "digest"), VENDORED)
def test_a_file_of_another_project_is_as_published_and_has_its_licence(name, licence, digest):
    vendor = STATIC / "vendor"
    assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
    assert re.search("permission", (vendor / licence).read_text(), re.IGNORECASE)


def test_every_file_of_another_project_is_listed():
    listed = {"README.md"} | {part for name, licence, _ in VENDORED for part in (name, licence)}
    assert {path.name for path in (STATIC / "vendor").iterdir()} == listed
