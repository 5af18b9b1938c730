"""Thousands of kills: $SOAK_KILLS on each database, 2,000 unless set. Prints the README's table."""

import os

import pytest

from tests.acceptance.killing import HEAD, KINDS, SEED, kill_all, table_row

KILLS = int(os.environ.get("SOAK_KILLS", "2000"))


@pytest.fixture(scope="module")
def table(request):
    """The rows that came about, printed at the end."""
    rows = []
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", HEAD, f"|{' --- |' * HEAD.count(' | ')} --- |", *sorted(rows, reverse=True), sep="\n")


@pytest.mark.parametrize("name", KINDS)
def test_kills(name, backend, new_url, tmp_path, forkers, table):
    kind = KINDS[name]
    outcomes = kill_all(kind, KILLS * kind.share // 100, new_url, tmp_path, forkers)
    table.append(table_row(backend, name, outcomes))
    assert not [each for each in outcomes if not each.is_good], f"again with KILLS_SEED={SEED}"
