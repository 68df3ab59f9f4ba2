"""One worker as the coordinator sees it: connected for as long as it can be reached, and the sessions it holds.

`WorkerLink.run` describes, checks and connects, and after a loss starts again, for ever. Everything else happens in
callbacks on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from coordinator.clients import CommandT, FrameT, WorkerClient
from coordinator.outgoing import Outgoing
from coordinator.vocabulary import ServedModel, load_served_model
from rpc.errors import OutriderError
from speculation.cost import StepCostModel
from speculation.gathering import RoundTrip
from speculation.messages import DraftCommand, SessionId, TargetFrame
from speculation.outbox import Outbox

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0

SessionT = TypeVar("SessionT")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkEvents(Generic[CommandT, FrameT, SessionT]):
    """What the owner of a link wants to know; all called on the event loop."""

    check: Callable[[WorkerLink[CommandT, FrameT, SessionT], ServedModel], Awaitable[None]]
    """May this worker serve here? Raises `ModelMismatch` if not; it is asked again later."""
    on_up: Callable[[WorkerLink[CommandT, FrameT, SessionT]], None]
    on_frame: Callable[[WorkerLink[CommandT, FrameT, SessionT], FrameT], None]
    on_lost: Callable[[WorkerLink[CommandT, FrameT, SessionT], list[SessionT]], None]
    """The sessions that the worker held; the link has forgotten them."""
    on_problem: Callable[[], None]
    """An attempt to connect failed; `WorkerLink.problem` says why."""


class WorkerLink(Generic[CommandT, FrameT, SessionT]):
    """A worker, its connection while there is one, and its sessions."""

    def __init__(
        self,
        client: WorkerClient[CommandT, FrameT],
        events: LinkEvents[CommandT, FrameT, SessionT],
        costs: StepCostModel | None = None,
    ) -> None:
        """``costs``: of a target's steps."""
        self.name = client.name
        self.sessions: dict[SessionId, SessionT] = {}
        self.model: ServedModel | None = None
        """What it serves; of a worker that is away, what it served last."""
        self.problem: OutriderError | None = None
        """Why the last attempt to connect failed; None while up."""
        self.was_tried = False
        """The first attempt is over, for better or worse."""
        self.trip = RoundTrip()
        """To the worker and back, if it answers news."""
        self._costs = costs
        self._described: ServedModel | None = None  # whether or not it may serve here
        self._was_missed = False  # somebody was told that it is not there
        self._client = client
        self._events = events
        self._outgoing: Outgoing[CommandT] | None = None  # while connected

    @property
    def is_up(self) -> bool:
        return self._outgoing is not None

    def send(self, session_id: SessionId, command: CommandT) -> None:
        """Queues a command; does nothing while the worker is lost."""
        if self._outgoing is not None:
            self._outgoing.send(session_id, command)

    def on_told_drafter(self, session_id: SessionId, command: DraftCommand) -> None:
        """A session's drafter was told something: its drafts may be awaited by the next frame to this target."""
        if self._outgoing is not None:
            self._outgoing.on_told_drafter(session_id, command)

    def gather(self, frame: TargetFrame, now_s: float) -> float:
        """A target's frame says how long commands may gather; returns `Outbox.wanted_in_s`."""
        return self._outgoing.on_frame(frame, now_s) if self._outgoing is not None else 0.0

    async def run(self) -> None:
        """Keeps the worker connected until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            lost = await self._try_connect()
            if lost is not None:
                backoff_s = FIRST_BACKOFF_S
                await lost.wait()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # jitter: not all coordinators at once
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def close(self) -> None:
        """Closes the connection and the client; only after `run` has ended."""
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            await outgoing.close()
        await self._client.close()

    async def _try_connect(self) -> asyncio.Event | None:
        try:
            return await self._connect()
        except OutriderError as problem:
            self._report(problem)
            return None

    async def _connect(self) -> asyncio.Event:
        model = self._described = await self._describe()
        await self._events.check(self, model)
        self.model = model
        lost = asyncio.Event()
        connection = await self._client.connect(
            lambda frame: self._events.on_frame(self, frame), lambda error: self._on_lost(error, lost)
        )
        if lost.is_set():  # between the stream's opening and now
            await connection.close()
            return lost
        self._outgoing = Outgoing(connection, Outbox(self._costs))
        self.problem, self.was_tried = None, True
        level, self._was_missed = logging.WARNING if self._was_missed else logging.INFO, False
        _log.log(level, "connected to worker", extra={"worker": self.name, "model": model.info.name})
        self._events.on_up(self)
        return lost

    async def _describe(self) -> ServedModel:
        info, tokenizer_json = await self._client.describe()
        known = self._described
        if known is not None and known.info == info and known.tokenizer_json == tokenizer_json:
            return known
        return await asyncio.to_thread(load_served_model, info, tokenizer_json)

    def _on_lost(self, error: Exception | None, lost: asyncio.Event) -> None:
        lost.set()
        if self._outgoing is None:
            return
        self._outgoing = None
        self._was_missed = True
        problem = str(error or "the stream ended")
        _log.warning("lost worker", extra={"worker": self.name, "problem": problem, "num_sessions": len(self.sessions)})
        sessions, self.sessions = list(self.sessions.values()), {}
        self._events.on_lost(self, sessions)

    def _report(self, problem: OutriderError) -> None:
        if self.problem is None or self.problem.message != problem.message:
            self._was_missed = True
            _log.warning("cannot use worker", extra={"worker": self.name, "problem": problem.message})
        self.problem, self.was_tried = problem, True
        self._events.on_problem()
