"""Check database URLs and the endpoint, and normalise them to the form that the program uses."""

import ipaddress
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from audience_sync.audiences.statement import SUPPORTED
from audience_sync.settings.sections import FILE_DATABASES, Section, absolute
from audience_sync.suggest import did_you_mean, shown

_DRIVERS = {
    "sqlite": "sqlite", "sqlite+pysqlite": "sqlite", "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg", "postgresql+psycopg": "postgresql+psycopg",
}  # fmt: skip
# The allowed options of a URL: those of libpq and of SQLite.
_OPTIONS = {
    "postgresql+psycopg": (
        "application_name", "channel_binding", "client_encoding", "connect_timeout",
        "fallback_application_name", "gssdelegation", "gssencmode", "gsslib", "host", "hostaddr",
        "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "krbsrvname",
        "load_balance_hosts", "max_protocol_version", "min_protocol_version", "options", "passfile",
        "port", "prepare_threshold", "require_auth", "requirepeer", "service",
        "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcert", "sslcertmode",
        "sslcompression", "sslcrl", "sslcrldir", "sslkey", "sslmode", "sslnegotiation", "sslpassword",
        "sslrootcert", "sslsni", "target_session_attrs", "tcp_user_timeout", "user",
    ),
    "sqlite": ("cache", "immutable", "mode", "nolock", "psow", "timeout", "uri", "vfs"),
}  # fmt: skip
_REPEATABLE = {"host", "port", "options"}
_VALUES = {  # what some of them must look like
    "connect_timeout": (r"\d{1,6}", "a number of seconds"),
    "prepare_threshold": (r"\d{1,6}|none", 'a whole number, or "none" to prepare no statements'),
    "options": (r"\s*((-c\s*|--)[A-Za-z_][\w.]*=(\\.|[^\s\\])*\s*)*", "-c NAME=VALUE, any number"),
    "client_encoding": (r"(?i:utf-?8|auto)", "utf8"),
    "timeout": (r"\d{1,6}(\.\d*)?", "a number of seconds"),
}


def database_url(section: Section, url: str, folder: Path) -> str:
    """Add the driver to a PostgreSQL URL, and make a database file absolute; SQLAlchemy parses the rest."""
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?", scheme):
        section.fail("url: expected a database URL, such as sqlite:///FILE")
    backend = scheme.partition("+")[0]
    if backend in {"sqlite", "postgres", "postgresql"} and scheme not in _DRIVERS:
        section.fail(
            "url: write sqlite:// or postgresql://, without another driver: audience-sync needs its own"
        )
    scheme = _DRIVERS.get(scheme, scheme)
    if backend in FILE_DATABASES:
        rest = _absolute_file(section, scheme, rest, folder)
    else:
        _check_network(section, rest)
    if scheme in _OPTIONS:
        _check_options(section, _OPTIONS[scheme], rest.partition("?")[2])
    return f"{scheme}://{rest}"


def is_supported(url: str) -> bool:
    """Return whether all promises hold for the URL's kind of database."""
    return re.split(r"[:+]", url, maxsplit=1)[0] in SUPPORTED


def is_in_memory(url: str) -> bool:
    """Return whether SQLite would keep the database in memory only."""
    return url in {"sqlite://", "sqlite:///"} or (
        url.startswith("sqlite:") and (":memory:" in url or "mode=memory" in url)
    )


def _absolute_file(section: Section, scheme: str, rest: str, folder: Path) -> str:
    if not rest:
        return rest
    if not rest.startswith("/"):
        kind = "an SQLite" if scheme == "sqlite" else "a database"
        section.fail(f"url: {kind} file takes three slashes: {scheme}:///FILE (four before an absolute path)")
    file, question, options = rest[1:].partition("?")
    prefix = "file:" if file.startswith("file:") else ""
    if file and ":memory:" not in file and not file.startswith(("md:", "motherduck:")):  # DuckDB's service
        file = f"{prefix}{absolute(Path(quote(str(folder))), file.removeprefix(prefix))}"
    return f"/{file}{question}{options}"


def _check_options(section: Section, known: Collection[str], query: str) -> None:
    """Refuse an option that would have no effect, or that the driver would refuse without saying where it is."""
    options = parse_qsl(query, keep_blank_values=True)
    counts = Counter(name for name, _ in options)
    for name, value in options:
        if name not in known:
            section.fail(f"url: unknown option {shown(name)}: {did_you_mean(name, known, 'remove it')}")
        if counts[name] > 1 and name not in _REPEATABLE:
            section.fail(f"url: option {name} is there {counts[name]} times: remove all but one")
        pattern, expected = _VALUES.get(name, (r"(?s:.*)", ""))
        if not re.fullmatch(pattern, value):
            section.fail(f"url: option {name}: expected {expected}")


def _check_network(section: Section, rest: str) -> None:
    """Refuse a URL in which a part of the password would be read as host, port or option, because messages show those."""
    authority, _, after = rest.partition("/")
    host = authority.rpartition("@")[2]
    if "," in host:
        section.fail("url: write several hosts as options: USER@/DATABASE?host=HOST1:PORT&host=HOST2:PORT")
    if authority.count("@") > 1 or not re.fullmatch(r"(\[[^\]]*\]|[^:\[]*)(:\d*)?", host):
        section.fail(
            "url: expected SCHEME://USER:PASSWORD@HOST:PORT/DATABASE; write @ : / ? # in a password as %40 %3A "
            "%2F %3F %23, or take the password from its own variable: USER:${DB_PASSWORD}@HOST"
        )
    if "%3a" in host.lower() and not host.startswith("["):
        section.fail("url: a variable contains both host and port: use two, ${HOST}:${PORT}")
    if re.search(r"(^|[?&])(password|pwd|passwd)=", f"{host}{after}".partition("?")[2], re.IGNORECASE):
        section.fail("url: write the password as USER:PASSWORD@HOST, not among the options")


def normalize_endpoint(section: Section, endpoint: str, *, custom: bool) -> str:
    """Return the endpoint with a lower-case host, without a default port, and with one slash at the end."""
    message = "endpoint: expected https://HOST/, without credentials, query or fragment"
    if not re.fullmatch(r"[!-~]+", endpoint) or any(character in endpoint for character in "@?#\\"):
        section.fail(message)
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in {"https", "http"}:
        section.fail(message)
    userpilot = parts.scheme == "https" and re.fullmatch(r"([a-z0-9-]+\.)*userpilot\.io", host)
    if not (userpilot or _is_loopback(host) or custom):
        section.fail(
            "endpoint: expected https and a host under userpilot.io, or loopback (localhost, 127.0.0.1, "
            "[::1]); for another one set allow_custom_endpoint = true"
        )
    authority = f"[{host}]" if ":" in host else host
    if port not in {None, {"https": 443, "http": 80}[parts.scheme]}:
        authority = f"{authority}:{port}"
    return f"{parts.scheme}://{authority}{parts.path.rstrip('/')}/"


def _is_loopback(host: str) -> bool:
    """Recognise only plain forms: 127.1 and 2130706433 mean loopback too, but a reader would not see that."""
    try:
        return host in {"localhost", "::1"} or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
