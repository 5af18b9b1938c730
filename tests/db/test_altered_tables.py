"""A migration that alters a table keeps everything that belongs to it, in upgrades and downgrades.

SQLite rebuilds the table, which by itself loses its counter of ids, its triggers and its indexes.
"""

import re

import pytest
import sqlalchemy as sa

from audience_sync.db import dialects, engines, migrate
from tests.db.catalogs import catalog

FIRST = migrate.KNOWN[0]
UP_DOWN_UP = [*migrate.KNOWN, *reversed(migrate.KNOWN[:-1]), *migrate.KNOWN[1:]]
AT = "2026-01-01 00:00:00.000000"
DEFINITION = {"definition_id": 1, "key": "vips", "name": "VIPs", "kind": "audience", "created_at": AT}
RUN = {
    "definition_id": 1,
    "mode": "first",
    "trigger": "manual",
    "status": "succeeded",
    "as_of": AT,
    "started_at": AT,
    "finished_at": AT,
    "member_count": 0,
}
CALL = {
    "message_id": "m",
    "type": "track",
    "body": "{}",
    "timestamp": AT,
    "received_at": AT,
    "status": "accepted",
}
DELIVERY = {
    "action": "identify",
    "subject_id": "ann",
    "body": "{}",
    "class": "call",
    "call_id": 1,
    "value_at": AT,
    "status": "pending",
    "created_at": AT,
    "next_attempt_at": AT,
}
EVENT = {
    "user_id": "ann",
    "name": "Left",
    "properties": "{}",
    "context": "{}",
    "timestamp": AT,
    "received_at": AT,
}
REQUEST = {"lane": "track", "epoch": 1, "started_at": AT, "delivery_count": 1}
KEYS = {"runs": "run_id", "calls": "call_id", "deliveries": "delivery_id", "requests": "request_id"}
NEW_ROWS = {"runs": RUN, "calls": CALL, "deliveries": DELIVERY, "requests": REQUEST}  # valid at every version
PRUNED = 41  # an id whose row was pruned
REFERENCES = [  # a row that refers to it: the table of the id, that of the row, the row
    ("calls", "calls", CALL | {"call_id": PRUNED, "message_id": "itself"}),
    ("calls", "deliveries", DELIVERY | {"call_id": PRUNED}),
    ("calls", "events", EVENT | {"call_id": PRUNED}),
    ("runs", "runs", RUN | {"baseline_run_id": PRUNED}),
    ("runs", "deliveries", DELIVERY | {"call_id": None, "run_id": PRUNED, "definition_id": 1}),
    ("runs", "members", {"definition_id": 1, "user_id": "ann", "entered_run_id": PRUNED}),
    (
        "runs",
        "past_members",
        {"definition_id": 1, "user_id": "ann", "entered_run_id": PRUNED, "exited_run_id": 2},
    ),
    (
        "runs",
        "past_members",
        {"definition_id": 1, "user_id": "ann", "entered_run_id": 2, "exited_run_id": PRUNED},
    ),
    ("runs", "schedule_slots", {"definition_id": 1, "slot_at": AT, "taken_at": AT, "run_id": PRUNED}),
    ("requests", "deliveries", DELIVERY | {"request_id": PRUNED}),
    (
        "requests",
        "bulk_jobs",
        {"request_id": PRUNED, "filename": "users.csv", "status": "uploading", "created_at": AT},
    ),
    ("deliveries", "deliveries", DELIVERY | {"delivery_id": PRUNED}),
]


@pytest.fixture
def empty(empty_url):
    engine = engines.open_own(empty_url, "audience_sync")
    yield engine
    engine.dispose()


def go_to(engine, revision):
    """Upgrade or downgrade to a version."""
    present = migrate.current(engine)
    if present is None or revision > present:
        migrate.upgrade(engine, revision)
    elif revision < present:
        migrate.downgrade(engine, revision)
    assert migrate.current(engine) == revision


def insert(connection, table, row, suffix=""):
    """Insert a row by its columns at the database's version, which may differ from the newest ones."""
    our = connection.get_execution_options()["our"]
    columns = ", ".join(f'"{name}"' for name in row)
    values = ", ".join("NULL" if value is None else f"'{value}'" for value in row.values())
    return connection.exec_driver_sql(f"INSERT INTO {our}{table} ({columns}) VALUES ({values}) {suffix}")


def new_id(connection, table):
    """Insert a row, return its id and delete it, as pruning does."""
    key = KEYS[table]
    row_id = insert(connection, table, NEW_ROWS[table], f"RETURNING {key}").scalar_one()
    dialects.sql(connection, f"DELETE FROM {{our}}{table} WHERE {key} = :id", id=row_id)
    return row_id


def test_the_id_of_a_pruned_row_is_never_given_out_again(empty):
    last = dict.fromkeys(NEW_ROWS, 0)
    for revision in UP_DOWN_UP:
        go_to(empty, revision)
        with engines.write(empty) as connection:
            if revision == FIRST and not any(last.values()):
                insert(connection, "definitions", DEFINITION)
            for table in NEW_ROWS:
                row_id = new_id(connection, table)
                assert row_id > last[table], f"{table} gave {row_id} again at {revision}"
                last[table] = row_id


def user_objects(engine):
    """The triggers, indexes and views that a person added to our database."""
    if dialects.is_sqlite(engine):
        query = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name LIKE 'my\\_%' ESCAPE '\\'"
    else:
        query = (
            "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname LIKE 'my\\_%' "
            "UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE indexname LIKE 'my\\_%' "
            "UNION ALL SELECT viewname, definition FROM pg_views WHERE viewname LIKE 'my\\_%'"
        )
    with engines.read(engine) as connection:
        return sorted(tuple(row) for row in connection.exec_driver_sql(query.replace("%", "%%")))


def add_user_objects(engine, table):
    """Add a trigger, an index and a view of a table, as people do who query our database."""
    with engines.write(engine) as connection:
        if dialects.is_sqlite(engine):
            dialects.sql(
                connection,
                f"CREATE TRIGGER my_{table}_trigger AFTER INSERT ON {table} BEGIN UPDATE my_log SET seen = 1; END",
            )
        else:
            dialects.sql(
                connection,
                f"CREATE TRIGGER my_{table}_trigger AFTER INSERT ON {{our}}{table} EXECUTE FUNCTION my_log()",
            )
        column = next(
            iter(
                sa.inspect(connection).get_pk_constraint(table, engine.get_execution_options().get("schema"))[
                    "constrained_columns"
                ]
            )
        )
        dialects.sql(
            connection,
            f"CREATE INDEX my_{table}_index ON {{our}}{table} ({column}) WHERE {column} IS NOT NULL",
        )
        dialects.sql(
            connection, f"CREATE VIEW my_{table}_view AS SELECT count(*) AS number FROM {{our}}{table}"
        )


def test_triggers_indexes_and_views_that_people_added_stay(empty):
    go_to(empty, FIRST)
    with engines.write(empty) as connection:
        dialects.sql(connection, "CREATE TABLE my_log (seen integer)")
        if not dialects.is_sqlite(empty):
            dialects.sql(
                connection,
                "CREATE FUNCTION my_log() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            )
        names = sa.inspect(connection).get_table_names(empty.get_execution_options().get("schema"))
    for table in names:
        if table not in {migrate.VERSION_TABLE, "my_log"}:
            add_user_objects(empty, table)
    before = user_objects(empty)
    assert len(before) > 3 * 10
    for revision in UP_DOWN_UP:
        go_to(empty, revision)
        assert user_objects(empty) == before, revision


def test_the_catalog_of_a_version_is_the_same_whichever_way_it_was_reached(empty):
    catalogs = {}
    for revision in UP_DOWN_UP:
        go_to(empty, revision)
        assert catalogs.setdefault(revision, catalog(empty)) == catalog(empty), revision


@pytest.mark.parametrize(
    ("table", "referring", "row"),
    REFERENCES,
    ids=[f"{table} in {referring}" for table, referring, _ in REFERENCES],
)
def test_a_counter_that_an_earlier_release_lost_is_raised_above_every_id_in_use(empty, table, referring, row):
    go_to(empty, "0005")
    with engines.write(empty) as connection:
        insert(connection, "definitions", DEFINITION)
        insert(connection, referring, row)
        reset_counter(connection, table)
    migrate.upgrade(empty)
    with engines.write(empty) as connection:
        assert new_id(connection, table) == PRUNED + 1


def test_a_counter_that_is_higher_than_every_id_in_use_stays(empty):
    go_to(empty, "0005")
    with engines.write(empty) as connection:
        insert(connection, "definitions", DEFINITION)
        before = {table: [new_id(connection, table) for _ in range(5)][-1] for table in NEW_ROWS}
    migrate.upgrade(empty)
    with engines.write(empty) as connection:
        assert {table: new_id(connection, table) for table in NEW_ROWS} == {
            table: row_id + 1 for table, row_id in before.items()
        }


def reset_counter(connection, table):
    if dialects.is_sqlite(connection):
        dialects.sql(connection, "DELETE FROM sqlite_sequence WHERE name = :name", name=table)
    else:
        sequence = f"pg_get_serial_sequence('audience_sync.{table}', '{KEYS[table]}')"
        dialects.sql(connection, f"SELECT setval({sequence}, 1, false)")


def test_migrations_alter_tables_in_the_way_that_keeps_all(repository):
    for path in (repository / "migrations" / "versions").glob("*.py"):
        assert not re.search(r"batch_alter_table|ALTER TABLE", path.read_text()), (
            f"{path.name}: use audience_sync.db.alter.alter_table"
        )
