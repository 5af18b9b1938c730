"""Thousands of simulations; SOAK_SEEDS says how many, SOAK_FROM from which on. Each tenth is on PostgreSQL."""

import os

import pytest

from tests.simulation.test_simulation import simulate

FIRST, COUNT, TOGETHER = (
    int(os.environ.get("SOAK_FROM", "1000")),
    int(os.environ.get("SOAK_SEEDS", "2000")),
    50,
)


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, TOGETHER))
def test_no_seed_breaks_a_promise(first, fresh_url):
    failed = {}
    for seed in range(first, min(first + TOGETHER, FIRST + COUNT)):
        backend = "sqlite" if seed % 10 else "postgresql"
        try:
            simulate(backend, seed, fresh_url(backend))
        except Exception as error:  # noqa: BLE001  (the others are still to be run)
            failed[seed] = f"SIMULATION_SEEDS={seed} pytest tests/simulation -k {backend}: {error!r}"
    assert not failed, "\n".join(failed.values())
