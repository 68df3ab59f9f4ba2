"""Virtual time: a heap of what is due."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import TypeAlias

Due: TypeAlias = Callable[[], None]


class VirtualClock:
    """Runs what is due in order of time, of one time in order of rank, of one rank in the order it was asked for.

    A higher rank runs after everything of a lower one, also after what that brings about at the same time: a worker
    whose next step and whose news are due at once sees the news, and a target the drafts that cost nothing.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._num_asked = 0
        self._due: list[tuple[float, int, int, Due]] = []

    def at(self, time_s: float, action: Due, rank: int = 0) -> None:
        """Runs ``action`` at ``time_s``, or now if that has passed."""
        self._num_asked += 1
        heappush(self._due, (max(time_s, self.now_s), rank, self._num_asked, action))

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now_s, _, _, action = heappop(self._due)
            action()
