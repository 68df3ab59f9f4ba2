"""The noise of a small vocabulary, made for several positions at once.

Noise is a function of seed, position and token, so what the next positions need can be made with this one's. For 2,048
tokens a row is bound by launching its 20 operations, and eight rows cost little more than one. Drafter and target of
one process share the rows, and a position that is drawn again finds its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from inference.noise import gumbel

_BLOCK_ELEMENTS = 1 << 14
"""Tokens times positions of one block, 128 KiB. From there on arithmetic is what costs: making more saves nothing."""

_MAX_POSITIONS = 16
"""Of one block: each costs a Python call, and a tiny vocabulary has room for thousands."""

_MAX_BLOCKS = 256
"""32 MiB at most, of all sequences. Only small batches come here, so the blocks of theirs are still there."""


def gumbel_of_all(
    seeds: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device
) -> torch.Tensor:
    """`gumbel` of the tokens [0, vocab_size), bit by bit: float64 [R, vocab_size], not to be changed."""
    if not is_made_ahead(len(seeds), vocab_size):
        return gumbel(seeds, positions, torch.arange(vocab_size, device=device))
    rows = _rows(seeds, positions, vocab_size, device)
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def gumbel_of_chains(seeds: Sequence[int], positions: Sequence[int], depth: int, vocab_size: int) -> torch.Tensor:
    """The same for ``depth`` positions of each row from its own on: float64 [R, depth, vocab_size], on the CPU."""
    cpu = torch.device("cpu")
    seed_of_each = [seed for seed in seeds for _ in range(depth)]
    each = [position for first in positions for position in range(first, first + depth)]
    if is_made_ahead(1, vocab_size):
        rows = torch.stack(_rows(seed_of_each, each, vocab_size, cpu))
    else:
        rows = gumbel(seed_of_each, each, torch.arange(vocab_size))
    return rows.view(len(seeds), depth, vocab_size)


def _rows(seeds: Sequence[int], positions: Sequence[int], vocab_size: int, device: torch.device) -> list[torch.Tensor]:
    size = min(_BLOCK_ELEMENTS // vocab_size, _MAX_POSITIONS)
    return [
        _block(seed, position // size, size, vocab_size, device)[position % size]
        for seed, position in zip(seeds, positions, strict=True)
    ]


def is_made_ahead(num_rows: int, vocab_size: int) -> bool:
    """Is a row of `gumbel_of_all` cheaper than one of `gumbel`, even if few of its tokens are wanted?"""
    return max(2, num_rows) * vocab_size <= _BLOCK_ELEMENTS


@lru_cache(_MAX_BLOCKS)
def _block(seed: int, index: int, size: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """The noise at ``size`` positions from ``index * size`` on: float64 [size, vocab_size]."""
    positions = range(index * size, (index + 1) * size)
    return gumbel([seed] * size, positions, torch.arange(vocab_size, device=device))
