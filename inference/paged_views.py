"""How one step reaches the paged cache: where new keys and values are written, what each sequence reads.

Both are worked out once per step. A run of consecutive blocks, the usual case, is a plain view of the cache; scattered
blocks are gathered, layer by layer.
"""

from __future__ import annotations

from typing import Protocol

import torch

from inference.kv_cache import KVCache, LayerViews
from inference.packing import PackedBatch, PackedSequence


class Writer(Protocol):
    """Stores the keys and values of a step's T tokens."""

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """`key` and `value` are [1, num_kv_heads, T, dim]."""
        ...


class Reader(Protocol):
    """Reads the keys and values of a sequence, from its first visible position to its last new one."""

    def fetch(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_kv_heads, n, key_dim], or [num_kv_heads, key_dim, n] if so asked, and [num_kv_heads, n, value_dim]."""
        ...


class _RunWriter:
    """New keys and values go to consecutive slots."""

    def __init__(self, keys: LayerViews, values: LayerViews) -> None:
        self._keys = keys
        self._values = values

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._keys[layer].copy_(key[0])
        self._values[layer].copy_(value[0])


class _ScatteringWriter:
    """New keys and values go to slots anywhere in the cache."""

    def __init__(self, slots: torch.Tensor, cache: KVCache) -> None:
        self._slots = slots
        self._cache = cache

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._cache.layer_keys[layer].index_copy_(1, self._slots, key[0])
        self._cache.layer_values[layer].index_copy_(1, self._slots, value[0])


def writer_for(batch: PackedBatch, cache: KVCache) -> Writer:
    """Where the step's new keys and values go."""
    size = cache.block_size
    slots = [
        sequence.blocks[position // size] * size + position % size
        for sequence in batch.sequences
        for position in range(sequence.num_cached, sequence.context)
    ]
    if _is_run(slots):
        keys, values = cache.slots(slots[0], slots[-1] + 1)
        return _RunWriter(keys.unbind(0), values.unbind(0))
    return _ScatteringWriter(torch.tensor(slots, device=batch.token_ids.device), cache)


class _RunReader:
    """Keys and values of a sequence whose blocks follow one another: no copy."""

    def __init__(self, keys: LayerViews, values: LayerViews) -> None:
        self._keys = keys
        self._values = values

    def fetch(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keys[layer], self._values[layer]


class _GatheringReader:
    """Keys and values of a sequence whose blocks lie apart: copied together for each layer."""

    def __init__(self, blocks: torch.Tensor, skip: int, num_keys: int, cache: KVCache, transposed: bool) -> None:
        self._blocks = blocks
        self._range = slice(skip, skip + num_keys)
        self._cache = cache
        self._transposed = transposed

    def fetch(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._gather(self._cache.layer_key_blocks[layer])
        return keys.transpose(1, 2) if self._transposed else keys, self._gather(self._cache.layer_value_blocks[layer])

    def _gather(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.index_select(1, self._blocks).flatten(1, 2)[:, self._range]


def reader_for(
    sequence: PackedSequence, first: int, cache: KVCache, device: torch.device, *, transposed_keys: bool = False
) -> Reader:
    """Where positions [first, context) of the sequence are read."""
    size = cache.block_size
    blocks = sequence.blocks[first // size :]
    skip, num_keys = first % size, sequence.context - first
    if _is_run(blocks):
        start = blocks[0] * size + skip
        keys, values = cache.slots(start, start + num_keys)
        return _RunReader((keys.transpose(2, 3) if transposed_keys else keys).unbind(0), values.unbind(0))
    return _GatheringReader(torch.tensor(blocks, device=device), skip, num_keys, cache, transposed_keys)


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


def _is_run(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
