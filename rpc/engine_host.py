"""Between the event loop and a model thread: connections on one side, an engine on the other.

The engine owns all device state and runs on one thread. It sees `Submitted` and `Hangup` in the order in which they
happened, and answers once per step with at most one frame for each connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NewType, Protocol, TypeVar

from speculation.messages import NOTHING_HEARD, Heard, ModelInfo, SessionId

CommandT = TypeVar("CommandT")
FrameT = TypeVar("FrameT")
FrameT_co = TypeVar("FrameT_co", covariant=True)
ConnectionId = NewType("ConnectionId", int)


@dataclass(frozen=True, slots=True)
class Submitted(Generic[CommandT]):
    """A frame of commands that arrived on one connection."""

    connection: ConnectionId
    items: Sequence[tuple[SessionId, CommandT]]
    arrived_s: float
    """``time.monotonic()`` when it arrived; the engine may look at it a whole step later."""
    heard: Heard = NOTHING_HEARD
    """What its sender had had of this worker."""


@dataclass(frozen=True, slots=True)
class Hangup:
    """The connection is gone; its sessions are to be dropped."""

    connection: ConnectionId


class EngineThread(Protocol):
    """The part of a model thread that the host uses; safe to call from the event loop, `stop` apart, which waits."""

    def start(self) -> None: ...

    def submit(self, command: Any) -> None: ...

    def stop(self) -> None: ...


class MakeThread(Protocol[FrameT_co]):
    """Makes the engine's thread. Both callbacks are called from that thread."""

    def __call__(
        self,
        deliver: Callable[[Sequence[tuple[ConnectionId, FrameT_co]]], None],
        *,
        on_failure: Callable[[BaseException], None],
    ) -> EngineThread: ...


class HostConnection(Generic[CommandT, FrameT]):
    """One coordinator's stream, as the engine sees it."""

    def __init__(self, connection: ConnectionId, host: EngineHost[CommandT, FrameT]) -> None:
        self._id = connection
        self._host = host

    def submit(self, items: Sequence[tuple[SessionId, CommandT]], heard: Heard = NOTHING_HEARD) -> None:
        """Hands commands to the engine; does not block."""
        self._host.submit(Submitted(self._id, items, time.monotonic(), heard))

    def close(self) -> None:
        """Drops the connection's sessions; nothing is delivered afterwards. May be called twice."""
        self._host.disconnect(self._id)


class EngineHost(Generic[CommandT, FrameT]):
    """Owns the thread and the connections; a `WorkerCore`. Build it on the event loop that serves the streams."""

    def __init__(
        self,
        model_info: ModelInfo,
        tokenizer_json: bytes,
        make_thread: MakeThread[FrameT],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_failure`` is called on the event loop when the engine has died of `failure`."""
        self.model_info = model_info
        self.tokenizer_json = tokenizer_json
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._delivers: dict[ConnectionId, Callable[[FrameT], None]] = {}
        self._thread = make_thread(self._deliver_from_thread, on_failure=self._fail_from_thread)
        self._thread.start()

    def connect(self, deliver: Callable[[FrameT], None]) -> HostConnection[CommandT, FrameT]:
        """``deliver`` is called on the event loop, once per step that concerns the connection."""
        connection = ConnectionId(next(self._ids))
        self._delivers[connection] = deliver
        return HostConnection(connection, self)

    def submit(self, command: Submitted[CommandT] | Hangup) -> None:
        with contextlib.suppress(RuntimeError):  # the thread has ended: so do the connections, in a moment
            self._thread.submit(command)

    def disconnect(self, connection: ConnectionId) -> None:
        if self._delivers.pop(connection, None) is not None:
            self.submit(Hangup(connection))

    async def stop(self) -> None:
        """Ends the thread after its current step."""
        await self._loop.run_in_executor(None, self._thread.stop)

    def _deliver_from_thread(self, outputs: Sequence[tuple[ConnectionId, FrameT]]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _fail_from_thread(self, failure: BaseException) -> None:
        self.failure = failure
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_failure)

    def _dispatch(self, outputs: Sequence[tuple[ConnectionId, FrameT]]) -> None:
        for connection, frame in outputs:
            deliver = self._delivers.get(connection)
            if deliver is not None:
                deliver(frame)
