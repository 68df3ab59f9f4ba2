"""Spans, as the rest of the code sees them. Without OpenTelemetry they cost a method call that does nothing.

A context travels as the W3C ``traceparent`` string: in gRPC metadata between client and coordinator, in the ``Open``
messages between coordinator and workers, whose one stream carries the sessions of many requests.
"""

from __future__ import annotations

import logging
import os
import re
from contextvars import ContextVar
from typing import Protocol, TypeAlias

METADATA_KEY = "traceparent"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Value: TypeAlias = str | int | float | bool

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_caller: ContextVar[str] = ContextVar("caller", default="")

_log = logging.getLogger(__name__)


class TracingUnavailable(Exception):
    """Traces were asked for, and OpenTelemetry is not installed."""


class Span(Protocol):
    """One piece of work, from `Tracing.start` to `end`."""

    @property
    def context(self) -> str:
        """What a child names as its parent; empty: the work is not traced."""
        ...

    @property
    def is_recording(self) -> bool:
        """False: events and attributes go nowhere, so there is no need to make them."""
        ...

    def event(self, name: str, **values: Value) -> None: ...

    def set(self, **values: Value) -> None:
        """Attributes of the span."""
        ...

    def end(self, error: str = "") -> None:
        """Ends the span, as failed if ``error`` says why. Idempotent."""
        ...


class Tracing(Protocol):
    """Makes spans."""

    def start(self, name: str, parent: str = "", **values: Value) -> Span:
        """``parent`` is a traceparent; empty: the caller's own current span, or none. One that is none is ignored."""
        ...

    def close(self) -> None:
        """Sends what has not been sent."""
        ...


class _NoSpan:
    """Records nothing, and hands its parent's context on: a role without traces does not cut them in two."""

    __slots__ = ("context",)
    is_recording = False

    def __init__(self, context: str) -> None:
        self.context = context

    def event(self, name: str, **values: Value) -> None: ...

    def set(self, **values: Value) -> None: ...

    def end(self, error: str = "") -> None: ...


class _NoTracing:
    def start(self, name: str, parent: str = "", **values: Value) -> Span:
        return _NoSpan(parent) if parent else NO_SPAN

    def close(self) -> None: ...


NO_SPAN: Span = _NoSpan("")
NO_TRACING: Tracing = _NoTracing()


def set_caller(traceparent: str | bytes | None) -> None:
    """What the client of this call, whatever door it came through, sent as its context; anything but one is ignored.

    Holds for the present task and those that it starts.
    """
    is_context = isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent)
    _caller.set(str(traceparent) if is_context else "")


def caller_context() -> str:
    """The client's context; empty if it has none."""
    return _caller.get()


def make_tracing(role: str, endpoint: str = "") -> Tracing:
    """Traces to ``endpoint``, or to where OpenTelemetry's own variables say; otherwise none.

    Raises `TracingUnavailable` if ``endpoint`` is given and OpenTelemetry is not installed. A variable may be meant for
    other programs, so then it is only a warning.
    """
    if not endpoint and not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return NO_TRACING
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return NO_TRACING
    try:
        from telemetry.otel import exporting_tracing
    except ModuleNotFoundError as error:
        problem = f"traces need {error.name}: pip install 'outrider[trace]'"
        if endpoint:
            raise TracingUnavailable(problem) from error
        _log.warning("%s is set, but %s", ENDPOINT_VARIABLES[-1], problem)
        return NO_TRACING
    return exporting_tracing(role, endpoint)
