"""Spans reach an OTLP collector, and one that is not there holds nobody up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from telemetry.otel import CLOSE_S
from telemetry.tracing import make_tracing


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Remembers the names of spans by service."""

    def __init__(self) -> None:
        self.address = ""
        self.names: dict[str, list[str]] = {}

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            spans = [span.name for scope in resource.scope_spans for span in scope.spans]
            self.names.setdefault(service, []).extend(spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collector
    await server.stop(0)


@pytest.mark.parametrize("by_variable", [False, True])
async def test_spans_arrive_when_the_role_closes(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    if by_variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
    tracing = make_tracing("coordinator", "" if by_variable else collector.address)
    span = tracing.start("generate")
    tracing.start("never ended", span.context)
    span.end()

    await asyncio.to_thread(tracing.close)

    assert collector.names == {"outrider-coordinator": ["generate"]}


async def test_a_collector_that_is_not_there_delays_the_end_by_little() -> None:
    tracing = make_tracing("coordinator", "http://127.0.0.1:9")
    tracing.start("generate").end()

    start_s = time.monotonic()
    await asyncio.to_thread(tracing.close)

    assert time.monotonic() - start_s < CLOSE_S + 1
