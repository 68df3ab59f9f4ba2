"""A deployment in one process, sockets and engines included: what a client talks to is what runs in production."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from coordinator.coordinator import Coordinator
from coordinator.grpc_clients import grpc_draft_client, grpc_target_client
from coordinator.servicer import GENERATION_SERVICE, GenerationServicer
from coordinator.settings import CoordinatorSettings
from draft_worker.engine import DraftEngine
from inference import ModelThread, PagedRuntime, load_tokenizer_json
from protos import draft_pb2_grpc, generation_pb2_grpc, target_pb2_grpc
from rpc.draft_codec import DraftFrame
from rpc.engine_host import EngineHost
from rpc.server import RpcServer
from rpc.worker_process import describe_model
from rpc.worker_servicer import DRAFT_SERVICE, TARGET_SERVICE, DraftWorkerServicer, TargetWorkerServicer
from speculation.messages import DraftCommand, TargetCommand, TargetFrame
from target_worker.engine import VerifyEngine
from telemetry.tracing import NO_TRACING, Tracing
from tests.doubles.tiny_models import VOCAB_SIZE

MakeTracing = Callable[[str], Tracing]


@dataclass(frozen=True)
class Facts:
    """What the tiny target says about itself."""

    name: str = "tiny"
    vocab_size: int = VOCAB_SIZE
    max_context: int = 256
    eos_token_ids: tuple[int, ...] = (0,)
    num_parameters: int = 1
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Deployment:
    """Where clients reach it, and its coordinator."""

    address: str
    coordinator: Coordinator


@asynccontextmanager
async def deployment(
    make_runtime: Callable[..., PagedRuntime],
    model_folders: dict[str, object],
    tracing_of: MakeTracing = lambda role: NO_TRACING,
    **settings: object,
) -> AsyncIterator[Deployment]:
    """A target and a drafter that is right often; ``tracing_of`` makes each role's traces."""
    tokenizer_json = load_tokenizer_json(str(model_folders["target"]))
    info = describe_model(Facts(), tokenizer_json)
    verify = VerifyEngine(make_runtime("target"), VOCAB_SIZE, 64, tracing=tracing_of("target-worker"))
    draft = DraftEngine(make_runtime("close"), VOCAB_SIZE, 64, flush_tokens=2, tracing=tracing_of("draft-worker"))
    async with AsyncExitStack() as stack:
        target_host: EngineHost[TargetCommand, TargetFrame] = EngineHost(
            info, tokenizer_json.encode(), functools.partial(ModelThread, verify)
        )
        stack.push_async_callback(target_host.stop)
        draft_host: EngineHost[DraftCommand, DraftFrame] = EngineHost(
            info, tokenizer_json.encode(), functools.partial(ModelThread, draft)
        )
        stack.push_async_callback(draft_host.stop)
        target_server = await _serving(stack, TARGET_SERVICE)
        target_pb2_grpc.add_TargetWorkerServicer_to_server(TargetWorkerServicer(target_host), target_server.grpc_server)
        draft_server = await _serving(stack, DRAFT_SERVICE)
        draft_pb2_grpc.add_DraftWorkerServicer_to_server(DraftWorkerServicer(draft_host), draft_server.grpc_server)
        targets, drafts = await target_server.open(), await draft_server.open()
        await target_server.ready()
        await draft_server.ready()
        chosen = CoordinatorSettings(targets=targets, drafts=drafts, **settings)  # type: ignore[arg-type]
        coordinator = Coordinator(
            chosen,
            [grpc_target_client(targets, 5.0, {})],
            [grpc_draft_client(drafts, 5.0, {})],
            tracing=tracing_of("coordinator"),
        )
        stack.push_async_callback(coordinator.close)
        await coordinator.start()
        server = await _serving(stack, GENERATION_SERVICE)
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(coordinator, 16), server.grpc_server)
        address = await server.open()
        await server.ready()
        yield Deployment(address, coordinator)


async def _serving(stack: AsyncExitStack, service: str) -> RpcServer:
    server = RpcServer("127.0.0.1", 0, [service])
    stack.push_async_callback(server.stop, 0)
    return server
