"""The gRPC face of a worker, the same for draft and target: GetModel, GetTokenizer, and one stream of frames.

A call of ``Draft`` or ``Verify`` is an `exchange`: frames in go to ``connection.submit``, what the engine delivers goes
out through a bounded buffer. However the call ends, the connection is closed and the worker drops its sessions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from typing import Generic, TypeVar

import grpc

from protos import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from rpc import draft_codec, shared_codec, target_codec
from rpc.draft_codec import DraftFrame
from rpc.errors import Overloaded, abort_with
from rpc.worker_core import CommandT, Connection, FrameT, WorkerCore
from speculation.messages import NOTHING_HEARD, DraftCommand, Heard, SessionId, TargetCommand, TargetFrame

DRAFT_SERVICE = "outrider.v1.DraftWorker"
TARGET_SERVICE = "outrider.v1.TargetWorker"

TOKENIZER_CHUNK_BYTES = 1 << 20
MAX_PENDING_FRAMES = 4096
"""Frames a coordinator may leave unread before its stream is ended: minutes of steps, a few MiB."""

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class TargetWorkerServicer(target_pb2_grpc.TargetWorkerServicer):
    """Serves one target engine to any number of coordinators."""

    def __init__(self, core: WorkerCore[TargetCommand, TargetFrame]) -> None:
        self._core = core

    async def GetModel(self, request: common_pb2.GetModelRequest, context: object) -> common_pb2.ModelInfo:
        return shared_codec.model_info_to_proto(self._core.model_info)

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: object
    ) -> AsyncIterator[common_pb2.TokenizerChunk]:
        for chunk in tokenizer_chunks(self._core.tokenizer_json):
            yield chunk

    async def Verify(
        self,
        request_iterator: AsyncIterable[target_pb2.TargetCommands],
        context: grpc.aio.ServicerContext[target_pb2.TargetCommands, target_pb2.TargetEvents],
    ) -> AsyncIterator[target_pb2.TargetEvents]:
        requests = _decoded(request_iterator, target_codec.target_commands_from_proto, target_codec.heard_from_proto)
        async for frame in exchange(self._core, requests, context):
            yield target_codec.target_frame_to_proto(frame)


class DraftWorkerServicer(draft_pb2_grpc.DraftWorkerServicer):
    """Serves one draft engine to any number of coordinators."""

    def __init__(self, core: WorkerCore[DraftCommand, DraftFrame]) -> None:
        self._core = core

    async def GetModel(self, request: common_pb2.GetModelRequest, context: object) -> common_pb2.ModelInfo:
        return shared_codec.model_info_to_proto(self._core.model_info)

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: object
    ) -> AsyncIterator[common_pb2.TokenizerChunk]:
        for chunk in tokenizer_chunks(self._core.tokenizer_json):
            yield chunk

    async def Draft(
        self,
        request_iterator: AsyncIterable[draft_pb2.DraftCommands],
        context: grpc.aio.ServicerContext[draft_pb2.DraftCommands, draft_pb2.DraftEvents],
    ) -> AsyncIterator[draft_pb2.DraftEvents]:
        requests = _decoded(request_iterator, draft_codec.draft_commands_from_proto, lambda message: NOTHING_HEARD)
        async for frame in exchange(self._core, requests, context):
            yield draft_codec.draft_frame_to_proto(frame)


def tokenizer_chunks(tokenizer_json: bytes) -> Iterator[common_pb2.TokenizerChunk]:
    """The file in parts of at most `TOKENIZER_CHUNK_BYTES`."""
    for start in range(0, len(tokenizer_json), TOKENIZER_CHUNK_BYTES):
        yield common_pb2.TokenizerChunk(data=tokenizer_json[start : start + TOKENIZER_CHUNK_BYTES])


async def exchange(
    core: WorkerCore[CommandT, FrameT],
    requests: AsyncIterable[tuple[Sequence[tuple[SessionId, CommandT]], Heard]],
    context: grpc.aio.ServicerContext[RequestT, ResponseT],
) -> AsyncIterator[FrameT]:
    """Runs one coordinator's connection; yields the frames to send.

    Ends when the coordinator half-closes, goes away or reads too slowly (RESOURCE_EXHAUSTED), and closes the
    connection in every case.
    """
    outbox: Outbox[FrameT] = Outbox(MAX_PENDING_FRAMES)
    connection = core.connect(outbox.put)
    # Not only in `finally`: a cancelled call may leave this generator suspended until it is collected.
    context.add_done_callback(lambda _: connection.close())  # type: ignore[arg-type]  # stubs want a nominal class
    await context.send_initial_metadata(())  # tells the coordinator that the stream stands
    reader = asyncio.create_task(_submit_all(requests, connection))
    reader.add_done_callback(lambda _: outbox.end())
    try:
        async for frame in outbox:
            yield frame
    finally:
        connection.close()
        reader.cancel()
    if outbox.overflowed:
        await abort_with(context, Overloaded(f"{MAX_PENDING_FRAMES} frames are unread; reconnect and read faster"))
    await reader


async def _decoded(
    messages: AsyncIterable[RequestT],
    decode: Callable[[RequestT], Sequence[tuple[SessionId, CommandT]]],
    decode_heard: Callable[[RequestT], Heard],
) -> AsyncIterator[tuple[Sequence[tuple[SessionId, CommandT]], Heard]]:
    # Not a generator expression: that would start grpc's iterator at once, which warns if it is then never awaited.
    async for message in messages:
        yield decode(message), decode_heard(message)


async def _submit_all(
    requests: AsyncIterable[tuple[Sequence[tuple[SessionId, CommandT]], Heard]], connection: Connection[CommandT]
) -> None:
    async for items, heard in requests:
        connection.submit(items, heard)


class Outbox(Generic[FrameT]):
    """A bounded buffer between an engine that must not wait and a stream that may be slow."""

    def __init__(self, max_frames: int) -> None:
        self.overflowed = False
        self._frames: deque[FrameT] = deque()
        self._max_frames = max_frames
        self._ended = False
        self._changed = asyncio.Event()

    def put(self, frame: FrameT) -> None:
        """Keeps the frame, or, when there is no room, drops it and ends the stream."""
        if len(self._frames) < self._max_frames:
            self._frames.append(frame)
            self._changed.set()
        else:
            self.overflowed = True
            self.end()

    def end(self) -> None:
        """Iteration stops at once; what is still unread is dropped."""
        self._ended = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[FrameT]:
        while not self._ended:
            if self._frames:
                yield self._frames.popleft()
            else:
                self._changed.clear()
                await self._changed.wait()
