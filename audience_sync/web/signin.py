"""Signing in and out: the form, the cookie, and the limits on guessing."""

import contextlib
import ipaddress
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from audience_sync import logs
from audience_sync.app import App
from audience_sync.clock import Clock
from audience_sync.db import engines
from audience_sync.errors import DatabaseError
from audience_sync.settings.passwords import is_password
from audience_sync.settings.schema import WebUser
from audience_sync.web import sessions
from audience_sync.web.access import NO_USERS, STRANGER, Viewer, form_refusal, is_cross_site_visit, local_path
from audience_sync.web.render import link
from audience_sync.web.view import Forbidden, NotFound, View, here, html

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 10  # failed attempts at once, for a name and from an address
ATTEMPT_SECONDS = 60.0  # then one more is allowed after each of these spans
MAX_REMEMBERED = 10_000  # names and addresses
WAIT_SECONDS = 10.0  # the longest wait for a lock of the database
RECORD_SECONDS = 0.2  # the same, to record that a session was used

Form = ImmutableMultiDict[str, str]
FormHandler = Callable[[App, Viewer, Request, Form], Response]


@dataclass(slots=True)
class Throttle:
    """Limits failed attempts to sign in, for each user name and from each address.

    Attempts for a name from an address where it has signed in before are counted separately, so that somebody who
    guesses from another address does not lock this user out.
    """

    clock: Clock
    _free_at: OrderedDict[str, float] = field(default_factory=OrderedDict)
    # Names, each with an address from which it has signed in.
    _known: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str, address: str) -> float:
        """Count an attempt and return 0 if it is allowed, else the seconds to wait."""
        with self._lock:
            now = self.clock.monotonic()
            free_at = {key: max(now, self._free_at.get(key, now)) for key in self._keys(name, address)}
            wait = max(free_at.values()) - now - (MAX_ATTEMPTS - 1) * ATTEMPT_SECONDS
            if wait > 0:
                return wait
            for key, at in free_at.items():
                _remember(self._free_at, key, at + ATTEMPT_SECONDS)
            return 0.0

    def succeeded(self, name: str, address: str) -> None:
        """Uncount an attempt that succeeded."""
        with self._lock:
            for key in self._keys(name, address):
                if key in self._free_at:
                    self._free_at[key] -= ATTEMPT_SECONDS
            _remember(self._known, _pair(name, address), None)

    def _keys(self, name: str, address: str) -> list[str]:
        pair = _pair(name, address)
        return [pair] if pair in self._known else [f"user {name[:200]}", f"address {_network(address)}"]


def _remember(memory: OrderedDict[str, Any], key: str, value: float | None) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)


def _pair(name: str, address: str) -> str:
    return f"user {name[:200]} at {_network(address)}"


def _network(address: str) -> str:
    """Return the address, or its network if a single household or server usually has all of it."""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(address)
        if ip.version == 6:
            return str(ipaddress.ip_network((ip, 64), strict=False))
    return address


def ask_to_sign_in(app: App, request: Request) -> Response:
    if is_cross_site_visit(request):
        # Our page asks again, and the browser then sends the session's cookie.
        return html("visit.html", request, STRANGER, app.clock.now(), path=local_path(here(request)))
    return RedirectResponse(link("/login", next=here(request)), 303)


def sign_in_page(view: View) -> Response:
    if view.viewer.may_read:
        if view.viewer.name is None:
            raise NotFound(NO_USERS)
        return RedirectResponse(local_path(view.text("next")), 303)
    return view.html("login.html", next=local_path(view.text("next")), name="", problem=None)


def sign_in(
    users: Mapping[str, WebUser], throttle: Throttle, app: App, _viewer: Viewer, request: Request, form: Form
) -> Response:
    """Begin a session for a name and its password. A wrong name takes as long as a wrong password."""
    if not users:
        raise Forbidden(NO_USERS)
    if refusal := form_refusal(request, None):
        raise Forbidden(refusal)
    name, address = form.get("name", "").strip(), client_address(request)
    if wait := throttle.take(name, address):
        logs.event(log, logging.WARNING, "sign-in refused", address=address, reason="too many attempts")
        answer = _again(app, request, form, f"Too many attempts failed. Try again in {_duration(wait)}.", 429)
        answer.headers["Retry-After"] = str(int(wait) + 1)
        return answer
    user = users.get(name)
    stored = (user or next(iter(users.values()))).password.require()
    if not is_password(form.get("password", ""), stored) or user is None:
        logs.event(log, logging.WARNING, "sign-in refused", address=address, reason="wrong name or password")
        return _again(app, request, form, "The name or the password is wrong.", 403)
    throttle.succeeded(name, address)
    with engines.write(app.engine, WAIT_SECONDS) as connection:
        sessions.end_session(connection, _token(request))
        token = sessions.start_session(connection, user, app.clock.now())
    logs.event(log, logging.INFO, "signed in", user=name, address=address)
    answer = RedirectResponse(local_path(form.get("next")), 303)
    answer.set_cookie(value=token, max_age=int(sessions.LIFE.total_seconds()), **_cookie(request))
    return answer


def sign_out(app: App, viewer: Viewer, request: Request, form: Form) -> Response:
    if refusal := form_refusal(request, viewer, form.get("csrf", "")):
        raise Forbidden(refusal)
    with engines.write(app.engine, WAIT_SECONDS) as connection:
        sessions.end_session(connection, _token(request))
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(**_cookie(request))
    return answer


def viewer(app: App, users: Mapping[str, WebUser], request: Request) -> tuple[Viewer, bool]:
    """Return the person who sends the request, and whether to record this use of the session."""
    if not users:
        return Viewer(), False
    token, now, session = _token(request), app.clock.now(), None
    if token:
        with engines.read(app.engine, WAIT_SECONDS) as connection:
            session = sessions.find_session(connection, token, users, now)
    if session is None:
        return STRANGER, False
    user, last_seen_at = session
    is_by_person = "HX-Request" not in request.headers  # else an open page refreshes itself
    is_due = is_by_person and now - last_seen_at >= sessions.SEEN_EVERY
    return Viewer(user.name, user.role, sessions.csrf_token(token)), is_due


def record_use(app: App, request: Request) -> None:
    """Record that a session is used, unless the database is busy."""
    with contextlib.suppress(DatabaseError), engines.write(app.engine, RECORD_SECONDS) as connection:
        sessions.set_last_seen(connection, _token(request), app.clock.now())


def client_address(request: Request) -> str:
    return request.client.host if request.client else ""


def _again(app: App, request: Request, form: Form, problem: str, status: int) -> Response:
    values: dict[str, Any] = {"next": local_path(form.get("next")), "name": form.get("name", "")[:100]}
    now = app.clock.now()
    return html("login.html", request, STRANGER, now, status_code=status, problem=problem, **values)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds) + 1, 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _token(request: Request) -> str:
    return request.cookies.get(_cookie(request)["key"], "")


def _cookie(request: Request) -> dict[str, Any]:
    is_https = request.scope["scheme"] == "https"
    name = "__Host-audience_sync" if is_https else "audience_sync"
    return {"key": name, "path": "/", "secure": is_https, "httponly": True, "samesite": "strict"}
