"""Workers over gRPC: one channel per worker, one stream of frames on it.

A connection is two tasks, whatever the number of sessions: one reads frames and dispatches them, one writes what has
been queued. While a write is under way what is sent meanwhile gathers in the next frame, so a slow link makes frames
larger, not more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from coordinator.clients import CommandT, DraftClient, FrameT, OnLost, TargetClient
from coordinator.traffic import FrameCount
from protos import common_pb2, draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from rpc import draft_codec, shared_codec, target_codec
from rpc.channel import MAX_MESSAGE_BYTES, open_channel
from rpc.draft_codec import DraftFrame
from rpc.errors import OutriderError, Overloaded, Unavailable, from_rpc_error
from speculation.gathering import Hearing
from speculation.messages import DraftCommand, Heard, ModelInfo, SessionId, TargetCommand, TargetFrame

MAX_PENDING_ITEMS = 1 << 16
"""Commands a worker may leave unread before it counts as lost."""

MAX_DRAFT_FRAME_BYTES = 16 * 1024 * 1024
"""Of a draft worker, which is not trusted; one that sends more is lost. Proposals of some hundred sessions take less,
with all that their tokens were drawn from."""

MAX_DRAFT_EVENTS = 8192
"""In one frame of it: main line and branches of over a thousand sessions."""

MAX_SENT_BYTES = MAX_MESSAGE_BYTES // 2
"""Of one frame; what is more leaves in several, since a message too large would end the connection for everyone."""

_log = logging.getLogger(__name__)

TokenizerCache: TypeAlias = MutableMapping[bytes, bytes]
"""tokenizer.json by its SHA-256; shared by the clients of one coordinator."""


class _WorkerStub(Protocol):
    GetModel: grpc.aio.UnaryUnaryMultiCallable[common_pb2.GetModelRequest, common_pb2.ModelInfo]
    GetTokenizer: grpc.aio.UnaryStreamMultiCallable[common_pb2.GetTokenizerRequest, common_pb2.TokenizerChunk]


@dataclass(frozen=True, slots=True)
class _Wire(Generic[CommandT, FrameT]):
    """What differs between the two kinds of worker."""

    make_stub: Callable[[grpc.aio.Channel], _WorkerStub]
    service: str
    stream_method: str
    encode: Callable[[Sequence[tuple[SessionId, CommandT]], Heard], bytes]
    decode: Callable[[bytes], FrameT]
    """Raises ValueError on a frame that is not to be read: the worker is lost then."""

    def encode_all(self, items: Sequence[tuple[SessionId, CommandT]], heard: Heard) -> Iterator[bytes]:
        """One frame, or several where one would be too large."""
        data = self.encode(items, heard)
        if len(data) <= MAX_SENT_BYTES or len(items) < 2:
            yield data
        else:
            middle = len(items) // 2
            yield from self.encode_all(items[:middle], heard)
            yield from self.encode_all(items[middle:], heard)


def _draft_frame(data: bytes) -> DraftFrame:
    if len(data) > MAX_DRAFT_FRAME_BYTES:
        raise ValueError(f"a frame of {len(data)} bytes of a draft worker; at most {MAX_DRAFT_FRAME_BYTES}")
    message = draft_pb2.DraftEvents.FromString(data)
    if len(message.items) > MAX_DRAFT_EVENTS:
        raise ValueError(f"{len(message.items)} events in a frame of a draft worker; at most {MAX_DRAFT_EVENTS}")
    return draft_codec.draft_frame_from_proto(message)


_TARGET_WIRE: _Wire[TargetCommand, TargetFrame] = _Wire(
    make_stub=target_pb2_grpc.TargetWorkerStub,
    service="TargetWorker",
    stream_method="Verify",
    encode=lambda items, heard: target_codec.target_commands_to_proto(items, heard).SerializeToString(),
    decode=lambda data: target_codec.target_frame_from_proto(target_pb2.TargetEvents.FromString(data)),
)
_DRAFT_WIRE: _Wire[DraftCommand, DraftFrame] = _Wire(
    make_stub=draft_pb2_grpc.DraftWorkerStub,
    service="DraftWorker",
    stream_method="Draft",
    encode=lambda items, heard: draft_codec.draft_commands_to_proto(items).SerializeToString(),
    decode=_draft_frame,
)


def grpc_target_client(
    address: str, timeout_s: float, cache: TokenizerCache, frames: FrameCount | None = None
) -> TargetClient:
    """``timeout_s`` is for each step of connecting; ``frames`` are counted. Must be made on the event loop."""
    return GrpcClient(address, timeout_s, cache, _TARGET_WIRE, frames or FrameCount())


def grpc_draft_client(
    address: str, timeout_s: float, cache: TokenizerCache, frames: FrameCount | None = None
) -> DraftClient:
    """``timeout_s`` is for each step of connecting; ``frames`` are counted. Must be made on the event loop."""
    return GrpcClient(address, timeout_s, cache, _DRAFT_WIRE, frames or FrameCount())


class GrpcClient(Generic[CommandT, FrameT]):
    """A `WorkerClient` over one channel, which reconnects by itself."""

    def __init__(
        self,
        address: str,
        timeout_s: float,
        cache: TokenizerCache,
        wire: _Wire[CommandT, FrameT],
        frames: FrameCount,
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._tokenizers = cache
        self._frames = frames
        self._wire = wire
        self._channel = open_channel(address)
        self._stub = wire.make_stub(self._channel)
        method = f"/outrider.v1.{wire.service}/{wire.stream_method}"
        self._stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(method)

    @property
    def name(self) -> str:
        return self._address

    async def describe(self) -> tuple[ModelInfo, bytes]:
        try:
            message = await self._stub.GetModel(common_pb2.GetModelRequest(), timeout=self._timeout_s)
            info = shared_codec.model_info_from_proto(message)
            return info, await self._tokenizer(info.tokenizer_sha256)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                problem = f"what answers at {self._address} is no {self._wire.service}; is it another role's address?"
                raise Unavailable(problem) from error
            raise from_rpc_error(error) from error

    async def _tokenizer(self, digest: bytes) -> bytes:
        if digest not in self._tokenizers:
            call = self._stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=self._timeout_s)
            data = b"".join([chunk.data async for chunk in call])
            if hashlib.sha256(data).digest() != digest:
                raise Unavailable(f"{self._address}: the tokenizer did not arrive as announced; restart the worker")
            self._tokenizers[digest] = data
        return self._tokenizers[digest]

    async def connect(self, on_frame: Callable[[FrameT], None], on_lost: OnLost) -> GrpcConnection[CommandT, FrameT]:
        call = self._stream()
        try:
            async with asyncio.timeout(self._timeout_s):
                await call.wait_for_connection()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except BaseException as error:
            call.cancel()
            if isinstance(error, TimeoutError):
                raise Unavailable(f"{self._address}: no answer within {self._timeout_s:g} s") from error
            raise
        return GrpcConnection(call, self._wire, on_frame, on_lost, self._frames)

    async def close(self) -> None:
        await self._channel.close()


class GrpcConnection(Generic[CommandT, FrameT]):
    """A `WorkerConnection` over one bidirectional call."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[bytes, bytes],
        wire: _Wire[CommandT, FrameT],
        on_frame: Callable[[FrameT], None],
        on_lost: OnLost,
        frames: FrameCount,
    ) -> None:
        self._call = call
        self._wire = wire
        self._frames = frames
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._hearing = Hearing()
        self._pending: list[tuple[SessionId, CommandT]] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def send(self, session_id: SessionId, command: CommandT) -> None:
        if self._closed:
            return
        self._pending.append((session_id, command))
        self._wake.set()
        if len(self._pending) > MAX_PENDING_ITEMS:
            self._lose(Overloaded(f"the worker leaves {MAX_PENDING_ITEMS} commands unread"))

    async def _read(self) -> None:
        try:
            async for data in self._call:
                self._frames.num_received += 1
                self._frames.num_received_bytes += len(data)
                self._hearing.on_frame(time.monotonic())
                self._on_frame(self._decoded(data))
            self._lose(None)
        except grpc.aio.AioRpcError as error:
            self._lose(from_rpc_error(error))
        except Unavailable as error:
            self._lose(error)
        except Exception as error:  # else the worker would seem to be up, and nothing that it says be heard
            _log.exception("a frame could not be handled")
            self._lose(
                OutriderError(f"the coordinator failed at a frame of this worker: {error!r}; its log says where")
            )

    def _decoded(self, data: bytes) -> FrameT:
        try:
            return self._wire.decode(data)
        except (ValueError, DecodeError) as error:
            raise Unavailable(f"the worker sent what cannot be read: {error}") from error

    async def _write(self) -> None:
        # A call that has just ended refuses writes in several ways; `_read` knows and tells why it ended.
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                items, self._pending = self._pending, []
                for data in self._wire.encode_all(items, self._hearing.heard(time.monotonic())):
                    self._frames.num_sent += 1
                    self._frames.num_sent_bytes += len(data)
                    await self._call.write(data)

    def _lose(self, error: Exception | None) -> None:
        if not self._closed:
            self._shut()
            self._on_lost(error)

    def _shut(self) -> None:
        self._closed = True
        self._pending.clear()
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self) -> None:
        if not self._closed:
            self._shut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
