"""Real ``grpc.aio`` servers on port 0 over scripted workers, and a coordinator between them and a real client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from coordinator.coordinator import Coordinator
from coordinator.grpc_clients import grpc_draft_client, grpc_target_client
from coordinator.metrics import CoordinatorMetrics
from coordinator.servicer import GENERATION_SERVICE, GenerationServicer
from coordinator.settings import CoordinatorSettings
from coordinator.traffic import Traffic
from protos import draft_pb2_grpc, generation_pb2, generation_pb2_grpc, target_pb2_grpc
from rpc.channel import open_channel
from rpc.server import RpcServer
from rpc.worker_servicer import DRAFT_SERVICE, TARGET_SERVICE, DraftWorkerServicer, TargetWorkerServicer
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget
from tests.doubles.toy_model import next_token

PROMPT = (1, 2, 3)


def spoken(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the toy target says after ``prompt`` when nothing stops it."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class WorkerProcess:
    """A scripted worker behind a server that can be killed and come back on the same port."""

    def __init__(self, core: ScriptedTarget | ScriptedDrafter) -> None:
        self.core = core
        self.address = ""
        self._port = 0
        self._server: RpcServer | None = None

    async def start(self) -> None:
        service = TARGET_SERVICE if isinstance(self.core, ScriptedTarget) else DRAFT_SERVICE
        self._server = RpcServer("127.0.0.1", self._port, [service])
        if isinstance(self.core, ScriptedTarget):
            target_pb2_grpc.add_TargetWorkerServicer_to_server(
                TargetWorkerServicer(self.core), self._server.grpc_server
            )
        else:
            draft_pb2_grpc.add_DraftWorkerServicer_to_server(DraftWorkerServicer(self.core), self._server.grpc_server)
        self.address = await self._server.open()
        self._port = int(self.address.rsplit(":", 1)[1])
        await self._server.ready()

    async def kill(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None


@dataclass
class Stack:
    """Everything of one deployment, and a client's stub."""

    targets: list[WorkerProcess]
    drafts: list[WorkerProcess]
    coordinator: Coordinator
    address: str
    stub: generation_pb2_grpc.GenerationAsyncStub

    @property
    def num_worker_sessions(self) -> int:
        return sum(worker.core.num_sessions for worker in (*self.targets, *self.drafts))


@contextlib.asynccontextmanager
async def running_worker(core: ScriptedTarget | ScriptedDrafter) -> AsyncIterator[WorkerProcess]:
    worker = WorkerProcess(core)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.kill()


@contextlib.asynccontextmanager
async def running_stack(
    targets: Sequence[ScriptedTarget],
    drafts: Sequence[ScriptedDrafter] = (),
    *,
    metrics: CoordinatorMetrics | None = None,
    **settings: object,
) -> AsyncIterator[Stack]:
    """Policy ``fixed`` with K 4 unless told otherwise, so that every test speculates the same."""
    async with contextlib.AsyncExitStack() as stack:
        target_workers = [await stack.enter_async_context(running_worker(core)) for core in targets]
        draft_workers = [await stack.enter_async_context(running_worker(core)) for core in drafts]
        chosen = CoordinatorSettings(
            targets=[worker.address for worker in target_workers],
            drafts=[worker.address for worker in draft_workers],
            **{"policy": "fixed", "max_k": 4, **settings},  # type: ignore[arg-type]
        )
        coordinator = make_coordinator(chosen, metrics)
        stack.push_async_callback(coordinator.close)
        await coordinator.start()
        server = RpcServer("127.0.0.1", 0, [GENERATION_SERVICE])
        servicer = GenerationServicer(coordinator, chosen.max_requests_per_stream)
        generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server.grpc_server)
        address = await server.open()
        stack.push_async_callback(server.stop, 0)
        channel = await stack.enter_async_context(open_channel(address))
        stub = generation_pb2_grpc.GenerationStub(channel)
        yield Stack(target_workers, draft_workers, coordinator, address, stub)


def make_coordinator(settings: CoordinatorSettings, metrics: CoordinatorMetrics | None = None) -> Coordinator:
    traffic = Traffic()
    return Coordinator(
        settings,
        [grpc_target_client(address, 5.0, {}, traffic.target) for address in settings.targets],
        [grpc_draft_client(address, 5.0, {}, traffic.draft) for address in settings.drafts],
        traffic,
        metrics=metrics,
    )


def generate_request(
    max_tokens: int = 40, prompt: Sequence[int] = PROMPT, **fields: object
) -> generation_pb2.GenerateRequest:
    """Never stops before ``max_tokens``."""
    return generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=prompt),
        max_tokens=max_tokens,
        ignore_eos=True,
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class Answer:
    """A whole stream of events, taken apart."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    started: generation_pb2.Started | None = None
    finished: generation_pb2.Finished | None = None
    failed: generation_pb2.Failed | None = None
    drafted: list[bool] = field(default_factory=list)

    def add(self, event: generation_pb2.GenerateEvent | generation_pb2.GenerateManyEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "tokens":
            self.token_ids += [token.id for token in event.tokens.tokens]
            self.drafted += [token.drafted for token in event.tokens.tokens]
            self.text += event.tokens.text
        else:
            assert kind is not None
            assert getattr(self, kind) is None, f"two {kind} events"
            setattr(self, kind, getattr(event, kind))

    @property
    def is_over(self) -> bool:
        return self.finished is not None or self.failed is not None


async def collect(call: AsyncIterator[generation_pb2.GenerateEvent], answer: Answer | None = None) -> Answer:
    answer = answer if answer is not None else Answer()
    async for event in call:
        answer.add(event)
    return answer
