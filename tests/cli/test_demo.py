"""The demo's folder: it replaces the files of an earlier demo, and nothing else."""

import pytest

from audience_sync.cli import demo
from audience_sync.errors import ConfigError

CONFIGURATION = demo.CONFIGURATION.format(url="http://127.0.0.1:1/", per_minute=1)


def folder_with(tmp_path, **files):
    folder = tmp_path / "demo"
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)
    return folder


def test_an_earlier_demo_is_replaced(tmp_path):
    folder = folder_with(
        tmp_path, shop_dot_db="orders", audience_sync_dot_db="history", audience_sync_dot_toml=CONFIGURATION
    )
    (folder / "audience_sync.db-wal").touch()  # it was killed
    demo._make_folder(folder)
    assert list(folder.iterdir()) == []


def test_a_new_or_empty_folder_is_used(tmp_path):
    demo._make_folder(tmp_path / "some" / "where")
    demo._make_folder(tmp_path / "some" / "where")


@pytest.mark.parametrize("files", [
    {"shop_dot_db": "mine", "audience_sync_dot_toml": "[database]"},
    {"shop_dot_db": "mine"},
    {"notes": "mine", "shop_dot_db": "orders", "audience_sync_dot_toml": CONFIGURATION},
])  # fmt: skip
def test_files_of_others_stay(tmp_path, files):
    folder = folder_with(tmp_path, **files)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="exists and contains something other than an earlier demo"):
        demo._make_folder(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
