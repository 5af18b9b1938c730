"""Access to the dashboard: who sends a request, from where, and what that person may do.

Without configured users, only browsers on this machine may read it, and nobody may act: the request must have this
machine as its host, and must not come through a proxy. With users, everything except signing in needs a session.
"""

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from audience_sync import remote
from audience_sync.settings.schema import WebSettings

HOW_TO_ADD_USERS = "[[web.users]]: `audience-sync password` makes the hash of a password"
NO_USERS = f"Nobody can sign in, because no users are configured. To add some, configure {HOW_TO_ADD_USERS}."
_READING = {"GET", "HEAD"}


@dataclass(frozen=True, slots=True)
class Viewer:
    """The person who sends a request: signed in with a role, not signed in, or, without configured users, local."""

    name: str | None = None
    role: str = "read"
    csrf: str = ""

    @property
    def may_read(self) -> bool:
        return self.role in {"read", "operate"}

    @property
    def may_operate(self) -> bool:
        return self.role == "operate"


STRANGER = Viewer(role="none")


def refusal(request: Request, *, has_users: bool) -> str | None:
    """Return why a request is refused, independent of its sender; None if it is not."""
    if not has_users:
        if not remote.is_loopback(remote.host_name(request.headers)):
            return (
                "Without users, only this machine can open the dashboard: use http://127.0.0.1 or "
                f"http://localhost, or configure {HOW_TO_ADD_USERS}."
            )
        if remote.came_through_proxy(request.scope):
            return (
                f"Without users, the dashboard refuses requests from a proxy. Configure {HOW_TO_ADD_USERS}."
            )
    if request.method in _READING and _is_cross_site(request):
        return "The request was sent by another site. Enter the dashboard's address in the browser."
    return None


def form_refusal(request: Request, viewer: Viewer | None, csrf: str = "") -> str | None:
    """Return why a form is refused; None if it is from one of our pages, with the token of the person's session, if any."""
    source = _origin(request.headers.get("Origin", request.headers.get("Referer", "")))
    if _comes_from_other_site(request) or source is None or source != own_origin(request):
        return (
            "The form was not sent by a page of this dashboard. If the dashboard is behind a proxy, add the proxy's "
            "address to [web] trusted_proxies, and have the proxy set X-Forwarded-Proto and X-Forwarded-Host."
        )
    if viewer and not (
        viewer.csrf and hmac.compare_digest(viewer.csrf.encode(), csrf.encode(errors="replace"))
    ):
        return "The form belongs to another session: open the page again."
    return None


def is_cross_site_visit(request: Request) -> bool:
    """Return whether another site leads to a page in a browser window, not in a frame or for a script."""
    headers = request.headers
    mode, target = headers.get("Sec-Fetch-Mode", "navigate"), headers.get("Sec-Fetch-Dest", "document")
    is_visit = request.method in _READING and (mode, target) == ("navigate", "document")
    return is_visit and _comes_from_other_site(request)


def _comes_from_other_site(request: Request) -> bool:
    """Return whether another site caused the request. Browsers then leave the session's cookie out."""
    return request.headers.get("Sec-Fetch-Site") in {"cross-site", "same-site"}


def own_origin(request: Request) -> str | None:
    return _origin(f"{request.scope['scheme']}://{request.headers.get('Host', '')}")


def local_path(text: str | None) -> str:
    """Return the path to open after a form: the text if it is one of our paths, else the overview."""
    if text is None or not text.isprintable() or "\\" in text or len(text) > 2_000:
        return "/"
    return text if text.startswith("/") and not text.startswith("//") else "/"


def _is_cross_site(request: Request) -> bool:
    is_page = is_cross_site_visit(request) and not request.url.path.startswith("/static/")
    if _comes_from_other_site(request) and not is_page:
        return True
    given = request.headers.get("Origin")
    return given is not None and (_origin(given) is None or _origin(given) != own_origin(request))


def _origin(url: str) -> str | None:
    """Return the scheme, host and port of an address; None if it has none."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    is_complete = parts.hostname and port and "@" not in parts.netloc
    return f"{parts.scheme}://{parts.hostname}:{port}" if is_complete else None


class TrustedProxies:
    """Takes the browser's address, scheme and host from the headers of proxies in the configuration."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self._app = app
        self._networks = settings.proxy_networks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._trusts(_peer(scope)):
            scope = {**scope, "client": (self._browser(scope), 0)}
            headers = MutableHeaders(scope=scope)  # a copy, in this scope only
            proto, host = (_last(headers, f"X-Forwarded-{name}") for name in ("Proto", "Host"))
            if proto in {"http", "https"}:
                scope["scheme"] = proto
            if host:
                headers["Host"] = host
        await self._app(scope, receive, send)

    def _browser(self, scope: Scope) -> str:
        """Return the last address that does not belong to a trusted proxy. Addresses before it may be forged."""
        address = _peer(scope)
        passed = ",".join(Headers(scope=scope).getlist("X-Forwarded-For")).split(",")
        for text in reversed(passed):
            if not self._trusts(address):
                break
            try:
                address = str(ipaddress.ip_address(text.strip()))
            except ValueError:
                break
        return address

    def _trusts(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip in network for network in self._networks)


def _peer(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


def _last(headers: Headers, name: str) -> str:
    return ",".join(headers.getlist(name)).rpartition(",")[2].strip().lower()
