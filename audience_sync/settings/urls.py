"""Database URLs and the endpoint: they are checked and brought into the one form that the program uses."""

import ipaddress
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from audience_sync.settings.sections import Section, absolute


def database_url(section: Section, url: str, folder: Path) -> str:
    """Add the driver to a PostgreSQL URL, and make an SQLite file absolute; SQLAlchemy parses the rest."""
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?", scheme):
        section.fail("url: expected a database URL, such as sqlite:///FILE")
    if scheme.partition("+")[0] != "sqlite":
        _check_network(section, rest)
        driver = "postgresql+psycopg" if scheme in {"postgres", "postgresql"} else scheme
        return f"{driver}://{rest}"
    if not rest:
        return url
    if not rest.startswith("/"):
        section.fail("url: an SQLite file takes three slashes: sqlite:///FILE (four before an absolute path)")
    file, question, options = rest[1:].partition("?")
    prefix = "file:" if file.startswith("file:") else ""
    if file and ":memory:" not in file:
        file = f"{prefix}{absolute(Path(quote(str(folder))), file.removeprefix(prefix))}"
    return f"{scheme}:///{file}{question}{options}"


def _check_network(section: Section, rest: str) -> None:
    """Refuse a URL in which a part of the password would be read as host, port or option, which messages show."""
    authority, _, after = rest.partition("/")
    host = authority.rpartition("@")[2]
    if authority.count("@") > 1 or not re.fullmatch(r"(\[[^\]]*\]|[^:\[]*)(:\d*)?", host):
        section.fail(
            "url: expected SCHEME://USER:PASSWORD@HOST:PORT/DATABASE; write @ : / ? # in a password as %40 %3A "
            "%2F %3F %23, or take the password from its own variable: USER:${DB_PASSWORD}@HOST"
        )
    if "%3a" in host.lower() and not host.startswith("["):
        section.fail("url: a variable holds both host and port: use two, ${HOST}:${PORT}")
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
    """Recognise plain forms only: 127.1 and 2130706433 also mean loopback, but hide it from the reader."""
    try:
        return host in {"localhost", "::1"} or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
