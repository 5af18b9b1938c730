"""Userpilot's endpoints: what is refused, with which status, and what an accepted request does."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import unquote

from audience_sync.sandbox.state import Entry, RefusalError, State, job_fields

API_VERSION = "2020-09-22"


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body as far as it could be read. `value` of a multipart upload is the list of its rows."""

    value: Any = None
    problem: str | None = None
    filename: str | None = None  # of a multipart upload
    size: int = 0  # bytes, of the file alone in a multipart upload


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Message
    body: Body

    def text(self, name: str) -> str | None:
        value = self.body.value.get(name) if isinstance(self.body.value, dict) else None
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Any = None  # None: no body at all


def answer(state: State, request: Request, entry: Entry) -> Answer:
    if request.headers.get("Authorization") != f"Token {state.api_key}":
        return Answer(401, errors(401, "the API key is missing or wrong"))
    try:
        return _endpoint(request)(state, request, entry)
    except RefusalError as refusal:
        return Answer(refusal.status, errors(refusal.status, str(refusal)))


def errors(status: int, message: str) -> dict[str, list[dict[str, str]]]:
    return {
        "errors": [
            {
                "details": message,
                "error": _ERRORS.get(status, "error"),
                "error_code": str(status),
                "message": message,
            }
        ]
    }


def read_body(content_type: str, raw: bytes) -> Body:
    header = Message()
    header["Content-Type"] = content_type
    try:
        if header.get_content_type() == "application/json" and content_type:
            return Body(_parse(raw), size=len(raw))
        if header.get_content_type() == "multipart/form-data":
            return _read_multipart(raw, str(header.get_param("boundary", "")).encode())
    except (ValueError, RecursionError) as error:
        return Body(raw[:1000].decode(errors="replace"), f"the body cannot be read: {error}", size=len(raw))
    text = raw[:1000].decode(errors="replace") if raw else None
    return Body(text, "Content-Type must be application/json", size=len(raw))


def _identify(state: State, request: Request, entry: Entry) -> Answer:
    _need_version(request)
    state.admit("identify", entry)
    body = _json(request, {"user_id", "metadata", "company"})
    user_id = _id(body, "user_id")
    company = body.get("company")
    if "company" in body:
        company = _primitives(body, "company")
        _id(company, "id")
    state.identify(entry.number, user_id, _primitives(body, "metadata"), company)
    return Answer(202)


def _track(state: State, request: Request, entry: Entry) -> Answer:
    _need_version(request)
    state.admit("track", entry)
    body = _json(request, {"user_id", "event_name", "metadata"})
    user_id, event_name = _id(body, "user_id"), _id(body, "event_name")
    state.track(entry.number, user_id, event_name, _primitives(body, "metadata"))
    return Answer(202)


def _identify_company(state: State, request: Request, entry: Entry) -> Answer:
    state.admit("company", entry)
    body = _json(request, {"company_id", "metadata"})
    state.identify_company(_id(body, "company_id"), _primitives(body, "metadata"))
    return Answer(202)


def _bulk(kind: str, members: set[str]) -> Callable[[State, Request, Entry], Answer]:
    key = "user_id" if kind == "users" else "company_id"

    def endpoint(state: State, request: Request, entry: Entry) -> Answer:
        limits, body = state.limits, request.body
        if body.size > limits.bulk_bytes_per_request:
            raise RefusalError(413, f"{body.size} bytes; {limits.bulk_bytes_per_request} are the most")
        rows = body.value if body.filename is not None else _json(request, {kind}).get(kind)
        if body.problem is not None or not isinstance(rows, list) or not rows:
            raise RefusalError(400, body.problem or f"{kind} must be a list of rows")
        if len(rows) > limits.bulk_rows_per_request:
            raise RefusalError(413, f"{len(rows)} rows; {limits.bulk_rows_per_request} are the most")
        for position, row in enumerate(rows, 1):
            try:
                _only(row, members)
                _id(row, key)
                if "company_id" in row:
                    _id(row, "company_id")
                _primitives(row, "metadata")
            except RefusalError as refusal:
                raise RefusalError(400, f"row {position}: {refusal}") from None
        return Answer(202, job_fields(state.start_job(entry.number, kind, rows, body.filename, body.size)))

    return endpoint


def _delete(kind: str) -> Callable[[State, Request, Entry], Answer]:
    def endpoint(state: State, request: Request, entry: Entry) -> Answer:
        _need_version(request)
        state.admit("delete", entry)
        ids = _json(request, {kind}).get(kind)
        if not isinstance(ids, list) or not ids or not all(isinstance(item, str) and item for item in ids):
            raise RefusalError(400, f"{kind} must be a list of ids")
        state.delete(kind, ids)
        return Answer(202)

    return endpoint


def _jobs(state: State, _request: Request, _entry: Entry) -> Answer:
    with state.lock:
        state.advance()
        return Answer(200, [job_fields(job) for job in state.jobs.values()])


def _job(state: State, request: Request, _entry: Entry) -> Answer:
    with state.lock:
        state.advance()
        job = state.jobs.get(unquote(request.path.removeprefix(_JOB_PATH)))
        if job is None:
            raise RefusalError(404, "no such job")
        return Answer(200, job_fields(job) | {"completed_rows": job.completed_rows})


def _validate(_state: State, _request: Request, _entry: Entry) -> Answer:
    return Answer(200, {})


_JOB_PATH = "/v1/background_jobs/"
_ENDPOINTS: dict[tuple[str, str], Callable[[State, Request, Entry], Answer]] = {
    ("POST", "/v1/identify"): _identify,
    ("POST", "/v1/track"): _track,
    ("POST", "/v1/companies/identify"): _identify_company,
    ("POST", "/v1/users/bulk_identify"): _bulk("users", {"user_id", "company_id", "metadata"}),
    ("POST", "/v1/companies/bulk_identify"): _bulk("companies", {"company_id", "metadata"}),
    ("GET", "/v1/background_jobs"): _jobs,
    ("GET", _JOB_PATH): _job,
    ("DELETE", "/v1/users"): _delete("users"),
    ("DELETE", "/v1/companies"): _delete("companies"),
    ("GET", "/v1/validate"): _validate,
}
_ERRORS = {400: "bad_request", 401: "unauthorized", 404: "not_found", 409: "conflict", 411: "length_required"}
_ERRORS |= {413: "payload_too_large", 429: "too_many_requests"}


def _endpoint(request: Request) -> Callable[[State, Request, Entry], Answer]:
    path = _JOB_PATH if request.path.startswith(_JOB_PATH) else request.path
    try:
        return _ENDPOINTS[request.method, path]
    except KeyError:
        raise RefusalError(404, f"no such endpoint: {request.method} {request.path}") from None


def _need_version(request: Request) -> None:
    if request.headers.get("X-API-Version") != API_VERSION:
        raise RefusalError(400, f"X-API-Version must be {API_VERSION}")


def _json(request: Request, members: set[str]) -> dict[str, Any]:
    body = request.body
    if body.filename is not None:
        raise RefusalError(400, "Content-Type must be application/json")
    if body.problem is not None:
        raise RefusalError(400, body.problem)
    return _only(body.value, members)


def _only(value: Any, members: set[str]) -> dict[str, Any]:
    """Userpilot may well ignore an unknown member; here it is a mistake that should be seen."""
    if not isinstance(value, dict):
        raise RefusalError(400, "a JSON object is needed")
    if value.keys() - members:
        raise RefusalError(400, f"unknown members: {', '.join(sorted(value.keys() - members))}")
    return value


def _id(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise RefusalError(400, f"{name} must be a non-empty string")
    return value


def _primitives(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise RefusalError(400, f"{name} must be an object")
    for member, item in value.items():
        if isinstance(item, dict | list):
            raise RefusalError(400, f"{name}.{member} must be a string, a number, a boolean or null")
    return value


def _parse(raw: bytes) -> Any:
    return json.loads(raw, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_multipart(raw: bytes, boundary: bytes) -> Body:
    parts = (b"\r\n" + raw).split(b"\r\n--" + boundary)
    if not boundary or not parts[-1].startswith(b"--"):
        raise ValueError("the multipart body is not closed by its boundary")
    for part in parts[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        header = Message()
        for line in head.decode().strip().split("\r\n"):
            name, _, value = line.partition(":")
            header[name] = value.strip()
        if header.get_param("name", header="content-disposition") == "file":
            rows = [_parse(line) for line in content.splitlines() if line.strip()]
            return Body(rows, filename=header.get_filename() or "file", size=len(content))
    raise ValueError("the multipart body has no part named file")
