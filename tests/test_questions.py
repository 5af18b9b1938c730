"""Each question of the command line reads what it needs by an index, and no large table as a whole."""

import datetime as dt
import re

import pytest

from audience_sync import history
from audience_sync.db import dialects, engines, tables
from audience_sync.retention import erasure
from audience_sync.settings import load
from tests.conftest import SCHEMA
from tests.plans import recorded_plans

ROWS = 3_000
NOON = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
LATER = NOON + dt.timedelta(days=30)
LARGE = "deliveries|requests|calls|members|past_members|runs|events|profiles"
ALIAS = "|d|b|q|h|m|p"  # as SQLite names them in its plans
WHOLE = {
    "sqlite": re.compile(rf"SCAN ({LARGE}{ALIAS})(_\d)?$"),
    "postgresql": re.compile(rf"Seq Scan on ({LARGE})\b"),
}
CALL = {"type": "track", "body": {}, "timestamp": NOON, "received_at": NOON, "status": "accepted"}
RUN = {"mode": "changes", "trigger": "schedule", "as_of": NOON, "started_at": NOON, "finished_at": NOON}
EVENT = {"name": "Seen", "properties": {}, "context": {}, "timestamp": NOON, "received_at": NOON}
PROFILE = {"traits": {}, "trait_times": {}, "first_seen_at": NOON, "last_seen_at": NOON}
DELIVERY = {
    "action": "identify",
    "body": {"vips": True},
    "class": "change",
    "definition_id": 1,
    "value_at": NOON,
    "status": "accepted",
    "created_at": NOON,
    "next_attempt_at": NOON,
    "settled_at": NOON,
}
UNUSUAL = {  # statuses of a few deliveries, with what they need
    "pending": {"settled_at": None},
    "sending": {"settled_at": None},
    "held": {"settled_at": None},
    "dead": {"error": "refused"},
    "cancelled": {},
}


def rows():
    """Rows for each table, of three definitions, whose last runs are the newest."""
    numbers = range(1, ROWS + 1)
    yield (
        tables.definitions,
        [
            {
                "definition_id": number,
                "key": f"key{number}",
                "name": "A",
                "kind": "audience",
                "created_at": NOON,
            }
            for number in (1, 2, 3)
        ],
    )
    yield (
        tables.runs,
        [
            RUN | {"definition_id": number % 3 + 1, "status": "succeeded", "member_count": ROWS}
            for number in numbers
        ],
    )
    yield (
        tables.members,
        [
            {"definition_id": definition_id, "user_id": f"u{number}", "entered_run_id": number}
            for definition_id in (1, 2, 3)
            for number in numbers
        ],
    )
    yield (
        tables.past_members,
        [
            {
                "definition_id": number % 3 + 1,
                "user_id": f"u{number}",
                "entered_run_id": number,
                "exited_run_id": number + 1,
            }
            for number in numbers
        ],
    )
    yield (
        tables.requests,
        [
            {"lane": "identify", "epoch": 1, "started_at": NOON, "ended_at": NOON, "delivery_count": 1}
            for _ in numbers
        ],
    )
    yield (
        tables.deliveries,
        [
            DELIVERY
            | {"subject_id": f"u{number}", "run_id": number, "request_id": number, "error": None}
            | (
                UNUSUAL[list(UNUSUAL)[number]] | {"status": list(UNUSUAL)[number]}
                if number < len(UNUSUAL)
                else {}
            )
            for number in range(ROWS)
        ],
    )
    yield (
        tables.calls,
        [
            CALL | {"message_id": f"m{number}", "user_id": f"u{number}", "anonymous_id": f"a{number}"}
            for number in numbers
        ],
    )
    yield tables.calls, [CALL | {"message_id": "ignored", "status": "ignored", "reason": "why"}]
    yield tables.events, [EVENT | {"call_id": number, "user_id": f"u{number}"} for number in numbers]
    yield tables.profiles, [PROFILE | {"user_id": f"u{number}"} for number in numbers]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=["unknown", "known"])
def filled(backend, new_database, tmp_path_factory, request):
    """A database with a long history, with and without statistics of it. All questions are asked of it."""
    engine = engines.open_own(new_database(backend, tmp_path_factory.mktemp("filled")), SCHEMA)
    with engines.write(engine) as connection:
        for table, new in rows():
            connection.execute(table.insert(), new)
        if request.param == "known":
            dialects.sql(connection, "ANALYZE")
    yield engine
    engine.dispose()


@pytest.fixture
def plans(filled):
    """Each statement with its plan."""
    with recorded_plans(filled) as recorded:
        yield recorded


def changes_of(connection, status, what):
    """The changes of a run with such a state, which has some of each."""
    counts = {"entered_count": 9, "exited_count": 9, "changed_count": 9, "member_count": 9}
    new = RUN | counts | {"definition_id": 1, "status": status, "held_by": "hold"}
    [run_id] = connection.execute(tables.runs.insert().values(new)).inserted_primary_key
    history.change_rows(connection, run_id, what, after="u1", limit=20)


QUESTIONS = {
    "status": lambda connection, settings: history.status(connection, settings, LATER),
    "list": lambda connection, settings: history.definitions(connection, settings, LATER),
    "history": lambda connection, _: history.run_rows(connection, key="key1", limit=20),
    "history of all": lambda connection, _: history.run_rows(connection, limit=20),
    "runs of a state": lambda connection, _: history.run_rows(connection, status="failed", limit=20),
    "show": lambda connection, _: history.run_in_full(connection, 7),
    **{
        f"{what} in a {status} run": lambda connection, _, what=what, status=status: changes_of(
            connection, status, what
        )
        for what in history.CHANGES
        for status in ("succeeded", "held", "rejected")
    },
    "deliveries of changes": lambda connection, _: history.deliveries_of(connection, 7, ["u6", "u7"]),
    "settled": lambda connection, _: history.settled_at(connection, 7),
    "attention": lambda connection, settings: history.attention(connection, settings, LATER),
    "problems": lambda connection, settings: history.problems(
        connection, settings, history.attention(connection, settings, LATER), LATER
    ),
    "backlogs": lambda connection, _: history.backlogs(connection),
    "recent runs": lambda connection, _: history.recent_runs(connection),
    "sizes": lambda connection, _: history.size_rows(connection, 1, 20),
    "definition": lambda connection, settings: history.definitions(connection, settings, LATER, "key1"),
    "members": lambda connection, _: history.member_page(connection, 1, limit=20, prefix="u1", after="u12"),
    "members at a time": lambda connection, _: history.member_page(connection, 1, NOON, limit=20),
    "user": lambda connection, _: history.user(connection, "u7"),
    "calls": lambda connection, _: history.call_rows(connection, "ignored", limit=20),
    "calls of all": lambda connection, _: history.call_rows(connection, None, limit=20),
    "memberships": lambda connection, _: history.memberships_now(connection, "u7"),
    "time line": lambda connection, _: history.time_line(connection, "u7", before=2_000, limit=20),
    "waiting": lambda connection, _: history.waiting_of_user(connection, "u7", 20),
    "similar ids": lambda connection, _: history.similar_ids(connection, "U7"),
    "past day": lambda connection, _: history.past_day(connection, LATER),
    "next day": lambda connection, settings: history.next_day(connection, settings, LATER),
    "names": lambda connection, _: history.event_names(connection),
    "dead that match": lambda connection, _: history.count_dead(
        connection, action="identify", key="key1", user_id=None, error="refused"
    ),
    **{
        f"deliveries of {filters}": lambda connection, _, filters=filters: history.find_deliveries(
            connection, **filters, limit=20
        )
        for filters in (
            {},
            {"status": "dead", "error": "nothing"},
            {"status": "accepted", "key": "key1", "before": 900},
            {"user_id": "u7"},
            {"user_id": "u7", "status": "dead", "before": 900},
            {"run_id": 7},
            {"run_id": 7, "status": "accepted", "before": 900},
        )
    },
    **{
        f"calls of {filters}": lambda connection, _, filters=filters: history.find_calls(
            connection, **filters, limit=20
        )
        for filters in ({"status": "ignored"}, {"user_id": "u7", "event": "Seen"}, {"event": "Seen"})
    },
    "deliveries of a request": lambda connection, _: history.deliveries_of_request(connection, 7, None, 20),
    "requests": lambda connection, _: history.find_requests(connection, outcome="refused", limit=20),
    "forget": lambda connection, _: erasure.forget(connection, "u7", LATER),
    **{
        f"deliveries {status}": lambda connection, _, status=status: history.delivery_rows(
            connection, status=status, limit=20
        )
        for status in (*UNUSUAL, "accepted")
    },
}


# The number of calls is counted as a whole.
COUNTED = re.compile(r"SELECT count\(\*\) AS count_1 \nFROM \S*calls$")


def is_in_order(statement):
    """Whether the statement reads a table from its newest row on, until a limit."""
    where = statement.partition("\nFROM ")[2]
    return "WHERE" not in where and "DESC" in where and "LIMIT" in where


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "audience_sync.toml").write_text(
        "".join(
            f'[[audiences]]\nname = "Key{number}"\nkey = "key{number}"\nsql = "SELECT 1"\n'
            for number in (1, 2, 3)
        )
    )
    return load(tmp_path / "audience_sync.toml", {})


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_uses_indexes(plans, filled, backend, settings, question):
    with filled.connect() as connection, engines.begin_write(connection):
        if backend == "postgresql":  # which prefers to read small tables as a whole
            dialects.sql(connection, "SET LOCAL enable_seqscan = off")
        QUESTIONS[question](connection, settings)
        connection.get_transaction().rollback()
    assert plans
    for statement, plan in plans:
        whole = [line for line in plan if WHOLE[backend].search(line)]
        assert not whole or is_in_order(statement) or COUNTED.search(statement), (statement, plan)


def test_the_deliveries_of_a_runs_users_are_found_among_those_of_the_run(plans, filled, backend):
    with engines.read(filled) as connection:
        if backend == "postgresql":
            dialects.sql(connection, "SET LOCAL enable_seqscan = off")
        history.deliveries_of(connection, 7, ["u6", "u7"])
    is_bounded = (
        r"USING INDEX ix_deliveries_subject_id \(subject_id=\? AND delivery_id>\? AND delivery_id<\?\)"
        if backend == "sqlite"
        else r"Index Cond: .*delivery_id >= .*delivery_id <= "
    )
    assert any(re.search(is_bounded, line) for line in plans[-1][1]), plans[-1]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize("what", history.CHANGES)
@pytest.mark.parametrize("status", ["succeeded", "held"])
def test_the_changes_of_a_run_are_read_in_order_from_the_last_page_on(
    plans, filled, monkeypatch, what, status
):
    monkeypatch.setattr("audience_sync.history.changes.SORTED_ROWS", 0)
    with filled.connect() as connection, engines.begin_write(connection):
        changes_of(connection, status, what)
        connection.get_transaction().rollback()
    statement, plan = plans[-1]
    assert "definition_id = ?" in statement
    by_run = (
        r"SEARCH [eb] USING .*INDEX ix_\w+ \((entered|exited)_run_id=\? AND definition_id=\? AND user_id>\?\)"
    )
    reads = [line for line in plan if re.match(by_run, line)]
    if status == "held":
        reads = [line for line in plan if line == "SEARCH d USING INDEX ix_deliveries_waiting (subject_id>?)"]
        assert not any("TEMP B-TREE" in line for line in plan)
    assert len(reads) == (1 if status == "held" or what == "exited" else 2), plan
    assert not any(line.endswith("PRIMARY KEY (definition_id=? AND user_id>?)") for line in plan)


def test_the_backlog_of_a_lane_is_counted_in_its_index_alone(plans, filled):
    with engines.read(filled) as connection:
        history.backlogs(connection)
    pending = [plan for statement, plan in plans if "'pending'" in statement]
    assert len(pending) == 3
    assert all(any("ix_deliveries_claim" in line for line in plan) for plan in pending)


def test_the_overview_reads_only_the_unsettled_deliveries_of_a_run(plans, filled, settings):
    with engines.read(filled) as connection:
        history.recent_runs(connection)
        rows = history.definitions(connection, settings, LATER, counted=False)
    assert {"run_id", "status", "error"} <= rows[0]["last_run"].keys()
    assert "accepted_count" not in rows[0]["last_run"]
    of_deliveries = [plan for statement, plan in plans if "deliveries.run_id" in statement]
    assert len(of_deliveries) == 1
