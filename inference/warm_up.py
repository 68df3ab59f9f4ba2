"""The first passes through a model are slow (lazy initialisation, kernel choice, page faults): take them early."""

from __future__ import annotations

from inference.runtime import Chunk, Runtime

_NUM_VERIFIED = 9
"""A usual verification: the last committed token and eight drafted ones."""


def warm_up(runtime: Runtime, prompt_length: int = 64, num_rounds: int = 3) -> None:
    """Runs a prefill, then decodes and verifications, on a sequence that is forgotten afterwards."""
    length = min(prompt_length, runtime.max_context - _NUM_VERIFIED * (num_rounds + 1) - num_rounds)
    if length < 1:
        return
    sequence = runtime.open()
    try:
        runtime.forward([Chunk(sequence, [0] * length, 1)])
        for _ in range(num_rounds):
            runtime.forward([Chunk(sequence, [0], 1)])
            runtime.forward([Chunk(sequence, [0] * _NUM_VERIFIED, _NUM_VERIFIED)])
    finally:
        runtime.free(sequence)
