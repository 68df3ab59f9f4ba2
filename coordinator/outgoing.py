"""Carries out what an `Outbox` decides: what is said to a worker waits here, on the event loop, until it is due."""

from __future__ import annotations

import asyncio
import time
from typing import Generic

from coordinator.clients import CommandT, WorkerConnection
from speculation.messages import DraftCommand, SessionId, TargetFrame
from speculation.outbox import Outbox

TIMER_STEP_S = 0.001
"""How exact timers of the event loop are: they fire up to so much late."""


class Outgoing(Generic[CommandT]):
    """One connection's outbox and its timer."""

    def __init__(self, connection: WorkerConnection[CommandT], outbox: Outbox[CommandT]) -> None:
        self._connection = connection
        self._outbox = outbox
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._due_s = 0.0  # what the timer is set for

    def send(self, session_id: SessionId, command: CommandT) -> None:
        """Says something now or, together with other things, when it is of use."""
        now_s = time.monotonic()
        self._outbox.put(session_id, command, now_s)
        if self._timer is None or self._outbox.due_s(now_s) < self._due_s:
            self._set_timer(now_s)

    def on_told_drafter(self, session_id: SessionId, command: DraftCommand) -> None:
        """See `Outbox.on_told_drafter`."""
        self._outbox.on_told_drafter(session_id, command)

    def on_frame(self, frame: TargetFrame, now_s: float) -> float:
        """A frame of the target came, see `Outbox.on_frame`. Returns `Outbox.wanted_in_s`."""
        self._outbox.on_frame(frame, now_s)
        if self._timer is not None:
            self._set_timer(now_s)
        return self._outbox.wanted_in_s(now_s)

    async def close(self) -> None:
        """Ends the connection; what has not left is lost. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        await self._connection.close()

    def _set_timer(self, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = self._outbox.due_s(now_s)
        after_s = self._due_s - now_s - TIMER_STEP_S / 2
        if after_s > 0.0:
            self._timer = self._loop.call_later(after_s, self._leave)
        else:
            self._timer = self._loop.call_soon(self._leave)

    def _leave(self) -> None:
        """Within one turn of the loop, so as one frame."""
        self._timer = None
        for session_id, command in self._outbox.take(time.monotonic()):
            self._connection.send(session_id, command)
