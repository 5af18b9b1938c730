"""Seeded simulations with two destinations and short retention; SIMULATION_SEEDS as in test_simulation.py."""

import pytest

from tests.simulation.destinations import TwoDestinations, check
from tests.simulation.test_simulation import chosen

USUAL = {"sqlite": range(10), "postgresql": range(30, 33)}


@pytest.mark.parametrize(("backend", "seed"), chosen(USUAL))
def test_no_seed_breaks_a_promise_to_either_destination(backend, seed, url):
    simulate(backend, seed, url)


def simulate(backend, seed, url):
    simulation = TwoDestinations(seed, url)
    try:
        simulation.run()
        check(simulation)
    except BaseException:
        print("\n".join(simulation.log))
        print(
            f"Again: SIMULATION_SEEDS={seed} .venv/bin/pytest tests/simulation/test_destinations.py -k {backend}"
        )
        raise
    finally:
        simulation.close()
