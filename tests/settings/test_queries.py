"""Queries and mapped tables in the configuration: what is refused, and with which message."""

import json

import pytest

from audience_sync import history, intake, settings
from audience_sync.app import open_app
from audience_sync.audiences.definition import Kind
from audience_sync.db import engines
from audience_sync.errors import ConfigError
from audience_sync.settings import queries

BASE = """
[sources.shop]
url = "sqlite:///shop.db"
[destination]
api_key = "k"
"""
ORDERS = '[tables.orders]\nsource = "shop"\ntable = "orders"\nuser_id = "u"\nid = "id"\n'


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "audience_sync.toml"
        path.write_text(BASE + text, encoding="utf-8")
        return settings.load(path, {})

    return load


def audience(name, query, source=None):
    where = f'source = "{source}"\n' if source else ""
    return f'[[audiences]]\nname = "{name}"\n{where}query = """{query}"""\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[audiences]]\nname = "A"\n', "missing: sql or query"),
        ('[[audiences]]\nname = "A"\nsql = "SELECT 1"\nquery = "x"\n', "expected either sql or query"),
        (audience("A", "event('X').cnt() > 1"), "query: line 1, column 12: unknown function cnt"),
        (audience("A", "event('X').count()"), "an audience needs a condition"),
        (audience("A", "entity('x').count() > 1"), r"entity\('x'\) is not mapped by any \[tables.\*\] on the database of"),
        (audience("A", "event('x').count() > 1", "shop"), r"event\('x'\) is not mapped .* on the source shop"),
        (ORDERS + audience("A", "entity('order').count() > 1", "shop"), "did you mean orders"),
        (ORDERS + audience("A", "entity('orders').count() > 1"), "is not mapped"),
        (
            ORDERS + audience("A", "event('X').where(entity('orders').count() > 1).count() > 1"),
            (r"A: query: entity\('orders'\) is not mapped by any \[tables.\*\] on the database of audience-sync, where "
             r"this query runs: \[tables.orders\] is on the source shop"),
        ),
        (
            '[tables.mine]\ntable = "t"\nuser_id = "u"\ntimestamp = "t"\nevent = "E"\n'
            + audience("A", "event('E').count() > 1", "shop"),
            r"on the source shop, where this query runs: \[tables.mine\] is on the database of audience-sync",
        ),
        (
            audience("A", "trait('b') = true") + audience("B", "trait('c') = true") + audience("C", "trait('a') = 1"),
            "refer to each other: a → b → c → a",
        ),
        (audience("A", "trait('a') = true"), "refer to each other: a → a"),
        ('[tables.x]\nuser_id = "u"\n', "expected either table or sql"),
        ('[tables.x]\ntable = "t"\nsql = "s"\nuser_id = "u"\n', "expected either table or sql"),
        ('[tables.x]\ntable = "t"\n', "missing: user_id, or parent and parent_id"),
        ('[tables.x]\ntable = "t"\nuser_id = "u"\nevent = "E"\n', "event: it needs timestamp"),
        ('[tables.x]\ntable = "t"\nuser_id = "u"\nsource = "sop"\n', "did you mean shop"),
        ('[tables.x]\ntable = "t"\nuser_id = "u"\nparent_id = "p"\n', "parent_id: it needs parent"),
        ('[tables.x]\ntable = "t"\nparent = "y"\nparent_id = "p"\n', r"there is no such \[tables.NAME\]"),
        (ORDERS + '[tables.x]\ntable = "t"\nparent = "orders"\n', "missing: parent_id"),
        (ORDERS + '[tables.x]\ntable = "t"\nparent = "orders"\nparent_id = "p"\n', "has another source"),
        (
            ORDERS + '[tables.x]\ntable = "t"\nparent = "orders"\nparent_id = "p"\n',
            r"\[tables.orders\] has another source: it is on the source shop, and this table on the database of audience-",
        ),
        ('[tables.x]\ntable = "t"\nuser_id = "u"\nprofil = true\n', "did you mean profile"),
    ],
)  # fmt: skip
def test_a_wrong_query_or_table_is_refused_with_its_reason(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_a_query_knows_where_other_definitions_are_computed(load):
    loaded = load(audience("A", "trait('b') = true") + audience("B", "trait('plan') = 'pro'", "shop"))
    here, there = (definition.query.keys_elsewhere for definition in loaded.definitions)
    assert here == {"b": "the source shop"}
    assert there == {"a": "the database of audience-sync"}


def test_a_query_gets_what_it_names_and_no_more(load):
    loaded = load(
        ORDERS
        + '[tables.lines]\nsource = "shop"\ntable = "lines"\nparent = "orders"\nparent_id = "o"\n'
        + '[tables.people]\nsource = "shop"\ntable = "people"\nuser_id = "u"\nprofile = true\n'
        + '[tables.other]\nsource = "shop"\ntable = "other"\nuser_id = "u"\n'
        + audience("A", "entity('lines').count() > 1 AND trait('b') = true", "shop")
        + audience("B", "trait('plan') = 'pro'", "shop")
        + audience("C", "trait('plan') = 'pro'", "shop")
    )
    query = loaded.definitions[0].query
    assert [mapping.name for mapping in query.mappings] == ["orders", "lines", "people"]
    assert list(query.definitions) == ["b"]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("event('bought').count() > 1", "shop"),
        ("entity('orders').count() > 1 AND trait('b').exists()", "shop"),
        ("event('bought').count() > 1 AND event('seen').count() > 1", None),  # no database has both
        ("event('seen').count() > 1", None),
        ("trait('plan') = 'pro'", None),
        ("event('both').count() > 1", None),
    ],
)
def test_the_source_of_a_query_is_the_one_that_has_its_names(load, text, source):
    tables = ORDERS.replace("table =", 'timestamp = "t"\nevent = "bought"\ntable =')
    both = '[tables.{0}]\n{1}table = "t"\nuser_id = "u"\ntimestamp = "t"\nevent = "both"\n'
    here, there = both.format("here", ""), both.format("there", 'source = "shop"\n')
    loaded = load(tables + here + there + audience("B", "event('bought').count() > 1", "shop"))
    assert queries.likely_source(loaded, text, Kind.AUDIENCE) == source


def test_a_query_says_which_source_has_its_event_as_well(load):
    loaded = load(ORDERS.replace("table =", 'timestamp = "t"\nevent = "bought"\ntable ='))
    for source, advice in ((None, ["read shop"]), ("shop", [])):
        definition = queries.unnamed_definition(loaded, "event('bought').count() > 1", source, Kind.AUDIENCE)
        sentences = queries.events_elsewhere(definition, "read {source}")
        assert [sentence.rpartition(": ")[2] for sentence in sentences] == advice


@pytest.mark.parametrize("text", ["SELECT user_id FROM t", " with x as (SELECT 1) SELECT 2"])
def test_sql_in_the_place_of_a_query_has_a_message_of_its_own(load, text):
    with pytest.raises(ConfigError, match="put SQL into `sql =`"):
        queries.unnamed_definition(load(ORDERS), text, None, Kind.AUDIENCE)


FLAGS = {
    "ann": "yes",
    "bob": True,
    "cat": 0,
    "dan": "12.50",
    "eve": 'a"b',
    "fay": 1.5,
    "gus": None,
    "hal": [1],
}
CONVERTED = {
    "boolean": {"ann": True, "bob": True, "cat": False},
    "number": {"bob": 1, "cat": 0, "dan": 12.5, "fay": 1.5},
    "string": {"ann": "yes", "bob": "true", "cat": "0", "dan": "12.50", "eve": 'a"b', "fay": "1.5"},
}  # fmt: skip


@pytest.mark.parametrize("query", ["trait('flag')", "event('Set').last(property('flag'))"])
def test_a_type_converts_the_values_of_a_query(tmp_path, url, query):
    path = tmp_path / "audience_sync.toml"
    traits = [f'[[traits]]\nname = "{name}"\ntype = "{name}"\nquery = """{query}"""\n' for name in CONVERTED]
    path.write_text(f'[database]\nurl = "{url}"\n[destination]\napi_key = "k"\n{"".join(traits)}')
    with open_app(path) as app:
        for user_id, flag in FLAGS.items():
            intake.identify(app, user_id, {"flag": flag})
            intake.track(app, user_id, "Set", {"flag": flag})
        for definition in app.definitions():
            app.sync(definition, app.clock.now())
            with engines.read(app.engine) as connection:
                definition_id = history.definition_id(connection, definition.key)
            members = history.member_rows(app.engine, definition_id, None)
            assert {user_id: json.loads(value) for user_id, value in members} == CONVERTED[definition.key]
