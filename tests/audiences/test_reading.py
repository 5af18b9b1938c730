"""On our own PostgreSQL the database itself enforces that a definition only reads, whatever its functions do."""

import pytest

from audience_sync.audiences import compute, plan, snapshot
from audience_sync.db import dialects, engines
from audience_sync.queue.destination import Destination
from tests.audiences.conftest import START

pytestmark = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
WRITERS = {
    "inserts": "INSERT INTO written VALUES (1) RETURNING 'ann'",
    "updates": "UPDATE people SET value = 7 RETURNING user_id",
    "deletes": "DELETE FROM people RETURNING user_id",
    "counts": "SELECT nextval('numbers')::text",
    "resets": "SELECT setval('numbers', 9)::text",
    "locks": "SELECT user_id FROM people FOR UPDATE",
    "allows_writing": "SELECT set_config('transaction_read_only', 'off', true)",
}


@pytest.fixture
def writers(world):
    """Functions that write, in the company's schema; a definition may call them."""
    world.people("ann")
    world.execute("CREATE TABLE public.written (number integer)")
    world.execute("CREATE SEQUENCE public.numbers")
    for name, body in WRITERS.items():
        world.execute(f"CREATE FUNCTION public.{name}() RETURNS text LANGUAGE sql AS $$ {body} $$")
    world.execute(
        "CREATE FUNCTION public.creates() RETURNS text LANGUAGE plpgsql AS "
        "'BEGIN CREATE TEMPORARY TABLE mine (n integer); RETURN 1; END'"
    )
    return [*WRITERS, "creates"]


def state(world):
    return (
        world.query("SELECT * FROM public.written"),
        world.query("SELECT user_id, value FROM public.people"),
        world.query("SELECT last_value, is_called FROM public.numbers"),
    )


PLACES = {
    "column": {"sql": "SELECT {}() AS user_id"},
    "from": {"sql": "SELECT f AS user_id FROM {}() AS f"},
    "subquery": {"sql": "SELECT user_id FROM people WHERE user_id > (SELECT {}())"},
    "ready_sql": {"ready_sql": "SELECT {}() IS NOT NULL"},
    "eligible_sql": {"eligible_sql": "SELECT {}() AS user_id"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["sync", "plan"])
def test_a_function_that_writes_fails_the_run_and_writes_nothing(world, writers, place, command):
    before = state(world)
    for name in writers:
        definition = world.audience(**{option: text.format(name) for option, text in PLACES[place].items()})
        if command == "sync":
            run = world.sync(definition)
            assert (run.status, world.members()) == ("failed", {}), name
            message = run.error
        else:
            planned = plan.plan(world.engine, [(definition, None)], {"vips": START}, START, Destination())
            message = planned.errors["vips"]
        assert "does not work: cannot " in message, (name, message)
        assert "read-only" in message, (name, message)
        assert state(world) == before, name
    assert world.sync(world.audience()).status == "succeeded"


def test_settings_of_a_definitions_transaction_end_with_it(world):
    world.people("ann")
    names = ("statement_timeout", "work_mem", "extra_float_digits", "transaction_read_only")
    with (
        snapshot.connection_with_temp_tables(world.engine) as connection,
        engines.one_transaction(connection),
    ):
        before = [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]
        compute.compute(
            connection, world.trait("SELECT user_id, 1.5::real AS value FROM people"), START, None
        )
        assert [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names] == before
        assert dialects.sql(
            connection, "SELECT user_id FROM {temp}audience_sync_snapshot"
        ).scalars().all() == ["ann"]
