"""kill -9, a hundred times on each database: no change is lost, and no value goes back in time.

`sync` and the daemon are killed at every named point and at random moments; `make soak` adds thousands of kills.
"""

import pytest

from tests.acceptance.killing import KINDS, SEED, kill_all


@pytest.mark.parametrize("kind", KINDS)
def test_no_kill_loses_anything_or_turns_it_back(kind, new_url, tmp_path, forkers):
    outcomes = kill_all(KINDS[kind], KINDS[kind].share, new_url, tmp_path, forkers)
    assert not [each for each in outcomes if not each.is_good], f"again with KILLS_SEED={SEED}"
    assert all(each.repeated_requests <= KINDS[kind].company.in_flight for each in outcomes), outcomes
    assert all(each.repeated_rows <= KINDS[kind].company.bulk_rows_per_job for each in outcomes), outcomes


def test_the_kinds_add_up_to_a_hundred_kills():
    assert sum(kind.share for kind in KINDS.values()) == 100
