"""The configuration: the settings or the error for each file."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from audience_sync import settings
from audience_sync.audiences import schedule
from audience_sync.audiences.definition import Guard
from audience_sync.errors import ConfigError, MissingVariable
from tests.settings.conftest import AUDIENCE, HASH, KEY, USER

STARTER = Path(__file__).parent.parent.parent / "config" / "audience_sync.toml"


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
def test_a_stored_key_stays_although_letters_were_lost_in_it(write, name, old, new):
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


def test_unusual_but_valid_settings_are_accepted(load):
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
