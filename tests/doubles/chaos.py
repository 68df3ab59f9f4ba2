"""A draft link that behaves as badly as a network and a drafter may: loses, repeats, delays and reorders proposals,
makes some up, and breaks off now and then. Seeded, so that a failure repeats."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from coordinator.clients import DraftClient, DraftConnection, OnLost
from rpc.draft_codec import DraftFrame
from speculation.messages import DraftCommand, DraftEvent, ModelInfo, Proposal, SessionId


class ChaosDraftClient:
    """Wraps a draft client; every proposal meets one of the fates below."""

    def __init__(self, inner: DraftClient, seed: int, vocab_size: int, breaks_off: bool = True) -> None:
        self._inner = inner
        self._random = random.Random(seed)
        self._vocab_size = vocab_size
        self._breaks_off = breaks_off
        self.num_lost = 0
        self._closing: list[asyncio.Future[None]] = []

    @property
    def name(self) -> str:
        return f"chaos-{self._inner.name}"

    async def describe(self) -> tuple[ModelInfo, bytes]:
        return await self._inner.describe()

    async def connect(self, on_frame: Callable[[DraftFrame], None], on_lost: OnLost) -> DraftConnection:
        connection = _ChaosConnection(self._random, self._vocab_size, on_frame)
        connection.inner = await self._inner.connect(connection.receive, on_lost)
        if self._breaks_off:
            connection.break_off = lambda: self._break_off(connection, on_lost)
        return connection

    def _break_off(self, connection: _ChaosConnection, on_lost: OnLost) -> None:
        self.num_lost += 1
        self._closing.append(asyncio.ensure_future(connection.close()))
        on_lost(ConnectionError("chaos"))

    async def close(self) -> None:
        await self._inner.close()


class _ChaosConnection:
    def __init__(self, rng: random.Random, vocab_size: int, on_frame: Callable[[DraftFrame], None]) -> None:
        self.inner: DraftConnection
        self.break_off: Callable[[], None] = lambda: None
        self._random = rng
        self._vocab_size = vocab_size
        self._on_frame = on_frame
        self._held: list[tuple[SessionId, DraftEvent]] = []
        self._is_open = True

    def send(self, session_id: SessionId, command: DraftCommand) -> None:
        self.inner.send(session_id, command)

    async def close(self) -> None:
        self._is_open = False
        await self.inner.close()

    def receive(self, frame: DraftFrame) -> None:
        if not self._is_open:
            return
        items: list[tuple[SessionId, DraftEvent]] = []
        for session_id, event in frame:
            items.extend(self._fate(session_id, event))
        if self._random.random() < 0.3:  # what was held back comes late and in any order
            self._random.shuffle(self._held)
            items, self._held = [*items, *self._held], []
        if items:
            self._on_frame(tuple(items))
        if self._random.random() < 0.004:
            self._is_open = False
            self.break_off()

    def _fate(self, session_id: SessionId, event: DraftEvent) -> list[tuple[SessionId, DraftEvent]]:
        item = (session_id, event)
        luck = self._random.random()
        if not isinstance(event, Proposal) or luck < 0.5:
            return [item]
        if luck < 0.6:
            return []
        if luck < 0.7:
            return [item, item]
        if luck < 0.85:
            self._held.append(item)
            return []
        return [(session_id, self._spoil(event)), item]

    def _spoil(self, proposal: Proposal) -> Proposal:
        """The right address, rubbish behind it: wrong tokens, some of them outside the vocabulary."""
        tokens = tuple(self._random.randrange(self._vocab_size + 5) for _ in range(self._random.randint(1, 12)))
        return Proposal(proposal.prefix_length, proposal.prefix_fingerprint, tokens, (1.0,) * len(tokens))
