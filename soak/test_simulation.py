"""Hundreds of simulations of each kind on each database; SOAK_SEEDS sets their number, SOAK_FROM the first."""

import os

import pytest

from tests.simulation import test_destinations, test_simulation

FIRST, COUNT = int(os.environ.get("SOAK_FROM", "1000")), int(os.environ.get("SOAK_SEEDS", "200"))
TOGETHER = 10
SIMULATIONS = {"one destination": test_simulation, "two destinations": test_destinations}


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, TOGETHER))
@pytest.mark.parametrize("kind", SIMULATIONS)
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_no_seed_breaks_a_promise(backend, kind, first, fresh_url):
    failed = []
    for seed in range(first, min(first + TOGETHER, FIRST + COUNT)):
        try:
            SIMULATIONS[kind].simulate(backend, seed, fresh_url(backend))
        except Exception as error:  # noqa: BLE001  (the others are still to be run)
            failed.append(f"seed {seed}: {error!r}")
    assert not failed, "\n".join(failed)
