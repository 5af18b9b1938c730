"""A run writes members, their history, deliveries and counts; an error ends it as failed."""

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync.audiences import compute, plan, runs, snapshot
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.clock import SystemClock
from audience_sync.db import dialects, engines, leases
from audience_sync.errors import Busy, ConfigError, DatabaseError, DefinitionError, Interrupted
from audience_sync.queue.destination import Destination
from tests import waiting

TRUE, FALSE = '{"vips": true}', '{"vips": false}'


def test_the_first_run_sends_true_for_every_member_and_nothing_else(world):
    world.people("ann", "bob")
    run = world.sync(world.audience(), fingerprint="here")
    assert (run.status, run.mode, run.member_count, run.entered_count) == ("succeeded", "first", 2, 2)
    assert world.deliveries(run.run_id) == [("ann", TRUE, "pending"), ("bob", TRUE, "pending")]
    assert world.query("SELECT DISTINCT action, class, fingerprint, attempt_count FROM {our}deliveries") == [
        ("identify", "push", "here", 0)
    ]


def test_later_runs_send_only_what_changed(world):
    world.people("ann", "bob")
    world.sync(world.audience())
    world.settle("accepted")
    world.people("bob", "cid")
    run = world.sync(world.audience())
    assert (run.mode, run.member_count, run.entered_count, run.exited_count) == ("changes", 2, 1, 1)
    assert world.deliveries(run.run_id) == [("ann", FALSE, "pending"), ("cid", TRUE, "pending")]
    assert world.query("SELECT DISTINCT class FROM {our}deliveries WHERE run_id = :r", r=run.run_id) == [
        ("change",)
    ]
    assert set(world.members()) == {"bob", "cid"}


def test_an_unchanged_run_sends_nothing(world):
    world.people("ann")
    world.sync(world.audience())
    run = world.sync(world.audience())
    assert (run.status, run.member_count, run.entered_count, run.exited_count) == ("succeeded", 1, 0, 0)
    assert world.deliveries(run.run_id) == []


def test_a_run_after_an_empty_first_one_is_not_the_first(world):
    assert world.sync(world.audience()).mode == "first"
    world.people("ann")
    run = world.sync(world.audience())
    assert (run.mode, run.member_count) == ("changes", 1)


def test_history_is_stored_as_intervals(world):
    world.people("ann")
    first = world.sync(world.audience())
    world.settle("accepted")
    world.people()
    second = world.sync(world.audience())
    world.people("ann")
    third = world.sync(world.audience())
    moments = dict(world.query("SELECT run_id, as_of FROM {our}runs"))
    assert world.query(
        'SELECT user_id, "key", value, "from", "to" FROM {our}membership_history ORDER BY "from"'
    ) == [
        ("ann", "vips", "true", moments[first.run_id], moments[second.run_id]),
        ("ann", "vips", "true", moments[third.run_id], None),
    ]
    assert world.query(
        "SELECT size, entered, exited, accepted, pending FROM {our}snapshots ORDER BY run_id"
    ) == [(1, 1, 0, 1, 0), (0, 0, 1, 0, 1), (1, 1, 0, 0, 1)]


def test_an_exit_before_anything_was_tried_cancels_both(world):
    world.people("ann", "bob")
    first = world.sync(world.audience())
    world.people("bob")
    second = world.sync(world.audience())
    assert world.deliveries(first.run_id) == [("ann", TRUE, "cancelled"), ("bob", TRUE, "pending")]
    assert world.deliveries(second.run_id) == [("ann", FALSE, "cancelled")]
    assert world.query("SELECT DISTINCT error FROM {our}deliveries WHERE status = 'cancelled'") == [
        ("left before anything was sent",)
    ]
    assert second.exited_count == 1


@pytest.mark.parametrize("status", ["pending", "dead", "accepted", "sending"])
def test_an_exit_after_something_was_tried_is_sent(world, status):
    world.people("ann")
    first = world.sync(world.audience())
    settled = status in {"dead", "accepted"}
    world.execute(
        "UPDATE {our}deliveries SET status = :status, attempt_count = 1, request_id = 1, error = 'x', "
        "settled_at = CASE WHEN :settled = 1 THEN created_at END",
        status=status,
        settled=int(settled),
    )
    world.people()
    second = world.sync(world.audience())
    assert world.deliveries(first.run_id) == [("ann", TRUE, status)]
    assert world.deliveries(second.run_id) == [("ann", FALSE, "pending")]


def test_an_exit_is_cancelled_whatever_other_definitions_have_sent(world):
    world.people("ann")
    world.sync(world.audience(key="others"))
    world.settle("accepted")
    world.sync(world.audience())
    world.people()
    run = world.sync(world.audience())
    assert world.deliveries(run.run_id) == [("ann", FALSE, "cancelled")]


def test_a_dead_delivery_gets_one_new_attempt_at_each_later_run(world):
    world.people("ann", "bob")
    first = world.sync(world.audience())
    world.settle("dead", "subject_id = 'ann'")
    world.settle("accepted")
    world.execute("UPDATE {our}deliveries SET alone = true, first_attempt_at = created_at")
    for _ in range(2):
        second = world.sync(world.audience())
        assert world.deliveries(first.run_id) == [("ann", TRUE, "pending"), ("bob", TRUE, "accepted")]
        assert world.deliveries(second.run_id) == []
        assert world.query(
            "SELECT alone, first_attempt_at, quiet_until, settled_at, error FROM {our}deliveries "
            "WHERE subject_id = 'ann'"
        ) == [(False, None, None, None, None)]
        world.settle("dead")


def test_a_dead_delivery_whose_value_is_not_current_stays_dead(world):
    world.people("ann", "bob")
    first = world.sync(world.audience())
    world.settle("dead")
    world.people("bob")
    second = world.sync(world.audience())
    assert world.deliveries(first.run_id) == [("ann", TRUE, "dead"), ("bob", TRUE, "pending")]
    assert world.deliveries(second.run_id) == [("ann", FALSE, "pending")]
    world.settle("dead", "subject_id = 'ann'")
    world.sync(world.audience())
    assert world.deliveries(first.run_id) == [("ann", TRUE, "dead"), ("bob", TRUE, "pending")]
    assert world.deliveries(second.run_id) == [("ann", FALSE, "pending")]


def test_a_full_run_sends_to_everyone_who_ever_had_the_key(world):
    world.people("ann", "bob", "cid")
    world.sync(world.audience())
    world.settle("accepted", "subject_id <> 'cid'")
    world.people("bob", "dan")  # ann was sent true, and cid nothing
    world.sync(world.audience())
    world.people("bob", "eve")
    run = world.sync(world.audience(), full=True)
    assert (run.mode, run.member_count, run.entered_count, run.exited_count) == ("full", 2, 1, 1)
    assert world.deliveries(run.run_id) == [
        ("ann", FALSE, "pending"),
        ("bob", TRUE, "pending"),
        ("eve", TRUE, "pending"),
    ]
    assert world.query("SELECT DISTINCT class FROM {our}deliveries WHERE run_id = :r", r=run.run_id) == [
        ("push",)
    ]


def test_a_full_run_sends_values_and_null_to_those_who_lost_theirs(world):
    world.people(("ann", 1.5), ("bob", 2.0))
    world.sync(world.trait())
    world.settle("accepted")
    world.people(("bob", 3.0))
    run = world.sync(world.trait(), full=True)
    assert (run.exited_count, run.changed_count) == (1, 1)
    assert world.deliveries(run.run_id) == [
        ("ann", '{"spend": null}', "pending"),
        ("bob", '{"spend": 3}', "pending"),
    ]


def test_a_trait_sends_values_that_are_new_changed_or_gone(world):
    world.people(("ann", 1.5), ("bob", 2.0), ("cid", 1.0), ("dan", None))
    first = world.sync(world.trait())
    assert world.deliveries(first.run_id) == [
        ("ann", '{"spend": 1.5}', "pending"),
        ("bob", '{"spend": 2}', "pending"),
        ("cid", '{"spend": 1}', "pending"),
    ]
    world.settle("accepted")
    world.people(("ann", 1.5), ("bob", 2.5), ("cid", None))
    run = world.sync(world.trait())
    assert (run.member_count, run.entered_count, run.exited_count, run.changed_count) == (2, 0, 1, 1)
    assert world.deliveries(run.run_id) == [
        ("bob", '{"spend": 2.5}', "pending"),
        ("cid", '{"spend": null}', "pending"),
    ]
    assert world.members("spend") == {"ann": "1.5", "bob": "2.5"}


def test_unequal_values_change_nothing_for_their_user(world):
    world.people(("ann", 1.0), ("bob", 1.0))
    world.sync(world.trait())
    world.people(("ann", 1.0), ("ann", 2.0), ("bob", 1.0), ("bob", 1.0), ("cid", 3.0), ("cid", 4.0))
    run = world.sync(world.trait())
    assert (run.status, run.member_count, run.set_aside) == (
        "succeeded",
        2,
        {"unequal_values": 2},
    )
    assert world.deliveries(run.run_id) == []
    assert world.members("spend") == {"ann": "1", "bob": "1"}


# Without statistics PostgreSQL's planner expects many rows for a user; of fifty rows it expects fifty users.
@pytest.mark.parametrize("limit", ["", " LIMIT 50"])
def test_what_cannot_be_a_user_id_is_counted_by_reason_and_duplicates_collapse(world, limit):
    audience = world.audience(f"SELECT user_id FROM people{limit}")
    unusable = ["", " \t\n", "y" * 256, "y" * 256, None, None]
    world.people("ann", "ann", "ann", "bob", "x" * 255, *unusable)
    run = world.sync(audience)
    assert run.set_aside == {"empty": 2, "null": 2, "too_long": 2}
    assert set(world.members()) == {"ann", "bob", "x" * 255}
    world.people("ann", "ann", "cid", "cid", *unusable)
    run = world.sync(audience)
    assert run.set_aside == {"empty": 2, "null": 2, "too_long": 2}
    assert (run.member_count, run.entered_count, run.exited_count) == (2, 1, 2)
    assert ("cid", TRUE, "pending") in world.deliveries(run.run_id)


def test_each_definition_has_its_own_members(world):
    world.people("ann")
    world.sync(world.audience())
    run = world.sync(world.audience("SELECT 'zoe' AS user_id", key="others"))
    assert (run.mode, run.entered_count, run.exited_count) == ("first", 1, 0)
    assert set(world.members()) == {"ann"}


def test_a_definition_that_fails_ends_its_run_as_failed_and_changes_nothing(world):
    world.people("ann")
    world.sync(world.audience())
    run = world.sync(world.audience("SELECT user_id FROM nobody"))
    assert run.status == "failed"
    assert "nobody" in run.error
    assert run.error.startswith("vips: its SQL does not work: ")
    assert set(world.members()) == {"ann"}
    assert world.sync(world.audience()).status == "succeeded"


def test_a_definition_that_another_process_is_syncing_is_busy(world):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with engines.write(world.engine) as connection:
            leases.acquire(connection, leases.of_definition("vips"), 60)
        world.execute("UPDATE {our}leases SET pid = :pid", pid=other.pid)
        with pytest.raises(Busy, match=f"vips is being synced by process {other.pid} on {leases.HOST}"):
            world.sync(world.audience())
    finally:
        other.communicate()
    assert world.sync(world.audience()).status == "succeeded"  # it is gone now


def test_a_run_whose_process_died_is_abandoned(world):
    script = f"""
import datetime as dt, sys
from audience_sync.clock import SystemClock
from audience_sync.audiences.definition import Definition, Kind
from audience_sync.db import dialects, engines
from audience_sync.audiences import plan, runs
engine = engines.open_own({str(world.engine.url.render_as_string(hide_password=False))!r}, "audience_sync")
vips = Definition("vips", "vips", Kind.AUDIENCE, "SELECT user_id FROM people")
runs.sync(engine, vips, dt.datetime(2026, 1, 1, tzinfo=dt.UTC), SystemClock())
"""
    world.people("ann")
    for crash in ("run_started", "snapshot_computed", "changes_written"):
        died = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "AUDIENCE_SYNC_CRASH_AT": crash}, check=False
        )
        assert died.returncode == -signal.SIGKILL
    assert world.members() == {}
    run = world.sync(world.audience())
    assert (run.status, run.mode, run.member_count) == ("succeeded", "first", 1)
    assert world.query("SELECT status, error FROM {our}runs ORDER BY run_id") == [
        ("abandoned", "Its process ended before it was done, or another one took over."),
        ("abandoned", "Its process ended before it was done, or another one took over."),
        ("abandoned", "Its process ended before it was done, or another one took over."),
        ("succeeded", None),
    ]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS user_id FROM n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_a_signal_during_the_computation_ends_it_at_once(world, error):
    def stop(*_):
        raise error("stopped")

    def kill_while_it_runs():
        waiting.until(lambda: world.query("SELECT 1 FROM {our}runs WHERE status = 'running'"))
        time.sleep(0.3)  # the statement begins
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, stop)
    threading.Thread(target=kill_while_it_runs).start()
    try:
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            world.sync(world.audience(ENDLESS))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert world.query("SELECT status, error FROM {our}runs") == [("failed", "It was interrupted.")]
    world.wait_for_statements()
    assert world.sync(world.audience()).status == "succeeded"


def test_the_first_error_is_raised_if_the_run_cannot_even_be_ended(world, monkeypatch):
    world.people("ann")

    def refuse(*_):
        world.execute("DROP TABLE {our}leases")
        raise DefinitionError("the first error")

    monkeypatch.setattr(runs, "compute", refuse)
    with pytest.raises(DefinitionError, match="the first error"):
        world.sync(world.audience())


def test_a_database_that_fails_in_the_commit_fails_the_run_with_its_reason(world):
    world.people("ann")
    world.sync(world.audience())
    world.execute("ALTER TABLE {our}past_members RENAME TO mislaid")
    world.people("bob")
    run = world.sync(world.audience())
    assert run.status == "failed"
    assert run.error.startswith("The database failed: ")
    assert set(world.members()) == {"ann"}
    assert world.deliveries(run.run_id) == []


def test_a_commit_that_fails_and_stays_open_keeps_no_lock(world):
    world.people("ann")
    dialect, our = world.engine.dialect, world.engine.get_execution_options()["our"]
    commit = dialect.do_commit

    def refuse_changes(raw):
        cursor = raw.cursor()
        cursor.execute(f"SELECT count(*) FROM {our}deliveries")
        if cursor.fetchone()[0]:
            raise dialect.loaded_dbapi.OperationalError("the disk is full")
        cursor.close()
        commit(raw)

    dialect.do_commit = refuse_changes
    run = world.sync(world.audience())
    dialect.do_commit = commit
    assert (run.status, "the disk is full" in run.error) == ("failed", True)
    assert world.query("SELECT status FROM {our}runs") == [("failed",)]
    assert world.sync(world.audience()).status == "succeeded"


def test_a_database_that_cannot_be_used_is_a_database_error(tmp_path):
    engine = engines.open_own(f"sqlite:///{tmp_path}/own.db", "audience_sync")
    (tmp_path / "own.db").write_text("this is no database, and it is long enough to be read as one" * 20)
    vips, moment = Definition("vips", "vips", Kind.AUDIENCE, "SELECT 1 AS user_id"), dt.datetime.now(dt.UTC)
    with pytest.raises(DatabaseError, match="file is not a database"):
        runs.sync(engine, vips, moment, SystemClock())


def test_a_moment_is_neither_in_the_future_nor_before_the_last_committed_run(world):
    vips = world.audience()
    world.sync(vips)
    now = world.clock.now()
    last = world.query("SELECT as_of FROM {our}runs")
    assert len(last) == 1
    with pytest.raises(ConfigError, match="in the future"):
        runs.resolve_as_of(world.engine, [vips], now + dt.timedelta(seconds=1), now)
    with pytest.raises(ConfigError, match="before the last committed run of vips"):
        runs.resolve_as_of(world.engine, [vips], now - dt.timedelta(days=1), now)
    assert runs.resolve_as_of(world.engine, [vips], now, now) == {"vips": now}
    an_hour_ago = now - dt.timedelta(hours=1)  # a clock that went back
    assert runs.resolve_as_of(world.engine, [vips], None, an_hour_ago)["vips"] > an_hour_ago


def test_a_run_that_waited_does_not_go_back_in_time(world):
    vips, early = world.audience(), world.clock.now()
    world.sync(vips)
    run_id = runs.sync(world.engine, vips, early, world.clock)
    assert world.query("SELECT count(DISTINCT as_of) FROM {our}runs") == [(1,)]
    assert world.run(run_id).status == "succeeded"


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_an_exit_is_sent_if_a_worker_claims_the_entry_meanwhile(world):
    world.people("ann")
    world.sync(world.audience())
    world.people()
    with world.engine.connect() as worker, worker.begin():
        dialects.sql(
            worker,
            "UPDATE {our}deliveries SET status = 'sending', attempt_count = 1, request_id = 1",
        )
        thread = threading.Thread(target=world.sync, args=(world.audience(),))
        thread.start()
        _wait_for_a_lock(world)
        worker.commit()
        thread.join()
    assert world.query("SELECT body, status FROM {our}deliveries ORDER BY delivery_id") == [
        ({"vips": True}, "sending"),
        ({"vips": False}, "pending"),
    ]


def _wait_for_a_lock(world):
    with world.engine.connect() as connection:
        while not connection.execute(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar():
            connection.rollback()


def test_a_run_and_a_plan_refuse_a_key_of_the_other_kind(world):
    world.people(("ann", 1.0))
    assert world.sync(world.audience(key="spend")).status == "succeeded"
    message = (
        "the key spend has belonged to the audience spend since 2026-01-01, and a key cannot change its kind"
    )
    with pytest.raises(ConfigError, match=message):
        world.sync(world.trait())
    now = world.clock.now()
    with pytest.raises(ConfigError, match=message):
        plan.plan(world.engine, [(world.trait(), None)], {"spend": now}, now, Destination())
    assert world.query("SELECT count(*) FROM {our}runs") == [(1,)]
    assert world.members("spend") == {"ann": None}


UNEXPECTED = [
    RecursionError(),
    UnicodeEncodeError("utf-8", "secret\ud800", 6, 7, "surrogates not allowed"),
    OverflowError("secret"),
    MemoryError(),
    KeyError("secret"),
    sa.exc.InvalidRequestError("secret"),
]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["bind", "fill_from_query", "diff", "commit"])
def test_an_unexpected_error_ends_that_run_with_a_message(world, monkeypatch, place, error):
    def fail(*_):
        raise error

    world.people("ann")
    with monkeypatch.context() as patch:
        owner = {"bind": compute.statement, "commit": runs}.get(place, snapshot)
        patch.setattr(owner, place, fail)
        failed = world.sync(world.audience())
    assert failed.status == "failed"
    assert failed.error.startswith("vips: ")
    assert f"{type(error).__name__} (test_runs.py, line " in failed.error
    assert "secret" not in failed.error
    assert world.sync(world.audience()).status == "succeeded"
    assert set(world.members()) == {"ann"}


WORDS = [
    "SELECT", "user_id", "FROM", "people", "WHERE", ",", "(", ")", "'", '"', "$$", "$a$", "--", "\n", "/*", "*/",
    ":as_of", ":today", ":z", "::", ";", "[", "]", "`", "\\", "%", "?", "@", "E'x'", "1", "=", "::date", "AS",
    "\U0001f600", "UNION", "WITH", "DELETE",
]  # fmt: skip


def test_sql_that_cannot_run_only_fails_its_run(world):
    world.people("ann")

    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.sampled_from(WORDS), max_size=12))
    def check(words):
        sql = "SELECT user_id FROM people WHERE 1 = 1 " + " ".join(words)
        assert world.sync(world.audience(sql)).status in {"succeeded", "failed"}

    check()
    assert world.query("SELECT user_id FROM people") == [("ann",)]
