"""A worker's process from start to end: bind, load, serve, stop. The same for draft and target."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol

import grpc
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from rpc.engine_host import EngineHost, MakeThread
from rpc.errors import OutriderError
from rpc.metrics_endpoint import metrics_endpoint
from rpc.server import OnStatus, RpcServer, Status, serve_until_stopped, settle
from rpc.worker_core import CommandT, FrameT
from rpc.worker_settings import WorkerSettings
from speculation.messages import ChatTemplate, ModelInfo


class ModelFacts(Protocol):
    """What a loaded model says about itself; ``inference.ModelDescription`` has it."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True, slots=True)
class LoadedWorker(Generic[CommandT, FrameT]):
    """A model in memory, and how to make its engine's thread."""

    model_info: ModelInfo
    tokenizer_json: bytes
    make_thread: MakeThread[FrameT]


def describe_model(facts: ModelFacts, tokenizer_json: str, chat_template: ChatTemplate | None = None) -> ModelInfo:
    """What `GetModel` answers. ``tokenizer_size`` is one more than the greatest id that has a token string."""
    vocabulary = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    return ModelInfo(
        name=facts.name,
        vocab_size=facts.vocab_size,
        max_context=facts.max_context,
        eos_token_ids=facts.eos_token_ids,
        num_parameters=facts.num_parameters,
        dtype=facts.dtype,
        device=facts.device,
        tokenizer_sha256=hashlib.sha256(tokenizer_json.encode()).digest(),
        tokenizer_size=min(max(vocabulary.values()) + 1, facts.vocab_size),
        chat_template=chat_template,
    )


async def serve_worker(
    settings: WorkerSettings,
    service: str,
    load: Callable[[Callable[[str], None]], LoadedWorker[CommandT, FrameT]],
    add_servicer: Callable[[EngineHost[CommandT, FrameT], grpc.aio.Server], None],
    on_status: OnStatus,
    registry: CollectorRegistry,
) -> None:
    """Serves until SIGTERM or SIGINT, and ``registry`` too if the settings name a port for it.

    ``load(on_progress)`` runs on a thread of its own, so that health checks are answered meanwhile. Raises
    `AddressInUse`, whatever ``load`` raises, and `OutriderError` if the engine fails while serving.
    """
    server = RpcServer(settings.host, settings.port, [service])
    address = await server.open()
    loop = asyncio.get_running_loop()

    def on_progress(detail: str) -> None:
        loop.call_soon_threadsafe(on_status, Status("loading", detail, address))

    try:
        async with metrics_endpoint(registry, settings.host, settings.metrics_port, on_status, address):
            on_status(Status("loading", f"loading {settings.model}", address))
            loaded = await asyncio.to_thread(load, on_progress)
            settle()
            await _serve(server, loaded, add_servicer, on_status, settings.shutdown_grace_s)
    finally:
        await server.stop(0)


async def _serve(
    server: RpcServer,
    loaded: LoadedWorker[CommandT, FrameT],
    add_servicer: Callable[[EngineHost[CommandT, FrameT], grpc.aio.Server], None],
    on_status: OnStatus,
    grace_s: float,
) -> None:
    stop = asyncio.Event()
    host: EngineHost[CommandT, FrameT] = EngineHost(
        loaded.model_info, loaded.tokenizer_json, loaded.make_thread, on_failure=stop.set
    )
    add_servicer(host, server.grpc_server)
    info = loaded.model_info
    detail = f"{info.name}: {info.num_parameters / 1e6:.1f} M parameters, {info.dtype} on {info.device}"
    try:
        await serve_until_stopped(server, on_status, stop, grace_s, detail)
    finally:
        await host.stop()
    if host.failure is not None:
        raise OutriderError(f"the model thread failed: {host.failure!r}") from host.failure
