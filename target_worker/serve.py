"""The process of a target worker."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import grpc

from grammar import GrammarCompiler
from inference import LoadedTokenizer, ModelLoadError, ModelThread, load_model, load_tokenizer, warm_up
from protos import target_pb2_grpc
from rpc.engine_host import EngineHost, MakeThread
from rpc.errors import ModelNotFound
from rpc.server import OnStatus
from rpc.worker_process import LoadedWorker, describe_model, serve_worker
from rpc.worker_servicer import TARGET_SERVICE, TargetWorkerServicer
from speculation.messages import ChatTemplate, TargetCommand, TargetFrame
from target_worker.engine import VerifyEngine
from target_worker.metrics import TargetMetrics
from target_worker.settings import TargetWorkerSettings
from telemetry.tracing import NO_TRACING, Tracing, make_tracing


async def serve(settings: TargetWorkerSettings, on_status: OnStatus) -> None:
    """Loads the model and serves it until SIGTERM or SIGINT; see `serve_worker` for errors."""
    metrics, tracing = TargetMetrics(), make_tracing("target-worker", settings.otlp_endpoint)
    try:
        await serve_worker(
            settings,
            TARGET_SERVICE,
            lambda on_progress: load(settings, on_progress, metrics, tracing),
            _add_servicer,
            on_status,
            metrics.registry,
        )
    finally:
        await asyncio.to_thread(tracing.close)


def load(
    settings: TargetWorkerSettings,
    on_progress: Callable[[str], None],
    metrics: TargetMetrics,
    tracing: Tracing = NO_TRACING,
) -> LoadedWorker[TargetCommand, TargetFrame]:
    """Reads model and tokenizer and warms the model up. Raises `rpc.errors.ModelNotFound`."""
    threads = settings.threads or None
    try:
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            kv_tokens=settings.kv_tokens,
            num_threads=threads,
            graphs=settings.graphs,
            on_progress=on_progress,
        )
        tokenizer = load_tokenizer(settings.model)
    except ModelLoadError as error:
        raise ModelNotFound(str(error)) from error
    info = describe_model(loaded.description, tokenizer.json, _chat_template(tokenizer))
    metrics.describe(info)
    on_progress("warming up")
    warm_up(loaded.runtime)
    grammars = GrammarCompiler(tokenizer.json, info.tokenizer_size, info.eos_token_ids)
    engine = VerifyEngine(
        loaded.runtime,
        info.tokenizer_size,
        settings.max_step_tokens,
        grammars=grammars,
        metrics=metrics,
        tracing=tracing,
        looks_up=settings.lookup,
    )
    make_thread: MakeThread[TargetFrame] = functools.partial(
        ModelThread, engine, num_threads=threads, woken_by=grammars
    )
    return LoadedWorker(info, tokenizer.json.encode(), make_thread)


def _chat_template(tokenizer: LoadedTokenizer) -> ChatTemplate | None:
    if not tokenizer.chat_template:
        return None
    return ChatTemplate(tokenizer.chat_template, tuple(sorted(tokenizer.special_tokens.items())))


def _add_servicer(host: EngineHost[TargetCommand, TargetFrame], server: grpc.aio.Server) -> None:
    target_pb2_grpc.add_TargetWorkerServicer_to_server(TargetWorkerServicer(host), server)
