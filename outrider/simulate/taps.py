"""A worker spoken to directly, in the coordinator's place, with the time at which each of its frames came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Generic

from coordinator.clients import CommandT, FrameT, WorkerClient, WorkerConnection
from coordinator.grpc_clients import TokenizerCache, grpc_draft_client, grpc_target_client
from outrider.failures import CommandFailed
from outrider.launcher import DRAFT, TARGET, StackOptions, worker_arguments
from outrider.role_process import RoleProcess
from rpc.draft_codec import DraftFrame
from speculation.messages import DraftCommand, SessionId, TargetCommand, TargetFrame

PATIENCE_S = 30.0


class Tap(Generic[CommandT, FrameT]):
    """One connection to a worker; frames are awaited one by one."""

    def __init__(self) -> None:
        self._frames: asyncio.Queue[tuple[float, FrameT] | None] = asyncio.Queue()
        self._connection: WorkerConnection[CommandT] | None = None

    async def connect(self, client: WorkerClient[CommandT, FrameT]) -> None:
        self._connection = await client.connect(self._take, lambda error: self._frames.put_nowait(None))

    def _take(self, frame: FrameT) -> None:
        self._frames.put_nowait((time.perf_counter(), frame))

    def send(self, session_id: int, command: CommandT) -> None:
        assert self._connection is not None
        self._connection.send(SessionId(session_id), command)

    async def next(self) -> tuple[float, FrameT]:
        """When the next frame came, by ``time.perf_counter()``, and the frame. Raises `CommandFailed` without one."""
        async with asyncio.timeout(PATIENCE_S):
            found = await self._frames.get()
        if found is None:
            raise CommandFailed("a worker was lost while it was measured; its messages are above")
        return found

    def forget(self) -> None:
        """Drops what has come and was not awaited."""
        while not self._frames.empty():
            self._frames.get_nowait()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()


TargetTap = Tap[TargetCommand, TargetFrame]
DraftTap = Tap[DraftCommand, DraftFrame]


@asynccontextmanager
async def tapped_pair(options: StackOptions) -> AsyncIterator[tuple[TargetTap, DraftTap, bytes, list[str]]]:
    """Both workers of a pair in processes of their own, the tokenizer.json, their addresses. Raises `CommandFailed`."""
    async with AsyncExitStack() as life:
        cache: TokenizerCache = {}
        addresses = [await _start(role, options, life) for role in (TARGET, DRAFT)]
        target_client = grpc_target_client(addresses[0], PATIENCE_S, cache)
        draft_client = grpc_draft_client(addresses[1], PATIENCE_S, cache)
        life.push_async_callback(target_client.close)
        life.push_async_callback(draft_client.close)
        _, tokenizer_json = await target_client.describe()
        target, draft = TargetTap(), DraftTap()
        await target.connect(target_client)
        life.push_async_callback(target.close)
        await draft.connect(draft_client)
        life.push_async_callback(draft.close)
        yield target, draft, tokenizer_json, addresses


async def _start(role: str, options: StackOptions, life: AsyncExitStack) -> str:
    process = await RoleProcess.start(role, worker_arguments(options, role), _ignore)
    life.push_async_callback(process.stop)
    return await process.ready()


def _ignore(role: str, text: str) -> None:
    """Nobody watches."""
