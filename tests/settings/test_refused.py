"""Configurations that are refused: each message says what is wrong and where, and never shows a value."""

import re

import pytest

from tests.settings.conftest import AUDIENCE, HASH, KEY, TRAIT, USER

TABLE = "expected a table of names and values"
RATE = "[destination]: track_per_minute: expected a whole number from 1 to 1000000"
SCHEMA = "[database]: schema: expected at most 63 lower-case letters, digits and underscores, not starting with a digit"
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
    ("[defaults]\nschedule = 'hourly'\n" + AUDIENCE, "[defaults]: schedule: "),
    ("[defaults]\nfull_schedule = '61 * * * *'\n" + AUDIENCE, "[defaults]: full_schedule: "),
    ("[defaults]\ntimezone = 'Berlin'\n" + AUDIENCE,
     "[defaults]: timezone: there is no time zone 'Berlin': did you mean Europe/Berlin?"),
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
        ("sslmode=require&sslmode=disable", "option sslmode is there 2 times: remove all but one"),
        ("prepare_threshold=1&a=b&prepare_threshold=2", "option prepare_threshold is there 2 times: remove all but one"),
        ("autocommit=true", "unknown option autocommit: remove it"),
        ("replication=database", "unknown option replication: "),
        ("prepare_threshold=s3cret", "option prepare_threshold: expected a whole number, or"),
        ("connect_timeout=s3cret", "option connect_timeout: expected a number of seconds"),
        ("options=-E%20s3cret", "option options: expected -c NAME=VALUE"),
        ("client_encoding=latin1", "option client_encoding: expected utf8"),
    )),
    (
        "[database]\nurl = 'sqlite:///own.db?timeout=5&timeout=6'",
        "[database]: url: option timeout is there 2 times: remove all but one",
    ),
    ("[database]\nurl = 'sqlite:///own.db?timout=5'", "[database]: url: unknown option timout: did you mean timeout?"),
    ("[database]\nurl = 'sqlite:///own.db?timeout=s3cret'", "[database]: url: option timeout: expected a number of sec"),
    ("[database]\nurl = 'mysql://u:s3cret@h/d'", "[database]: url: expected sqlite:///FILE or postgresql://"),
    ("[database]\nurl = 'sqlite://s3cret.db'", "[database]: url: an SQLite file takes three slashes"),
    *((f"[database]\nurl = 'sqlite:{each}'", "[database]: url: an in-memory database loses its record of what was sent")
      for each in ("//", "///", "///:memory:", "///file:x?mode=memory&uri=true")),
    *((f"[sources.shop]\nurl = 'sqlite:{each}'", "[sources.shop]: url: an in-memory database of SQLite has no tables")
      for each in ("//", "///:memory:")),
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
