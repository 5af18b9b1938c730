"""URLs of databases, and the endpoint: their normal form, their variables, and what is refused."""

import pytest
import sqlalchemy as sa

from audience_sync.db import engines
from audience_sync.db.sources import open_source


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
