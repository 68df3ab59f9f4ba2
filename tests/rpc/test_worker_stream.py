"""The coordinator's end of a worker's stream: whatever ends it, or makes it useless, is a lost worker."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from coordinator.clients import TargetClient
from coordinator.grpc_clients import grpc_target_client
from protos import draft_pb2_grpc, target_pb2, target_pb2_grpc
from rpc.channel import check_address
from rpc.errors import OutriderError, Unavailable
from rpc.server import RpcServer
from speculation.messages import CloseSession, SessionId, TargetFrame
from tests.doubles.eventually import eventually


class Leaving(target_pb2_grpc.TargetWorkerServicer):
    """Says nothing, once, and ends the stream."""

    async def Verify(self, requests, context):  # type: ignore[no-untyped-def]
        yield target_pb2.TargetEvents()


class Staying(target_pb2_grpc.TargetWorkerServicer):
    """Says nothing, once, and listens for ever."""

    async def Verify(self, requests, context):  # type: ignore[no-untyped-def]
        yield target_pb2.TargetEvents()
        async for _ in requests:
            pass


@contextlib.asynccontextmanager
async def connected_to(servicer: target_pb2_grpc.TargetWorkerServicer) -> AsyncIterator[TargetClient]:
    server = RpcServer("127.0.0.1", 0, [])
    target_pb2_grpc.add_TargetWorkerServicer_to_server(servicer, server.grpc_server)
    client = grpc_target_client(await server.open(), 5.0, {})
    try:
        yield client
    finally:
        await client.close()
        await server.stop(0)


async def test_stream_that_the_worker_ends_is_a_lost_worker() -> None:
    frames: list[TargetFrame] = []
    losses: list[Exception | None] = []
    async with connected_to(Leaving()) as client:
        connection = await client.connect(frames.append, losses.append)
        await eventually(lambda: bool(losses), "the loss")
        connection.send(SessionId(1), CloseSession())  # does nothing
        await connection.close()

    assert (frames, losses) == ([TargetFrame(())], [None])


async def test_address_of_another_role_is_named_as_that() -> None:
    server = RpcServer("127.0.0.1", 0, [])
    draft_pb2_grpc.add_DraftWorkerServicer_to_server(draft_pb2_grpc.DraftWorkerServicer(), server.grpc_server)
    address = await server.open()
    await server.ready()
    client = grpc_target_client(address, 5.0, {})
    try:
        with pytest.raises(Unavailable, match=f"{address} is no TargetWorker"):
            await client.describe()
    finally:
        await client.close()
        await server.stop(0)


@pytest.mark.parametrize("address", ["gpu-1:50052", "127.0.0.1:1", "[::1]:50051", "unix:/tmp/worker"])
def test_addresses(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", ["gpu-1", "http://gpu-1:50052", "::1", ":50052", "gpu-1:", "gpu-1:port", ""])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        check_address(address)


async def test_frame_that_cannot_be_handled_is_a_lost_worker() -> None:
    """Else nobody would read on, and its requests would wait for ever at a worker that seems to be up."""
    losses: list[Exception | None] = []

    def fail(frame: TargetFrame) -> None:
        raise ZeroDivisionError("by a step of no time")

    async with connected_to(Staying()) as client:
        connection = await client.connect(fail, losses.append)
        await eventually(lambda: bool(losses), "the loss")
        await connection.close()

    [loss] = losses
    assert isinstance(loss, OutriderError)
    assert "by a step of no time" in loss.message
