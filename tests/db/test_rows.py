"""Many rows in a statement, or by COPY, arrive as single rows would."""

import datetime as dt
import os
import signal
import threading
import time

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audience_sync.db import dialects, engines, rows
from audience_sync.db.tables import events, profiles
from audience_sync.errors import DatabaseError, Interrupted

COLUMNS = ("call_id", "user_id", "name", "properties", "context", "timestamp", "received_at")
NOON = rows.moment(dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC))
NASTY = [
    "\t",
    "\n",
    "\r",
    "\\",
    r"\N",
    r"\.",
    "\\\n",
    "\x01",
    "%s",
    "'",
    '"',
    "{}",
    "null",
    "",
    "größe",
    "\U0001f600",
    "\x7f",
]
TEXT = st.lists(st.sampled_from(NASTY) | st.text(st.characters(exclude_characters="\0", codec="utf-8"))).map(
    "".join
)


def written(connection, texts):
    """Inserts an event for each text; what is then companies in their order."""
    new_rows = [
        (number, text, text, engines.to_json({"a": text}), "{}", NOON, NOON)
        for number, text in enumerate(texts)
    ]
    assert rows.insert(connection, events, COLUMNS, new_rows) == len(texts)
    companies = connection.execute(sa.select(events).order_by(events.c.event_id)).all()
    assert [row.call_id for row in companies] == list(range(len(texts)))
    assert all(
        row.timestamp == row.received_at == dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC) for row in companies
    )
    return [(row.user_id, row.name, row.properties["a"]) for row in companies]


# PostgreSQL has two ways: COPY for this many rows, a statement for fewer.
@pytest.mark.parametrize(
    ("backend", "many"),
    [("sqlite", 1), ("postgresql", 1), ("postgresql", 1_000)],
    ids=["sqlite", "copy", "statement"],
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, max_size=8))
def test_any_text_comes_back_as_it_was(engine, many, monkeypatch, texts):
    monkeypatch.setattr(rows, "COPY_FROM", many)
    monkeypatch.setattr(rows, "ROWS_PER_STATEMENT", 3)
    with engines.write(engine) as connection:
        assert written(connection, texts) == [(text, text, text) for text in texts]
        connection.execute(events.delete())


@pytest.mark.parametrize("count", [1, 499, 500, 501, 2_500])
def test_existing_rows_are_not_inserted_again(engine, count):
    columns = ("user_id", "traits", "trait_times", "first_seen_at", "last_seen_at")
    new_rows = [(f"u{number}", "{}", "{}", NOON, NOON) for number in range(count)]
    suffix = "ON CONFLICT (user_id) DO NOTHING"
    with engines.write(engine) as connection:
        assert rows.insert(connection, profiles, columns, new_rows[::2], suffix) == len(new_rows[::2])
        assert rows.insert(connection, profiles, columns, new_rows, suffix) == count // 2
        assert rows.insert(connection, profiles, columns, [], suffix) == 0
        assert connection.execute(sa.select(sa.func.count()).select_from(profiles)).scalar() == count


@pytest.mark.parametrize("count", [1, 2_500])
def test_an_update_sets_the_columns_where_the_condition_holds(engine, count):
    at = [rows.moment(dt.datetime(2026, 5, day, tzinfo=dt.UTC)) for day in (1, 2, 3)]
    columns = (
        "user_id",
        "traits",
        "trait_times",
        "company_id",
        "company_at",
        "first_seen_at",
        "last_seen_at",
    )
    existing = [(f"u{number}", "{}", "{}", None, at[number % 2], NOON, NOON) for number in range(2 * count)]
    new_rows = [(f"u{number}", f"c\t{number}", at[0]) for number in range(count)]
    with engines.write(engine) as connection:
        rows.insert(connection, profiles, columns, existing)
        changed = rows.update(
            connection,
            profiles,
            ("user_id", "company_id", "company_at"),
            new_rows,
            "t.company_at <= {company_at}",
        )
        assert changed == -(-count // 2)
        companies = dict(iter(connection.execute(sa.select(profiles.c.user_id, profiles.c.company_id))))
        assert companies == {
            f"u{number}": f"c\t{number}" if number < count and number % 2 == 0 else None
            for number in range(2 * count)
        }


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_times_are_utc_whatever_the_url_says(url):
    engine = engines.open_own(f"{url}&options=-c%20timezone%3DAsia/Tokyo", "audience_sync")
    with engines.write(engine) as connection:
        assert len(written(connection, ["x"] * 2_000)) == 2_000
    engine.dispose()


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_connection_that_ends_in_the_middle_is_a_plain_error(engine, postgres):
    def die_half_way():
        with engines.write(engine) as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            with dialects.copy_in(
                connection, f"COPY {engine.get_execution_options()['our']}calls FROM STDIN"
            ) as copy:
                postgres.run(f"SELECT pg_terminate_backend({pid})")
                for _ in range(100):
                    copy.write("x" * 100_000)

    with pytest.raises(DatabaseError, match=r"cannot be used: .*Is the server running"):
        die_half_way()
    with engines.write(engine) as connection:
        assert written(connection, ["x"]) == [("x", "x", "x")]


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.parametrize("sent", ["a\n", "a" * 50_000_000], ids=["at-its-end", "in-its-middle"])
def test_a_signal_ends_a_copy(engine, sent, caplog):
    def stop(*_):
        raise Interrupted("stopped")

    def copy_slowly():
        with engines.write(engine) as connection:
            for statement in (
                "CREATE TEMPORARY TABLE slow (a text)",
                (
                    "CREATE FUNCTION pg_temp.wait() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$"
                ),
                "CREATE TRIGGER wait BEFORE INSERT ON slow FOR EACH ROW EXECUTE FUNCTION pg_temp.wait()",
            ):
                connection.exec_driver_sql(statement)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with dialects.copy_in(connection, "COPY slow FROM STDIN") as copy:
                copy.write("a\n")
                copy.write(sent)

    previous = signal.signal(signal.SIGUSR1, stop)
    began = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            copy_slowly()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert time.monotonic() - began < 30
    assert caplog.text == ""
    with engines.write(engine) as connection:
        assert written(connection, ["x"]) == [("x", "x", "x")]
