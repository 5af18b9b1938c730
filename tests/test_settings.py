import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from audience_sync import settings
from audience_sync.definitions.model import Definition, Kind
from audience_sync.errors import ConfigError, MissingVariable

STARTER = Path(__file__).parent.parent / "config" / "audience_sync.toml"
AUDIENCE = '[[audiences]]\nname = "VIPs"\nsql = "SELECT user_id FROM vips"\n'


@pytest.fixture
def load(tmp_path):
    def load(text, environ=None, name="audience_sync.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return settings.load(path, environ or {})

    return load


@pytest.fixture
def refused(load, tmp_path):
    """The message of the error, without the path of the file it begins with."""

    def refused(text, environ=None):
        with pytest.raises(ConfigError) as error:
            load(text, environ)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'audience_sync.toml'}: ")
        return message.removeprefix(f"{tmp_path / 'audience_sync.toml'}: ")

    return refused


def test_an_empty_file_gives_every_default(load, tmp_path):
    found = load("")
    assert found.path == tmp_path / "audience_sync.toml"
    assert found.folder == tmp_path
    assert found.database.url == f"sqlite:///{tmp_path}/audience_sync.db"
    assert found.database.schema == "audience_sync"
    assert found.sources == {}
    assert found.definitions == ()
    assert (found.logging.format, found.logging.level) == ("text", "info")
    destination = found.destination
    assert destination.api_key is None
    assert destination.endpoint == "https://analytex.userpilot.io/"
    assert destination.allow_custom_endpoint is False
    assert destination.ca_file == ""
    assert destination.identify_per_minute == 600
    assert destination.track_per_minute == 600
    assert destination.company_per_minute == 600
    assert destination.bulk is False
    assert destination.booleans == "native"
    assert destination.nested == "flatten"
    assert destination.track_policy == "at_least_once"
    assert destination.presets is True


def test_every_name_that_works_is_read(load, tmp_path):
    found = load(
        """
        [database]
        url = "postgresql+psycopg://me@db/x"
        schema = "sync_2"
        [sources.shop]
        url = "${SHOP}"
        [destination]
        api_key = "k"
        endpoint = "https://analytex-eu.userpilot.io"
        allow_custom_endpoint = true
        ca_file = "ca.pem"
        identify_per_minute = 1
        track_per_minute = 2
        company_per_minute = 3
        bulk = false
        booleans = "string"
        nested = "json"
        track_policy = "at_most_once"
        presets = false
        [logging]
        format = "json"
        level = "debug"
        [defaults]
        timeout = "2 hours"
        [[traits]]
        name = "Total Spend"
        sql = "SELECT 1"
        timeout = "30 seconds"
        [[audiences]]
        name = "VIPs"
        key = "vip"
        sql = "SELECT 2"
        source = "shop"
        enabled = false
        """,
        {"SHOP": "mysql+pymysql://u:p@h/d"},
    )
    assert found.database.url == "postgresql+psycopg://me@db/x"
    assert found.database.schema == "sync_2"
    assert found.sources["shop"].url == "mysql+pymysql://u:p@h/d"
    destination = found.destination
    assert destination.require_api_key() == "k"
    assert destination.endpoint == "https://analytex-eu.userpilot.io/"
    assert destination.ca_file == f"{tmp_path}/ca.pem"
    limits = destination.identify_per_minute, destination.track_per_minute, destination.company_per_minute
    assert limits == (1, 2, 3)
    assert (destination.booleans, destination.nested) == ("string", "json")
    assert (destination.track_policy, destination.presets) == ("at_most_once", False)
    assert (found.logging.format, found.logging.level) == ("json", "debug")
    assert found.definitions == (
        Definition("vip", "VIPs", Kind.AUDIENCE, "SELECT 2", "shop", enabled=False, timeout_seconds=7200.0),
        Definition("total_spend", "Total Spend", Kind.TRAIT, "SELECT 1", None, timeout_seconds=30.0),
    )


def test_a_definition_without_a_time_limit_has_ten_minutes(load):
    assert load(AUDIENCE).definitions[0].timeout_seconds == 600.0


# Where the file is found, and what relative paths mean


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
    with pytest.raises(ConfigError, match=r"named\.toml: there is no such file"):
        settings.load(tmp_path / "named.toml", {})
    with pytest.raises(ConfigError, match=r"named\.toml: there is no such file"):
        settings.load(None, {"AUDIENCE_SYNC_CONFIG": str(tmp_path / "named.toml")})


def test_paths_are_relative_to_the_folder_above_one_called_config(load, tmp_path):
    text = 'include = ["more/*.toml"]\n[sources.shop]\nurl = "sqlite:///shop.db?mode=ro"\n'
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "vips.toml").write_text(AUDIENCE)
    found = load(text, name="config/audience_sync.toml")
    assert found.folder == tmp_path
    assert found.database.url == f"sqlite:///{tmp_path}/audience_sync.db"
    assert found.sources["shop"].url == f"sqlite:///{tmp_path}/shop.db?mode=ro"
    assert [each.key for each in found.definitions] == ["vips"]


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("sqlite:////var/lib/x.db", "sqlite:////var/lib/x.db"),
        ("sqlite:///data/../x.db", "sqlite:///{}/x.db"),
        ("sqlite:///file:x.db?mode=ro&uri=true", "sqlite:///file:{}/x.db?mode=ro&uri=true"),
    ],
)
def test_an_sqlite_file_becomes_absolute(load, tmp_path, url, absolute):
    text = f'[database]\nurl = "{url}"\n[sources.s]\nurl = "{url}"'
    assert load(text).database.url == absolute.format(tmp_path)
    assert load(text).sources["s"].url == absolute.format(tmp_path)


# Included files


def test_included_files_follow_the_main_one_in_order(load, tmp_path):
    def definition(kind, name):
        return f'[[{kind}]]\nname = "{name}"\nsql = "SELECT 1"\n'

    (tmp_path / "b.toml").write_text(definition("traits", "T2") + definition("audiences", "A3"))
    (tmp_path / "a.toml").write_text(definition("audiences", "A2"))
    main = definition("traits", "T1") + definition("audiences", "A1")
    found = load('include = ["[ab].toml", "a.toml", "none/*.toml"]\n' + main)
    assert [each.name for each in found.definitions] == ["A1", "A2", "A3", "T1", "T2"]


def test_an_included_file_is_named_in_its_errors(load, tmp_path):
    (tmp_path / "a.toml").write_text('[[audiences]]\nname = "VIPs"\nsqll = "SELECT 1"')
    with pytest.raises(ConfigError) as error:
        load('include = ["a.toml"]')
    expected = f"{tmp_path}/a.toml: [[audiences]] VIPs: unknown name sqll: did you mean sql?"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", ["include = []", "[database]", "[destination]", "[defaults]", "[sources.x]"])
def test_an_included_file_holds_definitions_only(load, tmp_path, name):
    (tmp_path / "a.toml").write_text(name)
    with pytest.raises(ConfigError, match=r"a\.toml: an included file: unknown name"):
        load('include = ["a.toml"]')


def test_a_file_that_is_not_there_cannot_be_included(refused):
    assert refused('include = ["a.toml"]').startswith("the file: include: there is no file a.toml in ")


# Names and types


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[databse]", "the file: unknown name databse: did you mean database?"),
        ("[destination]\napi_kee = 's3cret'", "[destination]: unknown name api_kee: did you mean api_key?"),
        ("[destination]\nmissing = 's3cret'", "[destination]: unknown name missing: "),
        ("[logging]\nlvl = 's3cret'", "[logging]: unknown name lvl: did you mean level?"),
        ("[sources.shop]\nuri = 's3cret'", "[sources.shop]: unknown name uri: did you mean url?"),
        ("[defaults]\nx = 's3cret'", "[defaults]: unknown name x: known are timeout"),
        ("[[audiences]]\nnaem = 's3cret'", "[[audiences]] number 1: unknown name naem: did you mean name?"),
        ("[[traits]]\nname = 'T'\nsource_ = 's3cret'", "[[traits]] T: unknown name source_: did you mean source?"),
        (AUDIENCE + "source = 's3cret'\n[sources.sicret]\nurl='x://'", "[[audiences]] VIPs: source: there is"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest(refused, text, message):
    found = refused(text)
    assert found.startswith(message)
    assert "s3cret" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include = 's3cret'", 'the file: include: expected a list of strings, such as ["audiences/*.toml"]'),
        ("database = 's3cret'", "[database]: expected a table of names and values"),
        ("sources = 's3cret'", "the file: sources: expected tables: [sources.NAME]"),
        ("sources.shop = 's3cret'", "[sources.shop]: expected a table of names and values"),
        ("[sources.shop]", "[sources.shop]: url: missing: expected a string"),
        ("audiences = 's3cret'", "the file: audiences: expected [[audiences]], with two brackets"),
        ("[audiences]", "the file: audiences: expected [[audiences]], with two brackets"),
        ("audiences = ['s3cret']", "[[audiences]] number 1: expected a table of names and values"),
        ("[[audiences]]\nname = 'A'", "[[audiences]] A: sql: missing: expected a string that is not empty"),
        ("[[audiences]]\nsql = 's3cret'", "[[audiences]] number 1: name: missing: expected a string that is not"),
        ("[[traits]]\nname = 'A'\nsql = ' '", "[[traits]] A: sql: expected a string that is not empty"),
        ("[[traits]]\nname = ' '\nsql = 's3cret'", "[[traits]]  : name: expected a string that is not empty"),
        ("[[traits]]\nname = 'A'\nsql = 8675309", "[[traits]] A: sql: expected a string that is not empty"),
        ("[[traits]]\nname = 'A'\nsql = 's'\nenabled = 's3cret'", "[[traits]] A: enabled: expected true or false"),
        ("[[traits]]\nname = 'A'\nsql = 's'\ntimeout = 8675309", "[[traits]] A: timeout: expected a span, such as"),
        ("[[traits]]\nname = 'A'\nsql = 's'\nkey = 8675309", "[[traits]] A: key: expected a string"),
        ("[destination]\nidentify_per_minute = 's3cret'",
         "[destination]: identify_per_minute: expected a whole number from 1 to 1000000"),
        ("[destination]\ntrack_per_minute = 0", "[destination]: track_per_minute: expected a whole number from 1"),
        ("[destination]\ntrack_per_minute = -8675309", "[destination]: track_per_minute: expected a whole number"),
        ("[destination]\ntrack_per_minute = true", "[destination]: track_per_minute: expected a whole number"),
        (f"[destination]\ntrack_per_minute = {'9' * 40}", "[destination]: track_per_minute: expected a whole "),
        ("[destination]\nbulk = 's3cret'", "[destination]: bulk: expected true or false"),
        ("[destination]\nbooleans = 's3cret'", "[destination]: booleans: expected native or string"),
        ("[destination]\nnested = 8675309", "[destination]: nested: expected flatten or json"),
        ("[destination]\ntrack_policy = 's3cret'", "[destination]: track_policy: expected at_least_once or at_m"),
        ("[logging]\nformat = 's3cret'", "[logging]: format: expected text or json"),
        ("[logging]\nlevel = 's3cret'", "[logging]: level: expected debug or info or warning or error"),
        ("[database]\nschema = 'S3cret'", "[database]: schema: expected lower-case letters, digits and under"),
        ('[database]\nschema = "s3cret\\n"', "[database]: schema: expected lower-case letters, digits and und"),
        (f"[database]\nschema = '{'s3cret' * 11}'", "[database]: schema: expected lower-case letters"),
        ("[database]\nurl = 2011-06-01", "[database]: url: expected a string"),
        ("[database]\nurl = 'a\\u0000s3cret'", "[database]: url: expected a database URL"),
        ('[database]\nurl = "a\\u0000s3cret"', "[database]: url: holds a NUL character"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_with_what_was_expected(refused, text, message):
    found = refused(text)
    assert found.startswith(message)
    assert "s3cret" not in found.lower()
    assert "8675309" not in found


@pytest.mark.parametrize(
    "span", ["10", "10 days", "0 seconds", "-1 minutes", "1.5 hours", "10 minutes\\n", ""]
)
def test_a_span_is_a_number_and_a_unit(refused, span):
    expected = '[defaults]: timeout: expected a span, such as "30 seconds", "10 minutes" or "2 hours"'
    assert refused(f'[defaults]\ntimeout = "{span}"') == expected


@pytest.mark.parametrize("text", [b"[destination\napi_key = 's3cret'", b"api_key = s3cret", b"a = 's3cret"])
def test_broken_toml_is_refused_with_its_line(refused, text):
    found = refused(text)
    assert found.startswith("not valid TOML: ")
    assert re.search(r"at line \d+, column \d+|at end of document", found)
    assert "s3cret" not in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 5000, "not valid TOML: nested too deeply"),
        (b"a = " + b"9" * 5000, "not valid TOML: nested too deeply, or a number too long"),
        (b"# " + b"x" * 1_000_000, "larger than 1000000 bytes"),
        (b"# \xff", "not UTF-8 (at byte 2)"),
    ],
)
def test_a_file_that_cannot_be_read_as_toml_is_refused(refused, content, message):
    assert refused(content).startswith(message)


def test_a_byte_order_mark_is_accepted(load):
    assert load(b"\xef\xbb\xbf[logging]\nlevel = 'debug'").logging.level == "debug"


def test_a_folder_is_not_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="this is a folder"):
        settings.load(tmp_path, {})


# What belongs to later releases


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(
            (f"{section}\n{name} = 1", name)
            for section in ("[defaults]", AUDIENCE)
            for name in (
                "schedule", "full_schedule", "timezone", "guard_above", "max_exit_ratio", "max_enter_ratio",
                "eligible_sql", "ready_sql",
            )
        ),
        *((f"[database]\nkeep_{name} = 1", f"keep_{name}") for name in ("calls", "deliveries", "requests")),
        ("[database]\nkeep_past_members = 1", "keep_past_members"),
        ("[destination]\nbulk = true", "bulk = true"),
        ("[destination]\nbulk_rows_per_minute = 1", "bulk_rows_per_minute"),
        ("[destination]\nbulk_rows_per_job = 1", "bulk_rows_per_job"),
        (AUDIENCE + "query = 's3cret'", "query"),
        ("[[mappings]]", "mappings"),
        ("[tracking]", "tracking"),
    ],
)  # fmt: skip
def test_a_name_of_a_later_release_says_so(refused, text, name):
    assert refused(text).partition(": ")[2] == f"not yet: {name} belongs to a later release; remove it"


# Variables


def test_variables_are_taken_in_every_string(load, tmp_path):
    environ = {"A": "Vi", "B": "Ps", "T": "vips", "N": "5 minutes", "F": "more"}
    (tmp_path / "more.toml").write_text(
        '[[audiences]]\nname = "${A}${B}"\nsql = "SELECT id FROM ${T}"\ntimeout = "${N}"'
    )
    definition = load('include = ["${F}.toml"]', environ).definitions[0]
    assert definition.name == "ViPs"
    assert definition.sql == "SELECT id FROM vips"
    assert definition.timeout_seconds == 300.0


def test_a_variable_is_taken_once_and_a_dollar_is_no_variable(load):
    text = AUDIENCE.replace("user_id", "'${A}', '${1}', $$x$$, '$B'")
    assert (
        load(text, {"A": "${B}", "B": "no"}).definitions[0].sql
        == "SELECT '${B}', '${1}', $$x$$, '$B' FROM vips"
    )


def test_a_missing_variable_is_named_with_its_place(load, tmp_path):
    with pytest.raises(MissingVariable) as error:
        load('[sources.shop]\nurl = "${SHOP_URL}"', {"OTHER": "s3cret"})
    assert str(error.value) == (
        f"{tmp_path}/audience_sync.toml: [sources.shop]: url: "
        "set the environment variable SHOP_URL, which is missing"
    )


@pytest.mark.parametrize("text", ["${}", "${A B}", "${A", "${1}"])
def test_a_variable_that_is_written_wrongly_is_refused(refused, text):
    assert refused(f'[sources.shop]\nurl = "{text}"').startswith(
        "[sources.shop]: url: write an environment variable as ${NAME}"
    )


# The destination


@pytest.mark.parametrize("text", ["", '[destination]\napi_key = "${USERPILOT_API_KEY}"'])
@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "set the environment variable USERPILOT_API_KEY, which is missing"),
        ({"USERPILOT_API_KEY": ""}, "its environment variable is empty: set it"),
    ],
)
def test_a_missing_api_key_is_an_error_only_where_it_is_needed(load, tmp_path, text, environ, why):
    destination = load(text, environ).destination
    assert destination.api_key is None
    assert destination.fingerprint == ""
    with pytest.raises(MissingVariable) as error:
        destination.require_api_key()
    assert str(error.value) == f"{tmp_path}/audience_sync.toml: [destination]: api_key: {why}"


def test_the_api_key_comes_from_the_environment_unless_set(load):
    environ = {"USERPILOT_API_KEY": "NX-1", "OTHER": "NX-2"}
    assert load("", environ).destination.require_api_key() == "NX-1"
    assert load('[destination]\napi_key = "${OTHER}"', environ).destination.require_api_key() == "NX-2"


@pytest.mark.parametrize("key", ["", "s3cret ", "s3cret\n", "s3c ret", "s3crét", "s3cret\x7f"])
def test_a_malformed_api_key_is_refused_and_not_repeated(refused, key):
    expected = "[destination]: api_key: expected printable ASCII without spaces or line ends, and not nothing"
    text = '[destination]\napi_key = ""' if key == "" else ""
    assert refused(text, {"USERPILOT_API_KEY": key}) == expected


@pytest.mark.parametrize("value", ["8675309", "['s3cret']", "true"])
def test_an_api_key_is_a_string(refused, value):
    assert "expected printable ASCII" in refused(f"[destination]\napi_key = {value}")


def test_the_fingerprint_follows_endpoint_and_key_and_nothing_else(load):
    def fingerprint(endpoint, key):
        return load(
            f'[destination]\nendpoint = "{endpoint}"', {"USERPILOT_API_KEY": key}
        ).destination.fingerprint

    # printf 'https://analytex.userpilot.io/\nNX-1' | sha256sum | cut -c1-16
    first = fingerprint("https://analytex.userpilot.io/", "NX-1")
    assert first == "688b58c81b817b4f"
    assert fingerprint("HTTPS://Analytex.Userpilot.io:443", "NX-1") == first
    assert fingerprint("https://analytex.userpilot.io/", "NX-2") != first
    assert fingerprint("https://analytex-eu.userpilot.io/", "NX-1") != first


@pytest.mark.parametrize(
    ("endpoint", "normalised"),
    [
        ("https://analytex.userpilot.io", "https://analytex.userpilot.io/"),
        ("https://analytex.userpilot.io//", "https://analytex.userpilot.io/"),
        ("https://userpilot.io/", "https://userpilot.io/"),
        ("https://a.b.userpilot.io:8443/v9", "https://a.b.userpilot.io:8443/v9/"),
        ("http://localhost:8080", "http://localhost:8080/"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1/"),
        ("https://127.9.8.7/", "https://127.9.8.7/"),
        ("http://[::1]:8080/", "http://[::1]:8080/"),
    ],
)
def test_an_endpoint_under_userpilot_or_on_this_machine_is_accepted(load, endpoint, normalised):
    assert load(f'[destination]\nendpoint = "{endpoint}"').destination.endpoint == normalised


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://example.com/",
        "http://analytex.userpilot.io/",
        "https://userpilot.io.example.com/",
        "https://evil-userpilot.io/",
        "https://evil%2euserpilot.io/",
        "https://userpilot.io./",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://0/",
        "http://0.0.0.0/",
        "http://[::ffff:127.0.0.1]/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://localhost.example.com/",
        "http://128.0.0.1/",
        "http://169.254.169.254/",
    ],
)
def test_another_endpoint_needs_permission(load, refused, endpoint):
    text = f'[destination]\nendpoint = "{endpoint}"\n'
    assert "set allow_custom_endpoint = true" in refused(text)
    assert load(text + "allow_custom_endpoint = true").destination.endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "analytex.userpilot.io",
        "ftp://analytex.userpilot.io/",
        "https://",
        "https:///x",
        "https://s3cret@analytex.userpilot.io/",
        "https://u:s3cret@analytex.userpilot.io/",
        "https://analytex.userpilot.io/?key=s3cret",
        "https://analytex.userpilot.io/?",
        "https://analytex.userpilot.io/#s3cret",
        "https://analytex.userpilot.io:s3cret/",
        "https://analytex.userpilot.io:99999/",
        "https://[s3cret/",
        "https://analytex.user pilot.io/",
        "https://analytex.user\\npilot.io/",
        "https://s3cret\\\\.userpilot.io/",
        "https://üserpilot.io/",
    ],
)
def test_what_is_no_endpoint_is_refused_even_with_permission(refused, endpoint):
    expected = "[destination]: endpoint: expected https://HOST/, without credentials, query or fragment"
    assert refused(f'[destination]\nallow_custom_endpoint = true\nendpoint = "{endpoint}"') == expected


# Databases


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
@pytest.mark.parametrize("place", ["database", "sources.shop"])
def test_the_bare_form_of_postgresql_is_refused(refused, scheme, place):
    found = refused(f'[{place}]\nurl = "{scheme}://u:s3cret@h/d"')
    assert found.startswith(f"[{place}]: url: write postgresql+psycopg://")
    assert "s3cret" not in found


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:s3cret@h/d", "expected sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"),
        ("s3cret", "expected a database URL"),
        ("", "expected a database URL"),
        ("sqlite://s3cret.db", "an SQLite file takes three slashes"),
        ("sqlite://", "a database in memory forgets what was sent"),
        ("sqlite:///", "a database in memory forgets what was sent"),
        ("sqlite:///:memory:", "a database in memory forgets what was sent"),
        ("sqlite:///file:x?mode=memory&uri=true", "a database in memory forgets what was sent"),
    ],
)
def test_our_database_is_an_sqlite_file_or_postgresql(refused, url, message):
    found = refused(f'[database]\nurl = "{url}"')
    assert found.startswith(f"[database]: url: {message}")
    assert "s3cret" not in found


# Definitions


@pytest.mark.parametrize("section", ["audiences", "traits"])
def test_two_definitions_with_one_key_are_refused(refused, section):
    found = refused(AUDIENCE + f'[[{section}]]\nname = "vips!"\nsql = "SELECT 1"')
    assert found == "the file: VIPs and vips! have one key, vips: give one of them another with `key = `"


def test_a_name_that_makes_no_key_asks_for_one(load, refused):
    text = '[[audiences]]\nname = "注文"\nsql = "SELECT 1"\n'
    assert "key = " in refused(text)
    assert load(text + 'key = "chumon"').definitions[0].key == "chumon"


def test_a_key_set_by_hand_has_a_form(refused):
    assert refused(AUDIENCE + 'key = "V I P"').startswith(
        "[[audiences]] VIPs: a key holds lower-case letters"
    )


@pytest.mark.parametrize("name", ["Name", "E-mail!", "Created at", "signed up at", "First Seen At"])
def test_an_audience_does_not_overwrite_a_property_of_userpilot(refused, name):
    key = ' \nkey = "email"' if name == "E-mail!" else ""
    found = refused(f'[[audiences]]\nname = "{name}"\nsql = "SELECT 1"{key}')
    assert "is a property of Userpilot's own" in found


def test_a_trait_may_set_the_name_but_not_what_userpilot_keeps(load, refused):
    text = '[[traits]]\nname = "{}"\nsql = "SELECT 1"'
    assert load(text.format("Name")).definitions[0].key == "name"
    assert "is a property of Userpilot's own" in refused(text.format("Last seen at"))


def test_a_name_of_several_lines_is_refused(refused):
    found = refused('[[audiences]]\nname = "a\\nb"\nsql = "SELECT 1"')
    assert found == r"[[audiences]] 'a\nb': name: expected one line without control characters"


# Secrets, fuzz, cost


def test_secrets_are_in_no_repr(load):
    found = load('[database]\nurl = "postgresql+psycopg://u:s3cret@h/d"\n[destination]\napi_key = "s3cret"')
    parts = (found, found.database, found.destination, found.sources)
    assert "s3cret" not in "".join(repr(each) for each in parts)
    assert list(found.destination.__rich_repr__()) == []


def test_settings_cannot_be_changed(load):
    found = load(AUDIENCE)
    with pytest.raises(AttributeError):
        found.destination.endpoint = "https://example.com/"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.definitions[0].sql = ""


def test_the_starter_loads_with_nothing_set():
    found = settings.load(STARTER, {})
    assert [(each.kind, each.key) for each in found.definitions] == [
        ("audience", "order_completed_last_30days"),
        ("trait", "total_spend"),
    ]
    assert found.folder == STARTER.parent.parent


def test_the_starter_shows_the_defaults(load):
    """Each line that is commented out, put in force, changes nothing but what it cannot know."""
    text = STARTER.read_text()
    names = re.findall(r"^# ([a-z_]+ = .*)$", text, flags=re.MULTILINE)
    assert len(names) >= 15
    active = re.sub(r"^# ([a-z_]+ = |\[)", r"\1", text, flags=re.MULTILINE)
    found, default = load(active, {"SHOP_DATABASE_URL": "sqlite://"}), load(text)
    assert found.destination == default.destination
    assert found.database == default.database
    assert found.logging == default.logging
    assert [dataclasses.replace(each, source=None) for each in found.definitions] == list(default.definitions)


def test_importing_the_settings_stays_light():
    heavy = "sqlalchemy", "sqlglot", "httpx", "typer", "rich", "alembic", "apscheduler"
    program = f"import sys, audience_sync.settings; print([m for m in {heavy!r} if m in sys.modules])"
    environ = os.environ | {"PYTHONPATH": str(STARTER.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ
    )
    assert done.stdout == "[]\n"


NAMES = st.sampled_from(
    [
        "include", "database", "sources", "destination", "logging", "defaults", "audiences", "traits", "url",
        "name", "sql", "key", "source", "api_key", "endpoint", "ca_file", "timeout", "schema", "bulk", "level",
    ]
)  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(
        [
            '""',
            '"x"',
            '"sqlite:///x"',
            '"https://[::1"',
            '"${A}"',
            '"${NO}"',
            "0",
            "-1",
            "1e400",
            "nan",
            "true",
        ]
        + ["9" * 30, "2011-06-01", '"10 minutes"', '"a\\u0000"', '"*.toml"', "[]", '"\\U0001F600"', '"/"'],
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
        | st.dictionaries(NAMES, inner, max_size=4).map(
            lambda table: "{" + ", ".join(f"{name} = {value}" for name, value in table.items()) + "}"
        )
    ),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=6).map(
    lambda table: "\n".join(f"{name} = {value}" for name, value in table.items()).encode()
)


@hypothesis_settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | DOCUMENTS)
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
