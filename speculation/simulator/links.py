"""One direction of a connection: frames arrive in order, later."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from speculation.fingerprint import mix64
from speculation.simulator.clock import VirtualClock

FrameT = TypeVar("FrameT")


class Link(Generic[FrameT]):
    """A FIFO with latency and jitter."""

    def __init__(
        self,
        clock: VirtualClock,
        latency_s: float,
        jitter: float,
        deliver: Callable[[FrameT], None],
        seed: int,
    ) -> None:
        """A frame takes ``latency_s`` times a number in [1, 1 + ``jitter``)."""
        self.num_frames = 0
        self._clock = clock
        self._latency_s = latency_s
        self._jitter = jitter
        self._deliver = deliver
        self._seed = seed
        self._last_s = 0.0

    def send(self, frame: FrameT) -> None:
        self.num_frames += 1
        latency_s = self._latency_s
        if self._jitter:
            latency_s *= 1.0 + self._jitter * mix64(self._seed + self.num_frames) * 2.0**-64
        self._last_s = max(self._last_s, self._clock.now_s + latency_s)
        self._clock.at(self._last_s, partial(self._deliver, frame))
