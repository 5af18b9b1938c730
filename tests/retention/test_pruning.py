"""Pruning deletes old rows in small transactions and keeps unsettled deliveries; the history still adds up."""

import datetime as dt
import itertools
import math
import threading
from collections import Counter
from dataclasses import astuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync import history
from audience_sync.db import dialects, engines, tables
from audience_sync.queue import destination
from audience_sync.retention import pruning
from audience_sync.retention.pruning import Retention

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
DAY = 86_400
KEEP = Retention(calls=90 * DAY, deliveries=400 * DAY, requests=90 * DAY, past_members=math.inf)
STATUSES = ("held", "pending", "sending", "accepted", "dead", "cancelled")
NOTHING = dict.fromkeys(("deliveries", "calls", "requests", "bulk_jobs", "past_members", "schedule_slots"), 0)


def ago(days):
    return NOW - dt.timedelta(days=days)


class Store:
    """The tables, filled and read without the code under test; times are days before NOW."""

    def __init__(self, engine):
        self.engine = engine
        self.numbers = itertools.count(1)

    def insert(self, table, *rows):
        with engines.write(self.engine) as connection:
            return [connection.execute(table.insert().values(row)).inserted_primary_key[0] for row in rows]

    def definition(self, key="vips"):
        return self.insert(
            tables.definitions, {"key": key, "name": key, "kind": "audience", "created_at": ago(1000)}
        )[0]

    def run(self, definition_id=1, *, finished=500, member_count=9, entered_count=0):
        row = {"mode": "changes", "trigger": "manual", "status": "succeeded", "as_of": ago(finished)}
        counts = {"member_count": member_count, "entered_count": entered_count}
        counts |= {"exited_count": 0, "changed_count": 0}
        times = {"started_at": ago(finished), "finished_at": ago(finished)}
        return self.insert(tables.runs, {"definition_id": definition_id} | row | counts | times)[0]

    def delivery(self, status, settled=500, *, created=None, subject=None, run=None, call=None, request=1):
        is_settled = status in {"accepted", "dead", "cancelled"}
        created = ago(settled if created is None else created)
        return {
            "action": "track" if call else "identify",
            "subject_id": subject or f"user {next(self.numbers)}",
            "body": {"vips": True},
            "class": "call" if call else "change",
            "run_id": None if call else run or 1,
            "definition_id": None if call else 1,
            "call_id": call,
            "value_at": created,
            "status": status,
            "created_at": created,
            "next_attempt_at": created,
            "settled_at": ago(settled) if is_settled else None,
            "request_id": request if status in {"sending", "accepted", "dead"} else None,
            "error": "refused" if status == "dead" else None,
        }

    def deliver(self, *rows):
        return self.insert(tables.deliveries, *rows)

    def call(self, received=500):
        row = {"message_id": str(next(self.numbers)), "type": "track", "user_id": "ann", "event": "Signed Up"}
        times = {"timestamp": ago(received), "received_at": ago(received)}
        return self.insert(tables.calls, row | times | {"body": {}, "status": "accepted"})[0]

    def request(self, started=500, ended=500):
        row = {"lane": "identify", "epoch": 1, "delivery_count": 1, "status_code": 202, "x_request_id": "x"}
        times = {"started_at": ago(started), "ended_at": None if ended is None else ago(ended)}
        return self.insert(tables.requests, row | times)[0]

    def ids(self, table):
        key = next(iter(table.primary_key))
        with engines.read(self.engine) as connection:
            return list(connection.execute(sa.select(key).order_by(key)).scalars())

    def rows(self, statement):
        with engines.read(self.engine) as connection:
            return [tuple(row) for row in dialects.sql(connection, statement)]

    def runs(self):
        with engines.read(self.engine) as connection:
            return history.run_rows(connection)

    def prune(self, keep=KEEP, now=NOW, **options):
        """Return how many rows of which tables were deleted."""
        deleted = pruning.prune(self.engine, keep, now, **options)
        assert deleted.keys() == NOTHING.keys()
        return {name: count for name, count in deleted.items() if count}


@pytest.fixture
def store(engine):
    return Store(engine)


@pytest.fixture
def transactions(engine):
    """Count the transactions that were committed so far."""
    commits = []
    sa.event.listen(engine, "commit", commits.append)
    return lambda: len(commits)


def test_bulk_jobs_are_pruned_with_requests_once_they_are_settled(store):
    jobs = [
        {
            "request_id": number,
            "filename": str(number),
            "job_id": "x",
            "status": status,
            "created_at": ago(days),
            "ended_at": ago(days) if status == "completed" else None,
            "settled_at": ago(days) if status == "completed" else None,
        }
        for number, (status, days) in enumerate([("completed", 91), ("completed", 89), ("running", 91)], 1)
    ]
    store.insert(tables.bulk_jobs, *jobs)
    assert store.prune() == {"bulk_jobs": 1}
    assert store.ids(tables.bulk_jobs) == [2, 3]


def test_history_adds_up_without_its_deliveries(store):
    store.definition()
    old, new = store.run(finished=500), store.run(finished=10)
    store.deliver(
        *[store.delivery("accepted", 500, run=old)] * 3,
        *[store.delivery("cancelled", 450, run=old)] * 2,
        store.delivery("dead", 500, run=old),
        store.delivery("pending", 500, run=old),
        store.delivery("accepted", 10, run=new),
    )
    runs, snapshots = store.runs(), store.rows("SELECT * FROM {our}snapshots ORDER BY run_id")
    assert store.prune() == {"deliveries": 5}
    assert store.ids(tables.deliveries) == [6, 7, 8]
    assert store.runs() == runs
    assert store.rows("SELECT * FROM {our}snapshots ORDER BY run_id") == snapshots
    names = ("run_id", "accepted_count", "cancelled_count", "dead_count", "pending_count")
    assert [tuple(run[name] for name in names) for run in store.runs()] == [(2, 1, 0, 0, 0), (1, 3, 2, 1, 1)]
    kept = "SELECT run_id, accepted_count, dead_count, cancelled_count FROM {our}runs ORDER BY run_id"
    assert store.rows(kept) == [(1, 3, 0, 2), (2, 0, 0, 0)]
    assert store.rows("SELECT accepted, pending, dead FROM {our}snapshots ORDER BY run_id") == [
        (3, 1, 1),
        (1, 0, 0),
    ]


def test_a_run_adds_to_its_counts(store):
    store.definition()
    store.run()
    for days in (0, 20):
        store.deliver(store.delivery("accepted", 401 - days), store.delivery("cancelled", 401 - days))
        assert store.prune(now=NOW + dt.timedelta(days=days)) == {"deliveries": 2}
    assert [(run["accepted_count"], run["cancelled_count"]) for run in store.runs()] == [(2, 2)]


def test_unsettled_deliveries_are_never_pruned(store):
    store.definition()
    store.run()
    store.deliver(*[store.delivery(status, 5000) for status in STATUSES])
    assert store.prune(Retention(0, 0, 0, 0)) == {"deliveries": 2}
    assert store.rows("SELECT status FROM {our}deliveries ORDER BY delivery_id") == [
        ("held",), ("pending",), ("sending",), ("dead",),
    ]  # fmt: skip


def test_a_delivery_ages_from_when_it_was_settled(store):
    store.definition()
    store.run()
    store.deliver(
        store.delivery("accepted", created=800, settled=399),
        store.delivery("accepted", created=800, settled=401),
        store.delivery("cancelled", created=800, settled=400),  # exactly the age that is kept
    )
    assert store.prune() == {"deliveries": 1}
    assert store.ids(tables.deliveries) == [1, 3]


def test_deliveries_of_calls_are_pruned_and_no_run_counts_them(store):
    store.definition()
    store.run()
    store.deliver(store.delivery("accepted", call=7), store.delivery("accepted"))
    assert store.prune() == {"deliveries": 2}
    assert [run["accepted_count"] for run in store.runs()] == [1]


def test_a_call_stays_while_a_delivery_of_it_is_not_settled(store):
    stays = [store.call(), store.call(), store.call(), store.call(), store.call(received=89)]
    goes = [store.call(), store.call(received=91), store.call()]
    store.deliver(
        *[
            store.delivery(status, 100, call=call)
            for status, call in zip(("held", "pending", "sending", "dead"), stays, strict=False)
        ],
        *[store.delivery("accepted", 100, call=call) for call in (stays[0], goes[0], stays[4])],
        store.delivery("cancelled", 100, call=goes[1]),
    )
    assert store.prune() == {"calls": 3}
    assert store.ids(tables.calls) == stays
    assert len(store.ids(tables.deliveries)) == 8


def test_events_profiles_and_companies_stay(store):
    call = store.call()
    store.insert(
        tables.events,
        {"call_id": call, "user_id": "ann", "name": "Signed Up", "properties": {}, "context": {}}
        | {"timestamp": ago(500), "received_at": ago(500)},
    )
    seen = {"first_seen_at": ago(500), "last_seen_at": ago(500), "traits": {}, "trait_times": {}}
    store.insert(tables.profiles, seen | {"user_id": "ann"})
    store.insert(tables.companies, seen | {"company_id": "acme"})
    assert store.prune() == {"calls": 1}
    for table in (tables.events, tables.profiles, tables.companies):
        assert len(store.ids(table)) == 1


def test_requests_under_way_and_new_ones_stay(store):
    store.request(ended=None)  # its process is gone, and no delivery waits for it
    under_way = store.request(ended=None)
    store.request()
    new = store.request(started=89, ended=89)
    store.deliver(store.delivery("sending", request=under_way))
    assert store.prune() == {"requests": 2}
    assert store.ids(tables.requests) == [under_way, new]


def test_a_user_is_shown_without_pruned_rows(store):
    store.definition()
    store.run(entered_count=1)
    request = store.request(started=100, ended=100)
    store.insert(tables.members, {"definition_id": 1, "user_id": "ann", "entered_run_id": 1})
    store.deliver(
        store.delivery("accepted", 500, subject="ann"),
        store.delivery("accepted", 100, subject="ann", request=request),
    )
    assert store.prune() == {"deliveries": 1, "requests": 1}
    with engines.read(store.engine) as connection:
        ann = history.user(connection, "ann")
        in_full = history.run_in_full(connection, 1)
    assert ann["memberships"] == [{"key": "vips", "value": True, "from": ago(500), "to": None}]
    (delivery,) = ann["deliveries"]
    assert (delivery["delivery_id"], delivery["status"], delivery["status_code"]) == (2, "accepted", None)
    assert (in_full["accepted_count"], in_full["entered_sample"]) == (2, ["ann"])


def past_members(store, *finished):
    """Add past members who each left in a different run."""
    for days in finished:
        run = store.run(finished=days)
        interval = {"definition_id": 1, "user_id": f"user {run}", "entered_run_id": 0, "exited_run_id": run}
        store.insert(tables.past_members, interval)


def test_past_members_stay_unless_asked(store):
    store.definition()
    past_members(store, 500, 20, 900, 10)
    assert store.prune() == {}
    assert store.prune(Retention(math.inf, math.inf, math.inf, past_members=20 * DAY)) == {"past_members": 2}
    assert store.rows("SELECT user_id FROM {our}past_members ORDER BY user_id") == [("user 2",), ("user 4",)]


def test_the_newest_old_slot_of_a_definition_stays(store):
    """It is the last one, if a slot after it was taken by a clock that was ahead."""
    for key, taken in (("vips", (99, 98, 97)), ("trials", (99, 98, -300))):
        definition = store.definition(key)
        slots = [{"definition_id": definition, "slot_at": ago(days), "taken_at": ago(days)} for days in taken]
        store.insert(tables.schedule_slots, *slots)
    assert store.prune() == {"schedule_slots": 3}
    with engines.read(store.engine) as connection:
        left = sa.select(tables.schedule_slots.c.definition_id, tables.schedule_slots.c.slot_at)
        assert sorted(map(tuple, connection.execute(left))) == [(1, ago(97)), (2, ago(98)), (2, ago(-300))]


@pytest.mark.parametrize("days", [math.inf, 999_999, 739_000])
def test_forever_and_spans_beyond_the_calendar_keep_everything(store, days):
    store.definition()
    store.deliver(store.delivery("accepted"))
    store.call()
    store.request()
    past_members(store, 500)
    store.insert(
        tables.schedule_slots,
        *({"definition_id": 1, "slot_at": ago(day), "taken_at": ago(day)} for day in (500, 499)),
    )
    assert store.prune(Retention(*[days * DAY] * 4)) == {}
    assert store.prune(Retention(*[DAY] * 4)) == {
        "deliveries": 1, "calls": 1, "requests": 1, "past_members": 1, "schedule_slots": 1,
    }  # fmt: skip


def test_the_tables_take_turns_until_the_time_is_over(store, transactions, monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK", 2)
    store.definition()
    store.run()
    store.deliver(*[store.delivery("accepted")] * 5)
    for _ in range(3):
        store.call()
    before = transactions()
    assert store.prune(seconds=0) == {"deliveries": 2, "calls": 2}
    assert transactions() == before + 5  # and one each for requests, jobs and slots
    assert [run["accepted_count"] for run in store.runs()] == [5]
    assert store.prune(seconds=0) == {"deliveries": 2, "calls": 1}
    assert store.prune() == {"deliveries": 1}
    assert store.prune() == {}
    assert [run["accepted_count"] for run in store.runs()] == [5]


def test_it_works_until_the_time_is_over(store, monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK", 1)
    store.definition()
    store.run()
    store.deliver(*[store.delivery("accepted")] * 9)
    ticks = itertools.count()
    assert store.prune(seconds=3, monotonic=lambda: next(ticks)) == {"deliveries": 3}
    assert store.prune(seconds=3, monotonic=lambda: 0) == {"deliveries": 6}


def test_rows_that_stay_are_read_in_stretches(store, transactions, monkeypatch):
    monkeypatch.setattr(pruning, "STRETCH", 4)
    store.definition()
    store.run()
    store.deliver(*[store.delivery("dead")] * 10, *[store.delivery("accepted")] * 5)
    before = transactions()
    assert store.prune(Retention(math.inf, 400 * DAY, math.inf, math.inf)) == {"deliveries": 5}
    assert transactions() == before + 4
    assert store.ids(tables.deliveries) == list(range(1, 11))


def test_old_past_members_are_pruned_among_those_that_stay(store, monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK", 1)
    monkeypatch.setattr(pruning, "STRETCH", 3)
    store.definition()
    old, new = store.run(finished=500), store.run(finished=10)
    names = ("definition_id", "user_id", "entered_run_id", "exited_run_id")
    keys = list(itertools.product((1, 2), ("Zoë", "ann", "bob"), (-2, -1)))
    exits = itertools.cycle((old, new, new, old, old))
    store.insert(
        tables.past_members,
        *(dict(zip(names, (*key, run), strict=True)) for key, run in zip(keys, exits, strict=False)),
    )
    keep = Retention(math.inf, math.inf, math.inf, 400 * DAY)
    assert store.prune(keep) == {"past_members": 7}
    left = store.rows("SELECT definition_id, user_id, entered_run_id FROM {our}past_members")
    assert sorted(left) == [
        (1, "Zoë", -1), (1, "ann", -2), (2, "Zoë", -2), (2, "Zoë", -1), (2, "bob", -1),
    ]  # fmt: skip


def test_the_walk_ends_where_rows_are_new(store, transactions, monkeypatch):
    monkeypatch.setattr(pruning, "STRETCH", 2)
    store.definition()
    store.run()
    store.deliver(*[store.delivery("accepted")] * 3, *[store.delivery("accepted", 1)] * 50)
    before = transactions()
    assert store.prune(Retention(math.inf, 400 * DAY, math.inf, math.inf)) == {"deliveries": 3}
    assert transactions() == before + 2


def test_values_that_supersede_a_dead_delivery_are_kept(store):
    store.definition()
    store.run()
    store.deliver(
        store.delivery("accepted", subject="ann"),
        store.delivery("dead", subject="ann"),
        store.delivery("accepted", subject="ann"),
        store.delivery("accepted", subject="bob"),
    )
    assert store.prune() == {"deliveries": 2}
    assert store.ids(tables.deliveries) == [2, 3]


def test_two_at_once_count_each_delivery_once(store, monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK", 7)
    store.definition()
    for _ in range(3):
        store.run()
    rows = [store.delivery("accepted", run=1 + number % 3) for number in range(150)]
    with engines.write(store.engine) as connection:
        connection.execute(tables.deliveries.insert(), rows)
    removed = []
    threads = [threading.Thread(target=lambda: removed.append(store.prune())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.get("deliveries", 0) for each in removed) == 150
    assert [run["accepted_count"] for run in store.runs()] == [50, 50, 50]


spans = st.sampled_from([1.0 * DAY, 3.0 * DAY, math.inf])
ages = st.integers(0, 5)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep=st.builds(Retention, spans, spans, spans, spans),
    # Days since a delivery was created, days until it was settled, its status, and whether it is a call's.
    queue=st.lists(st.tuples(ages, ages, st.sampled_from(STATUSES), st.booleans()), max_size=8),
    chunk=st.integers(1, 3),
    stretch=st.integers(1, 5),
)
def test_pruning_keeps_what_the_rules_say(store, monkeypatch, keep, queue, chunk, stretch):
    for table in (tables.deliveries, tables.calls, tables.requests, tables.runs, tables.definitions):
        with engines.write(store.engine) as connection:
            connection.execute(table.delete())
    monkeypatch.setattr(pruning, "CHUNK", chunk)
    monkeypatch.setattr(pruning, "STRETCH", stretch)
    run = store.run(store.definition())
    made = []
    for created, until, status, is_call in sorted(queue, reverse=True, key=lambda each: each[0]):
        settled, moment = max(0, created - until), created + 0.5
        origin = {"call": store.call(moment)} if is_call else {"run": run}
        request = store.request(moment, None if status == "sending" else settled + 0.5)
        row = store.delivery(status, settled + 0.5, created=moment, request=request, **origin)
        made.append((store.deliver(row)[0], request, origin.get("call"), moment, settled + 0.5, status))
    call_days, delivery_days, request_days, _ = (span / DAY for span in astuple(keep))
    counts = Counter((call is None, status) for *_, call, _, _, status in made)
    before = store.runs()

    assert store.prune(keep, seconds=0).get("deliveries", 0) <= chunk
    assert store.runs() == before
    store.prune(keep)
    assert store.runs() == before

    assert store.ids(tables.deliveries) == [
        delivery
        for delivery, _, _, _, settled, status in made
        if status not in {"accepted", "cancelled"} or settled <= delivery_days
    ]
    assert store.ids(tables.calls) == [
        call
        for _, _, call, created, _, status in made
        if call and (status in {"held", "pending", "sending", "dead"} or created <= call_days)
    ]
    assert store.ids(tables.requests) == [
        request
        for _, request, _, created, _, status in made
        if status == "sending" or created <= request_days
    ]
    assert [(each["accepted_count"], each["cancelled_count"]) for each in before] == [
        (counts[True, "accepted"], counts[True, "cancelled"])
    ]


def value(store, status, days, seconds=0, **columns):
    """A delivery for Ann whose value became true this many days ago."""
    row = store.delivery(status, days, subject="ann", **columns)
    return row | {"value_at": ago(days) + dt.timedelta(seconds=seconds), "action": "identify"}


@pytest.mark.parametrize("undecided", ["held", "pending", "sending", "dead"])
def test_newer_values_stay_while_an_older_one_is_undecided(store, undecided):
    store.definition()
    store.run()
    store.deliver(
        value(store, "accepted", 500, seconds=2, call=1),  # it arrived first, and is newer
        value(store, undecided, 500, call=2),
        value(store, "cancelled", 500, seconds=1),
        value(store, "accepted", 500, seconds=1),
        value(store, "accepted", 500, seconds=-1),
        value(store, "accepted", 450) | {"subject_id": "bob"},
        store.delivery("accepted", 500, call=3) | {"subject_id": "ann"},  # a track decides nothing
        value(store, "accepted", 500, seconds=2, call=1) | {"action": "company"},
    )
    assert store.prune() == {"deliveries": 4}
    assert store.ids(tables.deliveries) == [1, 2, 3, 4]
    decide = tables.deliveries.update().where(tables.deliveries.c.delivery_id == 2)
    with engines.write(store.engine) as connection:
        connection.execute(decide.values(status="cancelled", settled_at=ago(0), error="discarded"))
    assert store.prune() == {"deliveries": 3}


def test_never_sent_deliveries_are_kept_only_while_nothing_else_was_sent(store):
    """Otherwise the sent deliveries could be pruned first, and nothing would be sent to a user who leaves."""
    store.definition()
    store.run()
    store.deliver(
        value(store, "cancelled", 500),
        value(store, "accepted", 500) | {"definition_id": 2},
        value(store, "pending", 1) | {"definition_id": 2},
    )
    assert store.prune() == {"deliveries": 1}
    assert store.ids(tables.deliveries) == [1, 3]
    store.deliver(value(store, "accepted", 400))
    assert store.prune() == {"deliveries": 1}
    assert store.ids(tables.deliveries) == [3, 4]


def test_a_subject_with_many_pending_values_keeps_its_settled_ones(store):
    store.deliver(value(store, "accepted", 500, call=1), *[value(store, "pending", 1, call=1)] * 10)
    assert store.prune() == {"deliveries": 1}
    store.deliver(value(store, "accepted", 500, call=1), value(store, "pending", 1, call=1))
    assert store.prune() == {}


@pytest.mark.parametrize("undecided", ["held", "pending", "sending", "dead"])
def test_past_memberships_stay_while_a_value_is_undecided(store, undecided):
    store.definition()
    run = store.run()
    interval = {"definition_id": 1, "entered_run_id": 0, "exited_run_id": run}
    store.insert(tables.past_members, interval | {"user_id": "ann"}, interval | {"user_id": "bob"})
    store.deliver(value(store, undecided, 500))
    keep = Retention(math.inf, math.inf, math.inf, 20 * DAY)
    assert store.prune(keep) == {"past_members": 1}
    assert store.rows("SELECT user_id FROM {our}past_members") == [("ann",)]


def test_a_stopped_destination_keeps_the_proof_that_it_was_in_use(store):
    with engines.write(store.engine) as connection:
        destination.stop(connection, NOW, "refused")
    store.deliver(store.delivery("accepted", call=1), store.delivery("cancelled", call=2))
    assert store.prune() == {"deliveries": 1}
    with engines.write(store.engine) as connection:
        assert destination.has_accepted(connection, "A") is False
        connection.execute(tables.deliveries.update().values(fingerprint="A"))
        assert destination.has_accepted(connection, "A") is True
        destination.resume(connection)
    assert store.prune() == {"deliveries": 1}


def test_past_members_of_every_definition_get_their_turn(engine, monkeypatch):
    """Even if the first definitions have any number of recent past members, and in very little time."""
    monkeypatch.setattr(pruning, "STRETCH", 10)
    run = {"mode": "changes", "trigger": "schedule", "status": "succeeded", "member_count": 0}
    old, new = NOW - dt.timedelta(days=30), NOW - dt.timedelta(hours=1)
    with engines.write(engine) as connection:
        for definition_id in (1, 2):
            connection.execute(
                tables.definitions.insert(),
                {
                    "definition_id": definition_id,
                    "key": f"k{definition_id}",
                    "name": "A",
                    "kind": "audience",
                    "created_at": old,
                    "retired_at": old,
                },
            )
        for run_id, definition_id, at in ((1, 2, old), (2, 1, new)):
            moments = {"as_of": at, "started_at": at, "finished_at": at}
            connection.execute(
                tables.runs.insert(), run | moments | {"run_id": run_id, "definition_id": definition_id}
            )
        past = [
            {"definition_id": 1, "user_id": f"u{number}", "entered_run_id": 1, "exited_run_id": 2}
            for number in range(100)
        ]
        past.append({"definition_id": 2, "user_id": "left", "entered_run_id": 1, "exited_run_id": 1})
        connection.execute(tables.past_members.insert(), past)
    retention = Retention(calls=math.inf, deliveries=math.inf, requests=math.inf, past_members=86_400.0)
    assert pruning.prune(engine, retention, NOW, seconds=0)["past_members"] == 1
