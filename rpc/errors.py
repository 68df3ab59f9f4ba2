"""The exception tree of Outrider, and its way through gRPC.

Every error knows its gRPC status, its HTTP status and its ``ErrorInfo`` reason (domain ``outrider``), and its message
says what to do. Servers end a call with `abort_with`; clients get the same class back from `from_rpc_error`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

DOMAIN = "outrider"

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class OutriderError(Exception):
    """Root of all expected errors; on its own: a defect, whose message says what failed."""

    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def details(self) -> list[Message]:
        """``google.rpc`` details that travel with the status, besides ``ErrorInfo``."""
        return []


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the proto message, and what is wrong with its value, limit included."""

    field: str
    description: str


class InvalidRequest(OutriderError):
    """One or more fields of a request are bad; all of them are named."""

    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    reason = "INVALID_REQUEST"

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))
        self.violations = violations

    def details(self) -> list[Message]:
        violations = [BadRequest.FieldViolation(field=v.field, description=v.description) for v in self.violations]
        return [BadRequest(field_violations=violations)]


class ModelNotFound(OutriderError):
    """The request names a model that is not served here, or a path holds none."""

    grpc_code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    reason = "MODEL_NOT_FOUND"


class Overloaded(OutriderError):
    """No room now; try again after ``retry_after_s`` seconds."""

    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def details(self) -> list[Message]:
        delay = Duration()
        delay.FromNanoseconds(round(self.retry_after_s * 1e9))
        return [RetryInfo(retry_delay=delay)]


class Unavailable(OutriderError):
    """A worker or a server cannot be reached now."""

    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "UNAVAILABLE"


class ModelMismatch(OutriderError):
    """Two models cannot work together, for example because their vocabularies differ."""

    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    reason = "MODEL_MISMATCH"


class AddressInUse(OutriderError):
    """A server's address cannot be bound. The command line ends with exit code 2."""

    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 500
    reason = "ADDRESS_IN_USE"


class SessionFailed(OutriderError):
    """A worker gave up this one request; others go on."""

    reason = "SESSION_FAILED"


class SlowReader(OutriderError):
    """The client left so much unread that its request was ended."""

    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 408
    reason = "SLOW_READER"


class Cancelled(OutriderError):
    """The client took its request back, or the server is stopping."""

    grpc_code = grpc.StatusCode.CANCELLED
    http_status = 499
    reason = "CANCELLED"


def to_grpc_status(error: OutriderError) -> grpc.Status:
    """The rich status of an error: code, message, ``ErrorInfo`` and the error's own details."""
    code = Code.Value(error.grpc_code.name)
    status = Status(code=code, message=error.message)
    for detail in [ErrorInfo(reason=error.reason, domain=DOMAIN), *error.details()]:
        status.details.add().Pack(detail)
    result: grpc.Status = rpc_status.to_status(status)
    return result


async def abort_with(context: grpc.aio.ServicerContext[RequestT, ResponseT], error: OutriderError) -> NoReturn:
    """Ends the call with the error's rich status; raises, as ``context.abort`` does."""
    status = to_grpc_status(error)
    await context.abort(status.code, status.details or "", tuple(status.trailing_metadata or ()))


def from_rpc_error(error: grpc.aio.AioRpcError) -> OutriderError:
    """The error that the server meant; one by its status code if the server is not ours or never answered."""
    message = error.details() or error.code().name
    details = _rich_details(error)
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in details:
        _ = detail.Unpack(info) or detail.Unpack(bad_request) or detail.Unpack(retry)
    cls = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    cls = cls or _BY_CODE.get(error.code(), OutriderError)
    if cls is InvalidRequest:
        fields = [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        return InvalidRequest(*(fields or [FieldViolation("request", message)]))
    if cls is Overloaded:
        return Overloaded(message, retry.retry_delay.ToNanoseconds() / 1e9 or 1.0)
    return cls(message)


def _rich_details(error: grpc.aio.AioRpcError) -> Sequence[AnyMessage]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a status that contradicts itself is as good as none
        return ()
    return () if status is None else tuple(status.details)


_PLAIN = (OutriderError, ModelNotFound, Unavailable, ModelMismatch, AddressInUse, SessionFailed, SlowReader, Cancelled)
_BY_REASON: Mapping[str, type[OutriderError]] = {cls.reason: cls for cls in (*_PLAIN, InvalidRequest, Overloaded)}
_BY_CODE: Mapping[grpc.StatusCode, type[OutriderError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
    grpc.StatusCode.CANCELLED: Cancelled,
}
