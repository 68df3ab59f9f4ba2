"""Times of a model's bare steps: forward and draws, nothing around them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Final

from inference import Chunk, Runtime, SamplingRow, SequenceId, draw

_NUM_WARM_UP: Final = 3
_CONTEXT: Final = 200
"""Tokens before the timed steps: the middle of a completion of the held-out prompts."""


def step_times(runtime: Runtime, sizes: Sequence[int], limit: int, num_timed: int = 21) -> dict[int, float]:
    """Median seconds of a step over so many tokens of one sequence, by that number; ids below ``limit`` are drawn."""
    context = min(_CONTEXT, runtime.max_context - max(sizes))
    sequence = runtime.open()
    runtime.forward([Chunk(sequence, [1] * context, 1)])
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(num_timed + _NUM_WARM_UP):
        for size, found in times.items():  # interleaved: a machine that drifts favours none
            found.append(_timed_step(runtime, sequence, context, size, limit))
    runtime.free(sequence)
    return {size: statistics.median(found[_NUM_WARM_UP:]) for size, found in times.items()}


def _timed_step(runtime: Runtime, sequence: SequenceId, context: int, size: int, limit: int) -> float:
    positions = range(context + 1, context + 1 + size)
    start_s = time.perf_counter()
    logits = runtime.forward([Chunk(sequence, [1] * size, size)])
    draw(logits, [SamplingRow(0.0)] * size, positions, limit=limit)
    elapsed_s = time.perf_counter() - start_s
    runtime.truncate(sequence, context)
    return elapsed_s
