"""Times of a model's bare steps: forward and draws, nothing around them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Final

from inference import Chunk, Runtime, SamplingRow, draw

_NUM_WARM_UP: Final = 3
_CONTEXT: Final = 200
"""Tokens before the timed steps: the middle of a completion of the held-out prompts."""


def step_times(runtime: Runtime, sizes: Sequence[int], limit: int, num_timed: int = 21) -> dict[int, float]:
    """Median seconds of a step over so many tokens of one sequence, by that number; ids below ``limit`` are drawn."""
    timer = StepTimer(runtime, sizes, limit)
    times = timer.medians_s(num_timed)
    timer.close()
    return times


class StepTimer:
    """Times steps of one sequence, which it keeps until it is closed."""

    def __init__(self, runtime: Runtime, sizes: Sequence[int], limit: int) -> None:
        """``sizes``: tokens of a step. Ids below ``limit`` are drawn."""
        self._runtime = runtime
        self._sizes = sizes
        self._limit = limit
        self._context = min(_CONTEXT, runtime.max_context - max(sizes))
        self._sequence = runtime.open()
        runtime.forward([Chunk(self._sequence, [1] * self._context, 1)])

    def medians_s(self, num_timed: int) -> dict[int, float]:
        """Median seconds of ``num_timed`` steps of each size, by size."""
        times: dict[int, list[float]] = {size: [] for size in self._sizes}
        for _ in range(num_timed + _NUM_WARM_UP):
            for size, found in times.items():  # interleaved: a machine that drifts favours none
                found.append(self._timed_step(size))
        return {size: statistics.median(found[_NUM_WARM_UP:]) for size, found in times.items()}

    def close(self) -> None:
        """Gives the sequence's memory back."""
        self._runtime.free(self._sequence)

    def _timed_step(self, size: int) -> float:
        positions = range(self._context + 1, self._context + 1 + size)
        start_s = time.perf_counter()
        logits = self._runtime.forward([Chunk(self._sequence, [1] * size, size)])
        draw(logits, [SamplingRow(0.0)] * size, positions, limit=self._limit)
        elapsed_s = time.perf_counter() - start_s
        self._runtime.truncate(self._sequence, self._context)
        return elapsed_s
