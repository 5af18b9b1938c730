"""The origin of an HTTP request: this machine, another machine, or a proxy."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

_PROXY_HEADERS = ("forwarded", "via", "x-real-ip")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(headers: Headers) -> str:
    """Return the host in the Host header; starlette would return our own address if it is invalid."""
    try:
        return urlsplit(f"//{headers.get('Host', '')}").hostname or ""
    except ValueError:
        return ""


def came_through_proxy(scope: Scope) -> bool:
    """Return whether the request came through a proxy: its headers say so, or it is HTTP/1.0, the default of nginx."""
    return scope.get("http_version") == "1.0" or any(
        name in _PROXY_HEADERS or name.startswith("x-forwarded-") for name in Headers(scope=scope)
    )


def is_local(scope: Scope) -> bool:
    """Return whether a program on this machine sent the request, to this machine and without a proxy."""
    return is_loopback(host_name(Headers(scope=scope))) and not came_through_proxy(scope)
