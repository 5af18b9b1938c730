"""Statements of the queue and of pruning use indexes with any statistics; none reads a whole table."""

import datetime as dt
import re

import pytest

from audience_sync.db import dialects, engines, tables
from audience_sync.queue import backlog, conditions, deliveries, due
from audience_sync.retention import pruning
from audience_sync.retention.pruning import Retention
from tests.plans import recorded_plans

SETTLED, PENDING = 6_000, 600
DAY = 86_400.0
LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
LATELY = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LARGE = "deliveries|requests|calls|past_members|d|b"
WHOLE = {
    "sqlite": re.compile(rf"SCAN ({LARGE})(_\d)?$"),
    "postgresql": re.compile(rf"Seq Scan on ({LARGE})\b"),
}


def delivery(number, action, status):
    at = LONG_AGO if status == "accepted" else LATELY
    return {
        "action": action,
        "subject_id": f"u{number}",
        "body": {"vip": True} if action == "identify" else {"event_name": "Signed Up"},
        "class": "call" if action == "track" else "change",
        "run_id": None if action == "track" else 1,
        "definition_id": None if action == "track" else 1,
        "call_id": number if action == "track" else None,
        "value_at": at,
        "status": status,
        "created_at": at,
        "next_attempt_at": at,
        "settled_at": at if status == "accepted" else None,
        "request_id": number if status == "accepted" else None,
    }


@pytest.fixture(params=["unknown", "known"])
def filled(engine, request):
    """A long queue with a long history, with and without statistics of it in PostgreSQL."""
    rows = [delivery(number, "identify", "accepted") for number in range(1, SETTLED + 1)]
    rows += [
        delivery(number, action, "pending") for action in ("identify", "track") for number in range(PENDING)
    ]
    past = {"lane": "identify", "epoch": 1, "started_at": LONG_AGO, "ended_at": LONG_AGO, "delivery_count": 1}
    with engines.write(engine) as connection:
        connection.execute(tables.requests.insert(), [past] * SETTLED)
        connection.execute(tables.deliveries.insert(), rows)
        if request.param == "known" and not dialects.is_sqlite(engine):
            dialects.sql(connection, "ANALYZE")
    return engine


@pytest.fixture
def plans(filled):
    """Each statement with its plan."""
    with recorded_plans(filled) as recorded:
        yield recorded


def assert_uses_indexes(plans, backend, *, but=()):
    for statement, plan in plans:
        whole = [line for line in plan if WHOLE[backend].search(line)]
        assert not whole or any(each in statement for each in but), (statement, plan)


def test_the_queue_is_counted_without_sorting_it(filled, plans):
    with engines.read(filled) as connection:
        assert backlog.pending_counts(connection) == {"identify": PENDING, "track": PENDING}
    assert len(plans) == 1
    assert not [line for _, plan in plans for line in plan if "TEMP B-TREE" in line or "Sort" in line]


@pytest.mark.parametrize("backend", ["postgresql"])
def test_plans_that_are_off_but_inevitable_are_not_compiled(engine):
    def settings(connection):
        names = ("enable_seqscan", "jit")
        return [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]

    with engines.write(engine) as connection:
        conditions.prefer_index_scans(connection)
        assert settings(connection) == ["off", "off"]
    with engines.read(engine) as connection:
        assert settings(connection) == ["on", "on"]


def test_a_search_finds_its_position_among_many_deliveries_of_one_moment_by_the_index(filled, plans):
    with engines.read(filled) as connection:
        position = (LATELY, SETTLED + PENDING // 2)
        stretch = due.read_stretch(connection, "identify", "change", LATELY, position, 50)
    assert [subject.subject_id for subject in stretch.subjects] == [
        f"u{300 + number}" for number in range(50)
    ]
    assert (stretch.end, stretch.is_last) == ((LATELY, SETTLED + PENDING // 2 + 50), False)
    plan = " ".join(line for _, lines in plans for line in lines)
    assert re.search(r"next_attempt_at ?= ?\S[^\n]*delivery_id ?> ?", plan), plan


def test_delivery_uses_indexes(plans, backend, worker_of):
    worker = worker_of(on_progress=lambda report: report.accepted_count > 60 and worker.stop.set())
    worker.deliver()
    run = " ".join(statement for statement, _ in plans)
    assert all(words in run for words in ("IS NOT NULL", "UPDATE", "requests SET ended_at", "min("))
    # PostgreSQL may: to recover, once when a process takes over; and to build a hash of tracks that wait for an identify.
    once = ["ended_at IS NULL", "b.action = 'track'"] if backend == "postgresql" else []
    assert_uses_indexes(plans, backend, but=once)


OF_SUBJECTS = {"claim", "sending", "unsettled", "attempted", "isolated", "accepted"}  # their names end so


def test_no_statement_of_delivery_reads_all_deliveries_of_a_status_or_subject(plans, filled, worker_of):
    now = LATELY
    hot = [delivery(1, action, "pending") | {"subject_id": "hot"} for action in ("identify", "track")]
    company = delivery(1, "company", "pending") | {"subject_id": "hot", "body": {"seats": 1}}
    call = {"class": "call", "run_id": None, "definition_id": None, "call_id": 1, "created_at": now}
    late = hot[0] | call | {"body": {"vip": True, "@company": "hot"}, "value_at": LONG_AGO}
    accepted = hot[0] | {"status": "accepted", "settled_at": now, "request_id": 1}
    with engines.write(filled) as connection:
        rows = [*hot, company, late, late | {"alone": True}, accepted]
        for row in rows:
            connection.execute(tables.deliveries.insert(), [row] * 50)
    plans.clear()
    worker = worker_of(on_progress=lambda report: report.request_count > 60 and worker.stop.set())
    worker.deliver()
    used = {}
    searches = [each for each in plans if re.search(r"deliveries [bd]\b", each[0])]
    for statement, plan in searches:
        for index in re.findall(r"ix_deliveries_\w+", " ".join(plan)):
            used.setdefault(index.removeprefix("ix_deliveries_"), statement)
    assert used.keys() <= OF_SUBJECTS, {name: used[name] for name in used.keys() - OF_SUBJECTS}
    assert used.keys() >= {"attempted", "isolated", "accepted"}


def test_the_deliveries_of_a_job_are_settled_without_a_join(plans, filled, backend):
    in_job = delivery(1, "identify", "sending") | {"class": "push", "request_id": 1}
    with engines.write(filled) as connection:
        connection.execute(
            tables.deliveries.insert(),
            [in_job | {"subject_id": f"job-{number}"} for number in range(SETTLED // 2)],
        )
        plans.clear()
        counts = deliveries.settle_job(
            connection, 1, "completed", None, LATELY, dt.timedelta(seconds=3), SETTLED
        )
    assert counts == {"accepted": SETTLED // 2}
    assert_uses_indexes(plans, backend)
    update = next(plan for statement, plan in plans if statement.startswith("UPDATE"))
    assert not re.search("Join|Loop", " ".join(update)), update


def test_pruning_uses_indexes_and_small_transactions(plans, filled, backend, monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK", 500)
    monkeypatch.setattr(pruning, "STRETCH", 2_000)
    deleted = pruning.prune(filled, Retention(DAY, DAY, DAY, DAY), LATELY, seconds=60)
    assert (deleted["deliveries"], deleted["requests"]) == (SETTLED, SETTLED)
    delete_statements = [statement for statement, _ in plans if statement.startswith("DELETE")]
    assert len(delete_statements) >= 2 * SETTLED / 500
    assert all("LIMIT" in statement for statement in delete_statements)
    # SQLite's plan does not say that it reads a table in the order of its key only up to the limit.
    assert_uses_indexes(plans, backend, but=["LIMIT"] if backend == "sqlite" else [])
    assert not any("TEMP B-TREE" in line for _, plan in plans for line in plan)
