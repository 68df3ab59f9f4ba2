"""A role's server: port, health, reflection, errors on the wire, stopping; and the stream every worker has."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.serve import serve
from coordinator.settings import CoordinatorSettings
from protos import common_pb2, generation_pb2, generation_pb2_grpc, target_pb2, target_pb2_grpc
from rpc import worker_servicer
from rpc.channel import open_channel
from rpc.errors import (
    AddressInUse,
    Cancelled,
    FieldViolation,
    InvalidRequest,
    ModelMismatch,
    ModelNotFound,
    OutriderError,
    Overloaded,
    SessionFailed,
    SlowReader,
    Unavailable,
    abort_with,
    from_rpc_error,
)
from rpc.server import RpcServer, Status, serve_until_stopped
from rpc.worker_servicer import TargetWorkerServicer
from tests.doubles.eventually import eventually
from tests.doubles.scripted_workers import ScriptedDrafter, ScriptedTarget, toy_tokenizer_json
from tests.rpc.conftest import PROMPT, WorkerProcess, collect, generate_request, running_worker, spoken

SERVICE = "outrider.v1.TargetWorker"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def target() -> AsyncIterator[WorkerProcess]:
    async with running_worker(ScriptedTarget()) as worker:
        yield worker


async def health(address: str, service: str = "") -> int:
    async with open_channel(address) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_port_in_use_is_told_by_number() -> None:
    first, second = RpcServer("127.0.0.1", 0, []), None
    try:
        port = int((await first.open()).rsplit(":", 1)[1])
        second = RpcServer("127.0.0.1", port, [])
        with pytest.raises(AddressInUse, match=str(port)) as caught:
            await second.open()
        assert "in use" in caught.value.message
    finally:
        await first.stop(0)


async def test_port_in_use_is_found_by_grpc_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """If somebody takes the port between the look and the bind."""
    monkeypatch.setattr("rpc.server.check_bindable", lambda host, port: None)
    first = RpcServer("127.0.0.1", 0, [])
    try:
        port = int((await first.open()).rsplit(":", 1)[1])
        with pytest.raises(AddressInUse, match=str(port)):
            await RpcServer("127.0.0.1", port, []).open()
    finally:
        await first.stop(0)


async def test_address_of_another_machine_is_told() -> None:
    with pytest.raises(AddressInUse, match=r"192\.0\.2\.1"):
        await RpcServer("192.0.2.1", 0, []).open()


async def test_health_follows_the_life_of_the_server() -> None:
    server = RpcServer("127.0.0.1", 0, [SERVICE])
    address = await server.open()
    statuses: list[Status] = []
    stop = asyncio.Event()
    assert [await health(address, name) for name in ("", SERVICE)] == [NOT_SERVING, NOT_SERVING]

    serving = asyncio.create_task(serve_until_stopped(server, statuses.append, stop))
    await eventually(lambda: bool(statuses), "ready")
    assert [await health(address, name) for name in ("", SERVICE)] == [SERVING, SERVING]
    stop.set()
    await serving

    assert [status.event for status in statuses] == ["ready", "draining", "stopped"]
    assert {status.address for status in statuses} == {address}
    with pytest.raises(grpc.aio.AioRpcError):
        await health(address)


async def test_calls_while_loading_are_unavailable() -> None:
    server = RpcServer("127.0.0.1", 0, [SERVICE])
    address = await server.open()
    async with open_channel(address) as channel:
        stub = target_pb2_grpc.TargetWorkerStub(channel)
        for call in (stub.GetModel(common_pb2.GetModelRequest()), _first(stub.Verify())):
            with pytest.raises(grpc.aio.AioRpcError, match="still loading") as caught:
                await call
            assert type(from_rpc_error(caught.value)) is Unavailable

        target_pb2_grpc.add_TargetWorkerServicer_to_server(TargetWorkerServicer(ScriptedTarget()), server.grpc_server)
        await server.ready()
        assert (await stub.GetModel(common_pb2.GetModelRequest())).name == "toy-target"
    await server.stop(0)


async def _first(call: AsyncIterator[object]) -> object:
    return await anext(aiter(call))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_stop_it(number: signal.Signals) -> None:
    server = RpcServer("127.0.0.1", 0, [SERVICE])
    await server.open()
    statuses: list[Status] = []
    serving = asyncio.create_task(serve_until_stopped(server, statuses.append))
    await eventually(lambda: bool(statuses), "ready")

    os.kill(os.getpid(), number)
    await asyncio.wait_for(serving, 10)

    assert statuses[-1].event == "stopped"


async def test_reflection_lists_the_services(target: WorkerProcess) -> None:
    async with open_channel(target.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [answer] = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]

    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


ERRORS = [
    InvalidRequest(FieldViolation("temperature", "is -1; must be at least 0"), FieldViolation("top_p", "is 2")),
    Overloaded("256 requests are waiting", retry_after_s=2.5),
    *(
        kind(f"{kind.__name__} with ünïcode")
        for kind in (
            OutriderError,
            ModelNotFound,
            Unavailable,
            ModelMismatch,
            AddressInUse,
            SessionFailed,
            SlowReader,
            Cancelled,
        )
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_errors_arrive_as_they_were_raised(error: OutriderError) -> None:
    class Failing(generation_pb2_grpc.GenerationServicer):
        async def GetModel(self, request, context):  # type: ignore[no-untyped-def]
            await abort_with(context, error)

    server = RpcServer("127.0.0.1", 0, [])
    generation_pb2_grpc.add_GenerationServicer_to_server(Failing(), server.grpc_server)
    address = await server.open()
    try:
        async with open_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetModel(generation_pb2.GetServedModelRequest())
    finally:
        await server.stop(0)

    arrived = from_rpc_error(caught.value)
    assert caught.value.code() is error.grpc_code
    assert type(arrived) is type(error)
    assert arrived.message == error.message
    assert vars(arrived) == vars(error)


async def test_nobody_there_is_unavailable(target: WorkerProcess) -> None:
    await target.kill()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(target.address)
    assert type(from_rpc_error(caught.value)) is Unavailable


# -- the worker's side ----------------------------------------------------------------------------------------------


async def test_tokenizer_comes_in_chunks(monkeypatch: pytest.MonkeyPatch, target: WorkerProcess) -> None:
    monkeypatch.setattr(worker_servicer, "TOKENIZER_CHUNK_BYTES", 100)
    async with open_channel(target.address) as channel:
        stub = target_pb2_grpc.TargetWorkerStub(channel)
        info = await stub.GetModel(common_pb2.GetModelRequest())
        chunks = [chunk.data async for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]

    assert max(map(len, chunks)) == 100
    assert b"".join(chunks) == toy_tokenizer_json()
    assert hashlib.sha256(b"".join(chunks)).digest() == info.tokenizer_sha256


def _open(session_id: int) -> target_pb2.TargetCommands:
    command = target_pb2.OpenTarget(token_ids=PROMPT, max_length=4000, sampling=common_pb2.Sampling(top_p=1))
    return target_pb2.TargetCommands(items=[target_pb2.TargetCommand(session_id=session_id, open=command)])


@pytest.mark.parametrize("how", ["cancel", "half-close", "channel"])
async def test_sessions_are_dropped_however_the_stream_ends(target: WorkerProcess, how: str) -> None:
    target.core.hold()
    channel = open_channel(target.address)
    call = target_pb2_grpc.TargetWorkerStub(channel).Verify()
    await call.write(_open(1))
    await eventually(lambda: target.core.num_sessions == 1, "a session")

    if how == "cancel":
        call.cancel()
    elif how == "half-close":
        await call.done_writing()
    else:
        await channel.close()

    await eventually(lambda: target.core.connections == [], "the connection closed")
    await channel.close()


async def test_coordinator_that_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, target: WorkerProcess
) -> None:
    monkeypatch.setattr(worker_servicer, "MAX_PENDING_FRAMES", 5)
    target.core.hold()
    async with open_channel(target.address) as channel:
        call = target_pb2_grpc.TargetWorkerStub(channel).Verify()
        await call.write(_open(1))
        await eventually(lambda: target.core.num_sessions == 1, "a session")
        [connection] = target.core.connections
        for _ in range(7):  # within one turn of the event loop, so that nothing can be sent between
            connection.deliver(target.core.step(connection))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert target.core.connections == []


# -- the coordinator's process --------------------------------------------------------------------------------------


async def test_coordinator_serves_from_loading_to_stopped(target: WorkerProcess) -> None:
    await target.kill()
    statuses: list[Status] = []
    stop = asyncio.Event()
    async with running_worker(ScriptedDrafter()) as draft:
        settings = CoordinatorSettings(targets=[target.address], drafts=[draft.address], port=0)
        serving = asyncio.create_task(serve(settings, statuses.append, stop))
        await eventually(lambda: bool(statuses), "loading")
        address = statuses[0].address
        assert address is not None
        assert statuses[0].event == "loading"
        assert await health(address, "outrider.v1.Generation") == NOT_SERVING
        await target.start()
        await eventually(lambda: statuses[-1].event == "ready", "ready")
        assert await health(address, "outrider.v1.Generation") == SERVING
        async with open_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            answer = await collect(stub.Generate(generate_request()))
        stop.set()
        await serving

    assert answer.token_ids == spoken(PROMPT, 40)
    assert [status.event for status in statuses[-3:]] == ["ready", "draining", "stopped"]


async def test_coordinator_can_be_stopped_while_it_waits(target: WorkerProcess) -> None:
    await target.kill()
    statuses: list[Status] = []
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(CoordinatorSettings(targets=[target.address], port=0), statuses.append, stop))
    await eventually(lambda: bool(statuses), "loading")

    stop.set()
    await asyncio.wait_for(serving, 10)

    assert statuses[-1].event == "stopped"


async def test_coordinator_refuses_a_port_in_use(target: WorkerProcess) -> None:
    port = int(target.address.rsplit(":", 1)[1])
    with pytest.raises(AddressInUse, match=str(port)):
        await serve(CoordinatorSettings(targets=[target.address], port=port), lambda status: None)


async def test_coordinator_refuses_other_vocabularies(target: WorkerProcess) -> None:
    other = ScriptedDrafter(tokenizer_json=toy_tokenizer_json("jihgfedcba"))
    async with running_worker(other) as draft:
        settings = CoordinatorSettings(targets=[target.address], drafts=[draft.address], port=0)
        with pytest.raises(ModelMismatch, match="vocabular"):
            await serve(settings, lambda status: None)
