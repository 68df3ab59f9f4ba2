"""The public gRPC service, thin over `Coordinator`: translate, iterate, translate."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

import grpc

from coordinator.coordinator import Coordinator
from coordinator.many import ManyRequests
from coordinator.wire import deployment_to_proto, event_to_proto, request_from_proto
from protos import generation_pb2, generation_pb2_grpc
from rpc.errors import OutriderError, abort_with
from telemetry.tracing import METADATA_KEY, set_caller

GENERATION_SERVICE = "outrider.v1.Generation"

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """Serves one coordinator."""

    def __init__(self, coordinator: Coordinator, max_requests_per_stream: int) -> None:
        self._coordinator = coordinator
        self._max_requests_per_stream = max_requests_per_stream

    async def Generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateEvent],
    ) -> AsyncIterator[generation_pb2.GenerateEvent]:
        try:
            set_caller(_traceparent(context))
            async with aclosing(self._coordinator.generate(request_from_proto(request))) as events:
                async for event in events:
                    yield event_to_proto(event)
        except OutriderError as error:
            await abort_with(context, error)

    async def GenerateMany(
        self,
        request_iterator: AsyncIterable[generation_pb2.GenerateManyRequest],
        context: grpc.aio.ServicerContext[generation_pb2.GenerateManyRequest, generation_pb2.GenerateManyEvent],
    ) -> AsyncIterator[generation_pb2.GenerateManyEvent]:
        set_caller(_traceparent(context))
        requests = ManyRequests(self._coordinator, self._max_requests_per_stream)
        async with aclosing(requests.run(request_iterator)) as events:
            async for event in events:
                yield event

    async def GetModel(
        self,
        request: generation_pb2.GetServedModelRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GetServedModelRequest, generation_pb2.ServedModel],
    ) -> generation_pb2.ServedModel:
        try:
            return deployment_to_proto(self._coordinator.deployment())
        except OutriderError as error:
            await abort_with(context, error)


def _traceparent(context: grpc.aio.ServicerContext[RequestT, ResponseT]) -> str | bytes | None:
    """What the client sent as such."""
    return next((value for key, value in context.invocation_metadata() or () if key == METADATA_KEY), None)
