"""How one step reaches the paged cache: where new keys and values are written, what each sequence reads.

Both are worked out once per step. A run of consecutive blocks is a plain view of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from inference.kv_cache import KVCache, LayerViews
from inference.packing import PackedBatch, PackedSequence

SlotRun: TypeAlias = tuple[int, int]
"""Consecutive slots of the cache: [start, stop)."""


class Writer(Protocol):
    """Stores the keys and values of a step's T tokens."""

    @property
    def keys(self) -> LayerViews:
        """By layer: the places of the new keys, [num_kv_heads, T, key_dim], or with `slots` all keys."""
        ...

    @property
    def values(self) -> LayerViews: ...

    @property
    def slots(self) -> torch.Tensor | None:
        """Int64 [T]; None: the places are those of `keys` and `values` as they are."""
        ...

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """`key` and `value` are [1, num_kv_heads, T, dim]."""
        ...


class _RunWriter:
    """New keys and values go to consecutive slots."""

    slots = None

    def __init__(self, keys: LayerViews, values: LayerViews) -> None:
        self.keys = keys
        self.values = values

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys[layer].copy_(key[0])
        self.values[layer].copy_(value[0])


class _ScatteringWriter:
    """New keys and values go to slots anywhere in the cache."""

    def __init__(self, slots: torch.Tensor, cache: KVCache) -> None:
        self.slots = slots
        self.keys = cache.layer_keys
        self.values = cache.layer_values

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys[layer].index_copy_(1, self.slots, key[0])
        self.values[layer].index_copy_(1, self.slots, value[0])


def writer_for(batch: PackedBatch, cache: KVCache) -> Writer:
    """Where the step's new keys and values go."""
    slots = new_slots(batch, cache.block_size)
    if is_run(slots):
        keys, values = cache.slots(slots[0], slots[-1] + 1)
        return _RunWriter(keys.unbind(0), values.unbind(0))
    return _ScatteringWriter(torch.tensor(slots, device=batch.token_ids.device), cache)


def new_slots(batch: PackedBatch, block_size: int) -> list[int]:
    """The slots of the step's T new positions."""
    return [
        sequence.blocks[position // block_size] * block_size + position % block_size
        for sequence in batch.sequences
        for position in range(sequence.num_cached, sequence.context)
    ]


@dataclass(frozen=True, slots=True)
class RunViews:
    """Keys and values of some consecutive positions of one sequence, by layer; views, not copies."""

    keys: LayerViews
    """Each [num_kv_heads, n, key_dim], or [num_kv_heads, key_dim, n] if so asked."""
    values: LayerViews
    """Each [num_kv_heads, n, value_dim]."""


def runs_of(
    sequence: PackedSequence, first: int, cache: KVCache, *, transposed_keys: bool = False
) -> tuple[RunViews, ...]:
    """Where positions [first, context) of the sequence are read, as views."""
    runs = []
    for start, stop in slot_runs(sequence, first, cache.block_size):
        keys, values = cache.slots(start, stop)
        runs.append(RunViews((keys.transpose(2, 3) if transposed_keys else keys).unbind(0), values.unbind(0)))
    return tuple(runs)


def slot_runs(sequence: PackedSequence, first: int, block_size: int) -> list[SlotRun]:
    """Where positions [first, context) of the sequence are read: a run for each stretch of consecutive blocks.

    A sequence that has grown alone is one run; a fork is two or three, what it shares and its own.
    """
    runs = []
    blocks = sequence.blocks[first // block_size : -(-sequence.context // block_size)]
    skip, num_left = first % block_size, sequence.context - first
    for start_block, num_blocks in _stretches(blocks):
        start, count = start_block * block_size + skip, min(num_blocks * block_size - skip, num_left)
        runs.append((start, start + count))
        skip, num_left = 0, num_left - count
    return runs


def _stretches(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive blocks as (first, how many)."""
    if is_run(blocks):
        yield blocks[0], len(blocks)
        return
    start = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            yield blocks[start], index - start
            start = index


def first_visible(sequence: PackedSequence, window: int | None) -> int:
    """The furthest back that any new token of the sequence looks: nothing before it is read."""
    return 0 if window is None else max(0, sequence.num_cached + 1 - window)


def additive_mask(
    sequence: PackedSequence, first: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Mask [T, context - first] to be added to scores: 0 where the row may look, -inf elsewhere."""
    keys = torch.arange(first, sequence.context, device=device)
    rows = torch.arange(sequence.num_cached, sequence.context, device=device).unsqueeze(1)
    hidden = keys > rows
    if window is not None and sequence.context - first > window:
        hidden |= keys <= rows - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def is_run(numbers: list[int]) -> bool:
    """Are they consecutive?"""
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
