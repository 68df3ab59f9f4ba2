"""A coordinator's process from bind to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from coordinator.coordinator import Coordinator
from coordinator.delay import DelayedClient
from coordinator.grpc_clients import TokenizerCache, grpc_draft_client, grpc_target_client
from coordinator.http.app import make_app
from coordinator.http.server import HttpServer
from coordinator.servicer import GENERATION_SERVICE, GenerationServicer
from coordinator.settings import CoordinatorSettings
from coordinator.traffic import Traffic
from protos import generation_pb2_grpc
from rpc.metrics_endpoint import metrics_endpoint
from rpc.server import OnStatus, RpcServer, Status, serve_until_stopped, settle, stop_on_signals
from telemetry.tracing import Tracing, make_tracing


async def serve(settings: CoordinatorSettings, on_status: OnStatus, stop: asyncio.Event | None = None) -> None:
    """Serves until ``stop`` is set or SIGTERM or SIGINT arrives.

    The port is bound at once, health is NOT_SERVING until one target is up. Raises `rpc.errors.AddressInUse`, and
    `rpc.errors.ModelMismatch` if a worker that can be reached at the start does not fit.
    """
    stop = stop or asyncio.Event()
    server = RpcServer(settings.host, settings.port, [GENERATION_SERVICE])
    tracing = make_tracing("coordinator", settings.otlp_endpoint)
    coordinator = _make_coordinator(settings, tracing)
    try:
        await server.open()
        registry = coordinator.metrics.registry
        async with (
            metrics_endpoint(registry, settings.host, settings.metrics_port, on_status, server.address),
            _serving_http(coordinator, settings, stop) as http_address,
        ):
            if await _start_unless_stopped(coordinator, server, on_status, stop):
                servicer = GenerationServicer(coordinator, settings.max_requests_per_stream)
                generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server.grpc_server)
                with_http = _with_http_address(on_status, http_address)
                settle()
                await serve_until_stopped(server, with_http, stop, settings.grace_s, _summary(coordinator))
    finally:
        await coordinator.close()
        await server.stop(0)
        await asyncio.to_thread(tracing.close)


@contextlib.asynccontextmanager
async def _serving_http(
    coordinator: Coordinator, settings: CoordinatorSettings, stop: asyncio.Event
) -> AsyncIterator[str | None]:
    """The HTTP server, if one is wanted, drained from when ``stop`` is set; its address."""
    if settings.http_port is None:
        yield None
        return
    app = make_app(coordinator, settings)
    http = HttpServer(app, settings.host, settings.http_port, settings.grace_s, coordinator.end_requests)
    address = await http.open()
    draining = asyncio.create_task(_drain_when(stop, http))
    try:
        yield address
        await draining
    finally:
        draining.cancel()
        await http.stop()


async def _drain_when(stop: asyncio.Event, http: HttpServer) -> None:
    await stop.wait()
    await http.drain()


def _with_http_address(on_status: OnStatus, http_address: str | None) -> OnStatus:
    def tell(status: Status) -> None:
        on_status(dataclasses.replace(status, http_address=http_address))

    return tell


def _make_coordinator(settings: CoordinatorSettings, tracing: Tracing) -> Coordinator:
    tokenizers: TokenizerCache = {}
    traffic, timeout_s = Traffic(), settings.connect_timeout_s
    targets = [grpc_target_client(address, timeout_s, tokenizers, traffic.target) for address in settings.targets]
    drafts = [grpc_draft_client(address, timeout_s, tokenizers, traffic.draft) for address in settings.drafts]
    if settings.draft_latency_ms:
        drafts = [DelayedClient(client, settings.draft_latency_ms / 1000) for client in drafts]
    return Coordinator(settings, targets, drafts, traffic, tracing=tracing)


async def _start_unless_stopped(
    coordinator: Coordinator, server: RpcServer, on_status: OnStatus, stop: asyncio.Event
) -> bool:
    start = asyncio.create_task(coordinator.start(lambda detail: on_status(Status("loading", detail, server.address))))
    stopped = asyncio.create_task(stop.wait())
    try:
        with stop_on_signals(stop):
            await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
            return True
        on_status(Status("stopped", "before any target worker was up", server.address))
        return False
    finally:
        start.cancel()
        stopped.cancel()


def _summary(coordinator: Coordinator) -> str:
    deployment = coordinator.deployment()
    drafts = ", ".join(deployment.draft_models) or "no draft model yet"
    return f"{deployment.model.name} with {drafts}; {deployment.num_targets} target, {deployment.num_drafters} draft"
