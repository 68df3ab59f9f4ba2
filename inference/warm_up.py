"""The first passes through a model are slow (lazy initialisation, kernel choice, page faults): take them early."""

from __future__ import annotations

import contextlib

from inference.errors import OutOfKVBlocks
from inference.runtime import Chunk, Runtime, SequenceId

_MAX_TOKENS = 9
"""A usual verification, the last committed token and eight drafted ones, is the largest of the common steps."""


def warm_up(runtime: Runtime, prompt_length: int = 64, num_rounds: int = 2) -> None:
    """Runs a prefill, then steps of 1 to 9 tokens with and without a fork beside, on sequences that are forgotten."""
    length = min(prompt_length, runtime.max_context - _MAX_TOKENS - 1)
    if length < 1:
        return
    sequence = runtime.open()
    try:
        runtime.forward([Chunk(sequence, [0] * length, 1)])
        for num_tokens in list(range(1, _MAX_TOKENS + 1)) * num_rounds:
            runtime.forward([Chunk(sequence, [0] * num_tokens, num_tokens)])
            runtime.truncate(sequence, length)
            with contextlib.suppress(OutOfKVBlocks):  # a pool too small for a fork will never have one
                _run_with_fork(runtime, sequence)
                runtime.truncate(sequence, length)
    finally:
        runtime.free(sequence)


def _run_with_fork(runtime: Runtime, sequence: SequenceId) -> None:
    """As a drafter's step with a branch."""
    fork = runtime.fork(sequence)
    try:
        runtime.forward([Chunk(sequence, [0], 1), Chunk(fork, [0], 1)])
    finally:
        runtime.free(fork)
