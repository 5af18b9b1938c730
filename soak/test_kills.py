"""Thousands of kills: $SOAK_KILLS on each database, 2,000 unless set. Prints the table of docs/explanation/promises.md."""

import itertools
import os

import pytest

from tests.acceptance.killing import BACKENDS, HEAD, KINDS, SEED, kill_all, row

KILLS = int(os.environ.get("SOAK_KILLS", "2000"))


@pytest.fixture(scope="module")
def table(request):
    """Rows by kind and database, printed at the end."""
    rows = {}
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            "", *HEAD, *(rows[each] for each in itertools.product(KINDS, BACKENDS) if each in rows), sep="\n"
        )


@pytest.mark.parametrize("name", KINDS)
def test_kills(name, backend, new_url, tmp_path, forkers, table):
    kind = KINDS[name]
    outcomes = kill_all(kind, KILLS * kind.share // 100, new_url, tmp_path, forkers)
    table[name, backend] = row(name, backend, outcomes)
    assert not [each for each in outcomes if not each.is_good], f"again with KILLS_SEED={SEED}"
