"""The configuration: for each file, the settings or the error that it gives."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from audience_sync import settings
from audience_sync.audiences import schedule
from audience_sync.audiences.definition import Guard
from audience_sync.db import engines
from audience_sync.db.engines import open_source
from audience_sync.errors import ConfigError, MissingVariable

STARTER = Path(__file__).parent.parent / "config" / "audience_sync.toml"
AUDIENCE = "[[audiences]]\nname = 'VIPs'\nsql = 'SELECT user_id FROM vips'\n"
TRAIT = "[[traits]]\nname = 'A'\nsql = 's'\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="audience_sync.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def load(write):
    def load(text, environ=None, name="audience_sync.toml"):
        return settings.load(write(text, name), environ or {})

    return load


@pytest.fixture
def refused(load, tmp_path):
    """The error's message without the file at its beginning; it never contains a value."""

    def refused(text, environ=None):
        with pytest.raises(ConfigError) as error:
            load(text, environ)
        path, _, message = str(error.value).partition(": ")
        assert path == str(tmp_path / "audience_sync.toml")
        assert not re.search("s3cret|8675309", message, re.IGNORECASE)
        return message

    return refused


ACCEPTED = [  # every name: its path, its default, a value, and the setting that it gives
    ("database.url", "sqlite:///{}/audience_sync.db", "'postgresql+psycopg://me@db/x'", "postgresql+psycopg://me@db/x"),
    ("database.schema", "audience_sync", "'sync_2'", "sync_2"),
    ("database.keep_calls", "90 days", "'12 hours'", "12 hours"),
    ("database.keep_deliveries", "400 days", "'1 day'", "1 day"),
    ("database.keep_requests", "90 days", "'forever'", "forever"),
    ("database.keep_past_members", "forever", "'800 days'", "800 days"),
    ("destination.api_key.value", None, "'k'", "k"),
    ("destination.endpoint", "https://analytex.userpilot.io/",
     "'https://analytex-eu.userpilot.io'", "https://analytex-eu.userpilot.io/"),
    ("destination.allow_custom_endpoint", False, "true", True),
    ("destination.ca_file", "", "'ca.pem'", "{}/ca.pem"),
    ("destination.identify_per_minute", 600, "1", 1),
    ("destination.track_per_minute", 600, "1000000", 1_000_000),
    ("destination.company_per_minute", 600, "3", 3),
    ("destination.bulk", True, "false", False),
    ("destination.bulk_rows_per_minute", 1800, "1200", 1200),
    ("destination.bulk_rows_per_job", 10_000, "1", 1),
    ("destination.booleans", "native", "'string'", "string"),
    ("destination.nested", "flatten", "'json'", "json"),
    ("destination.track_policy", "at_least_once", "'at_most_once'", "at_most_once"),
    ("destination.presets", True, "false", False),
    ("logging.format", "text", "'json'", "json"),
    ("logging.level", "info", "'debug'", "debug"),
]  # fmt: skip
DEFINITION = [
    ("name", "VIPs", "'Big'", "Big"), ("key", "vips", "'vip'", "vip"), ("sql", "s", "'SELECT ${T}'", "SELECT x"),
    ("source", None, "'shop'", "shop"), ("enabled", True, "false", False),
    ("timeout", 600.0, "'30 seconds'", 30.0), ("timeout", 600.0, "'1 hour'", 3600.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "default", "value", "found"), ACCEPTED, ids=[each[0] for each in ACCEPTED])
def test_every_name_has_its_default_and_is_read(load, tmp_path, name, default, value, found):
    expected = [each.format(tmp_path) if isinstance(each, str) else each for each in (default, found)]
    written = f"{name.removesuffix('.value')} = {value}"
    assert [attrgetter(name)(load(text)) for text in ("", written)] == expected


@pytest.mark.parametrize(("name", "default", "value", "found"), DEFINITION)
@pytest.mark.parametrize("kind", ["audience", "trait"])
def test_every_name_of_a_definition_has_its_default_and_is_read(load, kind, name, default, value, found):
    plain = {"name": "'VIPs'", "sql": "'s'"}
    for table, expected in ((plain, default), (plain | {name: value}, found)):
        lines = "\n".join(f"{key} = {each}" for key, each in table.items())
        (definition,) = load(
            f"sources.shop.url = 'sqlite:///shop.db'\n[[{kind}s]]\n{lines}", {"T": "x"}
        ).definitions
        assert getattr(definition, {"timeout": "timeout_seconds"}.get(name, name)) == expected
        assert definition.kind == kind


def test_defaults_and_sources_are_read(load):
    text = (
        "[sources.shop]\nurl = '${SHOP}'\nexperimental = true\n[defaults]\ntimeout = '2 hours'\n" + AUDIENCE
    )
    found = load(text, {"SHOP": "mysql://h/d"})
    assert found.sources["shop"].url == "mysql://h/d"
    assert found.definitions[0].timeout_seconds == 7200.0


def test_a_definition_has_its_own_rules_of_operation_or_the_defaults(load):
    text = """
[defaults]
schedule = "30 6 * * 1-5"
timezone = "Europe/Berlin"
guard_above = 10
max_exit_ratio = 0.25
max_change_ratio = 0.75
eligible_sql = "SELECT user_id FROM known"
[[audiences]]
name = "A"
sql = "s"
[[audiences]]
name = "B"
sql = "s"
schedule = "every 5 minutes"
full_schedule = "@weekly"
timezone = "UTC"
guard_above = 0
max_enter_ratio = 3
max_change_ratio = 1
eligible_sql = ""
ready_sql = "SELECT true"
"""
    a, b = load(text).definitions
    assert (a.schedule, a.full_schedule) == (schedule.parse_schedule("30 6 * * 1-5", "Europe/Berlin"), None)
    assert (a.guard, a.eligible_sql, a.ready_sql) == (
        Guard(10, 0.25, 1.0, 0.75),
        "SELECT user_id FROM known",
        None,
    )
    assert b.schedule == schedule.parse_schedule("every 5 minutes", "UTC")
    assert b.full_schedule == schedule.parse_schedule("0 0 * * 0", "UTC")
    assert (b.guard, b.eligible_sql, b.ready_sql) == (Guard(0, 0.25, 3.0, 1.0), None, "SELECT true")


def test_a_trait_has_a_type_and_a_definition_a_time_zone(load):
    [plain] = load(AUDIENCE).definitions
    assert (plain.value_type, plain.timezone) == (None, "UTC")
    lines = "type = 'boolean'\ntimezone = 'Europe/Berlin'\nschedule = ''"
    [trait] = load(f"[[traits]]\nname = 'A'\nsql = 's'\n{lines}").definitions
    assert (trait.value_type, trait.timezone, trait.schedule) == ("boolean", "Europe/Berlin", None)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("traits", "type = 'bool'", 'type: expected "boolean", "number" or "string"'),
        (
            "audiences",
            "type = 'boolean'",
            "type: only a trait has values: remove it, or make this one of [[traits]]",
        ),
        (
            "traits",
            "schedule = ''\ntimezone = 'Europe/Berln'",
            "timezone: there is no time zone 'Europe/Berln': did",
        ),
    ],
)
def test_a_wrong_type_or_time_zone_is_refused(load, kind, line, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(f"[[{kind}]]\nname = 'A'\nsql = 's'\n{line}")


OLD = [
    ("Straße", "strae", "strasse"),
    ("Łódź VIP", "odz_vip", "lodz_vip"),
    ("VIP клиенты", "vip", None),
    ("A\N{EN DASH}B", "ab", "a_b"),
]


@pytest.mark.parametrize(("name", "old", "new"), OLD)
def test_a_stored_key_stays_though_letters_were_lost_in_it(write, name, old, new):
    unresolved = settings.load(write(f"[[audiences]]\nname = '{name}'\nsql = 's'"), {}, resolve_keys=False)
    [definition] = settings.with_stored_keys(unresolved, {("audience", name): [old]}).definitions
    assert (definition.key, definition.key_error) == (old, None)
    if new:
        assert settings.with_stored_keys(unresolved, {}).definitions[0].key == new
        return
    for stored in ({}, {("trait", name): [old]}, {("audience", "VIP"): ["vip"]}):
        with pytest.raises(ConfigError, match=f"{name}: no key can be derived from the name"):
            settings.with_stored_keys(unresolved, stored)


def test_names_that_give_one_key_now_keep_the_keys_that_are_stored(write):
    names = ("Straße", "Strasse")
    path = write("\n".join(f"[[audiences]]\nname = '{name}'\nsql = 's'" for name in names))
    unresolved = settings.load(path, {}, resolve_keys=False)
    stored = {("audience", "Straße"): ["strae"], ("audience", "Strasse"): ["strasse"]}
    assert [each.key for each in settings.with_stored_keys(unresolved, stored).definitions] == [
        "strae",
        "strasse",
    ]
    for partly in ({}, {("audience", "Strasse"): ["strasse"]}):
        with pytest.raises(
            ConfigError, match="Straße and Strasse have the same key, strasse: give one of them"
        ):
            settings.with_stored_keys(unresolved, partly)
    with pytest.raises(ConfigError, match="Straße and Strasse have the same key"):
        settings.load(path, {})


def test_a_name_of_one_key_in_every_version_is_refused_before_the_database_is_read(write):
    path = write(
        "\n".join(f"[[audiences]]\nname = '{name}'\nsql = 's'" for name in ("Big spender", "big-spender"))
    )
    with pytest.raises(ConfigError, match="have the same key, big_spender"):
        settings.load(path, {}, resolve_keys=False)


TABLE = "expected a table of names and values"
RATE = "[destination]: track_per_minute: expected a whole number from 1 to 1000000"
SCHEMA = "[database]: schema: expected at most 63 lower-case letters, digits and underscores, not starting with a digit"
KEY = "[destination]: api_key: expected printable ASCII without spaces or line ends, and not empty"
SPAN = '[defaults]: timeout: expected a span, such as "30 seconds", "10 minutes" or "2 hours"'
WRITE_KEYS = (
    "[tracking]: write_keys: expected a list of keys in printable ASCII without spaces and colons, such as "
    '["${WRITE_KEY}"]'
)
MAPPING = """[[mappings]]
name = "Mine"
action = "trackEvent"
trigger = "type = 'track'"
{}
"""
ACTION = "[[mappings]] Mine: action: expected identifyUser or identifyCompany or trackEvent"
DIRECTIVE = "[[mappings]] Mine: fields.name: unknown directive @pat: did you mean @path?"
TOO_MANY = "the file: mappings: there are 48, but a destination takes 50, including the presets: remove 1"
NO_ENDPOINT = "[destination]: endpoint: expected https://HOST/, without credentials, query or fragment"
HASH = "$scrypt$ln=15,r=8,p=3$AAAAAAAAAAAAAAAAAAAAAA$" + "s3cret/A" * 5 + "AAA"  # of nothing
USER = f"[[web.users]]\nname = 'Ann'\npassword = '{HASH}'\nrole = 'read'\n"
PASSWORD = "[[web.users]] Ann: password: expected the hash that `audience-sync password` prints, not the password itself"
PROXIES = (
    '[web]: trusted_proxies: expected a list of addresses or networks, such as ["127.0.0.1", "10.0.0.0/8"]'
)
USER_NAME = "name: expected at most 100 characters on one line, without spaces around"
REFUSED = [
    # the dashboard
    ("web = 's3cret'", f"[web]: {TABLE}"),
    ("[web]\ndashbord = false", "[web]: unknown name dashbord: did you mean dashboard?"),
    ("[web]\ndashboard = 's3cret'", "[web]: dashboard: expected true or false"),
    ("[web]\ntrusted_proxies = 's3cret'", PROXIES),
    ("[web]\ntrusted_proxies = ['s3cret']", PROXIES),
    ("[web]\ntrusted_proxies = ['10.0.0.0/33']", PROXIES),
    ("[web]\ntrusted_proxies = [8675309]", PROXIES),
    ("[web]\nusers = 's3cret'", "the file: web.users: expected [[web.users]], with two brackets"),
    ("[web.users]\nname = 'Ann'", "the file: web.users: expected [[web.users]], with two brackets"),
    ("[web]\nusers = ['s3cret']", f"[[web.users]] number 1: {TABLE}"),
    ("[[web.users]]\nrole = 'read'", "[[web.users]] number 1: name: missing: expected a string"),
    ("[[web.users]]\nname = 'Ann'\nrole = 'read'", PASSWORD.replace("password: e", "password: missing: e", 1)),
    *((USER.replace(HASH, wrong), PASSWORD) for wrong in (
        "s3cret", "s3cret8675309", "$2b$12$s3cret", "$scrypt$s3cret", HASH.replace("15", "11"), HASH.replace("15", "18"),
        HASH.replace("r=8", "r=17"), HASH.replace("p=3", "p=17"), HASH + "!", HASH[:-20], HASH.replace("scrypt", "argon2id"),
    )),
    (USER.replace(f"'{HASH}'", "8675309"), PASSWORD),
    (USER.replace("'read'", "'s3cret'"), '[[web.users]] Ann: role: expected "read" or "operate"'),
    (USER.replace("role = 'read'", ""), '[[web.users]] Ann: role: missing: expected "read" or "operate"'),
    (USER + "rol = 1", "[[web.users]] Ann: unknown name rol: did you mean role?"),
    (USER + USER, "[[web.users]] Ann: name: another user has the same name; give each user a different one"),
    (USER.replace("'Ann'", "' Ann'"), f"[[web.users]]  Ann: {USER_NAME}"),
    (USER.replace("'Ann'", '"A\\u0007"'), "[[web.users]] "),
    (USER.replace("Ann", "A" * 101), "[[web.users]] "),
    # the tracking API and the mappings
    ("[tracking]\nwrite_keys = 's3cret'", WRITE_KEYS),
    ("[tracking]\nwrite_keys = ['s3cret:']", WRITE_KEYS),
    ("[tracking]\nwrite_keys = ['']", WRITE_KEYS),
    ("[tracking]\nwrite_keys = [8675309]", WRITE_KEYS),
    (MAPPING.format("field = 1"), "[[mappings]] Mine: unknown name field: did you mean fields?"),
    (MAPPING.format("fields = 8675309"), "[[mappings]] Mine: fields: expected a table of an action's fields"),
    (MAPPING.format("fields = {nam = 1}"), "[[mappings]] Mine: fields: trackEvent has no field 'nam': did you mean name?"),
    (MAPPING.format("fields = {name = {'@pat' = 'x'}}"), DIRECTIVE),
    (MAPPING.format("").replace("type = 'track'", "type ="), "[[mappings]] Mine: trigger: line 1, column "),
    (MAPPING.format("").replace("trackEvent", "s3cret"), ACTION),
    (MAPPING.format("") * 2, "the file: mappings: 2 of them are called Mine: give each its own name"),
    ("".join(MAPPING.format("").replace("Mine", f"M{n}") for n in range(48)), TOO_MANY),
    # unknown names, with the nearest
    ("[databse]", "the file: unknown name databse: did you mean database?"),
    ("[destination]\napi_kee = 's3cret'", "[destination]: unknown name api_kee: did you mean api_key?"),
    ("[destination]\nmissing = 's3cret'", "[destination]: unknown name missing: "),
    ("[logging]\nlvl = 's3cret'", "[logging]: unknown name lvl: did you mean level?"),
    ("[sources.shop]\nuri = 's3cret'", "[sources.shop]: unknown name uri: did you mean url?"),
    ("[defaults]\nscedule = 's3cret'", "[defaults]: unknown name scedule: did you mean schedule?"),
    # schedules, guards and spans
    ("[defaults]\nmax_exit_ratio = -1", "[defaults]: max_exit_ratio: expected a number of at least 0, such as 0.5"),
    ("[defaults]\nmax_change_ratio = 's3cret'",
     "[defaults]: max_change_ratio: expected a number of at least 0, such as 0.5"),
    ("[defaults]\nmax_change_ratio = nan", "[defaults]: max_change_ratio: expected a number of at least 0"),
    ("[defaults]\nguard_above = 1.5", "[defaults]: guard_above: expected a whole number of at least 0"),
    ("[database]\nkeep_calls = 's3cret'",
     '[database]: keep_calls: expected a span, such as "90 days", or "forever"'),
    (TRAIT + "schedule = '@reboot'", "[[traits]] A: schedule: "),
    (TRAIT + "full_schedule = '61 * * * *'", "[[traits]] A: full_schedule: "),
    (TRAIT + "timezone = 'Europe/Berln'", "[[traits]] A: timezone: "),
    ("[[audiences]]\nnaem = 's3cret'", "[[audiences]] number 1: unknown name naem: did you mean name?"),
    (TRAIT + "source_ = 's3cret'", "[[traits]] A: unknown name source_: did you mean source?"),
    (TRAIT + "source = 'shp'\n[sources.shop]\nurl='sqlite:///x'",
     "[[traits]] A: source: there is no such [sources.NAME]: did you mean shop?"),
    (TRAIT + "source = 's3cret'", "[[traits]] A: source: there is no such [sources.NAME]: none is declared"),
    # wrong shapes and types, with what was expected
    ("include = 's3cret'", 'the file: include: expected a list of strings, such as ["audiences/*.toml"]'),
    ("include = ['none.toml']", "the file: include: there is no file none.toml in "),
    ("database = 's3cret'", f"[database]: {TABLE}"),
    ("sources = 's3cret'", "the file: sources: expected tables: [sources.NAME]"),
    ("sources.shop = 's3cret'", f"[sources.shop]: {TABLE}"),
    ("[sources.shop]", "[sources.shop]: url: missing: expected a string"),
    ("audiences = 's3cret'", "the file: audiences: expected [[audiences]], with two brackets"),
    ("[audiences]", "the file: audiences: expected [[audiences]], with two brackets"),
    ("audiences = ['s3cret']", f"[[audiences]] number 1: {TABLE}"),
    ("[[audiences]]\nname = 'A'", "[[audiences]] A: missing: sql or query"),
    ("[[traits]]\nsql = 's3cret'", "[[traits]] number 1: name: missing: expected a string that is not empty"),
    ("[[traits]]\nname = 'A'\nsql = ' '", "[[traits]] A: expected either sql or query"),
    ("[[traits]]\nname = ' '\nsql = 's3cret'", "[[traits]]  : name: expected a string that is not empty"),
    ("[[traits]]\nname = 'A'\nsql = 8675309", "[[traits]] A: sql: expected a string"),
    (TRAIT + "enabled = 's3cret'", "[[traits]] A: enabled: expected true or false"),
    (TRAIT + "timeout = 8675309", "[[traits]] A: timeout: expected a span, such as"),
    (TRAIT + "key = 8675309", "[[traits]] A: key: expected a string"),
    *((f'[defaults]\ntimeout = "{each}"', SPAN)
      for each in ("10", "10 days", "0 seconds", "-1 minutes", "1.5 hours", "10 minutes\\n", "")),
    *((f"[destination]\ntrack_per_minute = {each}", RATE)
      for each in ("'s3cret'", "0", "-8675309", "true", "9" * 40)),
    ("[destination]\nidentify_per_minute = '8675309'", RATE.replace("track", "identify")),
    ("[destination]\nbulk = 's3cret'", "[destination]: bulk: expected true or false"),
    ("[destination]\nbooleans = 's3cret'", "[destination]: booleans: expected native or string"),
    ("[destination]\nnested = 8675309", "[destination]: nested: expected flatten or json"),
    ("[destination]\ntrack_policy = 's3cret'", "[destination]: track_policy: expected at_least_once or at_most"),
    ("[logging]\nformat = 's3cret'", "[logging]: format: expected text or json"),
    ("[logging]\nlevel = 's3cret'", "[logging]: level: expected debug or info or warning or error"),
    *((f'[database]\nschema = "{each}"', SCHEMA) for each in ("S3cret", "s3cret\\n", "s3cret" * 11, "1a")),
    # files that are not TOML; the parser's messages differ between versions of Python
    (b"[" * 5000, "not valid TOML: "),
    (b"a = " + b"[" * 5000, "not valid TOML: "),
    (b"a = " + b"9" * 5000, "not valid TOML: "),
    (b"# " + b"x" * 1_000_000, "larger than 1000000 bytes"),
    (b"# \xff", "not UTF-8 (at byte 2)"),
    # the API key, variables
    *((f"[destination]\napi_key = {each}", KEY) for each in ('""', "8675309", "['s3cret']", "true", "'s3cret '",
      '"s3cret\\n"', "'s3c ret'", "'s3crét'", '"s3cret\\u007f"')),
    *((f"[sources.shop]\nurl = '{each}'", "[sources.shop]: url: write an environment variable as ${NAME}")
      for each in ("${}", "${A B}", "${A", "${1}")),
    ("[sources.shop]\nurl = '${SHOP}'", "[sources.shop]: url: set the environment variable SHOP, which is missing"),
    # databases
    ("[database]\nurl = 2011-06-01", "[database]: url: expected a string"),
    ('[database]\nurl = "a\\u0000s3cret"', "[database]: url: contains a NUL character"),
    *((f"[database]\nurl = '{each}'", "[database]: url: expected a database URL")
      for each in ("s3cret", "", "a\\u0000s3cret")),
    *((f"[sources.shop]\nurl = '{each}'{more}",
       "[sources.shop]: url: sources other than SQLite and PostgreSQL are experimental")
      for each in ("mysql://u:s3cret@h/d", "duckdb:///shop.db", "mssql+pyodbc:///?odbc_connect=s3cret", "x://")
      for more in ("", "\nexperimental = false")),
    *((f"[sources.shop]\nexperimental = true\nurl = '{each}://h/d'",
       "[sources.shop]: url: write sqlite:// or postgresql://, without another driver")
      for each in ("postgresql+psycopg2", "postgresql+asyncpg", "sqlite+aiosqlite", "sqlite+pysqlcipher")),
    ("[sources.shop]\nurl = 'postgres://u:s3cret@h1:1,h2:2/d'", "[sources.shop]: url: write several hosts as options"),
    *((f"[database]\nurl = 'postgres://u:s3cret@h/d?{each}'", f"[database]: url: {message}") for each, message in (
        ("sslmod=require", "unknown option sslmod: did you mean sslmode?"),
        ("autocommit=true", "unknown option autocommit: remove it"),
        ("replication=database", "unknown option replication: "),
        ("prepare_threshold=s3cret", "option prepare_threshold: expected a whole number, or"),
        ("connect_timeout=s3cret", "option connect_timeout: expected a number of seconds"),
        ("options=-E%20s3cret", "option options: expected -c NAME=VALUE"),
        ("client_encoding=latin1", "option client_encoding: expected utf8"),
    )),
    ("[database]\nurl = 'sqlite:///own.db?timout=5'", "[database]: url: unknown option timout: did you mean timeout?"),
    ("[database]\nurl = 'sqlite:///own.db?timeout=s3cret'", "[database]: url: option timeout: expected a number of sec"),
    ("[database]\nurl = 'mysql://u:s3cret@h/d'", "[database]: url: expected sqlite:///FILE or postgresql://"),
    ("[database]\nurl = 'sqlite://s3cret.db'", "[database]: url: an SQLite file takes three slashes"),
    *((f"[database]\nurl = 'sqlite:{each}'", "[database]: url: an in-memory database loses its record of what was sent")
      for each in ("//", "///", "///:memory:", "///file:x?mode=memory&uri=true")),
    # keys that collide, are empty, malformed, or Userpilot's own
    *((AUDIENCE + f"[[{kind}]]\nname = 'vips!'\nsql = 'SELECT 1'",
       "the file: VIPs and vips! have the same key, vips: give one of them another with `key = `")
      for kind in ("audiences", "traits")),
    (AUDIENCE + TRAIT + "key = 'vips'", "the file: VIPs and A have the same key, vips: "),
    ("[[audiences]]\nname = '注文'\nsql = 's'", "[[audiences]] 注文: no key can be derived from the name"),
    *((TRAIT + f"key = '{key}'", "[[traits]] A: a key consists of lower-case letters") for key in ("", "V I P")),
    *((AUDIENCE + f"key = '{key}'", f"[[audiences]] VIPs: {key} is one of Userpilot's own properties")
      for key in ("name", "email", "created_at", "signed_up_at", "first_seen_at", "last_seen_at")),
    *((f"[[traits]]\nname = '{name}'\nsql = 's'", f"[[traits]] {name}: {key} is one of Userpilot's own properties")
      for name, key in (("First Seen at", "first_seen_at"), ("Last seen at!", "last_seen_at"))),
    ('[[audiences]]\nname = "a\\nb"\nsql = "s"', r"[[audiences]] 'a\nb': name: expected one line without control"),
    # invalid endpoints, with permission or without
    *((f'[destination]\nallow_custom_endpoint = true\nendpoint = "{each}"', NO_ENDPOINT) for each in (
      "", "analytex.userpilot.io", "ftp://analytex.userpilot.io/", "https://", "https:///x",
      "https://s3cret@analytex.userpilot.io/", "https://u:s3cret@analytex.userpilot.io/",
      "https://analytex.userpilot.io/?key=s3cret", "https://analytex.userpilot.io/?",
      "https://analytex.userpilot.io/#s3cret", "https://analytex.userpilot.io:s3cret/",
      "https://analytex.userpilot.io:99999/", "https://[s3cret/", "https://analytex.user pilot.io/",
      "https://analytex.user\\npilot.io/", "https://s3cret\\\\.userpilot.io/", "https://üserpilot.io/")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_it_is_refused_with_what_is_wrong_and_where(refused, text, message):
    assert refused(text).startswith(message)


@pytest.mark.parametrize("text", [b"[destination\napi_key = 's3cret'", b"api_key = s3cret", b"a = 's3cret"])
def test_broken_toml_is_refused_with_its_line(refused, text):
    assert re.match(r"not valid TOML: .*(at line \d+, column \d+|at end of document)", refused(text))


@pytest.mark.parametrize("endpoint", [
    "https://example.com/", "http://analytex.userpilot.io/", "https://userpilot.io.example.com/",
    "https://evil-userpilot.io/", "https://evil%2euserpilot.io/", "https://userpilot.io./", "http://127.1/",
    "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://0/", "http://0.0.0.0/",
    "http://[::ffff:127.0.0.1]/", "http://[0:0:0:0:0:0:0:1]/", "http://localhost.example.com/",
    "http://128.0.0.1/", "http://169.254.169.254/",
])  # fmt: skip
def test_another_endpoint_needs_permission(load, refused, endpoint):
    text = f'[destination]\nendpoint = "{endpoint}"\n'
    assert "set allow_custom_endpoint = true" in refused(text)
    assert load(text + "allow_custom_endpoint = true").destination.endpoint == endpoint


@pytest.mark.parametrize(("endpoint", "custom", "is_public"), [
    ("https://analytex-eu.userpilot.io/", False, True),
    ("https://userpilot.io/", False, True),
    ("https://analytex.userpilot.io/", True, False),
    ("http://127.0.0.1:8030/", False, False),
    ("https://userpilot.io.example.com/", True, False),
])  # fmt: skip
def test_userpilot_itself_is_at_a_public_address(load, endpoint, custom, is_public):
    text = f'[destination]\nendpoint = "{endpoint}"\nallow_custom_endpoint = {str(custom).lower()}\n'
    assert load(text).destination.is_public is is_public


@pytest.mark.parametrize(("endpoint", "normalised"), [
    ("https://analytex.userpilot.io//", "https://analytex.userpilot.io/"),
    ("https://userpilot.io/", "https://userpilot.io/"),
    ("https://a.b.userpilot.io:8443/v9", "https://a.b.userpilot.io:8443/v9/"),
    ("http://localhost:8080", "http://localhost:8080/"), ("http://127.0.0.1:1", "http://127.0.0.1:1/"),
    ("https://127.9.8.7/", "https://127.9.8.7/"), ("http://[::1]:8080/", "http://[::1]:8080/"),
])  # fmt: skip
def test_an_endpoint_under_userpilot_or_on_this_machine_needs_none(load, endpoint, normalised):
    assert load(f'[destination]\nendpoint = "{endpoint}"').destination.endpoint == normalised


def test_what_is_unusual_but_right_is_accepted(load):
    assert load(b"\xef\xbb\xbf[logging]\nlevel = 'debug'").logging.level == "debug"
    assert load("[[audiences]]\nname = '注文'\nkey = 'chumon'\nsql = 's'").definitions[0].key == "chumon"
    assert load("[[traits]]\nname = 'Name'\nsql = 's'").definitions[0].key == "name"


def test_the_look_up_order(tmp_path):
    (tmp_path / "config").mkdir()
    below, beside = tmp_path / "config" / "audience_sync.toml", tmp_path / "audience_sync.toml"
    with pytest.raises(ConfigError, match="audience-sync init"):
        settings.find(None, {}, tmp_path)
    beside.touch()
    assert settings.find(None, {}, tmp_path) == beside
    below.touch()
    assert settings.find(None, {}, tmp_path) == below
    environ = {"AUDIENCE_SYNC_CONFIG": "named.toml"}
    assert settings.find(None, environ, tmp_path) == tmp_path / "named.toml"
    assert settings.find(Path("/x/asked.toml"), environ, tmp_path) == Path("/x/asked.toml")
    assert settings.find(None, {"AUDIENCE_SYNC_CONFIG": ""}, tmp_path) == below


def test_a_file_that_was_asked_for_must_be_there(tmp_path):
    path = tmp_path / "named.toml"
    for arguments in ((path, {}), (None, {"AUDIENCE_SYNC_CONFIG": str(path)})):
        with pytest.raises(ConfigError, match=r"named\.toml: there is no such file"):
            settings.load(*arguments)
    with pytest.raises(ConfigError, match="this is a folder"):
        settings.load(tmp_path, {})


def test_paths_are_relative_to_the_folder_above_one_called_config(load, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "vips.toml").write_text(AUDIENCE)
    text = "include = ['more/*.toml']\nsources.shop.url = 'sqlite:///shop.db?mode=ro'"
    found = load(text, name="config/audience_sync.toml")
    assert found.database.url == f"sqlite:///{tmp_path}/audience_sync.db"
    assert found.sources["shop"].url == f"sqlite:///{tmp_path}/shop.db?mode=ro"
    assert [each.key for each in found.definitions] == ["vips"]


@pytest.mark.parametrize(("url", "absolute"), [
    ("sqlite:////var/lib/x.db", "sqlite:////var/lib/x.db"),
    ("sqlite:///data/../x.db", "sqlite:///{}/x.db"),
    ("sqlite:///file:x.db?mode=ro&uri=true", "sqlite:///file:{}/x.db?mode=ro&uri=true"),
    ("sqlite+pysqlite:///x.db", "sqlite:///{}/x.db"),
])  # fmt: skip
def test_an_sqlite_file_becomes_absolute(load, tmp_path, url, absolute):
    found = load(f"database.url = '{url}'\nsources.s.url = '{url}'")
    assert found.database.url == found.sources["s"].url == absolute.format(tmp_path)


@pytest.mark.parametrize(("url", "absolute"), [
    ("duckdb:///shop.duckdb", "duckdb:///{}/shop.duckdb"),
    ("duckdb:////var/shop.duckdb?a=b", "duckdb:////var/shop.duckdb?a=b"),
    ("duckdb:///:memory:", "duckdb:///:memory:"),
    ("duckdb:///md:shop", "duckdb:///md:shop"),
    ("duckdb://", "duckdb://"),
])  # fmt: skip
def test_a_duckdb_file_becomes_absolute(load, tmp_path, url, absolute):
    found = load(f"[sources.s]\nurl = '{url}'\nexperimental = true")
    assert found.sources["s"].url == absolute.format(tmp_path)


def test_settings_know_when_a_file_of_theirs_has_changed(load, write, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    write("", "more/a.toml")

    def read():
        return load("include = ['more/*.toml']")

    def replaced(path, text):
        path.write_text(text)
        os.utime(path, ns=(1, next(moments)))

    moments, found = itertools.count(1), read()
    assert not found.have_changed()
    replaced(found.path, "")
    assert found.have_changed()
    for change in (
        lambda: replaced(folder / "a.toml", "# changed"),
        (folder / "b.toml").touch,
        (folder / "a.toml").unlink,
        (tmp_path / "audience_sync.toml").unlink,
    ):
        found = read()
        assert not found.have_changed()
        change()
        assert found.have_changed()


def test_included_files_follow_the_main_one_in_order(load, tmp_path):
    def tables(*names):
        kinds = {"A": "audiences", "T": "traits"}
        return "".join(f"[[{kinds[name[0]]}]]\nname = '{name}'\nsql = 's'\n" for name in names)

    (tmp_path / "b.toml").write_text(tables("T2", "A3"))
    (tmp_path / "a.toml").write_text(tables("A2"))
    found = load("include = ['[ab].toml', 'a.toml', 'none/*.toml']\n" + tables("T1", "A1"))
    assert [each.name for each in found.definitions] == ["A1", "A2", "A3", "T1", "T2"]


SPECIAL = "p@ss:w/or?d#1%41[2]&=+ ü'\"s3cret"
PARTS = "url = '{}://${{USER}}:${{PASSWORD}}@${{HOST}}:5432/${{NAME}}?application_name=${{OPTION}}'"


@pytest.mark.parametrize("place", ["database", "sources.shop"])
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_url_of_postgresql_takes_variables_as_they_are(load, place, scheme):
    environ = dict.fromkeys(("USER", "PASSWORD", "HOST", "NAME", "OPTION"), SPECIAL) | {
        "HOST": "db.example.com"
    }
    found = load(f"[{place}]\n{PARTS.format(scheme)}", environ)
    url = engines.parse_url((found.sources["shop"] if "shop" in place else found.database).url)
    assert (url.drivername, url.host, url.port) == ("postgresql+psycopg", "db.example.com", 5432)
    assert (url.username, url.password, url.database) == (SPECIAL, SPECIAL, SPECIAL)
    assert url.query == {"application_name": SPECIAL}


@pytest.mark.parametrize(("written", "host", "port"), [
    ("postgres://u@[${HOST}]:5433/d", "::1", 5433), ("postgres://u@${HOST}/d", "/run/postgresql", None),
])  # fmt: skip
def test_a_host_from_a_variable_may_be_an_address_or_a_socket(load, written, host, port):
    url = engines.parse_url(load(f"database.url = '{written}'", {"HOST": host}).database.url)
    assert (url.host, url.port, url.database) == (host, port, "d")


@pytest.mark.parametrize("place", ["database", "sources.shop"])
@pytest.mark.parametrize(
    ("written", "extra"), [("${URL}", ""), ("${URL}&connect_timeout=${SECONDS}", "&connect_timeout=5")]
)
def test_a_variable_at_the_beginning_of_a_url_is_a_url(load, place, written, extra):
    environ = {"URL": "postgres://us%40er:pass%3Aword@h:1/d%20b?application_name=a%26b", "SECONDS": "5"}
    found = load(f"[{place}]\nurl = '{written}'", environ)
    url = (found.sources["shop"] if "shop" in place else found.database).url
    assert url == "postgresql+psycopg://us%40er:pass%3Aword@h:1/d%20b?application_name=a%26b" + extra
    parsed = engines.parse_url(url)
    assert (parsed.username, parsed.password, parsed.database) == ("us@er", "pass:word", "d b")
    assert parsed.query["application_name"] == "a&b"


def test_the_path_of_an_sqlite_file_takes_variables_as_they_are(load, tmp_path):
    folder = tmp_path / "50%41 #[ü]&=+:@'?"
    folder.mkdir()
    text = "database.url = 'sqlite:///${FOLDER}/own.db?timeout=${TIMEOUT}'"
    found = load(text, {"FOLDER": str(folder), "TIMEOUT": "7"})
    engine = engines.open_own(found.database.url, "x")
    with engine.connect():
        assert (folder / "own.db").is_file()
    engine.dispose()
    assert engine.url.query == {"timeout": "7"}


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_is_reached_under_special_names(load, postgres, scheme):
    name = f"{scheme} {SPECIAL}"[:63]
    quoted = postgres_identifier(name)
    postgres.run(f"CREATE ROLE {quoted} LOGIN SUPERUSER")
    postgres.run(f"CREATE DATABASE {quoted}")
    socket = sa.make_url(postgres.base).query["host"]
    text = f"url = '{scheme}://${{NAME}}:${{NAME}}@/${{NAME}}?host=${{SOCKET}}&application_name=${{NAME}}'"
    found = load(f"[database]\n{text}\n[sources.shop]\n{text}", {"NAME": name, "SOCKET": socket})
    source = open_source("shop", found.sources["shop"].url)
    for engine in (engines.open_own(found.database.url, "x"), source):
        with engine.connect() as connection:
            query = "SELECT current_user, current_database(), current_setting('application_name')"
            user, database, application = connection.exec_driver_sql(query).one()
        engine.dispose()
        assert (user, database) == (name, name)
        assert application.startswith(f"{scheme} p@ss:w/or?d#1%41[2]&=+ ")


def postgres_identifier(name):
    return '"' + name.replace('"', '""').replace("%", "%%") + '"'


def test_a_file_beside_the_configuration_is_opened_whatever_the_folder_is_called(load, tmp_path):
    name = "50%41 #?"
    engine = engines.open_own(load("", name=f"{name}/audience_sync.toml").database.url, "x")
    with engine.connect():
        assert (tmp_path / name / "audience_sync.db").is_file()
    engine.dispose()


def test_the_parts_of_a_url_are_never_shown(refused):
    for url in ("postgres://${USER}:${PASSWORD}@${HOST}/d", "postgres://u:s3cret@s3cret@h/d", "${PASSWORD}"):
        message = refused(
            f"database.url = '{url}'", {"USER": "s3cret", "PASSWORD": "s3cret@", "HOST": "s3cret:1"}
        )
        assert message.startswith("[database]: url: ")
    assert refused("database.url = 'postgres://u@${HOST}/d'", {"HOST": "s3cret:1"}) == (
        "[database]: url: a variable contains both host and port: use two, ${HOST}:${PORT}"
    )


@pytest.mark.parametrize(("text", "message"), [
    (AUDIENCE + "sqll = 's'", "[[audiences]] VIPs: unknown name sqll: did you mean sql?"),
    *((f"{name} = {{}}", f"an included file: unknown name {name}")
      for name in ("include", "database", "destination", "defaults", "sources.x")),
])  # fmt: skip
def test_an_included_file_holds_definitions_only_and_is_named(load, tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load("include = ['a.toml']")
    assert str(error.value).startswith(f"{tmp_path}/a.toml: {message.removesuffix('.x')}")


def test_variables_are_taken_in_every_string_once(load, tmp_path):
    (tmp_path / "more.toml").write_text("[[audiences]]\nname = '${A}${B}'\nsql = '${T}, ${1}, $$x$$, $B'")
    environ = {"A": "Vi", "B": "${A}Ps", "T": "t", "F": "more"}
    definition = load("include = ['${F}.toml']", environ).definitions[0]
    assert (definition.name, definition.sql) == ("Vi${A}Ps", "t, ${1}, $$x$$, $B")


@pytest.mark.parametrize("text", ["", "destination.api_key = '${USERPILOT_API_KEY}'"])
@pytest.mark.parametrize(("environ", "why"), [
    ({}, "set the environment variable USERPILOT_API_KEY, which is missing"),
    ({"USERPILOT_API_KEY": ""}, "its environment variable is empty: set it"),
])  # fmt: skip
def test_a_missing_api_key_is_an_error_only_for_what_sends(load, tmp_path, text, environ, why):
    destination = load(text, environ).destination
    assert (destination.api_key.value, destination.fingerprint) == (None, "")
    with pytest.raises(MissingVariable) as error:
        destination.api_key.require()
    assert str(error.value) == f"{tmp_path}/audience_sync.toml: [destination]: api_key: {why}"


def test_a_missing_write_key_is_an_error_only_for_what_serves(load, tmp_path):
    text = '[tracking]\nwrite_keys = ["known", "${WRITE_KEY}"]\ncalls_per_second = 7\n'
    tracking = load(text, {}).tracking
    assert ([key.value for key in tracking.write_keys], tracking.calls_per_second) == (["known", None], 7)
    why = "[tracking]: write_keys: set the environment variable WRITE_KEY, which is missing"
    with pytest.raises(MissingVariable) as error:
        tracking.require_write_keys()
    assert str(error.value) == f"{tmp_path}/audience_sync.toml: {why}"
    assert load(text, {"WRITE_KEY": "k"}).tracking.require_write_keys() == ("known", "k")
    assert load("").tracking.require_write_keys() == ()


def test_the_users_of_the_dashboard(load):
    text = (
        "[web]\ntrusted_proxies = ['10.1.2.3/8', '::1']\n"
        + USER
        + USER.replace("Ann", "Bob").replace("read", "operate")
    )
    web = load(text).web
    assert [(name, user.role) for name, user in web.require_users().items()] == [
        ("Ann", "read"),
        ("Bob", "operate"),
    ]
    assert (web.dashboard, [str(network) for network in web.proxy_networks]) == (
        True,
        ["10.0.0.0/8", "::1/128"],
    )
    assert HASH not in f"{web} {web!r} {web.users} {web.users[0].password!r} {load(text)!r}"
    assert (load("").web.require_users(), load("").web.dashboard) == ({}, True)


def test_a_missing_hash_is_an_error_only_for_serve(load, tmp_path):
    text = USER.replace(HASH, "${ANN_HASH}")
    assert load(text, {"ANN_HASH": HASH}).web.require_users()["Ann"].password.require() == HASH
    with pytest.raises(MissingVariable) as error:
        load(text, {}).web.require_users()
    why = "[[web.users]] Ann: password: set the environment variable ANN_HASH, which is missing"
    assert str(error.value) == f"{tmp_path}/audience_sync.toml: {why}"


def test_the_api_key_comes_from_the_environment_unless_set(load, refused):
    environ = {"USERPILOT_API_KEY": "NX-1", "OTHER": "NX-2"}
    assert load("", environ).destination.api_key.require() == "NX-1"
    assert load("destination.api_key = '${OTHER}'", environ).destination.api_key.require() == "NX-2"
    assert refused("", {"USERPILOT_API_KEY": "s3cret\n"}) == KEY


def test_the_fingerprint_follows_endpoint_and_key_and_nothing_else(load):
    def fingerprint(endpoint, key, more=""):
        text = f"[destination]\nendpoint = '{endpoint}'\n{more}"
        return load(text, {"USERPILOT_API_KEY": key}).destination.fingerprint

    # printf 'https://analytex.userpilot.io/\nNX-1' | sha256sum | cut -c1-16
    first = fingerprint("https://analytex.userpilot.io/", "NX-1")
    assert first == "688b58c81b817b4f"
    assert fingerprint("HTTPS://Analytex.Userpilot.io:443", "NX-1", "track_per_minute = 1") == first
    assert fingerprint("https://analytex.userpilot.io/", "NX-2") != first
    assert fingerprint("https://analytex-eu.userpilot.io/", "NX-1") != first


def test_secrets_are_in_no_repr_and_nothing_can_be_changed(load):
    text = "database.url = 'postgresql+psycopg://u:s3cret@h/d'\ndestination.api_key = 's3cret'\n"
    found = load(text + AUDIENCE)
    assert "s3cret" not in repr((found, found.database, found.destination, found.sources))
    assert list(found.destination.__rich_repr__()) == []
    with pytest.raises(AttributeError):
        found.destination.endpoint = "https://example.com/"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.definitions[0].sql = ""


def test_the_starter_loads_with_nothing_set_and_shows_the_defaults(load):
    """Uncommenting every line changes nothing except the key and the source of the examples."""
    default = settings.load(STARTER, {})
    assert default.database.url == f"sqlite:///{STARTER.parent.parent}/audience_sync.db"
    assert [each.key for each in default.definitions] == ["order_completed_last_30days", "total_spend"]
    active, count = re.subn(r"^# ([a-z_]+ = |\[)", r"\1", STARTER.read_text(), flags=re.MULTILINE)
    assert count >= 15
    found, default = load(active, {"SHOP_DATABASE_URL": "sqlite:///shop.db"}), load(STARTER.read_text())
    parts = attrgetter("destination", "database", "logging")
    assert parts(found) == parts(default)
    assert [
        dataclasses.replace(each, source=None, is_key_derived=True) for each in found.definitions
    ] == list(default.definitions)


def test_importing_the_settings_stays_light():
    heavy = "sqlalchemy", "sqlglot", "httpx", "typer", "rich", "alembic", "apscheduler"
    program = f"import sys, audience_sync.settings; print([m for m in {heavy!r} if m in sys.modules])"
    environ = os.environ | {"PYTHONPATH": str(STARTER.parent.parent)}
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True, env=environ).stdout == b"[]\n"


NAMES = st.sampled_from([
    "include", "database", "sources", "destination", "logging", "defaults", "audiences", "traits", "url", "name",
    "sql", "key", "source", "api_key", "endpoint", "ca_file", "timeout", "schema", "bulk", "level",
])  # fmt: skip
LEAVES = st.sampled_from([
    '""', '"x"', '"sqlite:///x"', '"https://[::1"', '"${A}"', '"${NO}"', "0", "-1", "1e400", "nan", "true",
    "9" * 30, "2011-06-01", '"10 minutes"', '"a\\u0000"', '"*.toml"', "[]", '"\\U0001F600"', '"/"',
])  # fmt: skip


def tables(values, between, size):
    lines = st.dictionaries(NAMES, values, max_size=size)
    return lines.map(lambda table: between.join(f"{name} = {value}" for name, value in table.items()))


def nested(inner):
    lists = st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
    return lists | tables(inner, ", ", 4).map(lambda each: f"{{{each}}}")


DOCUMENTS = tables(st.recursive(LEAVES, nested, max_leaves=12), "\n", 6) | st.text(max_size=200)
CHECKED = [HealthCheck.function_scoped_fixture]


@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=CHECKED)
@given(st.binary(max_size=200) | DOCUMENTS.map(str.encode))
@example(b"a" + b".a" * 5000 + b" = 1")
@example(b"sources.a" + b".a" * 5000 + b" = 1")
@example(b"[[audiences]]\nname" + b".a" * 5000 + b" = 1")
def test_only_a_configuration_error_escapes(load, content):
    try:
        found = load(content, {"A": "${A}\ud800"})
    except ConfigError as error:
        assert str(error)  # noqa: PT017
    else:
        assert found.destination.endpoint.endswith("/")
