"""Userpilot's endpoints, which check each request and apply accepted ones to the state."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
from msgspec import UNSET, UnsetType

from audience_sync.sandbox.state import JOB_PATH, Entry, RefusedError, State

API_VERSION = "2020-09-22"
REASONS: dict[int, str] = {status.value: status.phrase for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body. `value` is its JSON, or a multipart upload's rows; `problem` says why it cannot be read."""

    value: Any = None
    problem: str | None = None
    filename: str | None = None  # of a multipart upload
    size: int = 0  # bytes, of the file alone in a multipart upload


def answer(state: State, entry: Entry, headers: Message, body: Body) -> tuple[int, Any]:
    """Apply a request; return the status and the body, None for an empty one."""
    try:
        return 200 if entry.method == "GET" else 202, _apply(state, entry, headers, body)
    except (RefusedError, msgspec.ValidationError) as refusal:
        status = getattr(refusal, "status", 400)
        return status, errors(status, str(refusal))


def _apply(state: State, entry: Entry, headers: Message, body: Body) -> Any:
    if headers.get("Authorization") != f"Token {state.api_key}":
        raise RefusedError(401, "the API key is missing or wrong")
    path = JOB_PATH if entry.path.startswith(JOB_PATH) else entry.path
    if (entry.method, path) not in _ENDPOINTS:
        raise RefusedError(404, f"no such endpoint: {entry.method} {entry.path}")
    lane, schema, act = _ENDPOINTS[entry.method, path]
    if lane in _VERSIONED and headers.get("X-API-Version") != API_VERSION:
        raise RefusedError(400, f"X-API-Version must be {API_VERSION}")
    if lane is not None:
        state.admit(lane, entry)
    share = state.limits.refused_percent
    if lane in {"identify", "track", "company"} and entry.number * share % 100 < share:
        raise RefusedError(400, f"refused on purpose, as {share:g}% of the requests are")
    return act(state, entry, body if schema is None else _convert(body, schema))


def errors(status: int, message: str) -> dict[str, list[dict[str, str]]]:
    error = REASONS.get(status, "Error").lower().replace(" ", "_")
    return {"errors": [{"details": message, "error": error, "error_code": str(status), "message": message}]}


def read_body(content_type: str, raw: bytes) -> Body:
    head = b"Content-Type: " + (content_type or "text/plain").encode("latin-1") + b"\r\n\r\n"
    content_type = _content_type(head)
    try:
        if content_type == "application/json":
            return Body(_parse(raw), size=len(raw))
        if content_type == "multipart/form-data":
            return _read_multipart(message_from_bytes(head + raw))
        problem = "Content-Type must be application/json"
    except (ValueError, RecursionError) as error:
        problem = f"the body cannot be read: {error}"
    return Body(raw[:1000].decode(errors="replace") if raw else None, problem, size=len(raw))


@lru_cache  # parsing takes as long as the rest of the request, and most requests have the same type
def _content_type(head: bytes) -> str:
    return message_from_bytes(head).get_content_type()


_NOT_EMPTY = msgspec.Meta(min_length=1)
_Id = Annotated[str, _NOT_EMPTY]
_Properties = dict[str, str | int | float | bool | None]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A schema that refuses unknown members, so that mistakes are seen; Userpilot may ignore them."""


class _Identify(_Strict):
    user_id: _Id
    metadata: _Properties = {}
    company: _Properties | UnsetType = UNSET


class _Track(_Strict):
    user_id: _Id
    event_name: _Id
    metadata: _Properties = {}


class _UserRow(_Strict):
    user_id: _Id
    metadata: _Properties = {}
    company_id: _Id | UnsetType = UNSET


class _Company(_Strict):
    company_id: _Id
    metadata: _Properties = {}


def _identify(state: State, entry: Entry, body: _Identify) -> None:
    company = None if body.company is UNSET else body.company
    if company is not None:
        msgspec.convert(company.get("id"), _Id)
    state.identify(entry.number, body.user_id, body.metadata, company)


def _bulk_identify(state: State, entry: Entry, body: Body) -> dict[str, Any]:
    limits = state.limits
    if body.size > limits.bulk_bytes_per_request:
        raise RefusedError(413, f"{body.size} bytes; at most {limits.bulk_bytes_per_request} are allowed")
    rows = body.value if body.filename is not None else _users(_convert(body, dict[str, Any]))
    if isinstance(rows, list) and len(rows) > limits.bulk_rows_per_request:
        raise RefusedError(413, f"{len(rows)} rows; at most {limits.bulk_rows_per_request} are allowed")
    msgspec.convert(rows, Annotated[list[_UserRow], _NOT_EMPTY])
    return state.describe(state.start_job(entry.number, rows, body.filename, body.size))


def _delete_users(state: State, _: Entry, body: dict[str, Any]) -> None:
    state.delete_users(msgspec.convert(_users(body), Annotated[list[_Id], _NOT_EMPTY]))


def _job(state: State, entry: Entry, _: Body) -> dict[str, Any]:
    job = state.jobs.get(unquote(entry.path.removeprefix(JOB_PATH)))
    if job is None:
        raise RefusedError(404, "no such job")
    return state.describe(job, completed_rows=job.completed_rows)


_VERSIONED = {"identify", "track", "delete"}
# The lane, the schema of the body, and the function that applies it and returns the answer's body.
_ENDPOINTS: dict[tuple[str, str], tuple[str | None, Any, Callable[[State, Entry, Any], Any]]] = {
    ("POST", "/v1/identify"): ("identify", _Identify, _identify),
    ("POST", "/v1/track"): ("track", _Track,
        lambda state, entry, body: state.track(entry.number, body.user_id, body.event_name, body.metadata)),
    ("POST", "/v1/companies/identify"): ("company", _Company,
        lambda state, _, body: state.identify_company(body.company_id, body.metadata)),
    ("POST", "/v1/users/bulk_identify"): ("upload", None, _bulk_identify),
    ("GET", "/v1/background_jobs"): ("poll", None,
        lambda state, *_: [state.describe(job) for job in state.jobs.values()]),
    ("GET", JOB_PATH): ("poll", None, _job),
    ("DELETE", "/v1/users"): ("delete", dict[str, Any], _delete_users),
    ("GET", "/v1/validate"): (None, None, lambda *_: {}),
}  # fmt: skip


def _convert(body: Body, schema: Any) -> Any:
    if body.problem is not None or body.filename is not None:
        raise RefusedError(400, body.problem or "Content-Type must be application/json")
    return msgspec.convert(body.value, schema)


def _users(body: dict[str, Any]) -> Any:
    if body.keys() != {"users"}:
        raise RefusedError(400, "the body must contain users and nothing else")
    return body["users"]


def _parse(raw: bytes) -> Any:
    return json.loads(raw, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_multipart(message: Message) -> Body:
    if message.defects or not message.is_multipart():
        raise ValueError("the multipart body is not closed by its boundary")
    for part in message.walk():
        if part.get_param("name", header="content-disposition") == "file":
            content: Any = part.get_payload(decode=True)
            rows = [_parse(line) for line in content.splitlines() if line.strip()]
            return Body(rows, filename=part.get_filename() or "file", size=len(content))
    raise ValueError("the multipart body has no part named file")
