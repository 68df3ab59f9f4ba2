"""A coordinator's process from bind to stop."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from coordinator.coordinator import Coordinator
from coordinator.grpc_clients import TokenizerCache, grpc_draft_client, grpc_target_client
from coordinator.servicer import GENERATION_SERVICE, GenerationServicer
from coordinator.settings import CoordinatorSettings
from protos import generation_pb2_grpc
from rpc.server import OnStatus, RpcServer, Status, serve_until_stopped, stop_on_signals


async def serve(settings: CoordinatorSettings, on_status: OnStatus, stop: asyncio.Event | None = None) -> None:
    """Serves until ``stop`` is set or SIGTERM or SIGINT arrives.

    The port is bound at once, health is NOT_SERVING until one target is up. Raises `rpc.errors.AddressInUse`, and
    `rpc.errors.ModelMismatch` if a worker that can be reached at the start does not fit.
    """
    stop = stop or asyncio.Event()
    server = RpcServer(settings.host, settings.port, [GENERATION_SERVICE])
    coordinator = _make_coordinator(settings)
    try:
        address = await server.open()
        await _start_unless_stopped(coordinator, stop, lambda detail: on_status(Status("loading", detail, address)))
        servicer = GenerationServicer(coordinator, settings.max_requests_per_stream)
        generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server.grpc_server)
        await serve_until_stopped(server, on_status, stop, settings.grace_s, _summary(coordinator, stop))
    finally:
        await coordinator.close()
        await server.stop(0)
