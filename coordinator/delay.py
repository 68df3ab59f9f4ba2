"""A worker behind a slower link, for experiments: every frame, either way, arrives so much later, in order.

Nothing waits and nothing is lost; only the time of arrival changes, as over a longer wire of unlimited bandwidth.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from coordinator.clients import CommandT, FrameT, OnLost, WorkerClient, WorkerConnection
from speculation.messages import ModelInfo, SessionId

ItemT = TypeVar("ItemT")


class DelayLine(Generic[ItemT]):
    """First in, first out, each item so much later."""

    def __init__(self, delay_s: float, deliver: Callable[[ItemT], None]) -> None:
        """``deliver`` is called on the event loop."""
        self._delay_s = delay_s
        self._deliver = deliver
        self._items: deque[ItemT] = deque()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def put(self, item: ItemT) -> None:
        if self._closed:
            return
        self._items.append(item)
        self._loop.call_later(self._delay_s, self._deliver_next)

    def close(self) -> None:
        """What is under way, and what comes after it, is lost."""
        self._closed = True
        self._items.clear()

    def _deliver_next(self) -> None:
        """Timers that are due at the same time may fire in any order, the items leave in theirs."""
        if self._items:
            self._deliver(self._items.popleft())


class DelayedClient(Generic[CommandT, FrameT]):
    """A `WorkerClient` whose connections are ``delay_s`` away, one way."""

    def __init__(self, client: WorkerClient[CommandT, FrameT], delay_s: float) -> None:
        self._client = client
        self._delay_s = delay_s

    @property
    def name(self) -> str:
        return self._client.name

    async def describe(self) -> tuple[ModelInfo, bytes]:
        """Not delayed: nobody measures it."""
        return await self._client.describe()

    async def connect(self, on_frame: Callable[[FrameT], None], on_lost: OnLost) -> DelayedConnection[CommandT]:
        arriving: DelayLine[Callable[[], None]] = DelayLine(self._delay_s, lambda arrive: arrive())
        inner = await self._client.connect(
            lambda frame: arriving.put(lambda: on_frame(frame)),
            lambda error: arriving.put(lambda: on_lost(error)),
        )
        return DelayedConnection(inner, self._delay_s, arriving.close)

    async def close(self) -> None:
        await self._client.close()


class DelayedConnection(Generic[CommandT]):
    """A `WorkerConnection`; what is sent within one turn of the event loop stays one frame."""

    def __init__(self, inner: WorkerConnection[CommandT], delay_s: float, on_close: Callable[[], None]) -> None:
        self._inner = inner
        self._on_close = on_close
        self._leaving: DelayLine[list[tuple[SessionId, CommandT]]] = DelayLine(delay_s, self._send)
        self._frame: list[tuple[SessionId, CommandT]] = []
        self._loop = asyncio.get_running_loop()

    def send(self, session_id: SessionId, command: CommandT) -> None:
        if not self._frame:
            self._loop.call_soon(self._end_frame)
        self._frame.append((session_id, command))

    def _end_frame(self) -> None:
        frame, self._frame = self._frame, []
        self._leaving.put(frame)

    def _send(self, frame: list[tuple[SessionId, CommandT]]) -> None:
        for session_id, command in frame:
            self._inner.send(session_id, command)

    async def close(self) -> None:
        self._leaving.close()
        self._on_close()
        await self._inner.close()
