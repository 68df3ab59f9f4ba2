"""Every failure as OpenAI's error body: ``{"error": {"message", "type", "param", "code"}}``.

The one place where errors become HTTP statuses. Official clients choose their exception by the status.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rpc.errors import Cancelled, FieldViolation, InvalidRequest, ModelNotFound, OutriderError, Overloaded, Unavailable

_log = logging.getLogger(__name__)

_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

MAX_SHOWN_CHARS = 60
"""Of the name of a field."""

RETRY_UNAVAILABLE_S = 1.0
"""What a 503 says to wait: workers come back by themselves, nobody knows when."""


class BadApiKey(OutriderError):
    """No API key, or one that is not known here."""

    http_status = 401
    reason = "INVALID_API_KEY"


class BodyTooLarge(OutriderError):
    """The request's body has more bytes than the server takes."""

    http_status = 413
    reason = "BODY_TOO_LARGE"


def invalid(field: str, problem: str) -> InvalidRequest:
    """One bad field."""
    return InvalidRequest(FieldViolation(field, problem))


def error_body(error: OutriderError) -> dict[str, object]:
    """The body that tells of ``error``, also as the last event of a stream."""
    return _body(error.message, status_of(error), _param_of(error), error.reason.lower())


def error_response(error: OutriderError) -> Response:
    return _respond(status_of(error), error_body(error), _retry_header(error))


def status_of(error: OutriderError) -> int:
    """``http_status``, except that a stopping server is unavailable: 499 would say that the client has gone."""
    return Unavailable.http_status if isinstance(error, Cancelled) else error.http_status


def defect(error: Exception) -> OutriderError:
    """A failure that nobody expected, logged with its traceback, for a client to read."""
    _log.error("the HTTP front door failed", exc_info=error)
    return OutriderError(f"the server failed at this request: {type(error).__name__}; its log says where")


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(OutriderError, _on_outrider_error)
    app.add_exception_handler(RequestValidationError, _on_bad_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)


async def _on_outrider_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OutriderError)
    return error_response(error)


async def _on_defect(request: Request, error: Exception) -> Response:
    return error_response(defect(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router and the body's parser say: no such path, no such method, no JSON."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _respond(error.status_code, _body(message, error.status_code), error.headers or {})


async def _on_bad_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(InvalidRequest(*_violations([_violation(one, error.body) for one in error.errors()])))


def _violations(found: Sequence[FieldViolation]) -> list[FieldViolation]:
    """One for each field. Where a field may be of several types, pydantic complains for each of them: those that got
    further into the value are about the type that was meant."""
    fields = dict.fromkeys(one.field for one in found)
    meant = [field for field in fields if not any(other.startswith(f"{field}.") for other in fields)]
    return [FieldViolation(field, _either(one.description for one in found if one.field == field)) for field in meant]


def _either(problems: Iterable[str]) -> str:
    """``input should be a valid string or a valid list``."""
    first, *others = dict.fromkeys(problems)
    return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])


def _violation(details: Mapping[str, Any], body: object) -> FieldViolation:
    """One complaint of pydantic's, by the field's path in the body."""
    kind, location = details["type"], details["loc"][1:]
    field = ".".join(_path(location, body, is_absent=kind in {"missing", "value_error"})) or "body"
    if kind == "extra_forbidden":
        return FieldViolation(field, "is not a field of this request; check its spelling or leave it out")
    if kind == "none_required":
        return FieldViolation(field, "is not supported by this server; leave it out")
    if kind == "json_invalid":
        return FieldViolation("body", f"is not JSON: {details.get('ctx', {}).get('error', 'unreadable')}")
    if kind in {"model_type", "model_attributes_type"}:
        if isinstance(details.get("input"), bytes):
            return FieldViolation("body", "is not read as JSON; send the header Content-Type: application/json")
        return FieldViolation(field, "input should be a valid object")
    message = str(details["msg"]).removeprefix("Value error, ")
    return FieldViolation(field, message[:1].lower() + message[1:])


def _path(location: Sequence[str | int], body: object, is_absent: bool) -> list[str]:
    """The keys and indices that lead through the body, without the names of the types that were tried on it.

    ``is_absent``: the last may be a key that is not there.
    """
    path: list[str] = []
    for depth, part in enumerate(location, 1):
        if isinstance(body, list) and isinstance(part, int):
            body = body[part]
        elif isinstance(body, dict) and part in body:
            body = body.get(part)
        elif not (is_absent and isinstance(body, dict) and depth == len(location)):
            continue
        path.append(str(part)[:MAX_SHOWN_CHARS])
    return path


def _param_of(error: OutriderError) -> str | None:
    if isinstance(error, InvalidRequest) and error.violations:
        return error.violations[0].field
    return "model" if isinstance(error, ModelNotFound) else None


def _retry_header(error: OutriderError) -> dict[str, str]:
    """Whole seconds, for clients read nothing finer."""
    if isinstance(error, Overloaded):
        return {"retry-after": str(math.ceil(error.retry_after_s))}
    if isinstance(error, Unavailable):
        return {"retry-after": str(math.ceil(RETRY_UNAVAILABLE_S))}
    return {"www-authenticate": "Bearer"} if isinstance(error, BadApiKey) else {}


def _body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, object]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _respond(status: int, body: object, headers: Mapping[str, str]) -> Response:
    # In ASCII: what a client sent may come back here, and need not be text that UTF-8 can say.
    return Response(json.dumps(body), status, dict(headers), media_type="application/json")
