"""Workers in the coordinator's own process: the engine is called directly, with the same batching as over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic

from coordinator.clients import CommandT, FrameT, OnLost
from rpc.worker_core import Connection, WorkerCore
from speculation.gathering import Hearing
from speculation.messages import ModelInfo, SessionId


class InProcessClient(Generic[CommandT, FrameT]):
    """A `WorkerClient` over a `WorkerCore`; its connections are never lost."""

    def __init__(self, core: WorkerCore[CommandT, FrameT], name: str = "in-process") -> None:
        self._core = core
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    async def describe(self) -> tuple[ModelInfo, bytes]:
        return self._core.model_info, self._core.tokenizer_json

    async def connect(self, on_frame: Callable[[FrameT], None], on_lost: OnLost) -> InProcessConnection[CommandT]:
        hearing = Hearing()

        def hear(frame: FrameT) -> None:
            hearing.on_frame(time.monotonic())
            on_frame(frame)

        return InProcessConnection(self._core.connect(hear), hearing)

    async def close(self) -> None:
        pass


class InProcessConnection(Generic[CommandT]):
    """A `WorkerConnection` over a `Connection`."""

    def __init__(self, connection: Connection[CommandT], hearing: Hearing) -> None:
        self._hearing = hearing
        self._connection = connection
        self._pending: list[tuple[SessionId, CommandT]] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def send(self, session_id: SessionId, command: CommandT) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append((session_id, command))

    def _flush(self) -> None:
        items, self._pending = self._pending, []
        if not self._closed:
            self._connection.submit(items, self._hearing.heard(time.monotonic()))

    async def close(self) -> None:
        self._closed = True
        self._connection.close()
