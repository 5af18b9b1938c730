"""Database URLs and the endpoint: what is taken, and the one form of each."""

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from audience_sync.settings.sections import Place, absolute


def url(place: Place, url: str, folder: Path) -> str:
    """The URL, with an SQLite file made absolute. Not parsed further: SQLAlchemy has rules of its own."""
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?", scheme):
        place.fail("url: expected a database URL, such as sqlite:///FILE")
    if scheme in {"postgresql", "postgres"}:
        place.fail("url: write postgresql+psycopg:// (the bare form means another driver)")
    if scheme.partition("+")[0] != "sqlite":
        _check_network(place, rest)
    if scheme.partition("+")[0] != "sqlite" or not rest:
        return url
    if not rest.startswith("/"):
        place.fail("url: an SQLite file takes three slashes: sqlite:///FILE (four before an absolute path)")
    file, question, options = rest[1:].partition("?")
    prefix = "file:" if file.startswith("file:") else ""
    if file and ":memory:" not in file:
        file = f"{prefix}{absolute(folder, file.removeprefix(prefix))}"
    return f"{scheme}:///{file}{question}{options}"


def _check_network(place: Place, rest: str) -> None:
    """Refuse what would be read with parts of the password where they are shown: as host, port or option."""
    authority, _, after = rest.partition("/")
    host = authority.rpartition("@")[2]
    if authority.count("@") > 1 or not re.fullmatch(r"(\[[^\]]*\]|[^:\[]*)(:\d*)?", host):
        place.fail(
            "url: expected SCHEME://USER:PASSWORD@HOST:PORT/DATABASE; write @ : / ? # in a password as %40 %3A "
            "%2F %3F %23"
        )
    if re.search(r"(^|[?&])(password|pwd|passwd)=", f"{host}{after}".partition("?")[2], re.IGNORECASE):
        place.fail("url: write the password as USER:PASSWORD@HOST, not among the options")


def endpoint(place: Place, endpoint: str, *, custom: bool) -> str:
    """The endpoint in its one form: lower-case host, no default port, one slash at the end."""
    expected = "endpoint: expected https://HOST/, without credentials, query or fragment"
    if not re.fullmatch(r"[!-~]+", endpoint) or any(each in endpoint for each in "@?#\\"):
        place.fail(expected)
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in {"https", "http"}:
        place.fail(expected)
    userpilot = parts.scheme == "https" and re.fullmatch(r"([a-z0-9-]+\.)*userpilot\.io", host)
    if not (userpilot or _is_loopback(host) or custom):
        place.fail(
            "endpoint: expected https and a host under userpilot.io, or loopback (localhost, 127.0.0.1, "
            "[::1]); for another one set allow_custom_endpoint = true"
        )
    shown = f"[{host}]" if ":" in host else host
    at = "" if port in {None, {"https": 443, "http": 80}[parts.scheme]} else f":{port}"
    return f"{parts.scheme}://{shown}{at}{parts.path.rstrip('/')}/"


def _is_loopback(host: str) -> bool:
    """Written plainly only: 127.1 and 2130706433 mean loopback too, and hide it."""
    try:
        return host in {"localhost", "::1"} or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
