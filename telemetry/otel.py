"""Spans by OpenTelemetry. Imported only where traces are wanted."""

from __future__ import annotations

import threading

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from telemetry.tracing import METADATA_KEY, Span, Tracing, Value

CLOSE_S = 2.0

_PROPAGATOR = TraceContextTextMapPropagator()

_KINDS = {"client": SpanKind.CLIENT, "coordinator": SpanKind.SERVER}


def exporting_tracing(role: str, endpoint: str = "") -> Tracing:
    """Sends spans in batches, by a thread of its own, to an OTLP collector; ``http://`` is not encrypted."""
    # Not at exit: the role closes it, and waits no longer than it wants to.
    provider = TracerProvider(shutdown_on_exit=False, resource=Resource.create({SERVICE_NAME: f"outrider-{role}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
    return OtelTracing(provider, role)


class OtelTracing:
    """A `Tracing` over a provider, which it owns."""

    def __init__(self, provider: TracerProvider, role: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("outrider")
        self._kind = _KINDS.get(role, SpanKind.SERVER)

    def start(self, name: str, parent: str = "", **values: Value) -> Span:
        context = _PROPAGATOR.extract({METADATA_KEY: parent}) if parent else None
        return OtelSpan(self._tracer.start_span(name, context, kind=self._kind, attributes=values))

    def close(self) -> None:
        """Takes at most `CLOSE_S`: an exporter whose collector is gone would try for long."""
        closing = threading.Thread(target=self._provider.shutdown, name="close traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class OtelSpan:
    """A `telemetry.tracing.Span`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, Context()))
        self.context = carrier.get(METADATA_KEY, "")

    @property
    def is_recording(self) -> bool:
        return self._span.is_recording()

    def event(self, name: str, **values: Value) -> None:
        self._span.add_event(name, values)

    def set(self, **values: Value) -> None:
        self._span.set_attributes(values)

    def end(self, error: str = "") -> None:
        if not self._span.is_recording():
            return
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()
