"""Seeded simulations. SIMULATION_SEEDS=7, or 100-199, runs those on both databases in place of the usual ones."""

import os

import pytest

from tests.simulation.checker import check
from tests.simulation.simulation import Simulation

USUAL = {"sqlite": range(20), "postgresql": range(30, 35)}


def chosen(usual=USUAL):
    first, _, last = os.environ.get("SIMULATION_SEEDS", "").partition("-")
    asked = range(int(first), int(last or first) + 1) if first else None
    return [(backend, seed) for backend, seeds in usual.items() for seed in asked or seeds]


@pytest.mark.parametrize(("backend", "seed"), chosen())
def test_no_seed_breaks_a_promise(backend, seed, url):
    simulate(backend, seed, url)


def simulate(backend, seed, url):
    simulation = Simulation(seed, url)
    try:
        simulation.run()
        check(simulation)
    except BaseException:
        print("\n".join(simulation.log))
        print(f"Again: SIMULATION_SEEDS={seed} .venv/bin/pytest tests/simulation -k {backend}")
        raise
    finally:
        simulation.close()
