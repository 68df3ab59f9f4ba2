"""The process of a draft worker."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import grpc

from draft_worker.engine import DraftEngine
from draft_worker.metrics import DraftMetrics
from draft_worker.settings import DraftWorkerSettings
from grammar import GrammarCompiler
from inference import ModelLoadError, ModelThread, load_model, load_tokenizer_json, warm_up
from protos import draft_pb2_grpc
from rpc.draft_codec import DraftFrame
from rpc.engine_host import EngineHost, MakeThread
from rpc.errors import ModelNotFound
from rpc.server import OnStatus
from rpc.worker_process import LoadedWorker, describe_model, serve_worker
from rpc.worker_servicer import DRAFT_SERVICE, DraftWorkerServicer
from speculation.messages import DraftCommand
from telemetry.tracing import NO_TRACING, Tracing, make_tracing


async def serve(settings: DraftWorkerSettings, on_status: OnStatus) -> None:
    """Loads the model and serves it until SIGTERM or SIGINT; see `serve_worker` for errors."""
    metrics, tracing = DraftMetrics(), make_tracing("draft-worker", settings.otlp_endpoint)
    try:
        await serve_worker(
            settings,
            DRAFT_SERVICE,
            lambda on_progress: load(settings, on_progress, metrics, tracing),
            _add_servicer,
            on_status,
            metrics.registry,
        )
    finally:
        await asyncio.to_thread(tracing.close)


def load(
    settings: DraftWorkerSettings,
    on_progress: Callable[[str], None],
    metrics: DraftMetrics,
    tracing: Tracing = NO_TRACING,
) -> LoadedWorker[DraftCommand, DraftFrame]:
    """Reads model and tokenizer and warms the model up. Raises `rpc.errors.ModelNotFound`."""
    threads = settings.threads or None
    try:
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            kv_tokens=settings.kv_tokens,
            num_threads=threads,
            compiled=True,
            graphs=settings.graphs,
            on_progress=on_progress,
        )
        tokenizer_json = load_tokenizer_json(settings.model)
    except ModelLoadError as error:
        raise ModelNotFound(str(error)) from error
    info = describe_model(loaded.description, tokenizer_json)
    metrics.describe(info)
    on_progress("warming up")
    warm_up(loaded.runtime)
    grammars = GrammarCompiler(tokenizer_json, info.tokenizer_size, info.eos_token_ids)
    engine = DraftEngine(
        loaded.runtime,
        info.tokenizer_size,
        settings.max_step_tokens,
        settings.flush_tokens,
        grammars=grammars,
        metrics=metrics,
        tracing=tracing,
        looks_up=settings.lookup,
    )
    make_thread: MakeThread[DraftFrame] = functools.partial(ModelThread, engine, num_threads=threads, woken_by=grammars)
    return LoadedWorker(info, tokenizer_json.encode(), make_thread)


def _add_servicer(host: EngineHost[DraftCommand, DraftFrame], server: grpc.aio.Server) -> None:
    draft_pb2_grpc.add_DraftWorkerServicer_to_server(DraftWorkerServicer(host), server)
